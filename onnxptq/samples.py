"""Small subsets of feeds, chosen by content so that neither the order nor the number of passes matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from onnxptq.types import Feeds, Sample


def pick_samples(feeds: Feeds, count: int) -> Sequence[Sample]:
    """The first ``count`` samples of a :class:`Draw`; all of them if there are fewer."""
    (chosen,) = Draw(feeds).take((0, count))
    return chosen


class Draw:
    """The samples of ``feeds`` in the order of their content hashes, as a shuffled deck.

    ``order`` holds their positions in the feeds.
    """

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        keyed = sorted((_digest(sample), position) for position, sample in enumerate(feeds))
        self.order: Sequence[int] = [position for _, position in keyed]

    def take(self, *ranges: tuple[int, int]) -> list[Sequence[Sample]]:
        """For each (start, count), that many samples from that place of the deck on; it begins anew where it ends.

        One pass over the feeds serves all ranges.
        """
        total = len(self.order)
        wanted = [
            [self.order[(start + i) % total] for i in range(min(count, total))] for start, count in ranges
        ]
        chosen = {position for positions in wanted for position in positions}
        kept = {position: sample for position, sample in enumerate(self._feeds) if position in chosen}
        return [[kept[position] for position in positions] for positions in wanted]


def _digest(sample: Sample) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(sample):
        hasher.update(f"{name}\0{sample[name].dtype}\0{sample[name].shape}\0".encode())
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
