"""Tensors of ONNX test data sets (serialised TensorProto files)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxptq.calibrate.feeds.stored import ParsedFile
from onnxptq.calibrate.feeds.wording import first_line
from onnxptq.errors import FeedError
from onnxptq.types import Array


def open_tensor(path: Path, label: str) -> tuple[ParsedFile, str]:
    """The tensor of a .pb file and the name written in it (may be empty).

    Raises:
        FeedError: unreadable, no TensorProto, or its data lie in another file.
    """
    values, name = _parse(path, label)
    array = ParsedFile(
        path=path, shape=values.shape, dtype=values.dtype, parse=lambda source: _parse(source, label)[0]
    )
    return array, name


def _parse(path: Path, label: str) -> tuple[Array, str]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise ValueError("it holds no TensorProto (sequences and optionals are not supported)")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its data lie in another file")
        values = numpy_helper.to_array(tensor)
    except Exception as error:  # protobuf and numpy_helper raise a dozen unrelated types
        raise FeedError(
            f"{label}: cannot be read as a protobuf tensor: {first_line(error)}",
            "Write it with onnx.numpy_helper.from_array(array).SerializeToString().",
        ) from error
    return np.array(values), tensor.name
