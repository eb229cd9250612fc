"""Trainable quantizers against the numpy quantizer, and their gradients against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.quantizers.affine import (
    SMALLEST_SCALE,
    asymmetric_qparams,
    expand,
    fake_quantize,
    quantize,
    symmetric_qparams,
)
from onnxptq.quantizers.trainable import (
    AdaRoundWeight,
    LearnedActivation,
    LearnedWeight,
    StraightThroughWeight,
)
from onnxptq.types import Array, FloatArray, Granularity, PerAxis, PerTensor, QParams, QType

BITS = st.integers(2, 8)
GRANULARITIES: Sequence[Granularity] = (PerTensor(), PerAxis(0), PerAxis(1))
SHAPE = (4, 3, 2, 2)


def _grid(weight: FloatArray, bits: int, granularity: Granularity, shrink: float) -> QParams:
    """A symmetric grid that cuts the largest weights off."""
    axes = tuple(
        i for i in range(weight.ndim) if not (isinstance(granularity, PerAxis) and i == granularity.axis)
    )
    return symmetric_qparams(shrink * np.abs(weight).max(axis=axes), QType.signed(bits), granularity)


def _drawn(
    seed: int, bits: int, granularity: Granularity, shrink: float = 0.7
) -> tuple[np.random.Generator, FloatArray, QParams, Array]:
    """Weights, their grid, and W / s."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(SHAPE).astype(np.float32)
    qparams = _grid(weight, bits, granularity, shrink)
    return rng, weight, qparams, weight / expand(qparams.scale, granularity, SHAPE).astype(np.float64)


def _on_grid(integers: Array, qparams: QParams) -> FloatArray:
    scale = expand(qparams.scale, qparams.granularity, integers.shape)
    return np.asarray(integers.astype(np.float32) * scale, np.float32)


def _hardened(learned: LearnedWeight) -> tuple[QParams, FloatArray]:
    """The hardened weight, which must be what the numpy quantizer makes of itself."""
    qparams, weight = learned.hardened()
    np.testing.assert_array_equal(fake_quantize(weight, qparams), weight)
    return qparams, weight


@settings(max_examples=60)
@given(st.integers(0, 10**6), BITS, st.sampled_from(GRANULARITIES), st.booleans())
def test_nearest_rounding_is_kept_until_something_is_learnt(
    seed: int, bits: int, granularity: Granularity, is_adaround: bool
) -> None:
    _, weight, qparams, _ = _drawn(seed, bits, granularity)
    nearest = fake_quantize(weight, qparams)
    for start in (nearest, weight):
        learned: LearnedWeight = (
            AdaRoundWeight(weight, start, qparams)
            if is_adaround
            else StraightThroughWeight(weight, start, qparams)
        )
        found, rounded = _hardened(learned)
        np.testing.assert_array_equal(rounded, nearest)
        np.testing.assert_array_equal(found.scale, qparams.scale)
        if not is_adaround:
            np.testing.assert_array_equal(learned().detach().numpy(), nearest)


@settings(max_examples=60)
@given(st.integers(0, 10**6), BITS, st.sampled_from(GRANULARITIES))
def test_latents_start_on_any_integers(seed: int, bits: int, granularity: Granularity) -> None:
    """Compensated rounding moves weights by more than one step, and the search begins there."""
    rng, weight, qparams, quotient = _drawn(seed, bits, granularity)
    qtype = qparams.qtype
    chosen = np.clip(np.rint(quotient) + rng.integers(-3, 4, SHAPE), qtype.qmin, qtype.qmax)
    start = _on_grid(chosen, qparams)
    learned = StraightThroughWeight(weight, start, qparams)
    np.testing.assert_array_equal(_hardened(learned)[1], start)
    latent = learned.latent.detach().numpy()
    is_nearest = np.abs(quotient - chosen) < 0.499
    # Single precision of latents up to 128.
    np.testing.assert_allclose(latent[is_nearest], quotient[is_nearest], rtol=0, atol=1e-5)
    assert (np.abs(latent - chosen)[np.abs(quotient - chosen) > 0.5] <= 0.25 + 1e-5).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), BITS, st.sampled_from(GRANULARITIES))
def test_adaround_starts_on_either_neighbour(seed: int, bits: int, granularity: Granularity) -> None:
    rng, weight, qparams, quotient = _drawn(seed, bits, granularity)
    qtype = qparams.qtype
    chosen = np.clip(np.floor(quotient) + rng.integers(0, 2, SHAPE), qtype.qmin, qtype.qmax)
    learned = AdaRoundWeight(weight, _on_grid(chosen, qparams), qparams)
    np.testing.assert_array_equal(_hardened(learned)[1], _on_grid(chosen, qparams))
    share, down = learned.share().detach().numpy(), np.floor(quotient)
    apart = np.abs(quotient - chosen)
    # Nearer to the middle another start takes over.
    is_nearest = apart < 0.499
    np.testing.assert_allclose(share[is_nearest], (quotient - down)[is_nearest], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [-3, -2, 2, 3])
