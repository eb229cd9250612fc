"""Rewrites of the canonical graph, one per file; each proves output equality in its test.

The order matters: constants first, so that all others see them; products of equations next, which are layers and
attention from then on; idle nodes before patterns, so that they do not hide one; constants that are only moved behind
those, which may stand between; attention scales last, when the linear layers have taken in what belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable

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
    remove_identity,
    unwrap_softmax,
)

PASSES: tuple[Callable[[gs.Graph], int], ...] = (
    constant_to_initializer.run,
    lower_einsum.run,
    unwrap_softmax.run,
    remove_identity.run,
    fold_moved_constant.run,
    fold_batch_norm.run,
    fold_channel_scale.run,
    fuse_layer_norm.run,
    fuse_rms_norm.run,
    fuse_gelu.run,
    fuse_softmax.run,
    fold_attention_scale.run,
)
"""All rewrites in the order in which they run."""
