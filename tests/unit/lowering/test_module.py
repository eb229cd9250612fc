"""The lowered module: ranges, hooks, parameters, memory, placement, errors."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxptq.errors import UnsupportedOperatorError
from onnxptq.lowering import LoweredModule, lower, needed_nodes
from onnxptq.types import GRAPH_OUTPUT
from tests.unit.lowering.lowering_oracle import normal


def variable(name: str, shape: Any = None, dtype: Any = np.float32) -> gs.Variable:
    return gs.Variable(name, dtype=dtype, shape=shape)


def mlp() -> gs.Graph:
    """x -> fc1 (Gemm) -> relu -> fc2 (MatMul) -> add skip -> y, and z = the ReLU's output."""
    x, a, h, m, y = (variable(n) for n in ("x", "a", "h", "m", "y"))
    w1, b1 = gs.Constant("w.1", normal(4, 4)), gs.Constant("b.1", normal(4))
    w2 = gs.Constant("w.2", normal(4, 4))
    nodes = [
        gs.Node("Gemm", "fc1", {"transB": 1}, [x, w1, b1], [a]),
        gs.Node("Relu", "relu", {}, [a], [h]),
        gs.Node("MatMul", "fc2", {}, [h, w2], [m]),
        gs.Node("Add", "add", {}, [m, x], [y]),
    ]
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[y, h], opset=17)


@pytest.fixture
def graph() -> gs.Graph:
    return mlp()


@pytest.fixture
def module(graph: gs.Graph) -> LoweredModule:
    return lower(graph, inputs=["x"], outputs=["y", "h"])


def reference(x: torch.Tensor, module: LoweredModule) -> torch.Tensor:
    h = torch.relu(x @ module.constant("w.1").T + module.constant("b.1"))
    return h @ module.constant("w.2") + x


def test_outputs_keep_their_names(module: LoweredModule) -> None:
    x = torch.randn(3, 4)
    found = module({"x": x})
    assert list(found) == ["y", "h"]
    torch.testing.assert_close(found["y"], reference(x, module))


def test_only_the_range_between_inputs_and_outputs_runs(graph: gs.Graph) -> None:
    part = lower(graph, inputs=["h", "x"], outputs=["y"])
    assert part.nodes == ("fc2", "add")
    assert part.constants == ("w.2",)
    h, x = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(part({"h": h, "x": x})["y"], h @ part.constant("w.2") + x)


def test_composition_of_ranges_equals_the_whole(graph: gs.Graph, module: LoweredModule) -> None:
    first, second = lower(graph, inputs=["x"], outputs=["h"]), lower(graph, inputs=["x", "h"], outputs=["y"])
    x = torch.randn(5, 4)
    got = second({"x": x, **first({"x": x})})["y"]
    assert torch.equal(got, module({"x": x})["y"])


def test_fetch_runs_only_what_it_needs(module: LoweredModule) -> None:
    seen: list[str] = []
    for tensor, consumer, index in module.sites:
        module.set_hook(tensor, consumer, index, lambda t, name=tensor: seen.append(name) or t)
    assert set(module({"x": torch.randn(1, 4)}, fetch=["a"])) == {"a"}
    assert sorted(seen) == ["b.1", "w.1", "x"]


def test_missing_names_are_named(graph: gs.Graph, module: LoweredModule) -> None:
    with pytest.raises(ValueError, match="'x' must be among the inputs"):
        lower(graph, inputs=["h"], outputs=["y"])
    with pytest.raises(ValueError, match="'nope' is no tensor"):
        lower(graph, inputs=["x"], outputs=["nope"])
    with pytest.raises(ValueError, match="fed for tensor 'x'"):
        module({})
    with pytest.raises(ValueError, match="'nope' is not computed"):
        module({"x": torch.zeros(1, 4)}, fetch=["nope"])


def test_needed_nodes_of_an_inner_cut(graph: gs.Graph) -> None:
    assert [n.name for n in needed_nodes(graph, inputs=["h"], outputs=["m"])] == ["fc2"]


