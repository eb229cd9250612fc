"""The uniform affine quantizer: the only one that reaches a file.

    q     = clamp(round(x / scale) + zero_point, qmin, qmax)
    x_hat = (q - zero_point) * scale

``round`` is half to even and all float arithmetic is single precision, exactly as ONNX
``QuantizeLinear``/``DequantizeLinear`` compute it, so that what is simulated here equals what the file
does, bit for bit.

Shapes: ``x`` is any float32 array; ``scale`` and ``zero_point`` are those of :class:`~onnxptq.types.QParams`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxptq.types import (
    Array,
    FloatArray,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    QType,
    Quantizer,
    Storage,
)

SMALLEST_SCALE = 2.0**-56
"""Scales never fall below 1.4e-17. Integer kernels multiply their sums by scale(x) scale(w) / scale(y): where that
is a denormal, one dead channel makes a convolution three times slower, and some runtimes flush it to zero."""


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
    """Integers on the grid of ``qparams.qtype``, of the shape of ``x`` (finite; Inf saturates)."""
    scale = expand(qparams.scale, qparams.granularity, x.shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, x.shape)
    qtype = qparams.qtype
    # Single precision holds every limit up to 24 bits; the int32 of a bias needs more.
    wide = np.float32 if qtype.bits <= 24 else np.float64
    low, high = (qtype.qmin - zero_point).astype(wide), (qtype.qmax - zero_point).astype(wide)
    # A quotient beyond the floats is Inf, which clamps like any other large value.
    with np.errstate(over="ignore"):
        rounded = np.rint(np.divide(x, scale, dtype=np.float32))
    # Clamping before the cast: a float beyond int32 would wrap around.
    result: npt.NDArray[np.int32] = np.clip(rounded, low, high, dtype=wide).astype(np.int32) + zero_point
    return result


def dequantize(q: npt.NDArray[np.integer], qparams: QParams) -> FloatArray:
    """Floats of the integers ``q``; Inf where they leave the range of a float."""
    scale = expand(qparams.scale, qparams.granularity, q.shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, q.shape)
    with np.errstate(over="ignore"):
        result: FloatArray = (q.astype(np.int32) - zero_point).astype(np.float32) * scale
    return result


def fake_quantize(x: FloatArray, qparams: QParams) -> FloatArray:
    """``dequantize(quantize(x))``: floats in, floats on the grid out."""
    return dequantize(quantize(x, qparams), qparams)


def symmetric_zero_point(qtype: QType) -> int:
    """The zero point of a symmetric quantizer: 0 on a signed grid, the middle of an unsigned one."""
    return 0 if qtype.is_signed else (qtype.qmin + qtype.qmax + 1) // 2


def symmetric_qparams(absmax: Array, qtype: QType, granularity: Granularity) -> QParams:
    """Parameters that cover +-``absmax`` with the zero point of :func:`symmetric_zero_point`.

        scale = absmax / (qmax - zero_point)

    ``absmax`` has the scale's shape. On the grid [-n, n-1] the largest integer n-1 stands for +absmax; the
    smallest, -n, lies one step beyond -absmax and is used only by ranges that were shrunk.
    """
    middle = symmetric_zero_point(qtype)
    scale = np.maximum(np.asarray(absmax, np.float32) / np.float32(qtype.qmax - middle), SMALLEST_SCALE)
    return QParams(
        scale=scale.astype(np.float32),
        zero_point=np.full(scale.shape, middle, np.int32),
        qtype=qtype,
        granularity=granularity,
    )


def asymmetric_qparams(low: float, high: float, qtype: QType) -> QParams:
    """Per-tensor parameters that cover [low, high] and represent 0 exactly.

    The range is first widened to include 0 and cut to what float32 holds. The zero point is rounded to an
    integer, so the ends of the covered range move by at most half a step. Where one end is 0 the other is not
    exceeded, not even by rounding of the scale: runtimes drop a Relu or Clip in front of a quantizer only if
    the quantizer represents nothing outside its bounds.
    """
    limit = float(np.finfo(np.float32).max)
    low, high = max(min(low, 0.0), -limit), min(max(high, 0.0), limit)
    scale = np.float32(max((high - low) / (qtype.qmax - qtype.qmin), SMALLEST_SCALE))
    zero_point = int(np.clip(np.rint(qtype.qmin - low / float(scale)), qtype.qmin, qtype.qmax))
    if low == 0.0 or high == 0.0:
        scale = _not_beyond(scale, qtype.qmax - qtype.qmin, np.float32(max(-low, high)))
    return QParams(
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(zero_point, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )


def shifted_type(qtype: QType) -> QType | None:
    """The grid of an unsigned ``qtype`` from integer 0 on in the signed type of its width, where zero points may
    be negative; None for a signed one, and where the integers do not fit."""
    if qtype.is_signed:
        return None
    storage: Storage = qtype.storage[1:]  # type: ignore[assignment]
    try:
        return QType(bits=qtype.bits, qmin=0, qmax=qtype.qmax - qtype.qmin, storage=storage)
    except ValueError:
        return None


def shifted_qparams(start: int, high: float, qtype: QType) -> QParams:
    """Per-tensor parameters of a grid that begins above 0: ``start`` scale, (``start`` + 1) scale, ..., ``high``.

        scale = high / (start + qmax - qmin),    zero_point = qmin - start

    Zero is not on it unless ``start`` is 0. ``qtype`` has room for the zero point (see :func:`shifted_type`).
    """
    scale = np.float32(max(high / (start + qtype.qmax - qtype.qmin), SMALLEST_SCALE))
    return QParams(
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(qtype.qmin - start, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )


def _not_beyond(scale: np.float32, steps: int, end: np.float32) -> np.float32:
    """The largest float up to ``scale`` whose rounded product with ``steps`` does not exceed ``end``."""
    with np.errstate(over="ignore"):  # the product may round to Inf, which is beyond any end
        while scale > SMALLEST_SCALE and np.float32(steps) * scale > end:
            scale = np.nextafter(scale, np.float32(0.0))
    return scale


def largest_scale(quantizer: Quantizer, qparams: QParams) -> float:
    """The scale at which the grid ends where the tensor does: beyond it a runtime keeps the Relu or Clip that
    bounds the tensor, because the grid no longer stands in for it."""
    if quantizer.bounds is None or not np.isfinite(quantizer.bounds[1]):
        return math.inf
    if int(qparams.zero_point) != qparams.qtype.qmin:
        return math.inf
    return float(asymmetric_qparams(0.0, quantizer.bounds[1], qparams.qtype).scale)


def range_of(qparams: QParams) -> tuple[FloatArray, FloatArray]:
    """Smallest and largest representable finite float, of the shape of ``scale``."""
    scale, zero_point, qtype = qparams.scale, qparams.zero_point, qparams.qtype
    limit = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        low = np.maximum((qtype.qmin - zero_point).astype(np.float32) * scale, -limit)
        high = np.minimum((qtype.qmax - zero_point).astype(np.float32) * scale, limit)
    return np.asarray(low, np.float32), np.asarray(high, np.float32)


_PATIENCE = 5


def search_weight_qparams(
    weight: FloatArray, qtype: QType, granularity: PerTensor | PerAxis, *, norm: float = 2.4, steps: int = 80
) -> QParams:
    """Symmetric parameters that minimise sum |w - w_hat|^norm per scale over shrunken ranges.

    The range +-absmax is multiplied by 1, 0.99, ... (``steps`` factors of 1 %), as in the code released
    with BRECQ and QDrop. From 6 bits on nothing much below 1 wins, so there the search for a scale stops as soon
    as it has not improved for five factors.
    """
    axis = granularity.axis % weight.ndim if isinstance(granularity, PerAxis) else None
    if weight.size == 0:
        return symmetric_qparams(np.zeros(() if axis is None else weight.shape[axis]), qtype, granularity)
    rows = (
        weight.reshape(1, -1)
        if axis is None
        else np.ascontiguousarray(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1)
    )
    absmax = np.abs(rows).max(axis=1).astype(np.float64)
    best = np.full(rows.shape[0], np.inf)
    factor = np.ones(rows.shape[0])
    active = np.arange(rows.shape[0])
    stale = np.zeros(rows.shape[0], np.int64)
    for step in range(steps):
        trial = 1.0 - 0.01 * step
        loss = _rounding_loss(rows[active], absmax[active] * trial, qtype, norm)
        better = loss < best[active]
        best[active[better]] = loss[better]
        factor[active[better]] = trial
        if qtype.bits >= 6:
            stale[active] = np.where(better, 0, stale[active] + 1)
            active = active[stale[active] < _PATIENCE]
            if not active.size:
                break
    scaled = absmax * factor
    return symmetric_qparams(scaled[0] if axis is None else scaled, qtype, granularity)


def _rounding_loss(rows: FloatArray, absmax: FloatArray, qtype: QType, norm: float) -> FloatArray:
    """sum |w - w_hat|^norm of each row for the range +-absmax.

    Errors are measured in steps, so that single precision neither overflows nor underflows.
    """
    params = symmetric_qparams(absmax, qtype, PerAxis(0))
    scale = np.asarray(params.scale, np.float32)[:, None]
    middle = symmetric_zero_point(qtype)
    with np.errstate(over="ignore"):
        error = rows / scale
    error -= np.clip(np.rint(error), qtype.qmin - middle, qtype.qmax - middle)
    np.abs(error, out=error)
    np.power(error, np.float32(norm), out=error)
    result: FloatArray = error.sum(axis=1, dtype=np.float64) * scale[:, 0].astype(np.float64) ** norm
    return result
