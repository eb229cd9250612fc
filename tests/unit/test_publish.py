"""Writing results completely or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxptq import publish
from onnxptq.errors import OutputPathError
from onnxptq.publish import (
    claimed_folder,
    require_writable,
    require_writable_folder,
    staging,
    write_texts,
)
from onnxptq.room import space_errors


def test_staging_moves_everything_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    with staging(target) as staged:
        staged.write_bytes(b"model")
        (staged.parent / "net.onnx.data").write_bytes(b"weights")
        assert list(tmp_path.iterdir()) == [staged.parent]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "net.onnx": b"model",
        "net.onnx.data": b"weights",
    }


def test_staging_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, place = tmp_path / "net.onnx", tmp_path / "real" / "other.onnx"
    link.symlink_to("real/other.onnx")
    for content in (b"through a dangling link", b"over a file"):
        require_writable(link)
        with staging(link) as staged:
            assert staged.parent.parent == place.parent
            staged.write_bytes(content)
        assert link.is_symlink()
        assert place.read_bytes() == content
    assert sorted(tmp_path.rglob("*")) == [link, place.parent, place]


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to(path)], ids=["pipe", "loop"])
def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], object], is_linked: bool
) -> None:
    special, path = tmp_path / "special", tmp_path / "net.onnx"
    make(special if is_linked else path)
    if is_linked:
        path.symlink_to(special)
    with pytest.raises(OutputPathError, match=r"net\.onnx' is not a regular file"):
        require_writable(path)
    with pytest.raises(OutputPathError, match="regular"), staging(path):
        pytest.fail("nothing may be written")
    with pytest.raises(OutputPathError, match="regular"):
        require_writable_folder(tmp_path, ["report.json", "net.onnx"])
    with pytest.raises(OutputPathError, match="regular"):
        write_texts(tmp_path, {"first": "", "net.onnx": ""})
    assert not path.is_file()
    assert {p.name for p in tmp_path.iterdir()} == ({"special", "net.onnx"} if is_linked else {"net.onnx"})


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("elsewhere")])
def test_large_weights_need_a_place_as_well(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "net.onnx.data")
    with pytest.raises(OutputPathError, match=r"net\.onnx\.data'.* not a regular file"):
        require_writable(tmp_path / "net.onnx")


def test_texts_follow_links(tmp_path: Path) -> None:
    (tmp_path / "report.json").symlink_to("kept.json")
    write_texts(tmp_path, {"report.json": "1"})
    assert (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "kept.json").read_text() == "1"


@pytest.mark.parametrize("name", ["net.onnx", ".net.onnx.abc.tmp", "with blank.onnx", ""])
def test_no_error_names_the_hidden_folder(tmp_path: Path, name: str) -> None:
    target = tmp_path / (name if name.endswith(".onnx") else "net.onnx")
    with pytest.raises(OutputPathError) as caught, space_errors(tmp_path), staging(target) as staged:
        raise OSError(errno.ENOSPC, "No space left on device", str(staged.parent / name))
    assert caught.value.message == f"'{target}' cannot be written: No space left on device."
    with pytest.raises(OutputPathError) as caught, staging(target) as staged:
        raise OutputPathError(f"{staged.parent / name} is full.", "Free space.")
    assert caught.value.message == f"{target} is full."


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_staging_leaves_nothing_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "net.onnx"
    target.write_bytes(b"older")

    def fail() -> None:
        with staging(target) as staged:
            staged.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"net.onnx": b"older"}


def test_two_live_folders_do_not_touch_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_SETTLED_SECONDS", -1.0)
    with claimed_folder(tmp_path, "run-") as first, claimed_folder(tmp_path, "run-") as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_living_owner_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_SETTLED_SECONDS", -1.0)
    (tmp_path / "run-dead").mkdir()
    (tmp_path / "run-file").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "run-link").symlink_to(tmp_path / "other")
    with claimed_folder(tmp_path, "run-"):
        left = {p.name for p in tmp_path.iterdir()}
    assert "run-dead" not in left
    assert {"run-file", "other", "run-link"} <= left


def test_a_folder_that_is_just_being_made_stays(tmp_path: Path) -> None:
    (tmp_path / "run-new").mkdir()
    with claimed_folder(tmp_path, "run-"):
        assert (tmp_path / "run-new").is_dir()


def test_a_killed_owner_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork() if threading.active_count() == 1 else None
    if child is None:
        pytest.skip("forking with threads around is not safe")
    if child == 0:
        context = claimed_folder(tmp_path, "run-")
        context.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(publish, "_SETTLED_SECONDS", -1.0)
    with claimed_folder(tmp_path, "run-") as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_both_texts_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a/report"
    write_texts(folder, {"one": "1", "two": "2"})
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"one": "1", "two": "2"}
    real, calls = os.fdopen, []

    def full(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OutputPathError, match="No space left"):
        write_texts(tmp_path / "b", {"one": "1", "two": "2"})
    assert not (tmp_path / "b").exists()
