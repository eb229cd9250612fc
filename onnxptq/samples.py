"""Small subsets of feeds, chosen by content so that neither the order nor the number of passes matters."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from onnxptq.types import Feeds, Sample


def pick_samples(feeds: Feeds, count: int) -> Sequence[Sample]:
    """The ``count`` samples of smallest content hash, in the order of their hashes; all of them if fewer."""
    keyed = ((_digest(sample), position, sample) for position, sample in enumerate(feeds))
    return [sample for _, _, sample in heapq.nsmallest(count, keyed)]


def _digest(sample: Sample) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(sample):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(sample[name]).tobytes())
    return hasher.digest()


class ListFeeds:
    """Samples in memory, as feeds."""

    def __init__(self, samples: Sequence[Sample], description: str = "samples in memory") -> None:
        self._samples = samples
        self.description = description

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def fingerprint(self) -> str:
        """A hash of the contents."""
        return hashlib.sha256(b"".join(_digest(sample) for sample in self._samples)).hexdigest()
