"""A lowered range that computes as the written file does: quantized weights and activations on its edges, and
branches beside its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import torch

from onnxptq.graph.branches import branch_graph
from onnxptq.lowering.module import LoweredModule, lower
from onnxptq.quantizers.torch_affine import fake_quantize, fake_quantizer
from onnxptq.types import Array, Block, Branch, Pack, Quantizer, QuantPlan, Solution

SiteHook = tuple[str, str, int, Callable[[torch.Tensor], torch.Tensor]]
"""Arguments of :meth:`onnxptq.lowering.LoweredModule.set_hook`."""


@dataclass(frozen=True, slots=True, eq=False)
class BranchHook:
    """Arguments of :meth:`onnxptq.lowering.LoweredModule.set_branch`."""

    node: str
    path: Callable[[torch.Tensor], torch.Tensor]


Hooks = Sequence[SiteHook | BranchHook]


def quantizers_by_edge(plan: QuantPlan) -> dict[tuple[str, str, int], Quantizer]:
    """The quantizer on each edge: tensor, consumer, input index."""
    return {(s.tensor, s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}


def quantizing_hooks(graph: gs.Graph, block: Block | Pack, plan: QuantPlan, solution: Solution) -> Hooks:
    """What makes the lowered ``block`` compute with quantized weights and activations, and with branches."""
    quantizer_at = quantizers_by_edge(plan)
    tensors = graph.tensors()
    hooks: list[SiteHook | BranchHook] = []
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
    if solution.branches:
        own = set(block.nodes)
        nodes = [node for node in graph.nodes if node.name in own and node.name in solution.branches]
        hooks += [BranchHook(node.name, _path(graph, node, solution.branches[node.name])) for node in nodes]
    return hooks


def set_hooks(module: LoweredModule, hooks: Hooks) -> None:
    """Put ``hooks``, and only these, on ``module``."""
    module.clear_hooks()
    for hook in hooks:
        if isinstance(hook, BranchHook):
            module.set_branch(hook.node, hook.path)
        else:
            module.set_hook(*hook)


def _path(graph: gs.Graph, node: gs.Node, branch: Branch) -> Callable[[torch.Tensor], torch.Tensor]:
    """The branch beside ``node``, from the operators that the file gets."""
    module = lower(branch_graph(graph, node, branch), inputs=["x"], outputs=["y"])
    return lambda x: module.to(x.device)({"x": x})["y"]


def _constantly(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: weight.to(x.device)
