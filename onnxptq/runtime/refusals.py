"""Why onnxruntime does not load a model: its reason, the node, and what the user can do."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from onnxptq.errors import InvalidModelError
from onnxptq.graph import proto

_LENGTH = 400
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?(Fatal error: )?")
# The one refusal that names no node but an operator: "my.ops:Foo(-1) is not a registered function/op".
_UNREGISTERED = re.compile(r"(?P<domain>\S*):(?P<op>\w+)\(-?\d+\) is not a registered function/op")
_REMEDIES = (
    (
        ("is not a registered function/op", "No Op registered for", "No opset import for domain"),
        "onnxptq runs models in onnxruntime without libraries of custom operators: export the model with operators "
        "that the installed onnxruntime has, or upgrade onnxruntime.",
    ),
    (
        ("Could not find an implementation for",),
        "onnxruntime knows this operator, but this provider has no kernel for it, or none for these element types: "
        "choose another --provider, or export the model in float32.",
    ),
    (("two nodes with same node name",), "Give every node a name of its own, or none."),
)
_ANY = "onnxptq needs models that onnxruntime runs: load this one with onnxruntime alone, and fix the export."


def refusal(model: Path | bytes, error: Exception) -> InvalidModelError:
    """What is raised where onnxruntime answers with ``error`` when it is to load ``model``."""
    reason = _PREFIX.sub("", one_line(error)).rstrip(".")
    node = _unregistered_node(model, reason)
    where = f" (node '{node}')" if node else ""
    remedy = next((text for marks, text in _REMEDIES if any(mark in reason for mark in marks)), _ANY)
    return InvalidModelError(f"onnxruntime cannot load {label(model)}: {reason}{where}.", remedy)


def label(model: Path | bytes) -> str:
    """What a model is called in messages."""
    return str(model) if isinstance(model, Path) else "the model"


def one_line(error: Exception) -> str:
    """The message of ``error``, shortened."""
    return " ".join(str(error).split())[:_LENGTH]


def _unregistered_node(model: Path | bytes, reason: str) -> str | None:
    found = _UNREGISTERED.search(reason)
    if found is None or not isinstance(model, Path):
        return None
    sought = (found["domain"], found["op"])
    nodes = proto.walk_nodes(onnx.load(str(model), load_external_data=False))
    return next((n.name or n.output[0] for n in nodes if (n.domain, n.op_type) == sought), None)
