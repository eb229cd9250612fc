"""From a trace and its statistics to noise terms, and to sets of them that can be solved on their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxptq.equalize.gains import Gains, row_gains
from onnxptq.equalize.limits import Limits
from onnxptq.equalize.noise import ActivationTerm, Floats, Indices, Term, WeightTerm
from onnxptq.equalize.observe import Spread
from onnxptq.equalize.tracing import Product, Trace
from onnxptq.graph.classes import variable_of
from onnxptq.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Emphasis:
    """How much of the modelled clipping noise and weight noise to believe.

    Both depend on what the model ignores: clipping on tails that few samples show, weight noise on how alike
    its effects are at neighbouring positions. The right values differ from network to network.
    """

    clipping: float
    weights: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """Terms that share variables with each other and with no others; their indices count ``variables``."""

    variables: tuple[int, ...]
    terms: tuple[Term, ...]

    def ends(self, limits: Limits, limit: float) -> tuple[Floats, Floats]:
        """Least and greatest ln s of every variable: within ``limits``, and s within [1 / limit, limit]."""
        bound = math.log(limit)
        ends = [limits.get(variable, (-bound, bound)) for variable in self.variables]
        low, high = np.clip(np.array(ends).reshape(-1, 2), -bound, bound).T
        return low, high

    def weighed(self, emphasis: Emphasis) -> tuple[Term, ...]:
        """The terms with their clipping and weight noise multiplied by ``emphasis``."""
        return tuple(
            replace(term, risk=term.risk * emphasis.clipping)
            if isinstance(term, ActivationTerm)
            else replace(term, energy=term.energy * emphasis.weights)
            for term in self.terms
        )


def build_terms(
    trace: Trace,
    tensors: Collection[str],
    spreads: Mapping[str, Spread],
    gains: Gains,
    *,
    symmetric: bool,
) -> list[Term]:
    """Terms of the quantized ``tensors`` and of the weights that read free classes, indexed by variable."""
    terms: list[Term] = []
    for name in tensors:
        spread = spreads.get(name)
        if spread is None:
            continue
        index, sign = _variables(trace, spread.roots)
        if (index < 0).all():
            continue
        known = gains.get(name, {})
        gain = np.array([known.get(root, 0.0) for root in spread.roots.tolist()])
        terms.append(
            ActivationTerm(
                name=name,
                index=index,
                sign=sign,
                low=spread.low,
                high=spread.high,
                gain=gain * spread.density,
                tail_low=spread.tail_low,
                tail_high=spread.tail_high,
                risk=gain * spread.rarity,
                symmetric=symmetric,
            )
        )
    quantized = {int(i) for term in terms for i in term.index if i >= 0}
    for product in trace.products:
        if product.rows is not None and product.source in spreads:
            terms += _weight_terms(product, trace, spreads, gains, quantized)
    return terms


def _weight_terms(
    product: Product, trace: Trace, spreads: Mapping[str, Spread], gains: Gains, quantized: set[int]
) -> list[WeightTerm]:
    weight = product.node.inputs[product.index].values
    spread = spreads[product.source]
    gain, _ = row_gains(product, trace, spreads, gains)
    rows = product.rows if product.rows is not None else 0
    outputs = weight.shape[rows]
    columns = [1 if a == rows % weight.ndim else n for a, n in enumerate(weight.shape)]
    roots = trace.classes.roots(product.times)
    # Rows that read the same classes (all of them, unless the weight has groups) make one term.
    per_row = roots.shape[rows]
    reads = np.broadcast_to(
        roots, [per_row if n == 1 and a == rows % weight.ndim else n for a, n in enumerate(columns)]
    )
    patterns, which = np.unique(_by_row(reads, rows), axis=0, return_inverse=True)
    members = np.broadcast_to(which.reshape(-1), (outputs,))
    absmax = _by_row(np.abs(weight), rows)
    row_gain = _by_row(np.broadcast_to(gain, weight.shape), rows).mean(axis=1)
    terms = []
    for number, pattern in enumerate(patterns):
        classes, column = np.unique(pattern, return_inverse=True)
        index, sign = _variables(trace, classes)
        place = np.minimum(np.searchsorted(spread.roots, classes), spread.roots.size - 1)
        is_known = bool((spread.roots[place] == classes).all())
        if classes.size < 2 or not is_known or not quantized & set(index.tolist()):
            continue
        own = members == number
        terms.append(
            WeightTerm(
                name=product.node.name,
                index=index,
                sign=sign,
                absmax=_largest(absmax[own], column, classes.size),
                gain=row_gain[own],
                energy=spread.energy[place] * np.bincount(column),
            )
        )
    return terms


def _by_row(values: Array, rows: int) -> Array:
    """A matrix whose first axis is ``rows`` of ``values``."""
    moved = np.moveaxis(values, rows, 0)
    return moved.reshape(moved.shape[0], -1)


def _largest(values: Array, column: Indices, count: int) -> Floats:
    """Maxima over the columns of each of ``count`` groups."""
    order = np.argsort(column, kind="stable")
    starts = np.searchsorted(column[order], np.arange(count))
    result: Floats = np.maximum.reduceat(values[:, order], starts, axis=1).astype(np.float64)
    return result


def _variables(trace: Trace, roots: Indices) -> tuple[Indices, Floats]:
    pairs = [variable_of(root) for root in roots.tolist()]
    index = [
        -1 if trace.classes.is_pinned(root) else v for root, (v, _) in zip(roots.tolist(), pairs, strict=True)
    ]
    return np.array(index, dtype=np.int64), np.array([sign for _, sign in pairs])


def components(terms: Sequence[Term]) -> list[Component]:
    """Connected sets of terms, in the order of their first term."""
    owner: dict[int, int] = {}
    sets: dict[int, list[int]] = {}
    for number, term in enumerate(terms):
        merged = [number]
        touched = {owner[v] for v in term.index.tolist() if v in owner}
        for other in touched:
            merged += sets.pop(other)
        key = min(merged)
        sets[key] = sorted(merged)
        for member in sets[key]:
            for v in terms[member].index.tolist():
                if v >= 0:
                    owner[v] = key
    return [_component([terms[i] for i in members]) for _, members in sorted(sets.items())]


def _component(terms: Sequence[Term]) -> Component:
    variables = sorted({int(v) for term in terms for v in term.index if v >= 0})
    local = np.full(max(variables, default=0) + 2, -1, dtype=np.int64)
    local[np.array(variables, dtype=np.int64)] = np.arange(len(variables))
    renamed = tuple(
        replace(term, index=np.where(term.index >= 0, local[np.maximum(term.index, 0)], -1)) for term in terms
    )
    return Component(variables=tuple(variables), terms=renamed)
