"""Other forms of a canonical model: the same function, in part with other constants or nodes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from onnxptq.graph.save import SHARED_DATA_BYTES, save_graph
from onnxptq.graph.surgeon import import_graph
from onnxptq.types import CanonicalModel


def write_form(model: CanonicalModel, graph: gs.Graph, path: Path, difference: str) -> CanonicalModel:
    """``graph`` in place of the model's, written to ``path``.

    Args:
        difference: all that tells the form from ``model``: forms that differ in it get other fingerprints.
    """
    save_graph(
        graph,
        path,
        model_metadata=model.model_metadata,
        node_metadata=model.node_metadata,
        inline_bytes=SHARED_DATA_BYTES,
    )
    written = import_graph(onnx.load(str(path), load_external_data=False), path.parent)
    digest = hashlib.sha256(f"{model.fingerprint} {difference}".encode()).hexdigest()
    return replace(model, path=path, graph=written, fingerprint=digest)
