"""The divergence of class scores of any rank, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from onnxptq.errors import UsageError
from onnxptq.lowering.output_loss import OutputLoss, choose_loss, divergence
from onnxptq.reconstruct.objective import Norms, noise_over_signal

SHAPES = [((6, 5), 1), ((2, 3, 5), 2), ((2, 5, 3, 4), 1), ((1, 5, 2, 3, 2), 1)]
"""Scores, and the axis of their classes."""

IDS = ["matrix", "tokens", "maps", "volumes"]


def _scores(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _expected(fp: torch.Tensor, q: torch.Tensor, axis: int) -> float:
    """The sum over all rows."""
    log_p, log_q = (torch.log_softmax(value.detach().double(), dim=axis) for value in (fp, q))
    return float(functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))


@pytest.mark.parametrize("is_probability", [False, True], ids=["logits", "probabilities"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=IDS)
def test_the_divergence_of_every_row(shape: tuple[int, ...], axis: int, is_probability: bool) -> None:
    fp, q = _scores(shape)
    expected = _expected(fp, q, axis)
    if is_probability:
        fp, q = fp.softmax(axis), q.softmax(axis)
    assert float(divergence(fp, q, is_probability=is_probability)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=IDS)
def test_the_loss_is_the_mean_over_rows(shape: tuple[int, ...], axis: int) -> None:
    fp, q = _scores(shape)
    rows = fp.numel() // 5
    loss = OutputLoss("kl", ("y", "z"))
    loss.add({"y": fp, "z": fp}, {"y": q})
    assert loss.value() == pytest.approx(_expected(fp, q, axis) / rows, rel=1e-9)
    loss.add({"y": fp, "z": fp}, {})
    assert loss.value() == pytest.approx(_expected(fp, q, axis) / rows / 2, rel=1e-9)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=IDS)
def test_learning_makes_the_mean_over_rows_small(shape: tuple[int, ...], axis: int) -> None:
    fp, q = _scores(shape)
    q.requires_grad_()
    found = noise_over_signal({"y": q}, {"y": fp}, Norms({"y": 1.0}, 1.0, {}, {"y": False}))
    assert found.item() == pytest.approx(2 * _expected(fp, q, axis) * 5 / fp.numel(), rel=1e-6)
    found.backward()
    # d KL / dz = softmax(z) - p
    expected = (q.softmax(axis) - fp.softmax(axis)).detach() * 2 * 5 / fp.numel()
    torch.testing.assert_close(q.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=IDS)
def test_it_is_chosen_for_matrices_and_where_it_is_asked_for(shape: tuple[int, ...], axis: int) -> None:
    scores = {"y": torch.zeros(shape), "label": torch.zeros(3, dtype=torch.int64)}
    assert choose_loss(scores, "kl") == "kl"
    assert choose_loss(scores) == ("kl" if len(shape) == 2 else "relative")
    assert choose_loss(scores, "relative") == "relative"


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 5, 1), (2, 1, 4, 4), (2, 5, 1, 1, 1, 1), ()], ids=str)
def test_what_holds_no_classes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"Output 'y' has shape .*: kl compares scores of at least two classes"
    ):
        choose_loss({"x": torch.zeros(2, 5), "y": torch.zeros(shape)}, "kl")
