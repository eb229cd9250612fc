"""Sessions of onnxruntime: the only package that imports it."""

from onnxptq.runtime.session import (
    Provider,
    RunError,
    Session,
    count_kernels,
    installed_runtimes,
    require_runtime,
    runtime_version,
)

__all__ = [
    "Provider",
    "RunError",
    "Session",
    "count_kernels",
    "installed_runtimes",
    "require_runtime",
    "runtime_version",
]
