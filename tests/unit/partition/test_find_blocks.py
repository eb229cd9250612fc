"""Blocks of known architectures, tensor by tensor, and the properties that hold for every network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxptq.lowering import lower
from onnxptq.lowering.network import BlockNetwork
from onnxptq.partition.blocks import find_blocks, join_halves, merge_blocks, verify_blocks
from onnxptq.partition.dataflow import Dataflow
from onnxptq.partition.describe import describe_blocks
from onnxptq.partition.operators import is_depthwise, is_pointwise
from onnxptq.types import GRAPH_OUTPUT, Block, Site
from tests.unit.partition import small_networks
from tests.unit.partition.small_networks import KNOWN, OTHERS, Net, image_net

ALL = {**{name: (lambda f=f: f()[0]) for name, f in KNOWN.items()}, **OTHERS}


def feed_of(graph: gs.Graph, rows: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    feed = {}
    for t in graph.inputs:
        shape = [d if isinstance(d, int) else rows for d in t.shape]
        floats = np.issubdtype(t.dtype, np.floating)
        feed[t.name] = torch.from_numpy(
            rng.normal(size=shape).astype(np.float32) if floats else rng.integers(0, 2, shape)
        )
    return feed


def assert_composition_equals_network(graph: gs.Graph, blocks: tuple[Block, ...]) -> None:
    feed = feed_of(graph)
    network = BlockNetwork(graph, blocks)
    found = network.run(feed)
    between = [name for block in blocks for name in block.outputs]
    whole = lower(graph, inputs=tuple(feed), outputs=between)(feed)
    assert set(network.outputs) == {t.name for t in graph.outputs}
    for name in between:
        assert torch.equal(found[name], whole[name]), name
    freed = network.run(feed, keep=network.outputs)
    assert set(freed) == set(network.outputs)
    assert all(torch.equal(freed[name], whole[name]) for name in network.outputs)


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_end_where_the_architecture_says(name: str) -> None:
    graph, expected = KNOWN[name]()
    found = [block.outputs for block in find_blocks(graph)]
    if name == "hrnet":  # parallel branches may run in any order
        found = [names for names in map(tuple, map(sorted, found)) if names in expected]
        found, expected = sorted(found), sorted(expected)
    assert found == expected


def _reordered(graph: gs.Graph, seed: int) -> None:
    """Sort the nodes breadth first (seed 0) or at random, as cleaning tools do."""
    rng = np.random.default_rng(seed)
    known = {t.name for t in graph.inputs}
    waiting, order = list(graph.nodes), []
    while waiting:
        ready = [
            node
            for node in waiting
            if all(not t.name or t.name in known or isinstance(t, gs.Constant) for t in node.inputs)
        ]
        chosen = ready if seed == 0 else [ready[rng.integers(len(ready))]]
        order.extend(chosen)
        known.update(t.name for node in chosen for t in node.outputs)
        waiting = [node for node in waiting if node not in chosen]
    graph.nodes[:] = order


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["mobilenet_v2", "vit", "regnet_y", "densenet", "hrnet", "bert"])
def test_blocks_do_not_depend_on_the_order_of_nodes(name: str, seed: int) -> None:
    graph, expected = KNOWN[name]()
    _reordered(graph, seed)
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    found = {tuple(sorted(block.outputs)) for block in blocks}
    missing = {tuple(sorted(names)) for names in expected} - found
    if name == "hrnet":  # the last exchange may start before the last unit in front of it
        assert len(missing) <= 1
    else:
        assert not missing
        assert len(blocks) == len(expected)


@pytest.mark.parametrize("name", ALL)
def test_blocks_partition_the_network_and_compose_to_it(name: str) -> None:
    graph = ALL[name]()
    for options in ({}, {"join": False}, {"max_linears": 1}, {"max_live": 1}, {"max_weights": 100}):
        blocks = find_blocks(graph, **options)
        verify_blocks(graph, blocks)
        assert [b.index for b in blocks] == list(range(len(blocks)))
    assert find_blocks(graph) == find_blocks(graph)
    assert_composition_equals_network(graph, find_blocks(graph))
    assert_composition_equals_network(graph, find_blocks(graph, max_linears=1, join=False))


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("resnet50", "fork", 16),
        ("mobilenet_v2", "fork", 10),
        ("convnext", "fork", 18),
        ("regnet_y", "fork", 16),
        ("vit", "joined", 12),
        ("swin", "joined", 4),
        ("bert", "joined", 3),
    ],
)
def test_number_of_forks(name: str, kind: str, count: int) -> None:
    assert sum(block.kind == kind for block in find_blocks(KNOWN[name]()[0])) == count


def test_halves_stay_apart_on_request() -> None:
    graph, expected = small_networks.vit(join=False)
    blocks = find_blocks(graph, join=False)
    assert [block.outputs for block in blocks] == expected
    assert [block.kind for block in blocks] == ["plain", *["fork"] * 24, "plain"]
    assert join_halves(graph, blocks) == find_blocks(graph)


def test_a_single_transformer_layer_is_no_repeated_pattern() -> None:
    graph, expected = small_networks.vit(join=False, depth=1)
    assert [block.outputs for block in find_blocks(graph)] == expected


def test_shape_subgraphs_are_in_no_block_and_separate_nothing() -> None:
    graph, _ = small_networks.vit()
    nodes = {name for block in find_blocks(graph) for name in block.nodes}
    outside = [node.op for node in graph.nodes if node.name not in nodes]
    assert sorted(outside) == ["Concat", "Expand", "Gather", "Shape", "Unsqueeze"]


def test_a_mask_given_by_the_caller_is_carried_beside_the_cuts() -> None:
    blocks = find_blocks(small_networks.bert()[0])
    mask = blocks[0].outputs[0]
    assert [block.inputs for block in blocks[1:3]] == [
        (blocks[0].outputs[1], mask),
        (*blocks[1].outputs, mask),
    ]


def test_shapes_of_other_blocks_are_stated() -> None:
    graph = small_networks.detector()
    blocks = find_blocks(graph)
    shaped = [block for block in blocks if block.shape_inputs]
    assert shaped
    assert {name for block in shaped for name in block.shape_inputs} >= {"x"}


@pytest.mark.parametrize("name", ["unet", "detector", "densenet", "hrnet"])
def test_large_forks_are_cut_at_few_tensors(name: str) -> None:
    graph = ALL[name]()
    rows = {}
    for max_live in (1, 4):
        blocks = find_blocks(graph, max_live=max_live, max_linears=4)
        by_name = {node.name: node for node in graph.nodes}
        rows[max_live] = max(
            sum(by_name[n].op in ("Conv", "ConvTranspose", "Gemm") for n in block.nodes) for block in blocks
        )
    assert rows[4] <= (8 if name == "hrnet" else 5)  # the exchange of three resolutions has no small cut
    assert rows[1] > rows[4] or name == "densenet"  # a Concat's inputs count as one tensor


def test_a_tensor_that_exists_for_its_shape_is_handed_on() -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    pooled = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])  # only its shape is read, at the end
    y = net.conv(net.conv_relu(x, 4, 4), 4, 4)
    scale = net.op("Cast", net.op("Size", pooled), to=1)
    graph, _ = net.built(net.op("Div", net.conv(y, 4, 2), scale))
    blocks = find_blocks(graph)
    assert_composition_equals_network(graph, blocks)
    owner = next(b for b in blocks if pooled in b.outputs)
    assert pooled in blocks[-1].shape_inputs
    assert owner.index < len(blocks) - 1
    merged = merge_blocks(blocks[:-1], blocks[-1:], index=0)
    pair = (merged, replace(blocks[-1], index=1))
    verify_blocks(graph, pair)
    assert_composition_equals_network(graph, pair)


def test_the_shape_of_a_tensor_inside_an_earlier_block_is_known() -> None:
    net = image_net()
    inside = net.conv("x", 3, 4)
    y = net.conv_relu(net.op("Relu", inside), 4, 4)
    scale = net.op("Cast", net.op("Size", inside), to=1)
    graph, _ = net.built(net.op("Div", net.conv(y, 4, 2), scale))
    blocks = find_blocks(graph)
    assert blocks[-1].shape_inputs == (inside,)
    assert all(inside not in block.outputs for block in blocks)
    assert_composition_equals_network(graph, blocks)
    verify_blocks(graph, (merge_blocks(blocks, [], index=0),))


def test_keys_and_values_of_a_memory_are_computed_in_the_layer_that_reads_them() -> None:
    blocks = find_blocks(small_networks.decoder())
    # Four of the five layers are blocks; in the last one keys may take the place of the memory, which ends there.
    assert [block.kind for block in blocks[1:5]] == ["joined"] * 4
    assert [block.inputs[1:] for block in blocks[1:5]] == [("Relu_2",)] * 4
    assert [len(block.outputs) for block in blocks] == [1] * len(blocks)


def test_a_residual_unit_is_the_last_use_of_its_input() -> None:
    """Else the input would stay alive behind the unit, and a cut inside it would look as good as one behind."""
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    unit = net.op("Relu", net.op("Add", net.conv(net.conv_relu(x, 4, 4), 4, 4), x))
    side = net.conv_relu(x, 4, 4)
    last = net.op("Add", net.conv(net.conv_relu(unit, 4, 4), 4, 4), unit)
    graph, _ = net.built(net.head(net.op("Add", last, net.conv(side, 4, 4)), 4))
    found = [block.outputs for block in find_blocks(graph, max_linears=3)]
    assert (unit,) in found
    assert found.index((side,)) < found.index((unit,))


def test_a_projection_is_no_expansion_of_the_depthwise_layer_behind_it() -> None:
    net = image_net()
    wide = net.conv_relu("x", 3, 16)
    narrow = net.conv_relu(wide, 16, 8, 1)
    separable = net.conv_relu(net.conv_relu(narrow, 8, 8, 3, 1, 8), 8, 12, 1)
    graph, _ = net.built(net.head(separable, 12))
    assert [block.outputs for block in find_blocks(graph)][:2] == [(wide,), (narrow,)]


def test_a_convolution_of_one_channel_is_not_depthwise() -> None:
    net = image_net()
    kinds = {net.conv("x", 3, 3, group=3): True, net.conv("x", 3, 1): False}
    kinds[net.conv(list(kinds)[1], 1, 1)] = False
    graph, _ = net.built(*kinds)
    assert {node.outputs[0].name: is_depthwise(node) for node in graph.nodes} == kinds


def test_a_grouped_convolution_is_not_pointwise() -> None:
    net = image_net()
    kinds = {net.conv("x", 3, 6, 1): True, net.conv("x", 3, 6, 1, group=3): False, net.conv("x", 3, 6): False}
    graph, _ = net.built(*kinds)
    assert {node.outputs[0].name: is_pointwise(node) for node in graph.nodes} == kinds


def test_a_half_that_reads_something_else_too_is_joined_to_no_attention() -> None:
    graph, _ = KNOWN["vit"]()
    apart = list(find_blocks(graph, join=False))
    forks = [i for i, block in enumerate(apart) if block.kind == "fork"]
    second = forks[3]  # the MLP half of the second transformer block
    apart[second] = replace(apart[second], inputs=(*apart[second].inputs, apart[0].outputs[0]))
    found = join_halves(graph, apart)
    assert sum(block.kind == "joined" for block in found) == 11
    assert [block.nodes for block in found if block.kind == "fork"] == [apart[i].nodes for i in forks[2:4]]


def test_a_weight_cap_cuts_what_the_layer_cap_does_not() -> None:
    graph = small_networks.unet()
    assert len(find_blocks(graph, max_linears=99, max_weights=500)) > len(find_blocks(graph, max_linears=99))


def test_heads_on_the_way_are_blocks_of_their_own() -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    early = net.head(x, 4)
    y = net.op("Add", net.conv(net.conv_relu(x, 4, 4), 4, 4), x)
    graph, _ = net.built(early, net.head(y, 4))
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    assert_composition_equals_network(graph, blocks)
    assert {early, y} <= {name for block in blocks for name in block.outputs}


def test_networks_without_products_or_nodes() -> None:
    net = Net({"x": ["n", 4]})
    graph, _ = net.built(net.op("Softmax", net.op("Relu", "x")))
    assert [len(block.nodes) for block in find_blocks(graph)] == [2]
    assert find_blocks(gs.Graph()) == ()
    for wrong in ({"max_live": 0}, {"max_linears": 0}):
        with pytest.raises(ValueError, match="start at 1"):
            find_blocks(graph, **wrong)


def test_sites_are_the_edges_of_the_nodes() -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    y = net.head(x, 4)
    graph, _ = net.built(y)
    first, second = find_blocks(graph)
    assert [(s.tensor, s.consumer, s.input_index, s.is_weight) for s in first.sites] == [
        ("x", "node_0", 0, False),
        ("const_0", "node_0", 1, True),
        ("const_1", "node_0", 2, True),
        ("Conv_0", "node_1", 0, False),
        ("Relu_1", "node_2", 0, False),
        ("GlobalAveragePool_2", "node_3", 0, False),
    ]
    assert second.sites[-1] == Site(tensor=y, consumer=GRAPH_OUTPUT, input_index=0)


def _swapped(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return (blocks[0], blocks[2], blocks[1], *blocks[3:])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b: b[1:], "do not partition"),
        (lambda b: (b[0], *b), "do not partition"),
        (_swapped, "before it is computed"),
        (lambda b: (replace(b[0], outputs=()), *b[1:]), "does not state"),
        (lambda b: (*b[:2], replace(b[2], inputs=(*b[2].inputs, "x")), *b[3:]), "does not state"),
        (lambda b: (*b[:2], replace(b[2], sites=b[2].sites[1:]), *b[3:]), "does not state"),
    ],
    ids=["missing", "repeated", "swapped", "outputs", "inputs", "sites"],
)
def test_wrong_blocks_are_refused(
    broken: Callable[[tuple[Block, ...]], tuple[Block, ...]], message: str
) -> None:
    graph, _ = small_networks.resnet50()
    with pytest.raises(ValueError, match=message):
        verify_blocks(graph, broken(find_blocks(graph)))


def test_rows_of_the_table() -> None:
    graph, _ = small_networks.resnet50()

    class Model:
        def __init__(self) -> None:
            self.graph = graph

        def user_name(self, tensor: str) -> str:
            return f"user's {tensor}"

    rows = describe_blocks(find_blocks(graph), Model())  # type: ignore[arg-type]
    assert (rows[1].kind, rows[1].nodes, rows[1].layers) == ("fork", 8, 4)
    # 1x1 4->2, 3x3 2->2, 1x1 2->8, 1x1 4->8, each with a bias per output.
    assert rows[1].weights == (8 + 2) + (36 + 2) + (16 + 8) + (32 + 8)
    assert rows[0].inputs == ("user's x",)
    assert dict(rows[1].operators) == {"Conv": 4, "Relu": 3, "Add": 1}


def _recurrent(net: Net, x: str) -> str:
    weights = net.const(net.rng.normal(size=(1, 64, 16))), net.const(net.rng.normal(size=(1, 64, 16)))
    y = net.op("LSTM", x, *weights, hidden_size=16)
    return net.op("Squeeze", y, net.ints(1))


def test_what_has_no_torch_form_is_a_block_of_its_own() -> None:
    net = Net({"x": ["t", 1, 8]})
    first = net.op("Relu", net.op("MatMul", "x", net.const(net.rng.normal(size=(8, 16)))))
    last = net.op("MatMul", _recurrent(net, first), net.const(net.rng.normal(size=(16, 4))))
    graph, _ = net.built(last)
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    assert [block.kind for block in blocks] == ["plain", "float", "plain"]
    assert blocks[0].outputs == (first,)
    assert len(blocks[1].nodes) == 1
    assert_composition_equals_network(graph, blocks)


def test_a_fork_is_cut_around_what_has_no_torch_form() -> None:
    """Both layers of the longer path would otherwise be learnt together, the first one through the recurrent node."""
    net = Net({"x": ["t", 1, 8]})
    stem = net.op("Relu", net.op("MatMul", "x", net.const(net.rng.normal(size=(8, 16)))))
    first = net.op("Relu", net.op("MatMul", stem, net.const(net.rng.normal(size=(16, 16)))))
    second = net.op("MatMul", _recurrent(net, first), net.const(net.rng.normal(size=(16, 16))))
    graph, _ = net.built(net.op("Add", stem, second))
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    assert [block.kind for block in blocks] == ["plain", "plain", "float", "region"]
    assert first in blocks[1].outputs
    assert_composition_equals_network(graph, blocks)


def test_a_chain_is_no_half_of_a_transformer_block() -> None:
    graph, _ = KNOWN["vit"]()
    apart = find_blocks(graph, join=False)
    chains = [replace(block, kind="plain") if block.kind == "fork" else block for block in apart]
    assert [block.kind for block in join_halves(graph, chains)] == [block.kind for block in chains]


def test_of_the_readers_of_a_tensor_products_go_last() -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    product = net.conv(x, 4, 4, 1)
    pooled = net.op("MaxPool", x, kernel_shape=[1, 1])
    graph, _ = net.built(net.op("Add", product, pooled))
    assert [node.op for node in Dataflow(graph).nodes] == ["Conv", "Relu", "MaxPool", "Conv", "Add"]


def test_a_depthwise_layer_is_joined_with_a_pointwise_one_alone() -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 8)
    deep = net.conv_relu(x, 8, 8, 3, 1, 8)
    dense = net.conv_relu(deep, 8, 8, 3)
    graph, _ = net.built(net.conv(dense, 8, 4, 3))
    assert [block.outputs for block in find_blocks(graph)][:3] == [(x,), (deep,), (dense,)]


@pytest.mark.parametrize(("most", "is_cut"), [(3, False), (2, True)])
def test_a_fork_of_as_many_layers_as_allowed_is_one_block(most: int, is_cut: bool) -> None:
    net = image_net()
    x = net.conv_relu("x", 3, 4)
    y = x
    for _ in range(3):
        y = net.conv_relu(y, 4, 4)
    graph, _ = net.built(net.op("Add", y, x))
    kinds = [block.kind for block in find_blocks(graph, max_linears=most)]
    assert (kinds == ["plain", "fork"]) != is_cut
