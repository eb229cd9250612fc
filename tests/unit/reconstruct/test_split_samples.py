"""Two processes that share the samples solve what one process solves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxptq.partition.score import score_blocks
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct import branches
from onnxptq.reconstruct.checkpoint import Checkpoints
from onnxptq.reconstruct.learning import FAST, Learning
from onnxptq.types import Solution
from tests.unit import rank_work
from tests.unit.reconstruct.pack_cases import Case, case, chain
from tests.unit.small_nets import attention_block, residual_block

STEPS = Learning(steps=20, batch=8, checks=4, patience=9)
SETTINGS = {
    "closed form": FAST,
    "latents": STEPS,
    "AdaRound on mixed inputs": replace(
        STEPS, weights="adaround", is_closed_form_first=False, mixing=0.5, held_out=0.0, latent_rate=3e-2
    ),
    "with the network's outputs": replace(STEPS, is_global=True),
    "Fisher weights": replace(STEPS, weighting=0.5),
    "easy samples first": replace(STEPS, is_easy_first=True),
    "low rank": replace(STEPS, weights="low-rank", is_closed_form_first=False, ranks=(2, 4), search_steps=6),
}


def _assert_same(made: Case, one: Solution, two: Solution) -> None:
    """Sums of another order change last digits; a weight that is close to a boundary may then fall on its other
    side, and take a few behind it along."""
    assert one.weights.keys() == two.weights.keys()
    assert one.qparams.keys() == two.qparams.keys()
    for name, qparams in one.qparams.items():
        np.testing.assert_allclose(two.qparams[name].scale, qparams.scale, rtol=1e-4)
        np.testing.assert_array_equal(two.qparams[name].zero_point, qparams.zero_point)
    different = total = 0
    for name, value in one.weights.items():
        different += int((np.abs(two.weights[name] - value) > 1e-3 * np.abs(value).max()).sum())
        total += value.size
    assert different <= 0.01 * total
    assert made.error(two) == pytest.approx(made.error(one), rel=0.02)


@pytest.mark.parametrize("together", [1, 4, 16])
@pytest.mark.parametrize("count", [17, 40, 600])
def test_sums_of_layers_are_those_of_one_process(
    count: int, together: int, ranks: Ranks, tmp_path: Path
) -> None:
    made = case(chain(depth=1), tmp_path, samples=count, longest=99)
    given = (made.model, made.plan, made.packs, made.samples, together)
    (alone, variance), (shared, other) = ALONE.run(rank_work.sums, *given), ranks.run(rank_work.sums, *given)
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        assert len(one) == len(two) == 2
        for a, b in zip(one, two, strict=True):
            assert a.rows == b.rows > 0
            for name in ("quantized", "mixed", "float_total", "quantized_total"):
                # Rows are multiplied in float32 and added up in float64.
                x, y = getattr(a, name), getattr(b, name)
                np.testing.assert_allclose(y, x, rtol=0, atol=1e-6 * np.abs(x).max())
    assert other == pytest.approx(variance, rel=1e-12)


def test_scores_are_those_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    made = case(residual_block(), tmp_path, samples=7)
    blocks = [block for pack in made.packs for block in pack.blocks]
    given = (made.model, blocks, made.plan, made.start)
    for count in (1, 7):
        for normalize in ("element", "sample"):
            alone = score_blocks(*given, made.samples[:count], normalize=normalize)
            shared = score_blocks(*given, made.samples[:count], normalize=normalize, ranks=ranks)
            for one, two in zip(alone, shared, strict=True):
                assert one.block == two.block
                for name in ("loss", "squared_error", "absolute_error", "curvature", "omega"):
                    assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-9)


@pytest.mark.parametrize("kind", SETTINGS)
def test_packs_are_those_of_one_process(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    made = case(chain(depth=2), tmp_path, samples=40, longest=2)
    alone, shared = (made.solved(SETTINGS[kind], ranks=each) for each in (ALONE, ranks))
    _assert_same(made, alone.solution, shared.solution)
    assert [(o.pack, o.steps) for o in alone.outcomes] == [(o.pack, o.steps) for o in shared.outcomes]
    for one, two in zip(alone.outcomes, shared.outcomes, strict=True):
        assert (two.before, two.after) == pytest.approx((one.before, one.after), rel=1e-3)
    again = made.solved(SETTINGS[kind], ranks=ranks).solution
    assert all(np.array_equal(again.weights[n], value) for n, value in shared.solution.weights.items())


def test_branches_are_those_of_one_process(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process alone decides about them; the others compute with them."""
    monkeypatch.setattr(branches, "PRICE", 0.0)
    monkeypatch.setattr(branches, "LEAST", 0.0)
    made = case(chain(depth=1, width=48), tmp_path, samples=40, activation_bits=8)
    settings = replace(FAST, adds_branches=True)
    alone, shared = (made.solved(settings, ranks=each).solution for each in (ALONE, ranks))
    assert alone.branches
    assert alone.branches.keys() == shared.branches.keys()
    for name, branch in alone.branches.items():
        assert shared.branches[name].rank == branch.rank
        assert shared.branches[name].after == pytest.approx(branch.after, rel=0.02)
    _assert_same(made, alone, shared)


@pytest.mark.parametrize("net", [residual_block, attention_block])
def test_networks_that_run_one_sample_at_a_time(net: object, ranks: Ranks, tmp_path: Path) -> None:
    made = case(net(), tmp_path, samples=20, weight_bits=4, activation_bits=8)  # type: ignore[operator]
    alone, shared = (made.solved(FAST, ranks=each).solution for each in (ALONE, ranks))
    _assert_same(made, alone, shared)


def test_fewer_samples_than_processes(ranks: Ranks, tmp_path: Path) -> None:
    """The second process has none, and helps all the same."""
    made = case(chain(depth=1), tmp_path, samples=9, longest=99)
    alone, shared = (made.solved(STEPS, ranks=each).solution for each in (ALONE, ranks))
    _assert_same(made, alone, shared)
    for name, value in alone.weights.items():
        np.testing.assert_array_equal(shared.weights[name], value)


def test_one_process_goes_on_where_two_were_stopped(ranks: Ranks, tmp_path: Path) -> None:
    made = case(chain(depth=2), tmp_path, samples=40, longest=2)
    store = Checkpoints(tmp_path / "store")
    whole = made.solved(STEPS, checkpoints=store, ranks=ranks)
    files = sorted((tmp_path / "store").iterdir())
    assert len(files) == len(made.packs)
    files[-1].unlink()
    for each in (ranks, ALONE):
        _assert_same(made, whole.solution, made.solved(STEPS, checkpoints=store, ranks=each).solution)
