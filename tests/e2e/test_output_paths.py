"""Where results go, and what is left when they cannot go there: nothing, and an older result untouched."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxptq import publish
from tests.e2e.command import Bench, here, process, snapshot


def test_the_default_place_is_beside_the_model(bench: Bench) -> None:
    assert bench.quantize().code == 0
    assert sorted(snapshot(bench.folder)) == [
        "data.npz",
        "net.int8.onnx",
        "net.int8.report",
        "net.int8.report/report.html",
        "net.int8.report/report.json",
        "net.onnx",
    ]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("net.onnx", "is the input model"),
        ("../user/net.onnx", "is the input model"),
        (".", "is a folder"),
        ("gone/net.onnx", "does not exist"),
    ],
)
def test_outputs_that_cannot_be(bench: Bench, output: str, said: str) -> None:
    bench.refuses(2, said, do=lambda: bench.quantize("-o", bench.folder / output))


@pytest.mark.parametrize("option", ["--report", "--work-dir"])
@pytest.mark.parametrize("place", ["a.onnx", "a.onnx/inside", "../user/a.onnx", "a.onnx.data"])
def test_a_folder_at_the_place_of_the_output(bench: Bench, option: str, place: str) -> None:
    output = bench.folder / "a.onnx"
    said = f"of {option} would take the place of the output"
    bench.refuses(2, said, do=lambda: bench.quantize("-o", output, option, bench.folder / place))


def test_the_default_folder_of_the_report_at_the_place_of_the_output(bench: Bench) -> None:
    done = bench.refuses(
        2, "would take the place", do=lambda: bench.quantize("-o", bench.folder / "net.report")
    )
    assert "net.report' of --report" in done.err


def test_a_link_to_the_input_is_the_input(bench: Bench) -> None:
    (bench.folder / "link.onnx").symlink_to(bench.model)
    bench.refuses(2, "is the input model", do=lambda: bench.quantize("-o", bench.folder / "link.onnx"))


def test_a_pipe_is_not_replaced(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe.onnx")
    bench.refuses(2, "is not a regular file", do=lambda: bench.quantize("-o", bench.folder / "pipe.onnx"))
    assert (bench.folder / "pipe.onnx").is_fifo()


def test_a_link_stays_and_the_file_behind_it_is_written(bench: Bench) -> None:
    place = bench.work.parent / "models" / "net.onnx"
    place.parent.mkdir()
    bench.output.symlink_to(place)
    assert bench.quantize("--no-report").code == 0
    assert bench.output.readlink() == place
    onnx.checker.check_model(str(place))


@pytest.mark.parametrize("option", ["-o", "--report", "--work-dir"])
def test_places_that_nobody_may_write(bench: Bench, option: str) -> None:
    # Nothing can be created there, not even by the superuser, who may run these tests.
    place = "/proc/1/onnxptq" if Path("/proc/1").is_dir() else "/dev/full/onnxptq"
    begin = time.perf_counter()
    bench.refuses(2, place.rsplit("/", 1)[0], do=lambda: bench.quantize(option, place))
    # Found out before any work is done.
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("option", ["--report", "--work-dir"])
def test_a_file_where_a_folder_is_wanted(bench: Bench, option: str) -> None:
    bench.refuses(2, "data.npz", do=lambda: bench.quantize(option, bench.data))


def test_an_older_result_outlives_a_failure(bench: Bench) -> None:
    bench.output.write_bytes(b"older")
    bench.refuses(4, "asks for", do=lambda: bench.quantize("--min-sqnr", 99, "--no-report"))
    assert bench.output.read_bytes() == b"older"
    assert bench.quantize("--no-report").code == 0
    onnx.checker.check_model(str(bench.output))


def test_a_missed_gate_leaves_the_report_and_no_file(bench: Bench) -> None:
    done = bench.refuses(4, "report.html", do=lambda: bench.quantize("--min-sqnr", 99), keeps=False)
    report = json.loads((bench.folder / "net.int8.report/report.json").read_text())
    assert not bench.output.exists()
    assert any("not kept" in note for note in report["notes"])
    assert "99" in done.err


def test_a_gate_without_held_out_data(bench: Bench) -> None:
    bench.refuses(
        4,
        "cannot be judged",
        do=lambda: bench.quantize("--holdout", 0, "--min-agreement", 0.5, "--no-report"),
    )


def _limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("kilobytes", [1, 6, 12, 20])
def test_a_disk_that_fills_up(bench: Bench, kilobytes: int) -> None:
    """The limit on file sizes stands for a full disk: the kernel refuses to write on, at any byte."""
    done = process(*bench.arguments(), preexec_fn=_limited(kilobytes << 10))
    assert done.code == 2, done.err
    assert "cannot be written" in done.err or "cannot take" in done.err
    assert "  fix: " in done.err
    assert sorted(snapshot(bench.folder)) == ["data.npz", "net.onnx"]
    assert [p for p in bench.work.iterdir() if not p.name.startswith("calibration-")] == []


@pytest.mark.parametrize(
    ("command", "limit"), [("inspect", 0), ("inspect", 100), ("inspect", 3000), ("validate", 0)]
)
def test_no_room_for_intermediate_files(bench: Bench, command: str, limit: int) -> None:
    place = bench.work.parent / "intermediate"
    place.mkdir()
    given = (bench.model, bench.model, "--data", bench.data) if command == "validate" else (bench.model,)
    bench.refuses(
        2,
        "TMPDIR",
        str(place),
        do=lambda: process(
            command, *given, "--quiet", preexec_fn=_limited(limit), env={"TMPDIR": str(place)}
        ),
    )


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "the model": "onnxptq.graph.save._to_proto",
    "the cache": "numpy.savez",
    "moving into place": "pathlib.Path.replace",
    "the report": "os.fdopen",
    "folders": "tempfile.mkdtemp",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_in_every_writer(bench: Bench, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, _full)
    bench.refuses(2, "No space left", do=bench.quantize)


def test_what_a_killed_run_left_is_removed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_SETTLED_SECONDS", -1.0)
    for leftover in (bench.work / "onnxptq-run-abc", bench.folder / ".net.int8.onnx.onnxptq-abc"):
        leftover.mkdir()
        (leftover / "big").write_bytes(b"x")
    # Not ours, however similar.
    (bench.folder / ".net.int8.onnx.bak").mkdir()
    (bench.work / "run-1").mkdir()
    with publish.claimed_folder(bench.work, "onnxptq-run-") as alive:
        assert bench.quantize("--no-report").code == 0
        assert alive.is_dir()
    assert sorted(p.name for p in bench.folder.iterdir()) == [
        ".net.int8.onnx.bak",
        "data.npz",
        "net.int8.onnx",
        "net.onnx",
    ]
    assert {p.name for p in bench.work.iterdir() if p.is_dir()} == {"run-1"}


def test_relative_paths(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder)
    done = here(
        bench.capsys, "quantize", "net.onnx", "--calib", "data.npz", "-o", "small.onnx", "--no-report"
    )
    assert done.code == 0, done.err
    assert (bench.folder / "small.onnx").is_file()
