"""Networks with outputs that are infinite by design: what is no number in float has no part in any decision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import onnxptq
from onnxptq.bit_plan import read_bit_plan
from onnxptq.equalize import trial as equalizing
from onnxptq.errors import UnsupportedModelError
from onnxptq.lowering.joining import can_be_joined
from onnxptq.lowering.output_loss import OutputLoss, divergence
from onnxptq.partition import score
from onnxptq.pipeline import Result
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.reconstruct.objective import Norms, noise_over_signal
from onnxptq.runtime import signal_and_noise
from onnxptq.trial import Quality, Trial
from onnxptq.types import Sample
from tests.unit.small_nets import Net, canonical, planned, random_samples

INF = math.inf


def _network(masked: bool) -> onnx.ModelProto:
    """Five classes of which the fourth is masked, or the four others alone."""
    net = Net(seed=3)
    x = net.op("Relu", "r", net.linear("a", "x", 12, 16))
    x = net.op("Relu", "s", net.linear("b", x, 16, 16))
    x = net.linear("c", x, 16, 5)
    if masked:
        mask = net.constant("mask", np.array([0, 0, 0, -np.inf, 0], np.float32))
        x = net.op("Add", "y", x, mask)
    else:
        x = net.op("Gather", "y", x, net.constant("kept", np.array([0, 1, 2, 4])), axis=1)
    return net.proto({"x": ["n", 12]}, [x])


def _samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 12)).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(_network(masked=True), str(path))
    return path


def _quantized(path: Path, **settings: Any) -> Result:
    recipe = {"target": "simulate", "weight_bits": 4, "activation_bits": 4, "simplify": False, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return onnxptq.quantize(
            path,
            path.with_name("out.onnx"),
            calibration=_samples(40),
            recipe=recipe,
            report_dir=path.parent / "report",
            work_dir=path.parent / "work",
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "pack-ptq", "steps": 10, "loss": "fisher"},
        {"method": "adaround", "steps": 10},
        {"method": "pack-ptq", "steps": 10, "loss": "global-local"},
        {"effort": "balanced", "steps": 10, "low_rank": "auto"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_packs_are_learnt_on_the_other_classes(masked: Path, settings: dict[str, Any]) -> None:
    report = _quantized(masked, **settings).report
    (output,) = report.outputs
    assert output.sqnr_db is not None
    assert output.sqnr_db > 12
    assert all(math.isfinite(value) for pack in report.packs for value in (pack.before, pack.after))
    (chosen,) = [note for note in report.notes if note.startswith("Weights by")]
    assert "100.00" not in chosen


def test_bits_are_chosen_by_the_other_classes(masked: Path) -> None:
    result = _quantized(masked, average_bits=4, method="rtn")
    assert result.report_dir is not None
    plan = read_bit_plan(result.report_dir / "plan.yaml")
    for pack in plan.packs:
        assert min(*pack.weight_loss.values(), *pack.activation_loss.values()) > 0
        assert all(map(math.isfinite, pack.sensitivity))
    assert {pack.weight_bits for pack in plan.packs} != {2}


def test_sensitivity_is_that_of_the_network_without_the_class(masked: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    onnx.save(_network(masked=False), str(bare))
    found, expected = (
        onnxptq.sensitivity(
            path,
            calibration=_samples(16),
            recipe={"target": "simulate", "weight_bits": 4, "activation_bits": 4, "simplify": False},
            work_dir=tmp_path / "work",
        )
        for path in (masked, bare)
    )
    for pack, other in zip(found.packs, expected.packs, strict=True):
        assert pack.weight_loss == pytest.approx(other.weight_loss, rel=1e-4)
    # The last block writes another tensor, whose error is a mean over one number more.
    for block, same in zip(found.blocks[:-1], expected.blocks[:-1], strict=True):
        assert block.curvature == pytest.approx(same.curvature, rel=1e-4)


def test_a_trial_is_that_of_the_network_without_the_class(tmp_path: Path) -> None:
    found: list[Quality] = []
    for is_masked in (True, False):
        folder = tmp_path / str(is_masked)
        folder.mkdir()
        model = canonical(_network(is_masked), folder)
        plan = planned(model, "simulate", activation_bits=4)
        wide = asymmetric_qparams(-4.0, 3.5, plan.quantizers[0].qtype)
        ranges = {q.quantizer_id: wide for q in plan.quantizers if q.role == "activation"}
        solution = initial_solution(model.graph, plan, ranges)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            trial = Trial(model, random_samples(model, 6), folder, "cpu")
            found.append(trial.quality(plan, solution))
    for name in ("score", "level", "rank"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name), abs=1e-3)


def test_signal_and_noise_are_over_numbers() -> None:
    reference = np.array([[1.0, -np.inf, 2.0], [np.nan, 3.0, 0.0]], np.float32)
    value = np.array([[1.5, 7.0, 2.0], [1.0, 2.0, 0.0]], np.float32)
    assert signal_and_noise(reference, value) == (14.0, 1.25)
    value[1, 2] = np.nan
    assert signal_and_noise(reference, value) == (14.0, INF)
    assert equalizing._similarity({"y": reference}, {"y": value}) == -100.0
    value[1, 2] = 0.0
    assert equalizing._similarity({"y": reference}, {"y": value}) == pytest.approx(10 * np.log10(14 / 1.25))


def _losses(kind: Any, fp: list[float], q: list[float]) -> float:
    loss = OutputLoss(kind, ["y"])
    loss.add({"y": torch.tensor([fp])}, {"y": torch.tensor([q])})
    return loss.value()


@pytest.mark.parametrize("kind", ["kl", "relative"])
@pytest.mark.parametrize("missing", [INF, -INF, math.nan])
@pytest.mark.parametrize("instead", [0.5, INF, -INF, math.nan])
def test_losses_leave_out_what_is_no_number_in_float(kind: str, missing: float, instead: float) -> None:
    expected = _losses(kind, [1.0, 2.0, 0.0], [1.5, 2.0, 0.1])
    found = _losses(kind, [1.0, missing, 2.0, 0.0], [1.5, instead, 2.0, 0.1])
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 0


@pytest.mark.parametrize("kind", ["kl", "relative"])
@pytest.mark.parametrize("lost", [INF, -INF, math.nan])
def test_a_lost_number_is_an_infinite_loss(kind: str, lost: float) -> None:
    assert _losses(kind, [1.0, 2.0, 0.0], [1.0, lost, 0.0]) == INF


@pytest.mark.parametrize("scores", [{}, {"y": False}], ids=["noise", "scores"])
def test_gradients_leave_it_out_as_well(scores: Mapping[str, bool]) -> None:
    norms = Norms({"y": 2.0}, 1.0, {}, scores)
    wanted = torch.tensor([[1.0, -INF, 2.0], [0.5, -INF, -1.0]])
    found = torch.tensor([[1.2, -INF, 1.7], [0.5, 9.0, -2.0]], requires_grad=True)
    loss = noise_over_signal({"y": found}, {"y": wanted}, norms)
    loss.backward()
    kept = found.detach()[:, [0, 2]].clone().requires_grad_()
    expected = noise_over_signal({"y": kept}, {"y": wanted[:, [0, 2]]}, norms)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.grad is not None
    torch.testing.assert_close(found.grad[:, [0, 2]], kept.grad)
    assert found.grad[:, 1].abs().max() == 0


def test_a_row_without_numbers_says_nothing() -> None:
    fp = torch.tensor([[-INF, math.nan], [1.0, 2.0]])
    q = torch.tensor([[1.0, 2.0], [1.0, 2.5]])
    assert float(divergence(fp, q, is_probability=False)) == pytest.approx(
        float(divergence(fp[1:], q[1:], is_probability=False))
    )


def test_samples_that_are_mixed_up_show_beside_infinity() -> None:
    pair = [{"x": torch.tensor([[value, -INF]])} for value in (1.0, 2.0)]
    assert can_be_joined(lambda feed: {"y": feed["x"] * 2.0}, pair)
    assert not can_be_joined(lambda feed: {"y": feed["x"].flip(0)}, pair)


def test_a_loss_that_is_not_a_number_names_the_block(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score.OutputLoss, "value", lambda _: math.nan)
    with pytest.raises(UnsupportedModelError, match=r"only the block from x to r quantized is not a number"):
        onnxptq.sensitivity(masked, calibration=_samples(8), work_dir=masked.parent / "work")
