"""Writing a gs.Graph to disk: atomically, with metadata, and without holding large weights in memory.

Large models get their weights in ``<file name>.data`` beside the model, streamed tensor by tensor; sources
may be memory maps. Both files are written under temporary names in the target's folder and renamed when
complete, so that a failure leaves neither a partial file nor a damaged older one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxptq.errors import OutputPathError, UnsupportedModelError
from onnxptq.graph import proto
from onnxptq.graph.surgeon import quiet_surgeon
from onnxptq.types import Array

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go to a file beside the model; protobuf's own limit is 2 GiB."""

SHARED_DATA_BYTES = 1 << 22
"""The same for a canonical model: its variants then share the file instead of each writing the weights anew."""

_INLINE_BYTES = 1024
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 24


def save_graph(
    graph: gs.Graph,
    path: Path,
    *,
    model_metadata: Mapping[str, str] = {},
    node_metadata: Mapping[str, Mapping[str, str]] = {},
    external_data: bool | None = None,
    inline_bytes: int | None = None,
    share: bool = False,
) -> int:
    """Write ``graph`` to ``path`` and return the total bytes written.

    Args:
        graph: left as it is. Constants are written from their arrays, memory maps included, and those
            that wrap a TensorProto (``LazyValues``) exactly as it stands, so that 4-bit types survive.
        path: the model file; an existing one is replaced only when the new one is complete.
        model_metadata: ``metadata_props`` of the model.
        node_metadata: ``metadata_props`` by node name.
        external_data: whether weights go to ``<path>.data``; None for whenever they exceed
            ``inline_bytes``, 1.5 GB by default.
        share: refer to the files in the folder of ``path`` that memory maps are of, instead of copying their
            elements: for variants that do not outlive them, and need not survive a power cut.

    Raises:
        OutputPathError: the folder is absent or not writable, or the disk is full.
    """
    constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]
    folder = path.parent.resolve() if share else None
    if external_data is None:
        limit = EXTERNAL_DATA_BYTES if inline_bytes is None else inline_bytes
        own = [t for t in constants if _shared_ref(t, folder) is None]
        external_data = sum(_constant_bytes(t) for t in own) > limit
    data_path = path.with_name(path.name + ".data")
    with _replacing(path, data_path if external_data else None, sync=not share) as (model_file, data_file):
        sink = _Sink(data_file, data_path.name) if external_data else None
        model = _to_proto(graph, [_initializer(t, sink, folder) for t in constants])
        _attach_metadata(model, model_metadata, node_metadata)
        payload = model.SerializeToString()
        model_file.write(payload)
        return len(payload) + (sink.position if sink else 0)


def write_model(model: onnx.ModelProto, path: Path) -> int:
    """Write a variant that will not outlive this run atomically; returns the bytes written.

    External references stay as they are.
    """
    with _replacing(path, None, sync=False) as (model_file, _):
        return model_file.write(model.SerializeToString())


def exposed_copy(path: Path, tensors: Sequence[str], out: Path) -> None:
    """Write beside ``path`` a variant of it whose ``tensors`` are additional graph outputs.

    Weights in external data are shared, not copied, so ``out`` must be in the folder of ``path``.

    Args:
        path: a canonical or written model.
        tensors: names; those that are graph outputs already are left out, as are duplicates.
        out: the new file.

    Raises:
        ValueError: a name is no tensor of the graph, or ``out`` is in another folder.
        OutputPathError: ``out`` cannot be written.
    """
    if out.resolve().parent != path.resolve().parent:
        raise ValueError(f"{out} must be beside {path}, whose external data it shares")
    model = onnx.load(str(path), load_external_data=False)
    present = {entry.name for entry in model.graph.output}
    wanted = [name for name in dict.fromkeys(tensors) if name not in present]
    known = _known_types(model)
    written = {name for node in model.graph.node for name in node.output}
    constant = {tensor.name for tensor in model.graph.initializer}
    for name in wanted:
        if name not in written and name not in known and name not in constant:
            raise ValueError(f"{name!r} is no tensor of {path}")
        entry = model.graph.output.add()
        entry.name = name
        # Shapes from value_info may be wrong for other batch sizes. A type that is not known is inferred by
        # onnxruntime, which knows operators that the onnx package does not.
        if name in known:
            entry.type.tensor_type.elem_type = known[name]
    write_model(model, out)