def test_unsorted_graph_is_refused(graph: gs.Graph) -> None:
    graph.nodes.reverse()
    with pytest.raises(ValueError, match="before it is computed"):
        lower(graph, inputs=["x"], outputs=["y"])


def test_hook_changes_one_edge_only(module: LoweredModule) -> None:
    x = torch.randn(2, 4)
    module.set_hook("x", "add", 1, lambda t: t * 0)
    h = torch.relu(x @ module.constant("w.1").T + module.constant("b.1"))
    torch.testing.assert_close(module({"x": x})["y"], h @ module.constant("w.2"))
    module.clear_hooks()
    torch.testing.assert_close(module({"x": x})["y"], reference(x, module))


def test_hooks_reach_weights_biases_and_inner_tensors(module: LoweredModule) -> None:
    x = torch.randn(2, 4)
    module.set_hook("w.1", "fc1", 1, lambda t: t * 2)
    module.set_hook("b.1", "fc1", 2, lambda t: t + 1)
    module.set_hook("h", "fc2", 0, lambda t: t - 1)
    h = torch.relu(x @ (module.constant("w.1") * 2).T + module.constant("b.1") + 1)
    found = module({"x": x})
    torch.testing.assert_close(found["y"], (h - 1) @ module.constant("w.2") + x)
    torch.testing.assert_close(found["h"], h)


def test_graph_output_hook_leaves_readers_alone(module: LoweredModule) -> None:
    x = torch.randn(2, 4)
    plain = module({"x": x})
    module.set_hook("h", GRAPH_OUTPUT, 0, lambda t: t * 0)
    found = module({"x": x})
    assert torch.equal(found["y"], plain["y"])
    assert not found["h"].any()
    module.set_hook("h", GRAPH_OUTPUT, 0, None)
    assert torch.equal(module({"x": x})["h"], plain["h"])


def test_wrong_hooks_are_refused(module: LoweredModule) -> None:
    for tensor, consumer, index in (
        ("x", "relu", 0),
        ("x", "add", 0),
        ("x", "nobody", 0),
        ("a", GRAPH_OUTPUT, 0),
    ):
        with pytest.raises(ValueError, match=r"no hookable read|no output"):
            module.set_hook(tensor, consumer, index, lambda t: t)


def test_parameters_are_copies_and_receive_gradients(graph: gs.Graph, module: LoweredModule) -> None:
    assert not list(module.parameters())
    found = module.parameters_for(["w.1", "b.1"])
    assert module.parameters_for(["w.1"])["w.1"] is found["w.1"]
    assert len(list(module.parameters())) == 2
    x = torch.randn(3, 4)
    module({"x": x})["y"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found.values())
    before = graph.nodes[0].inputs[1].values.copy()
    with torch.no_grad():
        found["w.1"].add_(1.0)
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, before)
    torch.testing.assert_close(module({"x": x})["y"], reference(x, module))


def test_constants_share_the_graphs_memory(graph: gs.Graph, module: LoweredModule) -> None:
    other = lower(graph, inputs=["x"], outputs=["y"])
    values = graph.nodes[0].inputs[1].values
    assert module.constant("w.1").data_ptr() == values.ctypes.data == other.constant("w.1").data_ptr()


def test_memory_mapped_weights_are_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", normal(4, 4))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    graph = mlp()
    graph.nodes[2].inputs[1].values = mapped
    module = lower(graph, inputs=["x"], outputs=["y"])
    assert module.constant("w.2").data_ptr() == mapped.ctypes.data
    module.parameters_for(["w.2"])["w.2"].data.zero_()
    assert mapped.any()


def test_only_floats_become_parameters() -> None:
    x, y = variable("x"), variable("y")
    node = gs.Node("Add", "add", {}, [x, gs.Constant("one", np.ones(3, np.int64))], [y])
    module = lower(gs.Graph(nodes=[node], inputs=[x], outputs=[y], opset=17), inputs=["x"], outputs=["y"])
    with pytest.raises(ValueError, match="'one' holds"):
        module.parameters_for(["one"])


