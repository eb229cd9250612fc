"""Files and folders as records.

What a folder holds is told by its files: pictures, .npy, .npz, or input_*.pb. Hidden files and ground
truth beside the data (json, csv, txt, yaml, xml, md, and NumPy files called labels) are left out and
counted in the description.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxptq.calibrate.feeds import decode
from onnxptq.calibrate.feeds.names import LABEL_KEYS, folder_name, match_keys
from onnxptq.calibrate.feeds.npy import open_npy, open_npz
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.protobuf import open_tensor
from onnxptq.calibrate.feeds.records import Record
from onnxptq.calibrate.feeds.spool import Spool
from onnxptq.calibrate.feeds.stored import ImageFile, Shelf, StoredArray, with_preprocess
from onnxptq.calibrate.feeds.wording import FORMATS, first_line, listing
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

_ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
_INPUT_PB = re.compile(r"input_(\d+)\.pb")
_OUTPUT_PB = re.compile(r"output_\d+\.pb")
_HIDDEN = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


@dataclass(slots=True, kw_only=True)
class Reading:
    """What reading a source needs, and what there is to say about it afterwards."""

    inputs: Sequence[InputSpec]
    preprocess: ImagePreprocess | None
    spool: Spool
    notes: list[str] = field(default_factory=list)
    used_preprocess: ImagePreprocess | None = None
    """The resolved preprocessing, if any value went through it."""

    @property
    def single_input(self) -> InputSpec | None:
        """The model's only input, or None where it has several."""
        return self.inputs[0] if len(self.inputs) == 1 else None

    def record(self, arrays: Mapping[str, StoredArray], label: str, *, names_samples: bool = True) -> Record:
        """A record from the user's arrays: keys matched to inputs, pixels preprocessed."""
        keys, note = match_keys(arrays.keys(), self.inputs, label)
        self.notes.append(note)
        fitted: dict[str, StoredArray] = {}
        for spec in self.inputs:
            stored, is_pixels = with_preprocess(arrays[keys[spec.name]], spec, self.preprocess, label)
            if is_pixels and self.preprocess is not None:
                self.used_preprocess = self.preprocess.resolve(spec)
            fitted[spec.name] = stored
        return Record(label=label, arrays=fitted, names_samples=names_samples)


def open_path(path: Path, reading: Reading) -> tuple[list[Record], str]:
    """The records of a file or folder, in the order of their relative paths, and a few words on what it is.

    Raises:
        FeedError: missing, empty, of an unknown or mixed kind, damaged, or not matching the inputs.
    """
    try:
        if path.is_dir():
            return _open_folder(path, reading)
        if path.exists():
            return _open_file(path, reading)
    except OSError as error:
        raise FeedError(
            f"{path}: cannot be read: {first_line(error)}", "Check the path and its rights."
        ) from error
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"Did you mean {path.parent / near[0]}?" if near else f"Give {FORMATS}."
    raise FeedError(f"{path}: no such file or folder.", hint)


def _open_file(path: Path, reading: Reading) -> tuple[list[Record], str]:
    suffix, label = path.suffix.lower(), path.name
    if suffix == ".npz":
        arrays = open_npz(path, label, reading.spool)
        return [reading.record(arrays, label, names_samples=False)], label
    if suffix == ".npy":
        name = _require_single(reading, label).name
        return [reading.record({name: open_npy(path, label)}, label, names_samples=False)], label
    if suffix in decode.SUFFIXES:
        return _open_images(path.parent, [label], reading), label
    if suffix == ".pb":
        name = _require_single(reading, label).name
        return [reading.record({name: open_tensor(path, label)[0]}, label)], label
    raise FeedError(f"{path}: unknown kind of file {suffix or '(no suffix)'}.", f"Give {FORMATS}.")


def _require_single(reading: Reading, label: str) -> InputSpec:
    if reading.single_input is not None:
        return reading.single_input
    raise FeedError(
        f"{label}: one array cannot feed {len(reading.inputs)} inputs "
        f"({listing(spec.name for spec in reading.inputs)}).",
        "Give an .npz keyed by input name, or a folder with one sub-folder of .npy files per input.",
    )


def _open_folder(root: Path, reading: Reading) -> tuple[list[Record], str]:
    origin = f"folder {root.resolve().name}"
    names = _walk(root)
    if not names:
        raise FeedError(f"{root}: the folder is empty.", f"Give {FORMATS}.")
    kinds: dict[str, list[str]] = {"pictures": [], ".npy": [], ".npz": [], "input_*.pb": []}
    others: Counter[str] = Counter()
    for name in names:
        kind = _kind(Path(name))
        if kind in kinds:
            kinds[kind].append(name)
        elif kind != "output":
            others[kind] += 1
    present = {kind: members for kind, members in kinds.items() if members}
    if others:
        found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))
        if not present:
            raise FeedError(f"{root}: holds no usable data, only {found}.", f"Give {FORMATS}.")
        reading.notes.append(f"left out other files: {found}")
    if not present:
        raise FeedError(f"{root}: holds only model outputs (output_*.pb).", "Add the input_*.pb files.")
    if len(present) > 1:
        counts = " and ".join(f"{len(members)} {kind}" for kind, members in present.items())
        raise FeedError(f"{root}: holds {counts}.", "Keep one kind of data in the folder.")
    kind, members = next(iter(present.items()))
    openers = {
        "pictures": _open_images,
        ".npy": _open_npys,
        ".npz": _open_npzs,
        "input_*.pb": _open_test_sets,
    }
    return openers[kind](root, members, reading), origin


