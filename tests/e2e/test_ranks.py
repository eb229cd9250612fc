"""Several processes, as torchrun starts them, through the whole product."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxptq.pipeline import Result, quantize
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe
from tests.e2e.command import Bench, classifier, pictures
from tests.unit.small_nets import Net

W4A4: dict[str, Any] = {
    "target": "simulate",
    "weight_bits": 4,
    "activation_bits": 4,
    "method": "pack-ptq",
    "simplify": False,
    "floor": None,
}


def _quantized(folder: Path, ranks: Ranks, **recipe: Any) -> Result:
    folder.mkdir()
    onnx.save(classifier(), str(folder / "net.onnx"))
    return quantize(
        folder / "net.onnx",
        folder / "out.onnx",
        calibration=[{"x": picture[None]} for picture in pictures(60)],
        recipe=Recipe(**{**W4A4, **recipe}),
        work_dir=folder / "work",
        ranks=ranks,
    )


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_two_processes_write_what_one_writes(effort: str, ranks: Ranks, tmp_path: Path) -> None:
    alone, shared = (
        _quantized(tmp_path / name, each, effort=effort)
        for name, each in (("alone", ALONE), ("shared", ranks))
    )
    assert shared.report.quantized
    assert [(q.tensor, q.bits) for q in shared.report.quantized] == [
        (q.tensor, q.bits) for q in alone.report.quantized
    ]
    assert [(p.pack, p.blocks) for p in shared.report.packs] == [
        (p.pack, p.blocks) for p in alone.report.packs
    ]
    one, two = (onnx.load(str(result.output)) for result in (alone, shared))
    assert [n.op_type for n in one.graph.node] == [n.op_type for n in two.graph.node]
    names = [t.name for t in one.graph.initializer]
    assert names == [t.name for t in two.graph.initializer]
    for a, b in zip(one.graph.initializer, two.graph.initializer, strict=True):
        x, y = onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b)
        if x.dtype == np.float32:
            # Scales: those that are learnt follow sums of another order for 300 steps.
            np.testing.assert_allclose(y, x, rtol=1e-2, atol=1e-3 * float(np.abs(x).max()))
        elif x.dtype == np.int8:
            assert np.mean(x != y) <= 0.02
            assert np.abs(x.astype(int) - y).max() <= 1
    sessions = [onnxruntime.InferenceSession(str(r.output)) for r in (alone, shared)]
    float_session = onnxruntime.InferenceSession(str(tmp_path / "alone" / "net.onnx"))
    feeds = pictures(32, seed=9)
    wanted = float_session.run(None, {"x": feeds})[0]
    noise = [float(np.square(s.run(None, {"x": feeds})[0] - wanted).mean()) for s in sessions]
    assert noise[1] == pytest.approx(noise[0], rel=0.05)


def test_two_processes_choose_the_bits_that_one_chooses(ranks: Ranks, tmp_path: Path) -> None:
    alone, shared = (
        _quantized(tmp_path / name, each, effort="fast", average_bits=4.0)
        for name, each in (("alone", ALONE), ("shared", ranks))
    )
    assert alone.report.bit_plan is not None
    assert shared.report.bit_plan == alone.report.bit_plan


def _torchrun(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "onnxptq", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def _bench(bench: Bench) -> tuple[object, ...]:
    bench.write(classifier())
    np.savez(bench.data, x=pictures(40))
    bits = ("-t", "simulate", "-w", 4, "-a", 4, "--method", "pack-ptq", "--no-simplify", "--no-report")
    return bench.arguments(*bits, fast=False)


def test_the_first_process_alone_prints_and_writes(bench: Bench) -> None:
    out, err = (process := _torchrun(*_bench(bench), "--effort", "fast")).communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("output  ") == 1
    assert "Traceback" not in err
    assert sorted(p.name for p in bench.folder.iterdir()) == ["data.npz", "net.int8.onnx", "net.onnx"]
    onnx.checker.check_model(str(bench.output))


def test_an_error_ends_all_processes_with_its_code(bench: Bench) -> None:
    arguments = _bench(bench)
    net = Net(seed=5)
    wide = net.op("Relu", "r", net.conv("a", "x", (64, 3, 3, 3)))
    bench.write(net.proto({"x": ["n", 3, 96, 96]}, [net.conv("b", wide, (4, 64, 1, 1))]))
    np.savez(bench.data, x=pictures(8, size=96))
    process = _torchrun(*arguments, "--effort", "balanced", "--max-memory", 4)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1  # torchrun's own
    assert err.count("error: ") == 1
    assert "alone needs" in err
    assert set(re.findall(r"exitcode *: (\d+)", err)) == {"6"}
    assert not bench.output.exists()


@pytest.mark.parametrize("how", ["one is killed", "all are interrupted"])
def test_processes_end_together_and_leave_nothing(how: str, bench: Bench) -> None:
    process = _torchrun(*_bench(bench), "--effort", "paper", start_new_session=True)
    limit = time.monotonic() + 120
    while not any(bench.work.glob("calibration-*.npz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)
    # Learning takes minutes from here on.
    time.sleep(2)
    if how == "one is killed":
        os.kill(_worker(process.pid), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    # torchrun interrupts the others once one is gone; they may notice it first.
    assert err.count("Interrupted. No output was written") + err.count("has ended") == 1
    assert not bench.output.exists()
    assert not list(bench.folder.glob(".*"))
    assert not list(bench.work.glob("onnxptq-run-*"))


def _worker(parent: int) -> int:
    """Rank 1 among the children of ``parent``."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(fields[1]) == parent and b"RANK=1" in environment:
                return int(folder.name)
    pytest.skip("needs /proc")
