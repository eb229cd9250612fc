"""Fisher weights against the matrix that they are the diagonal of."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxptq.lowering.network import BlockNetwork
from onnxptq.lowering.output_loss import LossChoice
from onnxptq.partition.blocks import find_blocks
from onnxptq.reconstruct.fisher import _scaled, fisher_weights

RNG = np.random.default_rng(5)
FIRST = RNG.standard_normal((4, 6)).astype(np.float32)
SECOND = (RNG.standard_normal((6, 3)) * np.linspace(0.2, 2.0, 6)[:, None]).astype(np.float32)
DRAWS = 4000


def _network(last: str, tokens: int | None = None) -> BlockNetwork:
    """x -> x FIRST -> Relu -> hidden SECOND -> (Softmax or nothing); with a number of ``tokens`` for each of them."""
    middle = [] if tokens is None else [tokens]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["h"], name="h"),
        helper.make_node("MatMul", ["h", "second"], ["z"], name="z"),
    ]
    if last == "Softmax":
        nodes.append(helper.make_node("Softmax", ["z"], ["p"], name="p", axis=1))
    out = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *middle, 4])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", *middle, 3])],
        [numpy_helper.from_array(FIRST, "first"), numpy_helper.from_array(SECOND, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    imported = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    return BlockNetwork(imported, find_blocks(imported))


@pytest.mark.parametrize("last", ["logits", "Softmax"])
def test_weights_are_the_diagonal_of_the_fisher_matrix(last: str) -> None:
    network = _network(last)
    x = torch.from_numpy(RNG.standard_normal((1, 4)).astype(np.float32)).abs()
    probabilities = frozenset(network.outputs) if last == "Softmax" else frozenset()
    found = fisher_weights(network, {i: {"x": x} for i in range(DRAWS)}, probabilities, 1)
    hidden = np.maximum(x.numpy() @ FIRST, 0.0)
    z = hidden @ SECOND
    p = (np.exp(z - z.max()) / np.exp(z - z.max()).sum())[0]
    exact = np.diag(SECOND @ (np.diag(p) - np.outer(p, p)) @ SECOND.T)
    exact = np.maximum(exact / exact.mean(), 0.05)
    inner = [name for name in found if found[name].shape[-1] == 6]
    assert inner
    assert not found.keys() & {*network.outputs, "x"}
    for name in inner:
        got = found[name].numpy().reshape(-1)
        assert got.mean() == pytest.approx(1.0, abs=1e-5)
        if name == "h":
            # The standard error of a mean of 4000 squares is a few percent of it.
            np.testing.assert_allclose(got, exact / exact.mean(), rtol=0.15, atol=0.02)


def test_same_seed_same_weights_and_every_sample_counts() -> None:
    network = _network("logits")
    xs = [{"x": torch.from_numpy(RNG.standard_normal((1, 4)).astype(np.float32))} for _ in range(8)]
    numbered = dict(enumerate(xs))
    one, two = (fisher_weights(network, numbered, frozenset(), 3) for _ in range(2))
    fewer = fisher_weights(network, dict(enumerate(xs[:-1])), frozenset(), 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], fewer[name]) for name in one)


def _weights_of(tokens: int | None, asked: LossChoice) -> torch.Tensor:
    """Weights of the hidden layer on inputs that are repeated for every token."""
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 4)).astype(np.float32)).abs()
    x = x if tokens is None else x[:, None].expand(1, tokens, 4)
    network = _network("logits", tokens)
    feeds = {i: {"x": x} for i in range(DRAWS // (tokens or 1))}
    return fisher_weights(network, feeds, frozenset(), 1, asked=asked)["h"].reshape(-1)


def test_outputs_are_what_the_recipe_says() -> None:
    """Token logits count as classes where that is asked for, and matrices as plain numbers."""
    classes, numbers = _weights_of(None, "kl"), _weights_of(None, "relative")
    assert torch.equal(classes, _weights_of(None, "auto"))
    assert not torch.allclose(classes, numbers, rtol=0.3)
    torch.testing.assert_close(_weights_of(4, "kl"), classes, rtol=0.2, atol=0.03)
    torch.testing.assert_close(_weights_of(4, "auto"), numbers, rtol=0.2, atol=0.03)


def test_one_weight_per_channel_along_the_axis_that_is_told() -> None:
    found = [
        fisher_weights(_network("logits", 5), {0: {"x": torch.ones(1, 5, 4)}}, frozenset(), 1, axes=axes)["h"]
        for axes in ({}, {"h": 1})
    ]
    assert [tuple(value.shape) for value in found] == [(1, 1, 6), (1, 5, 1)]


def test_channels_that_differ_in_number_from_sample_to_sample_have_no_weight_each() -> None:
    network = _network("logits")
    inputs = {i: {"x": torch.ones((rows, 4))} for i, rows in enumerate((2, 3))}
    found = fisher_weights(network, inputs, frozenset(), 1, axes={"a": 0, "h": 0})
    # What the last sample alone says.
    assert {value.shape for value in found.values()} == {(3, 1)}


def test_a_tensor_that_has_never_mattered_weighs_every_element_alike() -> None:
    assert torch.equal(_scaled(torch.zeros(1, 6)), torch.ones(1, 6))


def test_probabilities_say_what_their_logits_say() -> None:
    """With the same draws, as they are drawn from the same p; peaked, so that p is far from softmax(p)."""
    x = {i: {"x": torch.from_numpy(4 * RNG.standard_normal((1, 4)).astype(np.float32))} for i in range(20)}
    logits, softmax = _network("logits"), _network("Softmax")
    one = fisher_weights(logits, x, frozenset(), 1)
    other = fisher_weights(softmax, x, frozenset(softmax.outputs), 1)
    shared = one.keys() & other.keys()
    assert shared
    for name in shared:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), rtol=1e-3, atol=1e-4)
