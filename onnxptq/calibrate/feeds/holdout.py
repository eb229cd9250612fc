"""Calibration samples and held-out samples that have none in common, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from onnxptq.calibrate.feeds.digests import digest
from onnxptq.calibrate.feeds.records import RecordFeeds, spread
from onnxptq.errors import FeedError
from onnxptq.types import Feeds, Progress, Sample


def split_holdout(
    feeds: Feeds, fraction: float = 0.2, maximum: int = 64, progress: Progress | None = None
) -> tuple[Feeds, Feeds | None]:
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
    digests = _digests(feeds, progress)
    held = _choose(digests, fraction, maximum)
    kept = [position for position in range(len(digests)) if position not in held]
    if not held:
        return feeds, None
    return _part(feeds, kept, "held-out samples removed"), _part(feeds, sorted(held), "held out")


def without_shared(
    evaluation: RecordFeeds, calibration: Feeds, progress: Progress | None = None
) -> tuple[RecordFeeds | None, int]:
    """``evaluation`` without the samples that ``calibration`` holds as well, and how many these are.

    Returns:
        The very feeds where none is shared, None where all are.

    Raises:
        FeedError: a sample cannot be read.
    """
    known = frozenset(_digests(calibration, progress))
    digests = evaluation.row_digests(progress)
    kept = [position for position, own in enumerate(digests) if own not in known]
    shared = len(digests) - len(kept)
    if not shared:
        return evaluation, 0
    return (evaluation.subset(kept, "calibration samples left out") if kept else None), shared


def _digests(feeds: Feeds, progress: Progress | None) -> Sequence[bytes]:
    """One digest per single sample."""
    if isinstance(feeds, RecordFeeds):
        return feeds.row_digests(progress)
    return [digest(sample) for sample in feeds]


def _choose(digests: Sequence[bytes], fraction: float, maximum: int) -> frozenset[int]:
    groups: dict[bytes, list[int]] = {}
    for position, own in enumerate(digests):
        groups.setdefault(own, []).append(position)
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
