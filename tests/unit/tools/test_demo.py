"""The demonstration calls the installed program on what it wrote, and passes its exit code on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models import efficientnet_lite0, photographs
from onnxptq.errors import EnvironmentMismatchError
from tools import demo


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose program writes its arguments down and exits with the code in a file beside it."""
    path = tmp_path / "bin" / "onnxptq"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/arguments"\nexit "$(cat "$(dirname "$0")/code")"\n'
    )
    path.chmod(0o755)
    (path.parent / "code").write_text("0")
    monkeypatch.setattr(sys, "executable", str(path.parent / "python"))
    return path


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(output: Path) -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(b"model")
        return output

    def write(folder: Path) -> tuple[Path, Path]:
        sides = folder / "calib", folder / "heldout"
        for side in sides:
            side.mkdir()
        return sides

    monkeypatch.setattr(efficientnet_lite0, "build", build)
    monkeypatch.setattr(photographs, "write", write)


def test_the_command_reads_what_was_prepared(inputs: None, program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert demo.main([str(folder)]) == 0
    arguments = (program.parent / "arguments").read_text().split("\n")[:-1]
    assert arguments == demo.command(folder)[1:]
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    for option in ("--calib", "--eval", "--preprocess"):
        assert Path(given[option]).exists()
    assert Path(arguments[1]).exists()
    options = yaml.safe_load(Path(given["--preprocess"]).read_text())
    assert options == efficientnet_lite0.MANIFEST.preprocessing.options()


def test_it_ends_with_the_report(
    inputs: None, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main([str(tmp_path / "demo")])
    assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "demo" / "report" / demo.REPORT))


def test_failure_passes_its_exit_code_on(
    inputs: None, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (program.parent / "code").write_text("4")
    assert demo.main([str(tmp_path / "demo")]) == 4
    assert "Report:" not in capsys.readouterr().out


def test_an_absent_package_is_a_short_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(output: Path) -> Path:
        raise EnvironmentMismatchError("The package x is not installed.", "Run: make setup")

    monkeypatch.setattr(efficientnet_lite0, "build", build)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("the command must not run"))
    assert demo.main([str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == "error: The package x is not installed.\nRun: make setup\n"
