"""Packs where memory is scarce: shorter ones, and what does not fit at all is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxptq import packing
from onnxptq.recipe import Recipe
from onnxptq.types import CanonicalModel, Sensitivity
from tests.e2e.command import Bench
from tests.e2e.pack_nets import chain
from tests.unit.reconstruct.pack_cases import case


def test_a_network_that_does_not_fit_is_not_tuned(tmp_path: Path) -> None:
    made = case(chain(48), tmp_path, samples=3)
    recipe = Recipe(target="simulate", weight_bits=4, effort="balanced", max_pack_blocks=1)
    given = (made.model, made.plan, made.start, made.samples)
    folders = {"scratch": tmp_path, "work_dir": tmp_path}
    found = packing.solve_by_packs(*given, recipe.updated(max_memory=10), **folders)
    assert found.tuning is None
    wanted = re.search(r"one sample takes \d+ MiB.*\(--max-memory (\d+) would do\)", found.untuned)
    assert wanted is not None
    enough = packing.solve_by_packs(*given, recipe.updated(max_memory=int(wanted[1])), **folders)
    assert enough.untuned == ""
    assert enough.tuning is not None


def test_a_block_that_does_not_fit_is_named(bench: Bench) -> None:
    bench.write(chain(96))
    np.savez(bench.data, x=np.random.default_rng(0).standard_normal((4, 3, 96, 96)).astype(np.float32))
    done = bench.quantize(
        *("--target", "simulate", "-w", "4", "-a", "4", "--method", "pack-ptq", "--max-memory", "4"),
        *("--no-simplify", "--no-equalize", "--observer", "minmax"),
        fast=False,
    )
    assert done.code == 6
    assert "The block from" in done.err
    assert any(f"s{i}" in done.err for i in range(4))
    assert "--max-memory" in done.err
    assert not bench.output.exists()


def test_packs_get_shorter_where_memory_is_scarce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(chain(48), tmp_path, samples=3)
    seen: list[tuple[int, list[int]]] = []

    def stop(*given: Any, **_: Any) -> None:
        seen.append((max(len(pack.blocks) for pack in given[3]), list(given[6].together)))
        raise KeyboardInterrupt

    def rising(model: CanonicalModel, blocks: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Scores that make one pack of everything between the ends."""
        return tuple(
            Sensitivity(
                block=b.index,
                loss=0.0,
                squared_error=0.0,
                absolute_error=0.0,
                curvature=1.0 + b.index,
                omega=0.0,
            )
            for b in blocks
        )

    monkeypatch.setattr(packing, "reconstruct", stop)
    monkeypatch.setattr(packing, "score_blocks", rising)
    for memory in (2048, 10, 7):
        recipe = Recipe(target="simulate", weight_bits=4, method="pack-ptq", max_memory=memory)
        with pytest.raises(KeyboardInterrupt):
            packing.solve_by_packs(
                made.model, made.plan, made.start, made.samples, recipe, scratch=tmp_path, work_dir=tmp_path
            )
    longest = [length for length, _ in seen]
    assert longest[0] == 4
    assert longest[0] > longest[1] > longest[2] >= 1
    assert min(seen[0][1]) > 3 * min(seen[2][1])
