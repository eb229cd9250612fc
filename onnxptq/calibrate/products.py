"""Ranges of softmax outputs, chosen by what they do to the product that reads them.

Attention weights P are many and small: on a grid over [0, 1] most of a row rounds to zero together, and
the lost mass shifts every output in the same direction. The error of P itself does not show that; the
error of the product does. So the range [b1, b2] is the one that minimises

    sum || (P - P_hat) V ||^2

on a few samples, or the same for a weighted sum of every channel by itself; V is a constant where a layer reads P.
First b2 with b1 = 0, over a grid of ends between the largest observed weight and 1/128 of it; then b1 = n s in steps
of the scale s, for n = 1, 2, ... with ends nearby, as long as that helps (the focusing interval of AIQViT, arXiv
2502.04628). A grid that begins above 0 needs a zero point below its integers; where the target has none, b1 stays 0.

Where the weights are a power P = R^g of a root that is quantized in their place, the range is one of R, and
P_hat = R_hat^g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxptq.graph.attention import Attention, find_attention, reads_directly
from onnxptq.graph.index import GraphIndex, constant_value
from onnxptq.graph.passes import root_softmax
from onnxptq.graph.surgeon import axes_of
from onnxptq.quantizers.affine import (
    asymmetric_qparams,
    fake_quantize,
    shifted_qparams,
    shifted_type,
    symmetric_qparams,
)
from onnxptq.runtime import Provider, group_within, open_exposed
from onnxptq.types import (
    Array,
    CanonicalModel,
    PerTensor,
    Progress,
    QParams,
    QType,
    Quantizer,
    QuantPlan,
    Sample,
    started,
)

_ENDS = tuple(2.0 ** (-k / 3) for k in range(22))
"""Candidate upper ends for weights, relative to the largest one: three per octave."""

_NEARBY = 2
"""Ends on either side that are tried with another lower end."""

_PATIENCE = 2
"""Lower ends without a gain after which no further one is tried."""

ORDERS = (1, 2, 3, 4)
"""Roots that are tried."""

ROOT_MARGIN_DB = 1.0
"""What a root must gain in the products, which no integer kernel can compute then."""

HELD_BYTES = 1 << 28
"""Operands that are held at once, where the caller says nothing else."""

_ROWS_IN_ALL, _LEAST_ROWS, _MOST_ROWS = 384, 8, 64
"""Rows of attention matrices that are looked at: of all samples together, and of each of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Focus:
    """The range of one softmax output, and the noise over signal of the products that read it.

    Attributes:
        qparams: of the range that was chosen.
        full: the noise where the range holds all weights.
        from_zero: of the best range that begins at 0.
        free: of the best range, whether it can be written or not.
        is_held: whether only a range that begins at 0 can be written.
        power: the weights are this power of what the range is of.
    """

    qparams: QParams
    full: float
    from_zero: float
    free: float
    is_held: bool
    power: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RootChoice:
    """The order of the root, and the noise over signal of the products in dB, mean over them, with every order that
    was tried; none was where there are no products to judge by."""

    order: int
    noise_db: Mapping[int, float]


def choose_softmax_ranges(
    model: CanonicalModel,
    plan: QuantPlan,
    ranges: Mapping[str, QParams],
    samples: Sequence[Sample],
    *,
    provider: Provider = "cpu",
    group_bytes: int = HELD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Focus]:
    """Ranges of the quantizers behind a softmax that feed a product of two activations, by quantizer id.

    Args:
        ranges: the parameters found so far; their upper ends bound the search from above.
        group_bytes: operands of all samples that are held at once; more softmaxes take more passes over the samples.
    """
    sites = _softmax_sites(GraphIndex(model.graph), plan)
    return {
        site.quantizer.quantizer_id: _focus(site, _upper_end(ranges[site.quantizer.quantizer_id]))
        for site in _collected(model, sites, samples, provider, group_bytes, progress)
    }


def choose_root(
    model: CanonicalModel,
    plan: QuantPlan,
    samples: Sequence[Sample],
    *,
    provider: Provider = "cpu",
    group_bytes: int = HELD_BYTES,
    progress: Progress | None = None,
) -> RootChoice:
    """The order of the root of softmax weights that leaves least noise in the products that read them.

    Args:
        plan: with quantizers of the weights themselves.
        samples: a few feeds.
        group_bytes: as for :func:`choose_softmax_ranges`.
    """
    index = GraphIndex(model.graph)
    sites = [site for site in _softmax_sites(index, plan) if site.can_be_rooted(index)]
    noise: dict[int, list[float]] = {order: [] for order in ORDERS}
    for site in _collected(model, sites, samples, provider, group_bytes, progress):
        top = max(float(weights.max(initial=0.0)) for weights, _, _ in site.operands)
        for order in ORDERS if top > 0.0 else ():
            found = _focus(site.rooted(order), top ** (1.0 / order))
            noise[order].append(found.from_zero if found.is_held else found.free)
    if not noise[1]:
        return RootChoice(order=1, noise_db={})
    levels = {
        order: 10 * sum(math.log10(max(n, np.finfo(np.float64).tiny)) for n in found) / len(found)
        for order, found in noise.items()
    }
    best = min(levels, key=lambda order: levels[order])
    is_worth_it = levels[best] < levels[1] - ROOT_MARGIN_DB
    return RootChoice(order=best if is_worth_it else 1, noise_db=levels)


