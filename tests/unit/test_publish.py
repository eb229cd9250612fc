"""Outputs appear complete or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from onnxptq.errors import OutputPathError
from onnxptq.publish import require_distinct, require_writable, space_errors, staging, write_texts


def test_staged_files_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with staging(target) as staged:
        assert staged.name == target.name
        staged.write_bytes(b"model")
        staged.with_name("model.onnx.data").write_bytes(b"weights")
        assert not target.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert target.read_bytes() == b"model"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_failures_leave_the_old_file(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def fail() -> None:
        with staging(target) as staged:
            staged.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_bytes() == b"old"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputPathError, match="No space left") as caught, space_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path) in caught.value.message
    with pytest.raises(FileNotFoundError), space_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")


def test_a_block_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputPathError), staging(tmp_path / "model.onnx"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_exist_or_are_files(tmp_path: Path) -> None:
    with pytest.raises(OutputPathError, match="does not exist"):
        require_writable(tmp_path / "absent" / "m.onnx")
    with pytest.raises(OutputPathError, match="is a folder"):
        require_writable(tmp_path)
    with pytest.raises(OutputPathError, match="cannot be written"), staging(tmp_path / "absent" / "m.onnx"):
        pass
    require_writable(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OutputPathError, match="cannot be written"):
            require_writable(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(b"")
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    for output in (source, link, tmp_path / "." / "m.onnx"):
        with pytest.raises(OutputPathError, match="is the input model"):
            require_distinct(source, output)
    require_distinct(source, tmp_path / "other.onnx")


def test_texts_are_written_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write_texts(folder, {"report.json": "ä", "report.html": "a"})
    write_texts(folder, {"report.json": "ö"})
    assert (folder / "report.json").read_text(encoding="utf-8") == "ö"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputPathError):
        write_texts(blocked / "in", {"a": "x"})
