"""Python objects as records: arrays, dicts, iterables, onnxruntime data readers, torch loaders.

Tensors and readers are told by what they can do, so neither torch nor onnxruntime is imported. Lists
and arrays are used where they are; anything else is read once, from start to end, into a spool,
because a second pass over a generator is empty and one over a shuffling loader is another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxptq.calibrate.feeds.folders import Reading
from onnxptq.calibrate.feeds.records import Record
from onnxptq.calibrate.feeds.stored import MemoryArray, StoredArray
from onnxptq.calibrate.feeds.wording import first_line, listing
from onnxptq.errors import FeedError
from onnxptq.types import Array

_ACCEPTED = (
    "Give dicts keyed by input name, arrays or tensors (one input), "
    "or tuples in the order of the model's inputs."
)


def open_object(source: object, reading: Reading) -> tuple[list[Record], str]:
    """The records of a Python object, in its own order, and a few words on what it is.

    Raises:
        FeedError: not iterable, empty, an element of a wrong kind, or an exception of the user's own
            code (kept as the cause).
    """
    if isinstance(source, Mapping) or _is_array(source):
        arrays = {
            name: MemoryArray(_to_array(value, "the data"))
            for name, value in _named(source, reading, "the data")
        }
        return [reading.record(arrays, "the data", names_samples=False)], "arrays in memory"
    is_in_memory = isinstance(source, list | tuple)
    title = "a Python list" if is_in_memory else type(source).__name__
    records = []
    for index, element in enumerate(_elements(source, title)):
        label = f"element {index} of {title}"
        arrays_of_element: dict[str, StoredArray] = {}
        for name, value in _named(element, reading, label):
            values = _to_array(value, label)
            arrays_of_element[name] = MemoryArray(values) if is_in_memory else reading.spool.append(values)
        records.append(reading.record(arrays_of_element, label, names_samples=False))
    if not records:
        raise FeedError(
            f"{title} yielded no samples.",
            "If it is a generator, it may have been read before: make a new one.",
        )
    return records, title


def _elements(source: object, title: str) -> Iterator[object]:
    iterator = _iterator(source, title)
    index = 0
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except FeedError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise FeedError(
                f"{title} raised {type(error).__name__} at element {index}: {first_line(error)}",
                "Fix the data source; it must yield every sample once and then end.",
            ) from error
        yield element
        index += 1


def _iterator(source: Any, title: str) -> Iterator[object]:
    if callable(getattr(source, "get_next", None)):
        return _read_reader(source)
    if isinstance(source, Iterable):
        return iter(source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[index] for index in range(len(source)))
    raise FeedError(f"{title} is no data source that can be read.", _ACCEPTED)


def _read_reader(reader: Any) -> Iterator[object]:
    """All samples of an onnxruntime CalibrationDataReader, which is rewound before and after if it can be."""
    rewind = getattr(reader, "rewind", None)
    if callable(rewind):
        rewind()
    while True:
        try:
            sample = reader.get_next()
        except StopIteration:
            # Not the protocol (None is), but readers around a plain iterator do it.
            break
        if sample is None:
            break
        yield sample
    if callable(rewind):
        rewind()


def _named(element: object, reading: Reading, label: str) -> list[tuple[str, object]]:
    """The user's values by name; those of tuples are named after the inputs, by position."""
    names = [spec.name for spec in reading.inputs]
    if isinstance(element, Mapping):
        wanted = [key for key in element if key in names]
        if len(wanted) < len(names):
            return [(str(key), value) for key, value in element.items()]
        # Other keys may hold anything (file names, metadata), so they are not even converted.
        others = sorted(str(key) for key in element if key not in names)
        reading.notes.append(f"ignored {listing(others)}" if others else "")
        return [(key, element[key]) for key in wanted]
    if _is_array(element):
        values: Sequence[object] = (element,)
    elif isinstance(element, tuple | list):
        values = element
        if values and isinstance(values[0], Mapping):
            reading.notes.append(_dropped(len(values) - 1))
            return _named(values[0], reading, label)
    else:
        raise FeedError(f"{label} is a {type(element).__name__}, not a sample.", _ACCEPTED)
    if len(values) < len(names):
        raise FeedError(
            f"{label} holds {len(values)} array(s); the model has {len(names)} inputs.", _ACCEPTED
        )
    if len(values) > len(names):
        reading.notes.append(_dropped(len(values) - len(names)))
    return list(zip(names, values, strict=False))


def _dropped(count: int) -> str:
    return f"dropped the last {count} element(s) of every tuple as labels" if count else ""


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray | np.generic) or callable(getattr(value, "detach", None))


def _to_array(value: Any, label: str) -> Array:
    """A NumPy array from an array, a tensor, a number or nested numbers."""
    try:
        if callable(getattr(value, "detach", None)):
            return np.asarray(value.detach().cpu().numpy())
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeedError(f"{label} holds a value that is no array: {first_line(error)}", _ACCEPTED) from error
    if array.dtype.kind == "O" and not all(isinstance(item, str) for item in array.ravel()):
        raise FeedError(f"{label} holds a {type(value).__name__} where an array was expected.", _ACCEPTED)
    return array
