"""The bytes of a result depend on the model, the set of samples and the settings, on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxptq
from onnxptq import forming
from tests.e2e.command import Bench, classifier, pictures, save_samples

COUNT = 12


def _bytes(bench: Bench, *options: object, calib: object, evaluation: Path, fast: bool = False) -> bytes:
    given = ("--eval", evaluation, "--no-report", *options)
    done = bench.quantize(*given, calib=calib, fast=fast)
    assert done.code == 0, done.err
    return bench.output.read_bytes()


@pytest.fixture
def evaluation(bench: Bench) -> Path:
    np.savez(bench.folder / "eval.npz", x=pictures(4, seed=99))
    return bench.folder / "eval.npz"


def test_twice_the_same(bench: Bench, evaluation: Path, tmp_path: Path) -> None:
    first = _bytes(bench, calib=bench.data, evaluation=evaluation)
    assert _bytes(bench, calib=bench.data, evaluation=evaluation) == first  # from the cache
    assert _bytes(bench, "--work-dir", tmp_path / "w", calib=bench.data, evaluation=evaluation) == first


def test_however_samples_are_stored_and_ordered(bench: Bench, evaluation: Path) -> None:
    samples = pictures(COUNT)
    order = np.random.default_rng(0).permutation(COUNT)
    batches = bench.folder / "batches"
    batches.mkdir()
    for i in range(0, COUNT, 4):
        np.savez(batches / f"{i:02d}.npz", x=samples[i : i + 4])
    ways = [
        save_samples(bench.folder / "single", samples),
        save_samples(bench.folder / "shuffled", samples[order]),
        batches,
    ]
    results = {_bytes(bench, calib=way, evaluation=evaluation) for way in ways}
    assert len(results) == 1


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile", "entropy"])
def test_no_observer_depends_on_order(bench: Bench, evaluation: Path, observer: str) -> None:
    samples = pictures(COUNT)
    ways = [
        save_samples(bench.folder / "single", samples),
        save_samples(bench.folder / "reversed", samples[::-1]),
    ]
    options = ("--no-simplify", "--method", "rtn", "--observer", observer)
    assert len({_bytes(bench, *options, calib=way, evaluation=evaluation) for way in ways}) == 1


def test_memory_groups_change_nothing(bench: Bench, evaluation: Path, tmp_path: Path) -> None:
    options = ("--no-simplify", "--method", "rtn", "--observer", "mse")
    whole = _bytes(bench, *options, calib=bench.data, evaluation=evaluation)
    small = ("--max-memory", 1, "--work-dir", tmp_path / "w")
    # The recipe is part of the file, so only the rest is compared.
    grouped = _bytes(bench, *options, *small, calib=bench.data, evaluation=evaluation)
    assert grouped.replace(b"max_memory: 1\n", b"")[-4000:] == whole[-4000:] or _scales(grouped) == _scales(
        whole
    )


def _scales(content: bytes) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in onnx.ModelProto.FromString(content).graph.initializer}


@pytest.mark.parametrize(
    "change", [("--exclude", "inner"), ("-t", "tensorrt"), ("-t", "simulate", "-w", "4")]
)
def test_another_placement_reuses_the_calibration(
    bench: Bench, change: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.quantize("--no-report").code == 0
    first = bench.output.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(forming, "calibrate", never)
    done = bench.quantize("--no-report", "--verbose", *change)
    assert done.code == 0, done.err
    assert "Calibration is reused" in done.err
    assert bench.output.read_bytes() != first


@pytest.mark.parametrize("change", ["model", "data", "samples"])
def test_other_data_or_another_model_calibrates_again(bench: Bench, change: str) -> None:
    # So few samples that none is set apart, or the choice of those would be part of the key too.
    np.savez(bench.data, x=pictures(3))
    assert bench.quantize("--no-report", "--holdout", 0).code == 0
    more: tuple[object, ...] = ()
    if change == "model":
        bench.write(classifier(seed=5))
    elif change == "data":
        np.savez(bench.data, x=pictures(3, seed=8))
    else:
        more = ("--samples", 2)
    done = bench.quantize("--no-report", "--verbose", "--holdout", 0, *more)
    assert done.code == 0
    assert "reused" not in done.err


def test_a_damaged_cache_is_made_again(bench: Bench) -> None:
    assert bench.quantize("--no-report").code == 0
    first = bench.output.read_bytes()
    for stored in bench.work.iterdir():
        stored.write_bytes(stored.read_bytes()[:50])
    assert bench.quantize("--no-report").code == 0
    assert bench.output.read_bytes() == first


def test_a_recipe_file_says_the_same_as_options(bench: Bench, evaluation: Path) -> None:
    options = (
        "-t",
        "simulate",
        "-w",
        4,
        "-a",
        6,
        "--exclude",
        "head",
        "--observer",
        "mse",
        "--method",
        "rtn",
    )
    first = _bytes(bench, *options, calib=bench.data, evaluation=evaluation)
    stored = {p.key: p.value for p in onnx.load(str(bench.output)).metadata_props}
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text(stored["onnxptq.recipe"])
    assert onnxptq.Recipe.from_yaml(recipe).weight_bits == 4
    assert _bytes(bench, "--recipe", recipe, calib=bench.data, evaluation=evaluation) == first
    assert _bytes(bench, "--recipe", recipe, "-w", 5, calib=bench.data, evaluation=evaluation) != first
