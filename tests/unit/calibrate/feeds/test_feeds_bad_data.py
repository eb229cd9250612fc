"""Data that cannot be used: the error names the thing, says what is wrong, and has a remedy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxptq.calibrate.feeds import ImagePreprocess, RecordFeeds, open_feeds
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

F32 = np.dtype(np.float32)
X = InputSpec(name="x", dtype=F32, shape=("b", 3, 4, 5))
GOOD = np.zeros((2, 3, 4, 5), np.float32)


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def refuse(source: object, *texts: str, inputs: list[InputSpec] | None = None, **options: Any) -> FeedError:
    """open_feeds or the first pass raises a FeedError whose message and remedy hold ``texts``."""
    options.setdefault("spool_dir", Path("unused-spool"))
    with pytest.raises(FeedError) as caught:
        list(open_feeds(source, inputs or [X], **options))
    assert caught.value.remedy
    for text in texts:
        assert text in str(caught.value)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "calib"
    path.mkdir()
    return path


class TestPaths:
    def test_missing_path_with_near_match(self, folder: Path) -> None:
        refuse(folder.parent / "calb", "calb: no such file", "Did you mean", "calib?")

    def test_empty_folder(self, folder: Path) -> None:
        refuse(folder, "the folder is empty")
        (folder / ".DS_Store").write_text("")
        refuse(folder, "the folder is empty")

    def test_folder_of_unknown_files(self, folder: Path) -> None:
        (folder / "a.txt").write_text("")
        (folder / "b.h5").write_text("")
        refuse(folder, "only 1 .h5, 1 .txt", "Give a folder of pictures")

    def test_unknown_file(self, folder: Path) -> None:
        (folder / "a.tfrecord").write_text("")
        refuse(folder / "a.tfrecord", "unknown kind of file .tfrecord")

    def test_mixed_folder(self, folder: Path) -> None:
        np.save(folder / "a.npy", GOOD)
        Image.new("RGB", (5, 4)).save(folder / "a.png")
        refuse(folder, "1 pictures and 1 .npy")

    def test_no_inputs_and_no_limit(self, folder: Path) -> None:
        with pytest.raises(FeedError, match="no inputs"):
            open_feeds(GOOD, [], spool_dir=folder)
        refuse(GOOD, "limit of 0", limit=0)


class TestShapes:
    @pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 4, 6), (4, 5), (2, 1, 3, 9, 5), (1, 2, 2, 3, 4, 5)])
    def test_both_shapes_are_named(self, folder: Path, shape: tuple[int, ...]) -> None:
        np.save(folder / "bad.npy", np.zeros(shape, np.float32))
        refuse(folder, "bad.npy", "'x' expects shape [b, 3, 4, 5]", f"found {list(shape)}")

    def test_the_other_layout_is_recognised(self) -> None:
        refuse(np.zeros((2, 4, 5, 3), np.float32), "look like (height, width, channels)")
        inputs = [spec("x", "b", 4, 5, 3)]
        refuse(GOOD, "look like (channels, height, width)", inputs=inputs)

    def test_the_bad_file_among_good_ones_is_named_at_once(self, folder: Path) -> None:
        for i in range(4):
            np.save(folder / f"{i}.npy", GOOD[:, :, :, : 5 - i // 3])
        with pytest.raises(FeedError, match=r"3\.npy"):
            open_feeds(folder, [X], spool_dir=folder)


class TestTypes:
    @pytest.mark.parametrize(
        ("found", "wanted"),
        [
            ("f8", "f4"),
            ("f4", "f2"),
            ("f2", "f4"),
            ("f4", "f8"),
            ("i4", "i8"),
            ("i8", "i4"),
            ("u1", "i8"),
            ("i8", "u1"),
        ],
    )
    def test_casts_within_a_kind(self, tmp_path: Path, found: str, wanted: str) -> None:
        data = np.array([[0, 1, 100]], found)
        feeds = open_feeds(data, [spec("x", "b", 3, dtype=wanted)], spool_dir=tmp_path)
        (sample,) = feeds
        assert sample["x"].dtype == np.dtype(wanted)
        np.testing.assert_array_equal(sample["x"], data)

    @pytest.mark.parametrize(
        ("found", "wanted"), [("i8", "f4"), ("f4", "i8"), ("b1", "i8"), ("i8", "b1"), ("b1", "f4")]
    )
    def test_casts_between_kinds_are_refused(self, found: str, wanted: str) -> None:
        error = refuse(
            np.zeros((1, 3), found), f"is {np.dtype(wanted).name}", inputs=[spec("x", "b", 3, dtype=wanted)]
        )
        assert np.dtype(found).name in error.message

    def test_bytes_for_a_float_input_point_to_preprocessing(self) -> None:
        refuse(GOOD.astype(np.uint8), "the data are uint8", "state the preprocessing")
        refuse(
            np.zeros((1, 3), np.uint8),
            "the data are uint8",
            inputs=[spec("p", "b", 3)],
            preprocess=ImagePreprocess(),
        )

    def test_integers_that_do_not_fit(self) -> None:
        refuse(
            np.array([[0, 2**40]]),
            "int32",
            "from 0 to 1099511627776",
            inputs=[spec("x", "b", 2, dtype=np.int32)],
        )
        refuse(np.array([[-1, 0]]), "uint8", "from -1", inputs=[spec("x", "b", 2, dtype=np.uint8)])

    def test_floats_that_overflow(self) -> None:
        refuse(
            np.array([[1e5]], np.float32),
            "float16, the data reach 100000",
            inputs=[spec("x", "b", 1, dtype=np.float16)],
        )

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, folder: Path, value: float) -> None:
        for i in range(3):
            data = GOOD.copy()
            data[1, 2, 3, 4] = value if i == 1 else 0
            np.save(folder / f"{i}.npy", data)
        refuse(folder, "1.npy, sample 1: input 'x' holds NaN or infinity (1 of 60 values)")


class TestNumpyFiles:
    def test_wrong_key_with_near_match(self, folder: Path) -> None:
        inputs = [spec("input_ids", "b", 2), spec("mask", "b", 2)]
        np.savez(folder / "a.npz", input_id=np.zeros((1, 2)), mask=np.zeros((1, 2)))
        refuse(folder / "a.npz", "a.npz: no array for input 'input_ids'", "Rename 'input_id'", inputs=inputs)

    def test_two_candidates_for_one_input(self, folder: Path) -> None:
        np.savez(folder / "a.npz", one=GOOD, two=GOOD)
        refuse(folder, "no array for input 'x'; it holds 'one', 'two'")

    def test_the_only_array_that_is_no_label_feeds_the_only_input(self, folder: Path) -> None:
        np.savez(folder / "a.npz", images=GOOD, labels=np.arange(2))
        feeds = open_feeds(folder / "a.npz", [X], spool_dir=folder)
        assert len(feeds) == 2
        assert "'images' read as input 'x', ignored 'labels'" in feeds.description

    def test_unnamed_arrays_go_by_position(self, folder: Path) -> None:
        np.savez(folder / "a.npz", np.zeros((1, 2)), np.ones((1, 2)))
        (sample,) = open_feeds(folder / "a.npz", [spec("p", "b", 2), spec("q", "b", 2)], spool_dir=folder)
        assert sample["q"].all()
        assert not sample["p"].any()

    @pytest.mark.parametrize("suffix", ["npy", "npz"])
    def test_pickles_are_never_loaded(self, folder: Path, suffix: str) -> None:
        witness = folder.parent / "ran"

        class Bomb:
            def __reduce__(self) -> Any:
                return (witness.touch, ())

        array = np.array([Bomb()], dtype=object)
        if suffix == "npy":
            np.save(folder / "a.npy", array, allow_pickle=True)
        else:
            np.savez(folder / "a.npz", x=array)
        refuse(folder, "holds pickled Python objects")
        (folder / f"a.{suffix}").write_bytes(pickle.dumps(GOOD))
        refuse(folder, f"a.{suffix}: cannot be read as a NumPy file")
        assert not witness.exists()

    @pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
    def test_every_truncation_is_noticed(self, folder: Path, save: Any) -> None:
        save(folder / "a", np.random.default_rng(0).random((2, 3, 4, 5), np.float32))
        (path,) = folder.iterdir()
        content = path.read_bytes()
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(FeedError, match=path.name):
                open_feeds(path, [X], spool_dir=folder.parent / "spool")

    def test_a_member_that_is_no_array(self, folder: Path) -> None:
        import zipfile

        with zipfile.ZipFile(folder / "a.npz", "w") as archive:
            archive.writestr("readme.txt", "hello")
        refuse(folder, "a.npz[readme.txt]: cannot be read as a NumPy file")

    def test_one_array_for_two_inputs(self, folder: Path) -> None:
        np.save(folder / "a.npy", GOOD)
        inputs = [X, spec("y", "b", 2)]
        refuse(folder / "a.npy", "one array cannot feed 2 inputs ('x', 'y')", inputs=inputs)
        refuse(folder, "no sub-folder 'x' for input 'x'", inputs=inputs)

    def test_a_sample_that_lacks_one_input(self, folder: Path) -> None:
        for name, count in (("x", 3), ("y_0", 2)):
            (folder / name).mkdir()
            for i in range(count):
                np.save(folder / name / f"{i}.npy", np.zeros((1, 2), np.float32))
        inputs = [spec("x", "b", 2), spec("y:0", "b", 2)]
        refuse(folder, "sample '2.npy' has no file y_0/2.npy for input 'y:0'", inputs=inputs)


class TestProtobuf:
    def test_garbage_and_missing_inputs(self, folder: Path) -> None:
        (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
        refuse(folder, "input_0.pb: cannot be read as a protobuf tensor")
        (folder / "input_0.pb").write_bytes(b"")
        refuse(folder, "holds no TensorProto")
        refuse(folder, "the model has 2 inputs", inputs=[X, spec("y", "b", 2)])
        (folder / "input_0.pb").rename(folder / "output_0.pb")
        refuse(folder, "only model outputs")


class TestPictures:
    def test_unreadable(self, folder: Path) -> None:
        (folder / "a.jpg").write_bytes(b"not a picture")
        refuse(folder, "a.jpg: cannot be read as a picture")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
    def test_truncated(self, folder: Path, suffix: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        path = folder / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refuse(folder, f"a.{suffix}: cannot be read as a picture")

    @pytest.mark.parametrize("limit", [40, 70])  # Pillow warns above its limit and raises above twice that
    def test_decompression_bomb(self, folder: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.new("L", (10, 10)).save(folder / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuse(folder, "a.png: the picture is too large")

    def test_the_third_of_five_is_named_while_iterating(self, folder: Path) -> None:
        for i in range(5):
            Image.new("RGB", (5, 4)).save(folder / f"{i}.png")
        (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
        feeds = open_feeds(folder, [X], spool_dir=folder)
        iterator = iter(feeds)
        next(iterator)
        next(iterator)
        with pytest.raises(FeedError, match=r"2\.png"):
            next(iterator)

    def test_several_inputs_and_inputs_that_are_no_pictures(self, folder: Path) -> None:
        Image.new("RGB", (5, 4)).save(folder / "a.png")
        refuse(folder, "pictures feed one input; the model has 2", inputs=[X, spec("y", "b", 2)])
        refuse(folder, "does not look like a picture", inputs=[spec("x", "b", 128)])


class TestRandom:
    def test_only_on_request_and_loud(self, tmp_path: Path) -> None:
        inputs = [X, spec("ids", "b", 2, dtype=np.int64), spec("scale"), spec("raw", "b", 9, dtype=np.uint8)]
        feeds = open_feeds("random", inputs, spool_dir=tmp_path, limit=5, seed=3)
        assert isinstance(feeds, RecordFeeds)
        assert "RANDOM DATA" in feeds.description
        samples = list(feeds)
        assert len(samples) == 5
        assert [s["x"].tobytes() for s in samples] == [s["x"].tobytes() for s in feeds]
        assert len({s["x"].tobytes() for s in samples}) == 5
        assert {int(v) for s in samples for v in s["ids"].ravel()} <= {0, 1}
        assert samples[0]["scale"].shape == ()
        other = open_feeds("random", inputs, spool_dir=tmp_path, limit=5, seed=4)
        assert other.fingerprint != feeds.fingerprint
        assert next(iter(other))["x"].tobytes() != samples[0]["x"].tobytes()

    def test_fixed_batch_and_whole_inputs(self, tmp_path: Path) -> None:
        feeds = open_feeds("random", [spec("x", 4, 2), spec("s"), spec("a", 7)], spool_dir=tmp_path, limit=6)
        assert [s["x"].shape for s in feeds] == [(4, 2)] * 2

    def test_open_dimensions_need_a_size(self, tmp_path: Path) -> None:
        inputs = [spec("x", "b", 3, "h", "w")]
        refuse("random", "'x' has shape [b, 3, h, w]", inputs=inputs)
        feeds = open_feeds("random", inputs, preprocess=ImagePreprocess(size=(6, 7)), spool_dir=tmp_path)
        assert next(iter(feeds))["x"].shape == (1, 3, 6, 7)

    def test_a_folder_of_that_name_needs_a_path(self, folder: Path) -> None:
        refuse(folder / "random", "no such file")


class TestSymbols:
    """Dimensions of one name."""

    A, B = spec("a", "n", "l", 2), spec("b", "n", "l")

    def test_inputs_that_disagree(self) -> None:
        data = {"a": np.zeros((3, 6, 2), np.float32), "b": np.zeros((3, 5), np.float32)}
        refuse(
            data, "the data, sample 0", "'l' is 6 in input 'a' and 5 in input 'b'", inputs=[self.A, self.B]
        )

    def test_the_sample_is_named(self, folder: Path) -> None:
        for i, length in enumerate((6, 6, 5)):
            np.savez(
                folder / f"{i}.npz",
                a=np.zeros((1, 6, 2), np.float32),
                b=np.zeros((1, length), np.float32),
            )
        refuse(folder, "2.npz: dimension 'l'", inputs=[self.A, self.B])

    def test_within_one_input(self) -> None:
        refuse(np.zeros((2, 4, 5), np.float32), "'s' is 4", "and 5", inputs=[spec("x", "n", "s", "s")])

    def test_a_batch_elsewhere_than_first_must_be_that_of_one_sample(self) -> None:
        inputs = [spec("x", "n", 4, 3), spec("state", 2, "n")]
        data = {"x": np.zeros((8, 4, 3), np.float32), "state": np.zeros((2, 8), np.float32)}
        refuse(data, "'n' is 1 in input 'x' and 8 in input 'state'", inputs=inputs)

    def test_lengths_may_differ_between_samples_and_between_names(self) -> None:
        samples = [{"a": np.zeros((1, n, 2), np.float32), "b": np.zeros((1, n), np.float32)} for n in (3, 4)]
        assert len(list(open_feeds(samples, [self.A, self.B], spool_dir=Path("unused")))) == 2
        for unknown in (None, "?", "None", "m"):
            data = {"a": np.zeros((3, 6, 2), np.float32), "b": np.zeros((3, 5), np.float32)}
            first = "?" if unknown == "?" else "None" if unknown == "None" else "l"
            specs = [spec("a", "n", first, 2), spec("b", "n", unknown)]
            assert len(list(open_feeds(data, specs, spool_dir=Path("unused")))) == 3