def _known_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {t.name: t.data_type for t in graph.initializer}
    for entry in (*graph.value_info, *graph.input, *graph.output):
        elem_type = entry.type.tensor_type.elem_type
        if elem_type:
            types[entry.name] = elem_type
    return types


class _Sink:
    """The external data file being filled."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.position = 0

    def add(self, tensor: onnx.TensorProto, chunks: Iterator[memoryview]) -> None:
        """Append the elements, page aligned so that runtimes can map them; ``tensor`` refers to them."""
        padding = -self.position % _ALIGNMENT
        self._file.write(b"\0" * padding)
        start = self.position + padding
        length = 0
        for chunk in chunks:
            self._file.write(chunk)
            length += chunk.nbytes
        self.position = start + length
        proto.set_external_ref(tensor, proto.ExternalRef(self._name, start, length))


def _constant_bytes(tensor: gs.Constant) -> int:
    values = tensor._values
    return proto.stored_bytes(values.tensor) if isinstance(values, LazyValues) else int(values.nbytes)


def _shared_ref(tensor: gs.Constant, folder: Path | None) -> proto.ExternalRef | None:
    """Where the elements of a memory map of a file in ``folder`` lie; None for anything else."""
    values = tensor._values
    if folder is None or not isinstance(values, np.memmap) or values.filename is None:
        return None
    place = Path(values.filename)
    whole: object = values.base
    # A view of a part would have kept the offset of the whole.
    if place.parent.resolve() != folder or not isinstance(whole, mmap.mmap):
        return None
    return proto.ExternalRef(place.name, values.offset, values.nbytes)


def _initializer(tensor: gs.Constant, sink: _Sink | None, shared: Path | None = None) -> onnx.TensorProto:
    """The TensorProto of a constant; large elements go to ``sink`` if there is one, or stay in ``shared``."""
    values = tensor._values
    result = onnx.TensorProto()
    ref = _shared_ref(tensor, shared)
    if ref is not None:
        result.data_type = dtype_to_onnx(tensor.export_dtype)
        result.dims.extend(values.shape)
        proto.set_external_ref(result, ref)
        result.name = tensor.name
        return result
    if isinstance(values, SparseValues):
        raise UnsupportedModelError(f"initializer {tensor.name!r} is stored sparse.")
    if isinstance(values, LazyValues):
        result.CopyFrom(values.tensor)
        if sink is not None and result.HasField("raw_data") and len(result.raw_data) > _INLINE_BYTES:
            sink.add(result, iter([memoryview(result.raw_data)]))
    else:
        result.data_type = dtype_to_onnx(tensor.export_dtype)
        result.dims.extend(values.shape)
        if sink is not None and values.nbytes > _INLINE_BYTES:
            sink.add(result, _chunks(values))
        else:
            result.raw_data = np.ascontiguousarray(values).tobytes()
    result.name = tensor.name
    return result


def _chunks(values: Array) -> Iterator[memoryview]:
    """The elements in C order, a few megabytes at a time."""
    if not values.flags.c_contiguous:
        source, values = values, np.ascontiguousarray(values)
        proto.release_pages(source)
    flat = values.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].data
        proto.release_pages(values)


def _to_proto(graph: gs.Graph, initializers: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    """The model without metadata: structure from graphsurgeon, initializers from us."""
    with quiet_surgeon():
        skipped = {t.name for t in (*graph.inputs, *graph.outputs)}
        infos = [
            OnnxExporter.export_value_info_proto(t, True)
            for t in graph.tensors().values()
            if isinstance(t, gs.Variable) and t.dtype is not None and t.name not in skipped
        ]
        graph_proto = onnx.helper.make_graph(
            nodes=[export_node(node) for node in graph.nodes],
            name=graph.name or "graph",
            inputs=[OnnxExporter.export_value_info_proto(t, True) for t in graph.inputs],
            outputs=[OnnxExporter.export_value_info_proto(t, True) for t in graph.outputs],
            doc_string=graph.doc_string,
            value_info=infos,
        )
        graph_proto.initializer.extend(initializers)
    domains = _domains(graph)
    model = onnx.helper.make_model(graph_proto, opset_imports=domains)
    model.producer_name = "onnxptq"
    model.ir_version = max(graph.ir_version or 0, onnx.helper.find_min_ir_version_for(domains, True))
    return model


def _domains(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The operator sets that the graph imports, at version 1 where it uses one without importing it."""
    versions = {entry.domain: entry.version for entry in graph.import_domains or ()}
    if not any(name in versions for name in proto.ONNX_DOMAINS):
        versions[""] = graph.opset
    for nodes in (graph.nodes, *(nested.nodes for nested in graph.subgraphs(recursive=True))):
        for node in nodes:
            if (node.domain or "") not in proto.ONNX_DOMAINS:
                versions.setdefault(node.domain, 1)
    return [onnx.helper.make_opsetid(name, version) for name, version in versions.items()]