def _collected(
    model: CanonicalModel,
    sites: Sequence[_Site],
    samples: Sequence[Sample],
    provider: Provider,
    group_bytes: int,
    progress: Progress | None,
) -> Iterator[_Site]:
    """Every site with its operands for all samples; they are forgotten when the next one is asked for."""
    if not sites or not samples:
        return
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, _ROWS_IN_ALL // len(samples)))

    def collect(chosen: Sequence[_Site], seen: Sequence[Sample], tick: Callable[[], None]) -> None:
        """The operands of the ``chosen`` sites for the samples ``seen``."""
        read = {name for site in chosen for product in site.products for name in product.names}
        exposed = sorted(read - set(samples[0]))
        session = open_exposed(model.path, exposed, provider=provider)
        for sample in seen:
            values = {**sample, **session.run(sample, exposed)}
            for site in chosen:
                site.operands.extend((*p.operands(values, rows), p.apply) for p in site.products)
            tick()

    collect(sites, samples[:1], lambda: None)
    names = [site.quantizer.quantizer_id for site in sites]
    sizes = {name: site.release() * len(samples) for name, site in zip(names, sites, strict=True)}
    groups = group_within([[name] for name in names], sizes, group_bytes)
    tick = started(progress, "softmax ranges", len(groups) * len(samples))
    for members in groups:
        collect([sites[i] for i in members], samples, tick)
        for i in members:
            yield sites[i]
            sites[i].release()


Apply = Callable[[Array, Array], Array]
"""What an attention makes of its weights and values; linear in the weights."""