def test_dead_tensors_are_freed_while_it_runs() -> None:
    names = [f"t{i}" for i in range(6)]
    tensors = [variable(n) for n in names]
    nodes = [gs.Node("Exp", f"n{i}", {}, [tensors[i]], [tensors[i + 1]]) for i in range(5)]
    graph = gs.Graph(nodes=nodes, inputs=[tensors[0]], outputs=[tensors[-1]], opset=17)
    module = lower(graph, inputs=["t0"], outputs=["t5"])
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def watch(t: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(t))
        gc.collect()
        counts.append(sum(r() is not None for r in alive))
        return t

    for i in range(1, 5):
        module.set_hook(names[i], f"n{i}", 0, watch)
    with torch.no_grad():
        module({"t0": torch.zeros(8)})
    assert max(counts) == 1


def test_fetched_tensors_survive_their_readers(module: LoweredModule) -> None:
    assert set(module({"x": torch.zeros(1, 4)}, fetch=["a", "h", "m", "y"])) == {"a", "h", "m", "y"}


def test_a_failing_node_is_named(module: LoweredModule) -> None:
    with pytest.raises(RuntimeError) as caught:
        module({"x": torch.zeros(2, 5)})
    assert any("'fc1'" in note for note in caught.value.__notes__)


def test_a_range_beside_an_unsupported_operator(graph: gs.Graph) -> None:
    keep = variable("keep")
    graph.nodes.append(gs.Node("RandomUniformLike", "draw", {}, [graph.outputs[0]], [keep]))
    graph.outputs.append(keep)
    assert lower(graph, inputs=["x"], outputs=["y"])({"x": torch.zeros(1, 4)})["y"].shape == (1, 4)
    with pytest.raises(UnsupportedOperatorError, match=r"RandomUniformLike version \d+ \(node 'draw'\)"):
        lower(graph, inputs=["x"], outputs=["y", "keep"])
    assert lower(graph, inputs=["keep", "x"], outputs=["keep", "y"]).nodes == ("fc1", "relu", "fc2", "add")


def test_unknown_operator_is_named_before_values_are_loaded() -> None:
    x, y = variable("x"), variable("y")

    class Poison(gs.Constant):  # type: ignore[misc]
        @property
        def values(self) -> Any:
            raise AssertionError("a value was loaded")

    nodes = [
        gs.Node("Add", "add", {}, [x, Poison("w", np.ones(2, np.float32))], [variable("m")]),
        gs.Node("Frobnicate", "frob", {}, [x], [y]),
    ]
    nodes[1].inputs.append(nodes[0].outputs[0])
    graph = gs.Graph(nodes=nodes, inputs=[x], outputs=[y], opset=17)
    with pytest.raises(UnsupportedOperatorError, match=r"Frobnicate version 17 \(node 'frob'\)"):
        lower(graph, inputs=["x"], outputs=["y"])


def shape_arithmetic() -> gs.Graph:
    """Flatten by Shape -> Gather -> Concat -> Reshape, a token by Expand, and a scale by the batch size."""
    x, y = variable("x"), variable("y")
    shape, batch, joined, flat = (variable(n) for n in ("shape", "batch", "joined", "flat"))
    token, both, number, scaled = (variable(n) for n in ("token", "both", "number", "scaled"))
    dims = variable("dims")
    cls = gs.Constant("cls", normal(1, 6))
    nodes = [
        gs.Node("Shape", "shape_of", {}, [x], [shape]),
        gs.Node("Gather", "pick", {"axis": 0}, [shape, gs.Constant("zero", np.array([0]))], [batch]),
        gs.Node("Concat", "join", {"axis": 0}, [batch, gs.Constant("rest", np.array([-1]))], [joined]),
        gs.Node("Reshape", "flatten", {}, [x, joined], [flat]),
        gs.Node("Concat", "dims_of", {"axis": 0}, [batch, gs.Constant("six", np.array([6]))], [dims]),
        gs.Node("Expand", "token", {}, [cls, dims], [token]),
        gs.Node("Concat", "append", {"axis": 1}, [flat, token], [both]),
        gs.Node("Cast", "to_float", {"to": 1}, [batch], [number]),
        gs.Node("Mul", "half", {}, [number, gs.Constant("half", np.array([0.5], np.float32))], [scaled]),
        gs.Node("Mul", "scale", {}, [both, scaled], [y]),
    ]
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[y], opset=17)


