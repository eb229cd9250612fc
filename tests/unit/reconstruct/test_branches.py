"""Low-rank branches in closed form, against least squares and descent on the rows themselves, and in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnxptq.graph.branches import make_branch
from onnxptq.graph.linear import find_linears
from onnxptq.graph.save import save_graph
from onnxptq.lowering import lower
from onnxptq.lowering.quantized import BranchHook, quantizing_hooks, set_hooks
from onnxptq.qdq import insert_quantizers
from onnxptq.reconstruct import branches
from onnxptq.reconstruct.branches import (
    Residual,
    branched,
    highest_rank,
    largest_branches,
    may_have_branch,
    residual,
)
from onnxptq.reconstruct.gram import Gram
from onnxptq.reconstruct.learning import FAST, Learning
from onnxptq.reconstruct.sequential import ROUNDING_DAMPING, Solve, rounded, solve_layers
from onnxptq.runtime import Session
from onnxptq.types import Array, QuantPlan, Solution
from tests.unit.reconstruct.pack_cases import Case, case, chain
from tests.unit.small_nets import NETS, Net, canonical, depthwise_block, random_samples

CHANNELS, WIDTH, RIDGE = 6, 9, 0.05


def _problem(
    *, exact: bool = False, seed: int = 0, rows: int = 600
) -> tuple[Array, Array, Array, Array, Gram]:
    """W, W' on a coarse grid, rows with strong directions, what is read instead, and the sums."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))).astype(np.float32)
    read = x if exact else (0.9 * x + 0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    gram = Gram.empty(1, WIDTH, is_mixed=not exact, has_floats=True)
    gram.add(x[None], read[None])
    weight = rng.standard_normal((CHANNELS, WIDTH)).astype(np.float32)
    return weight, np.round(weight * 2) / 2, x, read, gram


def _wanted(weight: Array, x: Array, read: Array) -> Array:
    """W* from the rows: the ridge solution about the float weight."""
    lam = RIDGE * np.square(read).sum() / WIDTH
    rows = np.concatenate([read, np.sqrt(lam) * np.eye(WIDTH)])
    return np.linalg.lstsq(rows, np.concatenate([x @ weight.T, np.sqrt(lam) * weight.T]), rcond=None)[0].T


def _loss(error: Array, move: Array, read: Array) -> float:
    """||(E - M) H^1/2||^2 from the rows."""
    lam = ROUNDING_DAMPING * np.square(read).sum() / WIDTH
    gap = error - move
    return float(np.square(read @ gap.T).sum() + lam * np.square(gap).sum())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_search_finds_a_better_branch_of_that_rank(rank: int, exact: bool) -> None:
    """Random matrices, one factor after the other by least squares, and gradient descent."""
    weight, quantized, x, read, gram = _problem(exact=exact)
    error = (weight if exact else _wanted(weight, x, read)) - quantized
    found = residual(weight[None], quantized[None], gram, RIDGE, rank)
    reached = _loss(error, found.left @ found.right, read)
    lam = ROUNDING_DAMPING * np.square(read).sum() / WIDTH
    rows = np.concatenate([read, np.sqrt(lam) * np.eye(WIDTH)])
    best = np.inf
    for seed in range(2):
        rng = np.random.default_rng(seed)
        left, right = rng.standard_normal((CHANNELS, rank)), rng.standard_normal((rank, WIDTH))
        assert _loss(error, left @ right, read) > reached
        for _ in range(150):
            basis = np.linalg.qr(left)[0]
            right = np.linalg.lstsq(rows, rows @ error.T @ basis, rcond=None)[0].T
            left = np.linalg.lstsq(rows @ right.T, rows @ error.T, rcond=None)[0].T
        best = min(best, _loss(error, left @ right, read))
    assert reached == pytest.approx(best, rel=1e-4)
    factors = [
        torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((CHANNELS, rank), (rank, WIDTH))
    ]
    descent = torch.optim.Adam([f.requires_grad_() for f in factors], 0.02)
    target, given = (torch.from_numpy(np.asarray(v, np.float32)) for v in (rows @ error.T, rows))
    for _ in range(800):
        descent.zero_grad()
        loss = (given @ (factors[0] @ factors[1]).T - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step()
    moved = (factors[0] @ factors[1]).detach().numpy()
    assert reached <= _loss(error, moved, read) * (1.0 + 1e-4)


def test_with_exact_inputs_it_is_qera() -> None:
    """SVD_r(E R^1/2) R^-1/2 with the symmetric root of the damped second moments."""
    weight, quantized, _, read, gram = _problem(exact=True)
    moments = read.T.astype(np.float64) @ read
    moments += ROUNDING_DAMPING * np.trace(moments) / WIDTH * np.eye(WIDTH)
    values, basis = np.linalg.eigh(moments)
    root = basis * np.sqrt(values) @ basis.T
    u, s, v = np.linalg.svd((weight - quantized) @ root)
    for rank in (1, 3, CHANNELS):
        found = residual(weight[None], quantized[None], gram, RIDGE, rank)
        expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
        np.testing.assert_allclose(found.left @ found.right, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("centred", [True, False])
def test_noise_is_that_of_the_rows(centred: bool) -> None:
    weight, quantized, x, read, gram = _problem()
    sums = gram.centred() if centred else gram
    found = residual(weight[None], quantized[None], sums, RIDGE, 4)
    wanted = (x - centred * x.mean(axis=0)) @ weight.T
    moved = read - centred * read.mean(axis=0)
    for rank in range(5):
        matrix = quantized + found.left[:, :rank] @ found.right[:rank]
        noise = np.square(wanted - moved @ matrix.T).sum() / np.square(wanted).sum()
        assert found.noise[rank] == pytest.approx(noise, rel=1e-3)


def test_noise_without_structure_is_not_worth_a_branch() -> None:
    """The strongest directions of independent errors hold little of them, whatever the layer's form."""
    rng = np.random.default_rng(3)
    for channels, width in ((160, 160), (64, 320), (320, 64)):
        gram = Gram.empty(1, width, is_mixed=False, has_floats=True)
        gram.add(*[np.eye(width, dtype=np.float32)[None]] * 2)
        weight = rng.standard_normal((1, channels, width)).astype(np.float32)
        most = highest_rank(channels, width)
        noisy = weight + 0.1 * rng.uniform(-1, 1, weight.shape).astype(np.float32)
        white = residual(weight, noisy, gram, RIDGE, most)
        assert white.best_rank() == 0
        assert white.noise[0] > white.noise[most] > 0.8 * white.noise[0]
        # The same noise, and two directions that hold as much again.
        strong = rng.standard_normal((channels, 2)) @ rng.standard_normal((2, width))
        strong *= 0.1 / np.sqrt(3) / np.sqrt(np.mean(np.square(strong)))
        found = residual(weight, noisy + strong[None].astype(np.float32), gram, RIDGE, most)
        assert found.best_rank() == 2
        assert found.noise[2] < 0.6 * found.noise[0]


def test_a_rank_is_worth_its_multiply_adds_and_a_branch_its_operators() -> None:
    """Of a layer of 100 by 100 each rank costs 2 %, so 0.2 dB."""

    def best(*decibels: float) -> int:
        noise = 10.0 ** (-np.array([0.0, *decibels]) / 10.0)
        left, right = np.zeros((100, len(decibels)), np.float32), np.zeros((len(decibels), 100), np.float32)
        return Residual(left=left, right=right, noise=noise).best_rank()

    assert best(1.0, 1.1, 1.2) == 1
    assert best(1.0, 1.25, 1.4) == 2
    assert best(0.1, 0.9, 1.2) == 3
    assert best(0.15, 0.3) == 0
    assert best(0.25) == 0
    assert best(0.31) == 1


def test_branches_add_a_twentieth_at_most() -> None:
    for channels, width in ((1, 1), (16, 144), (64, 576), (384, 384), (1536, 384)):
        rank = highest_rank(channels, width)
        assert rank * (channels + width) <= 0.05 * channels * width < (rank + 1) * (channels + width)
    assert highest_rank(16, 144) == 0


# ---- packs ---------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers get branches too."""
    monkeypatch.setattr(branches, "MOST", 0.5)
    monkeypatch.setattr(branches, "LEAST", 0.0)
    monkeypatch.setattr(branches, "PRICE", 0.0)


def _solve(made: Case, solve: Solve = branched) -> Solution:
    given = (made.index, made.packs[0], made.plan, made.start, made.data(), solve)
    return solve_layers(*given, settled=frozenset(), has_floats=solve is branched)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", ["residual_block", "attention_block", "vit_mlp", "max_pool_net"])
def test_layers_get_what_rounding_has_spoilt(kind: str, tmp_path: Path) -> None:
    made = case(NETS[kind](), tmp_path, longest=99, weight_bits=3, activation_bits=8, samples=24)
    plain, found = _solve(made, rounded), _solve(made)
    layers = {layer.node.name: layer for layer in find_linears(made.index)}
    assert not plain.branches
    assert list(found.branches) == [name for name, layer in layers.items() if may_have_branch(layer)]
    for name, branch in found.branches.items():
        assert 0.0 <= branch.after < branch.before
        assert branch.parameters <= 0.5 * layers[name].weight.values.size
    # Grids that are fitted leave less to the branches of few inputs: 0.78 of the noise with eight.
    assert made.error(found) < 0.8 * made.error(plain)
    again = _solve(made)
    for name, branch in found.branches.items():
        np.testing.assert_array_equal(again.branches[name].down, branch.down)
        np.testing.assert_array_equal(again.branches[name].up, branch.up)


@pytest.mark.usefixtures("free")
def test_grouped_convolutions_have_no_branch(tmp_path: Path) -> None:
    made = case(depthwise_block(), tmp_path, longest=99, weight_bits=3, activation_bits=8)
    grouped = {layer.node.name for layer in find_linears(made.index) if layer.group > 1}
    found = _solve(made)
    assert grouped
    assert found.branches
    assert not grouped & found.branches.keys()


def test_small_layers_have_no_branch(tmp_path: Path) -> None:
    made = case(NETS["residual_block"](), tmp_path, longest=99, weight_bits=2, activation_bits=8)
    found, plain = _solve(made), _solve(made, rounded)
    assert not found.branches
    for name, weight in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("steps", [0, 12])
def test_packs_behind_account_for_branches_and_steps_leave_them(steps: int, tmp_path: Path) -> None:
    made = case(chain(width=24), tmp_path, weight_bits=3, activation_bits=8, samples=64)
    settings = Learning(steps=steps, batch=8, adds_branches=True, latent_rate=0.1) if steps else FAST
    plain = made.solved(Learning(steps=steps, batch=8, latent_rate=0.1) if steps else FAST).solution
    found = made.solved(settings if steps else Learning(steps=0, adds_branches=True)).solution
    assert len(found.branches) == len(find_linears(made.index))
    # Grids that are fitted leave less to the branches of few inputs: 0.78 of the noise with eight.
    assert made.error(found) < 0.8 * made.error(plain)


def _odd_layers() -> onnx.ModelProto:
    """A strided and dilated convolution, a 1 x 1 one, a scaled Gemm with a transposed weight, and a MatMul."""
    net = Net(seed=3)
    x = net.conv("far", "x", (12, 6, 3, 2), strides=[2, 1], dilations=[1, 2], pads=[1, 0, 0, 2])
    x = net.op("Relu", "r1", net.conv("mix", x, (10, 12, 1, 1)))
    x = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", x))
    x = net.op(
        "Gemm", "gemm", x, net.weight("gemm.w", 8, 10), net.weight("gemm.b", 8), alpha=0.5, beta=2.0, transB=1
    )
    return net.proto({"x": ["n", 6, 7, 7]}, [net.linear("last", x, 8, 5)])


def test_a_branch_is_the_matrix_that_it_was_made_from(tmp_path: Path) -> None:
    """In torch and in the file: a layer with a branch computes with the sum of both matrices."""
    model = canonical(_odd_layers(), tmp_path)
    made = case(_odd_layers(), tmp_path / "case")
    rng = np.random.default_rng(0)
    parts, summed = {}, {}
    layers = find_linears(made.index)
    assert len(layers) == 4
    for layer in layers:
        weight = layer.weight.values
        flat = weight.reshape(len(weight), -1) if layer.axis == 0 else weight.T
        left = rng.standard_normal((flat.shape[0], 2)).astype(np.float32)
        right = rng.standard_normal((2, flat.shape[1])).astype(np.float32)
        total = flat + left @ right
        summed[layer.weight.name] = (
            total.reshape(weight.shape) if layer.axis == 0 else np.ascontiguousarray(total.T)
        )
        parts[layer.node.name] = make_branch(layer, left, right, before=1.0, after=0.5)
    plan = QuantPlan(target="simulate", quantizers=())
    path = tmp_path / "branched.onnx"
    save_graph(insert_quantizers(model.graph, plan, Solution(qparams={}, branches=parts)), path)
    onnx.checker.check_model(str(path), full_check=True)
    other = tmp_path / "summed.onnx"
    save_graph(insert_quantizers(model.graph, plan, Solution(qparams={}, weights=summed)), other)
    module = lower(model.graph, inputs=["x"], outputs=["last"])
    set_hooks(
        module,
        [
            hook
            for pack in made.packs
            for hook in quantizing_hooks(model.graph, pack, plan, Solution(qparams={}, branches=parts))
        ],
    )
    for feed in random_samples(model, 3):
        expected = Session(other, exact=True).run(feed)["last"]
        close = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(Session(path, exact=True).run(feed)["last"], expected, atol=close)
        with torch.no_grad():
            found = module({"x": torch.from_numpy(feed["x"])})["last"].numpy()
        np.testing.assert_allclose(found, expected, atol=close)
    module.clear_hooks()
    plain = Session(model.path, exact=True).run(feed)["last"]
    with torch.no_grad():
        found = module({"x": torch.from_numpy(feed["x"])})["last"].numpy()
    np.testing.assert_allclose(found, plain, atol=1e-4 * np.abs(plain).max())
    with pytest.raises(ValueError, match="'nowhere' is not executed"):
        set_hooks(module, [BranchHook("nowhere", lambda x: x)])


@pytest.mark.usefixtures("free")
def test_the_largest_branches_are_as_large_as_any(tmp_path: Path) -> None:
    made = case(NETS["residual_block"](), tmp_path, longest=99, weight_bits=3, activation_bits=8)
    most, found = largest_branches(made.index, made.plan), _solve(made).branches
    assert found.keys() <= most.keys()
    for name, branch in found.items():
        assert branch.rank <= most[name].rank
        assert branch.down.shape[:-1] == most[name].down.shape[:-1] or branch.down.ndim > 2
        assert not most[name].up.any()
