"""Grids in few passes: values and gradients against the same written out in single operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.quantizers.affine import asymmetric_qparams, symmetric_qparams
from onnxptq.quantizers.straight_through import inner, passed, round_through, scaled_grid
from onnxptq.quantizers.torch_affine import fake_quantizer
from onnxptq.types import PerAxis, PerTensor, QParams, QType


def _written_out(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return round_through(x / scale).clamp(low, high) * scale


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(-9, 0), st.integers(1, 9), st.booleans())
def test_values_and_gradients_are_those_of_single_operators(
    seed: int, low: int, high: int, is_transposed: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((5, 40)).astype(np.float32) * 3)
    steps = values / 0.37
    # What rounds to an end counts as inside here, and beyond the clamp there.
    is_unclear = ((steps >= low - 0.5) & (steps <= low)) | ((steps >= high) & (steps <= high + 0.5))
    values[is_unclear] = (high - 0.3) * 0.37
    values = values.t() if is_transposed else values
    factor = torch.from_numpy(rng.standard_normal(tuple(values.shape)).astype(np.float32))
    found = []
    for function in (scaled_grid, _written_out):
        x, scale = values.clone().requires_grad_(), torch.full((1,), 0.37, requires_grad=True)
        y = function(x, scale, low, high)
        torch.autograd.backward((y * factor).sum())
        found.append((y.detach(), x.grad, scale.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    # g s / s there, g here; sums of 200 products.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-3)


def test_the_gradient_of_the_scale_holds_for_many_values() -> None:
    """The sums that it is a difference of are large; in double precision, over a million values at 8 bits."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1 << 20).astype(np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    scale = torch.full((1,), 6 / 255, requires_grad=True)
    torch.autograd.backward(scaled_grid(torch.from_numpy(x), scale, -127, 128), torch.from_numpy(g))
    s = float(scale.detach())
    u = x.astype(np.float64) / s
    slopes = np.where(
        (np.rint(u) >= -127) & (np.rint(u) <= 128), np.rint(u) - u, np.clip(np.rint(u), -127, 128)
    )
    assert scale.grad is not None
    # Rounding errors of a sum of 1e6 products of size 1 / s, which cancel but for their roundings.
    assert float(scale.grad) == pytest.approx(
        float((g * slopes).sum()), abs=1e-3 * np.abs(g * slopes).sum() ** 0.5
    )


def test_both_ends_pass() -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 0.75, 0.8])
    g = torch.arange(1.0, 6.0)
    torch.testing.assert_close(passed(g, x, -0.5, 0.75), torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0]))


def test_products_are_summed_in_any_layout() -> None:
    a, b = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    wanted = float((a.double() * b.double()).sum())
    assert float(inner(a, b)) == pytest.approx(wanted)
    permuted = a.permute(2, 0, 1), b.permute(2, 0, 1).contiguous()
    assert float(inner(*permuted)) == pytest.approx(wanted)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1)])
def test_gradients_pass_a_fixed_grid(granularity: PerTensor | PerAxis) -> None:
    """Straight through within it, not beyond: what lies in front can learn."""
    qparams: QParams = (
        asymmetric_qparams(-1.0, 2.0, QType.unsigned(4))
        if isinstance(granularity, PerTensor)
        else symmetric_qparams(np.array([1.0, 2.0, 4.0]), QType.signed(4), granularity)
    )
    x = torch.linspace(-6.0, 6.0, 60).reshape(20, 3).requires_grad_()
    y = fake_quantizer(qparams)(x)
    torch.autograd.backward(y, torch.full_like(y, 2.0))
    assert x.grad is not None
    step = torch.from_numpy(np.broadcast_to(qparams.scale, (3,)).copy())
    is_inside = (y - x).abs() <= 0.5001 * step
    torch.testing.assert_close(x.grad, 2.0 * is_inside)
    assert 5 < int(is_inside.sum()) < 55
