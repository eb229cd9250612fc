"""Post-training quantization for ONNX: a float model in, a low-bit QDQ model out, with proof that it is correct.

    import onnxptq
    result = onnxptq.quantize("model.onnx", calibration="photos/")

Importing this package loads neither torch nor onnxruntime.
"""

from __future__ import annotations

import sys
from types import ModuleType

from onnxptq.errors import OnnxPtqError

# The module typing would take longer than all of this, before the command line can mind Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from onnxptq.calibrate.feeds import ImagePreprocess
    from onnxptq.comparison import validate
    from onnxptq.inspection import inspect
    from onnxptq.pipeline import Result, quantize
    from onnxptq.recipe import Recipe
    from onnxptq.surveying import sensitivity
    from onnxptq.version import __version__

_HOMES = {
    "ImagePreprocess": "onnxptq.calibrate.feeds",
    "Recipe": "onnxptq.recipe",
    "Result": "onnxptq.pipeline",
    "__version__": "onnxptq.version",
    "inspect": "onnxptq.inspection",
    "quantize": "onnxptq.pipeline",
    "sensitivity": "onnxptq.surveying",
    "validate": "onnxptq.comparison",
}

__all__ = [
    "ImagePreprocess",
    "OnnxPtqError",
    "Recipe",
    "Result",
    "__version__",
    "inspect",
    "quantize",
    "sensitivity",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxptq' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps ``onnxptq.validate`` the function: importing the subpackage of that name would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
