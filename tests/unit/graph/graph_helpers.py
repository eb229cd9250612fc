"""Small models for the tests of ``onnxptq.graph``, and the one strict comparison that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.save import save_graph
from onnxptq.graph.surgeon import import_graph
from onnxptq.runtime.session import Session

Node = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]


def node(op: str, inputs: str, outputs: str, **attrs: Any) -> onnx.NodeProto:
    """``node("Conv", "x w", "y")``; the node is named after its first output. ``_`` is an omitted input."""
    names = ["" if name == "_" else name for name in inputs.split()]
    outs = outputs.split()
    return helper.make_node(op, names, outs, name=f"n_{outs[0]}", **attrs)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str] | Mapping[str, int],
    weights: Mapping[str, np.ndarray] = {},
    *,
    opset: int = 17,
    input_type: int = TensorProto.FLOAT,
    extra_domains: Mapping[str, int] = {},
) -> onnx.ModelProto:
    types = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, TensorProto.FLOAT)
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, input_type, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in extra_domains.items())]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def run(model: onnx.ModelProto | Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of onnxruntime without any of its graph optimizations."""
    source = model if isinstance(model, Path) else model.SerializeToString()
    return dict(Session(source, exact=True, threads=1).run(feed))


def feed_for(model: onnx.ModelProto, *, seed: int = 0, symbol: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feed = {}
    for entry in model.graph.input:
        tensor = entry.type.tensor_type
        # Different symbols get different sizes, so that swapped dimensions show.
        symbols = {dim.dim_param: symbol + i for i, dim in enumerate(tensor.shape.dim) if dim.dim_param}
        shape = [dim.dim_value or symbols[dim.dim_param] for dim in tensor.shape.dim]
        feed[entry.name] = rng.standard_normal(shape).astype(
            helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        )
    return feed


def apply(
    model: onnx.ModelProto, rewrite: Callable[[gs.Graph], int], tmp_path: Path, *, tolerance: float
) -> tuple[int, Counter[str], gs.Graph]:
    """Run one pass; checks the result and its outputs on two feeds; returns count, operators and graph.

    ``tolerance`` is relative to the largest output. 0 means bit-identical.
    """
    graph = import_graph(model, tmp_path)
    count = rewrite(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    path = tmp_path / "rewritten.onnx"
    save_graph(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert [t.name for t in graph.inputs] == [e.name for e in model.graph.input]
    assert [t.name for t in graph.outputs] == [e.name for e in model.graph.output]
    for seed in (0, 1):
        feed = feed_for(model, seed=seed)
        assert_close(run(model, feed), run(path, feed), tolerance)
    return count, Counter(n.op for n in graph.nodes), graph


def assert_close(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], tolerance: float
) -> None:
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        error = np.abs(found[name].astype(np.float64) - value.astype(np.float64)).max(initial=0.0)
        assert error <= tolerance * np.abs(value).max(initial=0.0), (name, error)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def block_function() -> onnx.FunctionProto:
    """``own.Block(i, w)``: the Relu of a product."""
    return helper.make_function(
        "own",
        "Block",
        ["i", "w"],
        ["o"],
        [helper.make_node("MatMul", ["i", "w"], ["t"]), helper.make_node("Relu", ["t"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
