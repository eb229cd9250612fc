"""Values of attention, shifted against what quantized weights lose: held against least squares and onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.save import exposed_copy
from onnxptq.pipeline import quantize
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, symmetric_qparams
from onnxptq.recipe import Recipe
from onnxptq.runtime import SAME_FUNCTION, Session, difference
from onnxptq.shift.attention import Grids
from onnxptq.shift.run import shift
from onnxptq.types import Array, CanonicalModel, PerTensor, QType
from tests.unit.equalize.equalize_helpers import Samples, canonical, samples_for
from tests.unit.rotate import rotate_nets as nets
from tests.unit.shift.shift_cases import shifted

COUNT = 6
NAMES = ("b0.att.p", "b0.att.v")


def attention(*, fused: bool, seed: int = 0) -> onnx.ModelProto:
    net = nets.Blocks(seed=seed)
    x = net.linear("stem", "x", 7, 24)
    attend = net.fused_attention if fused else net.attention
    y = attend("b0.att", net.norm("n", x, 24), 24, 3)
    return net.proto({"x": [1, nets.TOKENS, 7]}, [net.op("Tanh", "y", y)])


def operands(model: CanonicalModel, samples: Samples) -> list[list[Array]]:
    path = model.path.with_name("looked_at.onnx")
    exposed_copy(model.path, NAMES, path)
    session = Session(path, exact=True, threads=1)
    return [[session.run(sample, list(NAMES))[name] for name in NAMES] for sample in samples]


def coarse(values_bits: int = 8) -> Grids:
    return Grids(
        qparams={
            NAMES[0]: asymmetric_qparams(0.0, 1.0, QType.unsigned(3)),
            NAMES[1]: symmetric_qparams(np.float32(4.0), QType.signed(values_bits), PerTensor()),
        },
        symmetric=True,
    )


def regressed(seen: list[list[Array]], grids: Grids, head: int) -> tuple[Array, Array, Array]:
    """By numpy's least squares: c, the errors D V, and D 1, of one head in all samples."""
    lost = [
        fake_quantize(p, grids.qparams[NAMES[0]])[0, head].astype(np.float64) - p[0, head] for p, _ in seen
    ]
    errors = np.concatenate([d @ v[0, head] for d, (_, v) in zip(lost, seen, strict=True)])
    rows = np.concatenate([d.sum(axis=1, keepdims=True) for d in lost])
    return np.linalg.lstsq(rows, errors, rcond=None)[0][0], errors, rows


@pytest.mark.parametrize("fused", [True, False])
def test_the_constants_are_those_of_least_squares(fused: bool, tmp_path: Path) -> None:
    proto = attention(fused=fused)
    grids = coarse()
    source, result, found = shifted(proto, tmp_path, COUNT, where="in attention", grids=grids)
    assert found.channels == 24
    assert "Shifted in attention: 24 channels of 1 tensor;" in found.summary
    samples = Samples(list(samples_for(proto, COUNT + 3))[:COUNT])
    old, new = operands(source, samples), operands(result, samples)
    for head in range(3):
        wanted, errors, _ = regressed(old, grids, head)
        taken = old[0][1][0, head] - new[0][1][0, head]
        np.testing.assert_allclose(taken, np.broadcast_to(wanted, taken.shape), atol=1e-4)
        _, left, _ = regressed(new, grids, head)
        assert (left**2).sum() < (errors**2).sum()


def test_samples_of_different_lengths_count_together(tmp_path: Path) -> None:
    """Values for any number of sequences at once: the rows of all of them are rows."""
    proto = attention(fused=False)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    del proto.graph.value_info[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = canonical(onnx.shape_inference.infer_shapes(proto), tmp_path)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((n, nets.TOKENS, 7)).astype(np.float32)} for n in (1, 3, 2)]
    result, found = shift(model, Samples(samples), work_dir=tmp_path, where="in attention", grids=coarse())
    assert found.channels == 24
    outputs = [Session(m.path, exact=True, threads=1).run(samples[1]) for m in (model, result)]
    assert difference(*outputs) <= SAME_FUNCTION


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_shifted_without_quantized_weights(name: str, tmp_path: Path) -> None:
    grids = Grids(qparams={k: v for k, v in coarse().qparams.items() if k == name}, symmetric=True)
    _, _, found = shifted(attention(fused=False), tmp_path, COUNT, where="in attention", grids=grids)
    assert bool(found.tensors) == (name == NAMES[0])


def test_values_stay_where_a_wider_grid_would_cost_more(tmp_path: Path) -> None:
    """With fine weights and coarse values the width of the values' grid is all that counts."""
    grids = Grids(
        qparams={**coarse(2).qparams, NAMES[0]: asymmetric_qparams(0.0, 1.0, QType.unsigned(8))},
        symmetric=True,
    )
    outcomes = set()
    for seed in range(6):
        proto = attention(fused=False, seed=seed)
        source, _, found = shifted(proto, tmp_path, COUNT, where="in attention", grids=grids)
        seen = operands(source, Samples(list(samples_for(proto, COUNT + 3))[:COUNT]))
        taken = np.stack([regressed(seen, grids, head)[0] for head in range(3)])[:, None]
        before, after = (max(np.abs(v[0] - c).max() for _, v in seen) for c in (0.0, taken))
        assert bool(found.tensors) == (after < before)
        outcomes.add(bool(found.tensors))
    assert outcomes == {True, False}


# ---- in a run ------------------------------------------------------------------------------------


def test_values_are_shifted_at_8_bits_only() -> None:
    assert Recipe.create({}).shifts_values
    for values in ({"weight_bits": 4}, {"shift": False}, {"method": "rtn"}):
        assert not Recipe.create(values).shifts_values


@pytest.mark.parametrize("target", ["simulate", "ort-cpu"])
def test_a_run_shifts_where_attention_weights_are_quantized(target: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(nets.transformer(), str(path))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, nets.TOKENS - 1, 7)).astype(np.float32)} for _ in range(12)]
    recipe = Recipe(target=target, enough=None, simplify=False, rotate=False, floor=None)
    result = quantize(path, tmp_path / "out.onnx", calibration=feeds, recipe=recipe, work_dir=tmp_path / "w")
    said = "\n".join(result.report.notes)
    assert ("Shifted in attention" in said) == (target == "simulate")
    assert all(edge.different == 0 for edge in result.report.parity.edges)
