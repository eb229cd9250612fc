"""How far factors may go through a Clip whose bounds do not scale.

With y = clip(x, A, B), A <= 0 <= B, and a channel that stays between its extremes l_c >= A and h_c <= B over
the samples seen, clip(x / s, A, B) = y / s holds for all of its values as long as nothing reaches a bound::

    s_c >= max(h_c / B, l_c / A)

The rescaled channel then saturates at B s_c instead of B: beyond what was seen, not within it, like every
quantizer whose range was calibrated, but per channel, and channels surprise more often than tensors do. So
h_c and -l_c are taken ``TAILS`` scales of their exponential tails further out and ``HEADROOM`` times larger;
a channel that would come to its bound so keeps s_c = 1, and s_c > 1, which would let values pass that the
Clip cut off, is left to no channel. Bounds of 0 and infinity scale, and set no limit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from onnxptq.equalize.noise import Floats
from onnxptq.equalize.observe import Spread
from onnxptq.equalize.tracing import Bounds, Trace
from onnxptq.graph.classes import variable_of

HEADROOM = 1.05
"""Factor on the extremes of a channel over the samples seen."""

TAILS = 4.0
"""How many scales of a channel's tail (:class:`onnxptq.equalize.observe.Spread`) are added to its extremes."""

Limits = Mapping[int, tuple[float, float]]
"""The least and the greatest ln s, by variable; a variable that is absent has none."""


def factor_limits(trace: Trace, spreads: Mapping[str, Spread]) -> Limits:
    """Limits of every variable that passes a Clip; (0, 0) where a channel reaches a bound or was not observed."""
    found: dict[int, tuple[float, float]] = defaultdict(lambda: (-math.inf, math.inf))
    for bounds in trace.bounds:
        spread = spreads.get(bounds.tensor)
        roots = (
            np.unique(trace.classes.roots(trace.labels[bounds.tensor])) if spread is None else spread.roots
        )
        least = np.zeros(roots.size) if spread is None else _least(spread, bounds)
        for root, log_s in zip(roots.tolist(), least.tolist(), strict=True):
            variable, sign = variable_of(root)
            ends = (log_s, 0.0)
            low, high = ends if sign > 0 else (-ends[1], -ends[0])
            known = found[variable]
            found[variable] = max(known[0], low), min(known[1], high)
    return found


def _least(spread: Spread, bounds: Bounds) -> Floats:
    """Least ln s per class; 0 for one that comes to a bound."""
    share = np.zeros(spread.roots.size)
    for extreme, tail, bound in (
        (spread.high, spread.tail_high, bounds.high),
        (-spread.low, spread.tail_low, -bounds.low),
    ):
        if 0 < bound < math.inf:
            share = np.maximum(share, HEADROOM * (extreme + TAILS * tail) / bound)
    result: Floats = np.log(np.clip(share, np.finfo(np.float64).tiny, 1.0))
    return result
