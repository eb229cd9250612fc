"""The float network behind a pack, through which an error of the pack's outputs shows at the network's outputs.

The local loss (:mod:`onnxptq.reconstruct.objective`) takes an error for as bad wherever it points; what it does to
the network's outputs decides. The global loss runs what the pack found through the rest of the network, in float and
frozen, and compares the outputs: by divergence where they are class logits, by relative squared error elsewhere
(:mod:`onnxptq.lowering.output_loss`). Tensors that run past the pack are those of the quantized network in front.
(GLF-Q combines both losses so; it compares penultimate features, which a graph does not name.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from onnxptq.lowering.joining import can_be_joined, joined
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import (
    LossChoice,
    LossKind,
    choose_loss,
    divergence,
    error_of,
    numbers_of,
    rows_of,
)
from onnxptq.ranks import Ranks
from onnxptq.reconstruct.pack_data import Keep, PackData


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The network's float outputs for every sample of this rank, and how to compare with them.

    ``scales`` holds the mean square of each output over all samples of all ranks. ``is_joinable`` says whether the
    whole network treats the first axis as a batch.
    """

    outputs: Sequence[Values]
    kind: LossKind
    scales: dict[str, float]
    probabilities: Collection[str]
    is_joinable: bool


def wanted_outputs(
    network: BlockNetwork,
    samples: Sequence[Values],
    probabilities: Collection[str],
    keep: Keep,
    ranks: Ranks,
    asked: LossChoice = "auto",
) -> Wanted:
    """What the float network computes for the samples of every rank."""
    outputs: list[Values] = []
    sums: dict[str, list[float]] = {}
    for sample in samples:
        found = network.run(sample, keep=network.outputs)
        floats = {name: found[name] for name in network.outputs if found[name].is_floating_point()}
        for name, value in floats.items():
            part = sums.setdefault(name, [0.0, 0.0])
            part[0] += float(numbers_of(value.double()).square().sum())
            part[1] += int(torch.isfinite(value).sum())
        outputs.append({name: keep(value.cpu()) for name, value in floats.items()})
    total: dict[str, list[float]] = {}
    for own in ranks.gather(sums):
        for name, part in own.items():
            known = total.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + part[0], known[1] + part[1]
    # The first rank always has samples.
    kind: LossKind = ranks.broadcast(choose_loss(outputs[0], asked) if outputs else "kl")
    return Wanted(
        outputs=outputs,
        kind=kind,
        scales={name: squares / count or 1.0 for name, (squares, count) in total.items() if count},
        probabilities=probabilities,
        is_joinable=ranks.broadcast(_is_joinable(network, samples[:2])),
    )


def _is_joinable(network: BlockNetwork, pair: Sequence[Values]) -> bool:
    inputs = [{name: part[name] for name in network.inputs} for part in pair]
    return len(pair) < 2 or can_be_joined(lambda feed: network.run(feed, keep=network.outputs), inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Suffix:
    """What follows the pack of ``data``."""

    data: PackData
    wanted: Wanted

    def loss(self, found: Values, chosen: Sequence[int]) -> torch.Tensor | None:
        """The mean loss at the network's outputs of these samples, for what the pack found; None where no output
        follows."""
        network, after = self.data.network, self.data.position + 1
        values = {**self.data.passing(chosen), **found}
        written = set(found)
        for block, module in zip(network.blocks[after:], network.modules[after:], strict=True):
            values.update(module({name: values[name] for name in (*block.inputs, *block.shape_inputs)}))
            written.update(block.outputs)
        names = [name for name in self.wanted.scales if name in written]
        targets = joined([self.wanted.outputs[i] for i in self.data.places(chosen)], names)
        parts = [self._distance(name, targets[name].to(network.device), values[name]) for name in names]
        return torch.stack(parts).sum() if parts else None

    def _distance(self, name: str, target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.wanted.kind == "kl":
            apart = divergence(target, value, is_probability=name in self.wanted.probabilities)
            return apart / rows_of(target)
        if target.shape != value.shape:
            # Another number of detections: nothing tells which belong together.
            return value.sum() * 0.0 + 1.0
        squares = error_of(value, target).square().sum()
        return squares / torch.isfinite(target).sum().clamp_min(1) / self.wanted.scales[name]
