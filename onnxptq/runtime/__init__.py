"""Sessions of onnxruntime: the only package that imports it."""

from onnxptq.runtime.difference import SAME_FUNCTION, compare_forms, difference, signal_and_noise
from onnxptq.runtime.inference import element_types, infer_types
from onnxptq.runtime.session import (
    Provider,
    RunError,
    Session,
    count_kernels,
    installed_runtimes,
    require_loadable,
    require_runtime,
    runtime_version,
)
from onnxptq.runtime.shapes import concrete_shapes, first_sample
from onnxptq.runtime.transient import group_within, open_exposed, open_transient

__all__ = [
    "SAME_FUNCTION",
    "Provider",
    "RunError",
    "Session",
    "compare_forms",
    "concrete_shapes",
    "count_kernels",
    "difference",
    "element_types",
    "first_sample",
    "group_within",
    "infer_types",
    "installed_runtimes",
    "open_exposed",
    "open_transient",
    "require_loadable",
    "require_runtime",
    "runtime_version",
    "signal_and_noise",
]
