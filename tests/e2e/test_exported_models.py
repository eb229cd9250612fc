"""Small transformers from both of torch's exporters reach the expected canonical form."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.runtime.session import Session

WIDTH, HEADS, DEPTH = 24, 3, 2

# Fused operators and folded scales reorder float32 roundings in a network of a dozen layers.
ROUNDING = 1e-5


class Attention(nn.Module):
    """Attention with a fused projection, its scale where ``scale_at`` says."""

    def __init__(self, scale_at: str) -> None:
        super().__init__()
        self.scale_at = scale_at
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        )
        scale = (WIDTH // HEADS) ** -0.5
        if self.scale_at == "operator":
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.scale_at == "q":
            out = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            out = ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self, scale_at: str, gelu: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(scale_at)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate=gelu), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, scale_at: str, gelu: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.blocks = nn.Sequential(*(Block(scale_at, gelu) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.blocks(x)).mean(1)


def export(model: nn.Module, path: Path, exporter: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about themselves
        if exporter == "dynamo":
            batch = torch.export.Dim("batch")
            torch.onnx.export(
                model,
                (x,),
                path,
                dynamo=True,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes={"x": {0: batch}},
                external_data=False,
                verbose=False,
            )
        else:
            torch.onnx.export(
                model,
                (x,),
                str(path),
                dynamo=False,
                opset_version=int(exporter.removeprefix("legacy")),
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
            )


@pytest.mark.parametrize("exporter", ["legacy12", "legacy17", "dynamo"])
@pytest.mark.parametrize(("scale_at", "gelu"), [("operator", "none"), ("q", "tanh"), ("product", "none")])
def test_transformer(tmp_path: Path, exporter: str, scale_at: str, gelu: str) -> None:
    if exporter == "dynamo" and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("torch's newer exporter needs onnxscript")
    if exporter == "legacy12" and scale_at == "operator":
        pytest.skip("torch exports scaled_dot_product_attention from opset 14 on")
    torch.manual_seed(0)
    source = tmp_path / "model.onnx"
    export(Transformer(scale_at, gelu).eval(), source, exporter)
    result = canonicalize(source, tmp_path, min_opset=20)
    ops = Counter(node.op for node in result.graph.nodes)
    assert (ops["LayerNormalization"], ops["Gelu"], ops["Softmax"]) == (2 * DEPTH + 1, DEPTH, DEPTH)
    assert not {"Erf", "Tanh", "Pow", "Sqrt", "Mul", "Div", "Flatten", "Constant", "Identity"} & set(ops)
    assert ops["MatMul"] == 6 * DEPTH
    known = {name for node in onnx.load(source).graph.node for name in node.output}
    written = {tensor.name for node in result.graph.nodes for tensor in node.outputs}
    unknown = {name for name in written if result.user_name(name) not in known}
    assert len(unknown) <= 0.05 * len(written), unknown
    for batch in (1, 3):
        feed = {"x": np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)}
        expected, found = (Session(path, exact=True).run(feed)["y"] for path in (source, result.path))
        assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()
