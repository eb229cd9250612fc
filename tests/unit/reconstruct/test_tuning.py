"""Scales and biases of the whole network, learnt on its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxptq.partition.pack import whole_network
from onnxptq.quantizers.affine import expand
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct import packwise, tuning
from onnxptq.reconstruct.checkpoint import Checkpoints
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.objective import Norms, noise_over_signal
from onnxptq.reconstruct.packwise import Reconstruction
from onnxptq.reconstruct.training import train
from onnxptq.types import Quantizer, Solution
from tests.unit.reconstruct.pack_cases import Case, case, chain
from tests.unit.small_nets import residual_block

SOLVED = Learning(steps=2, batch=8)
TUNED = replace(SOLVED, is_tuned=True)


def _integers(made: Case, solution: Solution) -> dict[str, np.ndarray]:
    found = {}
    for quantizer in made.plan.quantizers:
        if quantizer.role == "weight":
            qparams = solution.qparams[quantizer.quantizer_id]
            value = solution.weights[quantizer.tensor]
            steps = value / expand(qparams.scale, qparams.granularity, value.shape)
            found[quantizer.tensor] = np.rint(steps)
            np.testing.assert_allclose(steps, found[quantizer.tensor], atol=1e-3)
    return found


def _scale(found: Reconstruction, quantizer: Quantizer) -> bytes:
    return found.solution.qparams[quantizer.quantizer_id].scale.tobytes()


@pytest.mark.parametrize("build", [chain, residual_block])
def test_outputs_come_closer_and_integers_stay(
    build: Callable[[], onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tuning, "TUNING", replace(tuning.TUNING, activation_scale_rate=3e-3, weight_scale_rate=3e-3)
    )
    made = case(build(), tmp_path, samples=96, weight_bits=3, activation_bits=6)
    # What rounding to nearest leaves can be taken back for certain.
    packs, tuned = (made.solved(replace(s, is_closed_form_first=False)) for s in (SOLVED, TUNED))
    assert packs.tuning is None
    assert tuned.outcomes == packs.outcomes
    assert tuned.tuning is not None
    assert 0.0 < tuned.tuning.after < tuned.tuning.before
    assert tuned.tuning.blocks == sum(len(pack.blocks) for pack in made.packs)
    assert made.error(tuned.solution) < made.error(packs.solution)
    before, after = _integers(made, packs.solution), _integers(made, tuned.solution)
    assert before.keys() == after.keys() != set()
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    moved = {q.role for q in made.plan.quantizers if _scale(tuned, q) != _scale(packs, q)}
    assert {"weight", "activation"} <= moved


def test_what_does_not_serve_unseen_samples_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = replace(tuning.TUNING, activation_scale_rate=0.5, weight_scale_rate=0.5, bias_rate=0.5, steps=7)
    monkeypatch.setattr(tuning, "TUNING", wild)
    made = case(chain(depth=2), tmp_path, samples=24, weight_bits=4, activation_bits=8)
    packs, tuned = made.solved(SOLVED), made.solved(TUNED)
    assert tuned.tuning is not None
    assert tuned.tuning.after == tuned.tuning.before
    assert all(_scale(tuned, q) == _scale(packs, q) for q in made.plan.quantizers)


def test_the_same_samples_judge_packs_and_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(*given: Any, order: Sequence[int], **options: Any) -> Any:
        seen.append(tuple(order))
        return train(*given, order=order, **options)

    monkeypatch.setattr(tuning, "train", noted)
    monkeypatch.setattr(packwise, "train", noted)
    made = case(chain(depth=2), tmp_path, samples=20)
    made.solved(TUNED)
    assert len(seen) == len(made.packs) + 1
    assert len(set(seen)) == 1
    assert sorted(seen[0]) == list(range(20)) != list(seen[0])


def test_nothing_is_tuned_without_gradient_steps(tmp_path: Path) -> None:
    made = case(chain(), tmp_path)
    assert made.solved(replace(TUNED, steps=0)).tuning is None


def test_same_seed_same_values(tmp_path: Path) -> None:
    made = case(chain(depth=2), tmp_path, samples=40)
    one, two = (made.solved(TUNED, together=9).solution for _ in range(2))
    for name, qparams in one.qparams.items():
        np.testing.assert_array_equal(two.qparams[name].scale, qparams.scale)
    for name, value in one.weights.items():
        np.testing.assert_array_equal(two.weights[name], value)


def test_a_finished_end_is_not_learnt_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(chain(depth=2), tmp_path, samples=24)
    store = Checkpoints(tmp_path / "packs")
    first = made.solved(TUNED, checkpoints=store)
    assert len(list((tmp_path / "packs").iterdir())) == len(made.packs) + 1

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("learnt again")

    monkeypatch.setattr("onnxptq.reconstruct.tuning.train", fail)
    second = made.solved(TUNED, checkpoints=store)
    assert second.tuning == first.tuning
    for name, qparams in first.solution.qparams.items():
        np.testing.assert_array_equal(second.solution.qparams[name].scale, qparams.scale)


def test_two_processes_tune_as_one(ranks: Ranks, tmp_path: Path) -> None:
    made = case(chain(depth=2), tmp_path, samples=40, longest=2)
    alone, shared = (made.solved(TUNED, ranks=each) for each in (ALONE, ranks))
    assert alone.tuning is not None
    assert shared.tuning is not None
    assert shared.tuning.steps == alone.tuning.steps
    assert shared.tuning.after == pytest.approx(alone.tuning.after, rel=1e-2)
    assert made.error(shared.solution) == pytest.approx(made.error(alone.solution), rel=0.02)


def test_all_packs_together_are_the_network(tmp_path: Path) -> None:
    made = case(residual_block(), tmp_path, longest=1)
    whole = whole_network(made.packs)
    assert whole.index == len(made.packs)
    assert whole.nodes == tuple(node for pack in made.packs for node in pack.nodes)
    assert whole.inputs == tuple(t.name for t in made.model.graph.inputs)
    assert whole.outputs == tuple(t.name for t in made.model.graph.outputs)


@pytest.mark.parametrize("is_probability", [False, True])
@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_class_scores_are_compared_by_their_divergence(spread: float, is_probability: bool) -> None:
    rng = np.random.default_rng(2)
    wanted, found = (rng.normal(0.0, spread, (7, 5)) for _ in range(2))
    variance = spread**2
    t = max(1.0, spread / 2)
    p, q = (np.exp(z / t) / np.exp(z / t).sum(axis=1, keepdims=True) for z in (wanted, found))
    expected = 2 * t**2 * (p * np.log(p / q)).sum() / 7 / variance
    given = [torch.from_numpy(z) for z in (found, wanted)]
    if is_probability:
        given = [torch.softmax(z, dim=1) for z in given]
    norms = Norms({"y": variance}, 1.0, {}, {"y": is_probability})
    assert float(noise_over_signal({"y": given[0]}, {"y": given[1]}, norms)) == pytest.approx(
        expected, rel=1e-6
    )


def test_a_high_temperature_leaves_the_noise_over_signal() -> None:
    """Up to what all classes share, which no decision depends on."""
    rng = np.random.default_rng(3)
    wanted = torch.from_numpy(rng.normal(0.0, 300.0, (50, 8)))
    noise = rng.normal(0.0, 3.0, (50, 8))
    noise -= noise.mean(axis=1, keepdims=True)
    found, variance = wanted + torch.from_numpy(noise), 1e8
    scores = Norms({"y": variance}, 1.0, {}, {"y": False})
    plain = Norms({"y": variance}, 1.0, {}, {})
    one, two = (float(noise_over_signal({"y": found}, {"y": wanted}, norms)) for norms in (scores, plain))
    assert one == pytest.approx(two, rel=0.05)


def test_it_takes_no_more_steps_than_it_is_given(tmp_path: Path) -> None:
    made = case(chain(depth=2), tmp_path, samples=24, weight_bits=3, activation_bits=6)
    found = made.solved(replace(TUNED, tuning_steps=3)).tuning
    assert found is not None
    assert found.steps == 3
