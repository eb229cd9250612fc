"""The uniform affine quantizer: the only one that reaches a file.

    q     = clamp(round(x / scale) + zero_point, qmin, qmax)
    x_hat = (q - zero_point) * scale

``round`` is half to even and all float arithmetic is single precision, exactly as ONNX
``QuantizeLinear``/``DequantizeLinear`` compute it, so that what is simulated here equals what the file
does, bit for bit.

Shapes: ``x`` is any float32 array; ``scale`` and ``zero_point`` are those of :class:`~onnxptq.types.QParams`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxptq.types import Array, FloatArray, Granularity, PerAxis, PerGroup, PerTensor, QParams, QType

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Scales never fall below the smallest normal float: denormals are flushed to zero by some runtimes."""


def expand(values: Array, granularity: Granularity, shape: tuple[int, ...]) -> Array:
    """Broadcast per-tensor, per-axis or per-group ``values`` against a tensor of ``shape``."""
    match granularity:
        case PerTensor():
            return values.reshape(())
        case PerAxis(axis):
            return values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
        case PerGroup(axis, group_size):
            repeated = np.repeat(values, group_size, axis=axis)
            return np.take(repeated, np.arange(shape[axis]), axis=axis)


def quantize(x: FloatArray, qparams: QParams) -> npt.NDArray[np.int32]:
    """Integers on the grid of ``qparams.qtype``, of the shape of ``x``."""
    scale = expand(qparams.scale, qparams.granularity, x.shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, x.shape)
    qtype = qparams.qtype
    # Clamping before the cast: a float beyond int32 would wrap around.
    rounded = np.rint(np.divide(x, scale, dtype=np.float32))
    shifted = np.clip(rounded, (qtype.qmin - zero_point), (qtype.qmax - zero_point))
    result: npt.NDArray[np.int32] = shifted.astype(np.int32) + zero_point
    return result


def dequantize(q: npt.NDArray[np.integer], qparams: QParams) -> FloatArray:
    """Floats of the integers ``q``."""
    scale = expand(qparams.scale, qparams.granularity, q.shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, q.shape)
    result: FloatArray = (q.astype(np.int32) - zero_point).astype(np.float32) * scale
    return result


def fake_quantize(x: FloatArray, qparams: QParams) -> FloatArray:
    """``dequantize(quantize(x))``: floats in, floats on the grid out."""
    return dequantize(quantize(x, qparams), qparams)


def symmetric_qparams(absmax: Array, qtype: QType, granularity: Granularity) -> QParams:
    """Zero point at the middle of the grid, scale so that +-``absmax`` (of the scale's shape) is covered.

    A signed grid [-n, n-1] covers the smaller side exactly: the most positive value rounds to n-1 without
    clipping by more than half a step only if scale = absmax / (n - 1/2), and exactly with absmax / (n - 1),
    which is what is used here.
    """
    middle = 0 if qtype.is_signed else (qtype.qmin + qtype.qmax + 1) // 2
    scale = np.maximum(np.asarray(absmax, np.float32) / np.float32(qtype.qmax - middle), SMALLEST_SCALE)
    return QParams(
        scale=scale.astype(np.float32),
        zero_point=np.full(scale.shape, middle, np.int32),
        qtype=qtype,
        granularity=granularity,
    )


def asymmetric_qparams(low: float, high: float, qtype: QType) -> QParams:
    """Per-tensor parameters that cover [low, high] and represent 0 exactly.

    The range is first widened to include 0. The zero point is rounded to an integer, so the ends of the
    covered range move by at most half a step.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / (qtype.qmax - qtype.qmin), SMALLEST_SCALE))
    zero_point = int(np.clip(np.rint(qtype.qmin - low / float(scale)), qtype.qmin, qtype.qmax))
    return QParams(
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(zero_point, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )


def range_of(qparams: QParams) -> tuple[FloatArray, FloatArray]:
    """Smallest and largest representable float, of the shape of ``scale``."""
    scale, zero_point, qtype = qparams.scale, qparams.zero_point, qparams.qtype
    low = (qtype.qmin - zero_point).astype(np.float32) * scale
    high = (qtype.qmax - zero_point).astype(np.float32) * scale
    return low, high


def search_weight_qparams(
    weight: FloatArray, qtype: QType, granularity: PerTensor | PerAxis, *, norm: float = 2.4, steps: int = 80
) -> QParams:
    """Symmetric parameters that minimise sum |w - w_hat|^norm per scale over shrunken ranges.

    The range +-absmax is multiplied by 1, 0.99, ... (``steps`` factors of 1 %), as in the code released
    with BRECQ and QDrop. At 8 bits nothing much below 1 ever wins, so the search stops as soon as no scale
    has improved for ten factors.
    """
    axis = granularity.axis % weight.ndim if isinstance(granularity, PerAxis) else None
    rows = (
        weight.reshape(1, -1)
        if axis is None
        else np.ascontiguousarray(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1)
    )
    if rows.size == 0:
        return symmetric_qparams(np.zeros(() if axis is None else rows.shape[0]), qtype, granularity)
    absmax = np.abs(rows).max(axis=1).astype(np.float64)
    best = np.full(rows.shape[0], np.inf)
    factor = np.ones(rows.shape[0])
    stale = 0
    for step in range(steps):
        trial = 1.0 - 0.01 * step
        params = symmetric_qparams(absmax * trial, qtype, PerAxis(0))
        error = np.abs(rows - fake_quantize(rows, params)).astype(np.float64)
        loss = (error**norm).sum(axis=1)
        better = loss < best
        best = np.where(better, loss, best)
        factor = np.where(better, trial, factor)
        stale = 0 if better.any() else stale + 1
        if stale == 10:
            break
    scaled = absmax * factor
    return symmetric_qparams(scaled[0] if axis is None else scaled, qtype, granularity)
