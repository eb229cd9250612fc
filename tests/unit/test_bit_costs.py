"""Costs against onnxruntime running files in which one part of one pack is quantized, and their sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxptq.bit_costs import BitPlacing, measure_costs, quantizers_of, weight_bytes
from onnxptq.errors import UnsupportedModelError
from onnxptq.graph.index import GraphIndex
from onnxptq.partition import score
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.pack import pack_blocks
from onnxptq.qdq import insert_quantizers
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.runtime import Session
from onnxptq.targets import TARGETS, PlacementRequest, candidate_tensors
from onnxptq.types import Array, CanonicalModel, Pack, QParams, QuantPlan, Sample, Sensitivity
from tests.unit.small_nets import Net, canonical, planned, random_samples


def network() -> onnx.ModelProto:
    """A stem, two residual units of which the first reads the stem's output twice, and a head."""
    net = Net()
    x = net.op("Relu", "stem_relu", net.conv("stem", "x", (8, 3, 3, 3)))
    for i in range(2):
        y = net.op("Relu", f"relu{i}", net.conv(f"a{i}", x, (8, 8, 3, 3)))
        x = net.op("Relu", f"out{i}", net.op("Add", f"sum{i}", net.conv(f"b{i}", y, (8, 8, 3, 3)), x))
    x = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", x))
    x = net.op("Gemm", "head", x, net.weight("head.w", 6, 8), net.weight("head.b", 6), transB=1)
    return net.proto({"x": ["n", 3, 8, 8]}, [x])


@pytest.fixture
def model(tmp_path: Path) -> CanonicalModel:
    return canonical(network(), tmp_path)


def run(graph: gs.Graph, sample: Sample, names: Sequence[str] = ()) -> dict[str, Array]:
    proto = gs.export_onnx(graph)
    for name in set(names) - {t.name for t in graph.outputs}:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return dict(Session(proto.SerializeToString(), exact=True, threads=1).run(sample))


def ranges_of(model: CanonicalModel, samples: Sequence[Sample]) -> BitPlacing:
    """The simulate target, with ranges that cover the samples."""
    names = [name for name in candidate_tensors(GraphIndex(model.graph)) if name != "x"]
    seen = [{**run(model.graph, s, names), **s} for s in samples]

    def ranges(part: QuantPlan) -> Mapping[str, QParams]:
        return {
            q.quantizer_id: asymmetric_qparams(
                min(float(s[q.tensor].min()) for s in seen),
                max(float(s[q.tensor].max()) for s in seen),
                q.qtype,
            )
            for q in part.quantizers
            if q.role == "activation"
        }

    return BitPlacing(
        plan_at=lambda b: planned(model, "simulate", weight_bits=b, activation_bits=b), ranges=ranges
    )


def packed(model: CanonicalModel) -> tuple[list[Pack], list[Sensitivity]]:
    blocks = find_blocks(model.graph)
    scores = [
        Sensitivity(block=i, loss=1, squared_error=1, absolute_error=1, curvature=1, omega=i)
        for i in range(len(blocks))
    ]
    return list(pack_blocks(blocks, scores, max_pack_blocks=1)), scores


def divergence(model: CanonicalModel, changed: gs.Graph, samples: Sequence[Sample]) -> float:
    def logits(graph: gs.Graph) -> Array:
        z = np.concatenate([run(graph, s)["head"] for s in samples]).astype(np.float64)
        z = z - z.max(axis=1, keepdims=True)
        return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))

    p, q = logits(model.graph), logits(changed)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def part_of(plan: QuantPlan, role: str, pack: Pack | None) -> QuantPlan:
    kept = []
    for q in plan.quantizers:
        sites = tuple(s for s in q.sites if pack is None or s.consumer in pack.nodes)
        if q.role == role and sites:
            kept.append(replace(q, sites=sites))
    return replace(plan, quantizers=tuple(kept))


def test_costs_are_those_of_a_file_with_one_part_quantized(model: CanonicalModel) -> None:
    samples = random_samples(model, 4)
    placing = ranges_of(model, samples)
    packs, scores = packed(model)
    costs = measure_costs(model, packs, scores, placing, samples, candidates=(3, 6))
    assert costs.loss == "kl"
    assert len(packs) == 4
    for pack, found in zip(packs, costs.packs, strict=True):
        assert (found.pack, found.omega) == (pack.index, pack.index)
        for role, choices in (("weight", found.weights), ("activation", found.activations)):
            assert [c.bits for c in choices] == [3, 6]
            for choice in choices:
                part = part_of(placing.plan_at(choice.bits), role, pack)
                solution = initial_solution(model.graph, part, placing.ranges(part))
                expected = divergence(model, insert_quantizers(model.graph, part, solution), samples)
                # Two runtimes in single precision; divergences down to 1e-6 of nearly equal distributions.
                assert choice.cost == pytest.approx(expected, rel=2e-3, abs=1e-9), (pack.index, role)


