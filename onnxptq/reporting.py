"""Gathers what a run knows into its :class:`~onnxptq.validate.report.Report`, in the user's own names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.allocate.choices import PackChoices
from onnxptq.bit_plan import MEGABYTE, BitPlan, known_nodes
from onnxptq.calibrate.products import Focus
from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.statistics import TensorStatistics
from onnxptq.quantizers.affine import range_of
from onnxptq.recipe import Recipe
from onnxptq.runtime import runtime_version
from onnxptq.types import (
    GRAPH_OUTPUT,
    Branch,
    CanonicalModel,
    PackOutcome,
    PerAxis,
    PerTensor,
    QParams,
    Quantizer,
    QuantPlan,
    Skip,
    Solution,
)
from onnxptq.validate import wording
from onnxptq.validate.changed import METADATA
from onnxptq.validate.compare import LayerQuality
from onnxptq.validate.latency import Latency
from onnxptq.validate.report import (
    BitPlanFacts,
    BitRow,
    BlockScore,
    BranchFacts,
    BranchRow,
    Histogram,
    QuantizedRow,
    SizeRow,
    SoftmaxRow,
    TensorQuality,
)
from onnxptq.version import __version__

if TYPE_CHECKING:
    from onnxptq.packing import Packing

_HISTOGRAM_BINS = 64


def quantized_rows(model: CanonicalModel, plan: QuantPlan, solution: Solution) -> tuple[QuantizedRow, ...]:
    """One row per quantizer."""
    labels = model.node_labels()
    return tuple(_row(model, q, solution.qparams[q.quantizer_id], labels) for q in plan.quantizers)


def _row(
    model: CanonicalModel, quantizer: Quantizer, qparams: QParams, labels: Mapping[str, str]
) -> QuantizedRow:
    return QuantizedRow(
        quantizer_id=quantizer.quantizer_id,
        tensor=model.user_name(quantizer.tensor),
        role=quantizer.role,
        bits=quantizer.qtype.bits,
        storage=qparams.qtype.storage,
        granularity=_granularity(quantizer),
        symmetric=quantizer.symmetric,
        scale=(float(qparams.scale.min()), float(qparams.scale.max())),
        zero_point=(int(qparams.zero_point.min()), int(qparams.zero_point.max())),
        readers=tuple(dict.fromkeys(labels.get(site.consumer, site.consumer) for site in quantizer.sites)),
    )


def softmax_rows(
    model: CanonicalModel, plan: QuantPlan, solution: Solution, focuses: Mapping[str, Focus]
) -> tuple[SoftmaxRow, ...]:
    """One row per softmax output whose range was chosen by the products that read it."""
    rows = []
    for quantizer in plan.quantizers:
        focus = focuses.get(quantizer.quantizer_id)
        if focus is not None:
            ends = range_of(solution.qparams[quantizer.quantizer_id])
            low, high = (max(0.0, float(end)) ** focus.power for end in ends)
            rows.append(
                SoftmaxRow(
                    tensor=model.user_name(quantizer.tensor),
                    bits=quantizer.qtype.bits,
                    root=focus.power,
                    low=low,
                    high=high,
                    full_db=_ratio_db(focus.full),
                    from_zero_db=_ratio_db(focus.from_zero),
                    free_db=_ratio_db(focus.free),
                )
            )
    return tuple(rows)


def _ratio_db(noise: float) -> float:
    return -10.0 * math.log10(noise) if noise > 0.0 else math.inf


def block_scores(model: CanonicalModel, packing: Packing) -> tuple[BlockScore, ...]:
    """One row per block."""
    pack_of = {block.index: pack.index for pack in packing.packs for block in pack.blocks}
    scores = {score.block: score for score in packing.sensitivities}
    return tuple(
        BlockScore(
            block=block.index,
            pack=pack_of[block.index],
            start=", ".join(map(model.user_name, block.inputs)),
            end=", ".join(map(model.user_name, block.outputs)),
            curvature=scores[block.index].curvature if block.index in scores else None,
            omega=scores[block.index].omega if block.index in scores else None,
        )
        for block in packing.blocks
    )


def pack_outcomes(model: CanonicalModel, outcomes: Sequence[PackOutcome]) -> tuple[PackOutcome, ...]:
    """``outcomes`` in the user's names."""
    return tuple(
        replace(
            outcome,
            ranks=tuple(replace(rank, weight=model.user_name(rank.weight)) for rank in outcome.ranks),
        )
        for outcome in outcomes
    )


def _granularity(quantizer: Quantizer) -> str:
    match quantizer.granularity:
        case PerTensor():
            return "per tensor"
        case PerAxis(axis):
            return f"per channel (axis {axis})"
        case group:
            return f"groups of {group.group_size} (axis {group.axis})"


