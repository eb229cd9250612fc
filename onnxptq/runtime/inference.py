"""Types of tensors behind operators that the onnx package does not know, as onnxruntime infers them on loading.

onnxruntime has operators of other domains (``com.microsoft``). The onnx package knows no types of what they write,
nor of anything behind that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import onnx

from onnxptq.runtime.session import Session
from onnxptq.runtime.transient import open_exposed

_TENSOR = re.compile(r"tensor\((\w+)\)")


def element_types(path: Path, tensors: Sequence[str]) -> dict[str, int]:
    """Element types of ``tensors`` of the model at ``path``, in whose folder a variant can be written.

    What is no tensor is left out.

    Raises:
        InvalidModelError: onnxruntime cannot load the model.
    """
    wanted = set(tensors)
    found = {}
    for name, kind, _ in open_exposed(path, tensors, exact=True).outputs:
        elem_type = _element_type(kind)
        if name in wanted and elem_type is not None:
            found[name] = elem_type
    return found


def infer_types(model: onnx.ModelProto, tensors: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """Element types, and shapes as far as they are known, of ``tensors`` of the main graph.

    What is no tensor is left out.

    Raises:
        InvalidModelError: onnxruntime cannot load the model.
    """
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    # An output without a type gets the one that onnxruntime infers for it.
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = Session(exposed.SerializeToString(), exact=True)
    wanted = set(tensors)
    symbols = {
        dim.dim_param
        for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info)
        for dim in entry.type.tensor_type.shape.dim
    }
    found = []
    for name, kind, shape in session.outputs:
        elem_type = _element_type(kind)
        if name in wanted and elem_type is not None:
            # onnxruntime gives a shape that it does not know as that of a scalar, and names dimensions by itself.
            dims = [dim if isinstance(dim, int) or dim in symbols else None for dim in shape] or None
            found.append(onnx.helper.make_tensor_value_info(name, elem_type, dims))
    return found


def _element_type(kind: str) -> int | None:
    """The element type of a tensor whose type onnxruntime writes as ``kind``; None for what is no tensor."""
    match = _TENSOR.fullmatch(kind)
    return None if match is None else int(onnx.TensorProto.DataType.Value(match[1].upper()))
