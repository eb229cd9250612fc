"""The command line as a user meets it: in a process of its own, or in this one where that is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxptq.cli.main import main

from tests.unit.small_nets import Net

ONE_SCREEN = 24
"""Lines of the smallest terminal."""

FAST = ("--no-simplify", "--method", "rtn", "--observer", "minmax")
"""For tests of everything but the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    code: int
    out: str
    err: str


def process(*arguments: object, limit: float = 120, **options: Any) -> Finished:
    """``onnxptq ARGUMENTS`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, "-m", "onnxptq", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit,
        env=environment,
        check=False,
        **options,
    )
    return Finished(code=done.returncode, out=done.stdout, err=done.stderr)


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Finished:
    """``onnxptq ARGUMENTS`` in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return Finished(code=code, out=captured.out, err=captured.err)


def classifier(
    batch: int | str = "n", *, classes: int = 10, seed: int = 0, opset: int = 21
) -> onnx.ModelProto:
    """Convolutions with a residual sum, and class scores."""
    net = Net(seed=seed, opset=opset)
    stem = net.op("Relu", "stem_relu", net.conv("stem", "x", (16, 3, 3, 3)))
    inner = net.op("Relu", "inner_relu", net.conv("inner", stem, (16, 16, 3, 3)))
    total = net.op("Add", "sum", inner, stem)
    pooled = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", total))
    head = net.op(
        "Gemm", "head", pooled, net.weight("head.w", classes, 16), net.weight("head.b", classes), transB=1
    )
    return net.proto({"x": [batch, 3, 8, 8]}, [head])


def pictures(count: int, *, seed: int = 3, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)


def save_samples(folder: Path, arrays: np.ndarray, name: str = "x") -> Path:
    """One ``.npz`` per sample."""
    folder.mkdir()
    for i, array in enumerate(arrays):
        np.savez(folder / f"{i:03d}.npz", **{name: array[None]})
    return folder


@dataclass(slots=True, kw_only=True)
class Bench:
    """A folder with a model ``net.onnx``, its calibration data ``data.npz``, and a work folder elsewhere."""

    folder: Path
    work: Path
    capsys: pytest.CaptureFixture[str]
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "net.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "data.npz"

    @property
    def output(self) -> Path:
        return self.folder / "net.int8.onnx"

    def write(self, model: onnx.ModelProto | bytes, name: str = "net.onnx") -> Path:
        path = self.folder / name
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    def quantize(
        self, *options: object, model: Path | None = None, calib: object | None = None, fast: bool = True
    ) -> Finished:
        """In this process."""
        return here(self.capsys, *self.arguments(*options, model=model, calib=calib, fast=fast))

    def arguments(
        self, *options: object, model: Path | None = None, calib: object | None = None, fast: bool = True
    ) -> tuple[object, ...]:
        given = ("--calib", self.data if calib is None else calib, "--work-dir", self.work)
        return ("quantize", model or self.model, *given, *(FAST if fast else ()), *options)

    def refuses(
        self, code: int, *said: str, do: Callable[[], Finished], fix: bool = True, keeps: bool = True
    ) -> Finished:
        """``do`` fails with ``code`` on one screen that says ``said``, and the folder stays as it was."""
        before = snapshot(self.folder)
        done = do()
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        assert done.out == ""
        assert 0 < len(done.err.splitlines()) <= ONE_SCREEN
        for text in said:
            assert text in done.err
        if fix:
            assert done.err.startswith("error: ")
            assert "\n  fix: " in done.err
        if keeps:
            assert snapshot(self.folder) == before
        assert [p.name for p in self.work.iterdir() if not p.name.startswith("calibration-")] == []
        return done


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
