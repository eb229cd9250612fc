"""Running samples together, and keeping their values in files."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnxptq.lowering import LoweredModule
from onnxptq.lowering.network import BlockNetwork
from onnxptq.lowering.quantized import quantizing_hooks, set_hooks
from onnxptq.reconstruct.learning import FAST, Learning
from onnxptq.reconstruct.pack_data import InnerValues, joined, most_together, run_all
from onnxptq.reconstruct.rounding import compensable_layers
from onnxptq.reconstruct.vault import Vault
from onnxptq.types import Sample
from tests.unit.reconstruct.pack_cases import Case, case, chain, tensors
from tests.unit.small_nets import Net, residual_block

Shapes = Sequence[Mapping[str, Sequence[int]]]


def _samples(shapes: Shapes, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [{n: rng.standard_normal(s).astype(np.float32) for n, s in shape.items()} for shape in shapes]


def _reshape_to_one(net: Net) -> str:
    shape = net.constant("shape", np.array([1, 12], np.int64))
    return net.linear("y", net.op("Reshape", "flat", "x", shape), 12, 4)


def _reshape_across(net: Net) -> str:
    """[n, 3, 4] to [4, 3 n]: runs on any n, and mixes the samples up."""
    shape = net.constant("shape", np.array([4, -1], np.int64))
    back = net.constant("back", np.array([-1, 4], np.int64))
    return net.linear("y", net.op("Reshape", "rows", net.op("Reshape", "mixed", net.op(
        "Transpose", "t", "x", perm=[2, 0, 1]), shape), back), 4, 4)  # fmt: skip


def _transposed_batch(net: Net) -> str:
    return net.linear("y", net.op("Transpose", "t", "x", perm=[1, 0, 2]), 4, 4)


def _mean_over_batch(net: Net) -> str:
    axes = net.constant("axes", np.array([0], np.int64))
    return net.linear("y", net.op("ReduceMean", "m", "x", axes, keepdims=1), 4, 4)


def _difference_from_batch(net: Net) -> str:
    """The shape stays; every sample has the mean of all taken off."""
    axes = net.constant("axes", np.array([0], np.int64))
    mean = net.op("ReduceMax", "m", "x", axes, keepdims=1)
    return net.linear("y", net.op("Sub", "d", "x", mean), 4, 4)


def _softmax_over_batch(net: Net) -> str:
    return net.linear("y", net.op("Softmax", "s", "x", axis=0), 4, 4)


def _plain(net: Net) -> str:
    return net.linear("y", net.op("Softmax", "s", "x", axis=-1), 4, 4)


NETS: Mapping[str, tuple[Callable[[Net], str], int]] = {
    "reshape to one": (_reshape_to_one, 1),
    "reshape across": (_reshape_across, 1),
    "transposed batch": (_transposed_batch, 1),
    "mean over batch": (_mean_over_batch, 1),
    "difference from batch": (_difference_from_batch, 1),
    "softmax over batch": (_softmax_over_batch, 1),
    "plain": (_plain, 16),
}


def _network(made: Case) -> BlockNetwork:
    return BlockNetwork(made.model.graph, made.packs)


@pytest.mark.parametrize("kind", NETS)
def test_whether_the_first_axis_is_a_batch_is_found_out(kind: str, tmp_path: Path) -> None:
    build, wanted = NETS[kind]
    net = Net(seed=1)
    output = build(net)
    first = 1 if kind == "reshape to one" else "n"
    made = case(
        net.proto({"x": [first, 3, 4]}, [output]),
        tmp_path,
        samples=_samples([{"x": (1, 3, 4)}] * 5),
        longest=99,
    )
    values, network = tensors(made.samples), _network(made)
    assert [most_together(network, i, values, 16) for i in range(len(made.packs))] == [wanted]
    assert most_together(network, 0, values[:1], 16) == 1
    assert most_together(network, 0, values, 1) == 1
    # And whatever is found, all samples get what they get alone.
    _agree(network, values, wanted)


def _agree(network: BlockNetwork, values: list[dict[str, torch.Tensor]], together: int) -> None:
    found = run_all(network, 0, values, together, lambda value: value)
    for one, value in zip(found, values, strict=True):
        for name, wanted in network.run_block(0, value).items():
            assert one[name].shape == wanted.shape
            # Sums of another order.
            torch.testing.assert_close(one[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [2, 3, 16])
@pytest.mark.parametrize("rows", [(1, 1, 1, 1, 1), (4, 4, 4, 4), (3, 1, 2, 5, 4), (4, 4, 2)])
def test_samples_of_several_rows_come_back_as_they_were(
    rows: tuple[int, ...], together: int, tmp_path: Path
) -> None:
    proto = residual_block()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    del proto.graph.value_info[:]
    made = case(proto, tmp_path, samples=_samples([{"x": (row, 3, 8, 8)} for row in rows]), longest=99)
    values, network = tensors(made.samples), _network(made)
    limit = most_together(network, 0, values, together)
    assert limit == together
    _agree(network, values, limit)


def test_samples_of_several_sizes_run_one_by_one(tmp_path: Path) -> None:
    net = Net(seed=1)
    x = net.op("Relu", "r", net.conv("a", "x", (4, 3, 3, 3)))
    proto = net.proto({"x": ["n", 3, "h", "w"]}, [net.conv("b", x, (2, 4, 3, 3))])
    sizes = [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 6, 9), (1, 3, 8, 8)]
    made = case(proto, tmp_path, samples=_samples([{"x": s} for s in sizes]))
    assert most_together(_network(made), 0, tensors(made.samples), 16) == 1
    found = made.solved(Learning(steps=3, batch=2))
    assert made.error(found.solution) < made.error(made.start)


def test_two_inputs_are_joined_by_name(tmp_path: Path) -> None:
    net = Net(seed=1)
    a, b = net.linear("a", "left", 4, 6), net.linear("b", "right", 3, 6)
    proto = net.proto({"left": ["n", 4], "right": ["n", 3]}, [net.op("Mul", "y", a, b)])
    made = case(proto, tmp_path, samples=_samples([{"left": (2, 4), "right": (2, 3)}] * 5), longest=99)
    network, values = _network(made), tensors(made.samples)
    assert most_together(network, 0, values, 4) == 4
    _agree(network, values, 4)
    both = joined(values[1:3], ("right",))
    np.testing.assert_array_equal(both["right"], np.concatenate([s["right"] for s in made.samples[1:3]]))


def test_stand_ins_for_shapes_take_no_memory(tmp_path: Path) -> None:
    """Where a later block needs a shape alone, nothing is kept, however many samples run together."""
    net = Net(seed=1)
    x = net.op("Relu", "inner", net.conv("a", "x", (4, 3, 3, 3)))
    small = net.op("MaxPool", "small", x, kernel_shape=[2, 2], strides=[2, 2])
    y = net.conv("b", net.op("Relu", "r", net.conv("c", small, (4, 4, 3, 3))), (4, 4, 3, 3))
    tail = net.op("Slice", "tail", net.op("Shape", "s", x), net.constant("two", np.array([2], np.int64)),
                  net.constant("four", np.array([4], np.int64)))  # fmt: skip
    head = net.op("Slice", "head", net.op("Shape", "s2", y), net.constant("zero", np.array([0], np.int64)),
                  net.constant("two_", np.array([2], np.int64)))  # fmt: skip
    sizes = net.op("Concat", "sizes", head, tail, axis=0)
    up = net.op("Resize", "up", y, "", "", sizes, mode="nearest")
    proto = net.proto({"x": ["n", 3, 8, 8]}, [net.conv("d", up, (2, 4, 3, 3))])
    made = case(proto, tmp_path, samples=_samples([{"x": (1, 3, 8, 8)}] * 6))
    readers = [p for p in made.packs if p.shape_inputs]
    assert readers
    name = readers[0].shape_inputs[0]
    network, kept = _network(made), []
    writer = next(i for i in range(len(made.packs)) if name in network.modules[i].outputs)
    values = tensors(made.samples)
    for i in range(writer):
        for held, new in zip(values, run_all(network, i, values, 4, lambda v: v), strict=True):
            held.update(new)
    found = run_all(network, writer, values, 4, lambda v: kept.append(v.shape) or v)  # type: ignore[func-returns-value]
    shape = (1, 4, 8, 8)
    assert all(one[name].shape == shape and one[name].untyped_storage().nbytes() <= 8 for one in found)
    assert torch.Size(shape) not in kept


@pytest.mark.parametrize("room", [0, 1, 99])
def test_passes_go_on_from_layer_to_layer_as_far_as_memory_goes(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is held, what layers read is what a run from the start computes, to the last bit."""
    made = case(residual_block(), tmp_path, samples=6, longest=99)
    layers = compensable_layers(made.index, made.plan, 1000)
    assert len(layers) > 1
    data = made.data(together=2)
    largest = max(data.network.measure(data.floats[0]).values())
    # Room 1: what a pass of two samples holds in one tensor or two, float and quantized.
    data = replace(data, spare=room * 2 * 2 * 2 * 4 * largest)
    begun: list[Mapping[str, torch.Tensor]] = []
    walk = LoweredModule.walk
    monkeypatch.setattr(LoweredModule, "walk", lambda module, feed: begun.append(feed) or walk(module, feed))  # type: ignore[func-returns-value]
    inner, solution = InnerValues(data, 99), made.start
    for layer in layers:
        hooks = quantizing_hooks(made.model.graph, made.packs[0], made.plan, solution)
        for found in inner.at(layer.input.name, hooks):
            part = range(2 * found.number, 2 * found.number + 2)
            set_hooks(data.module, ())
            assert torch.equal(found.value, _fetched(data.module, data.float_inputs(part), layer.input.name))
            set_hooks(data.module, hooks)
            assert torch.equal(found.changed, _fetched(data.module, data.quantized(part), layer.input.name))
            data.module.clear_hooks()
        # The layers in front are final now; this one is not.
        weight = solution.weights.get(layer.weight.name, layer.weight.values)
        solution = replace(
            solution, weights={**solution.weights, layer.weight.name: weight * np.float32(1.5)}
        )
    assert inner.count == 6
    fewest, most = 2 * 3, 2 * 3 * len(layers)
    assert {0: len(begun) == most, 1: fewest < len(begun) < most, 99: len(begun) == fewest}[room]


