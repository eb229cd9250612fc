"""A lowered range that computes as the written file does: quantized weights and activations on its edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch

from onnxptq.lowering.module import LoweredModule
from onnxptq.quantizers.torch_affine import fake_quantize, fake_quantizer
from onnxptq.types import Array, Block, Pack, Quantizer, QuantPlan, Solution

SiteHook = tuple[str, str, int, Callable[[torch.Tensor], torch.Tensor]]
"""Arguments of :meth:`onnxptq.lowering.LoweredModule.set_hook`."""


def quantizers_by_edge(plan: QuantPlan) -> dict[tuple[str, str, int], Quantizer]:
    """The quantizer on each edge: tensor, consumer, input index."""
    return {(s.tensor, s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}


def quantizing_hooks(
    graph: gs.Graph, block: Block | Pack, plan: QuantPlan, solution: Solution
) -> Sequence[SiteHook]:
    """What makes the lowered ``block`` compute with quantized weights and activations: arguments of
    ``LoweredModule.set_hook``."""
    quantizer_at = quantizers_by_edge(plan)
    tensors = graph.tensors()
    hooks: list[SiteHook] = []
    for site in block.sites:
        quantizer = quantizer_at.get((site.tensor, site.consumer, site.input_index))
        replacement: Array | None = solution.weights.get(site.tensor) if site.is_weight else None
        if quantizer is None and replacement is None:
            continue
        qparams = None if quantizer is None else solution.qparams[quantizer.quantizer_id]
        if site.is_weight:
            value = tensors[site.tensor].values if replacement is None else replacement
            weight = torch.from_numpy(np.array(value, dtype=np.float32))
            read = _constantly(weight if qparams is None else fake_quantize(weight, qparams))
        else:
            assert qparams is not None
            read = fake_quantizer(qparams)
        hooks.append((site.tensor, site.consumer, site.input_index, read))
    return hooks


def set_hooks(module: LoweredModule, hooks: Sequence[SiteHook]) -> None:
    """Put ``hooks``, and only these, on ``module``."""
    module.clear_hooks()
    for hook in hooks:
        module.set_hook(*hook)


def _constantly(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: weight.to(x.device)