def test_adaround_rounds_to_nearest_where_the_start_is_no_neighbour(steps: int) -> None:
    _, weight, qparams, quotient = _drawn(0, 8, PerAxis(0), shrink=1.2)
    start = _on_grid(np.rint(quotient) + steps, qparams)
    learned = AdaRoundWeight(weight, start, qparams)
    np.testing.assert_array_equal(_hardened(learned)[1], fake_quantize(weight, qparams))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [AdaRoundWeight, StraightThroughWeight])
def test_weights_beside_a_boundary_stay_on_their_side(bits: int, kind: type[LearnedWeight]) -> None:
    """All floats around every boundary of the grid, for scales that are no powers of two."""
    qtype = QType.signed(bits)
    for scale in np.float32([0.1, 0.3, 0.7, 1.1, 3.7e-3]):
        middles = (np.arange(qtype.qmin, qtype.qmax) + 0.5) * np.float64(scale)
        weight = np.concatenate(
            [middles.astype(np.float32) + k * np.spacing(middles.astype(np.float32)) for k in range(-3, 4)]
        )
        weight = weight.astype(np.float32)
        qparams = QParams(
            scale=np.asarray(scale), zero_point=np.asarray(0, np.int32), qtype=qtype, granularity=PerTensor()
        )
        down = np.floor(weight / np.float64(scale))
        for start in (fake_quantize(weight, qparams), _on_grid(down, qparams), _on_grid(down + 1, qparams)):
            np.testing.assert_array_equal(kind(weight, start, qparams).hardened()[1], start)


