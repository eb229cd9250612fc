"""ONNX sub-graphs as differentiable torch modules."""

from onnxptq.lowering import ops as _ops  # noqa: F401 - importing it fills the registry
from onnxptq.lowering.foreign import foreign_nodes, require_supported, unsupported_nodes
from onnxptq.lowering.module import LoweredModule, lower
from onnxptq.lowering.program import needed_nodes
from onnxptq.lowering.registry import (
    MIN_OPSET,
    REVIEWED_OPSET,
    Entry,
    Unsupported,
    check_supported,
    entries,
    lookup,
    register,
)

__all__ = [
    "MIN_OPSET",
    "REVIEWED_OPSET",
    "Entry",
    "LoweredModule",
    "Unsupported",
    "check_supported",
    "entries",
    "foreign_nodes",
    "lookup",
    "lower",
    "needed_nodes",
    "register",
    "require_supported",
    "unsupported_nodes",
]
