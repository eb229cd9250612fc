"""Feeds over records: what one file, folder or element of the user's data holds, cut into model inputs.

Axis 0 is the batch. Where the model leaves it open (or fixes it at 1) every yielded sample has batch 1,
however the data were batched; where the model fixes B > 1, consecutive single samples are grouped to B
and the last group is completed by repeating its last sample. Inputs without a batch axis are passed
whole.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxptq.calibrate.feeds.digests import digest
from onnxptq.calibrate.feeds.fit import (
    check_shape,
    check_symbols,
    check_type,
    count_rows,
    fit_values,
    fixed_batch,
    lead_input,
    may_be_batched,
    must_be_batched,
)
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.stored import StoredArray
from onnxptq.calibrate.feeds.wording import FORMATS
from onnxptq.errors import FeedError
from onnxptq.types import Array, InputSpec, Progress, Sample, started

_FORMAT_VERSION = "feeds 1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One or more samples that lie together.

    ``label`` names it in errors. Where ``names_samples`` it is also the identity of the samples (a
    relative path); else samples are numbered.
    """

    label: str
    arrays: Mapping[str, StoredArray]
    names_samples: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordSet:
    """All records of a source, checked against the inputs. A row is one single sample."""

    records: Sequence[Record]
    inputs: tuple[InputSpec, ...]
    batched: frozenset[str]
    """Inputs that hold one row per sample; the others are passed whole."""
    ends: Sequence[int]
    """Row number after the last row of each record."""
    batch: int
    origin: str
    notes: tuple[str, ...] = ()
    settings: str = ""
    """How the values are made from the records (preprocessing, seed), for the fingerprint."""
    preprocess: ImagePreprocess | None = None
    """What pixels went through, None where there were none."""
    is_random: bool = False
    """Whether the values are made up."""
    digests: dict[int, bytes] = field(default_factory=dict)
    row_digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.ends[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """Record that holds ``row``, and the row's place in it."""
        record = bisect.bisect_right(self.ends, row)
        return record, row - (self.ends[record - 1] if record else 0)

    def size(self, record: int) -> int:
        """Number of rows of a record."""
        return self.ends[record] - (self.ends[record - 1] if record else 0)

    def sample_id(self, row: int) -> str:
        """Relative path of the row's file, or ``sample 12``."""
        record, place = self.locate(row)
        if not self.records[record].names_samples:
            return f"sample {row}"
        label = self.records[record].label
        return label if self.size(record) == 1 else f"{label}[{place}]"

    def read(self, row: int) -> dict[str, Array]:
        """One single sample, fitted to every input.

        Raises:
            FeedError: it cannot be read or does not fit; names the sample and the input.
        """
        record, place = self.locate(row)
        where = self.place(row)
        sample = {
            spec.name: fit_values(self._read_input(record, place, spec), spec, where) for spec in self.inputs
        }
        check_symbols(sample, self.inputs, where)
        return sample

    def place(self, row: int) -> str:
        """Where a row comes from, for errors: its record, and its number there."""
        record, place = self.locate(row)
        label = self.records[record].label
        return f"{label}, sample {place}" if self.size(record) > 1 else label

    def digest(self, record: int) -> bytes:
        """sha256 of what a record is made of; read once."""
        if record not in self.digests:
            hasher = hashlib.sha256()
            for spec in self.inputs:
                array = self.records[record].arrays[spec.name]
                hasher.update(f"{spec.name}\0{array.dtype.str}\0{array.shape}\0".encode())
                for block in array.contents():
                    hasher.update(block)
            self.digests[record] = hasher.digest()
        return self.digests[record]

    def row_digest(self, row: int) -> bytes:
        """Digest of a single sample as ``read`` gives it; read once.

        Raises:
            FeedError: see ``read``.
        """
        if row not in self.row_digests:
            self.row_digests[row] = digest(self.read(row))
        return self.row_digests[row]

    def _read_input(self, record: int, place: int, spec: InputSpec) -> Array:
        array = self.records[record].arrays[spec.name]
        rank, found = len(spec.shape), len(array.shape)
        if found < rank:
            return array.load()[None]
        if spec.name not in self.batched:
            if found == rank:
                return array.load()
            index = place * array.shape[0] // self.size(record)
            only: Array = array.read(index, index + 1)[0]
            return only
        if found == rank:
            return array.read(place, place + 1)
        outer, inner = divmod(place, array.shape[1])
        stack: Array = array.read(outer, outer + 1)[0]
        return stack[inner : inner + 1]


def build_set(
    records: Sequence[Record],
    inputs: Sequence[InputSpec],
    *,
    origin: str,
    notes: Sequence[str] = (),
    settings: str = "",
    preprocess: ImagePreprocess | None = None,
    is_random: bool = False,
) -> RecordSet:
    """Decide what is batched, and check every shape and type that is known without reading.

    An input is batched if its first dimension is the lead input's; where it is another open dimension
    (or 1), it is batched if the data hold as many rows of it as samples, in every record.

    Raises:
        FeedError: no sample, or a record that does not fit.
    """
    lead = lead_input(inputs)
    counts = [_count(record, inputs, lead) for record in records]
    batched = {spec.name for spec in inputs if may_be_batched(spec, lead)}
    for record, count in zip(records, counts, strict=True):
        for spec in inputs:
            if spec.name not in batched:
                continue
            found = count_rows(record.arrays[spec.name], spec, record.label)
            if found == count:
                continue
            if lead is not None and must_be_batched(spec, lead):
                raise FeedError(
                    f"{record.label}: input {spec.name!r} holds {found} samples, "
                    f"input {lead.name!r} holds {count}.",
                    "All inputs must hold the same number of samples.",
                )
            batched.discard(spec.name)
    for record, count in zip(records, counts, strict=True):
        _check(record, inputs, frozenset(batched), count, lead)
    ends = list(itertools.accumulate(counts))
    if not ends or ends[-1] == 0:
        raise FeedError(f"{origin} holds no samples.", f"Give {FORMATS}.")
    return RecordSet(
        records=records,
        inputs=tuple(inputs),
        batched=frozenset(batched),
        ends=ends,
        batch=fixed_batch(inputs),
        origin=origin,
        notes=tuple(dict.fromkeys(note for note in notes if note)),
        settings=settings,
        preprocess=preprocess,
        is_random=is_random,
    )


def _count(record: Record, inputs: Sequence[InputSpec], lead: InputSpec | None) -> int:
    if lead is not None:
        return count_rows(record.arrays[lead.name], lead, record.label)
    return max(count_rows(record.arrays[spec.name], spec, record.label) for spec in inputs)


def _check(
    record: Record, inputs: Sequence[InputSpec], batched: frozenset[str], count: int, lead: InputSpec | None
) -> None:
    stacks = {1, count} | ({record.arrays[lead.name].shape[0]} if lead is not None and count else set())
    for spec in inputs:
        array = record.arrays[spec.name]
        count_rows(array, spec, record.label)
        check_type(array.dtype, spec, record.label)
        check_shape(array, spec, is_batched=spec.name in batched, where=record.label)
        is_stack = spec.name not in batched and len(array.shape) > len(spec.shape)
        if is_stack and array.shape[0] not in stacks:
            raise FeedError(
                f"{record.label}: input {spec.name!r} holds {array.shape[0]} values for {count} samples.",
                "Give one value per sample, or one for all.",
            )


class RecordFeeds:
    """The feeds that onnxptq makes: chosen rows of a RecordSet, in order, decoded while iterating."""

    def __init__(self, source: RecordSet, rows: Sequence[int] | None = None, note: str = "") -> None:
        self.source = source
        self.rows: Sequence[int] = range(source.total) if rows is None else tuple(rows)
        self._note = note
        self._fingerprint = ""
        self._digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.source.batch)

    def __iter__(self) -> Iterator[Sample]:
        for chunk in self._chunks():
            yield self._sample(chunk)

    def pick(self, positions: Iterable[int]) -> Iterator[Sample]:
        """Some of the samples, the others unread."""
        chunks = list(self._chunks())
        for position in positions:
            yield self._sample(chunks[position])

    def place(self, position: int) -> str:
        """Where a sample comes from, for errors: the source, its file, and its number there."""
        chunk = next(itertools.islice(self._chunks(), position, None))
        first = self.source.place(chunk[0])
        origin = self.source.origin
        where = first if first.startswith(origin) else f"{origin}, {first}"
        return where if len(chunk) == 1 else f"{where}, in a batch of {len(chunk)}"

    def row_digests(self, progress: Progress | None = None) -> Sequence[bytes]:
        """Digest of each single sample of ``rows``; each is read once for all feeds over its source."""
        is_known = self.source.row_digests.keys() >= set(self.rows)
        tick = started(progress, "read samples", 0 if is_known else len(self.rows))
        found = []
        for row in self.rows:
            found.append(self.source.row_digest(row))
            tick()
        return found

    def sample_digests(self, progress: Progress | None = None) -> Sequence[bytes]:
        """Digest of each sample that iteration yields; read once."""
        if self.source.batch == 1:
            return self.row_digests(progress)
        if not self._digests:
            self._digests = [digest(sample) for sample in self]
        return self._digests

    @property
    def sample_ids(self) -> Sequence[str]:
        """Identity of each single sample; one that is repeated to fill the last batch counts again."""
        return [self.source.sample_id(row) for row in self.sample_rows]

    @property
    def sample_rows(self) -> Sequence[int]:
        """Place of each single sample of ``sample_ids`` in the whole source."""
        return [row for chunk in self._chunks() for row in chunk]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over contents, order, batching and preprocessing, but no path. Read at first use."""
        if not self._fingerprint:
            source = self.source
            hasher = hashlib.sha256()
            specs = [[spec.name, spec.dtype.str, [str(dim) for dim in spec.shape]] for spec in source.inputs]
            hasher.update(
                json.dumps([_FORMAT_VERSION, specs, sorted(source.batched), source.settings]).encode()
            )
            for row in self.rows:
                record, place = source.locate(row)
                hasher.update(source.digest(record) + place.to_bytes(8, "little"))
            self._fingerprint = hasher.hexdigest()
        return self._fingerprint

    @property
    def description(self) -> str:
        """One line: how many samples, from where, and everything that was done to them."""
        total, batch = self.source.total, self.source.batch
        count = f"{len(self.rows)} sample{'s' * (len(self.rows) != 1)}"
        if len(self.rows) != total:
            count += f" of {total}"
        parts = [f"{count} from {self.source.origin}"]
        if self._note:
            parts.append(self._note)
        if batch > 1:
            repeats = len(self) * batch - len(self.rows)
            parts.append(f"grouped to the model's fixed batch of {batch}")
            if repeats:
                parts.append(f"the last sample is repeated {repeats}x to complete the last batch")
        return "; ".join([*parts, *self.source.notes])

    def subset(self, positions: Sequence[int], note: str = "") -> RecordFeeds:
        """Feeds over some of the single samples, given by their places in ``rows``."""
        notes = "; ".join(text for text in (self._note, note) if text)
        return RecordFeeds(self.source, [self.rows[position] for position in positions], notes)

    def _chunks(self) -> Iterator[Sequence[int]]:
        batch = self.source.batch
        for start in range(0, len(self.rows), batch):
            chunk = list(self.rows[start : start + batch])
            yield chunk + chunk[-1:] * (batch - len(chunk))

    def _sample(self, chunk: Sequence[int]) -> Sample:
        singles = [self.source.read(row) for row in chunk]
        if len(chunk) == 1:
            return singles[0]
        feed: dict[str, Array] = {}
        for spec in self.source.inputs:
            values = [single[spec.name] for single in singles]
            first = values[0]
            is_batched = spec.name in self.source.batched
            if any(value.shape != first.shape for value in values) or not (
                is_batched or all(value.tobytes() == first.tobytes() for value in values)
            ):
                what = "shape" if is_batched else "value"
                raise FeedError(
                    f"{self.source.sample_id(chunk[0])}: input {spec.name!r} differs in {what} between "
                    f"samples that share a batch of {len(chunk)}.",
                    "Export the model with batch 1 or an open batch, or make the samples agree.",
                )
            feed[spec.name] = np.concatenate(values) if is_batched else first
        return feed


def spread(total: int, count: int) -> Sequence[int]:
    """``count`` of ``range(total)`` at equal distances, centred; all of them where there are no more."""
    if count >= total:
        return range(total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
