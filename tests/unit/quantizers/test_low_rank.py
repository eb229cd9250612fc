"""Weights that are learnt through low-rank terms: where they start, what moves them, what they harden to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxptq.quantizers.affine import expand, fake_quantize, symmetric_qparams
from onnxptq.quantizers.low_rank import Factors, LowRankWeight
from onnxptq.types import FloatArray, Granularity, PerAxis, PerTensor, QParams, QType

RNG = np.random.default_rng(3)
CASES: dict[str, tuple[tuple[int, ...], bool, Granularity]] = {
    "Gemm": ((6, 8), False, PerAxis(0)),
    "MatMul": ((8, 6), True, PerAxis(1)),
    "Conv": ((6, 2, 2, 2), False, PerAxis(0)),
    "one scale": ((6, 8), False, PerTensor()),
}


def _factors(rank: int, is_transposed: bool, size: float = 0.1) -> Factors:
    left = (size * RNG.standard_normal((6, rank))).astype(np.float32)
    right = RNG.standard_normal((rank, 8)).astype(np.float32)
    return Factors(left=left, right=right, is_transposed=is_transposed)


def _grid(weight: FloatArray, granularity: Granularity) -> QParams:
    kept = granularity.axis if isinstance(granularity, PerAxis) else None
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != kept))
    return symmetric_qparams(1.2 * np.asarray(largest), QType.signed(4), granularity)


def _merged(weight: FloatArray, factors: Factors) -> FloatArray:
    move = factors.left @ factors.right
    return weight + (move.T if factors.is_transposed else move).reshape(weight.shape)


@pytest.mark.parametrize("kind", CASES)
def test_it_starts_with_the_correction_merged(kind: str) -> None:
    shape, is_transposed, granularity = CASES[kind]
    weight = RNG.standard_normal(shape).astype(np.float32)
    qparams, factors = _grid(weight, granularity), _factors(3, is_transposed)
    learned = LowRankWeight(weight, weight, qparams, [factors])
    found, value = learned.hardened()
    expected = fake_quantize(_merged(weight, factors), qparams)
    assert not np.array_equal(expected, fake_quantize(weight, qparams))
    # Products in another order decide ties the other way.
    assert np.mean(value != expected) < 0.02
    np.testing.assert_array_equal(fake_quantize(value, found), value)
    np.testing.assert_array_equal(learned().detach().numpy(), value)


def test_the_strongest_part_comes_first() -> None:
    u, s, v = np.linalg.svd(RNG.standard_normal((6, 8)).astype(np.float32), full_matrices=False)
    factors = Factors(left=u * s, right=v)
    for rank in (1, 4, 6):
        part = factors.truncated(rank)
        assert part.rank == rank
        np.testing.assert_allclose(part.product(), (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-5, atol=1e-6)


def test_a_part_that_is_zero_adds_nothing() -> None:
    weight = RNG.standard_normal((6, 8)).astype(np.float32)
    factors = _factors(3, False)
    right = factors.right.copy()
    right[1] = 0.0
    kept = Factors(left=factors.left[:, [0, 2]], right=right[[0, 2]])
    qparams = _grid(weight, PerAxis(0))
    learned = LowRankWeight(weight, weight, qparams, [Factors(left=factors.left, right=right)])
    wanted = LowRankWeight(weight, weight, qparams, [kept])
    np.testing.assert_allclose(
        learned.correction().detach().numpy(), wanted.correction().detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_only_factors_and_scales_move() -> None:
    weight = RNG.standard_normal((6, 8)).astype(np.float32)
    learned = LowRankWeight(weight, weight, _grid(weight, PerAxis(0)), [_factors(3, False)])
    moving = [p for p in learned.parameters() if p.requires_grad]
    assert {id(p) for p in moving} == {id(p) for p in (*learned.latents, learned.scale.log)}
    assert len(learned.latents) == 2


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_those_of_the_merged_weight(kind: str) -> None:
    """d loss / dL = s/s_0 (d loss / dW_hat) R^T where the grid does not end, and likewise for R."""
    shape, is_transposed, granularity = CASES[kind]
    weight = RNG.standard_normal(shape).astype(np.float32)
    qparams, factors = _grid(weight, granularity), _factors(3, is_transposed)
    learned = LowRankWeight(weight, weight, qparams, [factors])
    upstream = RNG.standard_normal(shape).astype(np.float32)
    (learned() * torch.from_numpy(upstream)).sum().backward()
    scale = expand(qparams.scale, granularity, shape)
    inside = np.rint(_merged(weight, factors) / scale)
    inside = (inside >= qparams.qtype.qmin) & (inside <= qparams.qtype.qmax)
    flow = np.where(inside, upstream, 0.0)
    flow = flow.T if is_transposed else flow.reshape(6, 8)
    left, right = (p.detach().numpy() for p in learned.latents)
    # Whatever units the parameters are kept in, L R is left * right * unit / sqrt(r).
    unit = factors.left[0] @ factors.right[:, 0] / (left[0] @ right[:, 0])
    grads = [p.grad.numpy() for p in learned.latents if p.grad is not None]
    np.testing.assert_allclose(grads[0], unit * flow @ right.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(grads[1], unit * left.T @ flow, rtol=1e-3, atol=1e-4)


def test_a_step_of_one_size_moves_weights_of_any_size_and_rank_alike() -> None:
    """In steps of the grid, which is why one learning rate serves all layers."""
    moves = []
    for size, rank in ((1.0, 2), (1e-3, 2), (1.0, 6)):
        weight = (size * RNG.standard_normal((6, 8))).astype(np.float32)
        learned = LowRankWeight(
            weight, weight, _grid(weight, PerAxis(0)), [_factors(rank, False, 0.1 * size)]
        )
        before = learned.correction().detach()
        with torch.no_grad():
            learned.latents[0].add_(0.01 * torch.sign(torch.randn(6, rank)))
        moves.append(float((learned.correction().detach() - before).square().mean().sqrt()))
    assert max(moves) < 3.0 * min(moves)
    assert 0.003 < moves[0] < 0.03


def test_candidates_are_added_up_by_their_shares() -> None:
    weight = RNG.standard_normal((6, 8)).astype(np.float32)
    qparams = _grid(weight, PerAxis(0))
    candidates = [_factors(rank, False) for rank in (1, 2, 4)]
    learned = LowRankWeight(weight, weight, qparams, candidates)
    scale = expand(qparams.scale, PerAxis(0), weight.shape)
    with torch.no_grad():
        learned.alpha.copy_(torch.log(torch.tensor([0.5, 0.2, 0.3])))
    expected = sum(p * f.product() for p, f in zip((0.5, 0.2, 0.3), candidates, strict=True)) / scale
    np.testing.assert_allclose(learned.correction().detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        learned.kept.copy_(torch.tensor([0.0, 2.0, 0.0]))
    np.testing.assert_allclose(
        learned.correction().detach().numpy(), 2 * 0.2 * candidates[1].product() / scale, rtol=1e-4, atol=1e-5
    )
    learned.eval()
    np.testing.assert_allclose(learned.correction().detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_made_up_for_on_average() -> None:
    weight = RNG.standard_normal((6, 8)).astype(np.float32)
    learned = LowRankWeight(weight, weight, _grid(weight, PerAxis(0)), [_factors(2, False) for _ in range(5)])
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        learned.drop(0.25, generator)
        seen.append(learned.kept.clone())
    assert torch.unique(torch.stack(seen)).tolist() == pytest.approx([0.0, 4 / 3])
    # Four standard deviations of a mean of 10 000 draws.
    assert float(torch.stack(seen).mean()) == pytest.approx(1.0, abs=0.024)
    learned.drop(0.0, generator)
    assert torch.equal(learned.kept, torch.ones(5))
