"""Blocks of published architectures as torch exports them, against the structure that their papers describe.

Needs timm (the ``zoo`` extra).
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.partition.blocks import find_blocks, verify_blocks

# Architecture -> side of its input, blocks by the first letter of their kind (plain, fork, region, joined).
KINDS = {
    "resnet50": (64, "p" + "f" * 16 + "p"),
    "mobilenetv2_100": (64, "pppfpffpfffpffpffppp"),
    "vit_tiny_patch16_224": (64, "p" + "j" * 12 + "p"),
    "swin_tiny_patch4_window7_224": (56, "pjjpjjp" + "j" * 6 + "pjjp"),
    "convnext_tiny": (64, "pfffpfffp" + "f" * 9 + "pfffp"),
    "regnety_004": (64, "p" + "f" * 16 + "p"),
    # 6 + 12 + 24 + 16 dense layers with transitions between them.
    "densenet121": (64, "pf" + "r" * 5 + "pf" + "r" * 11 + "pf" + "r" * 23 + "pf" + "r" * 15 + "p"),
}


@pytest.fixture(scope="module")
def timm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm", reason="timm is not installed (extra: zoo)", exc_type=ImportError)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_published_architecture(name: str, timm: Any, tmp_path: Path) -> None:
    side, kinds = KINDS[name]
    options = {"img_size": side} if name.startswith(("vit", "swin")) else {}
    with warnings.catch_warnings():
        # Deprecations inside timm and the exporter are theirs.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            network = timm.create_model(name, pretrained=False, **options).eval()
            torch.onnx.export(
                network,
                (torch.randn(2, 3, side, side),),
                str(tmp_path / "net.onnx"),
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                dynamic_axes={"x": {0: "n"}},
            )
        finally:
            logging.disable(logging.NOTSET)
    graph = canonicalize(tmp_path / "net.onnx", tmp_path).graph
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    assert "".join(block.kind[0] for block in blocks) == kinds