def _walk(root: Path) -> list[str]:
    """Relative POSIX paths of all files that are not hidden, sorted; links to folders are followed once."""
    seen: set[str] = set()
    found: list[str] = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = str(Path(folder).resolve())
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        found += [
            (Path(folder) / name).relative_to(root).as_posix() for name in files if not _is_hidden(name)
        ]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in decode.SUFFIXES:
        return "pictures"
    if suffix in _ARRAY_SUFFIXES:
        return f"{path.stem}{suffix}" if path.stem in LABEL_KEYS else suffix
    if _INPUT_PB.fullmatch(path.name):
        return "input_*.pb"
    return "output" if _OUTPUT_PB.fullmatch(path.name) else suffix


def _open_images(root: Path, names: Sequence[str], reading: Reading) -> list[Record]:
    spec = reading.single_input
    if spec is None:
        raise FeedError(
            f"{root}: pictures feed one input; the model has {len(reading.inputs)} "
            f"({listing(spec.name for spec in reading.inputs)}).",
            "Give .npz files keyed by input name, or a Python iterable of dicts.",
        )
    is_guessed = reading.preprocess is None
    preprocess = ImagePreprocess.guess(spec) if reading.preprocess is None else reading.preprocess
    resolved = preprocess.resolve(spec)
    if is_guessed:
        reading.notes.append(f"preprocessing was guessed from the shape of input {spec.name!r}")
    reading.used_preprocess = resolved
    shelf = Shelf()
    return [
        Record(
            label=name,
            arrays={
                spec.name: ImageFile(path=root / name, label=name, preprocess=resolved, shelf=shelf),
            },
        )
        for name in names
    ]


def _open_npzs(root: Path, names: Sequence[str], reading: Reading) -> list[Record]:
    return [reading.record(open_npz(root / name, name, reading.spool), name) for name in names]


def _open_npys(root: Path, names: Sequence[str], reading: Reading) -> list[Record]:
    """One .npy per sample; for several inputs, one sub-folder per input with the same file names in each."""
    single = reading.single_input
    if single is not None:
        return [reading.record({single.name: open_npy(root / name, name)}, name) for name in names]
    folders = {spec.name: _input_folder(root, spec.name) for spec in reading.inputs}
    members = {
        name: [path for path in names if path.startswith(f"{folder}/")] for name, folder in folders.items()
    }
    stems = {name: {path.split("/", 1)[1] for path in paths} for name, paths in members.items()}
    every = sorted(set().union(*stems.values()))
    for stem in every:
        for name, present in stems.items():
            if stem not in present:
                raise FeedError(
                    f"{root}: sample {stem!r} has no file {folders[name]}/{stem} for input {name!r}.",
                    "Every input's sub-folder must hold the same file names.",
                )
    unused = len(names) - sum(len(paths) for paths in members.values())
    if unused:
        reading.notes.append(f"left out {unused} .npy files outside the inputs' sub-folders")
    return [
        reading.record(
            {name: open_npy(root / folder / stem, f"{folder}/{stem}") for name, folder in folders.items()},
            stem,
        )
        for stem in every
    ]


def _input_folder(root: Path, input_name: str) -> str:
    for candidate in (input_name, folder_name(input_name)):
        if "/" not in candidate and (root / candidate).is_dir():
            return candidate
    beside = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(input_name, beside, n=1)
    raise FeedError(
        f"{root}: no sub-folder {folder_name(input_name)!r} for input {input_name!r}; "
        f"it holds {listing(beside) if beside else 'no sub-folders'}.",
        (f"Rename {near[0]!r}. " if near else "")
        + "Give one sub-folder of .npy files per input, or .npz files keyed by input name.",
    )


def _open_test_sets(root: Path, names: Sequence[str], reading: Reading) -> list[Record]:
    """Folders of input_k.pb, in numeric order of the folders. Tensors match by name, else by position."""
    sets: dict[str, dict[int, str]] = {}
    for name in names:
        match = _INPUT_PB.fullmatch(Path(name).name)
        if match:
            sets.setdefault(Path(name).parent.as_posix(), {})[int(match[1])] = name
    records = []
    for folder in sorted(sets, key=_numeric):
        label = root.name if folder == "." else folder
        members = sets[folder]
        if sorted(members) != list(range(len(reading.inputs))):
            raise FeedError(
                f"{label}: holds {listing(sorted(members.values()))}; "
                f"the model has {len(reading.inputs)} inputs.",
                f"Give input_0.pb to input_{len(reading.inputs) - 1}.pb, in the order of the model's inputs.",
            )
        tensors = [open_tensor(root / members[k], members[k]) for k in range(len(reading.inputs))]
        wanted = [spec.name for spec in reading.inputs]
        by_name = {name: tensor for tensor, name in tensors}
        if set(by_name) != set(wanted):
            by_name = {name: tensor for name, (tensor, _) in zip(wanted, tensors, strict=True)}
        records.append(reading.record(by_name, label))
    return records


def _numeric(path: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts set_2 before set_10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path))
