"""A constant behind any activation is made up for by whatever layers read it, bit patterns of data aside."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from onnxptq.runtime import SAME_FUNCTION, difference
from onnxptq.shift.run import shift
from tests.unit.equalize.equalize_helpers import Samples, canonical
from tests.unit.small_nets import Net

ACTIVATIONS = st.sampled_from(
    ["Relu", "Gelu", "HardSwish", "Elu", "LeakyRelu", "Sigmoid", "Softplus", "Mish"]
)
READERS = st.lists(st.sampled_from(["linear", "gemm", "transposed", "bare"]), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    op=ACTIVATIONS,
    readers=READERS,
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    offset=st.floats(-3.0, 3.0),
    seed=st.integers(0, 1 << 16),
)
def test_the_function_stays(
    op: str, readers: list[str], rows: int, width: int, offset: float, seed: int
) -> None:
    net = Net(seed=seed)
    act = net.op(op, "act", net.linear("up", "x", 3, width))
    outputs = []
    for i, kind in enumerate(readers):
        name = f"y{i}"
        if kind == "linear":
            outputs.append(net.linear(name, act, width, 4))
            continue
        shape = (4, width) if kind == "transposed" else (width, 4)
        parts = [net.weight(f"{name}.w", *shape), *([] if kind == "bare" else [net.weight(f"{name}.b", 4)])]
        outputs.append(net.op("Gemm", name, act, *parts, transB=int(kind == "transposed")))
    proto = net.proto({"x": [rows, 3]}, outputs)
    rng = np.random.default_rng(seed)
    samples = [{"x": (rng.standard_normal((rows, 3)) + offset).astype(np.float32)} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        source = canonical(proto, Path(folder))
        result, _ = shift(source, Samples(samples[:3]), work_dir=Path(folder), where="behind activations")
        runs = [ReferenceEvaluator(str(m.path)).run(None, samples[3]) for m in (source, result)]
    before, after = (dict(zip(outputs, run, strict=True)) for run in runs)
    assert difference(before, after) <= SAME_FUNCTION