def test_elements_and_bytes(model: CanonicalModel) -> None:
    samples = random_samples(model, 2)
    packs, scores = packed(model)
    costs = measure_costs(model, packs, scores, ranges_of(model, samples), samples, candidates=(4, 8))
    assert [c.weight_elements for c in costs.packs] == [8 * 3 * 9, 2 * 64 * 9, 2 * 64 * 9, 48]
    # The stem's output is read by pack 1 alone at a product; each unit reads its input and its inner tensor.
    assert [c.activation_elements for c in costs.packs] == [192, 1024, 1024, 8]
    # The request stores weights in int8 whatever their bits.
    assert [[c.size for c in p.weights] for p in costs.packs] == [[n, n] for n in (216, 1152, 1152, 48)]
    assert weight_bytes(model, planned(model, "simulate")) == 216 + 2 * 1152 + 48
    narrow = planned(model, "simulate", weight_bits=4, weight_storage="int4")
    assert weight_bytes(model, narrow) == 108 + 2 * 576 + 24


def test_the_sum_of_costs_is_the_loss_while_it_is_small(model: CanonicalModel) -> None:
    """Additivity is an assumption: it is checked where the loss is quadratic, and not beyond."""
    samples = random_samples(model, 32)
    placing = ranges_of(model, samples)
    packs, scores = packed(model)
    costs = measure_costs(model, packs, scores, placing, samples, candidates=(3, 4, 5, 6, 8))
    ratios = {}
    for i, bits in enumerate((3, 4, 5, 6, 8)):
        plan = placing.plan_at(bits)
        solution = initial_solution(model.graph, plan, placing.ranges(plan))
        whole = divergence(model, insert_quantizers(model.graph, plan, solution), samples)
        ratios[bits] = sum(p.weights[i].cost + p.activations[i].cost for p in costs.packs) / whole
    # Correlated errors (a sum of eight, in one small net) move the ratio within a factor of two.
    for bits in (4, 5, 6, 8):
        assert 0.5 < ratios[bits] < 2.0, ratios


def test_what_the_target_does_not_execute_is_not_offered(model: CanonicalModel) -> None:
    samples = random_samples(model, 2)
    packs, scores = packed(model)
    index = GraphIndex(model.graph)
    placing = replace(
        ranges_of(model, samples),
        plan_at=lambda b: TARGETS["ort-cpu"](index, PlacementRequest(weight_bits=b, activation_bits=b)),
    )
    costs = measure_costs(model, packs, scores, placing, samples, candidates=(4, 8))
    assert {c.bits for p in costs.packs for c in p.activations} == {8}
    assert {c.bits for p in costs.packs for c in p.weights} == {4, 8}


def test_nodes_with_bits_of_their_own_take_no_part(model: CanonicalModel) -> None:
    samples = random_samples(model, 2)
    packs, scores = packed(model)
    placing = replace(
        ranges_of(model, samples),
        plan_at=lambda b: planned(
            model, "simulate", weight_bits=b, activation_bits=b, bits_of={"a0": (8, 8), "head": (8, 8)}
        ),
        pinned=("a0", "head"),
    )
    costs = measure_costs(model, packs, scores, placing, samples, candidates=(2, 4))
    assert [c.weight_elements for c in costs.packs] == [216, 576, 1152, 0]
    assert [c.activation_elements for c in costs.packs] == [192, 512, 1024, 0]
    assert [len(c.weights) for c in costs.packs] == [2, 2, 2, 0]
    assert costs.packs[3].activations == ()


def test_two_packs_may_read_one_tensor_at_different_bits(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", "relu", net.conv("stem", "x", (8, 3, 3, 3)))
    model = canonical(
        net.proto(
            {"x": [1, 3, 8, 8]}, [net.conv("left", x, (8, 8, 3, 3)), net.conv("right", x, (8, 8, 1, 1))]
        ),
        tmp_path,
    )
    plan = planned(model, "simulate", bits_of={"left": (4, 3), "right": (5, 6)})
    reads = {s.consumer: q for q in plan.quantizers if q.tensor == "relu" for s in q.sites}
    assert (reads["left"].qtype.bits, reads["right"].qtype.bits) == (3, 6)
    assert reads["left"].quantizer_id != reads["right"].quantizer_id
    pack = Pack(
        index=0,
        blocks=(),
        nodes=("left",),
        inputs=("relu",),
        outputs=("left",),
        shape_inputs=(),
        sites=tuple(s for q in plan.quantizers for s in q.sites if s.consumer == "left"),
    )
    assert {q.qtype.bits for q in quantizers_of(pack, plan)} == {4, 3}


def test_bits_that_lose_numbers_are_not_offered(
    model: CanonicalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(model, 2)
    packs, scores = packed(model)
    placing = ranges_of(model, samples)
    real = score.OutputLoss.value
    found: list[float] = []

    def spoilt(loss: score.OutputLoss) -> float:
        found.append(real(loss))
        # Parts come in the order of bits: weights, then activations, of every pack.
        return math.inf if len(found) == 1 else found[-1]

    monkeypatch.setattr(score.OutputLoss, "value", spoilt)
    costs = measure_costs(model, packs, scores, placing, samples, candidates=(3, 6))
    assert [[c.bits for c in p.weights] for p in costs.packs] == [[6], [3, 6], [3, 6], [3, 6]]
    monkeypatch.setattr(score.OutputLoss, "value", lambda _: math.inf)
    with pytest.raises(UnsupportedModelError, match=r"the pack from x to .* makes outputs NaN or Inf"):
        measure_costs(model, packs, scores, placing, samples, candidates=(3, 6))
