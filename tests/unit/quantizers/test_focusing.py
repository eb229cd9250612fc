"""The focusing quantizer against its equations: values, gradients, and what is hardened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.quantizers.affine import (
    SMALLEST_SCALE,
    asymmetric_qparams,
    fake_quantize,
    range_of,
    shifted_qparams,
    shifted_type,
)
from onnxptq.quantizers.focusing import FocusedActivation, can_focus
from onnxptq.quantizers.straight_through import round_through
from onnxptq.types import PerAxis, PerTensor, QParams, QType

BITS = st.integers(2, 7)
STARTS = st.integers(0, 20)
ENDS = st.floats(1e-3, 1.0)


def _qparams(bits: int, start: int, high: float) -> QParams:
    qtype = shifted_type(QType.unsigned(bits))
    assert qtype is not None
    return shifted_qparams(start, high, qtype)


def _moved(learned: FocusedActivation, low: float, high: float) -> FocusedActivation:
    with torch.no_grad():
        learned.low.fill_(low)
        learned.high.fill_(high)
    return learned


def _values(seed: int, high: float, count: int = 500) -> torch.Tensor:
    """From 0 to beyond the range."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 1.4 * high, count).astype(np.float32))


@settings(max_examples=60)
@given(BITS, STARTS, ENDS, st.integers(0, 9))
def test_it_begins_as_the_grid_it_is_given(bits: int, start: int, high: float, seed: int) -> None:
    qparams = _qparams(bits, start, high)
    learned = FocusedActivation(qparams)
    found = learned.hardened()
    np.testing.assert_allclose(found.scale, qparams.scale, rtol=1e-6)
    assert (found.zero_point, found.qtype) == (qparams.zero_point, qparams.qtype)
    # In exact arithmetic the grid begins at code 0 = b1 and ends at code 2^k - 1 = b2.
    low, top = range_of(qparams)
    x = np.array([0.0, low * 0.5, top * 1.01, 3.4e38], np.float32)
    wanted = np.array([low, low, top, top])
    np.testing.assert_allclose(learned(torch.from_numpy(x)).detach().numpy(), wanted, rtol=1e-6)


@settings(max_examples=100)
@given(BITS, STARTS, ENDS, st.floats(-0.5, 0.9), st.floats(-0.5, 0.9), st.integers(0, 9))
def test_it_computes_what_it_hardens_to(
    bits: int, start: int, high: float, low_by: float, high_by: float, seed: int
) -> None:
    """Wherever the two ends are moved, out of order too."""
    learned = _moved(FocusedActivation(_qparams(bits, start, high)), low_by, high_by)
    x = _values(seed, high)
    found = learned(x).detach().numpy()
    qparams = learned.hardened()
    np.testing.assert_array_equal(found, fake_quantize(x.numpy(), qparams))
    assert qparams.scale > 0
    assert qparams.qtype.storage_limits[0] <= qparams.zero_point <= qparams.qtype.qmin


@settings(max_examples=60)
@given(BITS, st.floats(0.05, 0.5), ENDS, st.integers(0, 9))
def test_the_start_moves_by_half_a_step_at_most(bits: int, low_by: float, high: float, seed: int) -> None:
    learned = _moved(FocusedActivation(_qparams(bits, 0, high)), low_by, 0.0)
    b1, b2 = (float(end.detach()) for end in learned.ends())
    low, top = (float(end) for end in range_of(learned.hardened()))
    step = (b2 - b1) / (2**bits - 1)
    assert abs(low - b1) <= 0.5001 * step
    assert top - low == pytest.approx(b2 - b1, rel=1e-5)


@settings(max_examples=60)
@given(BITS, STARTS, ENDS, st.integers(0, 9))
def test_gradients_are_those_of_the_equations(bits: int, start: int, high: float, seed: int) -> None:
    """Against autograd on the quantizer written out with a rounding that is passed straight through."""
    learned = FocusedActivation(_qparams(bits, start, high))
    levels = 2**bits - 1
    qparams = learned.hardened()
    x = _values(seed, high)
    steps = x.double() / float(qparams.scale)
    # A value at an end of the grid, or between two points, may count for either side.
    x = x[(steps - steps.round()).abs().sub(0.25).abs() < 0.2].requires_grad_()
    weight = _values(seed + 1, 1.0)[: len(x)]
    (learned(x) * weight).sum().backward()

    b1, b2 = (torch.tensor(float(end), dtype=torch.float64, requires_grad=True) for end in range_of(qparams))
    y = x.detach().double().requires_grad_()
    s = (b2 - b1) / levels
    u = (y - b1) / s
    x_hat = torch.where(y < b1, b1, torch.where(y > b2, b2, b1 + s * round_through(u)))
    (x_hat * weight).sum().backward()
    width = float(learned._width)
    for found, wanted in ((learned.low.grad, b1.grad), (learned.high.grad, b2.grad)):
        assert found is not None
        assert wanted is not None
        assert float(found) / width == pytest.approx(float(wanted), rel=1e-4, abs=1e-2)
    assert x.grad is not None
    assert y.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), y.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("region", ["below", "inside", "above"])
