"""The stage as a whole: exact on random graphs, useful where it should be, harmless elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxptq.equalize.run as stage
from onnxptq.equalize.run import find_rescaling
from onnxptq.equalize.tracing import Tracer
from onnxptq.equalize.trial import Trial
from onnxptq.errors import FeedError
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.runtime import Session
from onnxptq.types import CanonicalModel
from tests.unit.equalize.equalize_helpers import (
    Samples,
    assert_exact,
    canonical,
    equalize,
    pinned_share,
    samples_for,
    unbalanced,
)
from tests.unit.graph.graph_helpers import build, feed_for, node


def outputs(model: CanonicalModel, feeds: Samples) -> list[np.ndarray]:
    session = Session(model.path, threads=1)
    return [session.run(sample)["y"] for sample in feeds]


def test_an_unbalanced_depthwise_layer_is_rescued(tmp_path: Path) -> None:
    model = unbalanced()
    feeds = samples_for(model, 16)
    result, done = equalize(canonical(model, tmp_path), feeds, work_dir=tmp_path, tensors=["a", "b"])
    assert done.after_db > done.before_db + 12
    assert {t.tensor for t in done.tensors} >= {"b"}
    found = next(t for t in done.tensors if t.tensor == "b")
    assert found.channels == 16
    assert found.largest / found.smallest > 100
    assert str(len(done.tensors)) in done.summary
    # Factors move single-precision rounding by about one unit in the last place per operator.
    for before, after in zip(outputs(canonical(model, tmp_path), feeds), outputs(result, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_what_is_proposed_is_what_unseen_samples_confirm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Mapping[int, float]] = []

    def score(trial: Trial, factors: Mapping[int, float]) -> np.ndarray:
        scored.append(factors)
        return genuine(trial, factors)

    genuine = Trial.score
    monkeypatch.setattr(Trial, "score", score)
    feeds = samples_for(unbalanced(), 16)
    rescaling = find_rescaling(canonical(unbalanced(), tmp_path), feeds, work_dir=tmp_path, tensors=["b"])
    assert not rescaling.needs_judging
    proposed, done = rescaling.proposed()
    assert not scored
    assert np.isnan(done.after_db)
    assert "trial" not in done.summary
    judged, done = rescaling.judged()
    assert judged is proposed
    assert len(scored) == 2
    assert done.after_db > done.before_db + 12


def test_what_unseen_samples_refuse_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "score", lambda _, factors: np.full(4, -float(bool(factors))))
    source = canonical(unbalanced(), tmp_path)
    feeds = samples_for(unbalanced(), 16)
    rescaling = find_rescaling(source, feeds, work_dir=tmp_path, tensors=["b"])
    assert rescaling.proposed()[0] is not source
    assert rescaling.judged()[0] is source


def test_the_given_model_stays_and_the_new_one_is_another(tmp_path: Path) -> None:
    source = canonical(unbalanced(), tmp_path)
    weight = source.graph.tensors()["w2"].values.copy()
    content = source.path.read_bytes()
    (tmp_path / "work").mkdir()
    result, _ = equalize(source, samples_for(unbalanced(), 8), work_dir=tmp_path / "work", tensors=["b"])
    np.testing.assert_array_equal(source.graph.tensors()["w2"].values, weight)
    assert source.path.read_bytes() == content
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["equalized_0.onnx"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["model.onnx"]
    assert result.fingerprint != source.fingerprint
    assert (result.inputs, result.outputs) == (source.inputs, source.outputs)
    assert [n.name for n in result.graph.nodes] == [n.name for n in source.graph.nodes]
    assert result.graph.tensors().keys() == source.graph.tensors().keys()


def test_powers_of_two_leave_the_outputs_bit_identical(tmp_path: Path) -> None:
    model = unbalanced()
    feeds = samples_for(model, 8)
    result, done = equalize(canonical(model, tmp_path), feeds, work_dir=tmp_path, tensors=["b"], snap=True)
    assert done.tensors
    for before, after in zip(outputs(canonical(model, tmp_path), feeds), outputs(result, feeds), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_balanced_model_is_left_alone(tmp_path: Path) -> None:
    """Identity weights and equal channels: nothing can gain."""
    eye = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)
    nodes = [node("Conv", "x w", "a"), node("Conv", "a w", "y")]
    model = build(nodes, {"x": (1, 4, 4, 4)}, ["y"], {"w": eye})
    x = np.random.default_rng(0).uniform(-1, 1, (1, 1, 4, 4)).astype(np.float32)
    feeds = Samples([{"x": np.repeat(np.roll(x, i), 4, axis=1)} for i in range(8)])
    source = canonical(model, tmp_path)
    result, done = equalize(source, feeds, work_dir=tmp_path, tensors=["a"])
    assert result is source
    assert done.tensors == ()
    assert "No activation" in done.summary


def test_pinned_tensors_are_named_with_the_reason(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "a"), node("Sigmoid", "a", "b"), node("Conv", "b w", "y")]
    model = build(nodes, {"x": (1, 3, 4, 4)}, ["y"], {"w": np.ones((3, 3, 1, 1), np.float32)})
    source = canonical(model, tmp_path)
    result, done = equalize(source, samples_for(model, 8), work_dir=tmp_path, tensors=["x", "a", "b"])
    assert result is source
    assert {s.site: s.reason for s in done.skips} == {
        "x": "not rescaled: it is a graph input",
        "a": "not rescaled: Sigmoid does not commute with a rescaling of channels (Sigmoid reads it)",
        "b": "not rescaled: Sigmoid writes it",
    }


def test_factors_that_fail_on_unseen_samples_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter(np.array(s) for s in ([20.0, 22.0], [19.0, 22.0], [20.0, 22.0]))
    monkeypatch.setattr(Trial, "score", lambda *_: next(scores))
    source = canonical(unbalanced(), tmp_path)
    result, done = equalize(source, samples_for(unbalanced(), 8), work_dir=tmp_path, tensors=["b"])
    assert result is source
    assert (done.tensors, done.before_db, done.after_db) == ((), 21.0, 21.0)


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="no calibration sample"):
        equalize(canonical(unbalanced(), tmp_path), Samples([]), work_dir=tmp_path)


def test_few_samples_judge_nothing_but_still_help(tmp_path: Path) -> None:
    _, done = equalize(
        canonical(unbalanced(), tmp_path), samples_for(unbalanced(), 2), work_dir=tmp_path, tensors=["b"]
    )
    assert done.tensors
    assert np.isnan(done.after_db)


def test_tensors_default_to_what_products_read(tmp_path: Path) -> None:
    _, done = equalize(canonical(unbalanced(), tmp_path), samples_for(unbalanced(), 8), work_dir=tmp_path)
    assert [s.site for s in done.skips] == ["x"]
    assert {t.tensor for t in done.tensors} <= {"a", "b"}


def test_a_wrong_rule_is_caught_and_its_channels_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tanh is declared to commute: the outputs would change, so the sets that pass it are dropped."""

    def wrong(t: Tracer, n: object) -> None:
        t.write(n.outputs[0], t.read(n, 0))  # type: ignore[attr-defined]

    monkeypatch.setattr(stage, "RULES", {**stage.RULES, "Tanh": wrong})
    model = unbalanced()
    ratio = np.geomspace(0.05, 20, 8).astype(np.float32)
    extra = {
        "w4": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1) * ratio[:, None, None, None],
        "w5": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1),
    }
    model.graph.node[-1].output[0] = model.graph.node[-1].name = "c"
    model.graph.node.extend([node("Conv", "c w4", "d"), node("Tanh", "d", "e"), node("Conv", "e w5", "y")])
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in extra.items())
    model = onnx.shape_inference.infer_shapes(model)
    source = canonical(model, tmp_path)
    feeds = samples_for(model, 2)
    result, done = equalize(source, feeds, work_dir=tmp_path, tensors=["b", "d"])
    assert [s.reason for s in done.skips] == ["not rescaled: the float outputs would change"]
    assert [t.tensor for t in done.tensors] == ["b"]
    for before, after in zip(outputs(source, feeds), outputs(result, feeds), strict=True):
        # The last channels multiply rounding by 20 before Tanh bounds the output by 1.
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)


