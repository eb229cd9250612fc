"""Rewrites of the canonical graph, one per file; each proves output equality in its test.

The order matters: constants first, so that all others see them; products of equations next, which are layers and
attention from then on; idle nodes before patterns, so that they do not hide one; constants that are only moved behind
those, which may stand between; bounds behind patterns that guard a sum by one; attention scales last, when the linear
layers have taken in what belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxptq.graph.passes import (
    constant_to_initializer,
    fold_attention_scale,
    fold_batch_norm,
    fold_channel_scale,
    fold_moved_constant,
    fuse_gelu,
    fuse_layer_norm,
    fuse_rms_norm,
    fuse_softmax,
    lower_einsum,
    merge_bounds,
    remove_identity,
    unwrap_softmax,
)


@dataclass(frozen=True, slots=True)
class Pass:
    """A rewrite: what it does, and what is said of it, for one place and for more."""

    run: Callable[[gs.Graph], int]
    notes: tuple[str, str]

    def note(self, count: int) -> str:
        """The sentence for ``count`` places."""
        one, many = self.notes
        return one if count == 1 else many.format(count)


PASSES: tuple[Pass, ...] = tuple(
    Pass(module.run, module.NOTE)
    for module in (
        constant_to_initializer,
        lower_einsum,
        unwrap_softmax,
        remove_identity,
        fold_moved_constant,
        fold_batch_norm,
        fold_channel_scale,
        fuse_layer_norm,
        fuse_rms_norm,
        fuse_gelu,
        fuse_softmax,
        merge_bounds,
        fold_attention_scale,
    )
)
"""All rewrites in the order in which they run."""
