"""From any accepted ONNX file to the one float form that every later stage expects.

Order of the work::

    read and check -> name nodes -> inline functions -> infer types -> write out operators
      -> half precision to float32 -> raise the opset -> onnxsim -> infer shapes -> own passes (``passes.PASSES``)
      -> names back to the user's -> write

Graph inputs and outputs keep names, types and order; symbolic dimensions stay. Models whose weights exceed
protobuf's limit go through the native steps without their weights, which are memory-mapped from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxptq.errors import InvalidModelError, OnnxPtqError, OutputPathError, UnsupportedModelError
from onnxptq.graph import proto, weights
from onnxptq.graph.boundary import find_selection
from onnxptq.graph.half import raise_half, uses_half
from onnxptq.graph.links import number_repeated, write_linked
from onnxptq.graph.load import check_model, model_bytes, read_model
from onnxptq.graph.names import name_nodes, user_names
from onnxptq.graph.native import NativeError, run_native
from onnxptq.graph.order import sort_nodes
from onnxptq.graph.origins import find_regions, inner_names, user_nodes
from onnxptq.graph.passes import PASSES
from onnxptq.graph.save import SHARED_DATA_BYTES, save_graph
from onnxptq.graph.sharing import share_again, shared_reads
from onnxptq.graph.surgeon import import_graph
from onnxptq.listing import listed
from onnxptq.types import CanonicalModel, InputSpec, Progress, Skip, started

FORM = 13
"""Version of the canonical form: part of the fingerprint, raised when results change."""

LARGE_MODEL_BYTES = 1_500_000_000
"""Models with more weights than this take the road without weights; protobuf's own limit is 2 GiB."""

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FOLD_LIMIT = "64MB"
# Steps of onnxsim that are left out: our own passes do them exactly and keep the user's names (batch norm),
# they hide the linear layers behind Reshape nodes or within operators of com.microsoft, merge weights that are
# quantized separately, or write the body of a Loop once per iteration, each with weights of its own. Constant
# conditions of If are still decided.
_SKIPPED_OPTIMIZERS = (
    "eliminate_duplicate_initializer",
    "eliminate_loop_with_const_trip_count",
    "fuse_attention",
    "fuse_bn_into_conv",
    "fuse_gqa",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_rope",
)
_BEFORE = "before.onnx"
_HASH_CHUNK = 1 << 22
_NUMPY_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.BOOL,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.UINT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
    }
)


InferTypes = Callable[[onnx.ModelProto, Sequence[str]], Sequence[onnx.ValueInfoProto]]
"""Types of named tensors of a model whose operators the onnx package need not know."""


@dataclass(slots=True)
class _Draft:
    """What is known about a model while it is being prepared."""

    source: Path
    model: onnx.ModelProto
    infer_types: InferTypes | None
    notes: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


def canonicalize(
    path: Path,
    work_dir: Path,
    *,
    opset: int | None = None,
    min_opset: int = 13,
    simplify: bool = True,
    expanded: Sequence[str] = (),
    infer_types: InferTypes | None = None,
    progress: Progress | None = None,
) -> CanonicalModel:
    """Read ``path`` and write its canonical float form to ``work_dir/canonical.onnx``.

    Args:
        path: the user's model.
        work_dir: an existing folder for the result.
        opset: the opset of the result, if it is to be newer than the model's own.
        min_opset: raise the opset to this where the model's own is older and ``opset`` is not given.
        simplify: whether to run onnxsim.
        expanded: ONNX operators to write out by their definitions, so that what is inside can be quantized.
        infer_types: asked for what the onnx package cannot infer behind operators of other domains.
        progress: told about each step.

    Raises:
        UsageError, InvalidModelError, UnsupportedModelError, AlreadyQuantizedError: as ``load.load_model``; also
            where the opset cannot be raised or an input is no tensor.
        OutputPathError: ``work_dir`` cannot be written.
    """
    tick = started(progress, "Reading the model", 5)
    model = read_model(path)
    is_reordered = sort_nodes(model)
    contents = _checked_hash(model, path, is_changed=is_reordered)
    tick()
    source_bytes = model_bytes(model, path)
    # Of no effect on a model without such nodes: its form stays the same for all targets.
    held = sorted(set(expanded) & _operators(model))
    fingerprint = _fingerprint(contents, (opset, min_opset, simplify, *held))
    tick()
    draft = _Draft(source=path, model=model, infer_types=infer_types)
    if is_reordered:
        draft.notes.append("Nodes stood before others that they read: they were sorted.")
    renamed_source = _rename_repeated(draft, work_dir)
    _drop_initializer_inputs(model)
    _require_numpy_ends(model, path)
    name_nodes(model.graph)
    half_bytes = weights.half_bytes(model)
    reference = weights.structure_only(model)
    canonical = work_dir / "canonical.onnx"
    model_metadata = proto.metadata(model.metadata_props)
    with _scratch(work_dir) as scratch:
        graph = _prepare(draft, scratch, opset, min_opset, simplify, expanded)
        tick()
        _run_passes(graph, draft)
        outputs = tuple(tensor.name for tensor in graph.outputs)
        selected, boundary = _expose_boundary(graph, draft)
        node_metadata = _node_metadata(reference, graph)
        save_graph(
            graph,
            canonical,
            model_metadata=model_metadata,
            node_metadata=node_metadata,
            inline_bytes=SHARED_DATA_BYTES,
        )
    tick()
    # Read back, so that memory maps point at the canonical file and the graph is what later stages see.
    graph = import_graph(onnx.load(str(canonical), load_external_data=False), work_dir)
    tick()
    names = user_names(reference, graph, draft.renamed)
    regions = find_regions(reference, graph, names)
    return CanonicalModel(
        path=canonical,
        graph=graph,
        source=path,
        source_bytes=source_bytes,
        half_bytes=half_bytes,
        source_sha256=contents,
        selected=selected,
        boundary=boundary,
        fingerprint=fingerprint,
        opset=graph.opset,
        inputs=tuple(_input_spec(tensor) for tensor in graph.inputs),
        outputs=outputs,
        user_names={**inner_names(regions, names), **names},
        node_metadata=node_metadata,
        model_metadata=model_metadata,
        skips=_control_flow_skips(graph),
        notes=tuple(draft.notes),
        user_nodes=user_nodes(reference, graph, regions),
        renamed_source=renamed_source,
    )