def export_node(node: gs.Node) -> onnx.NodeProto:
    """As graphsurgeon's exporter, but an empty list attribute keeps its declared type instead of failing."""
    empty = {key for key, value in node.attrs.items() if isinstance(value, list | tuple) and not value}
    result: onnx.NodeProto
    if not empty:
        result = OnnxExporter.export_node(node)
        return result
    lean = gs.Node(node.op, node.name, {k: v for k, v in node.attrs.items() if k not in empty})
    result = OnnxExporter.export_node(lean)
    result.domain = node.domain or ""
    result.input.extend(t.name for t in node.inputs)
    result.output.extend(t.name for t in node.outputs)
    for key in sorted(empty):
        kind: Any = onnx.defs.get_schema(node.op, node.domain or "").attributes[key].type
        result.attribute.add(name=key, type=kind.value)
    return result


def _attach_metadata(
    model: onnx.ModelProto,
    model_metadata: Mapping[str, str],
    node_metadata: Mapping[str, Mapping[str, str]],
) -> None:
    for key, value in sorted(model_metadata.items()):
        model.metadata_props.add(key=key, value=value)
    for node in model.graph.node:
        for key, value in sorted(node_metadata.get(node.name, {}).items()):
            node.metadata_props.add(key=key, value=value)


@contextlib.contextmanager
def _replacing(
    path: Path, data_path: Path | None, *, sync: bool = True
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Two temporary files beside ``path`` that take the final names when the block ends well.

    Args:
        sync: wait until the disk has them.
    """
    temporary: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            files = []
            for _ in range(2):
                handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
                temporary.append(Path(name))
                files.append(stack.enter_context(os.fdopen(handle, "wb")))
            yield files[0], files[1]
            for file in files:
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        _publish(temporary, path, data_path)
    except OSError as error:
        raise OutputPathError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Check that the folder exists, that it is writable, and that the disk has room.",
        ) from error
    finally:
        for leftover in temporary:
            leftover.unlink(missing_ok=True)


def _publish(temporary: Sequence[Path], path: Path, data_path: Path | None) -> None:
    """Move the complete files to their names, the weights first, so that the model never lacks them."""
    model_tmp, data_tmp = temporary
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary:
        file.chmod(0o666 & ~umask)
    is_new = data_path is not None and not data_path.exists()
    try:
        if data_path is not None:
            data_tmp.replace(data_path)
        model_tmp.replace(path)
    except BaseException:
        if data_path is not None and is_new:
            data_path.unlink(missing_ok=True)
        raise
