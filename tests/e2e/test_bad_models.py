"""Models that cannot be quantized: one screen, exit code 3, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxptq
from tests.e2e.command import Bench, Finished, classifier, here

Change = Callable[[onnx.ModelProto], None]


def _changed(change: Change) -> onnx.ModelProto:
    model = classifier()
    change(model)
    return model


def _break_link(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 10


def _future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Relux"


def _short_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def _wrong_channels(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[1] = 1
    model.graph.initializer[0].dims[0] = 48


def _quantized(model: onnx.ModelProto) -> None:
    model.graph.node.insert(
        0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="early")
    )


def _strings(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("text", TensorProto.STRING, [1]))


BROKEN: dict[str, tuple[bytes | onnx.ModelProto, str]] = {
    "empty": (b"", "empty"),
    "text": (b"This is no model.\n" * 40, "not an ONNX file"),
    "truncated": (classifier().SerializeToString()[:-500], "net.onnx"),
    "zip": (b"PK\x03\x04" + bytes(300), "net.onnx"),
    "link": (_changed(_break_link), "nowhere"),
    "opset 10": (_changed(_old), "opset 10"),
    "opset 99": (_changed(_future), "opset 99"),
    "unknown operator": (_changed(_unknown_operator), "Relux"),
    "short weight": (_changed(_short_weight), "stem.w"),
    "wrong shape": (_changed(_wrong_channels), "net.onnx"),
    "quantized": (_changed(_quantized), "'early'"),
    "string input": (_changed(_strings), "'text'"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_or_unfit_model(bench: Bench, content: bytes | onnx.ModelProto, said: str) -> None:
    bench.write(content)
    bench.refuses(3, "net.onnx", said, do=bench.quantize)


def test_no_such_model(bench: Bench) -> None:
    bench.model.unlink()
    bench.refuses(2, "net.onnx", "does not exist", do=bench.quantize)
    bench.refuses(2, "net.onnx", "does not exist", do=lambda: here(bench.capsys, "inspect", bench.model))
    models = (bench.model, bench.model)
    bench.refuses(
        2, "does not exist", do=lambda: here(bench.capsys, "validate", *models, "--data", bench.data)
    )
    bench.refuses(
        2, "does not exist", do=lambda: here(bench.capsys, "sensitivity", bench.model, "--calib", bench.data)
    )


def test_a_folder_as_model(bench: Bench) -> None:
    bench.refuses(2, "is a folder", do=lambda: bench.quantize(model=bench.folder))


def test_missing_external_data(bench: Bench) -> None:
    onnx.save(
        classifier(), str(bench.model), save_as_external_data=True, location="net.weights", size_threshold=0
    )
    (bench.folder / "net.weights").unlink()
    bench.refuses(3, "net.weights", "does not exist", do=bench.quantize)


def test_short_external_data(bench: Bench) -> None:
    onnx.save(
        classifier(), str(bench.model), save_as_external_data=True, location="net.weights", size_threshold=0
    )
    weights = bench.folder / "net.weights"
    weights.write_bytes(weights.read_bytes()[:-64])
    bench.refuses(3, "net.weights", do=bench.quantize)


def test_its_own_result(bench: Bench) -> None:
    assert bench.quantize("--no-report").code == 0
    bench.refuses(3, "already quantized", do=lambda: bench.quantize(model=bench.output))


def test_nothing_to_quantize(bench: Bench) -> None:
    graph = helper.make_graph(
        [helper.make_node("Sin", ["x"], ["y"], name="wave")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 8, 8])],
    )
    bench.write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    bench.refuses(3, "nothing that ort-cpu could quantize", "inspect", do=bench.quantize)


def test_everything_inside_a_branch(bench: Bench) -> None:
    """As some recognizers come, with a network for each rate of the sound."""
    weights = [numpy_helper.from_array(np.ones((8, 8), np.float32) * i, f"w{i}") for i in (1, 2)]
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"])],
            f"branch{i}",
            [],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [weight],
        )
        for i, weight in enumerate(weights, 1)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["x"], ["peak"], keepdims=0),
            helper.make_node("Greater", ["peak", "one"], ["loud"]),
            helper.make_node(
                "If", ["loud"], ["y"], name="rates", then_branch=branches[0], else_branch=branches[1]
            ),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [numpy_helper.from_array(np.float32(1.0), "one")],
    )
    bench.write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    bench.refuses(3, "rates: The bodies of If nodes stay in float", "inspect", do=bench.quantize)
    assert onnxptq.inspect(bench.model).parameters >= 128


def test_a_bit_flipped_model_that_still_loads_is_quantized_as_it_stands(bench: Bench) -> None:
    content = bytearray(bench.model.read_bytes())
    weight = onnx.numpy_helper.to_array(onnx.load(str(bench.model)).graph.initializer[0]).tobytes()
    content[content.index(weight)] ^= 1
    bench.write(bytes(content))
    assert bench.quantize("--no-report").code == 0


@pytest.mark.parametrize("fast", [True, False])
def test_weights_that_are_no_numbers(bench: Bench, fast: bool) -> None:
    model = classifier()
    weight = np.frombuffer(model.graph.initializer[0].raw_data, np.float32).copy()
    weight[5] = np.nan
    model.graph.initializer[0].raw_data = weight.tobytes()
    bench.write(model)
    # Every later activation is NaN too, so nothing is left to quantize.
    bench.refuses(3, "'stem.w' holds NaN", do=lambda: bench.quantize(fast=fast))


def _against(bench: Bench, content: bytes | onnx.ModelProto, *options: object) -> Finished:
    other = bench.write(content, "other.onnx")
    return here(bench.capsys, "validate", bench.model, other, "--data", bench.data, *options)


DAMAGED = {
    "empty": (b"", "is empty"),
    "nonsense": (b"\x08\x07nonsense", "damaged"),
    "cut": (classifier().SerializeToString()[:-50], "other.onnx"),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_to_compare(bench: Bench, content: bytes, said: str) -> None:
    bench.refuses(3, "other.onnx", said, do=lambda: _against(bench, content), keeps=False)


def _reads(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], ["y"], "same")],
        "other",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


STRANGERS = {
    "rank": (_reads("x", ["n", 192]), ("'x' as float32 [n, 3, 8, 8]", "'x' as float32 [n, 192]")),
    "rank and name": (_reads("features", [4]), ("'features' as float32 [4]",)),
    "size": (_reads("x", ["n", 3, 8, 9]), ("[n, 3, 8, 9]",)),
    "type": (_reads("x", ["n", 3, 8, 8], TensorProto.FLOAT16), ("'x' as float16",)),
}


@pytest.mark.parametrize(("model", "said"), STRANGERS.values(), ids=STRANGERS)
def test_files_whose_inputs_differ(bench: Bench, model: onnx.ModelProto, said: tuple[str, ...]) -> None:
    bench.refuses(2, "net.onnx", "other.onnx", *said, do=lambda: _against(bench, model), keeps=False)


def test_inputs_of_another_name_are_the_same_inputs(bench: Bench) -> None:
    model = classifier()
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    done = _against(bench, model)
    assert done.code == 0
    assert "x = picture" in done.out


def test_a_quantized_file_may_be_the_reference(bench: Bench) -> None:
    assert bench.quantize("--no-report").code == 0
    quantized = bench.output.read_bytes()
    bench.write(quantized)
    done = _against(bench, quantized, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["outputs"][0]["sqnr_db"] == "inf"


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_the_other_commands_refuse_it_too(bench: Bench, command: str) -> None:
    bench.write(b"\x08\x07nonsense")
    more = ("net.onnx", "--data", bench.data) if command == "validate" else ()
    bench.refuses(3, "net.onnx", do=lambda: here(bench.capsys, command, bench.model, *more))
