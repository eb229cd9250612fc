"""Random inputs, made only on explicit request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxptq.calibrate.feeds.fit import lead_input, may_be_batched, must_be_batched
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.records import Record, RecordSet, build_set
from onnxptq.calibrate.feeds.wording import quote
from onnxptq.errors import FeedError
from onnxptq.types import Array, InputSpec

DEFAULT_COUNT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomArray:
    """Values drawn anew at each read from a generator seeded by ``key``, hence always the same."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    key: tuple[int, ...]

    def load(self) -> Array:
        """See :func:`harmless_values`."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.key)))
        return harmless_values(generator, self.shape, self.dtype)

    def read(self, start: int, stop: int) -> Array:
        """Rows of the same values."""
        return self.load()[start:stop]

    def contents(self) -> Iterator[bytes]:
        """The key tells all."""
        yield repr((self.key, self.shape)).encode()


def harmless_values(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Standard normal floats, bytes over their whole range, other integers and bools in {0, 1}."""
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind in "iub":
        # Integers are mostly indices; 0 and 1 are legal wherever there are two entries.
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def random_set(
    inputs: Sequence[InputSpec], preprocess: ImagePreprocess | None, count: int | None, seed: int
) -> RecordSet:
    """``count`` (32 by default) single samples of random values.

    Raises:
        FeedError: an input has open dimensions beside the batch, or holds neither numbers nor bools.
    """
    lead = lead_input(inputs)
    shapes = [_shape(spec, preprocess, is_batched=must_be_batched(spec, lead)) for spec in inputs]
    amount = DEFAULT_COUNT if count is None else count
    records = [
        Record(
            label=f"random sample {index}",
            arrays={
                spec.name: RandomArray(
                    shape=shape,
                    dtype=spec.dtype,
                    key=(seed, index if may_be_batched(spec, lead) else 0, place),
                )
                for place, (spec, shape) in enumerate(zip(inputs, shapes, strict=True))
            },
            names_samples=False,
        )
        for index in range(amount)
    ]
    return build_set(
        records,
        inputs,
        origin=f"RANDOM DATA (seed {seed}): ranges and quality numbers mean nothing for real inputs",
        settings=f"random {seed}",
        is_random=True,
    )


def _shape(spec: InputSpec, preprocess: ImagePreprocess | None, *, is_batched: bool) -> tuple[int, ...]:
    if spec.dtype.kind not in "fiub":
        raise FeedError(
            f"No random values can be made for input {spec.name!r} of type {spec.dtype.name}.", "Give data."
        )
    shape = [1 if is_batched and axis == 0 else dim for axis, dim in enumerate(spec.shape)]
    if shape and not isinstance(shape[0], int):
        shape[0] = 1
    if preprocess is not None and len(shape) == 4:
        layout, size = preprocess.resolve(spec).layout, preprocess.size
        rows = 1 if layout == "NHWC" else 2
        if size is not None:
            shape[rows : rows + 2] = [
                have if isinstance(have, int) else want
                for have, want in zip(shape[rows : rows + 2], size, strict=True)
            ]
        channels = 3 if layout == "NHWC" else 1
        if not isinstance(shape[channels], int):
            shape[channels] = preprocess.channels
    known = tuple(dim for dim in shape if isinstance(dim, int))
    if len(known) != len(shape):
        raise FeedError(
            f"Random data need fixed dimensions: input {spec.name!r} has shape {quote(spec.shape)}.",
            "Fix the open dimensions in the model, give preprocessing with a size, or give real data.",
        )
    return known
