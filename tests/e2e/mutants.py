"""Damaged models: seeded byte flips, truncations, splices, and changes of single protobuf fields."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from tests.e2e.command import classifier
from tests.unit.small_nets import Net

FIELDS = 0.6
"""Share of mutants that change a field, and so have a chance to be parsed; the rest damage bytes."""

_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 255, 4096, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
_OPERATORS = ("Conv", "Relu", "MatMul", "Gemm", "Add", "Reshape", "Softmax", "Resize", "Loop", "Nothing", "")


def sources() -> dict[str, bytes]:
    """A residual classifier, an attention block with a MLP, and a network with several inputs and outputs."""
    models = {"classifier": classifier(), "transformer": _transformer(), "branches": _branches()}
    return {name: model.SerializeToString() for name, model in models.items()}


def _transformer() -> onnx.ModelProto:
    net, tokens, width = Net(), 4, 16
    q, k, v = (net.linear(n, "x", width, width) for n in "qkv")
    keys = net.op("Transpose", "kt", k, perm=[0, 2, 1])
    p = net.op("Softmax", "softmax", net.op("MatMul", "qk", q, keys), axis=-1)
    y = net.op("Add", "sum", "x", net.linear("proj", net.op("MatMul", "pv", p, v), width, width))
    y = net.op("LayerNormalization", "ln", y, net.weight("ln.w", width), net.weight("ln.b", width), axis=-1)
    y = net.linear("fc2", net.op("Gelu", "gelu", net.linear("fc1", y, width, 32)), 32, width)
    flat = net.op("Reshape", "flat", y, net.constant("shape", np.array([0, -1], np.int64)))
    return net.proto({"x": [1, tokens, width]}, [flat])


def _branches() -> onnx.ModelProto:
    net = Net(opset=17)
    a = net.op("Relu", "a_relu", net.conv("a_conv", "a", (8, 3, 3, 3)))
    b = net.op("Sigmoid", "b_act", net.conv("b_conv", "b", (8, 3, 1, 1)))
    joined = net.op("Concat", "joined", a, net.op("MaxPool", "pool", b, kernel_shape=[1, 1]), axis=1)
    return net.proto({"a": [1, 3, 6, 6], "b": [1, 3, 6, 6]}, [net.conv("y", joined, (4, 16, 1, 1)), a])


def mutant(seed: int) -> bytes:
    """The model that belongs to a seed, always the same."""
    rng = random.Random(seed)
    content = _SOURCES[rng.choice(sorted(_SOURCES))]
    if rng.random() > FIELDS:
        return rng.choice((_flip, _truncate, _splice))(content, rng)
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(_CHANGES)(model, rng)
    return model.SerializeToString()


def _flip(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _splice(content: bytes, rng: random.Random) -> bytes:
    at, length, source = (rng.randrange(len(content)) for _ in range(3))
    piece = content[source : source + length % 200]
    return content[:at] + piece + content[at + rng.choice((0, len(piece))) :]


def _dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
    elif tensor.dims and rng.random() < 0.5:
        tensor.dims[:] = list(reversed(tensor.dims))
    else:
        tensor.dims.append(1)


def _tensor_type(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.initializer).data_type = rng.randrange(25)


def _tensor_data(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    pattern = rng.choice(
        (b"\xff", b"\x00", b"\x7f\x80\x00\x00", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"")
    )
    size = len(tensor.raw_data)
    tensor.raw_data = (pattern * size)[:size] if pattern else b""


def _external(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    place = rng.choice(("/etc/passwd", "../../../etc/passwd", "net.onnx", "", "gone"))
    tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(
        key=rng.choice(("offset", "length")), value=rng.choice(("-1", "x", "99999999999"))
    )


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(_OPERATORS)


def _domain(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).domain = rng.choice(("com.microsoft", "ai.onnx.ml", "nowhere"))


def _wiring(model: onnx.ModelProto, rng: random.Random) -> None:
    node, other = rng.choice(model.graph.node), rng.choice(model.graph.node)
    if rng.random() < 0.7:
        node.input[rng.randrange(len(node.input))] = rng.choice(
            (other.output[0], *other.input, "", "nowhere")
        )
    else:
        node.output[0] = rng.choice((other.output[0], other.input[0], ""))


def _count(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    rng.choice(
        (
            lambda: node.input.pop(),
            lambda: node.input.append(node.input[0]),
            lambda: node.output.append("more"),
        )
    )()


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute] or list(model.graph.node))
    if not node.attribute or rng.random() < 0.2:
        node.attribute.append(
            helper.make_attribute(rng.choice(("axis", "group", "pads", "what")), rng.choice(_NUMBERS))
        )
        return
    attribute = rng.choice(node.attribute)
    if attribute.ints and rng.random() < 0.7:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_NUMBERS)
    elif attribute.type == AttributeProto.INT and rng.random() < 0.7:
        attribute.i = rng.choice(_NUMBERS)
    elif rng.random() < 0.5:
        attribute.type = rng.randrange(15)
    else:
        node.attribute.remove(attribute)


def _declared(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    tensor = value.type.tensor_type
    if tensor.shape.dim and rng.random() < 0.7:
        tensor.shape.dim[rng.randrange(len(tensor.shape.dim))].dim_value = rng.choice(_NUMBERS)
    elif rng.random() < 0.5:
        tensor.elem_type = rng.randrange(25)
    else:
        value.ClearField(rng.choice(("name", "type")))


def _header(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.5:
        model.opset_import[0].version = rng.choice((*_NUMBERS, 11, 12, 13, 15, 19))
    else:
        model.ir_version = rng.choice((*_NUMBERS, 4, 9))


def _repeat(model: onnx.ModelProto, rng: random.Random) -> None:
    field = rng.choice((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output))
    field.append(rng.choice(field))


def _remove(model: onnx.ModelProto, rng: random.Random) -> None:
    field = rng.choice((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output))
    field.pop(rng.randrange(len(field)))


def _names(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).name = rng.choice(("", "a/b", "\u202e\x1b[31m", "x" * 5000, "{{7*7}}<b>"))


def _nested(model: onnx.ModelProto, rng: random.Random) -> None:
    depth = rng.choice((2, 10, 25))
    body = onnx.GraphProto()
    body.CopyFrom(model.graph)
    for _ in range(depth):
        outer = onnx.GraphProto(name="deep")
        outer.node.add(op_type="If", input=["x"], output=["y"]).attribute.add(
            name="then_branch", type=AttributeProto.GRAPH, g=body
        )
        body = outer
    model.graph.node.extend(body.node)


_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _dims,
    _dims,
    _tensor_type,
    _tensor_data,
    _tensor_data,
    _external,
    _operator,
    _domain,
    _wiring,
    _wiring,
    _count,
    _attribute,
    _attribute,
    _attribute,
    _declared,
    _declared,
    _header,
    _repeat,
    _remove,
    _names,
    _names,
    _nested,
)
_SOURCES = sources()
