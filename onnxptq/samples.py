"""Small subsets of feeds, chosen by content so that neither the order nor the number of passes matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from onnxptq.calibrate.feeds import RecordFeeds, digest
from onnxptq.types import Feeds, Progress, Sample


def pick_samples(feeds: Feeds, count: int) -> Sequence[Sample]:
    """The first ``count`` samples of a :class:`Draw`; all of them if there are fewer."""
    (chosen,) = Draw(feeds).take((0, count))
    return chosen


class Draw:
    """The samples of ``feeds`` in the order of their content hashes, as a shuffled deck.

    ``order`` holds their positions in the feeds.
    """

    def __init__(self, feeds: Feeds, progress: Progress | None = None) -> None:
        self._feeds = feeds
        digests = (
            feeds.sample_digests(progress)
            if isinstance(feeds, RecordFeeds)
            else [digest(sample) for sample in feeds]
        )
        keyed = sorted((own, position) for position, own in enumerate(digests))
        self.order: Sequence[int] = [position for _, position in keyed]

    def take(self, *ranges: tuple[int, int]) -> list[Sequence[Sample]]:
        """For each (start, count), that many samples from that place of the deck on; it begins anew where it ends.

        One pass serves all ranges.
        """
        total = len(self.order)
        wanted = [
            [self.order[(start + i) % total] for i in range(min(count, total))] for start, count in ranges
        ]
        chosen = sorted({position for positions in wanted for position in positions})
        if isinstance(self._feeds, RecordFeeds):
            kept = dict(zip(chosen, self._feeds.pick(chosen), strict=True))
        else:
            kept = {position: sample for position, sample in enumerate(self._feeds) if position in chosen}
        return [[kept[position] for position in positions] for positions in wanted]


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
        return hashlib.sha256(b"".join(digest(sample) for sample in self._samples)).hexdigest()
