"""Scores of quantized networks against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.runtime import Session
from onnxptq.trial import Quality, Trial
from onnxptq.types import CanonicalModel, QuantPlan, Sample, Solution
from tests.unit.small_nets import Net, canonical, planned, random_samples


def _scores_net() -> Any:
    net = Net()
    hidden = net.op("Relu", "hidden", net.linear("first", "x", 12, 16))
    scores = net.linear("scores", hidden, 16, 5)
    return net.proto({"x": ["n", 12]}, [scores])


def _solved(model: CanonicalModel, step: float) -> tuple[QuantPlan, Solution]:
    plan = planned(model, "simulate", activation_bits=4)
    wide = asymmetric_qparams(-8 * step, 7 * step, plan.quantizers[0].qtype)
    ranges = {q.quantizer_id: wide for q in plan.quantizers if q.role == "activation"}
    return plan, initial_solution(model.graph, plan, ranges)


def _outputs(model: CanonicalModel, plan: QuantPlan, solution: Solution, folder: Path, samples: Any) -> Any:
    path = folder / "written.onnx"
    save_graph(insert_quantizers(model.graph, plan, solution), path)
    pairs = [[Session(p).run(s)["scores"] for s in samples] for p in (model.path, path)]
    return np.concatenate(pairs[0]).astype(float), np.concatenate(pairs[1]).astype(float)


def test_score_is_the_signal_to_noise_ratio_and_rank_weighs_by_probability(tmp_path: Path) -> None:
    model = canonical(_scores_net(), tmp_path)
    samples = random_samples(model, 6)
    plan, solution = _solved(model, 0.4)
    trial = Trial(model, samples, tmp_path, "cpu")
    z, q = _outputs(model, plan, solution, tmp_path, samples)
    # Sums in another order.
    assert trial.quality(plan, solution).score == pytest.approx(
        10 * np.log10((z**2).sum() / ((z - q) ** 2).sum()), abs=1e-4
    )

    def softmax(v: np.ndarray) -> np.ndarray:
        e = np.exp(v - v.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, p_q = softmax(z), softmax(q)
    variance = ((p * z**2).sum(axis=1) - (p * z).sum(axis=1) ** 2).sum()
    divergence = (p * np.log(p / p_q)).sum()
    assert trial.quality(plan, solution).level == pytest.approx(
        10 * np.log10(variance / (2 * divergence)), abs=1e-3
    )
    assert list(tmp_path.glob("trial*")) == []


def test_finer_grids_score_higher(tmp_path: Path) -> None:
    model = canonical(_scores_net(), tmp_path)
    trial = Trial(model, random_samples(model, 6), tmp_path, "cpu")
    scores = [trial.quality(*_solved(model, step)).rank for step in (4.0, 1.0, 0.4)]
    assert scores == sorted(scores)
    assert scores[0] < scores[2]


def test_another_form_of_a_model_is_held_against_the_first(tmp_path: Path) -> None:
    """A model with other outputs scores by its distance from the reference, not from itself."""
    first = canonical(_scores_net(), tmp_path)
    samples = random_samples(first, 6)
    plan, solution = _solved(first, 0.4)
    own = Trial(first, samples, tmp_path, "cpu").quality(plan, solution).score
    other = tmp_path / "other"
    other.mkdir()
    proto = _scores_net()
    weight = proto.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, weight.name))
    second = canonical(proto, other)
    assert Trial(first, samples, tmp_path, "cpu", reference=first.path).quality(plan, solution).score == own
    assert (
        Trial(first, samples, tmp_path, "cpu", reference=second.path).quality(plan, solution).score < 10 < own
    )


def _activations(plan: QuantPlan) -> QuantPlan:
    return replace(plan, quantizers=tuple(q for q in plan.quantizers if q.role == "activation"))


@pytest.mark.parametrize(("target", "bits"), [("simulate", 4), ("ort-cpu", 8)])
def test_parameters_as_inputs_give_what_a_file_of_their_own_gives(
    tmp_path: Path, target: str, bits: int
) -> None:
    model = canonical(_scores_net(), tmp_path)
    samples = random_samples(model, 6)
    plan = _activations(planned(model, target, activation_bits=bits))
    solutions = []
    for step in (4.0, 0.4):
        # Off centre, so that a zero point that is not fed would show.
        wide = asymmetric_qparams(-8 * step, 5 * step, plan.quantizers[0].qtype)
        solutions.append(Solution(qparams={q.quantizer_id: wide for q in plan.quantizers}))
    trial = Trial(model, samples, tmp_path, "cpu")
    rank = trial.adjustable(plan, solutions[0])
    found = [[rank(solution, count) for solution in solutions] for count in (2, 6)]
    for count, ranks in zip((2, 6), found, strict=True):
        for solution, value in zip(solutions, ranks, strict=True):
            path = tmp_path / "own.onnx"
            save_graph(insert_quantizers(model.graph, plan, solution), path)
            own, plain = Session(path, exact=True), Session(model.path)
            z, q = (
                np.concatenate([s.run(x)["scores"] for x in samples[:count]]).astype(float)
                for s in (plain, own)
            )
            p, p_q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (z, q))
            variance = (p * z**2).sum(axis=1) - (p * z).sum(axis=1) ** 2
            divergence = (p * np.log(p / p_q)).sum(axis=1)
            # Fused float kernels add in another order.
            assert value == pytest.approx(10 * np.log10(variance / (2 * divergence)).mean(), abs=1e-2)
    assert found[1][0] < found[1][1]
    assert list(tmp_path.glob("trial*")) == []


def test_no_sample_is_run_twice_for_a_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = canonical(_scores_net(), tmp_path)
    plan = _activations(planned(model, "ort-cpu"))
    wide = asymmetric_qparams(-3.0, 3.0, plan.quantizers[0].qtype)
    solution = Solution(qparams={q.quantizer_id: wide for q in plan.quantizers})
    runs: list[object] = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, *given: (runs.append(self), run(self, *given))[1])
    rank = Trial(model, random_samples(model, 6), tmp_path, "cpu").adjustable(plan, solution)
    for count in (2, 2, 5):
        rank(solution, count)
    # Five of the quantized network and, at once, all six of the float one.
    assert len(runs) == 11


def test_samples_count_alike_in_the_rank(tmp_path: Path) -> None:
    """One sample whose class is lost outweighs all others in a ratio of sums, and counts as one of them in a rank."""
    model = canonical(_scores_net(), tmp_path)
    samples = random_samples(model, 6)
    samples[3] = {name: 12 * value for name, value in samples[3].items()}
    plan = _activations(planned(model, "simulate", activation_bits=8))
    # All but one are within the range.
    narrow = asymmetric_qparams(-5.0, 5.0, plan.quantizers[0].qtype)
    solution = Solution(qparams={q.quantizer_id: narrow for q in plan.quantizers})

    def measured(chosen: Sequence[Sample]) -> Quality:
        return Trial(model, chosen, tmp_path, "cpu").quality(plan, solution)

    each = [measured([sample]).rank for sample in samples]
    assert measured(samples).rank == pytest.approx(np.mean(each), abs=1e-6)
    assert measured(samples).level < np.mean(each) - 6
    assert each[3] < min(each[:3] + each[4:])