def _fetched(module: LoweredModule, feed: Mapping[str, torch.Tensor], tensor: str) -> torch.Tensor:
    return feed[tensor] if tensor in feed else module(feed, fetch=(tensor,))[tensor]


# ---- vault -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.float64])
def test_values_in_files_are_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    vault = Vault(tmp_path, budget=0)
    for value in (
        (torch.randn(3, 4, 5) * 3).to(dtype),
        torch.tensor(1.0).to(dtype),
        (torch.randn(4, 6) * 3).to(dtype).T,
        torch.empty(0, 3).to(dtype),
    ):
        kept = vault.keep(value)
        assert kept.dtype == dtype
        assert torch.equal(kept, value)
        assert kept is not value or value.numel() == 0


def test_files_have_no_names_and_free_their_space(tmp_path: Path) -> None:
    vault = Vault(tmp_path, budget=0)
    held = [vault.keep(torch.full((1000,), float(i))) for i in range(5)]
    assert list(tmp_path.iterdir()) == []
    assert [float(value[-1]) for value in held] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert _mapped(tmp_path) == 5
    del held[1:]
    assert _mapped(tmp_path) == 1


def _mapped(folder: Path) -> int:
    """Deleted files of ``folder`` that this process still has in its memory."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    return sum(str(folder) in line for line in maps.read_text().splitlines())


def test_the_budget_holds_whatever_comes_and_goes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    budget = 50 * 4
    vault = Vault(tmp_path, budget=budget)
    held: list[tuple[torch.Tensor, bool]] = []
    most = 0
    for _ in range(400):
        if held and rng.random() < 0.5:
            vault.forget(held.pop(int(rng.integers(len(held))))[0])
        else:
            value = torch.zeros(int(rng.integers(1, 20)))
            kept = vault.keep(value)
            held.append((kept, kept is value))
        in_memory = sum(4 * value.numel() for value, is_same in held if is_same)
        assert in_memory <= budget
        most = max(most, in_memory)
    # And it is made use of.
    assert most > 0.9 * budget
    vault.forget(torch.zeros(40))  # a value that came from elsewhere
    for value, _ in held:
        vault.forget(value)
    fresh = torch.zeros(50)
    assert vault.keep(fresh) is fresh
    assert vault.keep(torch.zeros(1)) is not fresh


_FRAGMENTED = """
import re, torch
from onnxptq.memory import return_memory

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

