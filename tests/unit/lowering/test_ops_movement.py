"""Shapes, indexing, padding and resizing against onnxruntime."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.unit.lowering.lowering_oracle import RNG, check_against_onnxruntime, named, normal


@pytest.mark.parametrize("shape", [[4, 6], [0, -1], [2, 0, 1, 4], [-1], [1, 24, 1]], ids=named)
@pytest.mark.parametrize("opset", [7, 13, 14, 21])
def test_reshape(shape: list[int], opset: int) -> None:
    check_against_onnxruntime("Reshape", {"x": normal(2, 3, 4), "shape": np.array(shape)}, opset=opset)


def test_reshape_of_nothing() -> None:
    feed = {"x": normal(0, 3, 4), "shape": np.array([3, 0, 4])}
    check_against_onnxruntime("Reshape", feed, opset=14, allowzero=1)
    check_against_onnxruntime("Reshape", {"x": normal(0, 12), "shape": np.array([-1, 3, 4])}, opset=14)


@pytest.mark.parametrize("perm", [None, [0, 2, 1], [2, 0, 1]], ids=named)
def test_transpose(perm: list[int] | None) -> None:
    check_against_onnxruntime(
        "Transpose", {"x": normal(2, 3, 4)}, opset=13, **({} if perm is None else {"perm": perm})
    )


@pytest.mark.parametrize(("axis", "opset"), [(0, 9), (1, 7), (3, 13), (-1, 11), (-2, 13)])
def test_flatten(axis: int, opset: int) -> None:
    check_against_onnxruntime("Flatten", {"x": normal(2, 3, 4)}, opset=opset, axis=axis)


@pytest.mark.parametrize("axes", [None, [0], [2], [0, 2]], ids=named)
def test_squeeze(axes: list[int] | None) -> None:
    x = normal(1, 3, 1, 2)
    check_against_onnxruntime("Squeeze", {"x": x}, opset=11, **({} if axes is None else {"axes": axes}))
    feed = {"x": x} if axes is None else {"x": x, "axes": np.array([a - 4 for a in axes])}
    check_against_onnxruntime("Squeeze", feed, opset=13)


@pytest.mark.parametrize("axes", [[0], [1, 3], [3, 0]], ids=named)
def test_unsqueeze(axes: list[int]) -> None:
    check_against_onnxruntime("Unsqueeze", {"x": normal(2, 3)}, opset=11, axes=axes)
    check_against_onnxruntime("Unsqueeze", {"x": normal(2, 3), "axes": np.array(axes)}, opset=13)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis: int) -> None:
    check_against_onnxruntime("Concat", {f"x{i}": normal(2, 2, 2) for i in range(3)}, opset=13, axis=axis)


def test_split() -> None:
    x = normal(6, 4)
    check_against_onnxruntime("Split", {"x": x}, opset=11, n_outputs=2, axis=0, split=[2, 4])
    check_against_onnxruntime("Split", {"x": x}, opset=11, n_outputs=3, axis=0)
    check_against_onnxruntime("Split", {"x": x, "s": np.array([1, 3])}, opset=13, n_outputs=2, axis=-1)
    check_against_onnxruntime("Split", {"x": x}, opset=13, n_outputs=2, axis=1)
    check_against_onnxruntime("Split", {"x": x, "s": np.array([5, 1])}, opset=18, n_outputs=2, axis=0)
    check_against_onnxruntime("Split", {"x": x}, opset=18, n_outputs=4, axis=0, num_outputs=4)


BIG = 2**63 - 1
SLICES: list[dict[str, list[int]]] = [
    {"starts": [1, 0], "ends": [3, BIG]},
    {"starts": [-2], "ends": [BIG], "axes": [1]},
    {"starts": [0], "ends": [-1], "axes": [-1]},
    {"starts": [0, 1], "ends": [5, 7], "axes": [2, 1], "steps": [2, 3]},
    {"starts": [BIG], "ends": [-BIG - 1], "axes": [2], "steps": [-1]},
    {"starts": [-1, 3], "ends": [0, -100], "axes": [2, 1], "steps": [-2, -1]},
    {"starts": [3], "ends": [1], "axes": [1]},
    {"starts": [10], "ends": [20], "axes": [0]},
    {"starts": [-BIG - 1, 1], "ends": [BIG, BIG], "axes": [0, 2], "steps": [1, BIG]},
    {"starts": [0], "ends": [-BIG - 1], "axes": [1]},
]


@pytest.mark.parametrize("case", SLICES, ids=named)
def test_slice(case: dict[str, list[int]]) -> None:
    x = normal(3, 6, 7)
    if "steps" not in case:
        check_against_onnxruntime("Slice", {"x": x}, opset=9, **case)
    feed = {"x": x, **{k: np.array(v) for k, v in case.items()}}
    inputs = ["x", *(k if k in case else "" for k in ("starts", "ends", "axes", "steps"))]
    for opset in (10, 13):
        check_against_onnxruntime("Slice", feed, opset=opset, inputs=inputs)


PADS: list[dict[str, Any]] = [
    {"pads": [0, 1, 2, 0, 3, 1]},
    {"pads": [0, 1, 2, 0, 2, 1], "mode": "reflect"},
    {"pads": [1, 1, 2, 0, 2, 1], "mode": "edge"},
    {"pads": [0, -1, 2, 0, 0, -1]},
]


@pytest.mark.parametrize("case", PADS, ids=named)
@pytest.mark.parametrize("value", [None, 1.5], ids=["zero", "value"])
def test_pad(case: dict[str, Any], value: float | None) -> None:
    x = normal(2, 4, 5)
    legacy = case if value is None else {**case, "value": value}
    check_against_onnxruntime("Pad", {"x": x}, opset=10, **legacy)
    feed = {"x": x, "pads": np.array(case["pads"])}
    if value is not None:
        feed["value"] = np.float32(value)
    for opset in (11, 13, 18, 19):
        check_against_onnxruntime("Pad", feed, opset=opset, mode=case.get("mode", "constant"))


def test_pad_axes_and_wrap() -> None:
    feed = {"x": normal(2, 4, 5), "pads": np.array([1, 2, 3, 0]), "axes": np.array([-1, 1])}
    check_against_onnxruntime("Pad", feed, opset=18, inputs=["x", "pads", "", "axes"])
    check_against_onnxruntime("Pad", feed, opset=19, inputs=["x", "pads", "", "axes"], mode="wrap")


@pytest.mark.parametrize("shape", [[2, 3, 4], [3, 1], [5, 1, 3, 4], [1]], ids=named)
def test_expand(shape: list[int]) -> None:
    check_against_onnxruntime("Expand", {"x": normal(3, 1), "shape": np.array(shape)}, opset=13)


def test_tile() -> None:
    check_against_onnxruntime("Tile", {"x": normal(2, 3), "repeats": np.array([2, 3])}, opset=13)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [1, -1, [0, 2], [[0, -1], [1, 1]]], ids=named)
def test_gather(axis: int, indices: Any) -> None:
    check_against_onnxruntime("Gather", {"x": normal(3, 3, 4), "i": np.array(indices)}, opset=13, axis=axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_and_scatter_elements(axis: int) -> None:
    x, i = normal(3, 3, 3), RNG.permuted(np.tile(np.arange(-3, 0), (3, 3, 1)), axis=axis % 3)
    i = np.stack([np.arange(3)] * 3)[None].repeat(3, 0) - 3 if axis % 3 == 2 else i * 0 + 1
    check_against_onnxruntime("GatherElements", {"x": x, "i": i}, opset=13, axis=axis)
    if axis % 3 == 2:
        check_against_onnxruntime(
            "ScatterElements", {"x": x, "i": i, "u": normal(3, 3, 3)}, opset=13, axis=axis
        )
        check_against_onnxruntime("Scatter", {"x": x, "i": i, "u": normal(3, 3, 3)}, opset=9, axis=axis)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_scatter_reductions(reduction: str) -> None:
    x, u = normal(4, 3), normal(5, 3)
    i = RNG.integers(-4, 4, (5, 3))
    check_against_onnxruntime(
        "ScatterElements", {"x": x, "i": i, "u": u}, opset=18, axis=0, reduction=reduction
    )
    check_against_onnxruntime(
        "ScatterND",
        {"x": x, "i": np.array([[0], [3], [0], [-1], [2]]), "u": u},
        opset=18,
        reduction=reduction,
    )


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_gather_nd(batch_dims: int, depth: int) -> None:
    i = RNG.integers(-2, 2, (2, 3, depth))
    check_against_onnxruntime("GatherND", {"x": normal(2, 2, 2, 3), "i": i}, opset=13, batch_dims=batch_dims)


def test_scatter_nd_writes() -> None:
    feed = {"x": normal(4, 5, 2), "i": np.array([[0, 1], [3, -1], [2, 2]]), "u": normal(3, 2)}
    check_against_onnxruntime("ScatterND", feed, opset=13)


def test_made_from_shapes() -> None:
    x = normal(2, 3, 4)
    check_against_onnxruntime("Shape", {"x": x}, opset=13)
    for start, end in ((1, 3), (-2, None), (0, -1), (2, 9)):
        attributes = {"start": start} if end is None else {"start": start, "end": end}
        check_against_onnxruntime("Shape", {"x": x}, opset=15, **attributes)
    check_against_onnxruntime("Size", {"x": x}, opset=13)
    value = helper.make_tensor("v", TensorProto.INT64, [1], [7])
    check_against_onnxruntime("ConstantOfShape", {"s": np.array([2, 3])}, opset=9, value=value)
    check_against_onnxruntime("ConstantOfShape", {"s": np.array([2, 0])}, opset=9)
    for first, last, step in ((0, 5, 2), (5, -1, -2), (3, 3, 1)):
        feed = {"a": np.array(first), "b": np.array(last), "c": np.array(step)}
        check_against_onnxruntime("Range", feed, opset=11)
    feed = {"a": np.float32(0.5), "b": np.float32(2.1), "c": np.float32(0.5)}
    check_against_onnxruntime("Range", feed, opset=11)


@pytest.mark.parametrize("k", [-1, 0, 2])
@pytest.mark.parametrize("upper", [0, 1], ids=["lower", "upper"])
def test_triangles(k: int, upper: int) -> None:
    check_against_onnxruntime("Trilu", {"x": normal(2, 4, 5), "k": np.array(k)}, opset=14, upper=upper)
    check_against_onnxruntime("EyeLike", {"x": normal(4, 5)}, opset=9, k=k)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int) -> None:
    feed = {"i": np.array([[0, 2], [-1, 7]]), "depth": np.array([4]), "v": np.array([-1.0, 5.0], np.float32)}
    check_against_onnxruntime("OneHot", feed, opset=11, axis=axis)


def test_non_zero_and_compress() -> None:
    x = RNG.integers(0, 2, (3, 4)).astype(np.float32)
    check_against_onnxruntime("NonZero", {"x": x}, opset=13)
    check_against_onnxruntime("Compress", {"x": x, "c": np.array([True, False, True])}, opset=11, axis=0)
    check_against_onnxruntime("Compress", {"x": x, "c": np.array([False, True, True])}, opset=11)


CASTS = [
    (np.float32, TensorProto.INT64),
    (np.float32, TensorProto.BOOL),
    (np.int64, TensorProto.FLOAT),
    (np.float32, TensorProto.FLOAT16),
    (np.bool_, TensorProto.FLOAT),
    (np.float32, TensorProto.INT8),
]


@pytest.mark.parametrize(("source", "to"), CASTS, ids=named)
def test_cast(source: Any, to: int) -> None:
    x = np.array([0.0, -1.7, 2.5, 0.4, -0.9]).astype(source)
    check_against_onnxruntime("Cast", {"x": x}, opset=13, to=to)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    check_against_onnxruntime("DepthToSpace", {"x": normal(2, 12, 3, 2)}, opset=13, blocksize=2, mode=mode)
    check_against_onnxruntime("SpaceToDepth", {"x": normal(2, 3, 4, 6)}, opset=13, blocksize=2)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [0, 1], ids=["free", "align"])
def test_grid_sample(mode: str, padding: str, align: int) -> None:
    grid = (RNG.random((2, 3, 4, 2)) * 2.6 - 1.3).astype(np.float32)
    feed = {"x": normal(2, 3, 5, 6), "grid": grid}
    # Interpolation weights are differences of coordinates near 5: their rounding is about 1e-6 each.
    check_against_onnxruntime(
        "GridSample",
        feed,
        opset=16,
        mode=mode,
        padding_mode=padding,
        align_corners=align,
        rtol=1e-4,
        atol=1e-5,
    )


def test_affine_grid_and_crop() -> None:
    feed = {"theta": normal(2, 2, 3), "size": np.array([2, 3, 4, 5])}
    for align in (0, 1):
        check_against_onnxruntime("AffineGrid", feed, opset=20, align_corners=align)
    for shape in ([4, 9], [7, 3], [2, 2]):
        feed = {"x": normal(3, 5, 6), "shape": np.array(shape)}
        check_against_onnxruntime("CenterCropPad", feed, opset=18, axes=[1, 2])


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
SCALES = [(2.0, 2.0), (2.0, 3.0), (1.5, 0.6), (0.5, 0.5), (0.3, 2.7)]


@pytest.mark.parametrize("scales", SCALES, ids=named)
@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [
        *product(
            [*COORDINATES, "tf_half_pixel_for_nn"],
            ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"],
        ),
        # This mode's other roundings meet whole numbers, up to onnxruntime's own order of operations.
        ("half_pixel_symmetric", "round_prefer_floor"),
    ],
)
def test_resize_nearest(scales: tuple[float, float], coordinates: str, rounding: str) -> None:
    feed = {"x": normal(1, 2, 6, 5), "scales": np.array([1, 1, *scales], np.float32)}
    opset = {"half_pixel_symmetric": 19, "tf_half_pixel_for_nn": 11}.get(coordinates, 13)
    check_against_onnxruntime(
        "Resize",
        feed,
        opset=opset,
        inputs=["x", "x", "scales"] if opset == 11 else ["x", "", "scales"],
        mode="nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
    )


@pytest.mark.parametrize("scales", SCALES, ids=named)
@pytest.mark.parametrize("coordinates", [*COORDINATES, "half_pixel_symmetric"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1], ids=["sharp", "antialias"])
def test_resize_smooth(scales: tuple[float, float], coordinates: str, mode: str, antialias: int) -> None:
    feed = {"x": normal(2, 2, 8, 7), "scales": np.array([1, 1, *scales], np.float32)}
    # Cubic weights are third powers of float32 coordinates.
    check_against_onnxruntime(
        "Resize",
        feed,
        opset=19,
        inputs=["x", "", "scales"],
        mode=mode,
        coordinate_transformation_mode=coordinates,
        antialias=antialias,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("sizes", [(12, 10), (7, 3), (5, 5), (1, 1), (18, 1)], ids=named)
def test_resize_to_sizes(mode: str, sizes: tuple[int, int]) -> None:
    feed = {"x": normal(1, 2, 6, 5), "sizes": np.array([1, 2, *sizes])}
    for coordinates in COORDINATES:
        check_against_onnxruntime(
            "Resize",
            feed,
            opset=13,
            inputs=["x", "", "", "sizes"],
            mode=mode,
            coordinate_transformation_mode=coordinates,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("attributes", [{"exclude_outside": 1}, {"cubic_coeff_a": -0.5}], ids=named)
@pytest.mark.parametrize("scales", [(1.7, 2.0), (2.0, 2.0)], ids=named)
def test_resize_cubic_options(attributes: dict[str, Any], scales: tuple[float, float]) -> None:
    feed = {"x": normal(1, 2, 6, 5), "scales": np.array([1, 1, *scales], np.float32)}
    check_against_onnxruntime(
        "Resize", feed, opset=13, inputs=["x", "", "scales"], mode="cubic", rtol=1e-4, atol=1e-5, **attributes
    )


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_crop(mode: str) -> None:
    roi = np.array([0, 0, 0.2, -0.1, 1, 1, 0.9, 1.2], np.float32)
    feed = {"x": normal(1, 2, 6, 5), "roi": roi, "sizes": np.array([1, 2, 4, 9])}
    check_against_onnxruntime(
        "Resize",
        feed,
        opset=13,
        inputs=["x", "roi", "", "sizes"],
        mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=9.0,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_resize_axes_and_policies(policy: str) -> None:
    feed = {"x": normal(1, 2, 6, 5), "sizes": np.array([9, 11])}
    check_against_onnxruntime(
        "Resize",
        feed,
        opset=18,
        inputs=["x", "", "", "sizes"],
        axes=[2, 3],
        mode="linear",
        keep_aspect_ratio_policy=policy,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (1.5, 3.0), (0.5, 0.4)], ids=named)
def test_legacy_resizing(mode: str, scales: tuple[float, float]) -> None:
    x, values = normal(1, 2, 6, 5), np.array([1, 1, *scales], np.float32)
    check_against_onnxruntime("Resize", {"x": x, "s": values}, opset=10, mode=mode)
    if min(scales) >= 1:
        check_against_onnxruntime("Upsample", {"x": x, "s": values}, opset=9, mode=mode)
        check_against_onnxruntime("Upsample", {"x": x}, opset=7, mode=mode, scales=values.tolist())


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", [None, "half_pixel", "output_half_pixel"], ids=str)
def test_roi_align(mode: str | None, ratio: int) -> None:
    rois = [[0, 0, 15, 15], [3.2, 1.1, 9.7, 12.4], [-3, -4, 5, 6], [10, 2, 30.5, 27], [4, 4, 4.3, 4.2]]
    feed = {"x": normal(2, 3, 10, 12), "rois": np.array(rois, np.float32), "batch": np.array([0, 1, 1, 0, 0])}
    attributes = {} if mode is None else {"coordinate_transformation_mode": mode}
    check_against_onnxruntime(
        "RoiAlign",
        feed,
        opset=10 if mode is None else 16,
        output_height=3,
        output_width=2,
        sampling_ratio=ratio,
        spatial_scale=0.7,
        # Interpolation weights are differences of coordinates near 10.
        rtol=1e-4,
        atol=1e-5,
        **attributes,
    )
