"""Scores against a known curvature, and against onnxruntime running a file in which one block is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxptq.errors import UsageError
from onnxptq.graph.index import GraphIndex
from onnxptq.lowering.output_loss import OutputLoss, choose_loss
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.score import Scorer, score_blocks
from onnxptq.qdq.write import insert_quantizers
from onnxptq.quantizers.affine import asymmetric_qparams
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.runtime import Session
from onnxptq.targets import simulate
from onnxptq.targets.placement import PlacementRequest
from onnxptq.types import (
    Array,
    Block,
    CanonicalModel,
    InputSpec,
    QuantPlan,
    Sample,
    Sensitivity,
    Solution,
)
from tests.unit.partition import small_networks
from tests.unit.partition.small_networks import Net, image_net


def canonical(graph: gs.Graph) -> CanonicalModel:
    inputs = tuple(
        InputSpec(name=t.name, dtype=np.dtype(t.dtype), shape=tuple(t.shape)) for t in graph.inputs
    )
    return CanonicalModel(
        path=Path("net.onnx"),
        graph=graph,
        source=Path("net.onnx"),
        source_bytes=0,
        fingerprint="",
        opset=20,
        inputs=inputs,
        outputs=tuple(t.name for t in graph.outputs),
        user_names={},
    )


def samples_of(graph: gs.Graph, count: int) -> list[Sample]:
    rng = np.random.default_rng(5)
    shapes = {t.name: [d if isinstance(d, int) else 1 for d in t.shape] for t in graph.inputs}
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def run(model: onnx.ModelProto, sample: Sample) -> dict[str, Array]:
    return dict(Session(model.SerializeToString(), exact=True, threads=1).run(sample))


def exposed(graph: gs.Graph, names: list[str]) -> onnx.ModelProto:
    model = gs.export_onnx(graph)
    present = {t.name for t in model.graph.output}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return model


def quantized(graph: gs.Graph, samples: list[Sample], bits: int = 4) -> tuple[QuantPlan, Solution]:
    """All products quantized; activation ranges cover the samples."""
    plan = simulate.place(GraphIndex(graph), PlacementRequest(weight_bits=bits, activation_bits=bits))
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    seen = [run(exposed(graph, tensors), sample) | dict(sample) for sample in samples]
    ranges = {
        q.quantizer_id: asymmetric_qparams(
            min(float(s[q.tensor].min()) for s in seen), max(float(s[q.tensor].max()) for s in seen), q.qtype
        )
        for q in plan.quantizers
        if q.role == "activation"
    }
    return plan, initial_solution(graph, plan, ranges)


def only(plan: QuantPlan, block: Block) -> QuantPlan:
    kept = []
    for q in plan.quantizers:
        sites = tuple(site for site in q.sites if site.consumer in block.nodes)
        if sites:
            kept.append(replace(q, sites=sites))
    return replace(plan, quantizers=tuple(kept))


def softmax(x: Array) -> Array:
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_curvature_of_an_exact_quadratic() -> None:
    """A linear suffix makes the relative error quadratic in dz, with Hessian 2 A A^T / E||y||^2 per sample."""
    net = Net({"x": ["n", 6]})
    hidden = net.op("MatMul", "x", net.weight(6, 5))
    output = net.op("MatMul", hidden, net.weight(5, 4))
    graph, _ = net.built(output)
    samples = samples_of(graph, 40)
    plan, solution = quantized(graph, samples, bits=3)
    blocks = find_blocks(graph)
    assert [b.outputs for b in blocks] == [(hidden,), (output,)]
    first = score_blocks(
        canonical(graph), blocks, plan, solution, samples, loss="relative", normalize="sample"
    )[0]
    float_runs = [run(exposed(graph, [hidden]), s) for s in samples]
    changed = [
        run(exposed(insert_quantizers(graph, only(plan, blocks[0]), solution), [hidden]), s) for s in samples
    ]
    dz = np.concatenate([c[hidden] - f[hidden] for c, f in zip(changed, float_runs, strict=True)]).astype(
        float
    )
    A = graph.tensors()["const_1"].values.astype(float)
    energy = np.mean([float((f[output].astype(float) ** 2).sum()) for f in float_runs])
    hessian = 2 * A @ A.T / energy
    curvature = np.einsum("ni,ij,nj->", dz, hessian, dz) / (dz**2).sum()
    # Single precision on both sides.
    assert first.curvature == pytest.approx(curvature, rel=1e-4)
    assert first.squared_error == pytest.approx((dz**2).sum(axis=1).mean(), rel=1e-4)
    assert first.omega == pytest.approx(curvature * np.abs(dz).mean(), rel=1e-4)
    per_element = score_blocks(canonical(graph), blocks, plan, solution, samples, loss="relative")[0]
    assert per_element.curvature == pytest.approx(5 * curvature, rel=1e-4)  # 5 elements per sample


def classifier() -> gs.Graph:
    """Chains, a residual block, a gate and a head."""
    net = image_net(8)
    x = net.conv_relu("x", 3, 4)
    x = net.op(
        "Relu", net.op("Add", net.conv(small_networks.excite(net, net.conv_relu(x, 4, 4), 4), 4, 4), x)
    )
    return net.built(net.head(net.conv_relu(x, 4, 6, 3, 2), 6))[0]


def two_outputs() -> gs.Graph:
    net = image_net(8)
    x = net.conv_relu("x", 3, 4)
    mask = net.conv(x, 4, 2, 1)
    y = net.op("Relu", net.op("Add", net.conv(net.conv_relu(x, 4, 4), 4, 4), x))
    return net.built(mask, net.conv(y, 4, 3))[0]


def probabilities() -> gs.Graph:
    net = image_net(8)
    return net.built(net.op("Softmax", net.head(net.conv_relu("x", 3, 4), 4), axis=1))[0]


@pytest.mark.parametrize("build", [classifier, two_outputs, probabilities])
def test_equals_a_file_with_one_quantized_block(build: object) -> None:
    graph: gs.Graph = build()  # type: ignore[operator]
    samples = samples_of(graph, 6)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)
    assert len(blocks) > 1
    outputs = [t.name for t in graph.outputs]
    between = [name for b in blocks for name in b.outputs]
    float_runs = [run(exposed(graph, between), s) for s in samples]
    found = score_blocks(canonical(graph), blocks, plan, solution, samples)
    for block, score in zip(blocks, found, strict=True):
        written = insert_quantizers(graph, only(plan, block), solution)
        runs = [run(exposed(written, between), s) for s in samples]
        dz = np.concatenate(
            [(q[n] - f[n]).ravel() for q, f in zip(runs, float_runs, strict=True) for n in block.outputs]
        ).astype(float)
        if build is two_outputs:
            loss = sum(
                sum(((q[n] - f[n]).astype(float) ** 2).sum() for q, f in zip(runs, float_runs, strict=True))
                / sum((f[n].astype(float) ** 2).sum() for f in float_runs)
                for n in outputs
            )
        else:
            p, q = (np.concatenate([r[outputs[0]] for r in side]) for side in (float_runs, runs))
            if build is classifier:
                p, q = softmax(p), softmax(q)
            loss = float((p.astype(float) * np.log(p.astype(float) / q)).sum(axis=1).mean())
        # Two runtimes in single precision; a KL near 1e-3 of float32 probabilities keeps four digits.
        close = {"rel": 2e-3}
        assert score.block == block.index
        assert score.loss == pytest.approx(loss, **close)
        assert score.squared_error == pytest.approx((dz**2).mean(), **close)
        assert score.absolute_error == pytest.approx(np.abs(dz).mean(), **close)
        assert score.curvature == pytest.approx(2 * loss / (dz**2).mean(), rel=4e-3)
        assert score.omega == pytest.approx(score.curvature * score.absolute_error)


def test_replaced_weights_are_used() -> None:
    graph = classifier()
    samples = samples_of(graph, 2)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)
    name = next(s.tensor for s in blocks[0].sites if s.is_weight)
    weight = graph.tensors()[name].values
    zeroed = Solution(qparams=solution.qparams, weights={name: np.zeros_like(weight)})
    before = score_blocks(canonical(graph), blocks, plan, solution, samples)
    after = score_blocks(canonical(graph), blocks, plan, zeroed, samples)
    assert after[0].squared_error > 10 * before[0].squared_error
    assert after[1:] == before[1:]
    bias = [s.tensor for s in blocks[0].sites if s.is_weight][1]  # carries no quantizer
    moved = Solution(qparams=solution.qparams, weights={bias: graph.tensors()[bias].values + 1.0})
    assert score_blocks(canonical(graph), blocks, plan, moved, samples)[0] != before[0]


def test_batches_do_not_matter_and_runs_repeat() -> None:
    graph, _ = small_networks.vit(depth=3)
    samples = samples_of(graph, 7)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)
    together, again, apart = (
        score_blocks(canonical(graph), blocks, plan, solution, samples, memory=memory)
        for memory in (1 << 30, 1 << 30, 1)
    )
    assert together == again
    for a, b in zip(together, apart, strict=True):
        # Sums of a product in another order move a value by 1e-7, and across a rounding boundary now and then.
        assert a.curvature == pytest.approx(b.curvature, rel=1e-2)
        assert a.squared_error == pytest.approx(b.squared_error, rel=1e-2)


def test_a_fixed_batch_is_run_sample_by_sample() -> None:
    net = Net({"x": [1, 3, 8, 8]})
    x = net.op("Reshape", net.conv_relu("x", 3, 4), net.ints(1, 4, 8, 8))
    graph, _ = net.built(net.head(x, 4))
    samples = samples_of(graph, 3)
    plan, solution = quantized(graph, samples)
    assert len(score_blocks(canonical(graph), find_blocks(graph), plan, solution, samples)) == 2


def test_outputs_that_do_not_grow_with_the_batch_are_run_sample_by_sample() -> None:
    net = Net({"x": ["n", 3, 8, 8]})
    y = net.op("Reshape", net.conv_relu("x", 3, 4), net.ints(1, -1))
    graph, _ = net.built(net.op("ReduceMean", y, net.ints(1), keepdims=1))
    samples = samples_of(graph, 3)
    plan, solution = quantized(graph, samples)
    scores = {
        memory: score_blocks(canonical(graph), find_blocks(graph), plan, solution, samples, memory=memory)
        for memory in (1, 1 << 30)
    }
    assert scores[1] == scores[1 << 30]


def test_a_block_without_effect_has_infinite_curvature() -> None:
    graph = classifier()
    samples = samples_of(graph, 2)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)
    scores = score_blocks(canonical(graph), blocks, only(plan, blocks[0]), solution, samples)
    assert math.isfinite(scores[0].curvature)
    assert [(s.loss, s.curvature, s.omega) for s in scores[1:]] == [(0.0, math.inf, 0.0)] * (len(blocks) - 1)


def test_progress_and_refusals() -> None:
    graph = classifier()
    samples = samples_of(graph, 2)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)
    ticks: list[int] = []

    class Bar:
        def start(self, title: str, total: int) -> object:
            assert title
            ticks.append(-total)
            return lambda: ticks.append(1)

        def message(self, text: str) -> None:
            raise AssertionError(text)

    score_blocks(canonical(graph), blocks, plan, solution, samples, progress=Bar())  # type: ignore[arg-type]
    assert sum(ticks) == 0
    assert len(ticks) > len(blocks)
    with pytest.raises(UsageError, match="at least one sample"):
        score_blocks(canonical(graph), blocks, plan, solution, [])
    with pytest.raises(UsageError, match="No output"):
        OutputLoss("kl", ())


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        ({"y": torch.zeros(2, 5)}, "kl"),
        ({"y": torch.zeros(2, 5), "label": torch.zeros(2, dtype=torch.int64)}, "kl"),
        ({"y": torch.zeros(2, 5), "aux": torch.zeros(2, 5)}, "kl"),
        ({"y": torch.zeros(2, 1)}, "relative"),
        ({"y": torch.zeros(2, 5, 4)}, "relative"),
        ({"y": torch.zeros(2, 5), "boxes": torch.zeros(2, 5, 4)}, "relative"),
        ({"label": torch.zeros(2, dtype=torch.int64)}, "relative"),
    ],
)
def test_the_loss_follows_the_outputs(outputs: Mapping[str, torch.Tensor], kind: str) -> None:
    assert choose_loss(outputs) == kind
    assert choose_loss(outputs, "relative") == "relative"


def test_relative_loss_of_missing_and_silent_outputs() -> None:
    loss = OutputLoss("relative", ("a", "b"))
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    loss.add(reference, {"a": torch.tensor([3.0]), "b": torch.tensor([0.5, 0.0])})
    loss.add(reference, {})
    # Another shape is wholly wrong (25 of 50 over both batches); a silent output is compared with 1.
    assert loss.value() == pytest.approx(25 / 50 + 0.25)


class _Replayed(Ranks):
    """One of several ranks, alone: its sums are noted, or those of all ranks are given back."""

    def __init__(self, rank: int, size: int, totals: list[Array] | None = None) -> None:
        super().__init__(rank, size)
        self.own: list[Array] = []
        self._totals = iter(totals or ())

    def sum(self, values: Array) -> Array:
        self.own.append(np.array(values))
        return next(self._totals, values)


@pytest.mark.parametrize("normalize", ["element", "sample"])
def test_ranks_add_up_what_they_have_seen(normalize: Literal["element", "sample"]) -> None:
    graph = classifier()
    samples = samples_of(graph, 5)
    plan, solution = quantized(graph, samples)
    blocks = find_blocks(graph)

    def scored(ranks: Ranks) -> Sequence[Sensitivity]:
        return Scorer(canonical(graph), blocks, samples, normalize=normalize, ranks=ranks).score(
            plan, solution
        )

    both = [_Replayed(rank, 2) for rank in range(2)]
    for ranks in both:
        scored(ranks)
    totals = [np.asarray(a + b) for a, b in zip(*(ranks.own for ranks in both), strict=True)]
    for one, other in zip(scored(ALONE), scored(_Replayed(0, 2, totals)), strict=True):
        for name in ("loss", "squared_error", "absolute_error", "curvature", "omega"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)
