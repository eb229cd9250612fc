"""What ``onnxptq inspect`` prints about transformers."""

from __future__ import annotations

from pathlib import Path

import onnx
from click.testing import CliRunner
from onnxptq.cli.main import cli

from tests.unit.rotate.rotate_nets import transformer, two_widths
from tests.unit.small_nets import Net

LINE = "attention applied in {} places, {} layers behind normalizations"


def said(model: onnx.ModelProto, folder: Path, *options: str) -> str:
    onnx.save(model, str(folder / "model.onnx"))
    done = CliRunner().invoke(cli, ["inspect", str(folder / "model.onnx"), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_attention_and_layers_behind_normalizations_are_counted(tmp_path: Path) -> None:
    assert f"{LINE.format(2, 5)} (--attention lists them)\n" in said(transformer(), tmp_path)
    assert f"{LINE.format(2, 5)}\n" in said(transformer(), tmp_path, "--attention")
    assert LINE.format(0, 4) in said(two_widths(), tmp_path)


def test_a_network_without_them_has_no_such_line(tmp_path: Path) -> None:
    net = Net()
    y = net.linear("head", "x", 7, 4)
    assert "attention" not in said(net.proto({"x": [1, 5, 7]}, [y]), tmp_path)
