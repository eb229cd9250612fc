"""The contract between user data and one input: batch axis, shape, type, finite values.

For an input of rank R, an array of rank R holds samples along axis 0, one of rank R - 1 is a single
sample without a batch axis, and one of rank R + 1 is a stack of batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxptq.calibrate.feeds.stored import UNKNOWN, StoredArray
from onnxptq.calibrate.feeds.wording import quote
from onnxptq.errors import FeedError
from onnxptq.types import Array, InputSpec, Sample

_NAMELESS = frozenset({"?", "-1", "None"})
"""Converters write these for every dimension of which they know nothing."""


def lead_input(inputs: Sequence[InputSpec]) -> InputSpec | None:
    """The input whose axis 0 is the batch: the first of the highest rank; None where all are scalars."""
    ranked = [spec for spec in inputs if spec.shape]
    return max(ranked, key=lambda spec: len(spec.shape)) if ranked else None


def fixed_batch(inputs: Sequence[InputSpec]) -> int:
    """Samples per forward pass: the lead input's first dimension where that is a fixed number, else 1."""
    lead = lead_input(inputs)
    first = lead.shape[0] if lead is not None else 1
    return first if isinstance(first, int) else 1


def may_be_batched(spec: InputSpec, lead: InputSpec | None) -> bool:
    """Whether the shapes allow ``spec`` to hold one row per sample."""
    if lead is None or not spec.shape:
        return False
    first, batch = spec.shape[0], lead.shape[0]
    return first == batch or not isinstance(first, int) or first == 1


def must_be_batched(spec: InputSpec, lead: InputSpec | None) -> bool:
    """Whether ``spec`` has the very batch dimension of the lead input."""
    return lead is not None and bool(spec.shape) and spec.shape[0] == lead.shape[0]


def count_rows(array: StoredArray, spec: InputSpec, where: str) -> int:
    """How many samples ``array`` holds if ``spec`` is batched.

    Raises:
        FeedError: the rank does not fit.
    """
    rank, shape = len(spec.shape), array.shape
    if len(shape) == rank - 1:
        return 1
    if len(shape) == rank:
        return shape[0] if rank else 1
    if len(shape) == rank + 1:
        return shape[0] * (shape[1] if rank else 1)
    raise _misfit(spec, shape, where)


def check_shape(array: StoredArray, spec: InputSpec, *, is_batched: bool, where: str) -> None:
    """Compare all dimensions that both sides fix.

    Raises:
        FeedError: naming both shapes.
    """
    wanted, shape = spec.shape, array.shape
    if len(shape) < len(wanted) or is_batched:
        wanted = wanted[1:]
    if not wanted:
        return
    found = shape[len(shape) - len(wanted) :]
    for want, have in zip(wanted, found, strict=True):
        if isinstance(want, int) and have not in (want, UNKNOWN):
            raise _misfit(spec, shape, where)


def check_type(found: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """Allow casts within a kind (float, integer, bool, text) only.

    Raises:
        FeedError: the kinds differ.
    """
    if found == spec.dtype or _kind(found) == _kind(spec.dtype):
        return
    if found == np.uint8 and _kind(spec.dtype) == "float":
        remedy = (
            "If these are pixels, state the preprocessing (scale, mean, std); "
            "else save the samples as the model's own float values."
        )
    else:
        remedy = f"Save the samples as {spec.dtype.name}."
    raise FeedError(f"{where}: input {spec.name!r} is {spec.dtype.name}, the data are {found.name}.", remedy)


def fit_values(values: Array, spec: InputSpec, where: str) -> Array:
    """``values`` as a C-contiguous array of the input's type, batch axis included.

    Raises:
        FeedError: shape or kind differ, an integer does not fit, or a value is not finite.
    """
    for want, have in zip(spec.shape[1:], values.shape[1:], strict=True):
        if isinstance(want, int) and want != have:
            raise _misfit(spec, values.shape, where)
    check_type(values.dtype, spec, where)
    kind = _kind(spec.dtype)
    if kind == "float" and not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise FeedError(
            f"{where}: input {spec.name!r} holds NaN or infinity ({bad} of {values.size} values).",
            "Remove or repair this sample.",
        )
    if kind == "integer" and values.size and spec.dtype != values.dtype:
        limits = np.iinfo(spec.dtype)
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise FeedError(
                f"{where}: input {spec.name!r} is {spec.dtype.name}, the data reach from {low} to {high}.",
                "Check the data, or export the model with a wider integer input.",
            )
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=spec.dtype).reshape(values.shape)
    if kind == "float" and cast.dtype.itemsize < values.dtype.itemsize and not np.isfinite(cast).all():
        raise FeedError(
            f"{where}: input {spec.name!r} is {spec.dtype.name}, the data reach {np.abs(values).max():g}.",
            "Scale the data to the range of the model's input type.",
        )
    return cast


def check_symbols(sample: Sample, inputs: Sequence[InputSpec], where: str) -> None:
    """Dimensions of one name must be of one size, within an input and across inputs.

    Raises:
        FeedError: naming the dimension and two inputs that disagree on it.
    """
    seen: dict[str, tuple[str, int]] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape, sample[spec.name].shape, strict=True):
            if not isinstance(dim, str) or dim in _NAMELESS:
                continue
            name, known = seen.setdefault(dim, (spec.name, size))
            if size != known:
                raise FeedError(
                    f"{where}: dimension {dim!r} is {known} in input {name!r} and {size} in input {spec.name!r}.",
                    "Give arrays that agree. If the model takes both sizes, its dimensions need different names.",
                )


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8")):
        return "float"
    return {"i": "integer", "u": "integer", "b": "bool", "U": "text", "S": "text", "O": "text"}.get(
        dtype.kind, dtype.name
    )


def _misfit(spec: InputSpec, found: Sequence[int], where: str) -> FeedError:
    wanted = spec.shape[1:]
    tail = list(found[len(found) - len(wanted) :]) if 0 < len(wanted) <= len(found) else []
    remedy = f"Every sample must have the shape that input {spec.name!r} declares."
    if len(wanted) == 3 and tail != list(wanted):
        moved = [tail[2], tail[0], tail[1]] if tail else []
        back = [tail[1], tail[2], tail[0]] if tail else []
        for order, text in ((moved, "(height, width, channels)"), (back, "(channels, height, width)")):
            if order and all(not isinstance(w, int) or w == o for w, o in zip(wanted, order, strict=True)):
                remedy = f"The data look like {text}; transpose them to the model's layout."
                break
    return FeedError(
        f"{where}: input {spec.name!r} expects shape {quote(spec.shape)}, found {quote(found)}.", remedy
    )
