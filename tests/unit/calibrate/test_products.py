"""Ranges of softmax outputs against a brute-force search on the product that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxptq.calibrate import products
from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.products import ORDERS, ROOT_MARGIN_DB, choose_root, choose_softmax_ranges
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import calibrate
from onnxptq.graph.attention import find_attention
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import exposed_copy
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, range_of, symmetric_qparams
from onnxptq.rooting import root_weights
from onnxptq.runtime import Session
from onnxptq.samples import ListFeeds
from onnxptq.types import CanonicalModel, PerTensor, QParams, QType, Sample
from tests.unit.rotate.rotate_nets import transformer
from tests.unit.small_nets import NETS, Net, canonical, planned, random_samples, vector_attention


@pytest.mark.parametrize("target", ["simulate", "tensorrt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_decides(target: str, bits: int, tmp_path: Path) -> None:
    model = canonical(NETS["attention_block"](), tmp_path)
    plan = planned(model, target, activation_bits=bits)
    samples = random_samples(model, 3)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    found = choose_softmax_ranges(model, plan, ranges, samples)
    assert set(found) == {"softmax"}

    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    exposed_copy(model.path, ["softmax", "v_heads"], tmp_path / "exposed.onnx")
    runs = [Session(tmp_path / "exposed.onnx", threads=1).run(s) for s in samples]
    (quantizer,) = [q for q in plan.quantizers if q.quantizer_id == "softmax"]
    top = max(float(r["softmax"].max()) for r in runs)

    def loss(end: float) -> float:
        qparams = (
            symmetric_qparams(np.asarray(end), quantizer.qtype, PerTensor())
            if quantizer.symmetric
            else asymmetric_qparams(0.0, end, quantizer.qtype)
        )
        errors = [(r["softmax"] - fake_quantize(r["softmax"], qparams)) @ r["v_heads"] for r in runs]
        return float(sum(np.square(e, dtype=np.float64).sum() for e in errors))

    best = min(loss(top * f) for f in np.geomspace(1 / 128, 1.0, 200))
    focus = found["softmax"]
    low, end = (float(e) for e in range_of(focus.qparams))
    signal = sum(np.square((r["softmax"] @ r["v_heads"]), dtype=np.float64).sum() for r in runs)
    # The search looks at three ends per octave, the brute force at 29.
    assert focus.from_zero <= 1.5 * best / signal
    assert focus.full == pytest.approx(loss(top) / signal, rel=1e-3)
    assert focus.free <= focus.from_zero <= focus.full
    assert focus.is_held == (target == "tensorrt" or bits == 8)
    if focus.is_held or low <= 0.0:
        assert loss(end) == pytest.approx(focus.from_zero * signal, rel=1e-6)
    else:
        errors = [(r["softmax"] - fake_quantize(r["softmax"], focus.qparams)) @ r["v_heads"] for r in runs]
        noise = sum(np.square(e, dtype=np.float64).sum() for e in errors)
        assert noise == pytest.approx(focus.free * signal, rel=1e-6)


def test_memory_does_not_change_the_choice(tmp_path: Path) -> None:
    """With room for one softmax at a time, and for all; a pass over the samples for each group."""
    model = canonical(transformer(), tmp_path)
    plan = planned(model, "simulate", activation_bits=3)
    samples = random_samples(model, 3)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    counts: list[int] = []

    class Heard:
        def start(self, title: str, total: int) -> Callable[[], None]:
            assert title == "softmax ranges"
            counts.append(total)
            return lambda: counts.append(-1)

        def message(self, text: str) -> None: ...

    found = [
        choose_softmax_ranges(model, plan, ranges, samples, group_bytes=size, progress=Heard())
        for size in (1, 1 << 28)
    ]
    assert counts == [6, *[-1] * 6, 3, *[-1] * 3]
    for name in ("block0.att.p", "block1.att.p"):
        first, second = (focus[name] for focus in found)
        assert (first.qparams.scale, first.full, first.free) == (
            second.qparams.scale,
            second.full,
            second.free,
        )


def test_a_shared_scale_is_not_for_one_product_to_choose(tmp_path: Path) -> None:
    model = canonical(transformer(), tmp_path)
    plan = planned(model, "simulate", activation_bits=4)
    names = ("block0.att.p", "block1.att.p")
    tied = tuple(replace(q, scale_group="both") if q.quantizer_id in names else q for q in plan.quantizers)
    samples = random_samples(model, 1)
    ranges = {name: asymmetric_qparams(0.0, 1.0, QType.unsigned(4)) for name in names}
    assert set(names) <= choose_softmax_ranges(model, plan, ranges, samples).keys()
    assert choose_softmax_ranges(model, replace(plan, quantizers=tied), ranges, samples) == {}


def test_nothing_to_choose_without_a_product(tmp_path: Path) -> None:
    net = Net()
    y = net.op("Relu", "relu", net.op("Softmax", "softmax", net.linear("a", "x", 8, 8), axis=-1))
    model = canonical(net.proto({"x": [4, 8]}, [net.linear("b", y, 8, 8)]), tmp_path)
    plan = planned(model, "simulate")
    assert choose_softmax_ranges(model, plan, {}, random_samples(model, 1)) == {}


@pytest.mark.parametrize("op", ["MatMul", "left", "Gemm", "Conv"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_decides_no_worse_than_the_weights_alone(op: str, bits: int, tmp_path: Path) -> None:
    net = Net()
    shape = [8, 16] if op == "Gemm" else [2, 16, 16]
    scores = net.op("Mul", "scores", net.linear("a", "x", 16, 16), net.constant("sharp", np.float32(4)))
    p = net.op("Softmax", "softmax", scores, axis=1 if op in ("left", "Conv") else -1)
    w = net.weight("w", *{"MatMul": (16, 3), "left": (3, 16), "Gemm": (3, 16), "Conv": (3, 16, 1)}[op])
    if op == "Gemm":
        y = net.op("Gemm", "y", p, w, transB=1)
    else:
        y = net.op("MatMul" if op == "left" else op, "y", *((w, p) if op == "left" else (p, w)))
    model = canonical(net.proto({"x": shape}, [y]), tmp_path)
    samples, plan = random_samples(model, 3), planned(model, "simulate", activation_bits=bits)
    statistics = calibrate(model, ListFeeds(samples), ["x", "softmax"])
    ranges = {
        name: choose_ranges(plan, statistics, Observer(name=name))["softmax"] for name in ("minmax", "mse")
    }
    focus = choose_softmax_ranges(model, plan, {"softmax": ranges["minmax"]}, samples)["softmax"]
    exposed_copy(model.path, ["softmax"], tmp_path / "exposed.onnx")
    seen = [Session(tmp_path / "exposed.onnx", threads=1).run(s)["softmax"] for s in samples]
    matrix = np.asarray(next(t for n, t in model.graph.tensors().items() if n == "w").values)
    apply = {
        "MatMul": lambda e: e @ matrix,
        "left": lambda e: matrix @ e,
        "Gemm": lambda e: e @ matrix.T,
        "Conv": lambda e: matrix[:, :, 0] @ e,
    }[op]

    def noise(qparams: QParams) -> float:
        return sum(float(np.square(apply(p - fake_quantize(p, qparams))).sum()) for p in seen)

    # The search looks at three ends per octave, the observer at more.
    assert noise(focus.qparams) <= min(1.001 * noise(ranges["minmax"]), 1.2 * noise(ranges["mse"]))
    assert choose_root(model, plan, samples).noise_db.keys() == set(ORDERS)
    rooted, summary = root_weights(model, 2, samples[0], work_dir=tmp_path)
    assert (summary.count, summary.skips) == (1, ())
    assert [found.root for found in find_attention(GraphIndex(rooted.graph))] == ["softmax_root"]


@pytest.mark.parametrize("order", ["PV", "VP", "PV^T", "PTtV"])
def test_the_weights_may_be_on_either_side(order: str, tmp_path: Path) -> None:
    """The same numbers in another order of operands get the same range."""

    def chosen(order: str) -> float:
        folder = tmp_path / order
        folder.mkdir(exist_ok=True)
        net, n = Net(), 12
        x = net.linear("a", "x", n, n)
        scores = net.op("Gemm", "qk", x, net.linear("k", "x", n, n), transB=1)
        p = net.op("Softmax", "p", net.op("Mul", "s", scores, net.constant("c", np.float32(0.5))), axis=-1)
        v = net.linear("v", "x", n, n)
        if order == "VP":
            turned = [net.op("Transpose", f"{t}t", t, perm=[1, 0]) for t in (v, p)]
            y = net.op("MatMul", "y", *turned)
        elif order == "PV":
            y = net.op("MatMul", "y", p, v)
        elif order == "PV^T":
            y = net.op("Gemm", "y", p, net.op("Transpose", "vt", v, perm=[1, 0]), transB=1)
        else:
            y = net.op("Gemm", "y", net.op("Transpose", "pt", p, perm=[1, 0]), v, transA=1)
        model = canonical(net.proto({"x": [n, n]}, [y]), folder)
        plan = planned(model, "simulate", activation_bits=3)
        samples = random_samples(model, 2)
        tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
        ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
        (found,) = choose_softmax_ranges(model, plan, ranges, samples).values()
        return float(found.qparams.scale)

    assert 0 < chosen(order) == chosen("PV") < 0.14


def _even(folder: Path) -> tuple[CanonicalModel, list[Sample]]:
    """Attention over four tokens whose weights are all near a quarter."""
    net, n = Net(), 4
    scores = net.op("MatMul", "qk", net.linear("q", "x", n, n), net.op("Transpose", "kt", "x", perm=[1, 0]))
    p = net.op("Softmax", "p", net.op("Mul", "s", scores, net.constant("c", np.float32(0.05))), axis=-1)
    y = net.op("MatMul", "y", p, net.linear("v", "x", n, n))
    model = canonical(net.proto({"x": [n, n]}, [y]), folder)
    return model, random_samples(model, 4)


@pytest.mark.parametrize(
    ("target", "bits"), [("simulate", 2), ("simulate", 4), ("simulate", 8), ("tensorrt", 8)]
)
def test_even_weights_are_focused_from_below_too(target: str, bits: int, tmp_path: Path) -> None:
    model, samples = _even(tmp_path)
    plan = planned(model, target, activation_bits=bits)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    focus = choose_softmax_ranges(model, plan, ranges, samples)["p"]
    low, high = range_of(focus.qparams)
    if bits == 8:
        # 255 steps leave no room for a zero point below them in int8, and tensorrt has only zero point 0.
        assert focus.is_held
        assert low <= 0.0
        assert focus.free < 0.9 * focus.from_zero
        return
    assert not focus.is_held
    assert focus.free < (0.2 if bits == 2 else 0.6) * focus.from_zero
    assert 0.05 < low < 0.25 < high < 0.4
    assert focus.qparams.qtype.storage == "int8"
    assert focus.qparams.zero_point < 0


@pytest.mark.parametrize("power", [1, 3])
def test_weighted_sums_choose_the_ranges_of_their_weights(power: int, tmp_path: Path) -> None:
    model = canonical(vector_attention(), tmp_path)
    samples = random_samples(model, 2)
    if power > 1:
        model, summary = root_weights(model, power, samples[0], work_dir=tmp_path)
        assert summary.count == 1
    plan = planned(model, "simulate", activation_bits=3)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    name = "p" if power == 1 else "p_root"
    focus = choose_softmax_ranges(model, plan, ranges, samples)[name]
    exposed_copy(model.path, sorted({"p", name, "v4"}), tmp_path / "exposed.onnx")
    runs = [Session(tmp_path / "exposed.onnx", threads=1).run(s) for s in samples]
    noise = signal = 0.0
    for run in runs:
        error = run["p"] - fake_quantize(run[name], focus.qparams) ** np.float32(power)
        noise += np.square((error * run["v4"]).sum(axis=2), dtype=np.float64).sum()
        signal += np.square((run["p"] * run["v4"]).sum(axis=2), dtype=np.float64).sum()
    assert noise / signal == pytest.approx(min(focus.from_zero, focus.free), rel=1e-3)
    assert focus.free <= focus.full


@pytest.mark.parametrize("power", [2, 4])
def test_a_root_is_chosen_by_the_product_of_its_power(power: int, tmp_path: Path) -> None:
    model = canonical(NETS["attention_block"](), tmp_path)
    samples = random_samples(model, 2)
    model, _ = root_weights(model, power, samples[0], work_dir=tmp_path)
    plan = planned(model, "simulate", activation_bits=3)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    focus = choose_softmax_ranges(model, plan, ranges, samples)["softmax_root"]
    exposed_copy(model.path, ["softmax", "softmax_root", "v_heads"], tmp_path / "exposed.onnx")
    runs = [Session(tmp_path / "exposed.onnx", threads=1).run(s) for s in samples]
    noise = signal = 0.0
    for run in runs:
        found = fake_quantize(run["softmax_root"], focus.qparams) ** np.float32(power)
        noise += np.square((run["softmax"] - found) @ run["v_heads"], dtype=np.float64).sum()
        signal += np.square(run["softmax"] @ run["v_heads"], dtype=np.float64).sum()
    assert focus.power == power
    assert noise / signal == pytest.approx(min(focus.from_zero, focus.free), rel=1e-3)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_order_of_the_root_is_what_rooted_models_say(bits: int, tmp_path: Path) -> None:
    """Every order against the model that is really rooted by it."""
    plain = canonical(transformer(), tmp_path)
    samples = random_samples(plain, 2)
    found = choose_root(plain, planned(plain, "simulate", activation_bits=bits), samples)

    def noise_db(order: int) -> float:
        model = root_weights(plain, order, samples[0], work_dir=tmp_path)[0] if order > 1 else plain
        plan = planned(model, "simulate", activation_bits=bits)
        tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
        ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
        chosen = choose_softmax_ranges(model, plan, ranges, samples).values()
        assert len(chosen) == 2
        return float(np.mean([10 * np.log10(f.from_zero if f.is_held else f.free) for f in chosen]))

    expected = {order: noise_db(order) for order in ORDERS}
    # Roots are taken of the weights here, and of the scores' exponentials there: one unit in the last place.
    assert found.noise_db == pytest.approx(expected, abs=0.05)
    best = min(expected, key=lambda order: expected[order])
    assert found.order == (best if expected[best] < expected[1] - ROOT_MARGIN_DB else 1)


def test_a_root_must_gain_more_than_integer_kernels_are_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = canonical(NETS["attention_block"](), tmp_path)
    samples = random_samples(plain, 2)
    plan = planned(plain, "simulate", activation_bits=3)
    noise_db = choose_root(plain, plan, samples).noise_db
    gain = noise_db[1] - min(noise_db.values())
    assert gain > 0.0
    for margin, is_rooted in ((gain * 0.99, True), (gain * 1.01, False)):
        monkeypatch.setattr(products, "ROOT_MARGIN_DB", margin)
        assert (choose_root(plain, plan, samples).order > 1) == is_rooted


def test_no_root_without_weights_that_a_product_reads(tmp_path: Path) -> None:
    net = Net()
    y = net.op("Relu", "relu", net.op("Softmax", "softmax", net.linear("a", "x", 8, 8), axis=-1))
    model = canonical(net.proto({"x": [4, 8]}, [net.linear("b", y, 8, 8)]), tmp_path)
    found = choose_root(model, planned(model, "simulate"), random_samples(model, 1))
    assert (found.order, found.noise_db) == (1, {})


def test_a_root_whose_product_stays_in_float_is_not_quantized(tmp_path: Path) -> None:
    model = canonical(NETS["attention_block"](), tmp_path)
    model, _ = root_weights(model, 2, random_samples(model, 1)[0], work_dir=tmp_path)
    assert "softmax_root" in {q.tensor for q in planned(model, "simulate").quantizers}
    plan = planned(model, "simulate", declined={"pv": "no"})
    assert not {"softmax", "softmax_root"} & {q.tensor for q in plan.quantizers}


def test_a_mean_has_the_noise_over_signal_of_the_sum(tmp_path: Path) -> None:
    found = []
    for op in ("ReduceSum", "ReduceMean"):
        proto = vector_attention()
        (total,) = (node for node in proto.graph.node if node.op_type == "ReduceSum")
        total.op_type = op
        model = canonical(proto, tmp_path)
        plan, samples = planned(model, "simulate", activation_bits=3), random_samples(model, 1)
        ranges = {"p": asymmetric_qparams(0.0, 1.0, QType.unsigned(3))}
        found.append(choose_softmax_ranges(model, plan, ranges, samples)["p"])
    assert (found[0].full, found[0].from_zero, found[0].free) == (
        found[1].full,
        found[1].from_zero,
        found[1].free,
    )


def test_a_root_that_cannot_be_calibrated_leaves_its_weights_quantized(tmp_path: Path) -> None:
    model = canonical(NETS["attention_block"](), tmp_path)
    model, _ = root_weights(model, 2, random_samples(model, 1)[0], work_dir=tmp_path)
    plan = planned(model, "simulate", uncalibrated={"softmax_root": "NaN"})
    assert {q.tensor for q in plan.quantizers} & {"softmax", "softmax_root"} == {"softmax"}
