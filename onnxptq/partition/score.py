"""Hessian-guided importance of blocks (Pack-PTQ, arXiv 2505.00259).

For block t, with only that block quantized (its weights and the activations it reads):

    L_t     = loss(p_fp, p_q(t))           at the network's output, see onnxptq.lowering.output_loss
    dz      = z_q - z_fp                   the change of the block's outputs
    S_t     = 2 L_t / E||dz||^2            mean curvature of the loss along the error really made
    Omega_t = S_t E|dz|                    sensitivity for the allocation of bits

At the float network loss and gradient are zero, so L_t = 1/2 dz^T H dz to second order and S_t is the
Rayleigh quotient dz^T H dz / ||dz||^2 (times the number of elements, if E||dz||^2 is taken per element).
Elements that are NaN or Inf in the float network have no part in any of these; S of a block that makes others so is
infinite.

Every batch of samples runs through the float network once; block t then runs quantized on the float
values it reads, and only blocks behind it that read something changed run again. Several processes share the
samples and add up their sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from onnxptq.errors import UnsupportedModelError, UsageError
from onnxptq.graph.boundary import find_selection
from onnxptq.graph.index import probability_outputs
from onnxptq.lowering.joining import can_be_joined
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import (
    LossChoice,
    LossKind,
    OutputLoss,
    as_noise,
    asked_loss,
    choose_loss,
    error_of,
    numbers_of,
)
from onnxptq.lowering.quantized import Hooks, quantizing_hooks, set_hooks
from onnxptq.ranks import ALONE, Ranks
from onnxptq.types import (
    Block,
    CanonicalModel,
    Pack,
    Progress,
    QuantPlan,
    Sample,
    Sensitivity,
    Solution,
    started,
)

MEMORY = 512 << 20
"""Bytes that the values of one batch may take."""

_LARGEST_BATCH = 64


@dataclass(slots=True)
class _Change:
    """Sums over dz of one block."""

    squares: float = 0.0
    absolutes: float = 0.0
    elements: int = 0

    def add(self, reference: torch.Tensor, value: torch.Tensor | None) -> None:
        self.elements += reference.numel()
        if value is None:
            return
        wide = reference.double()
        # Another shape counts as wholly wrong, as in the loss.
        dz = error_of(value.double(), wide) if value.shape == reference.shape else numbers_of(wide)
        self.squares += as_noise(dz.square().sum())
        self.absolutes += as_noise(dz.abs().sum())

    def sum_over(self, ranks: Ranks) -> None:
        total = ranks.sum(np.array([self.squares, self.absolutes, self.elements], np.float64))
        self.squares, self.absolutes, self.elements = float(total[0]), float(total[1]), int(total[2])


def score_blocks(
    model: CanonicalModel,
    blocks: Sequence[Block | Pack],
    plan: QuantPlan,
    solution: Solution,
    samples: Sequence[Sample],
    *,
    loss: LossChoice = "auto",
    normalize: Literal["element", "sample"] = "element",
    memory: int = MEMORY,
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Sensitivity, ...]:
    """One Sensitivity per block of ``model``, in order.

    Samples are batched as far as ``memory`` bytes allow and the model's batch axis is free; apart from the
    order of float sums the result does not depend on it. Same arguments, same result.

    Args:
        plan: where quantizers are; sites outside the blocks (of nodes that handle no data) have no effect.
        solution: their parameters; its ``weights`` replace the float ones in the quantized block.
        loss: ``auto`` looks at the outputs, see :func:`~onnxptq.lowering.output_loss.choose_loss`.
        normalize: whether E||dz||^2 is a mean over elements or over samples (E|dz| is one over elements).
        ranks: processes that share the samples.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered; raised before anything runs.
        UsageError: no samples, or no output to compare, or not by this loss.
    """
    options = {"loss": loss, "normalize": normalize, "memory": memory, "device": device}
    given = (model, tuple(blocks), tuple(samples), options, plan, solution)
    return ranks.run(_scored, *given, progress=progress)


def _scored(
    ranks: Ranks,
    model: CanonicalModel,
    blocks: Sequence[Block | Pack],
    samples: Sequence[Sample],
    options: Mapping[str, Any],
    plan: QuantPlan,
    solution: Solution,
    *,
    progress: Progress | None = None,
) -> tuple[Sensitivity, ...]:
    return Scorer(model, blocks, samples, **options, ranks=ranks).score(plan, solution, progress=progress)


class Scorer:
    """:func:`score_blocks` for several plans: the network is lowered and the samples are batched once.

    ``sizes`` holds the elements per sample of every tensor that a node of a block writes, and of the inputs.
    ``loss`` is the kind of loss. All of ``ranks`` have all samples; each runs its share of them.
    """

    def __init__(
        self,
        model: CanonicalModel,
        blocks: Sequence[Block | Pack],
        samples: Sequence[Sample],
        *,
        loss: LossChoice = "auto",
        normalize: Literal["element", "sample"] = "element",
        memory: int = MEMORY,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.blocks = tuple(blocks)
        self._ranks = ranks
        self._model = model
        self._normalize = normalize
        self._network = BlockNetwork(model.graph, blocks, device=device)
        if not samples:
            raise UsageError("Scoring blocks needs at least one sample.", "Give calibration data.")
        first = _tensors([samples[0]])
        self.sizes = self._network.measure(first)
        found = self._network.run(first, keep=self._network.outputs)
        floats = {name: found[name] for name in self._network.outputs if found[name].is_floating_point()}
        judged = {name: value for name, value in floats.items() if name in model.judged}
        self.loss: LossKind = choose_loss(judged, asked_loss(model, loss))
        # A block behind a selection changes what is found in rows that stay the same, and nothing in front.
        behind = {name: value for name, value in floats.items() if name in model.selected}
        selection = find_selection(model.graph)
        self._seen: Sequence[tuple[LossKind, tuple[str, ...]]] = tuple(
            (self.loss, tuple(judged))
            if selection.nodes.isdisjoint(block.nodes)
            else (choose_loss(behind), tuple(behind or judged))
            for block in self.blocks
        )
        own = [samples[i] for i in ranks.share(len(samples))]
        self._batches = list(_batches(model, self._network, self.sizes, own, memory))

    def score(
        self, plan: QuantPlan, solution: Solution, *, progress: Progress | None = None
    ) -> tuple[Sensitivity, ...]:
        """One Sensitivity per block, in order.

        Raises:
            UnsupportedModelError: the loss of a block is not a number.
        """
        hooks = [quantizing_hooks(self._model.graph, block, plan, solution) for block in self.blocks]
        changes = [_Change() for _ in self.blocks]
        known = probability_outputs(self._model.graph)
        losses = [OutputLoss(kind, outputs, probabilities=known) for kind, outputs in self._seen]
        count = 0
        tick = started(progress, "score blocks", len(self._batches) * len(self.blocks))
        for batch in self._batches:
            values = self._network.run(batch)
            count += _rows(batch)
            for t, block in enumerate(self.blocks):
                found = _run_quantized(self._network, t, values, hooks[t]) if hooks[t] else {}
                changed = {name: v for name, v in found.items() if not torch.equal(v, values[name])}
                for name in block.outputs:
                    if values[name].is_floating_point():
                        changes[t].add(values[name], changed.get(name))
                losses[t].add(values, self._network.run_changed(t + 1, values, changed))
                tick()
        for change, added in zip(changes, losses, strict=True):
            change.sum_over(self._ranks)
            added.sum_over(self._ranks)
        count = int(self._ranks.sum(np.asarray(count)))
        samples = count if self._normalize == "sample" else None
        return tuple(
            _sensitivity(block.index, self._loss_of(block, losses[t]), changes[t], samples)
            for t, block in enumerate(self.blocks)
        )

    def _loss_of(self, block: Block | Pack, found: OutputLoss) -> float:
        value = found.value()
        if math.isnan(value):
            inputs, outputs = (
                ", ".join(map(self._model.user_name, ends)) for ends in (block.inputs, block.outputs)
            )
            raise UnsupportedModelError(
                f"The loss with only the block from {inputs} to {outputs} quantized is not a number.",
                "Leave its nodes in float (--exclude), or compare outputs in another way (--output-loss).",
            )
        return value


def _run_quantized(network: BlockNetwork, index: int, values: Values, hooks: Hooks) -> Values:
    module = network.modules[index]
    set_hooks(module, hooks)
    try:
        return network.run_block(index, values)
    finally:
        module.clear_hooks()


def _sensitivity(index: int, loss: float, change: _Change, samples: int | None) -> Sensitivity:
    squared = change.squares / max(1, change.elements if samples is None else samples)
    absolute = change.absolutes / max(1, change.elements)
    # Where a number is lost, nothing tells how far the error is from others.
    is_known = squared > 0.0 and math.isfinite(loss) and math.isfinite(squared)
    curvature = 2.0 * loss / squared if is_known else math.inf
    return Sensitivity(
        block=index,
        loss=loss,
        squared_error=squared,
        absolute_error=absolute,
        curvature=curvature,
        omega=curvature * absolute if squared > 0.0 else 0.0,
    )


def _batches(
    model: CanonicalModel,
    network: BlockNetwork,
    sizes: Mapping[str, int],
    samples: Sequence[Sample],
    memory: int,
) -> Iterator[Mapping[str, torch.Tensor]]:
    """``samples``, those of one shape concatenated along the batch axis where the model allows it."""
    alike: dict[tuple[tuple[int, ...], ...], list[Sample]] = {}
    for sample in samples:
        alike.setdefault(tuple(value.shape for value in sample.values()), []).append(sample)
    size = 1
    if all(spec.shape and not isinstance(spec.shape[0], int) for spec in model.inputs):
        between = {name for block in network.blocks for name in (*block.inputs, *block.outputs)}
        within = max(
            (sum(sizes[s.tensor] for s in b.sites if not s.is_weight) for b in network.blocks), default=0
        )
        # Float values, the changed ones behind the quantized block, and the inside of one block.
        each = 4 * (2 * sum(sizes[name] for name in between) + within)
        size = max(1, min(_LARGEST_BATCH, memory // max(1, each)))
    pair = next((group[:2] for group in alike.values() if len(group) > 1), None)
    if size > 1 and not (pair and _is_batchable(network, pair)):
        size = 1
    for group in alike.values():
        # What was measured is the first sample; another may be larger.
        grown = _elements(group[0]) / max(1, _elements(samples[0]))
        step = max(1, int(size / max(1.0, grown)))
        for start in range(0, len(group), step):
            yield _tensors(group[start : start + step])


def _elements(sample: Sample) -> int:
    return sum(value.size for value in sample.values())


def _is_batchable(network: BlockNetwork, pair: Sequence[Sample]) -> bool:
    """Whether rows of a batch are samples: every output grows with it, and is what they give one by one."""
    found = network.run(_tensors(pair), keep=network.outputs)
    rows = {found[name].shape[0] if found[name].ndim else 0 for name in network.outputs}
    apart = [_tensors([sample]) for sample in pair]
    return rows == {_rows(_tensors(pair))} and can_be_joined(
        lambda feed: network.run(feed, keep=network.outputs), apart
    )


def _rows(feed: Mapping[str, torch.Tensor]) -> int:
    value = next(iter(feed.values()))
    return int(value.shape[0]) if value.ndim else 1


def _tensors(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    if len(samples) == 1:
        return {name: torch.from_numpy(np.array(value)) for name, value in samples[0].items()}
    return {name: torch.from_numpy(np.concatenate([s[name] for s in samples])) for name in samples[0]}