@settings(max_examples=30)
@given(st.integers(0, 10**6), BITS, st.sampled_from(GRANULARITIES))
def test_straight_through_gradients(seed: int, bits: int, granularity: Granularity) -> None:
    """d (s clamp(round v)) / dv = s within the grid and 0 beyond; by log s it is the value itself."""
    rng, weight, qparams, _ = _drawn(seed, bits, granularity)
    learned = StraightThroughWeight(weight, fake_quantize(weight, qparams), qparams)
    with torch.no_grad():  # some latents that wandered off
        learned.latent.add_(torch.from_numpy(rng.normal(0.0, 2.0, SHAPE).astype(np.float32)))
    latent = learned.latent.detach().numpy()
    factor = rng.standard_normal(SHAPE).astype(np.float32)
    torch.autograd.backward((learned() * torch.from_numpy(factor)).sum())
    low, high = qparams.qtype.qmin, qparams.qtype.qmax
    rounded = np.rint(latent)
    scale = expand(qparams.scale, granularity, SHAPE)
    inside = (rounded >= low) & (rounded <= high)
    assert learned.latent.grad is not None
    assert learned.scale.log.grad is not None
    np.testing.assert_allclose(learned.latent.grad, np.where(inside, factor * scale, 0.0), rtol=1e-6)
    terms = factor.astype(np.float64) * np.clip(rounded, low, high) * scale
    kept = learned.scale.log.shape
    axes = tuple(i for i in range(4) if len(kept) == 0 or kept[i] == 1)
    wanted = terms.sum(axis=axes).reshape(kept)
    # Single-precision sums of at most 48 terms of about their size.
    np.testing.assert_allclose(learned.scale.log.grad, wanted, rtol=0, atol=1e-4 * np.abs(terms).max())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_latent_within_reach_of_the_grid_can_move(bits: int, granularity: Granularity) -> None:
    """Weights that the grid cuts off saturate, and must be able to come back."""
    _, weight, qparams, quotient = _drawn(3, bits, granularity, shrink=0.5)
    assert quotient.max() > qparams.qtype.qmax + 0.5
    for start in (weight, fake_quantize(weight, qparams)):
        learned = StraightThroughWeight(weight, start, qparams)
        torch.autograd.backward(learned().sum())
        assert learned.latent.grad is not None
        assert bool((learned.latent.grad > 0.0).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adaround_gradients_are_those_of_finite_differences(granularity: Granularity) -> None:
    _, weight, qparams, quotient = _drawn(5, 4, granularity)
    # Within the grid and within (0, 1) of the rectified sigmoid the function is smooth.
    inside = np.clip(quotient, qparams.qtype.qmin + 0.1, qparams.qtype.qmax - 0.1)
    share = np.clip(inside - np.floor(inside), 0.1, 0.9)
    scale = expand(qparams.scale, granularity, SHAPE)
    weight = ((np.floor(inside) + share) * scale).astype(np.float32)
    learned = AdaRoundWeight(weight, fake_quantize(weight, qparams), qparams).double()
    latent = learned.latent.detach().clone().requires_grad_()

    def value(a: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(learned, {"latent": a}, ())

    def indecision(a: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            learned.latent.copy_(a)
        h = (torch.sigmoid(a) * 1.2 - 0.1).clamp(0.0, 1.0)
        return (1.0 - (2.0 * h - 1.0).abs() ** 8.0).sum()

    assert torch.autograd.gradcheck(value, (latent,), eps=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        value(latent).detach().numpy(), weight, rtol=0, atol=1e-6 * np.abs(weight).max()
    )
    (wanted,) = torch.autograd.grad(indecision(latent), latent)
    (found,) = torch.autograd.grad(learned.indecision(8.0), learned.latent)
    torch.testing.assert_close(found, wanted)
    assert learned.indecision(8.0).item() == pytest.approx(indecision(latent).item())


def test_indecision_is_zero_where_all_have_chosen() -> None:
    _, weight, qparams, _ = _drawn(5, 4, PerTensor())
    learned = AdaRoundWeight(weight, fake_quantize(weight, qparams), qparams)
    with torch.no_grad():
        learned.latent.copy_(torch.where(learned.latent > 0, 9.0, -9.0))
    assert learned.indecision(2.0).item() == 0.0
    np.testing.assert_array_equal(learned().detach().numpy(), _hardened(learned)[1])
    with torch.no_grad():
        learned.latent.zero_()
    assert learned.indecision(2.0).item() == weight.size


def _activation_grid(rng: np.random.Generator, bits: int, is_symmetric: bool) -> QParams:
    if is_symmetric:
        qtype = QType.signed(bits) if rng.random() < 0.5 else QType.unsigned(bits)
        return symmetric_qparams(np.asarray(rng.uniform(0.1, 3.0)), qtype, PerTensor())
    low = 0.0 if rng.random() < 0.3 else -rng.uniform(0.1, 2.0)
    return asymmetric_qparams(low, rng.uniform(0.1, 2.0), QType.unsigned(bits))


@settings(max_examples=80)
@given(st.integers(0, 10**6), BITS, st.booleans())
def test_activations_are_quantized_as_numpy_does(seed: int, bits: int, is_symmetric: bool) -> None:
    rng = np.random.default_rng(seed)
    qparams = _activation_grid(rng, bits, is_symmetric)
    learned = LearnedActivation(qparams)
    with torch.no_grad():
        learned.scale.log.fill_(rng.normal(0.0, 0.3))
    hardened = learned.hardened()
    assert hardened.zero_point is qparams.zero_point
    assert hardened.scale.shape == ()
    x = (4.0 * rng.standard_normal(500)).astype(np.float32)
    # Ties, too, and what lies beside them.
    ties = (np.arange(-20, 20, dtype=np.float32) + np.float32(0.5)) * hardened.scale
    x = np.concatenate([x, ties, np.nextafter(ties, np.float32(9.0)), np.nextafter(ties, np.float32(-9.0))])
    found = learned(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_array_equal(found, fake_quantize(x, hardened))


@settings(max_examples=40)
@given(st.integers(0, 10**6), BITS, st.booleans())
def test_activation_gradients(seed: int, bits: int, is_symmetric: bool) -> None:
    """LSQ: dx_hat/ds is round(x/s) - x/s within the grid, the integer of the end beyond it; dx_hat/dx is 1 or 0."""
    rng = np.random.default_rng(seed)
    qparams = _activation_grid(rng, bits, is_symmetric)
    learned = LearnedActivation(qparams)
    x = (2.0 * rng.standard_normal(300)).astype(np.float32)
    quotient = x / qparams.scale.astype(np.float64)
    x = x[np.abs(quotient - np.floor(quotient) - 0.5) > 1e-3]
    quotient = x / qparams.scale.astype(np.float64)
    factor = rng.standard_normal(x.shape).astype(np.float32)
    value = torch.from_numpy(x).requires_grad_()
    torch.autograd.backward((learned(value) * torch.from_numpy(factor)).sum())
    integers = np.rint(quotient) + float(qparams.zero_point)
    low, high = qparams.qtype.qmin, qparams.qtype.qmax
    inside = (integers >= low) & (integers <= high)
    slope = np.where(inside, np.rint(quotient) - quotient, np.clip(integers, low, high) - qparams.zero_point)
    assert value.grad is not None
    assert learned.scale.log.grad is not None
    np.testing.assert_array_equal(value.grad, np.where(inside, factor, 0.0))
    wanted = float((factor * slope).sum() * qparams.scale)
    # Single-precision sums of 300 terms.
    tolerance = 1e-5 * float(np.abs(factor * slope).sum() * qparams.scale)
    assert float(learned.scale.log.grad) == pytest.approx(wanted, abs=tolerance)


def test_the_learnt_scale_has_the_least_error_it_can_have() -> None:
    """Descent on E|x - x_hat|^2 ends where a fine search over scales does: the gradient points downhill."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(4000)).astype(np.float32)
    qparams = asymmetric_qparams(0.0, float(x.max()), QType.unsigned(3))

    def error(scale: float) -> float:
        grid = QParams(
            scale=np.asarray(scale, np.float32),
            zero_point=qparams.zero_point,
            qtype=qparams.qtype,
            granularity=PerTensor(),
        )
        return float(np.square(x - fake_quantize(x, grid)).mean())

    learned, value = LearnedActivation(qparams), torch.from_numpy(x)
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.mse_loss(learned(value), value))
        optimizer.step()
    best = min(error(float(qparams.scale) * f) for f in np.linspace(0.3, 1.0, 141))
    assert error(float(qparams.scale)) > 1.3 * best
    # The last steps are still of 1e-2 in log s.
    assert error(float(learned.hardened().scale)) < 1.02 * best


def test_a_scale_does_not_pass_its_largest() -> None:
    qparams = asymmetric_qparams(0.0, 6.0, QType.unsigned(4))
    learned = LearnedActivation(qparams, largest=float(qparams.scale))
    with torch.no_grad():
        learned.scale.log.fill_(0.5)
    x = torch.linspace(-1.0, 20.0, 100)
    assert learned(x).max().item() <= 6.0
    hardened = learned.hardened()
    assert hardened.scale == qparams.scale
    assert hardened.scale.dtype == np.float32
    np.testing.assert_array_equal(quantize(np.float32([6.0, 9.0]), hardened), 15)


def test_at_its_largest_scale_the_grid_ends_where_it_hardens_to() -> None:
    """s_0 exp(t) may come out a rounding above the bound that t was held to."""
    rng = np.random.default_rng(0)
    for high, wide in zip(rng.uniform(1.0, 8.0, 50), rng.uniform(1.0, 2.0, 50), strict=True):
        largest = float(asymmetric_qparams(0.0, high * wide, QType.unsigned(4)).scale)
        learned = LearnedActivation(asymmetric_qparams(0.0, high, QType.unsigned(4)), largest=largest)
        with torch.no_grad():
            learned.scale.log.fill_(3.0)
        assert learned(torch.tensor([1e6])).item() == np.float32(15) * learned.hardened().scale


@pytest.mark.parametrize("share", [1.0, 0.85])
def test_a_scale_comes_back_from_its_largest(share: float) -> None:
    """Steps that would pass the bound, then steps that want the scale smaller."""
    qparams = asymmetric_qparams(0.0, 6.0 * share, QType.unsigned(4))
    largest = float(asymmetric_qparams(0.0, 6.0, QType.unsigned(4)).scale)
    learned = LearnedActivation(qparams, largest=largest)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
    high, low = torch.full((8,), 30.0), torch.linspace(0.0, 2.0, 50)
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.mse_loss(learned(high), high))
        optimizer.step()
    assert float(learned.hardened().scale) == pytest.approx(largest)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.mse_loss(learned(low), low).mul(20.0))
        optimizer.step()
    assert float(learned.hardened().scale) < 0.8 * largest


@pytest.mark.parametrize("log", [-1e3, -50.0, 0.0, 5.0])
def test_scales_stay_positive(log: float) -> None:
    _, weight, qparams, _ = _drawn(1, 4, PerAxis(0))
    learned = StraightThroughWeight(weight, weight, qparams)
    activation = LearnedActivation(asymmetric_qparams(-1.0, 1.0, QType.unsigned(8)))
    with torch.no_grad():
        learned.scale.log.fill_(log)
        activation.scale.log.fill_(log)
    for scale in (learned.hardened()[0].scale, activation.hardened().scale):
        assert (scale >= np.float32(SMALLEST_SCALE)).all()
        assert np.isfinite(scale).all()
    _hardened(learned)


def test_scales_that_are_not_learnt_stay() -> None:
    _, weight, qparams, _ = _drawn(1, 4, PerAxis(0))
    learned = StraightThroughWeight(weight, weight, qparams, learn_scale=False)
    torch.autograd.backward(learned().sum())
    assert learned.scale.log.grad is None
    np.testing.assert_array_equal(learned.hardened()[0].scale, qparams.scale)
