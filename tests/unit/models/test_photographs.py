"""The demonstration's photographs: real, two disjoint sides, the same every time."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import photographs
from models.photographs import MANIFEST, WINDOWS, Window
from onnxptq.errors import OutputPathError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image (the demo extra) is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs")
    photographs.write(path)
    return path


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("side", ["calib", "heldout"])
def test_every_photograph_is_cut_for_its_side_only(folder: Path, side: str) -> None:
    expected = {f"{p.name}_{i}.jpg" for p in MANIFEST if p.side == side for i in range(len(WINDOWS[p.side]))}
    assert {path.name for path in (folder / side).iterdir()} == expected
    assert len(expected) >= 24


def test_no_photograph_is_on_both_sides() -> None:
    files = [p.file.sha256 for p in MANIFEST]
    names = [p.name for p in MANIFEST]
    assert len(set(files)) == len(files)
    assert len(set(names)) == len(names)


def test_cuts_are_square_large_and_different(folder: Path) -> None:
    for side in ("calib", "heldout"):
        seen = set()
        for path in (folder / side).iterdir():
            with Image.open(path) as image:
                assert image.mode == "RGB"
                assert image.width == image.height >= 224, path.name
                seen.add(image.tobytes())
        assert len(seen) == len(list((folder / side).iterdir()))


def test_a_second_call_writes_the_same(folder: Path, tmp_path: Path) -> None:
    photographs.write(tmp_path)
    before = _digests(tmp_path)
    photographs.write(tmp_path)
    assert _digests(tmp_path) == before == _digests(folder)


def test_pictures_of_others_are_not_deleted(tmp_path: Path) -> None:
    mine = tmp_path / "calib" / "mine.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"x")
    with pytest.raises(OutputPathError, match=r"calib exists"):
        photographs.write(tmp_path)
    assert _digests(tmp_path).keys() == {"calib/mine.jpg"}


def test_every_picture_has_its_terms(folder: Path) -> None:
    text = (folder / "LICENCES.txt").read_text(encoding="utf-8")
    for photograph in MANIFEST:
        assert (
            f"{photograph.side}/{photograph.name}_*.jpg: {photograph.author}; {photograph.licence};" in text
        )


def test_cut_takes_the_stated_square() -> None:
    pixels = np.arange(10 * 6, dtype=np.uint8).reshape(6, 10)  # value = 10 row + column
    window = Window(scale=0.5, left=1.0, top=1.0, is_mirrored=False)
    got = np.asarray(photographs.cut(Image.fromarray(pixels), window))
    assert got.tolist() == [[37, 38, 39], [47, 48, 49], [57, 58, 59]]
    mirrored = Window(scale=0.5, left=1.0, top=0.0, is_mirrored=True)
    assert np.asarray(photographs.cut(Image.fromarray(pixels), mirrored)).tolist()[0] == [9, 8, 7]
