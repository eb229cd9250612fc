"""Normalization at inference.

- BatchNormalization: scale (x - mean) / sqrt(var + eps) + bias with stored statistics, per channel (axis 1).
- InstanceNormalization: the same with statistics over the spatial axes of each sample and channel.
- GroupNormalization: statistics over groups of channels; opset 18 has one scale and bias per group, opset 21
  one per channel.
- LayerNormalization: statistics over the axes from ``axis`` on.
- RMSNormalization: x / sqrt(mean x^2 + eps) scale, over the same axes.
- LpNormalization: x / ||x||_p along one axis. MeanVarianceNormalization: (x - mean) / (std + 1e-9).
- LRN: x / (bias + alpha / size sum_window x^2)^beta over ``size`` neighbouring channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


@register("", "BatchNormalization", 7, note="inference form")
def batch_normalization(spec: NodeSpec) -> Kernel:
    """BatchNormalization with stored statistics."""
    epsilon = spec.number("epsilon", 1e-5)
    spec.ignore("momentum")
    if spec.integer("spatial", 1) != 1:
        raise Declined("BatchNormalization with spatial=0")
    if spec.integer("training_mode", 0) == 1 or spec.n_outputs > 1:
        raise Declined("BatchNormalization in training mode")

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if scale.dtype != x.dtype or mean.dtype != x.dtype:
            scale, bias, mean, var = (t.to(x.dtype) for t in (scale, bias, mean, var))
        if mean.requires_grad or var.requires_grad:
            # torch's own function has no derivative by the statistics.
            shape = (1, -1, *(1,) * (x.dim() - 2))
            gain = scale * torch.rsqrt(var + epsilon)
            return x * gain.reshape(shape) + (bias - mean * gain).reshape(shape)
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)

    return run


@register("", "InstanceNormalization", 6)
def instance_normalization(spec: NodeSpec) -> Kernel:
    """InstanceNormalization: group normalization with one channel per group."""
    epsilon = spec.number("epsilon", 1e-5)
    # torch.group_norm takes a single spatial element, which torch.nn.functional refuses.
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


def _read_group_norm(spec: NodeSpec) -> tuple[float, int]:
    spec.ignore("stash_type")
    return spec.number("epsilon", 1e-5), spec.integer("num_groups", 1)


@register("", "GroupNormalization", 18)
def group_normalization_per_group(spec: NodeSpec) -> Kernel:
    """GroupNormalization of opset 18: scale and bias have one element per group."""
    epsilon, groups = _read_group_norm(spec)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        size = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(size), bias.repeat_interleave(size)
        return torch.group_norm(x, groups, scale, bias, epsilon)

    return run


@register("", "GroupNormalization", 21)
def group_normalization(spec: NodeSpec) -> Kernel:
    """GroupNormalization of opset 21: scale and bias have one element per channel."""
    epsilon, groups = _read_group_norm(spec)
    return lambda x, scale, bias: torch.group_norm(x, groups, scale, bias, epsilon)


@register("", "LayerNormalization", 17)
def layer_normalization(spec: NodeSpec) -> Kernel:
    """LayerNormalization, with the Mean and InvStdDev outputs where they are wanted."""
    axis, epsilon = spec.integer("axis", -1), spec.number("epsilon", 1e-5)
    spec.ignore("stash_type")
    wants_statistics = spec.n_outputs > 1

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, shape, scale, bias, epsilon)
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    def run_with_statistics(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        axes = tuple(range(axis % x.dim(), x.dim()))
        var, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
        return run(x, scale, bias), mean, torch.rsqrt(var + epsilon)

    return run_with_statistics if wants_statistics else run


@register("", "RMSNormalization", 23)
def rms_normalization(spec: NodeSpec) -> Kernel:
    """RMSNormalization."""
    axis, epsilon = spec.integer("axis", -1), spec.number("epsilon", 1e-5)
    spec.ignore("stash_type")

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        return x * torch.rsqrt(x.square().mean(dim=axes, keepdim=True) + epsilon) * scale

    return run


@register("", "LpNormalization", 1)
def lp_normalization(spec: NodeSpec) -> Kernel:
    """LpNormalization; a zero vector stays zero."""
    axis, p = spec.integer("axis", -1), spec.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
        return x / torch.where(norm == 0, torch.ones_like(norm), norm)

    return run


@register("", "MeanVarianceNormalization", 9)
def mean_variance_normalization(spec: NodeSpec) -> Kernel:
    """MeanVarianceNormalization over ``axes``."""
    axes = spec.integers("axes") or (0, 2, 3)

    def run(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
        return (x - mean) / (var.sqrt() + 1e-9)

    return run


@register("", "LRN", 1)
def lrn(spec: NodeSpec) -> Kernel:
    """LRN: for an even size the extra neighbour lies after the channel."""
    alpha, beta = spec.number("alpha", 1e-4), spec.number("beta", 0.75)
    bias, size = spec.number("bias", 1.0), spec.integer("size", 1)
    before = (size - 1) // 2

    def run(x: Tensor) -> Tensor:
        padding = (0, 0) * (x.dim() - 2) + (before, size - 1 - before)
        total = F.pad(x.square(), padding).unfold(1, size, 1).sum(dim=-1)
        return x / (bias + alpha / size * total).pow(beta)

    return run