@dataclass(frozen=True, slots=True)
class _Product:
    """An attention that reads quantized weights, or their root R with P = R^power; ``constant`` is V in a layer."""

    found: Attention
    apply: Apply
    constant: Array | None

    @property
    def names(self) -> frozenset[str]:
        """The tensors that ``operands`` takes."""
        computed = () if self.constant is not None else (self.found.values,)
        return frozenset({self.found.quantized, self.found.weights, *computed})

    def operands(self, values: Mapping[str, Array], most: int) -> tuple[Array, Array]:
        """At most ``most`` rows of R, evenly spread, and V, of the product P V; of V P they are transposed, as
        (V P)^T = P^T V^T. For a weighted sum and a convolution all of both."""
        weights = values[self.found.quantized]
        other = values[self.found.values] if self.constant is None else self.constant
        if self.found.root:
            # What is put to 0 behind the root, rows of nothing but masked scores among it, is no part of the product.
            weights = np.where(values[self.found.weights] == 0, np.float32(0), weights)
        if self.found.form == "weighted sum" or self.found.product.op == "Conv":
            return weights, other
        attrs = self.found.product.attrs if self.found.product.op == "Gemm" else {}
        turned = [bool(attrs.get(name, 0)) for name in ("transA", "transB")]
        if self.found.weights_index == 1:
            turned = [not is_turned for is_turned in reversed(turned)]
        weights, other = (
            value.swapaxes(-1, -2) if is_turned else value
            for value, is_turned in zip((weights, other), turned, strict=True)
        )
        rows = weights[..., :: -(-weights.shape[-2] // most), :]
        return np.ascontiguousarray(rows), other


@dataclass(frozen=True, slots=True)
class _Site:
    """A quantizer, the products that read it, with g of P = R^g, and their operands, once per sample."""

    quantizer: Quantizer
    products: Sequence[_Product]
    power: float
    operands: list[tuple[Array, Array, Apply]] = field(default_factory=list)

    def can_be_rooted(self, index: GraphIndex) -> bool:
        """Whether its weights can become powers of their roots."""
        return all(root_softmax.declined(index, product.found) is None for product in self.products)

    def rooted(self, order: int) -> _Site:
        """The same with the root of that order in the place of its weights."""
        roots = [(weights ** (1.0 / order), other, apply) for weights, other, apply in self.operands]
        return replace(self, power=self.power * order, operands=roots)

    def release(self) -> int:
        """Forget the operands; returns how many bytes they took."""
        size = sum(r.nbytes + v.nbytes for r, v, _ in self.operands)
        self.operands.clear()
        return size

    def noise(self, qparams: QParams) -> float:
        """sum || (P - P_hat) V ||^2."""
        power = self.power
        return math.fsum(
            _energy(apply(r**power - fake_quantize(r, qparams) ** power, v)) for r, v, apply in self.operands
        )

    def signal(self) -> float:
        """sum || P V ||^2."""
        return math.fsum(_energy(apply(r**self.power, v)) for r, v, apply in self.operands)


def _softmax_sites(index: GraphIndex, plan: QuantPlan) -> list[_Site]:
    """The quantizers of softmax weights. One that serves another reader as well, or shares its scale, is left
    out: its range is not for the product alone to choose."""
    products = {}
    for found in find_attention(index):
        apply = _application(index, found)
        if apply is not None and (not found.root or reads_directly(index, found)):
            tensor = found.product.inputs[1 - found.weights_index]
            products[found.edge] = _Product(found, apply, constant_value(tensor))
    groups = [quantizer.scale_group for quantizer in plan.quantizers]
    sites = []
    for quantizer in plan.quantizers:
        read = [products.get((site.consumer, site.input_index)) for site in quantizer.sites]
        known = [product for product in read if product is not None]
        is_alone = groups.count(quantizer.scale_group) == 1
        if quantizer.role == "activation" and len(known) == len(read) and is_alone:
            sites.append(_Site(quantizer, known, known[0].found.power))
    return sites


def _application(index: GraphIndex, found: Attention) -> Apply | None:
    """What the product of ``found`` computes; None where that is not known."""
    if found.product.op == "Conv":
        return lambda p, v: np.tensordot(v.reshape(v.shape[:2]), p, axes=([1], [1]))
    if found.form in ("product", "layer"):
        return np.matmul if found.product.op in ("MatMul", "Gemm") else None
    total = index.sole_user(found.product.outputs[0].name) if found.form == "weighted sum" else None
    axes = axes_of(total) if total is not None and total.op in ("ReduceSum", "ReduceMean") else None
    # A mean has the same noise over signal as the sum.
    return None if axes is None else lambda p, v: (p * v).sum(axis=tuple(axes))


def _focus(site: _Site, top: float) -> Focus:
    quantizer = site.quantizer
    signal = max(site.signal(), np.finfo(np.float64).tiny)
    ends = [top * end ** (1.0 / site.power) for end in _ENDS]
    losses = [site.noise(_from_zero(quantizer, end)) for end in ends]
    best = int(np.argmin(losses))
    own = _from_zero(quantizer, ends[best])
    levels = quantizer.qtype.qmax - int(own.zero_point)
    allowed = None if quantizer.symmetric else shifted_type(quantizer.qtype)
    # What a target cannot have is tried all the same: the report says what that costs.
    qtype = allowed or QType(bits=quantizer.qtype.bits, qmin=0, qmax=levels, storage="int16")
    least, shifted = _shifted(lambda n, k: site.noise(shifted_qparams(n, ends[k], qtype)), best)
    is_gain = least < losses[best]
    return Focus(
        qparams=shifted_qparams(shifted[0], ends[shifted[1]], qtype) if allowed and is_gain else own,
        full=losses[0] / signal,
        from_zero=losses[best] / signal,
        free=min(least, losses[best]) / signal,
        is_held=allowed is None,
        power=site.power,
    )


def _shifted(loss: Callable[[int, int], float], best: int) -> tuple[float, tuple[int, int]]:
    """The least loss over lower ends n >= 1 and the number k of the upper end, and where it is."""
    least, where, stale, n = math.inf, (1, best), 0, 0
    while stale < _PATIENCE and n < -_LOWEST_ZERO_POINT:
        n += 1
        near = range(max(0, where[1] - _NEARBY), min(len(_ENDS), where[1] + _NEARBY + 1))
        found = min((loss(n, k), (n, k)) for k in near)
        stale = 0 if found[0] < least else stale + 1
        least, where = min((least, where), found)
    return least, where


_LOWEST_ZERO_POINT = -128


def _from_zero(quantizer: Quantizer, high: float) -> QParams:
    if quantizer.symmetric:
        return symmetric_qparams(np.asarray(high), quantizer.qtype, PerTensor())
    return asymmetric_qparams(0.0, high, quantizer.qtype)


def _upper_end(qparams: QParams) -> float:
    return float((qparams.qtype.qmax - qparams.zero_point) * qparams.scale)


def _energy(values: Array) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)
