"""Models over protobuf's 2 GiB limit: loaded, canonicalized and saved in little memory.

The weights are holes in a sparse file, so that the test costs neither disk nor time; the peak memory of the
process that does the work is asserted, with its subprocesses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

LAYERS, WIDTH = 9, 8192
LAYER_BYTES = WIDTH * WIDTH * 4
PEAK_RSS_MB = 1500

WORK = """
import json, resource, sys, time
from pathlib import Path
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.load import load_model
from onnxptq.graph.save import save_graph, exposed_copy

source, work, out = map(Path, sys.argv[1:])
load_model(source)
model = canonicalize(source, work)
written = save_graph(model.graph, out)
exposed_copy(out, ["hidden_3"], out.with_name("exposed.onnx"))
usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({
    "peak_mb": max(usage) / 1024, "written": written, "notes": model.notes,
    "source_bytes": model.source_bytes,
    "ops": [node.op for node in model.graph.nodes], "inputs": [str(i.shape) for i in model.inputs],
    "user_names": dict(model.user_names), "left": sorted(p.name for p in work.iterdir()),
}))
"""


def write_model(folder: Path) -> Path:
    """``LAYERS`` times MatMul + Identity + Add; 2.25 GiB of which only one row per weight is not a hole."""
    nodes, weights = [], []
    data = folder / "weights.bin"
    with data.open("wb") as file:
        file.truncate(LAYERS * LAYER_BYTES)
        for layer in range(LAYERS):
            file.seek(layer * LAYER_BYTES)
            file.write(np.full(WIDTH, 0.25 + layer, np.float32).tobytes())
    current = "x"
    for layer in range(LAYERS):
        weight = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data.name), ("offset", layer * LAYER_BYTES), ("length", LAYER_BYTES)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
        last = "y" if layer == LAYERS - 1 else f"hidden_{layer}"
        nodes += [
            helper.make_node("MatMul", [current, f"w{layer}"], [f"product_{layer}"]),
            helper.make_node("Identity", [f"product_{layer}"], [f"same_{layer}"]),
            helper.make_node("Relu", [f"same_{layer}"], [last]),
        ]
        current = last
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    path = folder / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), path)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from POSIX resource usage")
def test_load_canonicalize_and_save(tmp_path: Path) -> None:
    source = write_model(tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size > 2**31
    work = tmp_path / "work"
    work.mkdir()
    out = tmp_path / "out.onnx"
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(source), str(work), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak_mb"] < PEAK_RSS_MB
    assert result["source_bytes"] > 2**31
    assert result["written"] == sum((tmp_path / n).stat().st_size for n in ("out.onnx", "out.onnx.data"))
    assert result["ops"] == ["MatMul", "Relu"] * LAYERS
    assert result["inputs"] == ["('batch', 8192)"]
    assert any("onnxsim" in note for note in result["notes"])
    assert result["left"] == ["canonical.onnx", "canonical.onnx.data"]
    for path in (work / "canonical.onnx", out):
        check_weights(path)
    exposed = onnx.load(tmp_path / "exposed.onnx", load_external_data=False)
    assert [entry.name for entry in exposed.graph.output] == ["y", "hidden_3"]
    assert (tmp_path / "exposed.onnx").stat().st_size < 100_000


def check_weights(path: Path) -> None:
    """The checker accepts the file, and each weight has its own first row and zeros at its end."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {tensor.name for tensor in model.graph.initializer} == {f"w{layer}" for layer in range(LAYERS)}
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        values = np.memmap(
            path.parent / entry["location"], np.float32, "r", int(entry["offset"]), (WIDTH, WIDTH)
        )
        assert (values[0] == 0.25 + int(tensor.name[1:])).all()
        assert not values[-1].any()
