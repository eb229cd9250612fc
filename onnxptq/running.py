"""What the steps of a run share: its settings and folders, its data, and what has been found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from onnxptq.bit_plan import BitPlan
from onnxptq.calibrate import cache
from onnxptq.calibrate.feeds import ImagePreprocess
from onnxptq.calibrate.products import Focus
from onnxptq.calibrate.run import DEFAULT_GROUP_BYTES
from onnxptq.errors import OutputPathError
from onnxptq.publish import claimed_folder
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe
from onnxptq.room import space_errors
from onnxptq.solving import Samples
from onnxptq.types import Feeds, Progress, QuantPlan, Solution
from onnxptq.validate.compare import Comparison
from onnxptq.validate.latency import Latency
from onnxptq.validate.parity import Parity

if TYPE_CHECKING:
    from onnxptq.packing import Packing, PackSolution


class NoteRank(IntEnum):
    """Where a note stands in the report: first what is not as it was asked for, next what was chosen and found, last
    how the model was prepared and what was reused."""

    FIRST = 0
    NEXT = 1
    LAST = 2


@dataclass(slots=True)
class Run:
    """The settings of one run and what it has noted so far."""

    recipe: Recipe
    work_dir: Path
    scratch: Path
    progress: Progress | None
    ranks: Ranks = ALONE
    noted: dict[str, NoteRank] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bit_plan: BitPlan | None = None
    bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def group_bytes(self) -> int:
        """Bytes of activations held at once."""
        return DEFAULT_GROUP_BYTES if self.recipe.max_memory is None else self.recipe.max_memory << 20

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``seconds[name]``."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def note(self, text: str, rank: NoteRank = NoteRank.NEXT) -> None:
        """Keep a remark for the report and say it."""
        if text not in self.noted:
            self.noted[text] = rank
            if self.progress:
                self.progress.message(text)

    @property
    def notes(self) -> tuple[str, ...]:
        """All remarks by rank, those of one rank in the order in which they came."""
        return tuple(sorted(self.noted, key=self.noted.__getitem__))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Calibration samples, held-out samples (None where there are none), and labels of the latter, with what names
    one of them in errors. ``preprocess`` is what pixels went through, None where there were none; ``is_random`` and
    ``is_heldout_random`` tell of made-up samples."""

    calibration: Feeds
    samples: Samples
    heldout: Feeds | None
    labels: npt.NDArray[Any] | None
    label_origin: Callable[[int], str]
    preprocess: ImagePreprocess | None
    is_random: bool
    is_heldout_random: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The final plan with its parameters, and how packs were solved, where they were; ``packing`` is there where
    packs were scored or solved, ``focuses`` where ranges of softmax outputs were chosen by their products,
    ``nearest``, the solution by rounding to nearest, where packs bettered it; ``checkpoints`` are folders of finished
    packs."""

    plan: QuantPlan
    solution: Solution
    nearest: Solution | None
    focuses: Mapping[str, Focus]
    packed: PackSolution | None
    packing: Packing | None
    checkpoints: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was proven and measured of a written file; quality is None where nothing was held out. ``branch_latency``
    is that of the file against the same without branches, None where it has none."""

    parity: Parity
    quality: Comparison | None
    layers: Comparison | None
    nearest_layers: Comparison | None
    latency: Latency
    branch_latency: Latency | None
    kernels: Mapping[str, int] | None


@contextmanager
def start(
    recipe: Recipe, work_dir: str | Path | None, progress: Progress | None, ranks: Ranks = ALONE
) -> Iterator[Run]:
    """A run with a work folder for caches and a scratch folder that is removed at the end.

    Raises:
        OutputPathError: the work folder cannot be made.
    """
    folder = Path(work_dir) if work_dir is not None else cache.default_work_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(
            f"The work folder '{folder}' cannot be written: {error.strerror or error}.",
            "Choose another with --work-dir.",
        ) from error
    with space_errors(folder), claimed_folder(folder, "onnxptq-run-") as scratch:
        yield Run(recipe=recipe, work_dir=folder, scratch=scratch, progress=progress, ranks=ranks)