STEPS = (
    "conv",
    "relu",
    "depthwise",
    "group",
    "residual",
    "concat",
    "scale",
    "pool",
    "shuffle",
    "clip",
    "gate",
)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_random_convolutional_graphs_stay_exact(steps: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = convolutional(steps, seed)
        assert_exact(canonical(model, Path(folder)), feed_for(model), seed=seed)


def convolutional(steps: list[str], seed: int) -> onnx.ModelProto:
    """Picks earlier tensors of equal shape at random as the other operand of sums and concatenations."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], {"w0": rng.standard_normal((4, 3, 1, 1))}
    nodes.append(node("Conv", "x w0", "t0"))
    shapes = {"t0": (4, 8)}
    for i, step in enumerate(steps, 1):
        source = list(shapes)[int(rng.integers(max(0, len(shapes) - 3), len(shapes)))]
        channels, size = shapes[source]
        name, kernel = f"t{i}", f"w{i}"
        same = [t for t, shape in shapes.items() if shape == shapes[source]]
        other = same[int(rng.integers(len(same)))]
        if step == "conv":
            weights[kernel] = rng.standard_normal((6, channels, 3, 3))
            nodes.append(node("Conv", f"{source} {kernel}", name, pads=[1, 1, 1, 1]))
            channels = 6
        elif step == "depthwise":
            weights[kernel] = rng.standard_normal((channels, 1, 3, 3))
            nodes.append(node("Conv", f"{source} {kernel}", name, pads=[1, 1, 1, 1], group=channels))
        elif step == "group":
            weights[kernel] = rng.standard_normal((channels, channels // 2, 1, 1))
            nodes.append(node("Conv", f"{source} {kernel}", name, group=2))
        elif step == "residual":
            nodes.append(node("Add", f"{source} {other}", name))
        elif step == "concat":
            nodes.append(node("Concat", f"{source} {other}", name, axis=1))
            channels *= 2
        elif step == "scale":
            weights[kernel] = rng.standard_normal((channels, 1, 1))
            nodes.append(node("Mul", f"{source} {kernel}", name))
        elif step == "pool":
            nodes.append(node("MaxPool", source, name, kernel_shape=[2, 2], strides=[2, 2]))
            size //= 2
        elif step == "shuffle":
            weights[f"s{i}"] = np.array([1, 2, channels // 2, size, size])
            weights[f"r{i}"] = np.array([1, channels, size, size])
            nodes.append(node("Reshape", f"{source} s{i}", f"{name}a"))
            nodes.append(node("Transpose", f"{name}a", f"{name}b", perm=[0, 2, 1, 3, 4]))
            nodes.append(node("Reshape", f"{name}b r{i}", name))
        elif step == "clip":
            # Bounds that all, some or none of the channels reach.
            weights[f"lo{i}"], weights[f"hi{i}"] = (
                -rng.choice([0.0, 3.0, 30.0]),
                rng.choice([0.0, 2.0, 6.0, 60.0]),
            )
            nodes.append(node("Clip", f"{source} lo{i} hi{i}", name))
        elif step == "gate":
            nodes.append(node("Sigmoid", source, f"{name}g"))
            nodes.append(node("Mul", f"{other} {name}g", name))
        else:
            nodes.append(node("Relu", source, name))
        shapes[name] = (channels, size)
        if size == 1 and step == "pool":
            break
    last = list(shapes)[-1]
    weights["wy"] = rng.standard_normal((2, shapes[last][0], 1, 1))
    nodes.append(node("Conv", f"{last} wy", "y"))
    typed = {k: v.astype(np.int64 if v.dtype == np.int64 else np.float32) for k, v in weights.items()}
    return build(nodes, {"x": (1, 3, 8, 8)}, ["y"], typed)


BEDS = {
    # Quantizable tensors that must be free: everything but inputs, outputs and what nonlinear operators touch.
    "fastestdet": ("input.492", "input.508", "input.568", "onnx::Concat_699"),
    "resnet20_cifar10": ("/Relu_output_0", "/layer3/layer3.2/Relu_output_0"),
    "pointnet_modelnet40": ("/Relu_3_output_0", "/ReduceMax_output_0"),
    "efficientnet_lite0": (),
}


@pytest.mark.parametrize("name", BEDS)
def test_real_models_stay_exact(name: str, testbed: Path, tmp_path: Path) -> None:
    model = canonicalize(testbed / "models" / f"{name}.onnx", tmp_path)
    spec = model.inputs[0]
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
    sample = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    trace = assert_exact(model, sample)
    assert [pinned_share(trace, tensor) for tensor in BEDS[name]] == [0.0] * len(BEDS[name])


def test_a_real_vision_transformer_stays_exact(testbed: Path, tmp_path: Path) -> None:
    """Every LayerNorm output, query, key and value can be rescaled."""
    source = onnx.load(testbed / "models" / "vits14_flowers.fp16w.onnx")
    for tensor in source.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(source, tmp_path / "source.onnx")
    model = canonicalize(tmp_path / "source.onnx", tmp_path)
    sample = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    trace = assert_exact(model, sample)
    norms = [n.outputs[0].name for n in model.graph.nodes if n.op == "LayerNormalization"]
    assert [pinned_share(trace, name) for name in norms] == [0.0] * 25
    products = [n for n in model.graph.nodes if n.op == "MatMul" and n.inputs[1].name in trace.labels]
    assert [pinned_share(trace, product.inputs[1].name) for product in products] == [0.0] * 24
