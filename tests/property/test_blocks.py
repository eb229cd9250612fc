"""Blocks of random data-flow graphs partition, run alone, compose exactly, and are cut where little lives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxptq.lowering import lower
from onnxptq.lowering.network import BlockNetwork
from onnxptq.partition.blocks import find_blocks, verify_blocks
from onnxptq.partition.pack import pack_blocks
from onnxptq.types import Block, Sensitivity

CHANNELS = 4
KINDS = ("conv", "relu", "add", "mul", "concat", "split", "shift", "size", "reshape", "norm")


@st.composite
def graphs(draw: st.DrawFn, most_inputs: int = 2) -> gs.Graph:
    """Up to 16 steps over tensors (n, 4, 3, 3), each reading what came before; one to three outputs."""
    n_inputs = draw(st.integers(1, most_inputs))
    tensors = [f"in{i}" for i in range(n_inputs)]
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {"ones": np.ones(CHANNELS, np.float32)}
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def add(kind: str, *reads: str, n: int = 1, **attrs: Any) -> list[str]:
        names = [f"t{len(nodes)}_{i}" for i in range(n)]
        nodes.append(helper.make_node(kind, list(reads), names, name=f"node{len(nodes)}", **attrs))
        return names

    def weight(*shape: int) -> str:
        name = f"w{len(weights)}"
        weights[name] = rng.normal(size=shape).astype(np.float32) / 2
        return name

    def constant(value: Any) -> str:
        name = f"c{len(weights)}"
        weights[name] = np.asarray(value)
        return name

    def recent() -> str:
        # Mostly the newest tensors, so that chains with skips arise rather than stars.
        return tensors[-1 - min(draw(st.integers(0, 5)) // 2, len(tensors) - 1)]

    for _ in range(draw(st.integers(1, 16))):
        kind, x = draw(st.sampled_from(KINDS)), recent()
        if kind == "conv":
            made = add("Conv", x, weight(CHANNELS, CHANNELS, 1, 1), weight(CHANNELS))
        elif kind == "relu":
            made = add("Relu", x)
        elif kind in ("add", "mul"):
            made = add(kind.capitalize(), x, recent())
        elif kind == "concat":
            joined = add("Concat", x, recent(), axis=1)[0]
            made = add("Conv", joined, weight(CHANNELS, 2 * CHANNELS, 1, 1))
        elif kind == "split":
            halves = add("Split", x, n=2, axis=1, num_outputs=2)
            made = [*add("Concat", halves[1], add("Relu", halves[0])[0], axis=1)]
        elif kind == "shift":
            # A constant expanded to the shape of another tensor: reads no values of it.
            shape = add("Shape", recent())[0]
            made = add("Add", x, add("Expand", weight(1, CHANNELS, 1, 1), shape)[0])
        elif kind == "size":
            # Scales with the number of elements of another tensor, of which it reads no values.
            size = add("Cast", add("Size", recent())[0], to=TensorProto.FLOAT)[0]
            made = add("Mul", x, add("Reciprocal", size)[0])
        elif kind == "reshape":
            flat = add("Reshape", x, constant([0, -1]))[0]
            made = add("Reshape", flat, constant([-1, CHANNELS, 3, 3]))
        else:
            variance = constant(np.full(CHANNELS, 0.5, np.float32))
            made = add("BatchNormalization", x, "ones", weight(CHANNELS), weight(CHANNELS), variance)
        tensors.extend(made)
    outputs = {tensors[-1]} | {
        draw(st.sampled_from(tensors[n_inputs:])) for _ in range(draw(st.integers(0, 2)))
    }
    info = [
        helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, ["n", CHANNELS, 3, 3])
        for i in range(n_inputs)
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "random",
            info,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(outputs)],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    return gs.import_onnx(onnx.shape_inference.infer_shapes(model))


def _feed(graph: gs.Graph) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return {
        t.name: torch.from_numpy(rng.normal(size=(2, CHANNELS, 3, 3)).astype(np.float32))
        for t in graph.inputs
    }


def _data_nodes(graph: gs.Graph) -> set[str]:
    """By definition: on a path from an input that does not pass a Shape or Size, and needed for an output."""
    data = {t.name for t in graph.inputs}
    flowing = []
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and any(t.name in data for t in node.inputs):
            data.update(t.name for t in node.outputs)
            flowing.append(node)
    needed = {t.name for t in graph.outputs}
    for node in reversed(graph.nodes):
        if any(t.name in needed for t in node.outputs):
            needed.update(t.name for t in node.inputs)
    return {node.name for node in flowing if any(t.name in needed for t in node.outputs)}


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 3), st.sampled_from([1, 2, 10]), st.booleans())
def test_blocks_partition_and_compose(graph: gs.Graph, max_live: int, max_linears: int, join: bool) -> None:
    blocks = find_blocks(graph, max_live=max_live, max_linears=max_linears, join=join)
    verify_blocks(graph, blocks)
    names = [name for block in blocks for name in block.nodes]
    assert len(names) == len(set(names))
    assert set(names) == _data_nodes(graph)
    _assert_composes(graph, blocks)


def _assert_composes(graph: gs.Graph, blocks: tuple[Block, ...]) -> None:
    feed = _feed(graph)
    network = BlockNetwork(graph, blocks)
    found = network.run(feed)
    wanted = [*{name for block in blocks for name in block.outputs}]
    whole = lower(graph, inputs=tuple(feed), outputs=wanted)(feed)
    for name in wanted:
        assert torch.equal(found[name], whole[name])
    assert {t.name for t in graph.outputs} <= set(wanted)
    # Alone: a block knows nothing of the network but its inputs, and of some only their shape.
    for i, block in enumerate(blocks):
        alone = {name: found[name].clone() for name in block.inputs}
        alone |= {name: torch.zeros(found[name].shape) for name in block.shape_inputs}
        again = network.run_block(i, alone)
        assert all(torch.equal(again[name], found[name]) for name in block.outputs)


@settings(max_examples=60, deadline=None)
@given(graphs(most_inputs=1))
def test_without_a_size_cap_every_boundary_is_one_tensor(graph: gs.Graph) -> None:
    # With a second input there may be masks, which no cut counts.
    blocks = find_blocks(graph, max_linears=10**6, join=False)
    inputs = {t.name for t in graph.inputs}
    for cut in range(1, len(blocks)):
        before = {name for block in blocks[:cut] for name in (*block.outputs, *block.inputs)}
        after = {name for block in blocks[cut:] for name in block.inputs}
        # An input that nobody has read yet is no boundary; one that is read on both sides is.
        used = {name for block in blocks[:cut] for name in block.inputs}
        live = {name for name in before & after if name not in inputs or name in used}
        assert len(live) <= 1


@settings(max_examples=40, deadline=None)
@given(graphs(), st.lists(st.integers(0, 3), min_size=40, max_size=40), st.integers(1, 4))
def test_packs_run_alone_and_compose(graph: gs.Graph, levels: list[int], longest: int) -> None:
    blocks = find_blocks(graph, max_linears=2)
    scores = [
        Sensitivity(block=i, loss=0.0, squared_error=1.0, absolute_error=1.0, curvature=float(v), omega=0.0)
        for i, v in zip(range(len(blocks)), levels, strict=False)
    ]
    packs = pack_blocks(blocks, scores, max_pack_blocks=longest)
    assert [block for pack in packs for block in pack.blocks] == list(blocks)
    units = tuple(
        Block(
            index=pack.index,
            kind="joined",
            nodes=pack.nodes,
            inputs=pack.inputs,
            outputs=pack.outputs,
            shape_inputs=pack.shape_inputs,
            sites=pack.sites,
        )
        for pack in packs
    )
    verify_blocks(graph, units)
    _assert_composes(graph, units)
