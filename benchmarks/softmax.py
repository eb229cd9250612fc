"""Quantizers of softmax outputs, alone in an otherwise float network: what they do to products and outputs.

    python -m benchmarks.softmax [--bed vit] [--bits 3 4] [--count 64]

Every variant is fitted on two calibration samples and judged on evaluation samples: signal over noise of the products
P V (mean over attentions, four samples), and of the network's outputs, their agreement and divergence (``--count``
samples). The logarithmic quantizers are those of FQ-ViT (arXiv 2111.13824) and RepQ-ViT (arXiv 2212.08254),

    q = round(-log_b(P / s)),    P_hat = s b^-q,  0 beyond the last code        b = 2 or sqrt(2)

with s = 1 as published, and with the s of least error in the products. They are simulated: no standard operator
computes them. All others are what onnxptq writes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.beds import BEDS, Bed, decoded, model_path
from benchmarks.results import ResultsFile, default_path, is_wanted
from onnxptq.calibrate.products import choose_softmax_ranges
from onnxptq.graph.attention import Attention, find_attention
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.lowering import LoweredModule, lower
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.quantizers.focusing import FocusedActivation
from onnxptq.quantizers.torch_affine import fake_quantizer
from onnxptq.rooting import root_weights
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import CanonicalModel, QType

CONSOLE = Console(highlight=False, soft_wrap=True)
FITTED_ON = 2
PRODUCTS_OF = 4
BATCH = 8
STEPS = 200
"""Gradient steps of the learnt variant, on the products it was fitted on."""

Quantizer = Callable[[torch.Tensor], torch.Tensor]
Operands = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""P and V of one attention, for some samples."""

_ENDS = tuple(2.0 ** (-k / 6) for k in range(43))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The bed's model in torch, its attentions, and the operands that quantizers are fitted on."""

    model: CanonicalModel
    module: LoweredModule
    attentions: Sequence[Attention]
    samples: Sequence[Mapping[str, np.ndarray]]
    fitting: Sequence[Operands]


def main() -> int:
    """Measure what is missing and print a table per number of bits."""
    given = _arguments()
    torch.set_num_threads(1)
    results = ResultsFile(given.out)
    bed = BEDS[given.bed]
    wanted = [
        (bits, variant, f"softmax/{bed.name}/a{bits}/{variant}")
        for bits in given.bits
        for variant in VARIANTS
        if is_wanted(results, f"softmax/{bed.name}/a{bits}/{variant}", force=given.force, stale=False)
    ]
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            network = _network(bed, Path(folder))
            inputs = _inputs(bed, "evaluation", given.count)
            reference = _run(network, inputs, ())
            for bits, variant, key in wanted:
                CONSOLE.print(f"{key} ...")
                begin = time.perf_counter()
                quantizers = VARIANTS[variant](network, bits)
                row = {"bed": bed.name, "bits": bits, "variant": variant, "count": len(inputs)}
                row["fitting_s"] = round(time.perf_counter() - begin, 1)
                results.add("softmax", key, row | _judged(network, inputs, reference, quantizers))
    for bits in given.bits:
        CONSOLE.print(_table(bed.name, bits, results.rows("softmax")))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bed", choices=BEDS, default="vit")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--count", type=int, default=64, help="evaluation samples")
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    return parser.parse_args()


def _inputs(bed: Bed, split: Any, count: int) -> list[dict[str, np.ndarray]]:
    values = decoded(bed, split).values()
    chosen = np.linspace(0, len(values) - 1, count).astype(int)
    return [{bed.input_name: np.array(values[i : i + 1])} for i in chosen]


def _network(bed: Bed, folder: Path) -> Network:
    model = canonicalize(model_path(bed), folder)
    attentions = [a for a in find_attention(GraphIndex(model.graph)) if a.weights_index == 0]
    inputs, outputs = ([t.name for t in ends] for ends in (model.graph.inputs, model.graph.outputs))
    module = lower(model.graph, inputs=inputs, outputs=outputs)
    samples = _inputs(bed, "calibration", FITTED_ON)
    return Network(
        model=model,
        module=module,
        attentions=attentions,
        samples=samples,
        fitting=_operands(module, attentions, samples, rows=4),
    )


