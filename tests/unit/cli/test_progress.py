"""Progress on a terminal, in a log, and when quiet."""

from __future__ import annotations

import io

import pytest
from onnxptq.cli import progress
from onnxptq.cli.progress import TerminalProgress
from rich.console import Console


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn, as on a terminal."""
    shown = io.StringIO()

    def terminal(**options: object) -> Console:
        return Console(file=shown, force_terminal=True, width=80, highlight=False)

    monkeypatch.setattr(progress, "Console", terminal)
    return shown


def test_bars_on_a_terminal(screen: io.StringIO) -> None:
    with TerminalProgress(quiet=False, verbose=False) as bars:
        step = bars.start("calibrate", 3)
        for _ in range(3):
            step()
    assert "calibrate" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_nothing_when_quiet(screen: io.StringIO) -> None:
    with TerminalProgress(quiet=True, verbose=False) as bars:
        bars.start("calibrate", 1)()
        bars.message("hello")
    assert screen.getvalue() == ""


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(quiet=False, verbose=True) as bars:
        bars.start("calibrate", 3)()
        bars.message("[note] as it is")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "calibrate (3 steps)\n[note] as it is\n"


def test_a_log_is_short_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(quiet=False, verbose=False) as bars:
        bars.start("calibrate", 3)()
        bars.message("hello")
    assert capsys.readouterr().err == ""
