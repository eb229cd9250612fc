"""``onnxptq.rotate``: exact on every network it touches, silent about nothing it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.errors import FeedError
from onnxptq.rotate.orthogonal import spreading_rotation
from onnxptq.rotate.run import Rotation, rotate
from onnxptq.runtime import Session, difference
from onnxptq.types import CanonicalModel
from tests.unit.equalize.equalize_helpers import Samples, canonical, samples_for
from tests.unit.rotate import rotate_nets as nets

TOLERANCE = 1e-5
"""Of the output's largest magnitude: what is promised. Single precision leaves about 1e-6."""


def rotated(model: onnx.ModelProto, folder: Path, seed: int = 0) -> tuple[CanonicalModel, Rotation]:
    """The rotated form, held against onnxruntime's outputs of the original on inputs that were not looked at."""
    source = canonical(model, folder)
    result, found = rotate(source, samples_for(model, 1), work_dir=folder, seed=seed)
    onnx.checker.check_model(str(result.path), full_check=True)
    before, after = (Session(path, exact=True, threads=1) for path in (source.path, result.path))
    for sample in list(samples_for(model, 4))[1:]:
        assert difference(before.run(sample), after.run(sample)) <= TOLERANCE
    ops = [[node.op for node in m.graph.nodes] for m in (source, result)]
    assert ops[0] == ops[1]  # nothing remains to be computed at run time
    assert (result is source) == (not found.streams and not found.heads)
    return result, found


@given(st.integers(1, 96), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_rotations_are_orthogonal_and_keep_the_mean(size: int, seed: int) -> None:
    q = spreading_rotation(size, np.random.default_rng(seed))
    # Double precision leaves about size * 1e-16.
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-13)
    np.testing.assert_allclose(q @ np.ones(size), np.ones(size), atol=1e-13)
    np.testing.assert_array_equal(q, spreading_rotation(size, np.random.default_rng(seed)))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_powers_of_four_spread_every_channel_evenly(size: int) -> None:
    q = spreading_rotation(size, np.random.default_rng(0))
    np.testing.assert_allclose(np.abs(q), size**-0.5, atol=1e-15)


@pytest.mark.parametrize("size", [24, 97, 384])
def test_other_sizes_spread_a_channel_over_many(size: int) -> None:
    q = spreading_rotation(size, np.random.default_rng(0))
    # A coordinate of a uniformly random direction is rarely beyond 4 standard deviations n^-1/2.
    assert np.abs(q).max() < 4.5 * size**-0.5 if size > 24 else np.abs(q).max() < 0.9


@pytest.mark.parametrize(
    ("build", "streams", "heads"),
    [
        (nets.transformer, [24], 2 * 3 * [8] + 2 * 3 * [8]),
        (lambda: nets.transformer(fused=False), [24], 2 * 3 * [8] + 2 * 3 * [8]),
        (lambda: nets.transformer(width=12, heads=1), [12], 2 * 2 * [12]),
        (nets.patches, [16], 2 * 2 * [8]),
        (nets.two_widths, [16, 32], []),
        (nets.without_biases, [16], []),
        (nets.rms_norm, [16], []),
        (lambda: nets.written_rms_norm("none"), [16], []),
        (lambda: nets.written_rms_norm("before"), [16], []),
        (lambda: nets.written_rms_norm("after"), [16], []),
        (nets.embedding, [16], 2 * 2 * [8]),
    ],
    ids=[
        "fused qkv",
        "separate qkv",
        "one head",
        "patches",
        "two widths",
        "no bias",
        "rms norm",
        "written rms norm without scale",
        "written rms norm of what is scaled",
        "written rms norm",
        "embedding",
    ],
)
def test_streams_and_heads_are_found_and_rotated_exactly(
    build: Callable[[], onnx.ModelProto], streams: list[int], heads: list[int], tmp_path: Path
) -> None:
    _, found = rotated(build(), tmp_path)
    assert sorted(found.streams) == streams
    assert sorted(found.heads) == heads
    assert found.skips == ()


@pytest.mark.parametrize(
    "middle", ["none", "number", "gate", "registers", "reversed", "neighbours", "neighbours by position"]
)
def test_what_commutes_with_rotations_is_passed(middle: str, tmp_path: Path) -> None:
    _, found = rotated(nets.one_stream(middle), tmp_path)
    assert found.streams == ((8,) if middle == "reversed" else (16,))
    assert found.skips == ()


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ("relu", "not rotated: Relu writes it"),
        ("layer scale", "not rotated: Mul writes it"),
        ("input", "not rotated: it is a graph input"),
        ("output", "not rotated: it is a graph output"),
        (
            "neighbours of each channel",
            "not rotated: it may take other positions for each channel (GatherElements reads it)",
        ),
    ],
)
def test_what_does_not_commute_is_declined_with_a_reason(middle: str, reason: str, tmp_path: Path) -> None:
    source = canonical(nets.one_stream(middle), tmp_path)
    feeds = samples_for(nets.one_stream(middle), 1)
    result, found = rotate(source, feeds, work_dir=tmp_path)
    assert result is source
    assert [skip.reason for skip in found.skips] == [reason]
    assert rotate(result, feeds, work_dir=tmp_path) == (result, found)  # declining changes nothing
    assert found.summary == f"No channels can be rotated. Left: {found.skips[0].site} {reason}."


