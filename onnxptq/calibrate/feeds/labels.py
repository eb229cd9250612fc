"""Ground truth for feeds: one class index per single sample."""

from __future__ import annotations

import csv
import difflib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxptq.calibrate.feeds.names import LABEL_KEYS
from onnxptq.calibrate.feeds.npy import open_npy
from onnxptq.calibrate.feeds.records import RecordFeeds
from onnxptq.calibrate.feeds.wording import first_line, listing
from onnxptq.errors import FeedError
from onnxptq.types import Feeds

FOLDERS = "folders"
_FORMATS = (
    'a JSON object {"path": class} or list, a CSV or TXT file of "path,label" lines, a .npy, or a .npz with '
    "key 'labels'; or 'folders' for pictures in class folders"
)
Labels = npt.NDArray[np.int64]


def read_labels(source: str | Path | Sequence[int] | npt.NDArray[Any] | None, feeds: Feeds) -> Labels | None:
    """Class indices aligned with the rows of the model's output over ``feeds``.

    Args:
        source: a file (see the error text for the kinds; paths may be relative to the data or bare file
            names, and a JSON object may be split into named parts); "folders" takes the first folder of
            each sample's path, classes numbered in sorted order; a sequence; or None.
        feeds: the samples. A list or array of labels counts all samples of the source, also where
            ``feeds`` is a part of it.

    Returns:
        int64 of shape (samples,), a sample that was repeated to fill a batch counted again; None for None.

    Raises:
        FeedError: unreadable, of the wrong length, or without a label for some sample.
    """
    if source is None:
        return None
    if isinstance(source, str) and source == FOLDERS:
        return _from_folders(feeds)
    if not isinstance(source, str | Path):
        return _by_position(np.asarray(source), feeds, "labels")
    path = Path(source)
    found = _read_file(path)
    if isinstance(found, Mapping):
        return _by_name(found, feeds, path.name)
    return _by_position(found, feeds, path.name)


def label_origin(source: object, feeds: Feeds) -> Callable[[int], str]:
    """How errors name a label that ``read_labels`` gave, by its place among them: its source and its sample."""
    where = Path(source).name if isinstance(source, str | Path) else "labels"

    def name(row: int) -> str:
        sample = feeds.sample_ids[row] if isinstance(feeds, RecordFeeds) else f"sample {row}"
        return f"{where}, {sample}"

    return name


def _from_folders(feeds: Feeds) -> Labels:
    if not isinstance(feeds, RecordFeeds):
        raise FeedError("Labels from folders need samples that are files.", f"Give {_FORMATS}.")
    every = [feeds.source.sample_id(row) for row in range(feeds.source.total)]
    for name in every:
        if "/" not in name:
            raise FeedError(f"{name}: lies in no class folder, so it has no label.", f"Give {_FORMATS}.")
    classes = {name: index for index, name in enumerate(sorted({name.split("/", 1)[0] for name in every}))}
    return np.array([classes[name.split("/", 1)[0]] for name in feeds.sample_ids], np.int64)


def _by_position(values: npt.NDArray[Any], feeds: Feeds, where: str) -> Labels:
    rows = feeds.sample_rows if isinstance(feeds, RecordFeeds) else range(len(feeds))
    total = feeds.source.total if isinstance(feeds, RecordFeeds) else len(feeds)
    flat = values.reshape(-1) if values.ndim == 2 and values.shape[1] == 1 else values
    if flat.ndim != 1 or len(flat) != total:
        raise FeedError(
            f"{where}: holds labels of shape {values.shape}; the data hold {total} samples.",
            "Give one label per sample.",
        )
    return np.array([_as_class(flat[row], f"{where}, sample {row}") for row in rows], np.int64)


def _by_name(table: Mapping[str, int], feeds: Feeds, where: str) -> Labels:
    by_file: dict[str, set[int]] = {}
    for key, value in table.items():
        by_file.setdefault(key.rsplit("/", 1)[-1], set()).add(value)
    names = feeds.sample_ids if isinstance(feeds, RecordFeeds) else [f"sample {i}" for i in range(len(feeds))]
    labels = []
    for name in names:
        label: int | None = table.get(name)
        if label is None:
            candidates = by_file.get(name.rsplit("/", 1)[-1], set())
            if len(candidates) > 1:
                raise FeedError(
                    f"{where}: the file name of {name!r} stands for several labels.",
                    "Give labels by the path relative to the data folder.",
                )
            label = next(iter(candidates), None)
        if label is None:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"The nearest entry is {near[0]!r}. " if near else ""
            raise FeedError(
                f"{where}: no label for {name!r}.",
                f"{hint}Entries are paths relative to the data, or file names.",
            )
        labels.append(label)
    return np.array(labels, np.int64)


def _read_file(path: Path) -> Mapping[str, int] | npt.NDArray[Any]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return _from_json(json.loads(path.read_text(encoding="utf-8")), path.name)
        if suffix in (".csv", ".txt", ".tsv"):
            return _from_lines(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise FeedError(
            f"{path}: cannot be read as labels: {first_line(error)}", f"Give {_FORMATS}."
        ) from error
    if suffix == ".npy":
        return open_npy(path, path.name).load()
    if suffix == ".npz":
        return _from_npz(path)
    raise FeedError(f"{path}: unknown kind of label file.", f"Give {_FORMATS}.")


def _from_npz(path: Path) -> npt.NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = next((key for key in LABEL_KEYS if key in archive.files), None)
            if key is None:
                raise FeedError(
                    f"{path}: has no key 'labels', only {listing(archive.files)}.", f"Give {_FORMATS}."
                )
            values: npt.NDArray[Any] = archive[key]
            return values
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FeedError(
            f"{path}: cannot be read as labels: {first_line(error)}", f"Give {_FORMATS}."
        ) from error


def _from_json(content: Any, where: str) -> Mapping[str, int] | npt.NDArray[Any]:
    if isinstance(content, list):
        return np.array(
            [_as_class(value, f"{where}, entry {i}") for i, value in enumerate(content)], np.int64
        )
    if not isinstance(content, dict):
        raise FeedError(f"{where}: holds neither an object nor a list.", f"Give {_FORMATS}.")
    return dict(_flat(content, where, ""))


def _flat(content: Mapping[str, Any], where: str, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, where, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", _as_class(value, f"{where}, entry {key!r}")


def _from_lines(path: Path) -> Mapping[str, int] | npt.NDArray[Any]:
    """``path,label`` or ``path label`` lines, or labels alone; a first line without a number is a header."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    table: dict[str, int] = {}
    alone: list[int] = []
    for number, line in enumerate(lines):
        if "," in line:
            name, text = (cell.strip() for cell in next(csv.reader([line]))[:2])
        elif len(parts := line.rsplit(None, 1)) == 2:
            name, text = parts
        else:
            name, text = "", line
        try:
            label = int(text)
        except ValueError:
            if number == 0:
                continue
            raise FeedError(
                f"{path.name}, line {number + 1}: {text!r} is no class index.", f"Give {_FORMATS}."
            ) from None
        if name:
            table[name] = label
        else:
            alone.append(label)
    if table and alone:
        raise FeedError(f"{path.name}: only some lines name a sample.", f"Give {_FORMATS}.")
    return np.array(alone, np.int64) if alone else table


def _as_class(value: Any, where: str) -> int:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | str) or value is None or value != int(value):
        raise FeedError(f"{where}: {value!r} is no class index.", "Labels are whole numbers.")
    return int(value)
