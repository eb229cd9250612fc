"""The loss at the network's outputs, against a run of the whole network in which one pack alone is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.special import log_softmax, softmax

from onnxptq.graph.index import probability_outputs
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.quantized import quantizing_hooks, set_hooks
from onnxptq.ranks import ALONE
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.objective import Objective, norms_of
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.suffix import Suffix, wanted_outputs
from onnxptq.reconstruct.training import train
from tests.unit.reconstruct.pack_cases import Case, case, chain, tensors
from tests.unit.small_nets import Net, conv_relu_conv


def _ends_in(last: str) -> onnx.ModelProto:
    net = Net(seed=4)
    x = net.op("Relu", "r", net.linear("a", "x", 6, 8))
    x = net.op("Add", "s", net.linear("b", x, 8, 6), "x")
    x = net.linear("c", x, 6, 5)
    return net.proto({"x": ["n", 6]}, [x if not last else net.op(last, "p", x, axis=-1)])


def _tokens() -> onnx.ModelProto:
    net = Net(seed=5)
    x = net.op("Add", "s", net.op("Gelu", "g", net.linear("a", "x", 6, 6)), "x")
    return net.proto({"x": ["n", 3, 6]}, [net.linear("b", x, 6, 4)])


def _two_outputs() -> onnx.ModelProto:
    """The first pack writes an output of the network as well."""
    net = Net(seed=6)
    first = net.op("Relu", "r", net.linear("a", "x", 6, 8))
    return net.proto({"x": ["n", 6]}, [first, net.linear("b", first, 8, 4)])


def _suffix(made: Case, data: PackData) -> Suffix:
    probabilities = probability_outputs(made.model.graph)
    wanted = wanted_outputs(data.network, tensors(made.samples), probabilities, lambda value: value, ALONE)
    return Suffix(data, wanted)


def _quantized_first(made: Case) -> list[Values]:
    network = BlockNetwork(made.model.graph, made.packs)
    hooks = quantizing_hooks(made.model.graph, made.packs[0], made.plan, made.start)
    set_hooks(network.modules[0], hooks)
    return [network.run(feed, keep=network.outputs) for feed in tensors(made.samples)]


def _found(made: Case, data: PackData, chosen: list[int]) -> Values:
    set_hooks(data.module, quantizing_hooks(made.model.graph, made.packs[0], made.plan, made.start))
    found = data.module(data.quantized(chosen))
    data.module.clear_hooks()
    return {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in found.items()}


def _by_hand(made: Case, kind: str) -> float:
    total = 0.0
    for name in made.outputs(None)[0]:
        fp = np.concatenate([w[name].numpy() for w in made.outputs(None)]).astype(np.float64)
        q = np.concatenate([f[name].numpy() for f in _quantized_first(made)]).astype(np.float64)
        if kind == "relative":
            total += np.square(q - fp).sum() / np.square(fp).sum()
        elif kind == "logits":
            p = softmax(fp, axis=1)
            total += (p * (log_softmax(fp, axis=1) - log_softmax(q, axis=1))).sum() / len(fp)
        else:
            total += (fp * (np.log(fp) - np.log(q))).sum() / len(fp)
    return total


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: _ends_in(""), "logits"),
        (lambda: _ends_in("Softmax"), "probabilities"),
        (_tokens, "relative"),
        (conv_relu_conv, "relative"),
        (_two_outputs, "logits"),
    ],
    ids=["logits", "probabilities", "tokens", "convolutions", "two outputs"],
)
def test_the_loss_is_that_of_the_whole_network(
    build: Callable[[], onnx.ModelProto], kind: str, tmp_path: Path
) -> None:
    made = case(build(), tmp_path, samples=9)
    assert len(made.packs) > 1
    data = made.data()
    suffix = _suffix(made, data)
    chosen = list(range(9)) if suffix.wanted.is_joinable else [0]
    if len(chosen) == 1:
        made = replace(made, samples=made.samples[:1])
        suffix = _suffix(made, data)
    loss = suffix.loss(_found(made, data, chosen), chosen)
    assert loss is not None
    assert loss.item() == pytest.approx(_by_hand(made, kind), rel=1e-4)


def test_gradients_are_those_of_finite_differences(tmp_path: Path) -> None:
    made = case(_ends_in(""), tmp_path, samples=6)
    data = made.data()
    suffix = _suffix(made, data)
    found = _found(made, data, list(range(6)))
    loss = suffix.loss(found, range(6))
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    (name,) = (n for n in found if n in made.packs[0].outputs)
    gradient = found[name].grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    ends = [suffix.loss({**found, name: found[name] + s * direction}, range(6)) for s in (step, -step)]
    assert ends[0] is not None
    assert ends[1] is not None
    # Single precision, and the third derivative times step^2.
    assert (ends[0] - ends[1]).item() / (2 * step) == pytest.approx(
        float((gradient * direction).sum()), rel=5e-3
    )


def test_the_last_pack_has_its_own_outputs_only(tmp_path: Path) -> None:
    made = case(chain(1), tmp_path, samples=4, longest=99)
    data = made.data()
    loss = _suffix(made, data).loss(_found(made, data, [0, 1, 2, 3]), range(4))
    assert loss is not None
    assert loss.item() > 0


def test_local_and_global_count_two_to_one_at_the_start(tmp_path: Path) -> None:
    made = case(_ends_in(""), tmp_path, samples=8)
    data = made.data()
    objective = Objective(data, norms_of(data, range(8)), _suffix(made, data))
    set_hooks(data.module, quantizing_hooks(made.model.graph, made.packs[0], made.plan, made.start))
    assert objective.begin(range(8)) == pytest.approx(3.0)
    local, distant = objective.start
    assert local > 0
    assert distant == pytest.approx(_by_hand(made, "logits"), rel=1e-4)
    assert objective.combined(local / 2, distant) == pytest.approx(2.0)
    assert objective.combined(local, distant / 2) == pytest.approx(2.5)


def test_what_holds_for_one_sample_behind_the_pack_keeps_samples_apart(tmp_path: Path) -> None:
    net = Net(seed=4)
    x = net.linear("b", net.op("Relu", "r", net.linear("a", "x", 6, 6)), 6, 6)
    x = net.op("Reshape", "flat", x, net.constant("shape", np.array([1, 6], np.int64)))
    made = case(net.proto({"x": [1, 6]}, [net.linear("c", x, 6, 4)]), tmp_path, samples=6)
    assert len(made.packs) > 1
    assert not _suffix(made, made.data()).wanted.is_joinable
    settings = Learning(steps=6, batch=4, is_global=True, checks=2)
    one, many = (made.solved(settings, together=n).solution for n in (1, 16))
    assert all(np.array_equal(one.weights[n], many.weights[n]) for n in one.weights)


@pytest.mark.parametrize("build", [lambda: _ends_in(""), _tokens])
def test_steps_make_both_losses_small(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """On the samples that are learnt from; together they begin at 3."""
    made = case(build(), tmp_path, samples=32, weight_bits=4, activation_bits=4)
    data = made.data()
    suffix = _suffix(made, data)
    settings = Learning(steps=100, batch=16, held_out=0.0, is_global=True)
    learned = PackQuantizers(
        made.index, made.packs[0], data.module, made.plan, made.start, settings, settled=frozenset()
    )
    objective = Objective(data, norms_of(data, range(32)), suffix)
    with learned.hard():
        objective.begin(range(32))
    train(data, learned, settings, torch.Generator().manual_seed(0), suffix)
    with learned.hard():
        assert objective.combined(*objective.measured(range(32))) < 2.7
