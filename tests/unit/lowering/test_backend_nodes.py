"""Every registered operator against the node tests that the onnx package carries.

Each case runs as it is (all inputs fed) and with every input but the first turned into an initializer, which
takes the other path through the builders. A case that is not lowered must stand in DECLINED with its reason.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxptq.lowering import check_supported, entries
from onnxptq.lowering.dtypes import torch_dtype
from onnxptq.lowering.registry import Declined
from tests.unit.lowering.lowering_oracle import assert_same, freeze, graph_of, run_lowered

OPERATORS = sorted({entry.op for entry in entries()})

_ULP = {"float16": 2.0**-9, "bfloat16": 2.0**-6}

DECLINED: Mapping[str, str] = {
    r".*_uint(16|32|64)(_expanded)?|test_bitwise_not_3d": "torch has no arithmetic on wide unsigned integers",
    r"test_batchnorm_.*_training_mode": "statistics of the batch have no place in a trained model",
    r"test_training_dropout.*": "random results",
    r"test_maxpool_with_argmax_.*": "the Indices output",
    r"test_roialign_mode_max": "max mode takes the largest weighted corner, which nobody trains with",
    r"test_not_[234]d": "the cases declare opset 1, which is older than every supported one",
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": (
        "the case divides by the fractional output length; onnxruntime and torch by the whole one"
    ),
}
"""Pattern of the case's name -> why it is not lowered, or not lowered to that result."""


@pytest.fixture(scope="module")
def cases() -> Mapping[str, list[Any]]:
    """Backend node tests by operator; graphs of several nodes under "composed"."""
    from onnx.backend.test.loader import load_model_tests

    found: dict[str, list[Any]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in load_model_tests(kind="node"):
            nodes = case.model.graph.node
            found[nodes[0].op_type if len(nodes) == 1 else "composed"].append(case)
    return found


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _runs(case: Any) -> Iterator[tuple[str, onnx.ModelProto, dict[str, Any], dict[str, Any]]]:
    for inputs, outputs in case.data_sets:
        feed = {i.name: _array(v) for i, v in zip(case.model.graph.input, inputs, strict=True)}
        want = {o.name: _array(v) for o, v in zip(case.model.graph.output, outputs, strict=True)}
        yield "fed", case.model, feed, want
        names = tuple(feed)[1:]
        if names:
            yield "constant", freeze(case.model, feed, names), {n: feed[n] for n in tuple(feed)[:1]}, want


def _foreign_type(case: Any) -> bool:
    """Whether a tensor of the case holds a type that torch cannot compute with."""
    for value in (*case.model.graph.input, *case.model.graph.output):
        try:
            torch_dtype(value.type.tensor_type.elem_type)
        except Declined:
            return True
    return False


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in DECLINED.items() if re.fullmatch(pattern, name)), None)


def _check(case: Any) -> str | None:
    """The failure of one case, or None."""
    for form, model, feed, want in _runs(case):
        try:
            got = run_lowered(model, feed)
            for name, value in want.items():
                # The case's own tolerance, or one unit in the last place of a half type.
                rtol = max(case.rtol, _ULP.get(value.dtype.name, 0.0))
                assert_same(got[name], value, rtol=rtol, atol=case.atol, label=f"{case.name} {name}")
        except Exception as error:
            return f"{case.name} ({form}): {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def test_the_cases_are_there(cases: Mapping[str, list[Any]]) -> None:
    composed = [c for c in cases["composed"] if not check_supported(graph_of(c.model))]
    assert len(composed) > 200
    assert sum(len(cases.get(op, [])) for op in OPERATORS) > 700
    stale = [
        p for p in DECLINED if not any(re.fullmatch(p, c.name) for group in cases.values() for c in group)
    ]
    assert not stale


@pytest.mark.parametrize("op", [*OPERATORS, "composed"])
def test_backend_cases(op: str, cases: Mapping[str, list[Any]]) -> None:
    failures = []
    for case in cases.get(op, []):
        refused = check_supported(graph_of(case.model))
        if _foreign_type(case) or _reason(case.name) is not None:
            continue
        if refused and op == "composed":
            continue
        failure = f"{case.name}: {refused[0]}" if refused else _check(case)
        if failure:
            failures.append(failure)
    assert not failures, f"{len(failures)} of {len(cases[op])}:\n" + "\n".join(failures)
