"""A calibration part and a held-out part that share no sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from onnxptq.calibrate.feeds.records import RecordFeeds, spread
from onnxptq.errors import FeedError
from onnxptq.types import Feeds, Sample


def split_holdout(feeds: Feeds, fraction: float = 0.2, maximum: int = 64) -> tuple[Feeds, Feeds | None]:
    """Hold out about ``fraction`` of the samples (at least one, at most ``maximum``), evenly spread.

    Every sample is decoded once, because samples with identical bytes must not lie on both sides:
    duplicates stay in the calibration part. If every sample has a twin, whole groups of twins are
    held out instead.

    Returns:
        Calibration feeds (at least one sample) and held-out feeds, both in the original order; None
        instead of the latter where fewer than two different samples exist or nothing was asked for.

    Raises:
        FeedError: the fraction is outside [0, 1), or a sample cannot be read.
    """
    if not 0 <= fraction < 1:
        raise FeedError(f"A held-out fraction of {fraction:g} is not in [0, 1).", "Give, for example, 0.2.")
    if fraction == 0 or maximum < 1:
        return feeds, None
    if isinstance(feeds, RecordFeeds):
        digests = [_digest(feeds.source.read(row)) for row in feeds.rows]
    else:
        digests = [_digest(sample) for sample in feeds]
    held = _choose(digests, fraction, maximum)
    kept = [position for position in range(len(digests)) if position not in held]
    if not held:
        return feeds, None
    return _part(feeds, kept, "held-out samples removed"), _part(feeds, sorted(held), "held out")


def _choose(digests: Sequence[bytes], fraction: float, maximum: int) -> frozenset[int]:
    groups: dict[bytes, list[int]] = {}
    for position, digest in enumerate(digests):
        groups.setdefault(digest, []).append(position)
    if len(groups) < 2:
        return frozenset()
    wanted = min(maximum, max(1, round(fraction * len(digests))))
    singles = [members for members in groups.values() if len(members) == 1]
    candidates = singles or list(groups.values())
    # One group must remain for calibration.
    most = min(wanted, len(candidates) - (len(candidates) == len(groups)))
    chosen: list[int] = []
    for index in spread(len(candidates), most):
        if chosen and len(chosen) + len(candidates[index]) > wanted:
            break
        chosen += candidates[index]
    return frozenset(chosen)


def _digest(sample: Sample) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(sample):
        values = sample[name]
        hasher.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        hasher.update(repr(values.tolist()).encode() if values.dtype.hasobject else values.tobytes())
    return hasher.digest()


def _part(feeds: Feeds, positions: Sequence[int], note: str) -> Feeds:
    if isinstance(feeds, RecordFeeds):
        return feeds.subset(positions, note)
    return _Subset(feeds, positions, note)


class _Subset:
    """Some samples of feeds that can only be iterated."""

    def __init__(self, feeds: Feeds, positions: Sequence[int], note: str) -> None:
        self._feeds = feeds
        self._positions = tuple(positions)
        self._note = note

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Sample]:
        wanted = set(self._positions)
        return (sample for position, sample in enumerate(self._feeds) if position in wanted)

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole feeds' fingerprint and the positions chosen."""
        return hashlib.sha256(f"{self._feeds.fingerprint} {self._positions}".encode()).hexdigest()

    @property
    def description(self) -> str:
        """The whole feeds' description with the part named."""
        return f"{len(self)} of {self._feeds.description}; {self._note}"
