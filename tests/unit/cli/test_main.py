"""How exceptions become exit codes and messages."""

from __future__ import annotations

import click
import pytest
from onnxptq.cli import main as entry

from onnxptq import errors


def _raising(error: BaseException) -> click.Command:
    @click.command("fail")
    @click.option("--debug", is_flag=True)
    def fail(debug: bool) -> None:
        raise error

    return fail


def _run(error: BaseException, monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    monkeypatch.setitem(entry.cli.commands, "fail", _raising(error))
    with pytest.raises(SystemExit) as stopped:
        entry.main(["fail", *options])
    return stopped.value.code


ERRORS = [
    *(
        (kind("what", "how"), kind.exit_code)
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.OnnxPtqError)
    ),
    (MemoryError(), 6),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError("oops"), 1),
    (click.UsageError("no"), 2),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("options", [(), ("--debug",)], ids=["plain", "debug"])
def test_exit_codes(
    error: BaseException,
    code: int,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(error, monkeypatch, *options) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err
    is_shown = bool(options) and not isinstance(error, KeyboardInterrupt | click.UsageError)
    assert ("Traceback" in said.err) == is_shown


def _chained(outer: BaseException, cause: BaseException, *, hidden: bool = False) -> BaseException:
    try:
        try:
            raise cause
        except BaseException:
            if hidden:
                raise outer from None
            raise outer from cause
    except BaseException as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        _chained(ImportError("initialization failed"), KeyboardInterrupt()),
        _chained(ImportError("initialization failed"), KeyboardInterrupt(), hidden=True),
        _chained(
            errors.InvalidModelError("cannot load"), _chained(ImportError("numpy"), KeyboardInterrupt())
        ),
    ],
    ids=["cause", "context", "twice"],
)
def test_what_an_interruption_became_is_an_interruption(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(error, monkeypatch) == 130
    assert capsys.readouterr().err.startswith("Interrupted.")


def test_a_chain_that_runs_in_a_circle_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not errors.is_interruption(first)


def test_every_documented_code_has_a_meaning() -> None:
    used = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.OnnxPtqError)
    }
    for code in used | {0, errors.EXIT_INTERRUPTED}:
        assert f"\n  {code:<4} " in entry.EXIT_CODES or f"  {code} " in entry.EXIT_CODES


def test_messages_are_not_read_as_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(errors.FeedError("[red]odd[/name].npz", "see [bold]"), monkeypatch)
    assert capsys.readouterr().err == "error: [red]odd[/name].npz\n  fix: see [bold]\n"


def test_long_messages_are_not_broken_into_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/folder" * 60
    _run(errors.FeedError(path, "fix it"), monkeypatch)
    assert path in capsys.readouterr().err
