"""Outputs of Softmax through the whole product: their ranges, their roots, and Attention nodes that hold them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.e2e.packed import quantized, require_proven


@pytest.mark.parametrize("method", ["aiqvit", "pack-ptq"])
def test_softmax_ranges_that_begin_above_zero_are_written(method: str, tmp_path: Path) -> None:
    """Learnt at both ends or not; each run compares every edge of its file with the simulation."""
    options = {"method": method, "observer": "auto", "target": "simulate"}
    found = quantized("even attention", tmp_path, weight_bits=8, activation_bits=3, **options)
    (row,) = [row for row in found.report.quantized if row.tensor == "p"]
    (softmax,) = found.report.softmax
    assert row.storage == "int8"
    assert row.zero_point[0] < 0
    assert 0.05 < softmax.low < 0.25 < softmax.high < 0.5
    assert softmax.full_db <= softmax.from_zero_db < softmax.free_db
    assert found.report.parity is not None
    assert found.report.parity.max_steps == 0.0


def test_what_zero_point_0_costs_is_told(tmp_path: Path) -> None:
    found = quantized("even attention", tmp_path, target="tensorrt", observer="auto", floor=None)
    require_proven(found)
    (row,) = found.report.softmax
    assert row.low == 0.0
    assert row.free_db - row.from_zero_db > 0.1
    (note,) = [note for note in found.report.notes if "tensorrt has no zero point" in note]
    assert f"up to {row.free_db - row.from_zero_db:.1f} dB less noise" in note


def test_auto_measures_the_root_of_softmax_weights(tmp_path: Path) -> None:
    found = quantized("attention", tmp_path, method="auto", target="simulate", observer="auto")
    require_proven(found)
    note = next(note for note in found.report.notes if "root of order" in note)
    order, listed = re.findall(r"order (\d) .*by order: (.*)\)", note)[0]
    levels = {int(k): float(v) for k, v in (pair.split(":") for pair in listed.split(","))}
    assert levels[int(order)] == max(levels.values())
    (row,) = found.report.softmax
    assert row.root == int(order) > 1
    assert "softmax_root" in {row.tensor for row in found.report.quantized}


@pytest.mark.parametrize("options", [{"effort": "fast"}, {"method": "aiqvit"}, {"method": "rtn"}], ids=str)
def test_roots_of_softmax_weights(options: Mapping[str, Any], tmp_path: Path) -> None:
    """They take the place of the weights; the file computes what is simulated."""
    common = {"target": "simulate", "weight_bits": 8, "activation_bits": 3, "softmax_root": 3}
    found = quantized("attention", tmp_path, **{"observer": "auto", **common, **options})
    require_proven(found)
    rows = {row.tensor: row for row in found.report.quantized}
    assert "softmax" not in rows
    assert rows["softmax_root"].readers == ("softmax",)
    assert all(row.root == 3 and row.low >= 0.0 for row in found.report.softmax)
    assert any("root of order 3" in note for note in found.report.notes)


@pytest.mark.parametrize("target", ["ort-cpu", "simulate"])
def test_an_attention_node_is_written_out_where_its_products_are_quantized(
    target: str, tmp_path: Path
) -> None:
    found = quantized("attention node", tmp_path, target=target, method="pack-ptq", observer="auto")
    require_proven(found)
    kinds = Counter(node.op_type for node in onnx.load(str(found.output)).graph.node)
    notes = [note for note in found.report.notes if note == "1 Attention nodes were written out as products."]
    if target == "ort-cpu":
        assert (kinds["Attention"], kinds["Softmax"], notes) == (1, 0, [])
        return
    assert (kinds["Attention"], kinds["Softmax"], len(notes)) == (0, 1, 1)
    activations = [row for row in found.report.quantized if row.role == "activation"]
    readers = {reader for row in activations for reader in row.readers}
    # The projections, both products, and the layer behind.
    assert {"q.mm", "k.mm", "v.mm", "out.mm"} < readers
    assert len(readers) == 6
    assert len(found.report.softmax) == 1
    rooted = quantized("attention node", tmp_path, target=target, activation_bits=4, softmax_root=4,
                       observer="auto")  # fmt: skip
    require_proven(rooted)
    assert [row.root for row in rooted.report.softmax] == [4]


@pytest.mark.parametrize("root", [1, 2])
def test_vector_attention(root: int, tmp_path: Path) -> None:
    options = {"target": "simulate", "weight_bits": 8, "activation_bits": 4, "observer": "auto"}
    found = quantized("vector attention", tmp_path, method="aiqvit", softmax_root=root, **options)
    require_proven(found)
    (row,) = found.report.softmax
    assert row.root == root
    assert {"v4", "p" if root == 1 else "p_root"} <= {row.tensor for row in found.report.quantized}
