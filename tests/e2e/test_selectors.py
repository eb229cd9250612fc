"""Selectors as a user writes them: by the names of the own file, whatever preparation makes of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.command import Bench, here
from tests.unit.graph.graph_helpers import block_function
from tests.unit.small_nets import Net


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """Its model has a batch norm that is folded, and a linear layer with a bias of its own."""
    net = Net()
    convolved = net.conv("conv", "x", (16, 3, 3, 3), bias=False)
    statistics = [net.constant(name, np.full(16, 0.5, np.float32)) for name in ("g", "b", "m", "v")]
    normed = net.op("BatchNormalization", "bn", convolved, *statistics)
    pooled = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", net.op("Relu", "relu", normed)))
    same = net.op("Identity", "same", net.linear("up", pooled, 16, 32))
    scores = net.linear("head", net.op("Relu", "act", same), 32, 10)
    bench.write(net.proto({"x": ["n", 3, 8, 8]}, [scores]))
    return bench


def _report(bench: Bench, *options: object) -> dict[str, Any]:
    done = bench.quantize("--json", "--no-report", "--target", "simulate", *options)
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads(done.out)
    return report


def _weights(report: dict[str, Any]) -> set[str]:
    return {reader for q in report["quantized"] if q["role"] == "weight" for reader in q["readers"]}


ALL = {"conv", "up.mm", "head.mm"}


@pytest.mark.parametrize(
    ("pattern", "spared", "said"),
    [
        ("BatchNormalization", "conv", "'bn' of 'conv'"),
        ("bn", "conv", "'bn' of 'conv'"),
        ("up", "up.mm", "'up' of 'up.mm'"),
        ("pool", None, "changes nothing for simulate"),
    ],
)
def test_exclude(bench: Bench, pattern: str, spared: str | None, said: str) -> None:
    report = _report(bench, "--exclude", pattern)
    assert _weights(report) == ALL - {spared}
    assert any(f"--exclude '{pattern}'" in note and said in note for note in report["notes"])


def test_include(bench: Bench) -> None:
    assert _weights(_report(bench, "--include", "BatchNormalization", "--include", "up")) == {"conv", "up.mm"}


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_the_remedy_leads_to_the_names(bench: Bench, command: str) -> None:
    options = ("--exclude", "zzzzzz")
    run = (
        (lambda: bench.quantize(*options))
        if command == "quantize"
        else (lambda: here(bench.capsys, command, bench.model, *options))
    )
    remedy = f"'onnxptq inspect {bench.model} --names' lists all names."
    bench.refuses(2, "--exclude 'zzzzzz'", remedy, do=run)
    listed = here(bench.capsys, "inspect", bench.model, "--names").out
    for name in ("conv", "bn", "BatchNormalization", "up.mm", "head", "same", "nothing: it changes nothing"):
        assert name in listed
    assert "Names" not in here(bench.capsys, "inspect", bench.model).out


def test_inspect_lists_what_became_of_each_node(bench: Bench) -> None:
    rows = json.loads(here(bench.capsys, "inspect", bench.model, "--json").out)["names"]
    found = {row["name"]: row for row in rows}
    assert list(found) == [
        *("conv", "bn", "relu", "pool", "flat", "up.mm", "up", "same", "act", "head.mm", "head")
    ]
    assert found["bn"] == {
        "name": "bn",
        "op": "BatchNormalization",
        "outputs": ["bn"],
        "homes": ["conv"],
        "reason": "",
    }
    assert found["same"]["homes"] == []
    # Every name that is listed and has become something may be chosen.
    for name, row in found.items():
        done = here(bench.capsys, "inspect", bench.model, "--exclude", name, "-q")
        assert done.code == (0 if row["homes"] else 2), name


def test_reports_name_the_users_nodes(bench: Bench) -> None:
    graph = helper.make_graph(
        [helper.make_node("Block", [a, "w"], [b], f"block_{b}", domain="own") for a, b in ("xh", "hy")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(np.eye(32, dtype=np.float32), "w")],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    bench.write(helper.make_model(graph, opset_imports=domains, functions=[block_function()], ir_version=8))
    np.savez(bench.data, x=np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32))
    report = _report(bench, "--exclude", "block_y")
    (reader,) = _weights(report)
    assert reader.endswith(" (part of block_h)")
    assert {skip["site"].partition(" ")[2] for skip in report["skips"]} == {"(part of block_y)"}
    assert {"h", "y", "part 1 of h"} <= {row["tensor"] for row in report["tensors"]}
    command = ("inspect", bench.model, "--exclude", "block_y", "--json")
    view = json.loads(here(bench.capsys, *command).out)["targets"]["simulate"]
    assert {skip["site"].partition(" ")[2] for skip in view["skips"]} == {"(part of block_y)"}