def _checked_hash(model: onnx.ModelProto, path: Path, *, is_changed: bool) -> str:
    """The hash of the file and its external data, once the checker has found nothing wrong."""
    with ThreadPoolExecutor(1) as pool:
        # The checker has a process of its own, which takes as long as the hash of the file.
        verdict = pool.submit(check_model, model, path, is_changed=is_changed)
        contents = _sha256(model, path)
        verdict.result()
    return contents


@contextlib.contextmanager
def _scratch(work_dir: Path) -> Iterator[Path]:
    """A folder for intermediate files inside ``work_dir``, removed at the end whatever happens."""
    try:
        with tempfile.TemporaryDirectory(dir=work_dir, prefix=".prepare-") as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputPathError(
            f"{work_dir} cannot take the intermediate files: {error.strerror or error}.",
            "Check that the folder exists, that it is writable, and that the disk has room.",
        ) from error


def _operators(model: onnx.ModelProto) -> set[str]:
    """Types of the nodes of the main graph and of functions."""
    return {node.op_type for holder in (model.graph, *model.functions) for node in holder.node}


def _fingerprint(contents: str, options: tuple[Any, ...]) -> str:
    """SHA-256 of the model's contents, the canonical form's version and the options."""
    versions = tuple(importlib.metadata.version(name) for name in ("onnx", "onnxsim", "onnx-graphsurgeon"))
    return hashlib.sha256(repr((FORM, versions, options, contents)).encode()).hexdigest()


def _sha256(model: onnx.ModelProto, path: Path) -> str:
    """SHA-256 of the model file, with the external files that it uses behind it in the order of their names."""
    digest = hashlib.sha256()
    locations = {
        proto.external_ref(tensor).location
        for tensor in proto.walk_tensors(model)
        if proto.is_external(tensor)
    }
    for file in (path, *(path.parent / location for location in sorted(locations))):
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _rename_repeated(draft: _Draft, work_dir: Path) -> Path | None:
    """Give nodes of one graph names of their own, which onnxruntime asks for and ONNX does not.

    Returns:
        A copy of the user's file with these names; None where none was needed.
    """
    note = number_repeated(draft.model)
    if note is None:
        return None
    draft.notes.append(note)
    # A folder of its own: external data may be called as any other file of the work folder.
    return write_linked(draft.model, draft.source, work_dir / "renamed_source")


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Make initializers constant that are also inputs, which lets callers override them."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    kept = [entry for entry in model.graph.input if entry.name not in initializers]
    if len(kept) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)