def test_channels_that_went_different_ways_are_not_mixed(tmp_path: Path) -> None:
    """Half of the channels are shifted by a token; the halves may be rotated, but not together."""
    _, found = rotated(nets.one_stream("shift"), tmp_path)
    assert sorted(found.streams) == [8, 8]


def test_channels_chosen_by_the_data_are_not_mixed(tmp_path: Path) -> None:
    """What is chosen for the sample that is looked at says nothing about others."""
    _, found = rotated(nets.one_stream("chosen channels"), tmp_path)
    assert found.streams == ()
    assert found.skips


def test_a_scale_that_no_layer_can_take_up_declines_the_stream(tmp_path: Path) -> None:
    _, found = rotated(nets.post_norm(), tmp_path)
    assert found.streams == ()
    assert "its scale cannot move into the layers behind" in found.skips[0].reason


@pytest.mark.parametrize("scale", ["before", "after"])
def test_a_written_scale_that_no_layer_can_take_up_declines_the_stream(scale: str, tmp_path: Path) -> None:
    _, found = rotated(nets.written_rms_norm(scale, last="Relu"), tmp_path)
    assert found.streams == ()
    assert [skip.reason for skip in found.skips] == [
        "not rotated: its scale cannot move into the layers behind: Relu does not commute with a scaling of channels"
        " (Relu reads it) (Mul reads it)"
    ]


def test_a_bias_without_a_place_stays_behind_divided_by_the_scale(tmp_path: Path) -> None:
    result, _ = rotated(nets.two_widths(), tmp_path)
    nodes = {node.name: node for node in result.graph.nodes}
    for name in ("n1", "n2", "n3", "n4"):
        np.testing.assert_array_equal(nodes[name].inputs[1].values, 1.0)
        assert nodes[name].inputs[2].values.any() == (name == "n2")


def test_a_missing_bias_input_is_given(tmp_path: Path) -> None:
    result, _ = rotated(nets.patches(), tmp_path)
    head = next(node for node in result.graph.nodes if node.op == "Gemm")
    assert head.inputs[2].values.shape == (4,)


def test_an_outlier_channel_is_spread(tmp_path: Path) -> None:
    """The purpose: the stream's largest magnitude over its root mean square falls."""
    model = nets.one_stream("none")
    for tensor in model.graph.initializer:
        if tensor.name == "stem.b":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[3] = 40.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, "stem.b"))
    result, _ = rotated(model, tmp_path)
    bias = next(node for node in result.graph.nodes if node.name == "stem").inputs[1].values
    # 40 spread evenly over 16 channels is 10 each; what the other channels had moves that a little.
    assert np.abs(bias).max() < 12


def test_the_seed_chooses_the_rotation_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    found = [rotated(nets.one_stream("none"), tmp_path, seed)[0] for seed in (0, 0, 1)]
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    weights = [m.graph.tensors()["stem.w"].values for m in found[:2]]
    np.testing.assert_array_equal(*weights)


def test_the_original_is_not_edited(tmp_path: Path) -> None:
    model = nets.transformer()
    source = canonical(model, tmp_path)
    before = {name: t.values.copy() for name, t in source.graph.tensors().items() if hasattr(t, "values")}
    rotate(source, samples_for(model, 1), work_dir=tmp_path)
    for name, value in before.items():
        np.testing.assert_array_equal(source.graph.tensors()[name].values, value)


def test_a_difference_beyond_the_tolerance_keeps_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "onnxptq.rotate.run.compare_forms", lambda *_, **__: (1.0, "the outputs would change")
    )
    model = nets.one_stream("none")
    source = canonical(model, tmp_path)
    result, found = rotate(source, samples_for(model, 1), work_dir=tmp_path)
    assert result is source
    assert found.skips[-1].reason == "not rotated: the outputs would change"


def test_the_summary_counts_streams_and_heads() -> None:
    found = Rotation(streams=(16, 32), heads=(8,), difference=1.2e-6)
    assert found.summary == (
        "Rotated: 2 residual streams of 16 or 32 channels, 1 space between two layers of 8 channels; "
        "the float outputs differ by 1.2e-06."
    )


def test_the_summary_says_why_where_there_is_no_stream(tmp_path: Path) -> None:
    net = nets.Blocks()
    x = net.op("Relu", "act", net.linear("first", "x", 16, 16))
    _, found = rotated(net.proto({"x": [1, 6, 16]}, [net.linear("last", x, 16, 4)]), tmp_path)
    assert found == Rotation()
    assert found.summary.startswith("No channels can be rotated: nonlinear operators")


def test_no_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FeedError):
        rotate(canonical(nets.one_stream("none"), tmp_path), Samples([]), work_dir=tmp_path)


def test_layers_of_one_weight_keep_it(tmp_path: Path) -> None:
    net = nets.Blocks()
    y = net.linear("in", "x", 64, 64)
    net.weight("shared", 64, 64)
    for i in range(2):
        layer = net.op("MatMul", f"layer{i}", net.norm(f"norm{i}", y, 64), "shared")
        layer = net.op("Add", f"biased{i}", layer, net.weight(f"bias{i}", 64))
        y = net.op("Add", f"sum{i}", y, layer)
    model = net.proto({"x": [2, 5, 64]}, [net.linear("out", net.norm("last", y, 64), 64, 4)])
    result, _ = rotated(model, tmp_path)
    constants = [tensor for tensor in result.graph.tensors().values() if isinstance(tensor, gs.Constant)]
    assert sum(tuple(tensor.shape) == (64, 64) for tensor in constants) == 2
