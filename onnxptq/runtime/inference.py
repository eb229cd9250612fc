"""Types of tensors behind operators that the onnx package does not know, as onnxruntime infers them on loading.

onnxruntime has operators of other domains (``com.microsoft``). The onnx package knows no types of what they write,
nor of anything behind that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx

from onnxptq.runtime.session import Session

_TENSOR = re.compile(r"tensor\((\w+)\)")


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
        match = _TENSOR.fullmatch(kind)
        if name in wanted and match is not None:
            elem_type = onnx.TensorProto.DataType.Value(match[1].upper())
            # onnxruntime gives a shape that it does not know as that of a scalar, and names dimensions by itself.
            dims = [dim if isinstance(dim, int) or dim in symbols else None for dim in shape] or None
            found.append(onnx.helper.make_tensor_value_info(name, elem_type, dims))
    return found