@torch.no_grad()
def _operands(
    module: LoweredModule,
    attentions: Sequence[Attention],
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    rows: int = 1,
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """P (every ``rows``-th row) and V of each attention for each sample."""
    module.clear_hooks()
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in attentions]
    names = tuple({name for a in attentions for name in (a.weights, a.values)})
    for sample in samples:
        values = module({name: torch.from_numpy(value) for name, value in sample.items()}, fetch=names)
        for own, a in zip(found, attentions, strict=True):
            own.append((values[a.weights][..., ::rows, :].clone(), values[a.values].clone()))
    return found


# ---- quantizers -----------------------------------------------------------------------------------


def _uniform(end: float, bits: int) -> Quantizer:
    return fake_quantizer(asymmetric_qparams(0.0, end, QType.unsigned(bits)))


def _logarithmic(base: float, scale: float, bits: int) -> Quantizer:
    last = 2**bits - 1

    def apply(p: torch.Tensor) -> torch.Tensor:
        code = torch.round(-torch.log(p / scale) / math.log(base)).clamp_min(0)
        return torch.where(code > last, 0.0, scale * torch.pow(torch.tensor(base), -code))

    return apply


def _noise(operands: Operands, quantizer: Quantizer) -> float:
    return math.fsum(float(((p - quantizer(p)) @ v).double().square().sum()) for p, v in operands)


def _signal(operands: Operands) -> float:
    return math.fsum(float((p @ v).double().square().sum()) for p, v in operands)


@torch.no_grad()
def _full(network: Network, bits: int) -> list[Quantizer]:
    return [_uniform(max(float(p.max()) for p, _ in own), bits) for own in network.fitting]


@torch.no_grad()
def _least_square(network: Network, bits: int) -> list[Quantizer]:
    def error(own: Operands, end: float) -> float:
        return math.fsum(float((p - _uniform(end, bits)(p)).double().square().sum()) for p, _ in own)

    return [_uniform(min(_ENDS, key=lambda end: error(own, end)), bits) for own in network.fitting]


def _focused(network: Network, bits: int, *, power: int = 1, steps: int = 0) -> list[Quantizer]:
    """As onnxptq writes them: of the weights, or of their roots, and with ``steps`` learnt on the products."""
    model = network.model
    with tempfile.TemporaryDirectory() as folder:
        if power > 1:
            model, _ = root_weights(model, power, network.samples[0], work_dir=Path(folder))
        index = GraphIndex(model.graph)
        plan = TARGETS["simulate"](index, PlacementRequest(activation_bits=bits))
        ranges = {
            q.quantizer_id: asymmetric_qparams(0.0, 1.0, q.qtype)
            for q in plan.quantizers
            if q.role == "activation"
        }
        focuses = choose_softmax_ranges(model, plan, ranges, network.samples)
        chosen = [focuses[a.quantized].qparams for a in find_attention(index) if a.quantized in focuses]
    if power > 1:
        return [_powered(fake_quantizer(qparams), power) for qparams in chosen]
    if not steps:
        return [fake_quantizer(qparams) for qparams in chosen]
    return [
        _learned(FocusedActivation(qparams), own, steps)
        for qparams, own in zip(chosen, network.fitting, strict=True)
    ]


def _powered(quantizer: Quantizer, power: int) -> Quantizer:
    return lambda p: quantizer(p.pow(1.0 / power)).pow(power)


