"""ONNX element types, numpy types and torch types."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import torch

from onnxptq.lowering.registry import Declined
from onnxptq.types import Array

_TORCH: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
}


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        Declined: torch does not compute in this type (strings, complex, 8-bit floats, 4- and 2-bit integers).
    """
    try:
        return _TORCH[onnx_type]
    except KeyError:
        raise Declined(
            f"element type {onnx.TensorProto.DataType.Name(onnx_type)} has no torch type"
        ) from None


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor that shares the memory of ``array``, so do not write to it. Copies what torch cannot view.

    Raises:
        Declined: the element type has no torch type.
    """
    if array.dtype.name == "bfloat16":
        return tensor_of(array.view(np.int16)).view(torch.bfloat16)
    if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # Weights of a memory-mapped file are read-only on purpose; parameters are cloned before training.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except TypeError:
            raise Declined(f"element type {array.dtype} has no torch type") from None