def _prepare(
    draft: _Draft,
    scratch: Path,
    opset: int | None,
    min_opset: int,
    simplify: bool,
    expanded: Sequence[str],
) -> gs.Graph:
    """Every native step; returns the graph with its weights."""
    folder = draft.source.parent
    model = draft.model
    has_half = uses_half(model)
    is_large = weights.total_weight_bytes(model, as_float=has_half) > LARGE_MODEL_BYTES
    detached: Mapping[str, TensorProto] = {}
    if is_large:
        detached = weights.detach(model, folder)
    else:
        weights.load_inline(model, folder)
    if model.functions:
        _native(draft, scratch, ["read", "inline"], {})
        name_nodes(draft.model.graph)
    draft.model.ir_version = max(draft.model.ir_version, 8)
    # Conversion and expansion ask for ranks and types, and what comes out of them has new tensors.
    _complete_types(draft, scratch)
    _expand(draft, scratch, expanded)
    if has_half:
        weights.declare_float(detached, draft.model)
        draft.renamed.update(raise_half(draft.model))
        draft.notes.append(
            "Half-precision compute was raised to float32; graph inputs and outputs keep their types."
        )
    own = proto.default_opset(draft.model) or 0
    wanted = max(own, opset if opset is not None else min_opset)
    if simplify and is_large:
        draft.notes.append("onnxsim was skipped: the model is larger than protobuf's limit.")
    convert = ["convert"] if wanted > own else []
    _clean(draft, scratch, convert, {"opset": wanted}, simplify=simplify and not is_large)
    _complete_types(draft, scratch)
    if convert:
        draft.notes.append(f"The operator set was raised from {own} to {wanted}.")
    elif opset is not None and opset < own:
        draft.notes.append(f"The operator set stays {own}: it is only ever raised, and {opset} is older.")
    name_nodes(draft.model.graph)
    _require_plain_attributes(draft.model, draft.source)
    graph = import_graph(draft.model, scratch)
    weights.attach(graph, detached, folder, scratch)
    _require_float32_weights(graph, draft.source)
    return graph


def _complete_types(draft: _Draft, scratch: Path) -> None:
    """Add the types of what lies behind operators of other domains, where they can be had."""
    nodes = draft.model.graph.node
    if draft.infer_types is None or all(node.domain in proto.ONNX_DOMAINS for node in nodes):
        return
    _native(draft, scratch, ["read", "infer"], {})
    untyped = _untyped(draft.model)
    if not untyped:
        return
    try:
        found = draft.infer_types(draft.model, untyped)
    except OnnxPtqError as error:
        note = f"The types of tensors from {untyped[0]!r} on are unknown: {error.message}"
        if note not in draft.notes:
            draft.notes.append(note)
        return
    names = {entry.name for entry in found}
    kept = [entry for entry in draft.model.graph.value_info if entry.name not in names]
    del draft.model.graph.value_info[:]
    draft.model.graph.value_info.extend([*kept, *found])
    _native(draft, scratch, ["read", "infer"], {})


def _untyped(model: onnx.ModelProto) -> list[str]:
    """What nodes of the main graph write that has no type, in the order of the file."""
    graph = model.graph
    typed = {entry.name for entry in (*graph.value_info, *graph.output) if _has_type(entry.type)}
    return [name for node in graph.node for name in node.output if name and name not in typed]


def _has_type(kind: onnx.TypeProto) -> bool:
    what = kind.WhichOneof("value")
    return what is not None and (what != "tensor_type" or kind.tensor_type.elem_type != 0)


def _expand(draft: _Draft, scratch: Path, operators: Sequence[str]) -> None:
    """Write out ``operators`` of the main graph; where that fails they stay."""
    count = sum(node.op_type in operators and not node.domain for node in draft.model.graph.node)
    if not count:
        return
    kinds = " or ".join(operators)
    try:
        _run(draft, scratch, ["read", "infer", "expand"], {"expanded": list(operators)})
    except NativeError as failure:
        draft.notes.append(f"{kinds} nodes could not be written out and stay in float: {failure.reason}")
        return
    name_nodes(draft.model.graph)
    draft.notes.append(f"{count} {kinds} nodes were written out as products.")


def _clean(
    draft: _Draft, scratch: Path, convert: list[str], options: dict[str, Any], *, simplify: bool
) -> None:
    """Raise the opset, run onnxsim, infer shapes; without onnxsim if that fails."""
    options |= {"skipped_optimizers": _SKIPPED_OPTIMIZERS, "fold_limit": _FOLD_LIMIT}
    # With shapes known, conversion keeps operators that it would otherwise wrap in Reshape nodes.
    convert = ["infer", *convert] if convert else []
    if simplify:
        known = _domains(draft.model)
        try:
            _run(draft, scratch, ["read", *convert, "simplify", "infer"], options)
        except NativeError as failure:
            if failure.step in ("simplify", "write"):
                draft.notes.append(f"onnxsim could not clean this model and was skipped: {failure.reason}")
        else:
            added = sorted(_domains(draft.model) - known)
            if not added:
                return
            # What it merges into them could not be quantized, nor run elsewhere.
            draft.notes.append(f"onnxsim wrote operators of {listed(added)} and was skipped.")
            draft.model = onnx.load(str(scratch / _BEFORE), load_external_data=False)
    _native(draft, scratch, ["read", *convert, "infer"], options)


