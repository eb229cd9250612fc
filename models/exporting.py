"""From a torch network to an ONNX file that was compared with it in onnxruntime."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch

from models.manifest import Interface
from onnxptq.errors import OutputCheckError, OutputPathError
from onnxptq.runtime.session import Session
from onnxptq.types import FloatArray

MAX_RELATIVE_ERROR = 1e-4
"""Largest |onnxruntime - torch| over the largest |torch| logit that is accepted.

The two sum up to 1 280 products per output, in 50 layers, in another order and with BatchNorm folded:
about 1e-6 is measured, a wrong padding or a lost layer gives 1e-1 and more.
"""


def traced(network: torch.nn.Module, interface: Interface) -> onnx.ModelProto:
    """``network`` as torch's exporter writes it, with an open batch."""
    batch = {0: "batch"}
    shape = [2, *(size for size in interface.input_shape[1:] if isinstance(size, int))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The other exporter needs onnxscript. This one announces its retirement on every call, and names
        # what it cannot fold.
        warnings.simplefilter("ignore")
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            network.eval(),
            (torch.zeros(shape),),
            raw,
            input_names=[interface.input_name],
            output_names=[interface.output_name],
            dynamic_axes={interface.input_name: batch, interface.output_name: batch},
            opset_version=interface.opset,
            dynamo=False,
        )
        return onnx.load(raw)


def publish(model: onnx.ModelProto, network: torch.nn.Module, interface: Interface, output: Path) -> Path:
    """Write ``model`` to ``output`` and return it. Same model, same bytes.

    Nothing is left at ``output`` unless every check passed; a file already there is replaced at once.

    Raises:
        OutputCheckError: the file does not compute what ``network`` computes.
        OutputPathError: the folder of ``output`` cannot be written.
    """
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
        _compare(network, interface, draft)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return output


def _compare(network: torch.nn.Module, interface: Interface, path: Path) -> None:
    """Batch 1 and 3, so that a batch size frozen by the export cannot pass."""
    session = Session(path)
    for size in (1, 3):
        shape = (size, *(d for d in interface.input_shape[1:] if isinstance(d, int)))
        values = np.random.default_rng(size).uniform(-1, 1, shape).astype(np.float32)
        with torch.inference_mode():
            expected: FloatArray = network(torch.from_numpy(values)).numpy()
        got = session.run({interface.input_name: values})[interface.output_name]
        if got.shape != expected.shape:
            raise OutputCheckError(f"{path.name} gives shape {got.shape}, torch {expected.shape}.")
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= MAX_RELATIVE_ERROR:
            raise OutputCheckError(
                f"{path.name} differs from torch by {error:.1e} of the largest logit at batch {size} "
                f"(allowed: {MAX_RELATIVE_ERROR:.0e}).",
                "Use the package versions of constraints.txt.",
            )