def tensor_rows(
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    statistics: Calibration,
    layers: tuple[LayerQuality, ...],
    nearest: tuple[LayerQuality, ...] = (),
) -> tuple[TensorQuality, ...]:
    """One row per tensor that both networks hold, in network order; ``nearest`` with weights rounded to nearest."""
    baseline = {layer.tensor: _sqnr(layer) for layer in nearest}
    quantizers = {q.tensor: q for q in plan.quantizers if q.role == "activation"}
    return tuple(
        _quality(
            model,
            layer,
            position,
            quantizers.get(layer.tensor),
            solution,
            statistics.statistics.get(layer.tensor),
            baseline.get(layer.tensor),
        )
        for position, layer in enumerate(layers)
    )


def _sqnr(layer: LayerQuality) -> float:
    return layer.sqnr_db if layer.quantized_sqnr_db is None else layer.quantized_sqnr_db


def _quality(
    model: CanonicalModel,
    layer: LayerQuality,
    position: int,
    quantizer: Quantizer | None,
    solution: Solution,
    seen: TensorStatistics | None,
    nearest: float | None,
) -> TensorQuality:
    low = high = None
    if quantizer is not None:
        ends = range_of(solution.qparams[quantizer.quantizer_id])
        low, high = float(ends[0].min()), float(ends[1].max())
    return TensorQuality(
        tensor=model.user_name(layer.tensor),
        position=position,
        sqnr_db=_sqnr(layer),
        nearest_sqnr_db=nearest,
        minimum=seen.minimum if seen else None,
        maximum=seen.maximum if seen else None,
        low=low,
        high=high,
        histogram=_reduced(seen) if seen is not None and seen.counts is not None else None,
    )


def _reduced(seen: TensorStatistics) -> Histogram:
    centres, counts = seen.bins()
    low, high = seen.minimum, seen.maximum
    if not low < high:  # a constant tensor: one bar in the middle
        margin = max(0.5, abs(low) / 1000)
        low, high = low - margin, high + margin
    # Not numpy's histogram, which refuses ranges of a few subnormal numbers.
    places = (np.clip(centres, low, high) - low) / (high - low) * _HISTOGRAM_BINS
    reduced = np.bincount(
        np.minimum(places.astype(np.int64), _HISTOGRAM_BINS - 1), weights=counts, minlength=_HISTOGRAM_BINS
    )
    return Histogram(low=low, high=high, counts=tuple(int(c) for c in reduced))


