"""Small helpers around onnx-graphsurgeon shared by loading, saving and the passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxptq.graph import proto
from onnxptq.types import Array


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
    taken = graph.tensors().keys()
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
