"""Running a model through the lowering and through onnxruntime, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx import helper, numpy_helper

from onnxptq.lowering import lower
from onnxptq.runtime import Session
from onnxptq.types import Array

IR_VERSION = 10
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    """Standard normal float32 numbers; they start anew in every test."""
    return RNG.normal(size=shape).astype(np.float32)


def named(value: Any) -> str:
    """A readable test id for attributes and shapes."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in value.items()) or "default"
    return str(value).replace(" ", "")


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    """The graph of ``model`` with unique node names."""
    graph = gs.import_onnx(model)
    for i, node in enumerate(graph.nodes):
        node.name = f"{node.op}_{i}"
    return graph


def tensor(array: Array) -> torch.Tensor:
    """A torch copy of ``array``, bfloat16 included."""
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(value: torch.Tensor) -> Array:
    """A numpy view of ``value``; bfloat16 becomes float32."""
    value = value.detach()
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def run_lowered(model: onnx.ModelProto, feed: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs of the lowered model."""
    graph = graph_of(model)
    module = lower(graph, inputs=tuple(feed), outputs=[t.name for t in graph.outputs])
    found = module({name: tensor(value) for name, value in feed.items()})
    return {name: array_of(value) for name, value in found.items()}


def freeze(model: onnx.ModelProto, feed: Mapping[str, Any], names: Sequence[str]) -> onnx.ModelProto:
    """``model`` with the inputs ``names`` turned into initializers."""
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    kept = [i for i in frozen.graph.input if i.name not in names]
    del frozen.graph.input[:]
    frozen.graph.input.extend(kept)
    frozen.graph.initializer.extend(numpy_helper.from_array(np.asarray(feed[n]), n) for n in names)
    return frozen


def node_model(
    op: str,
    feed: Mapping[str, Any],
    *,
    opset: int,
    inputs: Sequence[str] | None = None,
    n_outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node. ``inputs`` may hold "" for an absent input; output types are left to inference."""
    names = list(feed) if inputs is None else list(inputs)
    outputs = [f"y{i}" for i in range(n_outputs)]
    node = helper.make_node(op, names, outputs, name="node", **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.asarray(v).dtype), v.shape)
            for n, v in feed.items()
        ],
        [onnx.ValueInfoProto(name=n) for n in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    return onnx.shape_inference.infer_shapes(model)


def assert_same(got: Array, want: Array, *, rtol: float, atol: float, label: str = "") -> None:
    """Same type, same shape, same values (NaN where NaN, infinities of one sign)."""
    if want.dtype.name == "bfloat16":
        want = want.astype(np.float32)
    assert got.dtype == want.dtype, f"{label}: {got.dtype} is not {want.dtype}"
    assert got.shape == want.shape, f"{label}: {got.shape} is not {want.shape}"
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=label)


def check_against_onnxruntime(
    op: str,
    feed: Mapping[str, Any],
    *,
    opset: int,
    inputs: Sequence[str] | None = None,
    n_outputs: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **attributes: Any,
) -> None:
    """One node against onnxruntime: once with every input fed, once with all but the first constant.

    The tolerances are float32 rounding of sums in another order; ``atol`` is relative to the largest element,
    because a sum that cancels keeps the rounding of its terms.
    """
    feed = {name: np.asarray(value) for name, value in feed.items()}
    model = node_model(op, feed, opset=opset, inputs=inputs, n_outputs=n_outputs, **attributes)
    want = Session(model.SerializeToString(), exact=True, threads=1).run(feed)
    others = list(feed)[1:]
    for form, names in (("fed", ()), ("constant", tuple(others))):
        if form == "constant" and not names:
            continue
        left = {n: v for n, v in feed.items() if n not in names}
        got = run_lowered(freeze(model, feed, names), left)
        for name, value in want.items():
            finite = value[np.isfinite(value)] if value.dtype.kind == "f" else np.zeros(0)
            largest = float(np.abs(finite).max(initial=1.0))
            assert_same(got[name], value, rtol=rtol, atol=atol * largest, label=f"{op} {name} ({form})")
