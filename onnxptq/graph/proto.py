"""Walking and measuring ONNX protobufs without touching tensor contents.

Models are read with their external data left on disk, so every helper here works on a ModelProto whose
large tensors are references ``(location, offset, length)`` into files beside the model.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxptq.types import Array

ONNX_DOMAINS = ("", "ai.onnx")
"""The two spellings of the default operator domain."""

_BITS_PER_ELEMENT: Mapping[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}
_NEWER_TYPE_BITS = {"FLOAT8E8M0": 8, "UINT2": 2, "INT2": 2}


def bits_per_element(data_type: int) -> int | None:
    """Size of one element in a packed tensor; None for strings and unknown types."""
    bits = _BITS_PER_ELEMENT.get(data_type)
    if bits is not None:
        return bits
    for name, size in _NEWER_TYPE_BITS.items():
        if getattr(TensorProto, name, None) == data_type:
            return size
    return None


def element_count(tensor: TensorProto) -> int:
    """Number of elements that the dimensions claim (1 for a scalar)."""
    return math.prod(tensor.dims)


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes that the elements take when packed, from the dimensions alone; 0 for strings."""
    bits = bits_per_element(tensor.data_type)
    return 0 if bits is None else (element_count(tensor) * bits + 7) // 8


def is_external(tensor: TensorProto) -> bool:
    """Whether the elements are in a file beside the model."""
    return tensor.data_location == TensorProto.EXTERNAL


@dataclass(frozen=True, slots=True)
class ExternalRef:
    """Where the elements of an external tensor are."""

    location: str
    offset: int
    length: int | None


def external_ref(tensor: TensorProto) -> ExternalRef:
    """Read ``tensor.external_data``.

    Raises:
        ValueError: no location, or an offset or length that is no non-negative integer.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location:
        raise ValueError("its external data has no location")
    offset = int(entries.get("offset", "0") or "0")
    length = int(entries["length"]) if entries.get("length") else None
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"its external data has offset {offset} and length {length}")
    return ExternalRef(location, offset, length)


def set_external_ref(tensor: TensorProto, ref: ExternalRef) -> None:
    """Make ``tensor`` point at ``ref`` and drop any elements it holds itself."""
    for field in ("raw_data", *_TYPED_FIELDS):
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", ref.location), ("offset", ref.offset), ("length", ref.length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def map_external(tensor: TensorProto, folder: Path) -> Array:
    """The elements of an external tensor as a read-only memory map; nothing is read until it is used.

    Only types with whole-byte elements that numpy knows are mapped; others raise ValueError.
    """
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if bits_per_element(tensor.data_type) != dtype.itemsize * 8:
        raise ValueError(f"{tensor.name} has packed elements")
    ref = external_ref(tensor)
    shape = tuple(tensor.dims)
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    # mode "c" would allow writing to a private copy; "r" makes an accidental in-place edit an error.
    return np.memmap(folder / ref.location, dtype=dtype, mode="r", offset=ref.offset, shape=shape)


def release_pages(array: Array) -> None:
    """Let the system take back what was read of a file-backed memory map; nothing for other arrays."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED") and getattr(array, "mode", "c") != "c":
        mapping.madvise(mmap.MADV_DONTNEED)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of ``node``."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph`` and every graph nested in it."""
    yield graph
    for node in graph.node:
        for nested in subgraphs_of(node):
            yield from walk_graphs(nested)


def walk_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the main graph, of nested graphs and of local functions."""
    for graph in walk_graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for node in function.node:
            yield node
            for nested in subgraphs_of(node):
                for inner in walk_graphs(nested):
                    yield from inner.node


def attribute_tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    """The tensors in the attributes of ``node``, nested graphs left out."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == AttributeProto.TENSORS:
            yield from attribute.tensors


def walk_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every initializer and attribute tensor anywhere in the model."""
    for graph in walk_graphs(model.graph):
        yield from graph.initializer
    for node in walk_nodes(model):
        yield from attribute_tensors(node)
    for function in model.functions:
        for node in function.node:
            for nested in subgraphs_of(node):
                for inner in walk_graphs(nested):
                    yield from inner.initializer


def take_initializers(model: onnx.ModelProto, is_taken: Callable[[TensorProto], bool]) -> list[TensorProto]:
    """Replace initializers of the main graph by graph inputs of their names and types, in place; returns them.

    Models of IR version 3 have such inputs already.
    """
    taken, kept = [], []
    inputs = {entry.name for entry in model.graph.input}
    for tensor in model.graph.initializer:
        if is_taken(tensor):
            taken.append(TensorProto())
            taken[-1].CopyFrom(tensor)
            if tensor.name not in inputs:
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                )
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return taken


def default_opset(model: onnx.ModelProto) -> int | None:
    """Version of the default operator set, or None if the model does not import it."""
    for entry in model.opset_import:
        if entry.domain in ONNX_DOMAINS:
            return int(entry.version)
    return None


def attribute_value(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The Python value of an attribute, or ``default`` where it is absent."""
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def metadata(props: Any) -> dict[str, str]:
    """A ``metadata_props`` field as a dict."""
    return {entry.key: entry.value for entry in props}
