"""Reading an ONNX file from disk, trusting nothing in it.

The file is parsed with external data left where it is, then checked in Python for everything that native
code would trip over: sizes that the dimensions claim against the bytes that are there, external data that
is absent, too short or outside the model's folder, opsets, and quantization operators. The ONNX checker,
with type and shape inference, then runs in a subprocess (``native.py``), because it is native code that a
hostile file could crash.

External data must lie in the model's folder: a model from elsewhere must not name any file of this machine as
its weights. Caches keep a model and its data as links into one folder of contents; data may be such links as long
as they lead to the folder that the model's own link leads to. onnxruntime asks for the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnxptq.errors import AlreadyQuantizedError, InvalidModelError, UnsupportedModelError, UsageError
from onnxptq.graph import proto
from onnxptq.graph.native import NativeError, run_native
from onnxptq.graph.order import sort_nodes
from onnxptq.graph.weights import load_inline
from onnxptq.room import temporary_folder

MIN_OPSET = 11
"""The oldest default operator set that is accepted; older ones lack inputs that the passes rely on."""

_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    }
)
_QUANTIZED_CONTRIB_OPS = frozenset(
    {
        "BiasedQuantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulFpQ4",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MulInteger",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QMoE",
        "QOrderedAttention",
        "QOrderedGelu",
        "QOrderedLayerNormalization",
        "QOrderedLongformerAttention",
        "QOrderedMatMul",
        "QuantizeBFP",
        "QuantizeWithOrder",
        "DequantizeBFP",
        "DequantizeWithOrder",
        "ReduceSumInteger",
    }
)
_KEPT_BYTES = 4096
_COPY = "Copy its data into the model's folder, as a file and not as a link to another folder."
_REEXPORT = "Export the model again, or copy the file again: it may be truncated or damaged."


def load_model(path: Path) -> onnx.ModelProto:
    """Read and fully check the float model at ``path``; external data stays on disk.

    Returns:
        The parsed model, its nodes sorted. Tensors with external data keep their references, relative to
        ``path.parent``.

    Raises:
        UsageError: no such file, or it cannot be read.
        InvalidModelError: not an ONNX file, truncated or damaged, external data absent, too
            short or outside the model's folder, no inputs or outputs, or the ONNX checker refuses it.
        UnsupportedModelError: an opset below 11 or newer than the installed onnx, or a sparse initializer.
        AlreadyQuantizedError: the model holds quantization operators.
    """
    model = read_model(path)
    check_model(model, path, is_changed=sort_nodes(model))
    return model


def check_model(model: onnx.ModelProto, path: Path, *, is_changed: bool = False) -> None:
    """Run the ONNX checker on what ``read_model`` has read from ``path``, ``is_changed`` since then or not.

    Raises:
        InvalidModelError: the checker refuses the model.
    """
    try:
        if is_changed or any(proto.is_external(tensor) for tensor in proto.walk_tensors(model)):
            with temporary_folder() as folder:
                skeleton = folder / path.name
                skeleton.write_bytes(_without_external_data(model, path.parent).SerializeToString())
                run_native("check", skeleton)
        else:
            run_native("check", path)
    except NativeError as failure:
        raise InvalidModelError(
            f"{path} is no valid ONNX model: {failure.reason}",
            "Run onnx.checker.check_model(path, full_check=True) on it, and fix or repeat the export.",
        ) from failure


def _without_external_data(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy in which graph inputs stand for large external initializers.

    The checker refuses data that are links. Which of them may be read is decided here, and their sizes are known.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    proto.take_initializers(copy, lambda t: proto.is_external(t) and proto.stored_bytes(t) > _KEPT_BYTES)
    load_inline(copy, folder)
    return copy


def read_model(path: Path, *, is_float: bool = True) -> onnx.ModelProto:
    """As ``load_model`` but without the native checker: everything that can be judged in Python.

    Args:
        is_float: whether quantization operators are refused.
    """
    model = _parse(path)
    _check_header(model, path)
    _check_tensors(model, path)
    _forget_negative_dimensions(model)
    if is_float:
        _check_floats_only(model, path)
    return model


def model_bytes(model: onnx.ModelProto, path: Path) -> int:
    """Size on disk of the model file and of the external data that it uses."""
    total = path.stat().st_size
    seen: set[str] = set()
    for tensor in proto.walk_tensors(model):
        if proto.is_external(tensor):
            seen.add(proto.external_ref(tensor).location)
    return total + sum((path.parent / location).stat().st_size for location in sorted(seen))


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        what = "is a folder, not a file" if path.is_dir() else what
        raise UsageError(f"{path} {what}.", "Give the path of an .onnx file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}.", "Check the file's permissions."
        ) from error
    if not data:
        raise InvalidModelError(f"{path} is empty.", _REEXPORT)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InvalidModelError(f"{path} is not an ONNX file, or is damaged: {error}.", _REEXPORT) from error
    if not model.HasField("graph"):
        raise InvalidModelError(f"{path} holds no graph: it is not an ONNX model, or is damaged.", _REEXPORT)
    return model


def _check_header(model: onnx.ModelProto, path: Path) -> None:
    opset = proto.default_opset(model)
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        raise InvalidModelError(f"{path} does not say which operator set it uses.", _REEXPORT)
    if opset < MIN_OPSET:
        raise UnsupportedModelError(
            f"{path} uses opset {opset}; opset {MIN_OPSET} or newer is needed.",
            f"Export it with opset {MIN_OPSET} or newer, or convert it with onnx.version_converter.",
        )
    if opset > newest:
        raise UnsupportedModelError(
            f"{path} uses opset {opset}; the installed onnx {onnx.__version__} knows opset {newest} at most.",
            "Upgrade onnx, or export the model with an older opset.",
        )
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedModelError(
            f"{path} uses IR version {model.ir_version}; the installed onnx knows {onnx.IR_VERSION} at most.",
            "Upgrade onnx, or export the model with an older one.",
        )
    if not model.graph.output:
        raise InvalidModelError(f"{path} has no graph outputs.", _REEXPORT)
    initializers = {tensor.name for tensor in model.graph.initializer}
    if all(entry.name in initializers for entry in model.graph.input):
        raise InvalidModelError(
            f"{path} has no graph inputs: its outputs are constants and nothing can be calibrated.", _REEXPORT
        )


def _check_tensors(model: onnx.ModelProto, path: Path) -> None:
    for graph in proto.walk_graphs(model.graph):
        for sparse in graph.sparse_initializer:
            raise UnsupportedModelError(
                f"{path}: initializer {sparse.values.name!r} is stored sparse.",
                "Convert sparse initializers to dense ones before quantizing.",
            )
    for tensor in proto.walk_tensors(model):
        where = f"{path}: tensor {tensor.name!r} is unusable"
        if proto.is_external(tensor):
            outside = _outside(tensor, path)
            if outside:
                raise InvalidModelError(f"{where}: {outside}.", _COPY)
        problem = _tensor_problem(tensor, path.parent)
        if problem:
            raise InvalidModelError(f"{where}: {problem}.", _REEXPORT)


def _forget_negative_dimensions(model: onnx.ModelProto) -> None:
    """Make dimensions unknown that converters write as -1, which ONNX has no meaning for and onnxruntime ignores."""
    for graph in proto.walk_graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.ClearField("dim_value")


def _outside(tensor: TensorProto, path: Path) -> str | None:
    """Where the external data of ``tensor`` are, if that is a place that the model at ``path`` must not name."""
    try:
        location = proto.external_ref(tensor).location
    except ValueError:
        return None
    folder = path.parent.resolve()
    named, target = Path(os.path.normpath(folder / location)), (folder / location).resolve()
    homes = (folder, path.resolve().parent)
    if named.is_relative_to(folder) and any(target.is_relative_to(home) for home in homes):
        return None
    leads = f", which leads to {target}," if target != named else ""
    return f"its external data {location!r}{leads} is outside the model's folder {folder}"


def _tensor_problem(tensor: TensorProto, folder: Path) -> str | None:
    if any(dim < 0 for dim in tensor.dims):
        return f"negative dimension in {list(tensor.dims)}"
    if tensor.data_type == TensorProto.STRING:
        wanted = proto.element_count(tensor)
        return None if len(tensor.string_data) == wanted else "wrong number of strings"
    if proto.bits_per_element(tensor.data_type) is None:
        return f"unknown element type {tensor.data_type}"
    wanted = proto.stored_bytes(tensor)
    if proto.is_external(tensor):
        return _external_problem(tensor, wanted, folder)
    if tensor.HasField("raw_data"):
        have = len(tensor.raw_data)
        return None if have == wanted else f"shape {list(tensor.dims)} needs {wanted} bytes, {have} are there"
    values = _typed_count(tensor)
    need = _typed_need(tensor)
    if values != need:
        return f"shape {list(tensor.dims)} needs {need} stored values, {values} are there"
    return None


def _typed_count(tensor: TensorProto) -> int:
    return (
        len(tensor.float_data)
        + len(tensor.int32_data)
        + len(tensor.int64_data)
        + len(tensor.double_data)
        + len(tensor.uint64_data)
    )


def _typed_need(tensor: TensorProto) -> int:
    """Entries of the typed field: complex numbers take two, sub-byte types share one."""
    count = proto.element_count(tensor)
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    bits = proto.bits_per_element(tensor.data_type) or 8
    return -(-count * bits // 8) if bits < 8 else count


def _external_problem(tensor: TensorProto, wanted: int, folder: Path) -> str | None:
    try:
        ref = proto.external_ref(tensor)
    except ValueError as error:
        return str(error)
    target = folder / ref.location
    if not target.is_file():
        return f"its external data file {target} does not exist"
    if ref.length is not None and ref.length != wanted:
        return f"shape {list(tensor.dims)} needs {wanted} bytes, its external data entry says {ref.length}"
    size = target.stat().st_size
    if ref.offset + wanted > size:
        return (
            f"its external data file {target} has {size} bytes, "
            f"{wanted} bytes from {ref.offset} on are needed"
        )
    return None


def _check_floats_only(model: onnx.ModelProto, path: Path) -> None:
    for node in _quantized_nodes(model):
        label = node.name or (node.output[0] if node.output else "?")
        raise AlreadyQuantizedError(
            f"{path} is already quantized: node {label!r} is a {node.op_type}.",
            "Give the float model that it was made from.",
        )


def _quantized_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for node in proto.walk_nodes(model):
        if node.domain in proto.ONNX_DOMAINS:
            if node.op_type in _QUANTIZED_OPS:
                yield node
        elif node.op_type in _QUANTIZED_OPS | _QUANTIZED_CONTRIB_OPS or node.op_type.startswith("QLinear"):
            yield node
