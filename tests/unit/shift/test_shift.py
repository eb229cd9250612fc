"""``onnxptq.shift``: exact on every network it touches, in the middle of what it shifts, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.errors import FeedError
from onnxptq.graph.save import exposed_copy
from onnxptq.pipeline import quantize
from onnxptq.recipe import Recipe
from onnxptq.runtime import Session
from onnxptq.shift import apply, spans
from onnxptq.shift.run import Shift, shift
from onnxptq.types import Array, CanonicalModel
from tests.unit.equalize.equalize_helpers import Samples, canonical, samples_for
from tests.unit.rotate import rotate_nets as nets
from tests.unit.shift.shift_cases import READ_OTHERWISE, WIDTH, Parts, shifted
from tests.unit.small_nets import conv_relu_conv


def values_of(model: CanonicalModel, proto: onnx.ModelProto, tensor: str, count: int = 6) -> Array:
    """All rows of ``tensor`` over the samples that ``shifted`` looks at."""
    path = model.path.with_name("looked_at.onnx")
    exposed_copy(model.path, [tensor], path)
    session = Session(path, exact=True, threads=1)
    rows = [session.run(sample, [tensor])[tensor] for sample in list(samples_for(proto, count + 3))[:count]]
    return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])


class Normalized(Parts):
    def begin(self, *, bias: bool = True) -> str:
        x = self.linear("stem", "x", 7, WIDTH)
        scale = self.weight("n.g", WIDTH)
        return self.op("LayerNormalization", "n", x, scale, *([self.weight("n.c", WIDTH)] if bias else []))


def shared() -> onnx.ModelProto:
    """Queries, keys and values."""
    net = Normalized()
    n = net.begin()
    parts = [net.linear(c, n, WIDTH, 5) for c in "qkv"]
    return net.end(net.op("Tanh", "y", net.op("Sum", "s", *parts)))


def without_bias() -> onnx.ModelProto:
    net = Normalized()
    return net.end(net.linear("y", net.begin(bias=False), WIDTH, 5))


def windows() -> onnx.ModelProto:
    """Rolled and cut into windows, as in Swin."""
    net = Normalized()
    n = net.begin()
    ints = net.ints
    back = net.op("Slice", "back", n, ints("one", 1), ints("far", 99), ints("axis", 1))
    front = net.op("Slice", "front", n, ints("zero", 0), ints("one2", 1), ints("axis2", 1))
    x = net.op("Concat", "rolled", back, front, axis=1)
    x = net.op("Reshape", "cut", x, ints("s1", 1, 3, 2, 2, 2, WIDTH))
    x = net.op("Transpose", "moved", x, perm=[0, 1, 3, 2, 4, 5])
    x = net.op("Reshape", "tokens", x, ints("s2", 6, 4, WIDTH))
    return net.end(net.linear("y", x, WIDTH, 5))


def convolutions() -> onnx.ModelProto:
    """Channels moved to the front, read by a grouped convolution, and by a strided one without bias."""
    net = Normalized()
    x = net.op("Transpose", "front", net.begin(), perm=[0, 3, 1, 2])
    a = net.conv("a", x, (8, 3, 1, 1), group=4)
    b = net.conv("b", x, (8, WIDTH, 3, 2), pads=[0] * 4, strides=[1, 2], bias=False)
    return net.end(a, b)


def gemm() -> onnx.ModelProto:
    net = Normalized()
    rows = net.op("Reshape", "rows", net.begin(), net.ints("s", -1, WIDTH))
    a = net.op("Gemm", "a", rows, net.weight("a.w", 5, WIDTH), net.weight("a.b", 5), transB=1)
    b = net.op("Gemm", "b", rows, net.weight("b.w", WIDTH, 3))
    c = net.op("Gemm", "c", rows, net.weight("c.w", WIDTH, 3), net.weight("c.b", 1))
    return net.end(a, b, c)


EXACT: dict[str, tuple[Callable[[], onnx.ModelProto], int]] = {
    "shared": (shared, 1),
    "without bias": (without_bias, 1),
    "windows": (windows, 1),
    "convolutions": (convolutions, 1),
    "gemm": (gemm, 1),
    # The last normalization is read by a mean over tokens.
    # Values of attention are shifted as well.
    "fused attention": (nets.transformer, 6),
    "separate attention": (lambda: nets.transformer(fused=False), 6),
    "patches": (nets.patches, 3),
    # One is read by a layer without bias.
    "two widths": (nets.two_widths, 3),
    # One is read by the head alone, the other by a sum as well.
    "after the sum": (nets.post_norm, 1),
}


@pytest.mark.parametrize("kind", EXACT)
def test_channels_end_in_the_middle_and_the_function_stays(kind: str, tmp_path: Path) -> None:
    build, count = EXACT[kind]
    proto = build()
    source, result, found = shifted(proto, tmp_path)
    assert len(found.tensors) == count
    channels = 0
    for tensor in found.tensors:
        before, after = (values_of(m, proto, tensor) for m in (source, result))
        taken = before - after
        np.testing.assert_allclose(taken, np.broadcast_to(taken[0], taken.shape), atol=1e-4)
        # Of queries, keys and values that one layer writes, values alone.
        is_shifted = np.abs(taken[0]) > 1e-3
        ends = np.quantile(after[:, is_shifted], [spans.TAIL, 1 - spans.TAIL], axis=0)
        np.testing.assert_allclose(ends.mean(axis=0), 0.0, atol=1e-4)
        assert is_shifted.all() or is_shifted.mean() == pytest.approx(1 / 3)
        channels += int(is_shifted.sum())
    assert found.channels == channels


def _padded(net: Parts) -> str:
    x = net.op("Pad", "padded", net.begin(), net.ints("pads", 0, 1, 0, 0, 0, 0, 0, 0))
    return net.linear("y", x, WIDTH, 5)


def _padding_conv(net: Parts) -> str:
    return net.conv("y", net.op("Transpose", "front", net.begin(), perm=[0, 3, 1, 2]), (4, WIDTH, 3, 3))


def _with_token(net: Parts) -> str:
    token = net.weight("token", 1, 1, 4, WIDTH)
    return net.linear("y", net.op("Concat", "tokens", token, net.begin(), axis=1), WIDTH, 5)


def _other_axis(net: Parts) -> str:
    """A layer that sums over rows, not over channels, and reads every channel by itself."""
    x = net.op("Transpose", "t", net.begin(), perm=[0, 2, 3, 1])
    return net.linear("y", net.op("Relu", "r", x), 6, 5)


def _scaled_gemm(net: Parts) -> str:
    rows = net.op("Reshape", "rows", net.begin(), net.ints("s", -1, WIDTH))
    return net.op("Gemm", "y", rows, net.weight("w", WIDTH, 5), net.weight("b", 5), alpha=0.5)


@pytest.mark.parametrize(
    "build",
    [*READ_OTHERWISE, _padded, _padding_conv, _with_token, _other_axis, _scaled_gemm],
)
def test_channels_that_something_else_reads_stay(build: Callable[[Parts], str], tmp_path: Path) -> None:
    net = Normalized()
    _, _, found = shifted(net.end(*{build(net): None, "y": None}), tmp_path)
    assert found == Shift()
    assert "No channels" in found.summary


def test_a_layer_over_rows_joins_the_channels_to_one_shift_per_row(tmp_path: Path) -> None:
    """Transposed without anything between: every row of the layer is one channel, and their shifts become one."""
    net = Normalized()
    x = net.op("Transpose", "t", net.begin(), perm=[0, 2, 3, 1])
    proto = net.end(net.linear("y", x, 6, 5))
    source, result, found = shifted(proto, tmp_path)
    taken = values_of(source, proto, "n") - values_of(result, proto, "n")
    assert len(found.tensors) == 1
    np.testing.assert_allclose(taken, taken[0, 0], atol=1e-5)


def test_normalizations_without_a_mean_stay(tmp_path: Path) -> None:
    assert shifted(nets.rms_norm(), tmp_path)[2] == Shift()


def test_networks_without_normalizations_stay(tmp_path: Path) -> None:
    assert shifted(conv_relu_conv(), tmp_path)[2] == Shift()


def test_a_shared_bias_moves_for_its_layer_alone(tmp_path: Path) -> None:
    net = Normalized()
    n = net.begin()
    bias = net.weight("bias", 5)
    first = net.op("Add", "first", net.op("MatMul", "m1", n, net.weight("w1", WIDTH, 5)), bias)
    second = net.op("Add", "second", net.op("MatMul", "m2", "x", net.weight("w2", 7, 5)), bias)
    assert shifted(net.end(first, second), tmp_path)[2].channels == WIDTH


def test_the_result_is_deterministic_and_without_samples_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, again = (shifted(shared(), folder)[1] for folder in (tmp_path, tmp_path / "again"))
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.fingerprint == again.fingerprint != "0"
    with pytest.raises(FeedError):
        shift(canonical(shared(), tmp_path), Samples([]), work_dir=tmp_path)


def test_a_form_that_computes_something_else_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "_moved", lambda layer, _: np.zeros(layer.weight.shape[1]))
    source = canonical(shared(), tmp_path)
    result, found = shift(source, samples_for(shared(), 4), work_dir=tmp_path)
    assert result is source
    assert "would differ" in found.summary


# ---- in a run ------------------------------------------------------------------------------------


def test_shifts_are_tried_when_asked_for() -> None:
    tried = [{"shift": True}, {"shift": True, "weight_bits": 4}, {"method": "aiqvit"}]
    for values in tried:
        assert Recipe.create(values).tries_shift
    for values in (
        {},
        {"weight_bits": 4},
        {"method": "rtn"},
        {"shift": False, "method": "aiqvit"},
    ):
        assert not Recipe.create(values).tries_shift


def test_channels_that_lie_apart_are_shifted_and_the_run_says_so(tmp_path: Path) -> None:
    proto = shared()
    for tensor in proto.graph.initializer:
        if tensor.name == "n.c":
            value = np.linspace(-9, 9, WIDTH, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    path = tmp_path / "net.onnx"
    onnx.save(proto, str(path))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 6, 4, 7)).astype(np.float32)} for _ in range(40)]
    reports = []
    for name in ("with", "without"):
        recipe = Recipe(
            target="simulate",
            activation_bits=4,
            equalize=False,
            rotate=False,
            simplify=False,
            holdout=0.5,
            shift=name == "with",
        )
        result = quantize(
            path, tmp_path / f"{name}.onnx", calibration=feeds, recipe=recipe, work_dir=tmp_path / "work"
        )
        reports.append(result.report)
    said = ["\n".join(report.notes) for report in reports]
    assert f"Shifted between layers: {WIDTH} channels of 1 tensor;" in said[0]
    assert "The channels shifted between layers were kept" in said[0]
    assert "hift" not in said[1]
    assert all(edge.different == 0 for edge in reports[0].parity.edges)
    gains = [report.outputs[0].sqnr_db for report in reports]
    assert gains[0] > gains[1] + 6.0
