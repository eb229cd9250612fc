"""Low-rank corrections through the whole product: merged into the weights, or branches of the written file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq import solving
from onnxptq.reconstruct import branches
from tests.e2e.packed import noise, quantized, require_proven


@pytest.mark.parametrize(
    ("kind", "method"),
    [("windows", "pack-ptq"), ("attention", "aiqvit"), ("residual, fixed batch", "aiqvit")],
)
def test_low_rank_corrections_are_merged(kind: str, method: str, tmp_path: Path) -> None:
    """The file is plain weights that compute what was simulated; the report tells their ranks."""
    options = {"target": "simulate", "weight_bits": 4, "activation_bits": 4}
    nearest = quantized(kind, tmp_path, method="rtn", **options)
    nodes = len(onnx.load(nearest.output).graph.node)
    found = quantized(kind, tmp_path, method=method, low_rank="merge", **options)
    require_proven(found)
    assert noise(found) < noise(nearest)
    assert len(onnx.load(found.output).graph.node) == nodes
    ranks = [rank for pack in found.report.packs for rank in pack.ranks]
    graph = onnx.load(tmp_path / "net.onnx").graph
    sizes = {t.name: tuple(t.dims) for t in graph.initializer}
    assert {rank.weight for rank in ranks} <= sizes.keys()
    assert len(ranks) >= 3
    for rank in ranks:
        shape = sizes[rank.weight]
        assert max(rank.candidates) <= min(shape[0], int(np.prod(shape[1:])))
        assert rank.rank == rank.candidates[int(np.argmax(rank.shares))]
        assert len(rank.candidates) == len(rank.shares)
        assert rank.after > 0.0
    # Layers make up for each other: not each of them comes closer by itself.
    assert any(rank.after < rank.before for rank in ranks)
    first = found.output.read_bytes()
    again = quantized(kind, tmp_path / "again", method=method, low_rank="merge", **options)
    assert again.output.read_bytes() == first


def test_the_ranks_to_choose_from_are_the_users(tmp_path: Path) -> None:
    options = {"weight_bits": 3, "activation_bits": 4, "method": "aiqvit", "low_rank_candidates": (2, 5, 99)}
    found = quantized("two inputs", tmp_path, target="simulate", **options)
    ranks = [rank for pack in found.report.packs for rank in pack.ranks]
    assert ranks
    assert {rank.candidates for rank in ranks} <= {(2, 4), (2, 5, 6), (2, 5, 8), (2, 5, 16)}
    assert all(rank.rank in rank.candidates for rank in ranks)


@pytest.fixture
def free_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches for small layers, whatever they cost."""
    monkeypatch.setattr(branches, "MOST", 0.5)
    monkeypatch.setattr(branches, "LEAST", 0.0)
    monkeypatch.setattr(branches, "PRICE", 0.0)


@pytest.mark.usefixtures("free_branches")
@pytest.mark.parametrize(
    ("kind", "target", "effort"),
    [
        ("attention", "simulate", "fast"),
        ("residual, fixed batch", "simulate", "balanced"),
        ("windows", "ort-cpu", "fast"),
        ("points, fixed batch", "tensorrt", "fast"),
    ],
)
def test_branches(kind: str, target: str, effort: str, tmp_path: Path) -> None:
    """The file holds them, computes what was simulated, and the report tells what they gain and cost."""
    options = {
        "method": "pack-ptq",
        "effort": effort,
        "target": target,
        "weight_bits": 3,
        "activation_bits": 8,
    }
    plain = quantized(kind, tmp_path, **options)
    found = quantized(kind, tmp_path, low_rank="branch", **options)
    require_proven(found)
    assert noise(found) < 0.8 * noise(plain)
    facts, parity = found.report.branches, found.report.parity
    assert plain.report.branches is None
    assert facts is not None
    assert parity is not None
    assert facts.latency is not None
    assert facts.latency.quantized_ms > 0.0
    assert {row.node for row in facts.rows} == {row.node for row in parity.branches}
    assert all(0.0 < row.after < row.before and 0.0 < row.share <= 0.5 for row in facts.rows)
    assert facts.bytes == 4 * sum(row.parameters for row in facts.rows)
    sizes = {row.component: row.after for row in found.report.sizes}
    assert sizes["low-rank branches"] == facts.bytes
    assert sum(sizes.values()) == found.report.output.bytes
    graph = onnx.load(found.output).graph
    ranks = {row.node: row.rank for row in facts.rows}
    for node in graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}
        assert said.get("onnxptq.branch_rank") == (str(ranks[node.name]) if node.name in ranks else None)
    assert sum(node.name.endswith("_branch_Add") for node in graph.node) == len(facts.rows)
    (note,) = [note for note in found.report.notes if "low-rank branch" in note]
    assert note.startswith(f"{len(facts.rows)} of ")
    again = quantized(kind, tmp_path / "again", low_rank="branch", **options)
    assert again.output.read_bytes() == found.output.read_bytes()