def size_rows(
    model: CanonicalModel, plan: QuantPlan, solution: Solution, output_bytes: int
) -> tuple[SizeRow, ...]:
    """Bytes of quantized weights, of other constants, of branches, and of the rest, before and after; before as
    float32, also where the source holds half precision."""
    tensors = model.graph.tensors()
    constants = {name: _float_bytes(t) for name, t in tensors.items() if isinstance(t, gs.Constant)}
    weights = [q for q in plan.quantizers if q.role != "activation"]
    quantized = {q.tensor for q in weights}
    before = sum(constants[name] for name in quantized)
    after = sum(-(-constants[q.tensor] // 4 * _storage_bits(q) // 8) for q in weights)
    other = sum(size for name, size in constants.items() if name not in quantized)
    branches = _branch_bytes(solution)
    return (
        SizeRow(component="quantized weights and biases", before=before, after=after),
        SizeRow(component="other constants", before=other, after=other),
        *([SizeRow(component="low-rank branches", before=0, after=branches)] if branches else []),
        SizeRow(
            component="graph, scales and names",
            before=max(0, _raised_bytes(model) - before - other),
            after=max(0, output_bytes - after - other - branches),
        ),
    )


def _raised_bytes(model: CanonicalModel) -> int:
    """Bytes of the source, had it been float32."""
    return model.source_bytes + model.half_bytes


def _float_bytes(constant: gs.Constant) -> int:
    return 4 * math.prod(int(d) for d in constant.shape)


def _storage_bits(quantizer: Quantizer) -> int:
    return int("".join(c for c in quantizer.qtype.storage if c.isdigit()))


def branch_facts(model: CanonicalModel, solution: Solution, latency: Latency | None) -> BranchFacts | None:
    """One row per branch, in network order; None where there are none."""
    rows = []
    for node in model.graph.nodes:
        branch = solution.branches.get(node.name)
        if branch is not None:
            weight = node.inputs[1]
            rows.append(
                BranchRow(
                    node=node.name,
                    weight=model.user_name(weight.name),
                    rank=branch.rank,
                    before=branch.before,
                    after=branch.after,
                    parameters=branch.parameters,
                    share=branch.parameters / math.prod(int(d) for d in weight.shape),
                )
            )
    return BranchFacts(rows=tuple(rows), bytes=_branch_bytes(solution), latency=latency) if rows else None


def branch_note(model: CanonicalModel, plan: QuantPlan, solution: Solution) -> str:
    """How many layers got a branch, in one line."""
    facts = branch_facts(model, solution, None)
    if facts is None:
        return "No layer has a low-rank branch."
    layers = len({q.tensor for q in plan.quantizers if q.role == "weight"})
    gains = [10 * math.log10(row.before / row.after) for row in facts.rows if row.after > 0.0]
    return (
        f"{len(facts.rows)} of {layers} layers have a low-rank branch: {facts.bytes / MEGABYTE:.2f} MB in float, "
        f"{max(gains, default=0.0):.1f} dB less noise in a layer's output at most."
    )


def _branch_bytes(solution: Solution) -> int:
    return 4 * sum(branch.parameters for branch in solution.branches.values())


def bit_plan_facts(plan: BitPlan) -> BitPlanFacts:
    """The plan as the report shows it."""
    return BitPlanFacts(
        allocator=plan.allocator,
        budget=plan.budget,
        average_weight_bits=plan.average_weight_bits,
        average_activation_bits=plan.average_activation_bits,
        expected_loss=plan.expected_loss,
        packs=tuple(
            BitRow(
                pack=p.index,
                start=", ".join(p.inputs),
                end=", ".join(p.outputs),
                weight_bits=p.weight_bits,
                activation_bits=p.activation_bits,
                weights=p.weights,
                activations=p.activations,
                weight_loss=p.weight_loss,
                activation_loss=p.activation_loss,
            )
            for p in plan.packs
        ),
    )


def bit_rows(model: CanonicalModel, packing: Packing, choices: Sequence[PackChoices]) -> tuple[BitRow, ...]:
    """What each pack costs at each number of bits, before any are chosen."""
    return tuple(
        BitRow(
            pack=pack.index,
            start=", ".join(map(model.user_name, pack.inputs)),
            end=", ".join(map(model.user_name, pack.outputs)),
            weights=choice.weight_elements,
            activations=choice.activation_elements,
            weight_loss={c.bits: c.cost for c in choice.weights},
            activation_loss={c.bits: c.cost for c in choice.activations},
        )
        for pack, choice in zip(packing.packs, choices, strict=True)
    )


def model_annotations(
    model: CanonicalModel, plan: QuantPlan, recipe: Recipe, bit_plan: BitPlan | None, changed: Sequence[str]
) -> dict[str, str]:
    """What the file says about itself: versions, method, hashes, the request, bits per pack where they differ, and
    the inner tensors that are ``changed`` (:mod:`onnxptq.validate.changed`)."""
    text = recipe.to_yaml()
    found = {
        **model.model_metadata,
        "onnxptq.version": __version__,
        "onnxptq.target": plan.target,
        "onnxptq.method": recipe.method,
        "onnxptq.source_sha256": model.source_sha256,
        "onnxptq.recipe": text,
        "onnxptq.recipe_sha256": _sha256(text),
    }
    if changed:
        found[METADATA] = json.dumps(list(changed))
    if bit_plan is not None:
        decided = bit_plan.to_yaml()
        found |= {"onnxptq.plan": decided, "onnxptq.plan_sha256": _sha256(decided)}
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def node_annotations(
    model: CanonicalModel,
    plan: QuantPlan,
    packing: Packing | None,
    bit_plan: BitPlan | None,
    branches: Mapping[str, Branch],
) -> dict[str, dict[str, str]]:
    """What the file says about its nodes beside what the user's own said: for quantized ones their bits, their
    pack, and S and Omega of their block, where the network was packed or given a plan of bits, and the rank of their
    branch."""
    if packing is None and bit_plan is None:
        return {name: dict(values) for name, values in model.node_metadata.items()}
    found: dict[str, dict[str, str]] = {}
    for quantizer in plan.quantizers:
        if quantizer.role != "bias":
            key = f"onnxptq.{quantizer.role}_bits"
            for site in quantizer.sites:
                said = found.setdefault(site.consumer, {})
                # A product of two activations may read them at different bits.
                said[key] = str(max(quantizer.qtype.bits, int(said.get(key, 0))))
    for pack in () if packing is None else packing.packs:
        for block in pack.blocks:
            for name in set(block.nodes) & found.keys():
                found[name] |= {"onnxptq.pack": str(pack.index), "onnxptq.block": str(block.index)}
    known = known_nodes(model)
    planned = (
        {} if bit_plan is None else {known[name]: entry for entry in bit_plan.packs for name in entry.nodes}
    )
    sensitivities = () if packing is None else packing.sensitivities
    measured = {score.block: (score.curvature, score.omega) for score in sensitivities}
    for name, said in found.items():
        scores = measured
        if name in planned:
            said["onnxptq.pack"] = str(planned[name].index)
            # Packing knows the block of a node; a plan does so where the pack is one.
            if len(planned[name].blocks) == 1:
                said.setdefault("onnxptq.block", str(planned[name].blocks[0]))
            scores = measured or planned[name].scores
        place = int(said.get("onnxptq.block", -1))
        if place in scores:
            curvature, omega = scores[place]
            said.update({"onnxptq.sensitivity": f"{curvature:.6g}", "onnxptq.omega": f"{omega:.6g}"})
    for name, branch in branches.items():
        found.setdefault(name, {})["onnxptq.branch_rank"] = str(branch.rank)
    found.pop(GRAPH_OUTPUT, None)
    own = model.node_metadata
    return {
        name: {**own.get(name, {}), **found.get(name, {})} for name in (*own, *(found.keys() - own.keys()))
    }


def bit_plan_note(plan: BitPlan) -> str:
    """What was allocated, in one line."""

    def spread(values: list[int | None]) -> str:
        return " ".join("-" if v is None else str(v) for v in values)

    asked = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in plan.budget.items())
    return (
        f"Bits per pack for {asked}: weights {spread([p.weight_bits for p in plan.packs])} "
        f"(average {plan.average_weight_bits:.3f}), activations {spread([p.activation_bits for p in plan.packs])} "
        f"(average {plan.average_activation_bits:.3f}); expected loss {plan.expected_loss:.3g}."
    )


def parameters(model: CanonicalModel) -> int:
    """Elements of all constants."""
    return sum(_float_bytes(t) // 4 for t in model.graph.tensors().values() if isinstance(t, gs.Constant))


def user_skips(model: CanonicalModel, plan: QuantPlan, statistics: Calibration) -> tuple[Skip, ...]:
    """Everything that was declined, by anyone."""
    return labelled(model, (*model.skips, *statistics.skips, *plan.skips))


def labelled(model: CanonicalModel, skips: Sequence[Skip]) -> tuple[Skip, ...]:
    """``skips``, each once, with the nodes that preparation made named by the user's as well."""
    labels = model.node_labels()
    return tuple(dict.fromkeys(replace(skip, site=labels.get(skip.site, skip.site)) for skip in skips))


def larger_note(model: CanonicalModel, output_bytes: int, rows: tuple[SizeRow, ...]) -> str:
    """Why the output is not smaller than the input; empty where it is."""
    if output_bytes < model.source_bytes:
        return ""
    share = min(1.0, rows[0].before / max(1, _raised_bytes(model)))
    raised = (
        f"constants of half precision were raised to float32 ({wording.size(model.half_bytes)} became "
        f"{wording.size(2 * model.half_bytes)}), "
        if model.half_bytes
        else ""
    )
    return (
        f"The output is not smaller: {raised}quantized weights are {share:.0%} of the model"
        f"{' in float32' if raised else ''}, and scales, zero points and Q/DQ nodes take more than they save."
    )


_SLOWER = 1.05
"""Ratio of times that noise of a machine does not explain where even the lower quartile exceeds it."""

_NOTICEABLE_MS = 0.5
"""A loss of less time than this is not worth a sentence."""


def slower_note(target: str, latency: Latency, kernels: Mapping[str, int] | None) -> str:
    """That the output is slower than the input in onnxruntime, and between how many float operators its integer
    kernels stand; empty where it is not, and for targets that another runtime runs."""
    lost = latency.quantized_ms - latency.reference_ms
    if target != "ort-cpu" or kernels is None or latency.ratio_low <= _SLOWER or lost < _NOTICEABLE_MS:
        return ""
    counts = wording.kernel_counts(kernels)
    return (
        f"The output takes {latency.ratio:.2f} times as long as the float network on this processor: beside "
        f"{counts['integer']} integer kernels it runs {counts['conversion']} conversions and {counts['float']} float "
        "operators, some of which onnxruntime fuses into convolutions where all is float. Quantize for another "
        "processor or for size only."
    )


def versions(recipe_hash: str) -> Mapping[str, str]:
    """Versions of everything that computed something."""
    found = {"onnxptq": __version__, "python": platform.python_version(), "runtime": runtime_version()}
    for name in ("onnx", "onnx-graphsurgeon", "onnxsim", "numpy", "pillow"):
        found[name] = importlib.metadata.version(name)
    return {**found, "platform": platform.platform(), "recipe_sha256": recipe_hash}


def file_sha256(path: Path) -> str:
    """sha256 of a file (of the model and of its external data, if there is any)."""
    hasher = hashlib.sha256()
    for part in (path, path.with_name(path.name + ".data")):
        if part.exists():
            for block in _blocks(part):
                hasher.update(block)
    return hasher.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
