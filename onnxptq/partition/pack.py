"""Adaptive packing: which consecutive blocks are reconstructed together (Pack-PTQ, arXiv 2505.00259).

    te = T-1
    while te >= 0:   t* = argmin_{0 <= t <= te} S_t;   pack = B_{t*} .. B_te;   te = t* - 1

The first of equal minima is taken. A block starts a pack there exactly if its S is smaller than that of
every block before it, so one pass over S finds the same packs. A rising S makes one pack of everything:
``max_pack_blocks`` splits the longest pack at its next-lowest S until none is longer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnxptq.partition.blocks import merge_blocks
from onnxptq.types import Block, Pack, QuantPlan, Sensitivity, Site


def pack_starts(curvatures: Sequence[float], *, max_pack_blocks: int | None = None) -> tuple[int, ...]:
    """Indices of the blocks that start a pack; the first is 0. Infinite values (a block without effect)
    start no pack of their own.

    Raises:
        ValueError: a curvature is not a number, or ``max_pack_blocks`` is below 1.
    """
    if any(math.isnan(value) for value in curvatures):
        raise ValueError(
            f"curvature of block {[math.isnan(v) for v in curvatures].index(True)} is not a number"
        )
    if max_pack_blocks is not None and max_pack_blocks < 1:
        raise ValueError(f"max_pack_blocks starts at 1, got {max_pack_blocks}")
    starts: list[int] = []
    lowest = math.inf
    for t, value in enumerate(curvatures):
        if t == 0 or value < lowest:
            starts.append(t)
            lowest = value
    while max_pack_blocks is not None and starts:
        stops = [*starts[1:], len(curvatures)]
        longest = max(range(len(starts)), key=lambda i: stops[i] - starts[i])
        inner = range(starts[longest] + 1, stops[longest])
        if len(inner) < max_pack_blocks:
            break
        starts.insert(longest + 1, min(inner, key=lambda t: curvatures[t]))
    return tuple(starts)


def pack_blocks(
    blocks: Sequence[Block],
    sensitivities: Sequence[Sensitivity],
    *,
    max_pack_blocks: int | None = None,
    alone: Collection[int] = (),
) -> tuple[Pack, ...]:
    """``blocks`` in packs, in order.

    Args:
        alone: blocks that form packs of their own (a stem and a head); packing starts anew behind each.

    Raises:
        ValueError: there is not one sensitivity per block, or as for :func:`pack_starts`.
    """
    if [s.block for s in sensitivities] != [b.index for b in blocks]:
        raise ValueError(f"{len(sensitivities)} sensitivities do not belong to {len(blocks)} blocks")
    starts: list[int] = []
    first = 0
    for stop in (*sorted(alone), len(blocks)):
        found = pack_starts([s.curvature for s in sensitivities[first:stop]], max_pack_blocks=max_pack_blocks)
        starts.extend(first + t for t in found)
        if stop < len(blocks):
            starts.append(stop)
        first = stop + 1
    stops = [*starts[1:], len(blocks)]
    return tuple(_pack(blocks, a, b, i) for i, (a, b) in enumerate(zip(starts, stops, strict=True)))


def whole_network(packs: Sequence[Pack]) -> Pack:
    """All of the network as one pack, whose index follows those of ``packs``."""
    blocks = [block for pack in packs for block in pack.blocks]
    return _pack(blocks, 0, len(blocks), len(packs))


def _pack(blocks: Sequence[Block], start: int, stop: int, index: int) -> Pack:
    members = tuple(blocks[start:stop])
    merged = merge_blocks(members, [*blocks[:start], *blocks[stop:]], index=index)
    return Pack(
        index=index,
        blocks=members,
        nodes=merged.nodes,
        inputs=merged.inputs,
        outputs=merged.outputs,
        shape_inputs=merged.shape_inputs,
        sites=merged.sites,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackMemory:
    """Bytes that the reconstruction of a pack needs.

    ``cache``: its inputs in float and quantized form and its targets, for every sample (disk can take it).
    ``activations``: what the forward pass of one batch keeps for the backward pass, and the gradients.
    ``parameters``: trained weights with gradient, two optimizer moments, and what quantizing them keeps.
    """

    cache: int
    activations: int
    parameters: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.activations + self.parameters


def pack_memory(
    pack: Pack,
    plan: QuantPlan,
    sizes: Mapping[str, int],
    weight_sizes: Mapping[str, int],
    *,
    samples: int,
    batch: int,
    keeps_integers: bool = False,
) -> PackMemory:
    """An upper estimate, known before anything runs; single precision throughout.

    Per batch element the forward pass keeps every tensor of the pack, and for each quantized read its values on
    the grid, with as much again for what gradients take on their way; the backward pass adds gradients of as
    much as the two largest tensors. A trained weight is kept, besides itself, as gradient, two moments,
    latent value and five intermediates of its quantizer; where its scale alone is trained, as integers, product,
    and gradients of both.

    Args:
        sizes: elements of every tensor per sample (``BlockNetwork.measure``).
        weight_sizes: elements of every initializer that a quantizer of the pack's weights reads.
    """
    quantized = {(s.consumer, s.input_index) for q in plan.quantizers if q.role != "bias" for s in q.sites}
    data = [site for site in pack.sites if not site.is_weight]
    tensors = {*pack.inputs, *pack.outputs, *(site.tensor for site in data)}
    weights = {site.tensor for site in pack.sites if site.is_weight and _at(site, quantized)}
    kept = sum(sizes[name] for name in tensors)
    kept += _READ_COPIES * sum(sizes[site.tensor] for site in data if _at(site, quantized))
    kept += 2 * sum(sorted((sizes[name] for name in tensors), reverse=True)[:2])
    cached = 2 * sum(sizes[name] for name in pack.inputs) + sum(sizes[name] for name in pack.outputs)
    trained = sum(weight_sizes[name] for name in weights)
    return PackMemory(
        cache=4 * samples * cached,
        activations=4 * batch * kept,
        parameters=4 * (4 if keeps_integers else 5 + _QUANTIZER_COPIES) * trained,
    )


_READ_COPIES = 2

_QUANTIZER_COPIES = 5


def _at(site: Site, quantized: Collection[tuple[str, int]]) -> bool:
    return (site.consumer, site.input_index) in quantized
