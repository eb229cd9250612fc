"""Whether a written file says what the plan and the solution say, and nothing else.

The file is read back without trusting the writer: quantizers are found by following the edges that the plan
names, their parameters are compared bit for bit, and what remains when they are taken away must be the
canonical graph, node by node and initializer by initializer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.errors import OutputCheckError
from onnxptq.quantizers.affine import quantize, range_of
from onnxptq.types import (
    GRAPH_OUTPUT,
    Array,
    CanonicalModel,
    PerAxis,
    PerTensor,
    QParams,
    Quantizer,
    QuantPlan,
    Solution,
)
from onnxptq.validate.float_graph import check_float_graph
from onnxptq.validate.reading import Pair, Parameters, WrittenModel

_BLOCK_ELEMENTS = 1 << 22


def check_structure(path: Path, model: CanonicalModel, plan: QuantPlan, solution: Solution) -> None:
    """Check the file at ``path`` against what it was written from.

    Raises:
        OutputCheckError: the ONNX checker refuses the file; or its opset, inputs, outputs, float nodes, other
            initializers, quantizers or their parameters differ from ``model``, ``plan`` and ``solution``.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference raise unrelated types
        raise OutputCheckError(
            f"The ONNX checker refuses {path}: {' '.join(str(error).split())[:400]}"
        ) from error
    written = WrittenModel(path)
    located = locate(written, model, plan)
    constants = constants_of(model, solution, [q.tensor for q in plan.quantizers if q.role != "activation"])
    for quantizer in plan.quantizers:
        pair = located[quantizer.quantizer_id]
        problem = _difference(written, quantizer, pair, solution, constants.get(quantizer.tensor))
        if problem:
            raise OutputCheckError(f"{path}: {label(quantizer, model)}: {problem}.")
    check_float_graph(written, model, plan, solution, located)


def label(quantizer: Quantizer, model: CanonicalModel) -> str:
    """How errors name a quantizer: by the user's tensor and the first edge that reads it."""
    readers = ", ".join(site.consumer for site in quantizer.sites[:3])
    return f"the quantizer of {quantizer.role} '{model.user_name(quantizer.tensor)}' (read by {readers})"


def float_names(model: CanonicalModel) -> frozenset[str]:
    """Names of the nodes and tensors of the float graph."""
    return frozenset({node.name for node in model.graph.nodes} | set(model.graph.tensors()))


def locate(written: WrittenModel, model: CanonicalModel, plan: QuantPlan) -> Mapping[str, Pair]:
    """The pair of every quantizer of ``plan``, by quantizer id.

    Raises:
        OutputCheckError: an edge of the plan reads no quantizer, or not the one that the plan's other edges
            read; two quantizers share a pair; or the file holds a pair that the plan does not.
    """
    pairs = written.pairs(float_names(model))
    found: dict[str, Pair] = {}
    owner: dict[str, str] = {}
    for quantizer in plan.quantizers:
        tensors = {_read_by(written, quantizer, i) for i in range(len(quantizer.sites))}
        name = next(iter(tensors))
        if len(tensors) != 1 or name is None or name not in pairs:
            raise OutputCheckError(
                f"{written.path}: {label(quantizer, model)} is absent on some or all of its edges."
            )
        if name in owner:
            raise OutputCheckError(
                f"{written.path}: {label(quantizer, model)} shares its nodes with '{owner[name]}'."
            )
        owner[name] = quantizer.quantizer_id
        found[quantizer.quantizer_id] = pairs[name]
    for name in pairs:
        if name not in owner:
            raise OutputCheckError(f"{written.path}: the quantizer that writes '{name}' is not in the plan.")
    return found


def _read_by(written: WrittenModel, quantizer: Quantizer, i: int) -> str | None:
    """What the file has on edge ``i`` of the quantizer."""
    site = quantizer.sites[i]
    if site.consumer == GRAPH_OUTPUT:
        return site.tensor
    node = written.nodes.get(site.consumer)
    return None if node is None or site.input_index >= len(node.input) else str(node.input[site.input_index])


