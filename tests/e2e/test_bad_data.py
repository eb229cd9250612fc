"""Calibration data, options and recipes that cannot be used: exit code 2, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.command import Bench, classifier, here, pictures

Make = Callable[[Path], object]


def _npz(**arrays: np.ndarray) -> Make:
    def make(folder: Path) -> Path:
        np.savez(folder / "bad.npz", **arrays)
        return folder / "bad.npz"

    return make


def _bytes(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _folder(*files: tuple[str, bytes]) -> Make:
    def make(folder: Path) -> Path:
        (folder / "calib").mkdir()
        for name, content in files:
            (folder / "calib" / name).write_bytes(content)
        return folder / "calib"

    return make


def _second_picture_is_bad(folder: Path) -> Path:
    place = folder / "calib"
    place.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(place / f"{i}.png")
    (place / "1.png").write_bytes((place / "1.png").read_bytes()[:40])
    return place


def _nan() -> np.ndarray:
    values = pictures(6)
    values[4, 1, 2, 3] = np.nan
    return values


BAD: dict[str, tuple[Make, tuple[str, ...]]] = {
    "missing": (lambda folder: folder / "gone", ("gone", "no such file")),
    "empty folder": (_folder(), ("calib", "empty")),
    "nothing of use": (_folder(("readme.txt", b"hello")), ("calib",)),
    "no picture": (_folder(("a.jpg", b"not a picture")), ("a.jpg", "cannot be read")),
    "one bad picture": (_second_picture_is_bad, ("1.png",)),
    "no archive": (_bytes("bad.npz", b"PK broken"), ("bad.npz",)),
    "truncated array": (_bytes("bad.npy", b"\x93NUMPY\x01\x00"), ("bad.npy",)),
    "wrong shape": (_npz(x=pictures(4)[:, :2]), ("'x'", "3, 8, 8]", "2, 8, 8]")),
    "wrong rank": (_npz(x=pictures(4)[0, 0]), ("'x'",)),
    "wrong type": (_npz(x=pictures(4).astype(np.int64)), ("'x'", "float32", "int64")),
    "wrong key": (_npz(y=pictures(4)), ("'x'", "'y'")),
    "no rows": (_npz(x=pictures(4)[:0]), ("bad.npz",)),
    "NaN": (_npz(x=_nan()), ("'x'", "NaN", "4")),
}


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_unusable_calibration_data(bench: Bench, make: Make, said: tuple[str, ...]) -> None:
    data = make(bench.folder)
    bench.refuses(2, *said, do=lambda: bench.quantize(calib=data))


def test_unusable_evaluation_data(bench: Bench) -> None:
    data = _npz(x=pictures(4)[:, :2])(bench.folder)
    bench.refuses(2, "bad.npz", do=lambda: bench.quantize("--eval", data))


def test_too_few_labels(bench: Bench) -> None:
    np.save(bench.folder / "labels.npy", np.arange(3))
    np.savez(bench.folder / "other.npz", x=pictures(10, seed=4))
    given = ("--eval", bench.folder / "other.npz", "--labels", bench.folder / "labels.npy")
    bench.refuses(2, "labels", do=lambda: bench.quantize(*given))


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_labels_that_are_no_class(bench: Bench, is_dynamic: bool) -> None:
    if is_dynamic:  # the number of classes is then seen when the model runs
        model = classifier()
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
        bench.write(model)
    labels = bench.folder / "classes.npy"
    np.save(labels, np.array([0, 1, 2, 3, 4, 5, 6, 10, 8, 11]))
    said = ("classes.npy, ", "10 is no class of this model, which has 10 (and 1 more)", "from 0 to 9")
    np.savez(bench.folder / "other.npz", x=pictures(10, seed=4))
    options = ("--eval", bench.folder / "other.npz", "--labels", labels)
    done = bench.refuses(2, *said, do=lambda: bench.quantize(*options))
    assert "sample 7" in done.err or "[7]" in done.err
    command = ("validate", bench.model, bench.model, "--data", bench.data, "--labels", labels)
    bench.refuses(2, *said, do=lambda: here(bench.capsys, *command))


def test_labels_without_held_out_samples(bench: Bench) -> None:
    np.save(bench.folder / "labels.npy", np.arange(10))
    bench.refuses(
        2,
        "held-out",
        do=lambda: bench.quantize("--holdout", 0, "--labels", bench.folder / "labels.npy"),
    )


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown exclude": (("--exclude", "Convv"), ("--exclude 'Convv'", "Conv")),
    "exclude by case": (("--exclude", "STEM"), ("--exclude 'STEM'", "stem")),
    "unknown include": (("--include", "*/nothing/*"), ("--include '*/nothing/*'",)),
    "invalid expression": (("--exclude", "re:("), ("re:(", "regular expression")),
    "everything excluded": (("--exclude", "Conv", "--exclude", "Gemm", "--exclude", "Add"), ("--exclude",)),
    "bits": (("-w", "9"), ("weight_bits", "9")),
    "share": (("--holdout", "1.5"), ("holdout", "1.5")),
    "no samples": (("--samples", "0"), ("samples",)),
    "provider": (("--provider", "cuda"), ("CUDAExecutionProvider", "onnxptq[gpu]")),
    "opset": (("--opset", "12"), ("opset", "12")),
    "no recipe": (("--recipe", "gone.yaml"), ("gone.yaml",)),
    "no preprocess": (("--preprocess", "gone.yaml"), ("gone.yaml",)),
}


@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG)
def test_wrong_requests(bench: Bench, options: tuple[str, ...], said: tuple[str, ...]) -> None:
    bench.refuses(2, *said, do=lambda: bench.quantize(*options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "axb"), "--size"),
        (("--size", "16.7"), "whole number"),
        (("--size", "nan"), "whole number"),
        (("--mean", "1,red"), "--mean"),
        (("--target", "tpu"), "tensorrt"),
        (("--observer", "mean"), "minmax"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_options_that_are_refused_at_once(bench: Bench, options: tuple[str, ...], said: str) -> None:
    bench.refuses(2, said, do=lambda: bench.quantize(*options), fix=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("taget: simulate\n", ("recipe.yaml", "'taget'", "target")),
        ("target: [\n", ("recipe.yaml", "YAML")),
        ("- target\n", ("recipe.yaml", "mapping")),
        ("target: moon\n", ("recipe.yaml", "target", "moon")),
        ("rules: [{match: Conv, bits: 4}]\n", ("recipe.yaml", "bits")),
    ],
)
def test_wrong_recipes(bench: Bench, text: str, said: tuple[str, ...]) -> None:
    (bench.folder / "recipe.yaml").write_text(text)
    bench.refuses(2, *said, do=lambda: bench.quantize("--recipe", bench.folder / "recipe.yaml"))


@pytest.mark.parametrize("key", ["sizes: 8", "mean: [1, 2]", "layout: CHWN"])
def test_wrong_picture_options(bench: Bench, key: str) -> None:
    (bench.folder / "pictures.yaml").write_text(key + "\n")
    bench.refuses(
        2, key.split(":")[0], do=lambda: bench.quantize("--preprocess", bench.folder / "pictures.yaml")
    )


def test_both_runtimes_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0")
    bench.refuses(2, "onnxruntime-gpu", "pip uninstall", do=bench.quantize)


def test_no_runtime_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    bench.refuses(2, "not installed", "onnxptq[cpu]", do=bench.quantize)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--min-sqnr", "99"), 4, "asks for 99"),
        (("--min-agreement", "1.01"), 2, "1.01"),
        (("--min-accuracy", "0.5"), 4, "cannot be judged"),
        (("--limit", "0"), 2, "--limit"),
    ],
)
def test_validate_gates(bench: Bench, options: tuple[str, ...], code: int, said: str) -> None:
    assert bench.quantize("--no-report").code == 0
    done = here(
        bench.capsys, "validate", bench.model, bench.output, "--data", bench.data, "--quiet", *options
    )
    assert done.code == code
    assert said in done.err
    assert done.out == ""


def test_models_that_do_not_belong_together(bench: Bench) -> None:
    other = bench.write(classifier(classes=7), "other.onnx")
    bench.refuses(
        2, "'head'", do=lambda: here(bench.capsys, "validate", bench.model, other, "--data", bench.data)
    )


def test_validate_names_the_missing_file(bench: Bench) -> None:
    gone = bench.folder / "gone.onnx"
    bench.refuses(
        2, "gone.onnx", do=lambda: here(bench.capsys, "validate", bench.model, gone, "--data", bench.data)
    )
