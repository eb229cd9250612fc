"""What a full disk becomes, wherever it is met."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxptq.errors import FeedError, OutputPathError
from onnxptq.room import space_errors, temporary_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_full_disk_names_the_file(number: int) -> None:
    with pytest.raises(OutputPathError, match="some/file") as caught, space_errors(Path()):
        raise OSError(number, os.strerror(number), "some/file")
    assert "TMPDIR" in caught.value.remedy


def test_other_errors_pass(place: Path) -> None:
    with pytest.raises(FileNotFoundError), space_errors(Path()):
        raise FileNotFoundError(errno.ENOENT, "gone", "x")
    for error in (
        FileNotFoundError(errno.ENOENT, "gone"),
        FeedError("of data"),
        OutputPathError("of output"),
    ):
        with pytest.raises(type(error)) as caught, temporary_folder():
            raise error
        assert caught.value is error
    assert list(place.iterdir()) == []


def _system(folder: Path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))


def _own(folder: Path) -> OutputPathError:
    return OutputPathError(f"{folder} is full: No space left.", "Free it.")


@pytest.mark.parametrize("kind", [_system, _own])
def test_a_temporary_folder_without_room(place: Path, kind: Callable[[Path], Exception]) -> None:
    with pytest.raises(OutputPathError, match="No space left") as caught, temporary_folder() as folder:
        raise kind(folder)
    assert str(place) in caught.value.message
    assert "onnxptq-" not in caught.value.message.replace(str(place), "")
    assert "TMPDIR" in caught.value.remedy
    assert list(place.iterdir()) == []


def test_no_temporary_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "gone"))
    with pytest.raises(OutputPathError, match="gone") as caught, temporary_folder():
        pytest.fail("there is no folder")
    assert "TMPDIR" in caught.value.remedy
