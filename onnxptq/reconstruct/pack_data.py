"""What one pack reads and should write, for every sample, and running it on many samples at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from onnxptq.lowering import LoweredModule
from onnxptq.lowering.joining import can_be_joined, joined
from onnxptq.lowering.module import Walk
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.quantized import Hooks, set_hooks
from onnxptq.memory import SLACK, return_memory
from onnxptq.ranks import ALONE, Ranks

UNIT = 16
"""Consecutive samples that one process takes as a whole: the rows that a layer is solved on are picked from passes,
so passes must not depend on the number of processes."""

Keep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PackData:
    """One pack with its data: ``floats`` and ``quants`` hold the values of each sample at the pack's ends, in
    the float network and behind the quantized packs in front of it; ``targets_of`` its float outputs.

    ``together`` samples run in one pass: 1 where the pack does not treat the first axis as a batch. ``importance``
    weighs the elements of outputs in the loss, by tensor; outputs without an entry weigh 1 throughout.
    ``class_scores`` names the outputs that are compared as such, and says which of them are probabilities.

    ``incomparable`` outputs have no part in the loss: nothing tells which rows of two networks belong together.

    ``spare`` bytes may be taken by values inside the pack from one pass to the next.

    Where several ``ranks`` share ``count`` samples, this one holds its ``share`` of them. Samples are known by their
    numbers among all; passes over chosen ones are those over its own among them.
    """

    network: BlockNetwork
    position: int
    floats: Sequence[Values]
    quants: Sequence[Values]
    targets_of: Sequence[Values]
    together: int
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ranks: Ranks = ALONE
    count: int | None = None
    class_scores: Mapping[str, bool] = field(default_factory=dict)
    incomparable: Collection[str] = ()
    spare: int = 0

    def __len__(self) -> int:
        return len(self.floats) if self.count is None else self.count

    @property
    def module(self) -> LoweredModule:
        """The lowered pack."""
        return self.network.modules[self.position]

    def chunks(self, chosen: Sequence[int]) -> list[Sequence[int]]:
        """Those of ``chosen`` that this rank holds, in parts that run in one pass each."""
        own = [i for i in chosen if _owner(i, self.ranks) == self.ranks.rank]
        return [own[i : i + self.together] for i in range(0, len(own), self.together)]

    def fixed_chunks(self, most: int) -> list[Sequence[int]]:
        """At most about ``most`` of all samples, evenly spread, in parts that run in one pass each, on whatever
        rank: the same parts for any number of ranks."""
        stride = -(-len(self) // most)
        units = [range(i, min(i + UNIT, len(self)), stride) for i in range(0, len(self), UNIT)]
        return [unit[i : i + self.together] for unit in units for i in range(0, len(unit), self.together)]

    def is_own(self, part: Sequence[int]) -> bool:
        """Whether this rank holds the samples of a fixed chunk."""
        return _owner(part[0], self.ranks) == self.ranks.rank

    def quantized(self, chosen: Sequence[int]) -> Values:
        """What the quantized network in front computes for these samples."""
        return self._joined(self.quants, chosen, self._names)

    def apiece(self, chosen: Sequence[int]) -> list[Values]:
        """The same, sample by sample."""
        return [self.quants[self._place(i)] for i in chosen]

    def float_inputs(self, chosen: Sequence[int]) -> Values:
        """What the float network computes there."""
        return self._joined(self.floats, chosen, self._names)

    def targets(self, chosen: Sequence[int]) -> Values:
        """The pack's float outputs."""
        return self._joined(self.targets_of, chosen, self.network.blocks[self.position].outputs)

    def passing(self, chosen: Sequence[int]) -> Values:
        """What later packs read of the quantized network in front of this one."""
        behind = self.network.read_behind(self.position)
        held = sorted(behind & self.quants[self._place(chosen[0])].keys())
        return self._joined(self.quants, chosen, held)

    def places(self, chosen: Sequence[int]) -> list[int]:
        """Where this rank holds these samples among its own."""
        return [self._place(i) for i in chosen]

    def apart(self, outputs: Values, chosen: Sequence[int]) -> list[Values]:
        """What a pass over these samples writes, sample by sample."""
        if len(chosen) == 1:
            return [outputs]
        split = {
            name: torch.split(value, [len(self.targets_of[self._place(i)][name]) for i in chosen])
            for name, value in outputs.items()
        }
        return [{name: split[name][k] for name in split} for k in range(len(chosen))]

    @property
    def _names(self) -> tuple[str, ...]:
        pack = self.network.blocks[self.position]
        return (*pack.inputs, *pack.shape_inputs)

    def _place(self, number: int) -> int:
        """Where this rank holds the sample."""
        return number // (UNIT * self.ranks.size) * UNIT + number % UNIT

    def _joined(self, values: Sequence[Values], chosen: Sequence[int], names: Sequence[str]) -> Values:
        parts = [values[self._place(i)] for i in chosen]
        return _on(self.network.device, joined(parts, names))


