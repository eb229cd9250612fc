"""Reductions over axes, ArgMax/ArgMin, TopK, cumulative sums.

Axes are an attribute up to opset 17 (12 for ReduceSum), an input after. No axes means all of them, or none
with ``noop_with_empty_axes``. ReduceMax/Min share the gradient among equal maxima.
TopK breaks ties by the lower index, as ONNX requires.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from onnxptq.lowering.registry import Kernel, NodeSpec, register

Tensor = torch.Tensor
Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(dim=axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dim=axes, keepdim=keep)
    count = math.prod(x.shape[a] for a in axes)
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _extreme(name: str) -> Reduce:
    function: Callable[..., Tensor] = getattr(torch, name)

    def run(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if any(x.shape[a] == 0 for a in axes):
            return _identity(x, axes, keep, maximum=name == "amax")
        return function(x, dim=axes, keepdim=keep)

    return run


def _identity(x: Tensor, axes: tuple[int, ...], keep: bool, *, maximum: bool) -> Tensor:
    """The extreme of nothing: -inf or inf, or the type's own limit."""
    if x.dtype == torch.bool:
        value: float = float(not maximum)
    elif x.is_floating_point():
        value = -math.inf if maximum else math.inf
    else:
        value = torch.iinfo(x.dtype).min if maximum else torch.iinfo(x.dtype).max
    shape = [1 if a in axes else n for a, n in enumerate(x.shape) if keep or a not in axes]
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep, dtype=x.dtype)
    return x


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        # Its gradient at zero is zero, not the infinity of a plain square root.
        norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
        return norm
    return _sum(x * x, axes, keep).sqrt().to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.logsumexp(x, dim=axes, keepdim=keep)
    return torch.logsumexp(x.double(), dim=axes, keepdim=keep).to(x.dtype)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log().to(x.dtype)


def _kernel(reduce: Reduce, axes: tuple[int, ...] | None, keep: bool, noop: bool) -> Callable[..., Tensor]:
    """The reduction over fixed ``axes``, or over all (none with ``noop``) where they are empty or absent."""

    def run(x: Tensor, *_: Tensor | None) -> Tensor:
        if not axes:
            if noop:
                return x
            return reduce(x, tuple(range(x.dim())), keep) if x.dim() else reduce(x.reshape(1), (0,), False)
        rank = x.dim()
        return reduce(x, tuple(a + rank if a < 0 else a for a in axes), keep)

    return run


def _reduction(op: str, reduce: Reduce, axes_input_from: int) -> None:
    """Register both forms of a reduction."""

    @register("", op, 1)
    def build_attribute(spec: NodeSpec) -> Kernel:
        keep = bool(spec.integer("keepdims", 1))
        return _kernel(reduce, spec.integers("axes"), keep, False)

    @register("", op, axes_input_from, host_inputs=(1,))
    def build_input(spec: NodeSpec) -> Kernel:
        keep = bool(spec.integer("keepdims", 1))
        noop = bool(spec.integer("noop_with_empty_axes", 0))
        if not spec.has_input(1) or spec.is_constant(1):
            return _kernel(reduce, spec.constant_integers(1), keep, noop)
        return lambda x, axes: _kernel(reduce, tuple(axes.tolist()), keep, noop)(x)


_reduction("ReduceSum", _sum, 13)
_reduction("ReduceMean", _mean, 18)
_reduction("ReduceMax", _extreme("amax"), 18)
_reduction("ReduceMin", _extreme("amin"), 18)
_reduction("ReduceProd", _prod, 18)
_reduction("ReduceL1", lambda x, axes, keep: _sum(x.abs(), axes, keep), 18)
_reduction("ReduceL2", _l2, 18)
_reduction("ReduceSumSquare", lambda x, axes, keep: _sum(x * x, axes, keep), 18)
_reduction("ReduceLogSum", _log_sum, 18)
_reduction("ReduceLogSumExp", _log_sum_exp, 18)


def _arg(op: str, function: Callable[..., Tensor]) -> None:
    """Register ArgMax or ArgMin: the first extreme index, or the last with ``select_last_index``."""

    @register("", op, 1)
    def build(spec: NodeSpec) -> Kernel:
        axis, keep = spec.integer("axis", 0), bool(spec.integer("keepdims", 1))
        if not spec.integer("select_last_index", 0):
            return lambda x: function(x, dim=axis, keepdim=keep)

        def run_last(x: Tensor) -> Tensor:
            return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)

        return run_last


_arg("ArgMax", torch.argmax)
_arg("ArgMin", torch.argmin)


def _top_k(x: Tensor, k: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


@register("", "TopK", 1)
def top_k_attribute(spec: NodeSpec) -> Kernel:
    """TopK whose k is an attribute."""
    axis, k = spec.integer("axis", -1), spec.integer("k", 1)
    return lambda x: _top_k(x, k, axis, True)


@register("", "TopK", 10, host_inputs=(1,))
def top_k(spec: NodeSpec) -> Kernel:
    """TopK whose k is an input. Results are sorted whatever ``sorted`` says."""
    axis, largest = spec.integer("axis", -1), bool(spec.integer("largest", 1))
    spec.ignore("sorted")
    fixed = spec.constant_integers(1)
    if fixed is not None:
        return lambda x, _: _top_k(x, fixed[0], axis, largest)
    return lambda x, k: _top_k(x, int(k), axis, largest)


@register("", "CumSum", 11, host_inputs=(1,))
def cum_sum(spec: NodeSpec) -> Kernel:
    """Cumulative sum; ``exclusive`` leaves out the element itself, ``reverse`` starts at the end."""
    exclusive, reverse = bool(spec.integer("exclusive", 0)), bool(spec.integer("reverse", 0))
    fixed = spec.constant_integers(1)

    def run(x: Tensor, axis_tensor: Tensor | None) -> Tensor:
        axis = (fixed or (0,))[0] if axis_tensor is None else int(axis_tensor)
        if reverse:
            x = x.flip(axis)
        y = torch.cumsum(x, dim=axis, dtype=x.dtype)
        if exclusive:
            y = torch.cat(
                [torch.zeros_like(y.narrow(axis, 0, 1)), y.narrow(axis, 0, y.shape[axis] - 1)], axis
            )
        return y.flip(axis) if reverse else y

    return run
