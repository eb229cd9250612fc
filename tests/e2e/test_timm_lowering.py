"""Whole networks of many families, exported by both of torch's exporters with random weights.

Each network is exported at batch 2 with a dynamic batch, lowered, and compared with onnxruntime at batch 3.
Needs timm and onnxscript (the ``zoo`` extra).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxptq.lowering import check_supported, lower
from onnxptq.runtime import Session

TOLERANCE = 1e-4
"""Largest difference relative to the largest output: float32 sums in another order over many layers."""

SIZES: Mapping[str, int | None] = {
    "resnet26d": 64,
    "seresnext26d_32x4d": 64,
    "res2net50_14w_8s": 64,
    "skresnet18": 64,
    "regnety_002": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_050": 64,
    "tf_efficientnet_lite0": 65,
    "lcnet_035": 64,
    "ghostnet_050": 64,
    "densenet121": 64,
    "hrnet_w18_small": 64,
    "dla34": 64,
    "ese_vovnet19b_dw": 64,
    "repvgg_a0": 64,
    "hgnetv2_b0": 64,
    "inception_v3": 96,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "poolformer_s12": 64,
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
    "efficientvit_b0": 64,
    "pvt_v2_b0": 64,
    "vit_tiny_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 56,
    "xcit_nano_12_p16_224": 64,
    "cait_xxs24_224": 64,
    "coat_lite_tiny": 64,
    "levit_128s": None,
    "visformer_tiny": 64,
    "mixer_s32_224": 64,
    "resmlp_12_224": 64,
    "starnet_s1": 64,
}
"""Architecture -> side of its input; None where the architecture fixes it."""


@pytest.fixture(scope="module")
def timm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: zoo)")
        return pytest.importorskip("timm", reason="timm is not installed (extra: zoo)", exc_type=ImportError)


def _export(timm: Any, name: str, side: int | None, exporter: str, path: Path) -> int:
    """Write the network; returns the side of its input."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Deprecations inside timm and the exporters are theirs.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # The older exporter cannot trace every call of fused attention.
        timm.layers.set_fused_attn(exporter == "dynamo")
        size = {} if side is None else {"img_size": side}
        try:
            network = timm.create_model(name, num_classes=10, **size)
        except TypeError:
            network = timm.create_model(name, num_classes=10)
        network.eval()
        _shake(network)
        actual = side or int(network.pretrained_cfg["input_size"][-1])
        x = torch.randn(2, 3, actual, actual)
        if exporter == "dynamo":
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
            assert program is not None
            program.save(str(path))
        else:
            axes = {"x": {0: "batch"}, "y": {0: "batch"}}
            torch.onnx.export(
                network,
                (x,),
                str(path),
                dynamo=False,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes=axes,
                opset_version=17,
            )
    return actual


def _shake(network: torch.nn.Module) -> None:
    """Give biases, statistics and zero-initialized weights values that would show a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.is_floating_point() and (tensor.dim() == 1 or not tensor.any()):
                noise = torch.rand(tensor.shape, generator=generator) * 0.2
                tensor.add_(noise if "var" in name else noise - 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", SIZES)
def test_network_equals_onnxruntime(name: str, exporter: str, timm: Any, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    side = _export(timm, name, SIZES[name], exporter, path)
    graph = gs.import_onnx(onnx.load(str(path)))
    for i, node in enumerate(graph.nodes):
        node.name = f"{node.op}_{i}"
    assert check_supported(graph) == ()
    (source,), (target,) = graph.inputs, graph.outputs
    module = lower(graph, inputs=[source.name], outputs=[target.name])
    x = np.random.default_rng(0).normal(size=(3, 3, side, side)).astype(np.float32)
    want = Session(path, threads=1).run({source.name: x})[target.name]
    value = torch.from_numpy(x).requires_grad_(True)
    found = module({source.name: value})[target.name]
    assert found.shape == want.shape
    assert np.abs(found.detach().numpy() - want).max() <= TOLERANCE * np.abs(want).max()
    found.square().sum().backward()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()
    assert value.grad.any()
