"""The batching contract: however the data are cut, the samples are the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxptq.calibrate.feeds import open_feeds
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

Arrays = dict[str, np.ndarray[Any, Any]]
SAVEZ: Any = np.savez
SAVEZ_COMPRESSED: Any = np.savez_compressed
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


def spec(name: str, *shape: int | str | None, dtype: np.dtype[Any] = F32) -> InputSpec:
    return InputSpec(name=name, dtype=dtype, shape=shape)


def cut(data: Arrays, sizes: Sequence[int]) -> list[Arrays]:
    parts, start = [], 0
    for size in sizes:
        parts.append({name: values[start : start + size] for name, values in data.items()})
        start += size
    return parts


def one_npz(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    SAVEZ(folder / "all.npz", **data)
    return folder / "all.npz"


def one_compressed_npz(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    SAVEZ_COMPRESSED(folder / "all.npz", **data)
    return str(folder / "all.npz")


def fortran_npz(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    SAVEZ(folder / "all.npz", **{name: np.asfortranarray(values) for name, values in data.items()})
    return folder / "all.npz"


def big_endian_npz(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    swapped = {name: values.astype(values.dtype.newbyteorder(">")) for name, values in data.items()}
    SAVEZ(folder / "all.npz", **swapped)
    return folder / "all.npz"


def npz_per_batch(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    for i, part in enumerate(cut(data, sizes)):
        SAVEZ(folder / f"{i:03d}.npz", **part)
    return folder


def npz_per_sample(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    for i in range(sum(sizes)):
        SAVEZ_COMPRESSED(folder / f"{i:03d}.npz", **{name: values[i] for name, values in data.items()})
    return folder


def npy_per_input(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    for name, values in data.items():
        (folder / name).mkdir()
        for i, value in enumerate(values):
            np.save(folder / name / f"{i:03d}.npy", value)
    return folder


def test_sets(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    for i, part in enumerate(cut(data, sizes)):
        (folder / f"test_data_set_{i}").mkdir()
        for k, values in enumerate(part.values()):
            tensor = numpy_helper.from_array(values)
            (folder / f"test_data_set_{i}" / f"input_{k}.pb").write_bytes(tensor.SerializeToString())
    return folder


# Not a test, though its name follows the folders'.
test_sets.__test__ = False  # type: ignore[attr-defined]


def in_memory(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    return data


def list_of_batches(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    return cut(data, sizes)


def list_of_singles(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    return [{name: values[i] for name, values in data.items()} for i in range(sum(sizes))]


def generator_of_tuples(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    def generate() -> Iterator[object]:
        for part in cut(data, sizes):
            yield tuple(part.values())

    return generate()


def stack_of_batches(data: Arrays, sizes: Sequence[int], folder: Path) -> object:
    return {name: values[:, None] for name, values in data.items()}


SOURCES: list[Callable[[Arrays, Sequence[int], Path], object]] = [
    one_npz,
    one_compressed_npz,
    fortran_npz,
    big_endian_npz,
    npz_per_batch,
    npz_per_sample,
    npy_per_input,
    test_sets,
    in_memory,
    list_of_batches,
    list_of_singles,
    generator_of_tuples,
    stack_of_batches,
]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), batch=st.integers(1, 4), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "fixed"])
def test_every_cut_gives_the_same_samples(
    make: Callable[[Arrays, Sequence[int], Path], object],
    is_open: bool,
    sizes: list[int],
    batch: int,
    seed: int,
) -> None:
    count = sum(sizes)
    rng = np.random.default_rng(seed)
    data: Arrays = {
        "x": rng.standard_normal((count, 2, 3)).astype(np.float32),
        "ids": rng.integers(0, 9, (count, 4)),
    }
    first = "b" if is_open else batch
    inputs = [spec("x", first, 2, "w"), spec("ids", first, 4, dtype=I64)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        feeds = open_feeds(make(data, sizes, folder), inputs, spool_dir=Path(name) / "spool")
        found = [dict(sample) for sample in feeds]
        again = [dict(sample) for sample in feeds]

    group = 1 if is_open else batch
    rows = list(range(count)) + [count - 1] * (-count % group)
    expected = [{n: v[rows[i : i + group]] for n, v in data.items()} for i in range(0, len(rows), group)]
    assert len(feeds) == len(found) == len(expected)
    for got, more, want in zip(found, again, expected, strict=True):
        assert list(got) == ["x", "ids"]
        for key, values in want.items():
            assert got[key].dtype == values.dtype
            assert got[key].dtype.isnative
            assert got[key].shape == values.shape
            assert got[key].tobytes() == values.tobytes() == more[key].tobytes()


def test_completing_the_last_batch_is_said(tmp_path: Path) -> None:
    feeds = open_feeds(np.zeros((5, 2), np.float32), [spec("x", 4, 2)], spool_dir=tmp_path)
    assert len(feeds) == 2
    assert "fixed batch of 4" in feeds.description
    assert "repeated 3x" in feeds.description
    assert list(feeds.sample_ids) == [f"sample {i}" for i in (0, 1, 2, 3, 4, 4, 4, 4)]


class TestInputsWithoutBatch:
    def test_scalars_and_fixed_first_dimensions_are_passed_whole(self, tmp_path: Path) -> None:
        inputs = [spec("x", "b", 2), spec("scale"), spec("anchors", 7, 2)]
        data = {
            "x": np.arange(6, dtype=np.float32).reshape(3, 2),
            "scale": np.float32(2.5),
            "anchors": np.ones((7, 2), np.float32),
        }
        found = list(open_feeds(data, inputs, spool_dir=tmp_path))
        assert [sample["x"].shape for sample in found] == [(1, 2)] * 3
        assert all(sample["scale"].shape == () and sample["scale"] == 2.5 for sample in found)
        assert all(sample["anchors"].shape == (7, 2) for sample in found)

    def test_one_value_per_sample_for_whole_inputs(self, tmp_path: Path) -> None:
        inputs = [spec("x", "b", 2), spec("scale"), spec("anchors", 7, 2)]
        rng = np.random.default_rng(0)
        data = {
            name: rng.random(shape, np.float32)
            for name, shape in (("x", (3, 2)), ("scale", (3,)), ("anchors", (3, 7, 2)))
        }
        for i, sample in enumerate(open_feeds(data, inputs, spool_dir=tmp_path)):
            assert sample["scale"] == data["scale"][i]
            np.testing.assert_array_equal(sample["anchors"], data["anchors"][i])

    def test_another_open_dimension_is_told_by_the_data(self, tmp_path: Path) -> None:
        inputs = [spec("image", "b", 3, 4, 4), spec("boxes", "n", 4)]
        per_sample = [
            {"image": np.zeros((2, 3, 4, 4), np.float32), "boxes": np.zeros((2, 4), np.float32)}
        ] * 2
        assert [s["boxes"].shape for s in open_feeds(per_sample, inputs, spool_dir=tmp_path)] == [(1, 4)] * 4
        free = [
            {"image": np.zeros((1, 3, 4, 4), np.float32), "boxes": np.zeros((n, 4), np.float32)}
            for n in (1, 5, 0)
        ]
        assert [s["boxes"].shape[0] for s in open_feeds(free, inputs, spool_dir=tmp_path)] == [1, 5, 0]

    def test_a_broadcast_input_of_one_row_is_passed_whole(self, tmp_path: Path) -> None:
        inputs = [spec("x", "b", 2, 2), spec("positions", 1, 2)]
        data = {"x": np.zeros((4, 2, 2), np.float32), "positions": np.ones((1, 2), np.float32)}
        assert [s["positions"].shape for s in open_feeds(data, inputs, spool_dir=tmp_path)] == [(1, 2)] * 4

    def test_a_first_dimension_of_one_takes_one_row_per_sample(self, tmp_path: Path) -> None:
        inputs = [spec("x", "b", 2, 2), spec("noise", 1, 2)]
        noise = np.arange(8, dtype=np.float32).reshape(4, 2)
        data = {"x": np.zeros((4, 2, 2), np.float32), "noise": noise}
        found = [s["noise"] for s in open_feeds(data, inputs, spool_dir=tmp_path)]
        np.testing.assert_array_equal(np.stack(found), noise[:, None])

    def test_samples_of_one_batch_must_agree_on_whole_inputs(self, tmp_path: Path) -> None:
        inputs = [spec("x", 2, 2), spec("scale")]
        data = {"x": np.zeros((4, 2), np.float32), "scale": np.array([1, 1, 1, 2], np.float32)}
        feeds = iter(open_feeds(data, inputs, spool_dir=tmp_path))
        assert next(feeds)["scale"] == 1
        with pytest.raises(FeedError, match=r"sample 2.*'scale' differs in value"):
            next(feeds)

    def test_different_counts_are_refused(self, tmp_path: Path) -> None:
        data = {"x": np.zeros((4, 2), np.float32), "y": np.zeros((3, 2), np.float32)}
        with pytest.raises(FeedError, match="'y' holds 3 samples, input 'x' holds 4"):
            open_feeds(data, [spec("x", "b", 2), spec("y", "b", 2)], spool_dir=tmp_path)
        with pytest.raises(FeedError, match="'s' holds 3 values for 4 samples"):
            open_feeds({"x": data["x"], "s": np.zeros(3)}, [spec("x", "b", 2), spec("s")], spool_dir=tmp_path)


@pytest.mark.parametrize(
    ("total", "limit", "rows"), [(10, 2, [2, 7]), (5, 5, range(5)), (3, 9, range(3)), (7, 1, [3])]
)
def test_limit_spreads_evenly(tmp_path: Path, total: int, limit: int, rows: Sequence[int]) -> None:
    data = np.arange(total, dtype=np.float32)[:, None]
    for source in (data, list(data), iter([data[:2], data[2:]])):
        feeds = open_feeds(source, [spec("x", "b", 1)], spool_dir=tmp_path, limit=limit)
        assert [int(sample["x"][0, 0]) for sample in feeds] == list(rows)
        assert ("spread evenly" in feeds.description) == (limit < total)


def test_protobuf_sets_go_by_number_and_match_names(tmp_path: Path) -> None:
    for i in (10, 2):
        folder = tmp_path / "data" / f"test_data_set_{i}"
        folder.mkdir(parents=True)
        for k, name in enumerate(("b", "a")):
            tensor = numpy_helper.from_array(np.full((1, 2), i * 10 + k, np.float32), name)
            onnx.save_tensor(tensor, str(folder / f"input_{k}.pb"))
            onnx.save_tensor(tensor, str(folder / f"output_{k}.pb"))
    inputs = [spec("a", "n", 2), spec("b", "n", 2)]
    feeds = open_feeds(tmp_path / "data", inputs, spool_dir=tmp_path / "spool")
    assert list(feeds.sample_ids) == ["test_data_set_2", "test_data_set_10"]
    assert [(s["a"][0, 0], s["b"][0, 0]) for s in feeds] == [(21, 20), (101, 100)]
    single = open_feeds(tmp_path / "data" / "test_data_set_2", inputs, spool_dir=tmp_path / "spool")
    assert len(single) == 1
