"""Handwritten digits that scikit-learn ships, as pictures and as point sets, for the small reference models.

``python -m models.digits OUT`` writes ``OUT/pictures`` and ``OUT/points``, each with ``calib.npz`` and
``heldout.npz`` (the samples under the name of the model's input, and ``labels``).

The digits are in the order in which people wrote them, so the held-out ones at the end are by other hands.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.manifest import PackageFile
from models.program import run_program
from onnxptq.errors import OutputPathError
from onnxptq.types import FloatArray

Form = Literal["pictures", "points"]
Part = Literal["calib", "heldout"]

AUTHOR = "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998)"
LICENCE = "CC-BY-4.0"
SOURCE = PackageFile(
    distribution="scikit-learn",
    module="sklearn",
    relative_path="datasets/data/digits.csv.gz",
    sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)

CLASSES = 10
SIDE = 16
"""Pixels of a picture's side, twice those of the data."""
POINTS = 32
"""Points of a set: nearly all the ink of a digit, whose 8 x 8 pixels are white for the most part."""
HELD_OUT = 600
"""Of 1 797 digits, the last ones."""

_PIXELS = 8
_INK = 16.0
_INPUT: dict[Form, str] = {"pictures": "image", "points": "points"}
# Over the enlarged pictures that are not held out: 0.306 and 0.318.
_MEAN, _DEVIATION = 0.3, 0.32
_JITTER = 0.4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Digits:
    """Samples [count, ...] in float32 and their classes [count] in int64."""

    samples: FloatArray
    labels: npt.NDArray[np.int64]


def load(form: Form, part: Part) -> Digits:
    """One part of the digits in one form.

    pictures: [count, 1, 16, 16], ink from 0 to 1 enlarged bilinearly, mean and deviation removed.
    points: [count, 32, 3], the pixels with the most ink in random order: x and y, moved within the pixel so that
    no two distances are equal, from -1 to 1, and the ink from 0 to 1.

    Raises:
        EnvironmentMismatchError: scikit-learn is absent or ships other digits.
    """
    table = np.loadtxt(SOURCE.locate(), delimiter=",", dtype=np.float32)
    ink = table[:, :-1].reshape(-1, _PIXELS, _PIXELS) / np.float32(_INK)
    samples = _pictures(ink) if form == "pictures" else _points(ink)
    rows = slice(None, -HELD_OUT) if part == "calib" else slice(-HELD_OUT, None)
    return Digits(samples=samples[rows], labels=table[rows, -1].astype(np.int64))


def _pictures(ink: FloatArray) -> FloatArray:
    enlarged = [
        np.asarray(Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for digit in ink
    ]
    return (np.stack(enlarged)[:, None] - np.float32(_MEAN)) / np.float32(_DEVIATION)


def _points(ink: FloatArray) -> FloatArray:
    rng = np.random.default_rng(0)
    middle = (_PIXELS - 1) / 2
    sets = []
    for digit in ink.reshape(-1, _PIXELS * _PIXELS):
        chosen = rng.permutation(np.argsort(-digit, kind="stable")[:POINTS])
        row, column = np.divmod(chosen, _PIXELS)
        right, up = rng.uniform(-_JITTER, _JITTER, (2, POINTS))
        x, y = (column - middle + right) * 2 / _PIXELS, (middle - row + up) * 2 / _PIXELS
        sets.append(np.stack([x, y, digit[chosen]], axis=1))
    return np.stack(sets).astype(np.float32)


def write(folder: Path) -> tuple[Path, ...]:
    """Write both forms and both parts below ``folder`` and return the files.

    Raises:
        EnvironmentMismatchError: scikit-learn is absent or ships other digits.
        OutputPathError: ``folder`` cannot be written.
    """
    written = []
    for form, name in _INPUT.items():
        parts: tuple[Part, ...] = ("calib", "heldout")
        for part in parts:
            digits = load(form, part)
            path = folder / form / f"{part}.npz"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}")
                arrays: dict[str, Any] = {name: digits.samples, "labels": digits.labels}
                np.savez_compressed(partial, allow_pickle=False, **arrays)
                partial.replace(path)
            except OSError as error:
                remedy = "Choose a folder that can be written."
                raise OutputPathError(f"Cannot write {path}: {error}", remedy) from error
            written.append(path)
    return tuple(written)


def main(arguments: list[str]) -> int:
    """Run as a program; returns the exit code."""
    return run_program("digits OUT_FOLDER", lambda folder: "\n".join(map(str, write(folder))), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