del_later = torch.ones(7 << 20)   # 28 MB: from now on glibc takes anything smaller from its heap
del del_later
before = resident()
values, passes = [], []
for _ in range(300):
    passes.append(torch.ones(1 << 18))
    values.append(torch.ones(1 << 10))
del passes
kept = resident() - before
return_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc and /proc")
def test_memory_of_passes_between_values_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FRAGMENTED], capture_output=True, text=True, check=True, timeout=120
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 250
    assert left < 50


def _bytes(made: Case, settings: Learning, **options: int) -> list[bytes]:
    found = made.solved(settings, **options).solution
    weights = [found.weights[n].tobytes() for n in sorted(found.weights)]
    return weights + [found.qparams[i].scale.tobytes() for i in sorted(found.qparams)]


@pytest.mark.parametrize("settings", [FAST, Learning(steps=6, batch=4)], ids=["fast", "learnt"])
def test_values_in_files_and_in_memory_give_the_same_bytes(settings: Learning, tmp_path: Path) -> None:
    made = case(chain(), tmp_path, samples=_samples([{"x": (3, 12)}] * 9))
    assert len(made.packs) > 2
    in_memory = _bytes(made, settings)
    assert _bytes(made, settings, cache=0) == in_memory
    assert _bytes(made, settings, cache=2000) == in_memory
    assert not list(tmp_path.glob("*.values"))


def test_a_network_without_a_batch_is_solved_all_the_same(tmp_path: Path) -> None:
    net = Net(seed=1)
    proto = net.proto({"x": [1, 3, 4]}, [_reshape_to_one(net)])
    onnx.checker.check_model(proto)
    made = case(proto, tmp_path, samples=_samples([{"x": (1, 3, 4)}] * 64))
    assert made.error(made.solved(Learning(steps=20, batch=8)).solution) < made.error(made.start)
