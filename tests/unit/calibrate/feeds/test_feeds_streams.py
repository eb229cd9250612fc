"""Sources that are Python objects, with the real onnxruntime and torch classes."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxptq.calibrate.feeds import open_feeds
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

torch = pytest.importorskip("torch")
quantization = pytest.importorskip("onnxruntime.quantization")
from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402

F32 = np.dtype(np.float32)
X = InputSpec(name="x", dtype=F32, shape=("b", 3))
Y = InputSpec(name="y", dtype=F32, shape=("b", 2))
DATA = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)


def values(feeds: Any, name: str = "x") -> np.ndarray[Any, Any]:
    samples = list(feeds)
    assert all(sample[name].shape[0] == 1 for sample in samples)
    return np.concatenate([sample[name] for sample in samples])


class OneShotReader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
    def __init__(self, batch: int) -> None:
        self.batches = iter([{"x": DATA[i : i + batch]} for i in range(0, len(DATA), batch)])

    def get_next(self) -> Any:
        return next(self.batches, None)


class StoppingReader(OneShotReader):
    def get_next(self) -> Any:
        return next(self.batches)


class RewindingReader(OneShotReader):
    def __init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        super().__init__(2)


class TestDataReader:
    @pytest.mark.parametrize("batch", [1, 3, 7])
    def test_is_read_once_and_fed_twice(self, tmp_path: Path, batch: int) -> None:
        feeds = open_feeds(OneShotReader(batch), [X], spool_dir=tmp_path)
        for _ in range(2):
            np.testing.assert_array_equal(values(feeds), DATA)
        assert "OneShotReader" in feeds.description

    def test_a_used_reader_is_rewound_before_and_after(self, tmp_path: Path) -> None:
        reader = RewindingReader()
        reader.get_next()
        np.testing.assert_array_equal(values(open_feeds(reader, [X], spool_dir=tmp_path)), DATA)
        np.testing.assert_array_equal(reader.get_next()["x"], DATA[:2])

    def test_a_reader_that_stops_like_an_iterator(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(values(open_feeds(StoppingReader(3), [X], spool_dir=tmp_path)), DATA)

    def test_a_used_up_reader_is_named(self, tmp_path: Path) -> None:
        reader = OneShotReader(7)
        reader.get_next()
        with pytest.raises(FeedError, match="OneShotReader yielded no samples"):
            open_feeds(reader, [X], spool_dir=tmp_path)


class DictDataset(Dataset):  # type: ignore[misc, type-arg, unused-ignore]
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.tensor(DATA[index]), "label": index, "file": f"{index}.jpg"}


class TestTorch:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_labels_of_tuples_are_dropped_and_said(self, tmp_path: Path, batch: int) -> None:
        loader = DataLoader(TensorDataset(torch.tensor(DATA), torch.arange(7)), batch_size=batch)
        feeds = open_feeds(loader, [X], spool_dir=tmp_path)
        np.testing.assert_array_equal(values(feeds), DATA)
        assert "dropped the last 1 element(s) of every tuple as labels" in feeds.description
        assert "DataLoader" in feeds.description

    def test_nothing_is_dropped_where_inputs_take_all(self, tmp_path: Path) -> None:
        second = np.arange(14, dtype=np.float32).reshape(7, 2)
        loader = DataLoader(TensorDataset(torch.tensor(DATA), torch.tensor(second)), batch_size=3)
        feeds = open_feeds(loader, [X, Y], spool_dir=tmp_path)
        np.testing.assert_array_equal(values(feeds, "y"), second)
        assert "dropped" not in feeds.description

    def test_dicts_with_more_than_inputs(self, tmp_path: Path) -> None:
        feeds = open_feeds(DataLoader(DictDataset(), batch_size=3), [X], spool_dir=tmp_path)
        np.testing.assert_array_equal(values(feeds), DATA)
        assert "ignored 'file', 'label'" in feeds.description

    def test_a_shuffling_loader_keeps_one_order(self, tmp_path: Path) -> None:
        loader = DataLoader(TensorDataset(torch.tensor(DATA)), batch_size=2, shuffle=True)
        feeds = open_feeds(loader, [X], spool_dir=tmp_path)
        first = values(feeds)
        np.testing.assert_array_equal(values(feeds), first)
        np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(DATA, axis=0))

    def test_a_dataset_and_tensors_that_require_grad(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(values(open_feeds(DictDataset(), [X], spool_dir=tmp_path)), DATA)
        tensors = [torch.tensor(row, requires_grad=True) for row in DATA]
        np.testing.assert_array_equal(values(open_feeds(tensors, [X], spool_dir=tmp_path)), DATA)
        np.testing.assert_array_equal(values(open_feeds(torch.tensor(DATA), [X], spool_dir=tmp_path)), DATA)

    def test_bfloat16_is_refused_with_the_element_named(self, tmp_path: Path) -> None:
        with pytest.raises(FeedError, match="element 0 of a Python list"):
            open_feeds([torch.zeros(3, dtype=torch.bfloat16)], [X], spool_dir=tmp_path)


class TestIterables:
    def test_a_mapping_that_is_no_dict_and_a_dict_with_labels_beside(self, tmp_path: Path) -> None:
        elements = [(UserDict({"x": row}), 5) for row in DATA]
        np.testing.assert_array_equal(values(open_feeds(iter(elements), [X], spool_dir=tmp_path)), DATA)

    def test_a_list_is_not_spooled_and_not_handed_out(self, tmp_path: Path) -> None:
        mine = DATA.copy()
        feeds = open_feeds([{"x": mine}], [X], spool_dir=tmp_path / "spool")
        next(iter(feeds))["x"][:] = 99
        np.testing.assert_array_equal(mine, DATA)
        assert not (tmp_path / "spool").exists()

    def test_exceptions_of_the_users_code_become_named_errors(self, tmp_path: Path) -> None:
        def broken() -> Iterator[object]:
            yield DATA[0]
            raise KeyError("lost.jpg")

        with pytest.raises(FeedError, match=r"generator raised KeyError at element 1: 'lost\.jpg'") as caught:
            open_feeds(broken(), [X], spool_dir=tmp_path)
        assert isinstance(caught.value.__cause__, KeyError)
        caught.value.__traceback__ = None
        del caught
        gc.collect()
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            (iter(()), "yielded no samples"),
            ([], "yielded no samples"),
            (object(), "object is no data source"),
            ([3.0], "element 0 of a Python list is a float"),
            ([None], "is a NoneType"),
            (iter([{"x": object()}]), "holds a object where an array"),
            ([[DATA[0]]] * 2 + [[]], r"element 2 .* holds 0 array"),
        ],
        ids=["generator", "list", "object", "number", "none", "value", "short"],
    )
    def test_what_is_no_sample_is_refused(self, tmp_path: Path, source: object, text: str) -> None:
        with pytest.raises(FeedError, match=text) as caught:
            open_feeds(source, [X], spool_dir=tmp_path)
        assert caught.value.remedy

    def test_the_spool_goes_with_the_feeds(self, tmp_path: Path) -> None:
        feeds = open_feeds(iter(DATA), [X], spool_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        part = feeds.subset([1, 2])
        del feeds
        gc.collect()
        np.testing.assert_array_equal(values(part), DATA[1:3])
        del part
        gc.collect()
        assert not list(tmp_path.iterdir())

    def test_a_spool_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FeedError, match="cannot be spooled"):
            open_feeds(iter(DATA), [X], spool_dir=tmp_path / "file" / "spool")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def to_full(handle: int, *args: Any, **kwargs: Any) -> Any:
            return Path("/dev/full").open("wb", buffering=0)

        monkeypatch.setattr("onnxptq.calibrate.feeds.spool.os.fdopen", to_full)
        with pytest.raises(FeedError, match="No space left") as caught:
            open_feeds(iter(DATA), [X], spool_dir=tmp_path)
        assert "Free some space" in caught.value.remedy


_MEMORY = """
import sys
import numpy as np
from pathlib import Path
from onnxptq.calibrate.feeds import open_feeds
from onnxptq.types import InputSpec
kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
x = InputSpec(name="x", dtype=np.dtype(np.float32), shape=("b", 3, 256, 256))
make = lambda i: np.full((1, 3, 256, 256), i, np.float32)
source = (make(i) for i in range(count)) if kind == "generator" else folder / f"{count}-{kind}.npz"
feeds = open_feeds(source, [x], spool_dir=folder / "spool")
assert [int(s["x"][0, 0, 0, 0]) for _ in range(2) for s in feeds] == list(range(count)) * 2
feeds.fingerprint
# ru_maxrss would start from the size of the process that forked this one.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["generator", "stored", "compressed"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, kind: str) -> None:
    peaks = []
    for count in (8, 128):
        stack = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones(
            (1, 3, 256, 256), np.float32
        )
        if kind != "generator":
            (np.savez if kind == "stored" else np.savez_compressed)(tmp_path / f"{count}-{kind}.npz", x=stack)
        del stack
        command = [sys.executable, "-c", _MEMORY, kind, str(count), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    # 120 more samples are 90 MB; the bound is a tenth of the smaller process.
    assert peaks[1] < 1.1 * peaks[0]