class Inner(NamedTuple):
    """A tensor inside a pack in one pass: in the float network, and behind quantized packs.

    ``number`` counts the passes of all ranks, ``samples`` ran together.
    """

    number: int
    samples: int
    value: torch.Tensor
    changed: torch.Tensor


class InnerValues:
    """Tensors inside a pack, for at most about ``most`` of all samples, evenly spread.

    Passes stop at a tensor and go on from there to the next, as far as what they hold meanwhile fits in
    ``data.spare`` bytes; the others start anew.
    """

    def __init__(self, data: PackData, most: int) -> None:
        self._data = data
        self._parts = data.fixed_chunks(most)
        self._stopped: dict[int, tuple[Walk, Walk]] = {}
        self._held: dict[int, int] = {}

    @property
    def count(self) -> int:
        """Samples, on all ranks."""
        return sum(map(len, self._parts))

    @torch.no_grad()
    def at(self, tensor: str, hooks: Hooks) -> Iterator[Inner]:
        """The passes of this rank, those behind quantized packs with ``hooks``.

        Tensors are asked for in the order in which nodes read them, and hooks of nodes in front of the last one that
        was asked for stay as they are.
        """
        data, module = self._data, self._data.module
        for number, part in enumerate(self._parts):
            if not data.is_own(part):
                continue
            self._held.pop(number, None)
            walks = self._stopped.pop(number, None)
            if walks is None:
                walks = module.walk(data.float_inputs(part)), module.walk(data.quantized(part))
            value = walks[0].reach(tensor)
            set_hooks(module, hooks)
            changed = walks[1].reach(tensor)
            module.clear_hooks()
            held = sum(walk.held_bytes for walk in walks)
            if sum(self._held.values()) + held <= data.spare:
                self._stopped[number], self._held[number] = walks, held
            del walks
            yield Inner(number, len(part), value, changed)


def _owner(number: int, ranks: Ranks) -> int:
    return number // UNIT % ranks.size


def most_together(
    network: BlockNetwork, position: int, values: Sequence[Values], limit: int, ranks: Ranks = ALONE
) -> int:
    """How many samples the block at ``position`` may run on at once: ``limit``, or 1 where running two together
    is not the same as running them one after the other. Of several ``ranks``, rank 0 tries it."""
    block = network.blocks[position]
    names = (*block.inputs, *block.shape_inputs)
    if limit <= 1 or not names:
        return 1
    shapes = {tuple((part[name].ndim, part[name].shape[1:]) for name in names) for part in values}
    is_uniform = len(set().union(*ranks.gather(shapes))) == 1
    found = 1
    if is_uniform and ranks.rank == 0 and len(values) > 1:
        pair = [{name: part[name] for name in names} for part in values[:2]]
        is_same = can_be_joined(lambda feed: network.run_block(position, _on(network.device, feed)), pair)
        found = limit if is_same else 1
    return ranks.broadcast(found)


def run_all(
    network: BlockNetwork, position: int, values: Sequence[Values], together: int, keep: Keep
) -> list[Values]:
    """What the block at ``position`` writes for every sample, with whatever hooks are on it."""
    block = network.blocks[position]
    names = (*block.inputs, *block.shape_inputs)
    found: list[Values] = []
    for start in range(0, len(values), together):
        parts = values[start : start + together]
        return_memory(SLACK)
        out = network.run_block(position, _on(network.device, joined(parts, names)))
        if len(parts) == 1:
            found.append({name: _kept(value, keep) for name, value in out.items()})
            continue
        rows = [len(part[names[0]]) for part in parts]
        split = {
            name: torch.split(value, [row * len(value) // sum(rows) for row in rows])
            for name, value in out.items()
        }
        found.extend(
            {name: _kept(split[name][i], keep, is_part=True) for name in split} for i in range(len(parts))
        )
    return found


def _kept(value: torch.Tensor, keep: Keep, *, is_part: bool = False) -> torch.Tensor:
    # A stand-in for a shape has no memory of its own.
    if 0 in value.stride() and value.numel() > 1:
        return value
    # A view would hold all samples of the pass.
    return keep(value.cpu().clone() if is_part else value.cpu())


def _on(device: torch.device, values: Values) -> Values:
    return values if device.type == "cpu" else {name: value.to(device) for name, value in values.items()}