def _difference(
    written: WrittenModel, quantizer: Quantizer, pair: Pair, solution: Solution, constant: Array | None
) -> str | None:
    """What differs between a pair of the file and its quantizer (of a ``constant``, if given), or None."""
    qparams = solution.qparams[quantizer.quantizer_id]
    for kind, parameters in (("QuantizeLinear", pair.quantize), ("DequantizeLinear", pair.dequantize)):
        if parameters is not None:
            problem = _parameter_difference(parameters, qparams)
            if problem:
                return f"{problem} of its {kind} differs from the solution"
    if constant is not None:
        return _constant_difference(written, pair, qparams, constant)
    if pair.quantize is None:
        return "it is a constant in the file"
    return _clip_difference(pair, qparams)


def _parameter_difference(found: Parameters, wanted: QParams) -> str | None:
    if found.storage != wanted.qtype.storage:
        return "the integer type"
    if not same_bits(found.scale, np.asarray(wanted.scale, np.float32)):
        return "the scale"
    if not same_bits(found.zero_point, np.asarray(wanted.zero_point, np.int32)):
        return "the zero point"
    return None if found.granularity == wanted.granularity else "the axis or group"


def _clip_difference(pair: Pair, qparams: QParams) -> str | None:
    if not qparams.qtype.is_narrow:
        return None if pair.clip is None else "it has a Clip that its grid does not need"
    if pair.clip is None:
        return "its grid is narrower than its storage, and the Clip is missing"
    is_same = all(same_bits(f, np.asarray(w)) for f, w in zip(pair.clip, range_of(qparams), strict=True))
    return None if is_same else "the bounds of its Clip are not the ends of its grid"


def _constant_difference(written: WrittenModel, pair: Pair, qparams: QParams, value: Array) -> str | None:
    if pair.integers is None:
        return "it is no constant in the file"
    found = written.value(pair.integers)
    if found.shape != value.shape:
        return f"its integers have shape {list(found.shape)} instead of {list(value.shape)}"
    for block, params in row_blocks(value, qparams):
        different = found[block] != quantize(np.asarray(value[block], np.float32), params)
        if different.any():
            return f"{int(different.sum())} of its integers (or more) differ from the solution"
    return None


def constants_of(model: CanonicalModel, solution: Solution, tensors: Iterable[str]) -> Mapping[str, Array]:
    """The float values that constant quantizers encode: the solution's where it has them."""
    known = model.graph.tensors()

    def value(tensor: str) -> Array:
        if tensor in solution.weights:
            return np.asarray(solution.weights[tensor])
        constant = known[tensor]
        assert isinstance(constant, gs.Constant)
        return np.asarray(constant.values)

    return {tensor: value(tensor) for tensor in tensors}


def row_blocks(value: Array, qparams: QParams) -> Iterator[tuple[slice | tuple[()], QParams]]:
    """Slices along axis 0 that keep temporaries small, each with the parameters that belong to it."""
    sliceable = isinstance(qparams.granularity, PerTensor | PerAxis)
    if value.ndim == 0 or not sliceable or value.size <= _BLOCK_ELEMENTS:
        yield (), qparams
        return
    rows = max(1, _BLOCK_ELEMENTS * value.shape[0] // value.size)
    splits_scale = isinstance(qparams.granularity, PerAxis) and qparams.granularity.axis % value.ndim == 0
    for start in range(0, value.shape[0], rows):
        block = slice(start, start + rows)
        if splits_scale:
            yield (
                block,
                QParams(
                    scale=qparams.scale[block],
                    zero_point=qparams.zero_point[block],
                    qtype=qparams.qtype,
                    granularity=qparams.granularity,
                ),
            )
        else:
            yield block, qparams


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same type, shape and bytes."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and (a is b or np.array_equal(_bytes_of(a), _bytes_of(b)))
    )


def _bytes_of(a: Array) -> Array:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)
