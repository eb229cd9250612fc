"""Pairs of files that other tools have written, which leave out what has a default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxptq.types import PerAxis, PerTensor
from onnxptq.validate.reading import Pair, WrittenModel

SCALE, ZERO = np.float32(0.1), np.uint8(3)


def _pairs(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, object],
    inputs: Sequence[str] = ("x",),
    *,
    float_names: Sequence[str] = (),
) -> Mapping[str, Pair]:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(path))
    return WrittenModel(path).pairs(frozenset(float_names))


def _quantize(*parameters: str, source: str = "x", **attrs: object) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, *parameters], ["q"], name="quantize", **attrs)


def _dequantize(*parameters: str, source: str = "q", **attrs: object) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [source, *parameters], ["y"], name="dequantize", **attrs)


@pytest.mark.parametrize("side", ["quantize", "dequantize"])
@pytest.mark.parametrize("dynamic", ["s", "z"])
def test_parameters_that_are_computed_make_no_pair(side: str, dynamic: str, tmp_path: Path) -> None:
    """Such as those of dynamic quantization."""
    own, other = ["s", "z"], ["t", "w"]
    first, second = (own, other) if side == "quantize" else (other, own)
    constants = {"s": SCALE, "z": ZERO, "t": SCALE, "w": ZERO}
    del constants[dynamic]
    nodes = [helper.make_node("Identity", ["given"], [dynamic]), _quantize(*first), _dequantize(*second)]
    assert _pairs(tmp_path, nodes, constants, ("x", "given")) == {}


@pytest.mark.parametrize(("output_dtype", "storage"), [(None, "uint8"), (TensorProto.INT8, "int8")])
def test_without_a_zero_point_the_node_tells_the_type(
    output_dtype: int | None, storage: str, tmp_path: Path
) -> None:
    attrs = {} if output_dtype is None else {"output_dtype": output_dtype}
    pair = _pairs(tmp_path, [_quantize("s", **attrs), _dequantize("s")], {"s": SCALE})["y"]
    assert pair.quantize is not None
    assert (pair.quantize.storage, pair.dequantize.storage) == (storage, storage)
    assert (pair.dequantize.zero_point.tolist(), pair.dequantize.granularity) == (0, PerTensor())


def test_integers_tell_the_type_where_nothing_else_does(tmp_path: Path) -> None:
    pair = _pairs(tmp_path, [_dequantize("s", source="w")], {"s": SCALE, "w": np.int8([1, -2])})["y"]
    assert (pair.integers, pair.source, pair.dequantize.storage) == ("w", None, "int8")


def test_the_axis_is_the_second_one_by_default(tmp_path: Path) -> None:
    constants = {"s": np.float32([0.1, 0.2]), "w": np.zeros((2, 2), np.int8)}
    assert _pairs(tmp_path, [_dequantize("s", source="w")], constants)["y"].dequantize.granularity == PerAxis(
        1
    )


@pytest.mark.parametrize(
    ("float_names", "source"), [([], "x"), (["clip"], "c"), (["c"], "c")], ids=["own", "node", "tensor"]
)
def test_a_clip_of_the_float_model_is_no_part_of_a_pair(
    float_names: list[str], source: str, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["c"], name="clip"),
        _quantize("s", "z", source="c"),
        _dequantize("s", "z"),
    ]
    constants = {"s": SCALE, "z": ZERO, "low": np.float32(0), "high": np.float32(6)}
    pair = _pairs(tmp_path, nodes, constants, float_names=float_names)["y"]
    assert pair.source == source
    assert (pair.clip is None) == bool(float_names)
    assert ("clip" in pair.nodes) == (not float_names)


def test_a_clip_with_one_bound_is_no_part_of_a_pair(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Clip", ["x", "low"], ["c"], name="clip"),
        _quantize("s", "z", source="c"),
        _dequantize("s", "z"),
    ]
    pair = _pairs(tmp_path, nodes, {"s": SCALE, "z": ZERO, "low": np.float32(0)})["y"]
    assert (pair.source, pair.clip) == ("c", None)


def test_nodes_of_the_same_name_in_another_domain_are_something_else(tmp_path: Path) -> None:
    for domain, count in (("com.microsoft", 1), ("my.domain", 0)):
        nodes = [_quantize("s", "z", domain=domain), _dequantize("s", "z", domain=domain)]
        assert len(_pairs(tmp_path, nodes, {"s": SCALE, "z": ZERO})) == count