def test_no_branch_where_none_pays(tmp_path: Path) -> None:
    """The layers are too small for one; the file is the one without."""
    options = {"method": "pack-ptq", "effort": "fast", "target": "simulate", "weight_bits": 3}
    plain = quantized("attention", tmp_path, **options)
    before = onnx.load(plain.output).graph
    found = quantized("attention", tmp_path, low_rank="branch", **options)
    assert found.report.branches is None
    assert "No layer has a low-rank branch." in found.report.notes
    after = onnx.load(found.output).graph
    assert list(before.initializer) == list(after.initializer)
    assert [n.name for n in before.node] == [n.name for n in after.node]


@pytest.mark.usefixtures("free_branches")
@pytest.mark.parametrize("margin", [0.5, 40.0])
def test_the_best_use_of_low_rank_is_measured(
    margin: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "BRANCH_MARGIN_DB", margin)
    options = {"method": "pack-ptq", "target": "simulate", "weight_bits": 3, "activation_bits": 8}
    found = quantized("residual, fixed batch", tmp_path, low_rank="auto", **options)
    require_proven(found)
    (note,) = [note for note in found.report.notes if note.startswith("Weights by ")]
    for name in ("nearest rounding", "packs", "packs with merged corrections", "packs with branches"):
        assert re.search(rf"[ (]{name} -?[\d.]+[,)]", note), note
    has_branches = margin < 1.0
    assert note.startswith("Weights by packs with branches") == has_branches
    assert (found.report.branches is not None) == has_branches
    refused = [note for note in found.report.notes if note.startswith("Branches gain less than 40 dB")]
    assert len(refused) == (not has_branches)
    # The packs of all alternatives are forgotten.
    assert not list((tmp_path / "work" / "packs").iterdir())


@pytest.mark.usefixtures("free_branches")
def test_branches_count_towards_the_size(tmp_path: Path) -> None:
    """A size that has room for the float parts leaves fewer bits to the weights."""
    options = {"method": "pack-ptq", "effort": "fast", "target": "simulate", "low_rank": "branch"}
    wide = quantized("windows", tmp_path, max_size=1.0, **options)
    assert wide.report.branches is not None
    least = wide.output.stat().st_size
    found = quantized("windows", tmp_path, max_size=(least - 400) / 1e6, **options)
    assert found.output.stat().st_size <= least - 400
    assert not [note for note in found.report.notes if "were allowed" in note]


def test_a_solution_that_lost_is_not_reported_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"target": "simulate", "weight_bits": 4, "activation_bits": 4, "steps": 5}
    monkeypatch.setattr(solving.Solver, "_margin", lambda _, name: 1000.0 if "packs" in name else 0.0)
    found = quantized("attention", tmp_path, method="aiqvit", tune=True, **options)
    assert any(note.startswith("Weights by nearest rounding (") for note in found.report.notes)
    assert (found.report.packs, found.report.blocks, found.report.tuning) == ((), (), None)
    said = {entry.key for node in onnx.load(found.output).graph.node for entry in node.metadata_props}
    assert "onnxptq.pack" not in said


def test_notes_on_tuning_name_the_alternative(tmp_path: Path) -> None:
    options = {"target": "simulate", "weight_bits": 3, "activation_bits": 8, "effort": "balanced", "steps": 5}
    found = quantized("residual, fixed batch", tmp_path, method="auto", low_rank="auto", **options)
    tuned = [note.split(": Scales")[0] for note in found.report.notes if ": Scales and biases were" in note]
    assert tuned == ["packs", "packs with merged corrections", "packs with branches"]


@pytest.mark.parametrize(
    ("target", "bits", "reason"),
    [
        ("simulate", 8, "a grid of 8 bits has no integers left to begin above 0"),
        ("tensorrt", 8, "tensorrt has no zero points"),
        ("simulate", 4, None),
    ],
)
def test_ends_of_softmax_ranges_that_cannot_be_learnt(
    target: str, bits: int, reason: str | None, tmp_path: Path
) -> None:
    options = {"target": target, "activation_bits": bits, "weight_bits": 4, "steps": 2}
    found = quantized("attention", tmp_path, method="aiqvit", **options)
    said = [note for note in found.report.notes if "(--focus)" in note]
    assert len(said) == (reason is not None)
    assert not said or said[0].endswith(f"not both ends (--focus): {reason}.")
