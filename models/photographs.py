"""Real photographs for calibration and for held-out checks, cut from pictures that installed packages ship.

``python -m models.photographs OUT`` writes ``OUT/calib`` and ``OUT/heldout`` (square RGB JPEGs) and
``OUT/LICENCES.txt``. Few packages ship photographs that need no download, so each one is cut into several
windows; all windows of one photograph are on the same side, which keeps held-out data held out.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from models.manifest import PackageFile
from models.program import run_program
from onnxptq.errors import OutputPathError

Side = Literal["calib", "heldout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Photograph:
    """One picture, its author and terms as its package documents them, and the side that it is used on."""

    name: str
    side: Side
    author: str
    licence: str
    file: PackageFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A square cut: its side over the picture's short side, and its place in the room left, from 0 to 1."""

    scale: float
    left: float
    top: float
    is_mirrored: bool


def _skimage(name: str, side: Side, author: str, licence: str, file: str, sha256: str) -> Photograph:
    package = PackageFile(
        distribution="scikit-image", module="skimage", relative_path=f"data/{file}", sha256=sha256
    )
    return Photograph(name=name, side=side, author=author, licence=licence, file=package)


_LICENCES = "LICENCES.txt"
_PUBLIC_DOMAIN = "public domain"
_UNRESTRICTED = "no known copyright restrictions"
_CC0 = "CC0-1.0"

MANIFEST: tuple[Photograph, ...] = (
    _skimage(
        "astronaut", "calib", "NASA", _PUBLIC_DOMAIN,
        "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    ),
    _skimage(
        "rocket", "calib", "SpaceX", _PUBLIC_DOMAIN,
        "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    ),
    _skimage(
        "coffee", "calib", "Rachel Michetti", _CC0,
        "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    ),
    _skimage(
        "clock", "calib", "Stefan van der Walt", _PUBLIC_DOMAIN,
        "clock_motion.png", "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
    ),
    _skimage(
        "coins", "calib", "Brooklyn Museum", _UNRESTRICTED,
        "coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    ),
    _skimage(
        "grass", "calib", "CC0Textures", _CC0,
        "grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    ),
    _skimage(
        "gravel", "calib", "CC0Textures", _CC0,
        "gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    ),
    Photograph(
        name="hopper",
        side="calib",
        author="James S. Davis, United States Navy",
        licence=_PUBLIC_DOMAIN,
        file=PackageFile(
            distribution="matplotlib",
            module="matplotlib",
            relative_path="mpl-data/sample_data/grace_hopper.jpg",
            sha256="a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130",
        ),
    ),
    _skimage(
        "cat", "heldout", "Stefan van der Walt", _CC0,
        "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    ),
    _skimage(
        "camera", "heldout", "Lav Varshney", _CC0,
        "camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    ),
    _skimage(
        "brick", "heldout", "CC0Textures", _CC0,
        "brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    ),
    _skimage(
        "retina", "heldout", "Mikael Häggström", _CC0,
        "retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    ),
)  # fmt: skip

WINDOWS: dict[Side, tuple[Window, ...]] = {
    "calib": (
        Window(scale=1.0, left=0.5, top=0.5, is_mirrored=False),
        Window(scale=0.95, left=0.0, top=0.0, is_mirrored=True),
        Window(scale=0.85, left=1.0, top=1.0, is_mirrored=False),
        Window(scale=0.75, left=0.25, top=0.75, is_mirrored=True),
    ),
    "heldout": (
        Window(scale=1.0, left=0.5, top=0.5, is_mirrored=False),
        Window(scale=0.95, left=0.0, top=0.0, is_mirrored=True),
        Window(scale=0.85, left=1.0, top=1.0, is_mirrored=False),
        Window(scale=0.75, left=0.25, top=0.75, is_mirrored=True),
        Window(scale=0.75, left=0.75, top=0.25, is_mirrored=False),
        Window(scale=0.85, left=0.4, top=0.6, is_mirrored=True),
        Window(scale=0.9, left=1.0, top=0.0, is_mirrored=False),
        Window(scale=0.75, left=0.5, top=0.5, is_mirrored=True),
    ),
}
"""The cuts of every photograph, by side. No cut is smaller than 224 pixels of the smallest photograph."""


def cut(picture: Image.Image, window: Window) -> Image.Image:
    """The square part of ``picture`` that ``window`` describes, at the picture's own resolution."""
    side = round(min(picture.size) * window.scale)
    left = round((picture.width - side) * window.left)
    top = round((picture.height - side) * window.top)
    part = picture.crop((left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.is_mirrored else part


def write(folder: Path) -> tuple[Path, Path]:
    """Fill ``folder`` and return its calibration and held-out folders, replacing what an earlier call wrote.

    Raises:
        EnvironmentMismatchError: a package is absent or ships other pictures than the manifest's.
        OutputPathError: ``folder`` cannot be written, or holds pictures that an earlier call did not write.
    """
    foreign = [folder / side for side in WINDOWS if (folder / side).exists()]
    if foreign and not (folder / _LICENCES).is_file():
        raise OutputPathError(
            f"{foreign[0]} exists and was not written by this program.", "Choose another folder."
        )
    sources = [(photograph, photograph.file.locate()) for photograph in MANIFEST]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".photographs.") as name:
            draft = Path(name)
            for photograph, path in sources:
                _write_windows(photograph, path, draft / photograph.side)
            for side in WINDOWS:
                if (folder / side).exists():
                    shutil.rmtree(folder / side)
                (draft / side).rename(folder / side)
            (draft / _LICENCES).write_text(_licences(), encoding="utf-8")
            (draft / _LICENCES).replace(folder / _LICENCES)
    except OSError as error:
        remedy = "Choose a folder that can be written."
        raise OutputPathError(f"Cannot write {folder}: {error}", remedy) from error
    return folder / "calib", folder / "heldout"


def _write_windows(photograph: Photograph, path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with Image.open(path) as stored:
        picture = stored.convert("RGB")
    for index, window in enumerate(WINDOWS[photograph.side]):
        cut(picture, window).save(folder / f"{photograph.name}_{index}.jpg", quality=95, subsampling=0)


def _licences() -> str:
    rows = [f"{p.side}/{p.name}_*.jpg: {p.author}; {p.licence}; from {p.file.distribution}" for p in MANIFEST]
    return "\n".join(["Cut from photographs that these packages ship.", "", *rows, ""])


def _written(folder: Path) -> str:
    counts = ((part, len(list(part.iterdir()))) for part in write(folder))
    return "\n".join(f"{part}: {count} photographs" for part, count in counts)


def main(arguments: list[str]) -> int:
    """Run as a program; returns the exit code."""
    return run_program("photographs OUT_FOLDER", _written, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
