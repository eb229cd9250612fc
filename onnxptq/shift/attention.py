"""Constants for the values of attention: what the quantized weights of a row lose is lost at c, not at 0.

Rounded, the rows of P no longer sum to one. With D = P_hat - P and values V - 1 c^T instead of V, the product errs by

    D (V - 1 c^T) = D V - (D 1) c^T

which is least, in squares, where c regresses the errors D V on what the rows have gained or lost, D 1:

    c = sum (D 1)^T D V / sum |D 1|^2

The grid of V changes with its range, and with it the noise of step^2 / 12 per element that P passes on. A product
takes part where both together fall.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxptq.quantizers.affine import fake_quantize
from onnxptq.runtime import Provider, group_within, open_exposed
from onnxptq.shift.spans import Floats
from onnxptq.shift.tracing import Product, ShiftTracer
from onnxptq.types import Array, CanonicalModel, Feeds, QParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """Parameters of quantized tensors by name, and whether those of activations are symmetric about 0."""

    qparams: Mapping[str, QParams] = field(default_factory=dict)
    symmetric: bool = False


def value_offsets(
    model: CanonicalModel,
    feeds: Feeds,
    tracer: ShiftTracer,
    grids: Grids,
    sizes: Mapping[str, int],
    *,
    provider: Provider,
    group_bytes: int,
) -> dict[int, float]:
    """c by class of channels, of the products with quantized weights whose noise falls.

    Args:
        sizes: bytes of every tensor for one sample.
        group_bytes: operands held at once; more products take more passes over the samples.
    """
    wanted = [p for p in tracer.products if p.weights in grids.qparams and not _is_held(tracer, p)]
    offsets: dict[int, float] = {}
    held: set[int] = set()
    units = [[p.weights, p.values] for p in wanted]
    for members in group_within(units, sizes, group_bytes):
        errors = [_Errors(tracer, wanted[i], grids) for i in members]
        names = sorted({name for i in members for name in units[i]})
        session = open_exposed(model.path, names, provider=provider)
        for sample in feeds:
            values = session.run(sample, names)
            for error in errors:
                error.add(values)
        for error in errors:
            found = error.offsets()
            held |= set(tracer.roots(error.product.labels)) - set(found)
            offsets.update(found)
    return {root: value for root, value in offsets.items() if root not in held}


def _is_held(tracer: ShiftTracer, product: Product) -> bool:
    return tracer.classes.all_pinned(product.labels)


class _Errors:
    """Sums over samples of what one product loses."""

    def __init__(self, tracer: ShiftTracer, product: Product, grids: Grids) -> None:
        self.product = product
        self._tracer = tracer
        self._grids = grids
        self._along, self._squared = (np.zeros(product.labels.shape) for _ in range(2))
        self._passed = 0.0
        self._channels = 0
        self._low = np.full(product.labels.shape, np.inf)
        self._high = -self._low

    def add(self, values: Mapping[str, Array]) -> None:
        weights, moved = values[self.product.weights], values[self.product.values]
        rounded = fake_quantize(weights, self._grids.qparams[self.product.weights])
        lost = rounded - weights
        error = np.matmul(lost, moved)
        rows = lost.sum(axis=-1, keepdims=True)
        self._along += self._summed(rows * error)
        self._squared += self._summed(np.broadcast_to(rows * rows, error.shape))
        self._passed += float((rounded.astype(np.float64) ** 2).sum())
        self._channels = moved.shape[-1]
        self._low = np.minimum(self._low, moved.min(axis=self._flat, keepdims=True))
        self._high = np.maximum(self._high, moved.max(axis=self._flat, keepdims=True))

    @property
    def _flat(self) -> tuple[int, ...]:
        """Axes along which all channels are one class: those of tokens and of independent rows, of any length."""
        return tuple(axis for axis, size in enumerate(self.product.labels.shape) if size == 1)

    def _summed(self, values: Array) -> Floats:
        found: Floats = values.sum(axis=self._flat, keepdims=True, dtype=np.float64)
        return found

    def offsets(self) -> dict[int, float]:
        """c by class, empty where the noise does not fall."""
        roots, places = np.unique(self._tracer.classes.roots(self.product.labels), return_inverse=True)
        places = places.reshape(-1)
        along = np.bincount(places, self._along.reshape(-1))
        squared = np.bincount(places, self._squared.reshape(-1))
        c = np.divide(along, squared, out=np.zeros_like(along), where=squared > 0)
        c[[self._tracer.classes.is_pinned(root) for root in roots.tolist()]] = 0.0
        taken: Floats = c[places].reshape(self._along.shape)
        gained = float((2 * c * along - c * c * squared).sum())
        if not gained > self._value_noise(taken) - self._value_noise(np.zeros_like(taken)):
            return {}
        return {root: float(value) for root, value in zip(roots.tolist(), c, strict=True) if value}

    def _value_noise(self, taken: Floats) -> float:
        """What the product passes on of the rounding of V without ``taken``, over all samples."""
        grid = self._grids.qparams.get(self.product.values)
        if grid is None:
            return 0.0
        low, high = self._low - taken, self._high - taken
        steps = float(grid.qtype.qmax - grid.qtype.qmin)
        if self._grids.symmetric:
            width = 2 * float(np.maximum(np.abs(low), np.abs(high)).max())
        else:
            width = max(float(high.max()), 0.0) - min(float(low.min()), 0.0)
        step = width / steps
        return self._passed * self._channels * step * step / 12
