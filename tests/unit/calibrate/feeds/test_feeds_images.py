"""Pictures: decoding, the value equation, geometry, guesses, YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxptq.calibrate.feeds import ImagePreprocess, folders, open_feeds, stored
from onnxptq.calibrate.feeds.decode import read_image
from onnxptq.calibrate.feeds.stored import Shelf
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), np.uint8)


def spec(*shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name="x", dtype=np.dtype(dtype), shape=shape)


def decode(image: Image.Image, path: Path, **options: Any) -> np.ndarray[Any, Any]:
    image.save(path, **options)
    return np.asarray(read_image(path, path.name))


class TestDecoding:
    def test_16_bit_grey_keeps_white_white(self, tmp_path: Path) -> None:
        values = np.array([[0, 255, 65535, 65535 // 2]], np.uint16)
        np.testing.assert_array_equal(decode(Image.fromarray(values), tmp_path / "a.png"), [[0, 1, 255, 127]])
        np.testing.assert_array_equal(
            decode(Image.fromarray(values), tmp_path / "a.tiff"), [[0, 1, 255, 127]]
        )

    def test_palette_with_and_without_transparency(self, tmp_path: Path) -> None:
        flat = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 4, axis=0))
        palette = flat.quantize(4)
        np.testing.assert_array_equal(decode(palette, tmp_path / "a.png"), np.asarray(flat))
        np.testing.assert_array_equal(
            decode(palette, tmp_path / "b.png", transparency=b"\x00\xff"), np.asarray(flat)
        )
        np.testing.assert_array_equal(decode(palette, tmp_path / "c.gif"), np.asarray(flat))

    def test_alpha_is_dropped(self, tmp_path: Path) -> None:
        rgba = np.concatenate([RGB, RNG.integers(0, 256, (6, 8, 1), np.uint8)], axis=2)
        np.testing.assert_array_equal(decode(Image.fromarray(rgba), tmp_path / "a.png"), RGB)
        grey_alpha = Image.fromarray(RGB[:, :, 0]).convert("LA")
        np.testing.assert_array_equal(decode(grey_alpha, tmp_path / "b.png"), RGB[:, :, 0])

    def test_one_bit_and_cmyk(self, tmp_path: Path) -> None:
        bits = RGB[:, :, 0] > 127
        np.testing.assert_array_equal(decode(Image.fromarray(bits), tmp_path / "a.png"), bits * 255)
        cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
        np.testing.assert_allclose(
            decode(cmyk, tmp_path / "a.jpg")[0, 0], [255, 0, 0], atol=2
        )  # JPEG is lossy

    def test_float_and_32_bit_pixels_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FeedError, match=r"a\.tiff: holds floating-point"):
            decode(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "a.tiff")
        with pytest.raises(FeedError, match=r"b\.tiff: holds 32-bit"):
            decode(Image.fromarray(np.full((2, 2), 70000, np.int32)), tmp_path / "b.tiff")

    @pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
    def test_exif_orientation(self, tmp_path: Path, orientation: int, turned: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(Image.fromarray(RGB), tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(found, np.rot90(RGB, turned))

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
        found = decode(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(found[0, 0], [255, 0, 0])


class TestValues:
    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("color", ["RGB", "BGR", "GRAY"])
    def test_equation(self, layout: Any, color: Any) -> None:
        channels = 1 if color == "GRAY" else 3
        mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
        preprocess = ImagePreprocess(size=(6, 8), layout=layout, color=color, mean=mean, std=std)
        found = preprocess.apply(Image.fromarray(RGB), "a")
        pixels = np.asarray(Image.fromarray(RGB).convert("L"))[:, :, None] if channels == 1 else RGB
        if color == "BGR":
            pixels = pixels[:, :, ::-1]
        expected = ((pixels.astype(np.float64) / 255 - mean) / std).astype(np.float32)
        if layout == "NCHW":
            expected = expected.transpose(2, 0, 1)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)

    def test_scale_in_other_units(self) -> None:
        preprocess = ImagePreprocess(scale=1.0, mean=127.0, std=(128.0,), resize="none")
        found = preprocess.apply(Image.fromarray(RGB), "a")
        np.testing.assert_array_equal(found, (RGB.transpose(2, 0, 1).astype(np.float32) - 127) / 128)

    def test_raw_bytes(self, tmp_path: Path) -> None:
        Image.fromarray(RGB).save(tmp_path / "a.png")
        (sample,) = open_feeds(tmp_path, [spec("b", 6, 8, 3, dtype=np.uint8)], spool_dir=tmp_path)
        np.testing.assert_array_equal(sample["x"], RGB[None])


class TestGeometry:
    @pytest.mark.parametrize("shape", [(256, 256), (300, 400), (401, 300), (224, 900)])
    def test_imagenet_evaluation_agrees_with_pillow_steps(self, shape: tuple[int, int]) -> None:
        image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), np.uint8))
        preprocess = ImagePreprocess(
            size=(224, 224), resize_size=256, interpolation="bilinear", dtype="uint8"
        )
        height, width = shape
        short = min(shape)
        resized = image.resize(
            (int(256 * width / short), int(256 * height / short)), Image.Resampling.BILINEAR
        )
        top, left = round((resized.height - 224) / 2), round((resized.width - 224) / 2)
        expected = np.asarray(resized)[top : top + 224, left : left + 224].transpose(2, 0, 1)
        np.testing.assert_array_equal(preprocess.apply(image, "a"), expected)

    @pytest.mark.parametrize("source", [(5, 9), (9, 5), (7, 7), (64, 3), (10, 20), (21, 10)])
    @pytest.mark.parametrize("size", [(7, 7), (4, 11), (11, 4), (10, 20)])
    def test_cover_always_reaches_the_size(self, source: tuple[int, int], size: tuple[int, int]) -> None:
        image = Image.new("RGB", (source[1], source[0]))
        assert ImagePreprocess(size=size).apply(image, "a").shape == (3, *size)
        assert ImagePreprocess(size=size, resize="exact").apply(image, "a").shape == (3, *size)

    def test_cover_keeps_the_aspect(self) -> None:
        image = Image.fromarray(RNG.integers(0, 256, (10, 20, 3), np.uint8))
        found = ImagePreprocess(size=(4, 11), layout="NHWC", dtype="uint8").apply(image, "a")
        # Width needs the larger factor, 11/20: the height becomes int(5.5), the crop starts at round(0.5).
        expected = np.asarray(image.resize((11, 5), Image.Resampling.BICUBIC))[:4]
        np.testing.assert_array_equal(found, expected)

    def test_cover_does_not_touch_pictures_of_the_right_size(self) -> None:
        found = ImagePreprocess(size=(6, 8), dtype="uint8").apply(Image.fromarray(RGB), "a")
        np.testing.assert_array_equal(found, RGB.transpose(2, 0, 1))

    def test_what_does_not_reach_the_size_is_refused(self) -> None:
        small = Image.new("RGB", (8, 6))
        with pytest.raises(FeedError, match=r"a\.png: the picture is 6x8, smaller than the crop 7x7"):
            ImagePreprocess(size=(7, 7), resize="none").apply(small, "a.png")
        with pytest.raises(FeedError, match="is 7x9 after resizing, the model reads 7x7"):
            ImagePreprocess(size=(7, 7), center_crop=False).apply(small, "a.png")

    def test_open_sizes_follow_the_pictures(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
        Image.new("RGB", (3, 2)).save(tmp_path / "b.png")
        feeds = open_feeds(tmp_path, [spec("b", 3, None, None)], spool_dir=tmp_path)
        assert [sample["x"].shape for sample in feeds] == [(1, 3, 6, 8), (1, 3, 2, 3)]

    def test_the_input_gives_the_size_that_options_leave_open(self, tmp_path: Path) -> None:
        Image.fromarray(RGB).save(tmp_path / "a.png")
        feeds = open_feeds(
            tmp_path, [spec("b", 3, 4, 4)], preprocess=ImagePreprocess(mean=(0.5,)), spool_dir=tmp_path
        )
        assert next(iter(feeds))["x"].shape == (1, 3, 4, 4)


class TestFolders:
    def test_order_is_that_of_relative_paths_and_others_are_left_out(self, tmp_path: Path) -> None:
        for i, name in enumerate(("b/1.PNG", "a/z.png", "c.jpeg", "a/.hidden.png")):
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / "d" / name)
        (tmp_path / "d" / "labels.json").write_text("{}")
        np.save(tmp_path / "d" / "labels.npy", np.zeros(3))
        feeds = open_feeds(tmp_path / "d", [spec("b", 3, 4, 4)], spool_dir=tmp_path)
        assert list(feeds.sample_ids) == ["a/z.png", "b/1.PNG", "c.jpeg"]
        assert "left out other files: 1 .json, 1 labels.npy" in feeds.description
        assert "guessed" in feeds.description

    def test_links_to_folders_are_followed_without_loops(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "real" / "a.png")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "cats").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "back").symlink_to(tmp_path / "d")
        feeds = open_feeds(tmp_path / "d", [spec("b", 3, 4, 4)], spool_dir=tmp_path)
        assert list(feeds.sample_ids) == ["cats/a.png"]


class TestPixelArrays:
    @pytest.mark.parametrize("axes", ["NHWC", "NCHW", "singles", "RGBA"])
    def test_stacked_pixels_equal_picture_files(self, tmp_path: Path, axes: str) -> None:
        stack = RNG.integers(0, 256, (4, 9, 11, 3), np.uint8)
        (tmp_path / "d").mkdir()
        for i, pixels in enumerate(stack):
            Image.fromarray(pixels).save(tmp_path / "d" / f"{i}.png")
        source: object = {
            "NHWC": stack,
            "NCHW": stack.transpose(0, 3, 1, 2),
            "singles": list(stack),
            "RGBA": np.concatenate([stack, stack[..., :1]], axis=3),
        }[axes]
        inputs = [spec("b", 3, 6, 6)]
        preprocess = ImagePreprocess.guess(inputs[0])
        files = open_feeds(tmp_path / "d", inputs, preprocess=preprocess, spool_dir=tmp_path)
        arrays = open_feeds(source, inputs, preprocess=preprocess, spool_dir=tmp_path)
        assert [s["x"].tobytes() for s in arrays] == [s["x"].tobytes() for s in files]
        assert "preprocessing: resize to cover 6x6" in arrays.description

    def test_float_arrays_are_left_alone_and_this_is_said(self, tmp_path: Path) -> None:
        data = RNG.random((2, 3, 6, 6), np.float32)
        feeds = open_feeds(data, [spec("b", 3, 6, 6)], preprocess=ImagePreprocess(), spool_dir=tmp_path)
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in feeds]), data)
        assert "preprocessing not used" in feeds.description

    def test_bytes_that_are_no_picture_but_fit_stay_bytes(self, tmp_path: Path) -> None:
        data = RNG.integers(0, 256, (2, 5, 6, 7), np.uint8)
        feeds = open_feeds(
            data, [spec("b", 5, 6, 7, dtype=np.uint8)], preprocess=ImagePreprocess(), spool_dir=tmp_path
        )
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in feeds]), data)
        with pytest.raises(FeedError, match="is no picture and no stack"):
            open_feeds(data, [spec("b", 5, 6, 7)], preprocess=ImagePreprocess(), spool_dir=tmp_path)

    def test_bytes_in_the_models_own_shape_stay_bytes(self, tmp_path: Path) -> None:
        data = RNG.integers(0, 256, (2, 6, 6, 3), np.uint8)
        inputs = [spec("b", 6, 6, 3, dtype=np.uint8)]
        feeds = open_feeds(data, inputs, preprocess=ImagePreprocess.guess(inputs[0]), spool_dir=tmp_path)
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in feeds]), data)


class TestShelf:
    def test_pictures_are_decoded_once_as_long_as_there_is_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for i in range(3):
            Image.fromarray(RGB + np.uint8(i)).save(tmp_path / f"{i}.png")
        decoded: list[str] = []

        def counted(path: Path, where: str) -> Image.Image:
            decoded.append(where)
            return read_image(path, where)

        monkeypatch.setattr(stored, "read_image", counted)
        # The first one is also read on opening.
        for room, expected in ((1 << 20, 3), (RGB.nbytes, 1 + 3 * 2), (0, 1 + 3 * 3)):
            monkeypatch.setattr(folders, "Shelf", lambda room=room: Shelf(room))
            decoded.clear()
            feeds = open_feeds(tmp_path, [spec("b", 3, 6, 8)], spool_dir=tmp_path)
            reads = [[sample["x"] for sample in feeds] for _ in range(3)]
            assert len(decoded) == expected
            for later in reads[1:]:
                np.testing.assert_array_equal(later, reads[0])

    @pytest.mark.parametrize("dtype", ["f4", "u1"])
    def test_what_a_reader_does_to_a_sample_stays_with_it(self, tmp_path: Path, dtype: str) -> None:
        Image.fromarray(RGB).save(tmp_path / "a.png")
        feeds = open_feeds(tmp_path, [spec("b", 6, 8, 3, dtype=dtype)], spool_dir=tmp_path)
        first = next(iter(feeds))["x"]
        kept = first.copy()
        first[:] = 0
        np.testing.assert_array_equal(next(iter(feeds))["x"], kept)


class TestGuess:
    @pytest.mark.parametrize(
        ("shape", "dtype", "layout", "color", "size"),
        [
            (("b", 3, 224, 224), "f4", "NCHW", "RGB", (224, 224)),
            ((1, 3, 352, 416), "f4", "NCHW", "RGB", (352, 416)),
            ((None, 299, 299, 3), "f2", "NHWC", "RGB", (299, 299)),
            (("b", 1, 28, 28), "f4", "NCHW", "GRAY", (28, 28)),
            (("b", 28, 28, 1), "f4", "NHWC", "GRAY", (28, 28)),
            (("b", 3, "h", "w"), "f4", "NCHW", "RGB", None),
            (("b", None, None, None), "f4", "NCHW", "RGB", None),
            (("b", 224, 224, 3), "u1", "NHWC", "RGB", (224, 224)),
        ],
    )
    def test_from_shape(self, shape: Any, dtype: str, layout: str, color: str, size: Any) -> None:
        guess = ImagePreprocess.guess(spec(*shape, dtype=dtype))
        assert (guess.layout, guess.color, guess.size) == (layout, color, size)
        is_imagenet = color == "RGB" and dtype != "u1"
        assert guess.mean == ((0.485, 0.456, 0.406) if is_imagenet else (0.0,))
        assert guess.dtype == ("uint8" if dtype == "u1" else "float32")

    @pytest.mark.parametrize("shape", [("b", 128), ("b", 4, 64, 64), ("b", 3, 224), ()])
    def test_no_picture(self, shape: Any) -> None:
        with pytest.raises(FeedError, match="does not look like a picture"):
            ImagePreprocess.guess(spec(*shape))

    def test_description_tells_all_steps_on_one_line(self) -> None:
        text = ImagePreprocess.guess(spec("b", 3, 224, 224)).describe(stated=())
        for part in (
            "guessed:",
            "224x224",
            "bicubic",
            "RGB NCHW",
            "/ 255",
            "0.485 0.456 0.406",
            "--mean",
            "--std",
        ):
            assert part in text
        assert "\n" not in text
        assert "raw bytes" in ImagePreprocess(dtype="uint8").describe()

    def test_description_tells_what_was_guessed_beside_options(self) -> None:
        guess = ImagePreprocess.guess(spec("b", 3, 4, 4))
        assert "guessed" not in guess.describe()
        assert "guessed of this: resize, color, layout, scale, std;" in guess.describe(
            stated=("size", "mean")
        )
        every = ("resize", "color", "layout", "scale", "mean", "std")
        assert guess.describe(stated=every) == guess.describe()
        raw = ImagePreprocess.guess(spec("b", 4, 4, 3, dtype="u1"))
        assert "guessed of this: resize, color, layout;" in raw.describe(stated=("size",))

    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({"size": 5}, (3, 5, 5)),
            ({"size": [4, 6]}, (3, 4, 6)),
            ({"size": 5, "resize": "short_side"}, (3, 5, 5)),
            ({"size": 5, "resize": "exact"}, (3, 5, 5)),
            ({"size": 5, "resize": "none"}, (3, 5, 5)),
            ({"resize_size": 4}, (3, 4, 5)),
            ({"mean": 0.5}, (3, 6, 8)),
        ],
    )
    def test_a_given_size_brings_back_the_usual_steps_where_the_model_fixes_none(
        self, options: dict[str, Any], shape: tuple[int, ...]
    ) -> None:
        base = ImagePreprocess.guess(spec("b", 3, "h", "w"))
        found = ImagePreprocess.from_options(options, base=base)
        assert found.apply(Image.fromarray(RGB), "a").shape == shape

    def test_remedies_name_what_was_stated(self) -> None:
        small = Image.new("RGB", (8, 6))
        for options, said, unsaid in (
            ({"size": 7, "resize": "none"}, "--resize", "resize_size"),
            ({"size": 7, "resize_size": 6}, "resize_size", "--resize"),
            ({"size": 7, "center_crop": False}, "center_crop", "true"),
        ):
            with pytest.raises(FeedError) as caught:
                ImagePreprocess.from_options(options).apply(small, "a")
            assert said in caught.value.remedy
            assert unsaid not in caught.value.remedy


class TestOptions:
    def test_channels_must_agree(self, tmp_path: Path) -> None:
        Image.fromarray(RGB).save(tmp_path / "a.png")
        with pytest.raises(FeedError, match=r"reads 1 channel.*color RGB gives 3") as caught:
            open_feeds(tmp_path, [spec("b", 1, 6, 8)], preprocess=ImagePreprocess(), spool_dir=tmp_path)
        assert "GRAY" in caught.value.remedy

    def test_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text("size: 224\nresize_size: 256\nmean: [0.5, 0.5, 0.5]\nstd: 0.5\ncolor: BGR\n")
        found = ImagePreprocess.from_yaml(path)
        assert found == ImagePreprocess(
            size=(224, 224), resize_size=256, mean=(0.5, 0.5, 0.5), std=(0.5,), color="BGR"
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("means: [1]", "Did you mean mean"),
            ("mean: [1, 2]", "mean has 2 values for 3"),
            ("std: 0", "std"),
            ("size: [224]", "size"),
            ("color: YUV", "color"),
            ("dtype: uint8\nmean: 1.0", "raw bytes"),
            ("resize: none\nresize_size: 3", "no effect"),
            ("scale: .inf", "scale"),
            ("- 1", "no mapping"),
            ("a: [", "cannot be read as YAML"),
        ],
    )
    def test_mistakes_are_named_with_the_file(self, tmp_path: Path, text: str, expected: str) -> None:
        path = tmp_path / "p.yaml"
        path.write_text(text)
        with pytest.raises(FeedError) as caught:
            ImagePreprocess.from_yaml(path)
        assert "p.yaml" in caught.value.message
        assert expected in str(caught.value)
        assert caught.value.remedy

    def test_options_over_a_guess(self) -> None:
        base = ImagePreprocess.guess(spec("b", 3, 8, 8))
        found = ImagePreprocess.from_options({"mean": (0.5, 0.5, 0.5)}, base=base)
        assert found.mean == (0.5, 0.5, 0.5)
        assert found.std == base.std
        assert found.size == (8, 8)
        with pytest.raises(FeedError, match="mean has 2"):
            ImagePreprocess.from_options({"mean": (0.5, 0.5)}, base=base)


def test_a_guess_for_other_channels_is_not_blamed_on_the_user() -> None:
    guess = ImagePreprocess.guess(spec(None, 3, 8, 8))
    asked = ImagePreprocess.from_options({"color": "GRAY"}, base=guess)
    assert (asked.mean, asked.std) == ((0.0,), (1.0,))
    with pytest.raises(FeedError, match=r"reads 3 channel\(s\) as NCHW, color GRAY gives 1"):
        asked.resolve(spec(None, 3, 8, 8))
    assert ImagePreprocess.from_options({"color": "BGR"}, base=guess).mean == guess.mean
    with pytest.raises(FeedError, match=r"mean has 3 values for 1 channel"):
        ImagePreprocess.from_options({"color": "GRAY", "mean": (1, 2, 3)}, base=guess)
