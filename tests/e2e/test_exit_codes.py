"""Every documented exit code, reached by the real command in a process of its own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from tests.e2e.command import Bench, Finished, here, process
from tests.unit.small_nets import Net


def test_success_is_0_and_json_is_all_of_standard_output(bench: Bench) -> None:
    done = process(*bench.arguments("--json"), cwd=bench.folder)
    assert done.code == 0
    assert done.err == ""
    report = json.loads(done.out)
    assert report == json.loads((bench.folder / "net.int8.report/report.json").read_text())
    assert report["parity"]["max_steps"] == 0
    assert (bench.folder / "net.int8.report/report.html").is_file()
    assert bench.output.is_file()


def test_a_wrong_request_is_2(bench: Bench) -> None:
    bench.refuses(2, "nothing.npz", do=lambda: process(*bench.arguments(calib="nothing.npz")))


def test_a_damaged_model_is_3(bench: Bench) -> None:
    bench.write(bench.model.read_bytes()[:-100])
    bench.refuses(3, "net.onnx", do=lambda: process(*bench.arguments()))


def test_a_missed_gate_is_4(bench: Bench) -> None:
    bench.refuses(4, "'head'", "99", do=lambda: process(*bench.arguments("--min-sqnr", 99, "--no-report")))


def test_what_the_target_refuses_is_5(bench: Bench) -> None:
    bench.refuses(
        5, "ort-cpu", "--include", do=lambda: process(*bench.arguments("--include", "GlobalAveragePool"))
    )


def test_too_little_memory_is_6(bench: Bench) -> None:
    bench.write(_wide())
    bench.refuses(
        6, "MiB", "--max-memory", do=lambda: process(*bench.arguments("--max-memory", 1, calib="random"))
    )


def _wide() -> bytes:
    net = Net()
    # 8 x 256 x 256 floats are 2 MiB.
    inner = net.op("Relu", "relu", net.conv("wide", "x", (8, 1, 3, 3)))
    model = net.proto({"x": [1, 1, 256, 256]}, [net.conv("last", inner, (1, 8, 1, 1))])
    return model.SerializeToString()


BROKEN = """
import sys
import onnxptq.steps as steps
from onnxptq.cli.main import main
written = steps.insert_quantizers
def damaged(graph, plan, solution):
    result = written(graph, plan, solution)
    scale = next(t for t in result.tensors().values() if t.name.endswith("_scale"))
    scale.values = scale.values * 1.5
    return result
steps.insert_quantizers = damaged
main(sys.argv[1:])
"""


def test_a_file_that_fails_its_own_checks_is_7(bench: Bench) -> None:
    def run() -> Finished:
        done = subprocess.run(
            [sys.executable, "-c", BROKEN, *map(str, bench.arguments())],
            capture_output=True,
            text=True,
            check=False,
        )
        return Finished(code=done.returncode, out=done.stdout, err=done.stderr)

    bench.refuses(7, "scale", do=run, fix=False)


def test_debug_shows_the_traceback(bench: Bench) -> None:
    done = process(*bench.arguments("--debug", calib="nothing.npz"))
    assert done.code == 2
    assert "Traceback" in done.err
    assert "FeedError" in done.err


def test_a_reader_that_leaves_is_no_disaster() -> None:
    command = f"{shlex.quote(sys.executable)} -m onnxptq quantize --help | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "U"
    assert done.stderr == ""


FILLED = """
import json, resource, sys
from onnxptq.cli.main import main
real = json.dumps
def full(value, **options):
    text = real(value, **options)
    if "notes" in value:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return text
{start}
main(sys.argv[1:])
"""


def _into_a_full_file(bench: Bench, *arguments: object, full: bool) -> Finished:
    """A limit on file sizes stands for a full disk: from the start, or from where results are printed."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))" if full else "json.dumps = full"
    with (bench.work.parent / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", FILLED.format(start=limit), *map(str, arguments)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    return Finished(code=done.returncode, out="", err=done.stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"]])
def test_a_full_standard_output_is_2(bench: Bench, arguments: list[str]) -> None:
    bench.refuses(
        2,
        "Standard output cannot be written: File too large.",
        do=lambda: _into_a_full_file(bench, *arguments, full=True),
    )


def test_a_full_standard_output_is_no_reason_to_lose_a_model(bench: Bench) -> None:
    done = bench.refuses(
        2,
        "Standard output cannot be written: File too large.",
        f"The model was written to '{bench.output}'.",
        do=lambda: _into_a_full_file(bench, *bench.arguments("--json", "--no-report"), full=False),
        keeps=False,
    )
    assert bench.output.is_file()
    assert len(done.err.splitlines()) == 2


def test_a_full_standard_output_of_inspect(bench: Bench) -> None:
    done = bench.refuses(
        2,
        "Standard output cannot be written",
        do=lambda: _into_a_full_file(bench, "inspect", bench.model, "--json", full=False),
    )
    assert "model" not in done.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["quantize", "-h"]])
def test_help_is_0(arguments: list[str], bench: Bench) -> None:
    done = here(bench.capsys, *arguments)
    assert done.code == 0
    assert done.err == ""
    assert "onnxptq" in done.out


def test_the_exit_codes_are_documented(bench: Bench) -> None:
    said = here(bench.capsys, "--help").out
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130):
        assert f"\n    {code} " in said or f"\n  {code} " in said


def test_nothing_is_said_when_quiet(bench: Bench) -> None:
    done = bench.quantize("--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_names_with_markup_are_printed_as_they_are(bench: Bench) -> None:
    model = bench.write(bench.model.read_bytes(), "[red]net.onnx")
    done = bench.quantize(model=model)
    assert done.code == 0
    assert "[red]net.int8.onnx" in done.out