def test_gradients_agree_with_finite_differences(region: str) -> None:
    """With the rounding error q - u held, as a straight-through gradient has it."""
    learned = FocusedActivation(_qparams(3, 2, 0.9))
    step = 0.1
    value = {"below": 0.13, "inside": 0.437, "above": 0.97}[region]
    x = torch.tensor([value])
    learned(x).backward()

    def x_hat(b1: float, b2: float) -> float:
        if region != "inside":
            return b1 if region == "below" else b2
        s = (b2 - b1) / 7
        held = np.rint((value - 0.2) / step) - (value - 0.2) / step
        return b1 + s * ((value - b1) / s + held)

    e = 1e-6
    slopes = (
        (x_hat(0.2 + e, 0.9) - x_hat(0.2 - e, 0.9)) / (2 * e),
        (x_hat(0.2, 0.9 + e) - x_hat(0.2, 0.9 - e)) / (2 * e),
    )
    for parameter, slope in zip((learned.low, learned.high), slopes, strict=True):
        assert parameter.grad is not None
        assert float(parameter.grad) / learned._width == pytest.approx(slope, abs=1e-5)


def test_a_step_below_zero_ends_at_zero() -> None:
    """The upper end stays where it is, and the lower one can leave again."""
    learned = _moved(FocusedActivation(_qparams(4, 0, 1.0)), -0.5, 0.0)
    found = learned(torch.tensor([0.05, 3.0]))
    assert [float(end.detach()) for end in learned.ends()] == pytest.approx([0.0, 1.0])
    assert float(found[1].detach()) == pytest.approx(1.0)
    assert float(range_of(learned.hardened())[1]) == pytest.approx(1.0)


@pytest.mark.parametrize("high_by", [-1.0, -3.0])
def test_ends_that_meet_are_held_apart(high_by: float) -> None:
    learned = _moved(FocusedActivation(_qparams(4, 5, 1.0)), 0.0, high_by)
    learned(torch.tensor([0.05, 3.0])).sum().backward()
    b1, b2 = (float(end.detach()) for end in learned.ends())
    assert b2 - b1 == pytest.approx(learned._width * 2.0**-10, rel=1e-3)
    # From here the values above draw the upper end back.
    assert learned.high.grad is not None
    assert float(learned.high.grad) > 0.0


def test_a_scale_is_never_so_small_that_kernels_slow_down() -> None:
    learned = _moved(FocusedActivation(_qparams(4, 0, 1e-16)), 0.0, -0.99)
    assert learned.hardened().scale >= np.float32(SMALLEST_SCALE)


def test_learning_finds_the_interval_that_was_used() -> None:
    """From a grid over [0, 1] to values between 0.2 and 0.6."""
    target = _values(0, 0.3, 4000) + 0.2
    learned = FocusedActivation(_qparams(3, 0, 1.0))
    optimizer = torch.optim.Adam(learned.parameters(), lr=5e-3)
    first = float((learned(target) - target).square().mean().detach())
    for _ in range(300):
        optimizer.zero_grad()
        loss = (learned(target) - target).square().mean()
        loss.backward()
        optimizer.step()
    qparams = learned.hardened()
    low, high = (float(end) for end in range_of(qparams))
    assert float(loss.detach()) < 0.25 * first
    assert 0.12 < low < 0.3
    assert 0.55 < high < 0.75
    assert qparams.zero_point < 0


def test_which_grids_can_start_above_zero() -> None:
    assert can_focus(asymmetric_qparams(0.0, 1.0, QType.unsigned(4)))
    assert can_focus(_qparams(4, 3, 1.0))
    # 255 steps leave no room in int8; a range with values below 0; a grid of a target with zero point 0 alone.
    assert not can_focus(asymmetric_qparams(0.0, 1.0, QType.unsigned(8)))
    assert not can_focus(asymmetric_qparams(-1.0, 1.0, QType.unsigned(4)))
    # A signed grid of both signs, though its range begins at 0.
    assert not can_focus(asymmetric_qparams(0.0, 1.0, QType.signed(4)))
    assert not can_focus(
        QParams(
            scale=np.asarray(0.1, np.float32),
            zero_point=np.asarray(0, np.int32),
            qtype=QType.signed(8),
            granularity=PerTensor(),
        )
    )
    per_axis = QParams(
        scale=np.ones(3, np.float32),
        zero_point=np.zeros(3, np.int32),
        qtype=QType.unsigned(4),
        granularity=PerAxis(0),
    )
    assert not can_focus(per_axis)
    with pytest.raises(ValueError, match="cannot start above 0"):
        FocusedActivation(per_axis)
