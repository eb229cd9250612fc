"""The pieces by themselves: label layouts, classes, noise terms and the choice of factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from onnxptq.equalize.factors import choose
from onnxptq.equalize.gains import channel_gains
from onnxptq.equalize.noise import ActivationTerm, WeightTerm, total_noise
from onnxptq.equalize.observe import Spread, observe
from onnxptq.equalize.trial import Trial
from onnxptq.graph import layouts
from onnxptq.graph.classes import Classes
from onnxptq.graph.index import GraphIndex
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, symmetric_qparams
from onnxptq.runtime import concrete_shapes
from onnxptq.types import CanonicalModel, PerAxis, QType
from tests.unit.equalize.equalize_helpers import Samples, canonical, samples_for, traced
from tests.unit.graph.graph_helpers import build, node

SHAPES = [
    ((2, 12, 5), (2, 3, 4, 5)),
    ((2, 3, 4, 5), (2, 12, 5)),
    ((1, 24), (12, 2)),
    ((6, 1, 4), (6, 4)),
    ((4, 6), (1, 2, 12)),
    ((3, 2, 2), (12,)),
    ((2, 3), (2, 1, 3, 1)),
]


@pytest.mark.parametrize(("before", "after"), SHAPES, ids=str)
def test_reshape_of_labels_is_reshape(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for mask in range(2 ** len(before)):
        shape = [n if mask >> a & 1 else 1 for a, n in enumerate(before)]
        labels = layouts.flatten_constant_axes(rng.integers(0, 50, shape))
        found = layouts.reshape(labels, before, after)
        expected = np.broadcast_to(labels, before).reshape(after)
        np.testing.assert_array_equal(np.broadcast_to(found, after), expected)


def test_reshape_keeps_flat_axes_flat() -> None:
    labels = np.arange(48).reshape(1, 48, 1, 1)
    assert layouts.reshape(labels, (7, 48, 500, 500), (7, 2, 24, 250_000)).shape == (1, 2, 24, 1)


def test_joined_literals_have_one_factor_and_joined_inverses_the_inverse() -> None:
    classes = Classes()
    a, b = classes.fresh((3,)), classes.fresh((3,))
    classes.join(a, b ^ 1)
    factors = dict(zip((a // 2).tolist(), np.log([2.0, 4.0, 8.0]), strict=True))
    np.testing.assert_allclose(classes.factors(a, factors), [2, 4, 8])
    np.testing.assert_allclose(classes.factors(b, factors), [1 / 2, 1 / 4, 1 / 8])


def test_joining_spreads_pins_and_keeps_the_first_reason() -> None:
    classes = Classes()
    a, b, c = (classes.fresh((1,)) for _ in range(3))
    classes.pin(b, "first")
    classes.pin(c, "second")
    classes.join(a, b)
    classes.join(a, c)
    assert [classes.reason(classes.find(int(v[0]) ^ side)) for v in (a, b, c) for side in (0, 1)] == [
        "first"
    ] * 6
    assert not classes.all_pinned(classes.fresh((2,)))


def activation(seed: int, *, symmetric: bool = False) -> ActivationTerm:
    rng = np.random.default_rng(seed)
    return ActivationTerm(
        name="t",
        index=np.array([0, 1, 2, -1]),
        sign=np.array([1.0, -1.0, 1.0, 1.0]),
        low=-rng.random(4),
        high=rng.random(4) * 2,
        gain=rng.random(4),
        tail_low=rng.random(4) / 5,
        tail_high=np.array([0.1, 0.0, 0.3, 0.2]),
        risk=rng.random(4) / 10,
        symmetric=symmetric,
    )


def weight(seed: int) -> WeightTerm:
    rng = np.random.default_rng(seed)
    return WeightTerm(
        name="w",
        index=np.array([2, 1, -1]),
        sign=np.array([1.0, -1.0, 1.0]),
        absmax=rng.random((5, 3)),
        gain=rng.random(5),
        energy=rng.random(3),
    )


@pytest.mark.parametrize("p", [8, 32])
@pytest.mark.parametrize(
    "term", [activation(0), activation(1, symmetric=True), weight(2)], ids=["u8", "s8", "weight"]
)
def test_gradients(term: ActivationTerm | WeightTerm, p: int) -> None:
    x = np.random.default_rng(3).normal(size=3) * 0.3
    noise = term.smooth(p)
    value, slope = noise(x)
    numeric = approx_fprime(x, lambda v: noise(v)[0], 1e-7)
    # Forward differences with a step of 1e-7 are good to about 1e-6 of the value.
    np.testing.assert_allclose(slope, numeric, atol=2e-6 * max(value, 1e-3))


@pytest.mark.parametrize(
    "term", [activation(0), activation(1, symmetric=True), weight(2)], ids=["u8", "s8", "weight"]
)
def test_norms_of_high_order_are_maxima(term: ActivationTerm | WeightTerm) -> None:
    if isinstance(term, ActivationTerm):  # clipping gets less where the range gets wider
        term = replace(term, risk=np.zeros_like(term.risk))
    x = np.random.default_rng(3).normal(size=3)
    # A p-norm of n numbers exceeds the largest by at most n^(1/p), which enters squared: 4.4 % for n = 4.
    assert term.noise(x) <= term.smooth(64)(x)[0] <= term.noise(x) * 4 ** (2 / 64)


def test_rounding_noise_is_what_quantizers_make() -> None:
    """Monte Carlo: mean square error of quantizing x / s, times s^2, weighed by gain."""
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 5.0, 20.0])
    x = (rng.uniform(-1, 1, (200_000, 3)) * spread).astype(np.float32)
    gain = np.array([1.0, 0.2, 3.0])
    log_s = np.log([0.5, 1.0, 3.0])
    zero = np.zeros(3)
    term = ActivationTerm(
        name="t", index=np.arange(3), sign=np.ones(3), low=x.min(axis=0), high=x.max(axis=0), gain=gain,
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    scaled = (x / np.exp(log_s)).astype(np.float32)
    qparams = asymmetric_qparams(float(scaled.min()), float(scaled.max()), QType.unsigned(8))
    error = (fake_quantize(scaled, qparams) - scaled).astype(np.float64) * np.exp(log_s)
    measured = float((np.square(error).mean(axis=0) * gain).sum())
    # 200 000 uniform errors give their variance to 0.3 %; steps that fill ranges unevenly add a little.
    assert term.noise(log_s) == pytest.approx(measured, rel=0.02)


def test_weight_noise_is_what_quantizers_make() -> None:
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (400, 30)).astype(np.float32)
    log_s = rng.normal(size=30)
    energy, gain = rng.random(30) + 0.5, rng.random(400)
    term = WeightTerm(
        name="w", index=np.arange(30), sign=np.ones(30), absmax=np.abs(w).astype(np.float64), gain=gain, energy=energy
    )  # fmt: skip
    scaled = (w * np.exp(log_s)).astype(np.float32)
    rounded = fake_quantize(
        scaled, symmetric_qparams(np.abs(scaled).max(axis=1), QType.signed(8), PerAxis(0))
    )
    error = np.square((rounded - scaled) / np.exp(log_s)) @ energy
    # 12 000 independent errors, of unequal weight: the sum is good to a few percent.
    assert term.noise(log_s) == pytest.approx(float(error @ gain), rel=0.06)


def test_clipping_noise_is_what_exponential_tails_make() -> None:
    """A new value exceeds the old extreme with probability 1 / n by an exponential excess."""
    rng = np.random.default_rng(0)
    n, tail, extreme, limit = 20, 0.5, 2.0, 2.6
    excess = np.where(rng.random(4_000_000) < 1 / n, rng.exponential(tail, 4_000_000), -np.inf)
    measured = np.square(np.maximum(extreme + excess - limit, 0)).mean()
    term = ActivationTerm(
        name="t", index=np.array([0, -1]), sign=np.ones(2), low=np.zeros(2), high=np.array([extreme, limit]),
        gain=np.zeros(2), tail_low=np.zeros(2), tail_high=np.array([tail, 0.0]), risk=np.array([1 / n, 0.0]),
        symmetric=False,
    )  # fmt: skip
    # About 60 000 exceedances, whose squares have a relative deviation of sqrt(5): 1 %.
    assert term.noise(np.zeros(1)) == pytest.approx(measured, rel=0.05)


def within(limit: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    bound = np.full(size, np.log(limit))
    return -bound, bound


def test_ranges_are_equalized_where_nothing_else_counts() -> None:
    spread = np.array([1.0, 8.0, 0.25, 2.0])
    zero = np.zeros(4)
    term = ActivationTerm(
        name="t", index=np.arange(4), sign=np.ones(4), low=-spread, high=spread, gain=np.ones(4),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=True,
    )  # fmt: skip
    choice = choose([term], *within(64.0, 4), snap=False)
    ratios = np.exp(choice.x) / spread
    np.testing.assert_allclose(ratios / ratios[0], 1.0, rtol=0.02)
    snapped = choose([term], *within(64.0, 4), snap=True)
    np.testing.assert_allclose(snapped.x / np.log(2), np.rint(snapped.x / np.log(2)), atol=1e-12)
    bounded = choose([term], *within(2.0, 4), snap=False)
    assert np.abs(bounded.x).max() <= np.log(2.0) + 1e-12
    assert choice.after < bounded.after < choice.before


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), snap=st.booleans())
def test_predicted_noise_never_grows(seed: int, symmetric: bool, snap: bool) -> None:
    terms = [activation(seed, symmetric=symmetric), weight(seed)]
    choice = choose(terms, *within(64.0, 3), snap=snap)
    assert choice.after <= choice.before
    assert choice.after == total_noise(terms, choice.x)
    assert np.abs(choice.x).max() <= np.log(64) + 1e-12


def test_a_symmetric_grid_over_values_of_one_sign_has_twice_the_step() -> None:
    zero = np.zeros(2)
    term = ActivationTerm(
        name="t", index=np.arange(2), sign=np.ones(2), low=zero, high=np.array([1.0, 3.0]), gain=np.ones(2),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    x = np.array([0.2, -0.4])
    assert replace(term, symmetric=True).noise(x) == pytest.approx(4 * term.noise(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_noise_does_not_change_with_the_sign(symmetric: bool) -> None:
    term = activation(4, symmetric=symmetric)
    mirrored = replace(term, low=-term.high, high=-term.low, tail_low=term.tail_high, tail_high=term.tail_low)
    x = np.random.default_rng(3).normal(size=3) * 0.3
    assert term.noise(x) == pytest.approx(mirrored.noise(x), rel=1e-12)
    (value, slope), (other, other_slope) = (t.smooth(8)(x) for t in (term, mirrored))
    assert value == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(slope, other_slope, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("rows", [3, 64])
def test_a_sample_of_rows_is_spread_evenly_and_weighs_as_much(rows: int) -> None:
    """Rows in rising order of noise: the sample's noise is that of all to within the step between two of its rows."""
    count = 5 * rows
    level = 1.0 + np.arange(count) / count
    term = WeightTerm(
        name="w", index=np.arange(2), sign=np.ones(2), absmax=np.stack([level, level / 2], axis=1),
        gain=np.full(count, 0.5), energy=np.ones(2),
    )  # fmt: skip
    few = term.thinned(rows)
    assert few.absmax.shape == (rows, 2)
    assert few.gain.sum() == pytest.approx(term.gain.sum())
    assert few.noise(np.zeros(2)) == pytest.approx(term.noise(np.zeros(2)), rel=1.0 / rows)
    assert term.thinned(count) is term


