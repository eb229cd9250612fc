"""Small networks cut into packs, with a plan, ranges that cover the samples, and weights rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from onnxptq.graph.index import GraphIndex
from onnxptq.lowering import lower
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.quantized import quantizing_hooks
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.pack import pack_blocks, whole_network
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct.checkpoint import Checkpoints
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.pack_data import PackData, run_all, set_hooks
from onnxptq.reconstruct.packwise import Reconstruction, Resources, reconstruct
from onnxptq.types import CanonicalModel, Pack, QuantPlan, Sample, Sensitivity, Solution
from tests.unit.small_nets import Net, canonical, planned, random_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network that is ready to be reconstructed."""

    model: CanonicalModel
    plan: QuantPlan
    start: Solution
    packs: tuple[Pack, ...]
    samples: Sequence[Sample]
    folder: Path

    @property
    def index(self) -> GraphIndex:
        return GraphIndex(self.model.graph)

    def solved(
        self,
        settings: Learning,
        *,
        seed: int = 0,
        together: int = 64,
        cache: int = 1 << 30,
        checkpoints: Checkpoints | None = None,
        ranks: Ranks = ALONE,
    ) -> Reconstruction:
        """The packs, reconstructed."""
        resources = Resources(
            together=[together] * len(self.packs),
            tuned_together=together,
            cache_bytes=cache,
            scratch=self.folder,
            checkpoints=checkpoints,
        )
        return reconstruct(
            self.model,
            self.plan,
            self.start,
            self.packs,
            self.samples,
            settings,
            resources,
            whole=whole_network(self.packs),
            seed=seed,
            ranks=ranks,
        )

    def outputs(self, solution: Solution | None) -> list[Values]:
        """The network's outputs for every sample: float, or quantized with ``solution``."""
        network = BlockNetwork(self.model.graph, self.packs)
        for position, pack in enumerate(self.packs):
            if solution is not None:
                hooks = quantizing_hooks(self.model.graph, pack, self.plan, solution)
                set_hooks(network.modules[position], hooks)
        return [network.run(feed, keep=network.outputs) for feed in tensors(self.samples)]

    def error(self, solution: Solution) -> float:
        """Squared error of the outputs over their squares, summed over samples."""
        wanted, found = self.outputs(None), self.outputs(solution)
        noise = sum(
            float((f[n] - w[n]).square().sum()) for w, f in zip(wanted, found, strict=True) for n in w
        )
        return noise / sum(float(value.square().sum()) for w in wanted for value in w.values())

    def data(self, together: int = 64) -> PackData:
        """The data of the first pack, which reads the same in the float and the quantized network."""
        network = BlockNetwork(self.model.graph, self.packs)
        floats = tensors(self.samples)
        after = run_all(network, 0, floats, together, lambda value: value)
        return PackData(network, 0, floats, [dict(values) for values in floats], after, together)


def tensors(samples: Sequence[Sample]) -> list[Values]:
    return [{name: torch.from_numpy(np.array(value)) for name, value in s.items()} for s in samples]


def case(
    proto: onnx.ModelProto,
    folder: Path,
    *,
    target: str = "simulate",
    weight_bits: int = 3,
    activation_bits: int = 4,
    samples: Sequence[Sample] | int = 16,
    longest: int = 1,
    seed: int = 1,
    noise: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Case:
    """``proto`` in packs of ``longest`` blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    model = canonical(proto, folder)
    graph = model.graph
    if isinstance(samples, int):
        samples = [{k: noise(v) for k, v in s.items()} for s in random_samples(model, samples, seed=seed)]
    plan = planned(model, target, weight_bits=weight_bits, activation_bits=activation_bits)
    inputs = tuple(t.name for t in graph.inputs)
    seen = sorted({q.tensor for q in plan.quantizers if q.role == "activation"} - set(inputs))
    module = lower(graph, inputs=inputs, outputs=tuple(t.name for t in graph.outputs))
    with torch.no_grad():
        values = [{**feed, **module(feed, fetch=tuple(seen))} for feed in tensors(samples)]
    ranges = {
        q.quantizer_id: asymmetric_qparams(
            min(float(v[q.tensor].min()) for v in values),
            max(float(v[q.tensor].max()) for v in values),
            q.qtype,
        )
        for q in plan.quantizers
        if q.role == "activation"
    }
    blocks = find_blocks(graph)
    unscored = [
        Sensitivity(
            block=block.index, loss=0.0, squared_error=0.0, absolute_error=0.0, curvature=0.0, omega=0.0
        )
        for block in blocks
    ]
    return Case(
        model=model,
        plan=plan,
        start=initial_solution(graph, plan, ranges),
        packs=pack_blocks(blocks, unscored, max_pack_blocks=longest),
        samples=samples,
        folder=folder,
    )


def chain(batch: int | str = "n", *, depth: int = 3, width: int = 12) -> onnx.ModelProto:
    """Residual blocks of two layers each, and a last layer."""
    net = Net(seed=4)
    x = "x"
    for i in range(depth):
        inner = net.op("Relu", f"relu{i}", net.linear(f"in{i}", x, width, width))
        x = net.op("Add", f"sum{i}", net.linear(f"out{i}", inner, width, width), x)
    return net.proto({"x": [batch, width]}, [net.linear("last", x, width, 5)])


class Spy(PackData):
    """Tells which samples were run for a step and which to judge: a step runs with gradients."""

    steps: list[tuple[int, ...]]
    judged: list[tuple[int, ...]]

    def quantized(self, chosen: Any) -> Any:
        (self.steps if torch.is_grad_enabled() else self.judged).append(tuple(chosen))
        return super().quantized(chosen)


def spied(data: PackData) -> Spy:
    spy = Spy(data.network, data.position, data.floats, data.quants, data.targets_of, data.together)
    object.__setattr__(spy, "steps", [])
    object.__setattr__(spy, "judged", [])
    return spy
