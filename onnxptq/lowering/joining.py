"""Several samples in one pass: along the first axis, where the network treats that as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from onnxptq.lowering.network import Values
from onnxptq.lowering.output_loss import numbers_of
from onnxptq.runtime.session import RunError

_SAME = 1e-3
"""By how much, relative to the largest value, running samples together may change a result: summation order
changes the last digits, a mix-up of samples changes everything."""


def joined(parts: Sequence[Values], names: Sequence[str]) -> Values:
    """Values of several samples along the first axis."""
    if len(parts) == 1:
        return {name: parts[0][name] for name in names}
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def can_be_joined(run: Callable[[Values], Values], pair: Sequence[Values]) -> bool:
    """Whether running two samples together is the same as running them one after the other."""
    names = list(pair[0])
    if any(part[name].ndim == 0 for part in pair for name in names):
        return False
    try:
        apart = [run(part) for part in pair]
        at_once = run(joined(pair, names))
    except (RuntimeError, RunError):
        # Shapes that hold for one sample only, such as a Reshape to [1, 3, ...].
        return False
    for name, value in at_once.items():
        if any(part[name].ndim == 0 or not part[name].numel() for part in apart):
            # Of nothing, such as no detections, nothing can be told.
            return False
        if len({part[name].shape[1:] for part in apart}) > 1:
            return False
        expected = torch.cat([part[name] for part in apart])
        if expected.shape != value.shape or not _is_close(expected, value):
            return False
    return True


def _is_close(expected: torch.Tensor, value: torch.Tensor) -> bool:
    if not value.is_floating_point():
        return bool(torch.equal(expected, value))
    largest = float(numbers_of(expected).abs().max()) if expected.numel() else 0.0
    atol = _SAME * max(largest, 1e-30)
    return bool(torch.allclose(expected, value, rtol=0.0, atol=atol, equal_nan=True))
