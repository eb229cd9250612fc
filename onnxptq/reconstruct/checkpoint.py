"""Finished packs on disk, so that an interrupted run goes on behind the last of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxptq.types import Array, Branch, LayerRank, PackOutcome, QParams, QType, Solution

_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """The state behind a pack: everything solved so far, and the quantizers that are not to move any more."""

    solution: Solution
    settled: frozenset[str]
    outcome: PackOutcome | None


class Checkpoints:
    """One file per finished pack in a folder of its own; the folder's name stands for everything that matters.

    A file appears whole or not at all. It starts with a digest of the rest: what is damaged is as good as absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, pack: int, before: Solution, settled: Collection[str]) -> Finished | None:
        """The state behind ``pack``, given the one before it; None if there is none."""
        try:
            contents = self._path(pack).read_bytes()
        except OSError:
            return None
        digest, archive = contents[:_DIGEST], contents[_DIGEST:]
        if hashlib.sha256(archive).digest() != digest:
            return None
        qparams, weights, branches = dict(before.qparams), dict(before.weights), dict(before.branches)
        with np.load(io.BytesIO(archive), allow_pickle=False) as stored:
            header = json.loads(str(stored["header"]))
            for i, name in enumerate(header["qparams"]):
                known = qparams[name]
                qparams[name] = QParams(
                    scale=stored[f"scale_{i}"],
                    zero_point=stored[f"zero_point_{i}"],
                    qtype=QType(**header["qtypes"][i]),
                    granularity=known.granularity,
                )
            for i, name in enumerate(header["weights"]):
                weights[name] = stored[f"weight_{i}"]
            for i, (name, first, then) in enumerate(header["branches"]):
                branches[name] = Branch(
                    down=stored[f"down_{i}"], up=stored[f"up_{i}"], before=first, after=then
                )
        outcome = header["outcome"]
        return Finished(
            solution=Solution(qparams=qparams, weights=weights, branches=branches),
            settled=frozenset(settled) | frozenset(header["settled"]),
            outcome=None if outcome is None else _outcome(outcome),
        )

    def save(self, pack: int, before: Solution, settled: Collection[str], found: Finished) -> None:
        """Store what ``pack`` changed.

        Raises:
            OSError: the folder cannot be written.
        """
        qparams = [n for n, value in found.solution.qparams.items() if value is not before.qparams[n]]
        weights = [n for n, value in found.solution.weights.items() if value is not before.weights.get(n)]
        branches = {n: b for n, b in found.solution.branches.items() if b is not before.branches.get(n)}
        header: dict[str, Any] = {
            "qparams": qparams,
            "qtypes": [asdict(found.solution.qparams[name].qtype) for name in qparams],
            "weights": weights,
            "branches": [(name, branch.before, branch.after) for name, branch in branches.items()],
            "settled": sorted(found.settled - frozenset(settled)),
            "outcome": None if found.outcome is None else asdict(found.outcome),
        }
        arrays: dict[str, Array] = {"header": np.asarray(json.dumps(header))}
        for i, name in enumerate(qparams):
            arrays[f"scale_{i}"] = found.solution.qparams[name].scale
            arrays[f"zero_point_{i}"] = found.solution.qparams[name].zero_point
        arrays.update({f"weight_{i}": found.solution.weights[name] for i, name in enumerate(weights)})
        for i, branch in enumerate(branches.values()):
            arrays |= {f"down_{i}": branch.down, f"up_{i}": branch.up}
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                archive = io.BytesIO()
                np.savez(archive, **arrays)  # type: ignore[arg-type]
                file.write(hashlib.sha256(archive.getbuffer()).digest() + archive.getvalue())
            Path(name).replace(self._path(pack))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _path(self, pack: int) -> Path:
        return self._folder / f"pack_{pack:04d}.state"


def _outcome(values: dict[str, Any]) -> PackOutcome:
    """The inverse of ``asdict`` and JSON, which makes lists of tuples."""
    ranks = [
        LayerRank(**{**rank, "candidates": tuple(rank["candidates"]), "shares": tuple(rank["shares"])})
        for rank in values["ranks"]
    ]
    return PackOutcome(**{**values, "ranks": tuple(ranks)})