def _domains(model: onnx.ModelProto) -> set[str]:
    """Domains of operators that are not ONNX's own."""
    return {node.domain for node in proto.walk_nodes(model)}.difference(proto.ONNX_DOMAINS)


def _native(draft: _Draft, scratch: Path, steps: list[str], options: Mapping[str, Any]) -> None:
    try:
        _run(draft, scratch, steps, options)
    except NativeError as failure:
        if failure.step == "convert":
            raise UnsupportedModelError(
                f"{draft.source}: the opset cannot be raised to {options['opset']}: {failure.reason}",
                "Export the model with that opset, or ask for an older one.",
            ) from failure
        raise InvalidModelError(f"{draft.source}: {failure.step} failed: {failure.reason}") from failure


def _run(draft: _Draft, scratch: Path, steps: list[str], options: Mapping[str, Any]) -> None:
    before, after = scratch / _BEFORE, scratch / "after.onnx"
    before.write_bytes(draft.model.SerializeToString())
    run_native(steps, draft.source, input_path=before, output=after, options=options)
    draft.model = onnx.load(str(after), load_external_data=False)


def _require_plain_attributes(model: onnx.ModelProto, path: Path) -> None:
    """Refuse attributes that onnx-graphsurgeon would drop in silence."""
    dropped = {
        onnx.AttributeProto.GRAPHS,
        onnx.AttributeProto.TENSORS,
        onnx.AttributeProto.SPARSE_TENSOR,
        onnx.AttributeProto.SPARSE_TENSORS,
        onnx.AttributeProto.TYPE_PROTO,
        onnx.AttributeProto.TYPE_PROTOS,
    }
    for node in proto.walk_nodes(model):
        for attribute in node.attribute:
            if attribute.type in dropped:
                raise UnsupportedModelError(
                    f"{path}: attribute {attribute.name!r} of node {node.name!r} ({node.op_type}) has a type "
                    "that cannot be carried through."
                )


def _require_float32_weights(graph: gs.Graph, path: Path) -> None:
    for node in graph.nodes:
        for tensor in node.inputs if node.op in _WEIGHTED else ():
            if isinstance(tensor, gs.Constant) and tensor.dtype == np.float64:
                raise UnsupportedModelError(
                    f"{path}: weight {tensor.name!r} of node {node.name!r} is double precision.",
                    "Export the model in float32 or half precision.",
                )


def _run_passes(graph: gs.Graph, draft: _Draft) -> None:
    for rewrite in PASSES:
        shared = shared_reads(graph)
        count = rewrite.run(graph)
        share_again(shared)
        if count:
            draft.notes.append(rewrite.note(count))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _node_metadata(reference: onnx.ModelProto, graph: gs.Graph) -> dict[str, dict[str, str]]:
    present = {node.name for node in graph.nodes}
    return {
        node.name: proto.metadata(node.metadata_props)
        for node in reference.graph.node
        if node.metadata_props and node.name in present
    }


def _require_numpy_ends(model: onnx.ModelProto, path: Path) -> None:
    """Refuse inputs and outputs that cannot be fed from, or read into, numpy arrays."""
    for what, entries in (("input", model.graph.input), ("output", model.graph.output)):
        for entry in entries:
            kind = entry.type.tensor_type.elem_type if entry.type.HasField("tensor_type") else 0
            if kind not in _NUMPY_TYPES:
                raise UnsupportedModelError(
                    f"{path}: {what} {entry.name!r} is no tensor of a type that numpy has.",
                    "Only numeric and boolean tensors will do: no sequences, strings, bfloat16 or float8.",
                )


def _input_spec(tensor: gs.Variable) -> InputSpec:
    shape = tuple(dim if dim not in ("", None) else None for dim in (tensor.shape or ()))
    return InputSpec(name=tensor.name, dtype=np.dtype(tensor.dtype), shape=shape)


def _expose_boundary(graph: gs.Graph, draft: _Draft) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Make outputs of what enters the part behind a selection; the outputs behind it, and the new ones."""
    selection = find_selection(graph)
    if not selection.outputs:
        return (), ()
    graph.outputs += selection.boundary
    boundary = tuple(tensor.name for tensor in selection.boundary)
    others = [t.name for t in graph.outputs if t.name not in selection.outputs]
    if others:
        unseen = (
            f" Noise of {len(selection.layers)} layers behind them is not seen so."
            if selection.layers
            else ""
        )
        draft.notes.append(
            f"Alternatives are compared by {listed(others)} in the place of {listed(selection.outputs)}, "
            f"which hold as many rows as are found.{unseen}"
        )
    return selection.outputs, boundary


def _control_flow_skips(graph: gs.Graph) -> tuple[Skip, ...]:
    return tuple(
        Skip(site=node.name, reason=f"The bodies of {node.op} nodes stay in float.")
        for node in graph.nodes
        if node.op in _CONTROL_FLOW
    )
