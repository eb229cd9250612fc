"""Sliding-window geometry shared by convolutions and pools.

Output length of one axis (ONNX ``Conv``, ``MaxPool``): with input i, pads (b, e), kernel k, stride s,
dilation d: o = floor((i + b + e - d (k - 1) - 1) / s) + 1, or ceil in place of floor; a window that would
start in the end padding is dropped. SAME_*: o = ceil(i / s), total padding
max((o - 1) s + d (k - 1) + 1 - i, 0), the odd element at the end for SAME_UPPER, at the begin for SAME_LOWER.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxptq.lowering.registry import Declined, NodeSpec

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Strides, dilations and padding as a node states them; None where the node leaves the default."""

    strides: Ints | None
    dilations: Ints | None
    pads: Ints | None
    auto_pad: str

    def stride_of(self, dims: int) -> Ints:
        """One stride per spatial axis."""
        return self.strides or (1,) * dims

    def dilation_of(self, dims: int) -> Ints:
        """One dilation per spatial axis."""
        return self.dilations or (1,) * dims

    def pads_of(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[Ints, Ints]:
        """Begin and end padding for an input of spatial ``size``."""
        dims = len(kernel)
        if self.auto_pad == "VALID":
            return (0,) * dims, (0,) * dims
        if self.auto_pad == "NOTSET":
            pads = self.pads or (0,) * (2 * dims)
            return pads[:dims], pads[dims:]
        begins, ends = [], []
        for i, k, s, d in zip(size, kernel, self.stride_of(dims), self.dilation_of(dims), strict=True):
            total = max((-(-i // s) - 1) * s + d * (k - 1) + 1 - i, 0)
            small, large = total // 2, total - total // 2
            upper = self.auto_pad == "SAME_UPPER"
            begins.append(small if upper else large)
            ends.append(large if upper else small)
        return tuple(begins), tuple(ends)


def read_window(spec: NodeSpec) -> Window:
    """The window attributes of ``spec``.

    Raises:
        Declined: an unknown ``auto_pad``.
    """
    auto_pad = spec.text("auto_pad", "NOTSET")
    if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Declined(f"auto_pad {auto_pad}")
    return Window(spec.integers("strides"), spec.integers("dilations"), spec.integers("pads"), auto_pad)


def output_length(
    size: int, pads: tuple[int, int], kernel: int, stride: int, dilation: int, *, ceil: bool
) -> int:
    """Number of windows along one axis."""
    span = size + pads[0] + pads[1] - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (count - 1) * stride >= size + pads[0]:
        count -= 1
    return count


def padding_list(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Torch's order for ``torch.nn.functional.pad``: last axis first, (begin, end) pairs."""
    flat: list[int] = []
    for b, e in zip(reversed(begins), reversed(ends), strict=True):
        flat += [b, e]
    return flat