@pytest.mark.parametrize("batch", [1, 3])
def test_shape_arithmetic_follows_the_batch(batch: int) -> None:
    module = lower(shape_arithmetic(), inputs=["x"], outputs=["y"])
    x = torch.randn(batch, 2, 3)
    token = module.constant("cls").expand(batch, 6)
    want = torch.cat([x.reshape(batch, 6), token], 1) * (batch * 0.5)
    torch.testing.assert_close(module({"x": x})["y"], want)


def test_shape_arithmetic_stays_on_the_host_whatever_the_device() -> None:
    module = lower(shape_arithmetic(), inputs=["x"], outputs=["y"]).to("meta")
    found = module({"x": torch.empty(3, 2, 3, device="meta")}, fetch=["joined", "scaled", "y"])
    assert found["joined"].tolist() == [3, -1]
    assert found["scaled"].tolist() == [1.5]
    assert found["y"].device.type == "meta"
    assert tuple(found["y"].shape) == (3, 12)


def test_constant_nodes_are_read_like_initializers() -> None:
    x, c, y = variable("x"), variable("c"), variable("y")
    nodes = [
        gs.Node("Constant", "const", {"value": gs.Constant("v", normal(3))}, [], [c]),
        gs.Node("Mul", "mul", {}, [x, c], [y]),
    ]
    module = lower(gs.Graph(nodes=nodes, inputs=[x], outputs=[y], opset=17), inputs=["x"], outputs=["y"])
    assert module.nodes == ("mul",)
    assert module.constants == ("c",)
    module.parameters_for(["c"])
    module({"x": torch.ones(3)})["y"].sum().backward()


def test_caches_made_in_inference_mode_serve_training() -> None:
    x, p, y = variable("x"), variable("p"), variable("y")
    sizes = gs.Constant("sizes", np.array([1, 1, 7, 5]))
    empty = gs.Variable.empty()
    attributes = {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
    nodes = [
        gs.Node("AveragePool", "pool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, [x], [p]),
        gs.Node("Resize", "resize", attributes, [p, empty, empty, sizes], [y]),
    ]
    module = lower(gs.Graph(nodes=nodes, inputs=[x], outputs=[y], opset=17), inputs=["x"], outputs=["y"])
    value = torch.randn(1, 1, 4, 4)
    with torch.inference_mode():
        module({"x": value})
    value.requires_grad_(True)
    module({"x": value})["y"].sum().backward()
    assert value.grad is not None


def test_two_runs_are_equal_to_the_bit(module: LoweredModule) -> None:
    x = torch.randn(7, 4)
    assert torch.equal(module({"x": x})["y"], module({"x": x})["y"])


# ---- walks -------------------------------------------------------------------------------------


def test_a_walk_stops_at_tensors_and_goes_on_with_the_hooks_of_then(module: LoweredModule) -> None:
    x = torch.randn(3, 4)
    seen = []

    def counted(value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        return value

    module.set_hook("a", "relu", 0, counted)
    walk = module.walk({"x": x})
    assert torch.equal(walk.reach("x"), x)
    a = walk.reach("a")
    assert not seen
    torch.testing.assert_close(a, x @ module.constant("w.1").T + module.constant("b.1"))
    # x waits for the sum; weights are nobody's memory.
    assert walk.held_bytes == 4 * (a.numel() + x.numel())
    module.set_hook("h", "fc2", 0, lambda value: value * 2)
    h = torch.relu(a)
    torch.testing.assert_close(walk.reach("y"), h * 2 @ module.constant("w.2") + x)
    assert torch.equal(walk.reach("h"), h)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="'a' is not on the way"):
        walk.reach("a")
    with pytest.raises(ValueError, match="no value is fed for tensor 'x'"):
        module.walk({})
