"""Small helpers around onnx-graphsurgeon shared by loading, saving and the passes."""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxptq.errors import OutputPathError
from onnxptq.graph import proto
from onnxptq.types import Array, CanonicalModel


@contextlib.contextmanager
def quiet_surgeon() -> Iterator[None]:
    """Silence graphsurgeon's logger: it prints to the terminal about types that are handled here."""
    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = before


def import_graph(model: onnx.ModelProto, folder: Path) -> gs.Graph:
    """A gs.Graph of ``model`` whose external constants are memory maps of files in ``folder``."""
    with quiet_surgeon():
        graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            source = tensor._values.tensor
            if proto.is_external(source):
                tensor._values = proto.map_external(source, folder)
                tensor.data_location = None
    return graph


def new_constant(graph: gs.Graph, name: str, values: Array) -> gs.Constant:
    """A constant under ``name``, or under ``name`` with the first free number if that is taken."""
    return gs.Constant(unique_tensor_name(graph, name), np.asarray(values))


def unique_tensor_name(graph: gs.Graph, name: str) -> str:
    """``name``, or ``name_1``, ``name_2``... if tensors of the graph have it."""
    return free_name(name, set(graph.tensors()))


def free_name(name: str, taken: set[str]) -> str:
    """``name``, or ``name_1``, ``name_2``... if it is ``taken``; then it is."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def is_graph_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the caller sees ``tensor``."""
    return any(output is tensor for output in graph.outputs)


def sole_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The one node that reads ``tensor``, once, if it has no other reader and is no graph output."""
    if len(tensor.outputs) != 1 or is_graph_output(graph, tensor):
        return None
    node: gs.Node = tensor.outputs[0]
    return node if sum(read is tensor for read in node.inputs) == 1 else None


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that writes ``tensor``; None for graph inputs, constants and tensors of an outer graph."""
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def is_op(node: gs.Node | None, *ops: str) -> bool:
    """Whether ``node`` is one of the default domain's ``ops``."""
    return node is not None and node.op in ops and (node.domain or "") in proto.ONNX_DOMAINS


def live_nodes(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """The nodes of ``ops``, while the caller edits the graph: nodes that it has dropped are left out."""
    for node in list(graph.nodes):
        if is_op(node, *ops) and node.outputs:
            yield node


def float_constant(tensor: gs.Tensor) -> Array | None:
    """The value of a float32 constant, or None for anything else."""
    if not isinstance(tensor, gs.Constant) or tensor.dtype != np.float32:
        return None
    value: Array = tensor.values
    return value


def scalar_constant(tensor: gs.Tensor) -> float | None:
    """The value of a constant with a single numeric element, or None for anything else."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    value = np.asarray(tensor.values).reshape(-1)[0]
    return float(value) if np.issubdtype(value.dtype, np.number) else None


def int_constants(tensor: gs.Tensor) -> list[int] | None:
    """The values of an integer constant as a flat list, or None for anything else."""
    if not isinstance(tensor, gs.Constant) or not np.issubdtype(np.dtype(tensor.dtype), np.integer):
        return None
    return [int(v) for v in np.asarray(tensor.values).reshape(-1)]


def axes_of(node: gs.Node) -> list[int] | None:
    """The axes of a node that has them as an attribute (older opsets) or as input 1; None if neither."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    return int_constants(node.inputs[1]) if len(node.inputs) > 1 else None


def constant_node_value(node: gs.Node) -> gs.Constant | None:
    """The value of a Constant node, in whichever attribute it is; None for strings and sparse tensors."""
    if isinstance(value := node.attrs.get("value"), gs.Constant):
        return value
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in node.attrs:
            return gs.Constant(node.outputs[0].name, np.asarray(node.attrs[key], dtype=dtype))
    return None


def set_constant(graph: gs.Graph, node: gs.Node, index: int, values: Array) -> None:
    """Make input ``index`` of ``node`` the constant ``values``; other readers keep the old one.

    A constant that only this input reads keeps its name. A last input that is absent is a bias of the node.
    """
    if index == len(node.inputs):
        node.inputs.append(new_constant(graph, f"{node.name}/bias", values))
        return
    old = node.inputs[index]
    if isinstance(old, gs.Constant) and len(old.outputs) == 1 and not is_graph_output(graph, old):
        old.values = values
        old.data_location = None
    else:
        node.inputs[index] = new_constant(graph, old.name or f"{node.name}/bias", values)


def bypass(graph: gs.Graph, node: gs.Node) -> bool:
    """Remove a node that hands input 0 on as output 0; False if the names of the graph's ends forbid it."""
    source, target = node.inputs[0], node.outputs[0]
    if is_graph_output(graph, target):
        maker = producer(source)
        if maker is None or is_graph_output(graph, source):
            return False
        position = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
        node.outputs.clear()
        node.inputs.clear()
        maker.outputs[position] = target
        redirect(source, target)
    else:
        node.outputs.clear()
        node.inputs.clear()
        redirect(target, source)
    graph.nodes[:] = [kept for kept in graph.nodes if kept is not node]
    return True


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        for i, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[i] = new


def replace_nodes(graph: gs.Graph, dead: Iterable[gs.Node], tail: gs.Node, node: gs.Node) -> None:
    """Put ``node`` in the place of ``tail``, writing what it wrote, and drop ``dead`` and ``tail``.

    The dead nodes must be read by nothing but each other and ``tail``.
    """
    target = tail.outputs[0]
    tail.outputs.clear()
    node.outputs = [target]
    position = next(i for i, candidate in enumerate(graph.nodes) if candidate is tail)
    graph.nodes[position] = node
    gone = {id(tail): tail} | {id(other): other for other in dead}
    for other in gone.values():
        other.inputs.clear()
        other.outputs.clear()
    graph.nodes[:] = [kept for kept in graph.nodes if id(kept) not in gone]


def drop_unread(graph: gs.Graph, tensors: Iterable[gs.Tensor]) -> None:
    """Drop the nodes that write ``tensors`` where nothing reads what they write, and so on towards the inputs."""
    waiting = list(tensors)
    while waiting:
        node = producer(waiting.pop())
        if node is None or any(t.outputs or is_graph_output(graph, t) for t in node.outputs):
            continue
        waiting += node.inputs
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes[:] = [kept for kept in graph.nodes if kept is not node]


def _sent(model: CanonicalModel) -> tuple[Any, ...]:
    """How a model goes to another process: without its graph, which is read there."""
    facts = {entry.name: getattr(model, entry.name) for entry in fields(model) if entry.name != "graph"}
    return _received, (facts,)


def _received(facts: dict[str, Any]) -> CanonicalModel:
    path = facts["path"]
    try:
        read = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise OutputPathError(
            f"A process of this run cannot read '{path}', which another has written: {error.strerror}.",
            "Choose a --work-dir that all machines share.",
        ) from error
    return CanonicalModel(graph=import_graph(read, path.parent), **facts)


copyreg.pickle(CanonicalModel, _sent)
