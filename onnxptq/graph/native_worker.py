"""The native steps of loading a model, run as a script in a process of their own (see ``native.py``).

usage: python -P native_worker.py JOB.json

The job names the steps to run, in order, and the paths. The name of each step is printed before it starts,
so that the parent can say where a crash happened. The result is written to ``result`` of the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx


def check(job: dict[str, Any], model: onnx.ModelProto | None) -> onnx.ModelProto | None:
    """The ONNX checker with type and shape inference, by path so that size does not matter."""
    onnx.checker.check_model(job["source"], full_check=True)
    return model


def read(job: dict[str, Any], _: onnx.ModelProto | None) -> onnx.ModelProto:
    """Read the prepared skeleton or, where weights are small, the whole model."""
    return onnx.load(job["input"], load_external_data=False)


def inline(_: dict[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of the model's own functions by their bodies."""
    import onnx.inliner

    return onnx.inliner.inline_local_functions(model) if model.functions else model


def expand(job: dict[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace ONNX operators by the bodies that their schemas give them."""
    import onnx.inliner

    # Bodies depend on the types of what is read, and initializers have none but their own.
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
    )
    operators = [("", name) for name in job["expanded"]]
    return onnx.inliner.inline_selected_functions(model, operators, inline_schema_functions=True)


def convert(job: dict[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """Raise the default operator set."""
    import onnx.version_converter

    return onnx.version_converter.convert_version(model, job["opset"])


def simplify(job: dict[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop dead or idle nodes with onnxsim."""
    # onnxsim imports them, where they are there, for features that are not used here; each takes longer than onnxsim.
    for name in ("torch", "sympy"):
        sys.modules[name] = None  # type: ignore[assignment]
    import onnxsim

    result: onnx.ModelProto
    result, _ = onnxsim.simplify(
        model,
        skipped_optimizers=job["skipped_optimizers"],
        tensor_size_threshold=job["fold_limit"],
        certify=False,
    )
    return result


def infer(_: dict[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer element types and shapes, symbolic ones too, without carrying the weights through native code."""
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) > _SMALL_BYTES]
    small = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) <= _SMALL_BYTES]
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in large
    )
    skeleton.graph.output.extend(model.graph.output)
    skeleton.graph.initializer.extend(small)
    skeleton.graph.value_info.extend(model.graph.value_info)
    inferred = onnx.shape_inference.infer_shapes(
        skeleton, check_type=False, strict_mode=False, data_prop=True
    )
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    return model


_SMALL_BYTES = 4096

STEPS: dict[str, Callable[[dict[str, Any], Any], onnx.ModelProto | None]] = {
    "check": check,
    "read": read,
    "inline": inline,
    "expand": expand,
    "convert": convert,
    "simplify": simplify,
    "infer": infer,
}


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def main(job_path: Path) -> int:
    """Run the job; 0 and the output file on success, 1 and a reason in the result file on failure."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    _limit_memory(job["memory_mb"])
    model: onnx.ModelProto | None = None
    step, number = "start", None
    try:
        for step in job["steps"]:
            print(step, flush=True)
            model = STEPS[step](job, model)
        if job.get("output"):
            step = "write"
            print(step, flush=True)
            assert model is not None
            onnx.save(model, job["output"])
    except MemoryError:
        reason = "it would need more memory than a model of its size should"
    except Exception as error:
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        number = error.errno if isinstance(error, OSError) else None
    else:
        return 0
    told = {"step": step, "reason": reason[:500], "errno": number}
    Path(job["result"]).write_text(json.dumps(told), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
