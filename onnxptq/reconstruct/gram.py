"""Second moments of what a linear layer reads, as the closed-form rounding needs them.

For a layer y = W x with rows x (patches, for a convolution) and their quantized versions x' = Q(x):

    G = sum x' x'^T        C = sum x' x^T        m' = mean x'        m = mean x

summed over samples and positions, per group. Sums run over a fixed selection of positions, in float64.
A layer with a bias is best served by the centred sums G - n m' m'^T and C - n m' m^T, and by the bias
b + W m - W_new m': together they are the least-squares solution in weight and bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxptq.graph.linear import Linear
from onnxptq.ranks import Ranks
from onnxptq.types import Array, FloatArray

Matrix = npt.NDArray[np.float64]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(slots=True)
class Gram:
    """The sums of one layer: ``quantized`` is G and ``mixed`` is C, both (groups, K, K); ``rows`` counts rows.

    ``float_total`` and ``quantized_total`` are the sums of x and x', (groups, K). Where the inputs stay as they
    are C equals G and is the same array. ``floats`` is sum x x^T where it was asked for.
    """

    quantized: Matrix
    mixed: Matrix
    float_total: Matrix
    quantized_total: Matrix
    rows: int = 0
    floats: Matrix | None = None

    @staticmethod
    def empty(groups: int, width: int, *, is_mixed: bool = True, has_floats: bool = False) -> Gram:
        """Zero sums; ``is_mixed`` unless all rows will be added as their own quantized form."""
        sums = np.zeros((groups, width, width))
        return Gram(
            sums,
            np.zeros_like(sums) if is_mixed else sums,
            np.zeros((groups, width)),
            np.zeros((groups, width)),
            floats=np.zeros_like(sums) if has_floats else None,
        )

    def add(self, rows: FloatArray, quantized: FloatArray) -> None:
        """Add rows of shape (groups, n, K)."""
        transposed = np.swapaxes(quantized, 1, 2)
        with np.errstate(over="ignore", invalid="ignore"):
            self.quantized += transposed @ quantized
            if self.mixed is not self.quantized:
                self.mixed += transposed @ rows
            if self.floats is not None:
                self.floats += np.swapaxes(rows, 1, 2) @ rows
            # As exact as the products above, and many times faster than sums along that axis.
            ones = np.ones(rows.shape[1], np.float32)
            self.float_total += ones @ rows
            self.quantized_total += ones @ quantized
        self.rows += rows.shape[1]

    def plus(self, other: Gram) -> Gram:
        """The sums over the rows of both."""
        quantized = self.quantized + other.quantized
        is_mixed = self.mixed is not self.quantized
        return Gram(
            quantized,
            self.mixed + other.mixed if is_mixed else quantized,
            self.float_total + other.float_total,
            self.quantized_total + other.quantized_total,
            self.rows + other.rows,
            None if self.floats is None or other.floats is None else self.floats + other.floats,
        )

    def sum_over(self, ranks: Ranks) -> Gram:
        """The sums over the rows of all ``ranks``."""
        is_mixed = self.mixed is not self.quantized
        quantized = ranks.sum(self.quantized)
        return Gram(
            quantized,
            ranks.sum(self.mixed) if is_mixed else quantized,
            ranks.sum(self.float_total),
            ranks.sum(self.quantized_total),
            int(ranks.sum(np.asarray(self.rows))),
            None if self.floats is None else ranks.sum(self.floats),
        )

    def centred(self) -> Gram:
        """The same sums about the means of the rows."""
        product = self.quantized_total[:, :, None] / max(1, self.rows)
        quantized = self.quantized - product * self.quantized_total[:, None, :]
        is_mixed = self.mixed is not self.quantized
        mixed = self.mixed - product * self.float_total[:, None, :] if is_mixed else quantized
        floats = self.floats
        if floats is not None:
            total = self.float_total
            floats = floats - total[:, :, None] / max(1, self.rows) * total[:, None, :]
        return Gram(quantized, mixed, self.float_total, self.quantized_total, self.rows, floats)

    @property
    def is_finite(self) -> bool:
        """Whether no product has left the range of float32."""
        return bool(np.isfinite(self.quantized).all() and np.isfinite(self.mixed).all())


def has_rows(layer: Linear) -> bool:
    """Whether ``layer_rows`` supports the layer."""
    if layer.node.op == "Conv":
        return layer.node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    is_matrix = (
        layer.node.op in ("MatMul", "Gemm") and layer.weight_index == 1 and len(layer.weight.shape) == 2
    )
    return is_matrix and not layer.node.attrs.get("transA", 0)


def layer_rows(
    layer: Linear, value: Array, changed: Array | None, limit: int
) -> tuple[FloatArray, FloatArray] | None:
    """Rows that the layer multiplies, float and quantized, each (groups, n, K); None where that is not supported.

    ``value`` is the layer's input in the float network, ``changed`` in the quantized one (None: the same); of
    the rows about ``limit`` are taken, evenly spread.
    """
    if not has_rows(layer):
        return None
    rows = _rows(layer, np.asarray(value, np.float32), limit)
    return rows, rows if changed is None else _rows(layer, np.asarray(changed, np.float32), limit)


def weight_matrix(layer: Linear, weight: Array) -> Array:
    """The weight as (groups, channels per group, K), K in the order of ``layer_rows``."""
    if layer.node.op == "Conv":
        return weight.reshape(layer.group, weight.shape[0] // layer.group, -1)
    moved = weight if layer.axis % 2 == 0 else weight.T
    return moved[None]


def weight_tensor(layer: Linear, matrix: Array) -> Array:
    """The inverse of ``weight_matrix``."""
    if layer.node.op == "Conv":
        return matrix.reshape(layer.weight.shape)
    return matrix[0] if layer.axis % 2 == 0 else np.ascontiguousarray(matrix[0].T)


def _rows(layer: Linear, value: FloatArray, limit: int) -> FloatArray:
    if layer.node.op == "Conv":
        return _patches(layer, value, limit)
    rows = value.reshape(-1, value.shape[-1])
    return rows[picked(len(rows), limit)][None]


class Window(NamedTuple):
    """What one output position of a convolution sees, an entry per spatial axis."""

    reach: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]


def window_of(layer: Linear) -> Window:
    """The window of a convolution without automatic padding."""
    attrs, kernel = layer.node.attrs, layer.weight.shape[2:]
    spatial = len(kernel)
    dilations = list(attrs.get("dilations", [1] * spatial))
    pads = list(attrs.get("pads", [0] * (2 * spatial)))
    return Window(
        reach=[(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)],
        strides=list(attrs.get("strides", [1] * spatial)),
        dilations=dilations,
        pads=list(zip(pads[:spatial], pads[spatial:], strict=True)),
    )


def _patches(layer: Linear, value: FloatArray, limit: int) -> FloatArray:
    """Patches of a convolution's input, (groups, n, channels per group * kernel)."""
    window, spatial = window_of(layer), value.ndim - 2
    padded = np.pad(value, [(0, 0), (0, 0), *window.pads])
    axes = tuple(range(2, 2 + spatial))
    windows = np.lib.stride_tricks.sliding_window_view(padded, window.reach, axis=axes)
    positions = tuple(slice(None, None, s) for s in window.strides)
    taps = tuple(slice(None, None, d) for d in window.dilations)
    strided: tuple[Any, ...] = (..., *positions, *taps)
    windows = windows[strided]
    windows = np.moveaxis(windows, 1, 1 + spatial)
    places = windows.shape[: 1 + spatial]
    chosen = picked(math.prod(places), limit)
    # Only the chosen positions are ever copied out of the overlapping view.
    patches = windows[np.unravel_index(chosen, places)]
    grouped = patches.reshape(len(chosen), layer.group, -1)
    return np.ascontiguousarray(np.moveaxis(grouped, 1, 0))


def picked(size: int, limit: int) -> npt.NDArray[np.int64]:
    """Which of ``size`` rows are taken, at most ``limit``, in order.

    They follow the golden ratio: equal steps would meet the same column of every picture, or the same token of every
    window, wherever the step and a size of the array have a factor in common.
    """
    if limit >= size:
        return np.arange(size)
    return np.unique((np.arange(max(1, limit)) * _GOLDEN % 1.0 * size).astype(np.int64))