def _learned(focused: FocusedActivation, operands: Operands, steps: int) -> Quantizer:
    optimizer = torch.optim.Adam(focused.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    signal = _signal(operands)
    for step in range(steps):
        p, v = operands[step % len(operands)]
        optimizer.zero_grad(set_to_none=True)
        loss = ((p - focused(p)) @ v).square().sum() / signal
        loss.backward()
        optimizer.step()
        schedule.step()
    return fake_quantizer(focused.hardened())


@torch.no_grad()
def _logs(network: Network, bits: int, *, base: float, is_fitted: bool) -> list[Quantizer]:
    scales = [2.0 ** (-k / 2) for k in range(12)] if is_fitted else [1.0]
    found = []
    for own in network.fitting:
        candidates = [_logarithmic(base, scale, bits) for scale in scales]
        found.append(min(candidates, key=lambda quantizer: _noise(own, quantizer)))
    return found


VARIANTS: Mapping[str, Callable[[Network, int], list[Quantizer]]] = {
    "min-max": _full,
    "mse": _least_square,
    "focus": _focused,
    "focus, learnt": lambda network, bits: _focused(network, bits, steps=STEPS),
    "root 2": lambda network, bits: _focused(network, bits, power=2),
    "root 3": lambda network, bits: _focused(network, bits, power=3),
    "root 4": lambda network, bits: _focused(network, bits, power=4),
    "log2": lambda network, bits: _logs(network, bits, base=2.0, is_fitted=False),
    "log2, fitted": lambda network, bits: _logs(network, bits, base=2.0, is_fitted=True),
    "log sqrt2": lambda network, bits: _logs(network, bits, base=math.sqrt(2.0), is_fitted=False),
    "log sqrt2, fitted": lambda network, bits: _logs(network, bits, base=math.sqrt(2.0), is_fitted=True),
}


# ---- judgement ------------------------------------------------------------------------------------


@torch.no_grad()
def _run(
    network: Network, inputs: Sequence[Mapping[str, np.ndarray]], quantizers: Sequence[Quantizer]
) -> torch.Tensor:
    """The first output for all inputs, with the attentions' weights quantized if there are ``quantizers``."""
    network.module.clear_hooks()
    for attention, quantizer in zip(network.attentions, quantizers, strict=False):
        network.module.set_hook(attention.weights, attention.product.name, attention.weights_index, quantizer)
    outputs = []
    for start in range(0, len(inputs), BATCH):
        part = inputs[start : start + BATCH]
        feed = {name: torch.from_numpy(np.concatenate([one[name] for one in part])) for name in part[0]}
        outputs.append(network.module(feed)[network.model.outputs[0]])
    return torch.cat(outputs)


def _judged(
    network: Network,
    inputs: Sequence[Mapping[str, np.ndarray]],
    reference: torch.Tensor,
    quantizers: Sequence[Quantizer],
) -> dict[str, Any]:
    found = _run(network, inputs, quantizers)
    products = []
    for own, quantizer in zip(
        _operands(network.module, network.attentions, inputs[:PRODUCTS_OF]), quantizers, strict=True
    ):
        with torch.no_grad():
            products.append(_decibels(_signal(own), _noise(own, quantizer)))
    wanted, got = reference.double(), found.double()
    divergence = (wanted.softmax(1) * (wanted.log_softmax(1) - got.log_softmax(1))).sum(1).mean()
    return {
        "products_db": [round(value, 2) for value in products],
        "mean_products_db": round(sum(products) / len(products), 2),
        "sqnr_db": round(_decibels(float(wanted.square().sum()), float((wanted - got).square().sum())), 2),
        "agreement": round(float((wanted.argmax(1) == got.argmax(1)).double().mean()), 4),
        "divergence": round(float(divergence), 5),
    }


def _decibels(signal: float, noise: float) -> float:
    return 10.0 * math.log10(signal / max(noise, 1e-30))


def _table(bed: str, bits: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{bed}, softmax outputs at {bits} bits, all else float", title_justify="left")
    for column in ("quantizer", "products dB", "outputs dB", "agreement %", "divergence"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for variant in VARIANTS:
        for row in rows:
            if (row["bed"], row["bits"], row["variant"]) == (bed, bits, variant):
                table.add_row(
                    variant,
                    f"{row['mean_products_db']:.1f}",
                    f"{row['sqnr_db']:.1f}",
                    f"{100 * row['agreement']:.1f}",
                    f"{row['divergence']:.4f}",
                )
    return table


if __name__ == "__main__":
    sys.exit(main())
