"""Packing against the paper's recursion, and the memory of a pack against what autograd really keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.graph.index import GraphIndex
from onnxptq.lowering import lower
from onnxptq.lowering.network import BlockNetwork
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.pack import pack_blocks, pack_memory, pack_starts
from onnxptq.quantizers.straight_through import round_through, scaled_grid
from onnxptq.targets import simulate
from onnxptq.targets.placement import PlacementRequest
from onnxptq.types import Sensitivity
from tests.unit.partition import small_networks

CURVATURES = st.lists(st.one_of(st.integers(0, 5).map(float), st.just(float("inf"))), min_size=1, max_size=20)


def literal_recursion(curvatures: Sequence[float]) -> tuple[int, ...]:
    starts, te = [], len(curvatures) - 1
    while te >= 0:
        best = min(range(te + 1), key=lambda t: curvatures[t])  # the first of equal minima
        starts.append(best)
        te = best - 1
    return tuple(reversed(starts))


@settings(max_examples=500, deadline=None)
@given(CURVATURES)
def test_equals_the_papers_recursion(curvatures: list[float]) -> None:
    assert pack_starts(curvatures) == literal_recursion(curvatures)


@settings(max_examples=300, deadline=None)
@given(CURVATURES, st.integers(1, 6))
def test_no_pack_is_longer_than_asked(curvatures: list[float], longest: int) -> None:
    free, capped = pack_starts(curvatures), pack_starts(curvatures, max_pack_blocks=longest)
    lengths = np.diff([*capped, len(curvatures)])
    assert set(free) <= set(capped)
    assert lengths.max() <= longest
    if np.diff([*free, len(curvatures)]).max() <= longest:
        assert capped == free


def test_the_longest_pack_is_split_at_its_next_lowest() -> None:
    curvatures = [1.0, 5.0, 4.0, 3.0, 6.0, 2.0, 7.0]
    assert pack_starts(curvatures) == (0,)
    assert pack_starts(curvatures, max_pack_blocks=5) == (0, 5)
    # 0..4 is then the longest; its lowest but the first is block 3.
    assert pack_starts(curvatures, max_pack_blocks=3) == (0, 3, 5)
    assert pack_starts(curvatures, max_pack_blocks=1) == tuple(range(7))


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="block 1"):
        pack_starts([1.0, float("nan")])
    with pytest.raises(ValueError, match="starts at 1"):
        pack_starts([1.0], max_pack_blocks=0)
    graph, _ = small_networks.vgg()
    with pytest.raises(ValueError, match="0 sensitivities"):
        pack_blocks(find_blocks(graph), [])
    assert pack_starts([]) == ()


def _scores(curvatures: Sequence[float]) -> list[Sensitivity]:
    return [
        Sensitivity(block=i, loss=0.0, squared_error=1.0, absolute_error=1.0, curvature=v, omega=0.0)
        for i, v in enumerate(curvatures)
    ]


def test_packs_of_a_network_with_stem_and_head_apart() -> None:
    graph, expected = small_networks.pointnet()
    blocks = find_blocks(graph)
    assert len(blocks) == 7
    scores = _scores([1.0, 5.0, 6.0, 4.0, 7.0, 8.0, 0.5])
    assert [len(p.blocks) for p in pack_blocks(blocks, scores)] == [6, 1]
    packs = pack_blocks(blocks, scores, alone=(0, 6))
    assert [len(p.blocks) for p in packs] == [1, 2, 3, 1]
    assert [p.index for p in packs] == [0, 1, 2, 3]
    assert packs[2].inputs == expected[2]
    assert packs[2].outputs == expected[5]
    assert packs[2].nodes == (*blocks[3].nodes, *blocks[4].nodes, *blocks[5].nodes)
    assert [len(p.blocks) for p in pack_blocks(blocks, scores, alone=range(7))] == [1] * 7


def _learnt_activation(x: torch.Tensor) -> torch.Tensor:
    return scaled_grid(x, torch.full((1,), 0.1, requires_grad=True), 0, 15)


def _learnt_weight(x: torch.Tensor) -> torch.Tensor:
    scale = torch.tensor(0.1, requires_grad=True)
    return round_through(x / scale).clamp(-7, 7) * scale


@pytest.mark.parametrize("name", ["resnet50", "convnext", "vit"])
def test_memory_bounds_what_autograd_keeps(name: str) -> None:
    graph = small_networks.KNOWN[name]()[0]
    blocks = find_blocks(graph)
    plan = simulate.place(GraphIndex(graph), PlacementRequest(weight_bits=4, activation_bits=4))
    pack = pack_blocks(blocks, _scores([float(i) for i in range(len(blocks))]), alone=(0, 1))[2]
    network = BlockNetwork(graph, blocks)
    batch = 4
    shape = [d if isinstance(d, int) else batch for d in graph.inputs[0].shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {n: t.values.size for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    stated = pack_memory(pack, plan, network.measure({"x": x[:1]}), weights, samples=10, batch=batch)

    module = lower(graph, inputs=(*pack.inputs, *pack.shape_inputs), outputs=pack.outputs)
    quantized = {(s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}
    trained = {s.tensor for s in pack.sites if s.is_weight and (s.consumer, s.input_index) in quantized}
    parameters = module.parameters_for(sorted(trained))
    for site in pack.sites:
        if (site.consumer, site.input_index) in quantized:
            hook = _learnt_weight if site.is_weight else _learnt_activation
            module.set_hook(site.tensor, site.consumer, site.input_index, hook)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    feed = {name: value.detach() for name, value in network.run({"x": x}).items() if name in pack.inputs}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(feed)
    # Gradients and moments come on top: three more tensors per weight.
    real = sum(kept.values()) + 3 * 4 * sum(p.numel() for p in parameters.values())
    assert real <= stated.activations + stated.parameters
    assert stated.activations + stated.parameters <= 3 * real
    per_sample = 2 * sum(feed[name][:1].numel() for name in pack.inputs)
    per_sample += sum(v[:1].numel() for v in module(feed).values())
    assert stated.cache == 10 * 4 * per_sample
    assert stated.total == stated.cache + stated.activations + stated.parameters
