"""The inputs of a model file, float or quantized, without preparing the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from onnxptq.errors import UnsupportedModelError
from onnxptq.graph.load import read_model
from onnxptq.types import InputSpec


def input_specs(path: Path) -> tuple[InputSpec, ...]:
    """Name, type and shape of every graph input that is not an initializer.

    Raises:
        UsageError: the file cannot be read.
        InvalidModelError: it is no model.
        UnsupportedModelError: an input is no tensor.
    """
    graph = read_model(path, is_float=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return tuple(_spec(value) for value in graph.input if value.name not in constants)


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    if not value.type.HasField("tensor_type"):
        raise UnsupportedModelError(
            f"Input '{value.name}' is not a tensor.", "Only tensor inputs are supported."
        )
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
    )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return InputSpec(name=value.name, dtype=dtype, shape=shape)