def test_rows_that_the_search_leaves_out_still_judge() -> None:
    """Of 128 rows the search sees every other one; the ones it misses forbid what the activation asks for."""
    spread, zero = np.array([1.0, 8.0]), np.zeros(2)
    wish = ActivationTerm(
        name="t", index=np.arange(2), sign=np.ones(2), low=-spread, high=spread, gain=np.ones(2),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=True,
    )  # fmt: skip
    unseen = np.where(np.arange(128) % 2 == 1, 1e3, 0.0)
    veto = WeightTerm(
        name="w", index=np.arange(2), sign=np.ones(2), absmax=np.ones((128, 2)), gain=unseen, energy=np.ones(2)
    )  # fmt: skip
    choice = choose([wish, veto], *within(64.0, 2), snap=False)
    assert choice.after <= choice.before


def test_limits_hold_the_factors_of_single_variables() -> None:
    """All but the second want to shrink to the smallest range; the first and third may not go as far."""
    spread, zero = np.array([1.0, 8.0, 2.0, 1.0]), np.zeros(4)
    term = ActivationTerm(
        name="t", index=np.arange(4), sign=np.ones(4), low=zero, high=spread, gain=np.ones(4),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    low = np.log([0.5, 1.0, 1.0, 1 / 64])
    for snap in (False, True):
        x = choose([term], low, np.zeros(4), snap=snap).x
        np.testing.assert_allclose(np.exp(x), [0.5, 1.0, 1.0, 0.125], rtol=1e-6)


def test_ranges_below_zero_are_equalized_as_well() -> None:
    spread, zero = np.array([1.0, 8.0, 0.25, 2.0]), np.zeros(4)
    below = ActivationTerm(
        name="t", index=np.arange(4), sign=np.ones(4), low=-spread, high=zero, gain=np.ones(4),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    above = replace(below, low=zero, high=spread)
    found = [choose([term], *within(64.0, 4), snap=False) for term in (below, above)]
    np.testing.assert_allclose(found[0].x, found[1].x, atol=1e-9)
    assert found[0].after < 0.5 * found[0].before


def test_factors_stay_where_no_noise_counts() -> None:
    zero = np.zeros(2)
    term = ActivationTerm(
        name="t", index=np.arange(2), sign=np.ones(2), low=zero, high=np.array([1.0, 9.0]), gain=zero,
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    choice = choose([term], *within(64.0, 2), snap=False)
    assert (choice.before, choice.after, choice.x.tolist()) == (0.0, 0.0, [0.0, 0.0])


def test_dead_channels_keep_factor_one() -> None:
    zero = np.zeros(3)
    term = ActivationTerm(
        name="t", index=np.arange(3), sign=np.ones(3), low=zero, high=np.array([1.0, 0.0, 9.0]), gain=np.ones(3),
        tail_low=zero, tail_high=zero, risk=zero, symmetric=False,
    )  # fmt: skip
    assert choose([term], *within(64.0, 3), snap=False).x[1] == 0.0


def test_spread_is_that_of_numpy_and_ignores_sample_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = build(
        [node("Mul", "x two", "a"), node("Relu", "a", "y")], {"x": (2, 3, 5)}, ["y"], {"two": np.float32(2)}
    )
    feeds = [{"x": rng.standard_normal((2, 3, 5)).astype(np.float32) * 10.0**i} for i in range(-3, 4)]
    classes = Classes()
    labels = classes.fresh((3,)).reshape(1, 3, 1)
    classes.join(labels[:, :1], labels[:, 2:])

    def spread(order: list[int]) -> dict[str, np.ndarray]:
        found = observe(
            canonical(model, tmp_path), Samples([feeds[i] for i in order]), {"a": labels, "y": labels}, classes,
            sizes={"a": (2, 3, 5), "y": (2, 3, 5)}, positions=range(7), provider="cpu", group_bytes=200,
            tick=lambda: None,
        )  # fmt: skip
        return {f"{t} {key}": getattr(s, key) for t, s in found.items() for key in s.__dataclass_fields__}

    first = spread([0, 1, 2, 3, 4, 5, 6])
    values = np.stack([2 * f["x"] for f in feeds]).astype(np.float64)
    groups = [values[:, :, [0, 2]], values[:, :, [1]]]
    np.testing.assert_array_equal(first["a high"], [g.max() for g in groups])
    np.testing.assert_array_equal(first["a low"], [g.min() for g in groups])
    np.testing.assert_allclose(first["a energy"], [np.square(g).mean() for g in groups], rtol=1e-12)
    np.testing.assert_allclose(first["y density"], [(g > 0).mean() for g in groups], rtol=1e-12)
    np.testing.assert_allclose(first["a share"], [2 / 3, 1 / 3])
    np.testing.assert_allclose(first["a rarity"], [1 / (7 * 20), 1 / (7 * 10)])
    for key, value in spread([6, 2, 4, 0, 1, 5, 3]).items():
        np.testing.assert_array_equal(value, first[key], err_msg=key)


def branching(tmp_path: Path) -> tuple[CanonicalModel, Samples]:
    """x -> Conv -> a -> Relu -> r, read twice: by a product and by a sum that ends in another product."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((6, 4, 1, 1)),
        "w2": rng.standard_normal((6, 6, 1, 1)),
        "w3": rng.standard_normal((5, 6, 3, 3)),
    }
    nodes = [
        node("Conv", "x w1", "a"),
        node("Relu", "a", "r"),
        node("Conv", "r w2", "c"),
        node("Add", "c r", "d"),
        node("Conv", "d w3", "y"),
    ]
    typed = {name: value.astype(np.float32) for name, value in weights.items()}
    model = build(nodes, {"x": (1, 4, 12, 12)}, ["y"], typed)
    return canonical(model, tmp_path), samples_for(model, 6)


def test_gains_are_those_of_independent_noise(tmp_path: Path) -> None:
    """White noise injected into a tensor grows the output's noise-to-signal ratio by the sum of its gains.

    Both readers of r end in the same sum, so their parts interfere; injected into c or a they do not.
    """
    model, feeds = branching(tmp_path)
    index = GraphIndex(model.graph)
    trace = traced(model, next(iter(feeds)))
    shapes, _ = concrete_shapes(model, next(iter(feeds)), "cpu")
    names = ["a", "r", "c", "d", "y"]
    spreads = observe(
        model, feeds, {name: trace.labels[name] for name in names}, trace.classes,
        sizes=shapes, positions=range(6), provider="cpu", group_bytes=1 << 20, tick=lambda: None,
    )  # fmt: skip
    gains = channel_gains(index, trace, spreads, shapes)
    weights = {name: model.graph.tensors()[name].values.astype(np.float64) for name in ("w2", "w3")}
    signal = float((spreads["y"].energy * spreads["y"].share).sum()) * 5
    by_d = np.square(weights["w3"]).sum(axis=(0, 2, 3)) / signal
    by_r = by_d + np.square(weights["w2"][:, :, 0, 0]).T @ by_d
    density = spreads["r"].density

    def of(name: str) -> list[float]:
        roots = trace.classes.roots(trace.labels[name]).reshape(-1).tolist()
        return [gains[name][root] for root in roots]

    np.testing.assert_allclose(of("d"), by_d, rtol=1e-6)
    np.testing.assert_allclose(of("c"), by_d, rtol=1e-6)
    np.testing.assert_allclose(of("r"), by_r, rtol=1e-6)
    np.testing.assert_allclose(of("a"), by_r * density, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 10])
def test_a_trial_rounds_activations_and_weights(tmp_path: Path, bits: int) -> None:
    """The score of one product equals that of rounding its operands in NumPy."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in ("w1", "w2")}
    nodes = [node("MatMul", "x w1", "a"), node("MatMul", "a w2", "y")]
    model = build(nodes, {"x": (50, 4)}, ["y"], weights)
    source = canonical(model, tmp_path)
    sample = next(iter(samples_for(model, 1)))
    trace = traced(source, sample)
    a = sample["x"] @ weights["w1"]
    y = a.astype(np.float64) @ weights["w2"]
    zero = np.zeros(4)
    roots = trace.classes.roots(trace.labels["a"]).reshape(-1)
    spread = Spread(
        roots=roots, low=a.min(axis=0).astype(np.float64), high=a.max(axis=0).astype(np.float64),
        energy=zero, share=zero, density=zero, tail_low=zero, tail_high=zero, rarity=zero,
    )  # fmt: skip
    trial = Trial(
        model=source, trace=trace, spreads={"a": spread}, symmetric=False, weight_bits=bits, samples=[sample],
        references=[{"y": y}], provider="cpu",
    )  # fmt: skip
    log_s = np.array([1.0, -1.0, 0.5, 0.0])
    scale = np.exp(log_s).astype(np.float32)
    scaled, rescaled = a / scale, weights["w2"] * scale[:, None]
    on_grid = fake_quantize(
        scaled, asymmetric_qparams(float(scaled.min()), float(scaled.max()), QType.unsigned(8))
    )
    rounded = fake_quantize(
        rescaled, symmetric_qparams(np.abs(rescaled).max(axis=0), QType.signed(bits, "int32"), PerAxis(1))
    )
    noise = on_grid.astype(np.float64) @ rounded - y
    expected = 10 * np.log10(np.square(y).sum() / np.square(noise).sum())
    found = trial.score(dict(zip((roots // 2).tolist(), log_s.tolist(), strict=True)))
    # One of 200 activations may fall on the other side of a tie after float32 rounding: 0.05 dB.
    assert found == pytest.approx(expected, abs=0.05)
    assert not list(tmp_path.glob("trial*"))


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_gains_go_through_a_quotient_as_through_the_product_with_its_inverse(op: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    by = rng.uniform(0.5, 4.0, (1, 6, 1, 1)).astype(np.float32)
    weights = {
        "w1": rng.standard_normal((6, 4, 1, 1)).astype(np.float32),
        "by": by if op == "Mul" else 1 / by,
        "w2": rng.standard_normal((5, 6, 3, 3)).astype(np.float32),
    }
    nodes = [node("Conv", "x w1", "a"), node(op, "a by", "b"), node("Conv", "b w2", "y")]
    source = build(nodes, {"x": (1, 4, 12, 12)}, ["y"], weights)
    model, feeds = canonical(source, tmp_path), samples_for(source, 3)
    index, trace = GraphIndex(model.graph), traced(model, next(iter(feeds)))
    shapes, _ = concrete_shapes(model, next(iter(feeds)), "cpu")
    spreads = observe(
        model, feeds, {"y": trace.labels["y"]}, trace.classes,
        sizes=shapes, positions=range(3), provider="cpu", group_bytes=1 << 20, tick=lambda: None,
    )  # fmt: skip
    gains = channel_gains(index, trace, spreads, shapes)
    signal = float((spreads["y"].energy * spreads["y"].share).sum()) * 5
    wanted = np.square(weights["w2"]).sum(axis=(0, 2, 3)) / signal * np.square(by.reshape(-1))
    roots = trace.classes.roots(trace.labels["a"]).reshape(-1).tolist()
    np.testing.assert_allclose([gains["a"][root] for root in roots], wanted, rtol=1e-5)
