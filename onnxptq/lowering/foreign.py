"""Operators that have no torch form, run by onnxruntime in the middle of a torch program.

Their results are constants to autograd: no gradient passes such a node, so what lies in front of it learns nothing
through it. They stay in float. A session is made when the node first runs, since only then the types of all that it
reads are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from onnxptq.errors import UnsupportedOperatorError
from onnxptq.graph.index import read_tensors
from onnxptq.graph.save import export_node
from onnxptq.graph.surgeon import quiet_surgeon
from onnxptq.lowering.dtypes import tensor_of
from onnxptq.lowering.registry import (
    Declined,
    Entry,
    Prepared,
    Unsupported,
    check_supported,
    opsets_of,
)
from onnxptq.runtime.session import Session
from onnxptq.types import Array

_DRAWING = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_SHOWN = 8
_OF_NO_TENSORS = ("seq(", "optional(", "map(", "tensor(string)")


def prepare_foreign(node: gs.Node, opsets: Mapping[str, int], gap: Unsupported) -> Prepared | Unsupported:
    """``node`` as a step that onnxruntime runs, or why that cannot be either.

    Args:
        gap: why it has no torch form.
    """
    reason = _obstacle(node, opsets)
    if reason:
        return replace(gap, reason=f"{gap.reason}, and {reason}")
    static = {i: t for i, t in enumerate(node.inputs) if _is_built_in(t)}
    outer = captured(node)
    kernel = ForeignKernel(
        node=node,
        opsets=opsets,
        names=tuple("" if i in static else t.name for i, t in enumerate(node.inputs)) + outer,
        initializers=tuple(static.values()),
    )
    entry = Entry(
        domain=gap.domain,
        op=gap.op,
        since_version=gap.version,
        build=lambda _: kernel,
        host_inputs=frozenset(),
        host_output=False,
        note="",
    )
    return Prepared(node, entry, kernel, frozenset(static), outer)


def require_supported(graph: gs.Graph, *, may_run_foreign: bool = True) -> None:
    """Refuse a graph that cannot be run in torch as a whole; cheap.

    Args:
        may_run_foreign: whether onnxruntime may run what has no torch form.

    Raises:
        UnsupportedOperatorError: names the operators, their versions and their nodes.
    """
    refused = unsupported_nodes(graph, may_run_foreign=may_run_foreign)
    if refused:
        raise refusal(refused, may_run_foreign=may_run_foreign)


def unsupported_nodes(graph: gs.Graph, *, may_run_foreign: bool = True) -> tuple[Unsupported, ...]:
    """The nodes for which :func:`require_supported` refuses ``graph``, in its order."""
    gaps = check_supported(graph)
    if not may_run_foreign:
        return gaps
    opsets = opsets_of(graph)
    named = {node.name: node for node in graph.nodes}
    results = (prepare_foreign(named[gap.node], opsets, gap) for gap in gaps)
    return tuple(result for result in results if isinstance(result, Unsupported))


def foreign_nodes(graph: gs.Graph) -> frozenset[str]:
    """Names of the nodes that have no torch form, so that no gradient passes them."""
    return frozenset(gap.node for gap in check_supported(graph))


def refusal(refused: Sequence[Unsupported], *, may_run_foreign: bool = True) -> UnsupportedOperatorError:
    """The error that names what cannot be run in torch, nor, where it was allowed to, in onnxruntime in between."""
    others = "method auto or rtn and equal bits, which need no torch"
    return UnsupportedOperatorError(
        "These operators cannot be run in torch: " + "; ".join(map(str, refused[:_SHOWN])),
        f"Choose {others}."
        if may_run_foreign
        else f"Leave them in float with --unknown-operators float, or choose {others}.",
    )


def captured(node: gs.Node) -> tuple[str, ...]:
    """What the subgraphs of ``node`` read from outside, constants excepted, and ``node`` itself does not."""
    own = {t.name for t in node.inputs}
    return tuple(
        dict.fromkeys(
            t.name
            for t in read_tensors(node)
            if t.name and t.name not in own and not isinstance(t, gs.Constant)
        )
    )


def _obstacle(node: gs.Node, opsets: Mapping[str, int]) -> str:
    """Why onnxruntime cannot run ``node`` between tensors of torch; empty if it can."""
    if node.op in _DRAWING:
        return "its results are drawn at random"
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    try:
        schema = onnx.defs.get_schema(node.op, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        # What other domains hold only onnxruntime knows; it loads the whole model before this is asked.
        return "" if domain else "ONNX does not define it"
    for formal in (*schema.inputs, *schema.outputs):
        if all(kind.startswith(_OF_NO_TENSORS) for kind in formal.types):
            return f"{formal.name} is no tensor of numbers"
    return ""


def _is_built_in(tensor: gs.Tensor) -> bool:
    """Whether a constant goes into the session's model. Floats are fed, so that they can be replaced and shared."""
    if not isinstance(tensor, gs.Constant):
        return False
    return not (isinstance(tensor.dtype, np.dtype) and tensor.dtype.kind == "f")


@dataclass(slots=True, kw_only=True, eq=False)
class ForeignKernel:
    """Runs one node in onnxruntime.

    ``names`` are those of the arguments in their order, empty where an argument is absent or built in;
    ``initializers`` are the constants that are built in.
    """

    node: gs.Node
    opsets: Mapping[str, int]
    names: Sequence[str]
    initializers: Sequence[gs.Constant]
    _session: Session | None = field(default=None, init=False)

    def __call__(self, *args: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """One tensor per output of the node, on the device of what it read.

        Raises:
            UnsupportedOperatorError: an output is no tensor of numbers.
            RunError: onnxruntime failed.
        """
        given = {name: arg for name, arg in zip(self.names, args, strict=True) if name and arg is not None}
        feed = {name: _array(arg) for name, arg in given.items()}
        if self._session is None:
            self._session = Session(self._model(feed).SerializeToString(), exact=True)
        found = self._session.run(feed)
        device = next((arg.device for arg in given.values() if arg.device.type != "cpu"), None)
        return tuple(self._tensor(t.name, found.get(t.name), device) for t in self.node.outputs)

    def _tensor(self, name: str, value: object, device: torch.device | None) -> torch.Tensor | None:
        if not name:
            return None
        try:
            if not isinstance(value, np.ndarray):
                raise Declined("it is no tensor")
            tensor = tensor_of(value)
        except Declined as reason:
            raise UnsupportedOperatorError(
                f"Output {name!r} of node {self.node.name!r} ({self.node.op}) cannot be used by torch: {reason}.",
                "Choose method rtn and equal bits, which need no torch.",
            ) from None
        return tensor if device is None else tensor.to(device)

    def _model(self, feed: Mapping[str, Array]) -> onnx.ModelProto:
        inputs = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), shape=None
            )
            for name, value in feed.items()
        ]
        outputs = [onnx.ValueInfoProto(name=t.name) for t in self.node.outputs if t.name]
        constants = {t.name: onnx.numpy_helper.from_array(t.values, t.name) for t in self.initializers}
        with quiet_surgeon():
            node = export_node(self.node)
        graph = onnx.helper.make_graph([node], "node", inputs, outputs, initializer=list(constants.values()))
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        known = [entry for entry in imports if entry.domain in ("", "ai.onnx.ml")]
        return onnx.helper.make_model(
            graph, opset_imports=imports, ir_version=onnx.helper.find_min_ir_version_for(known)
        )


def _array(value: torch.Tensor) -> Array:
    array: Array = value.detach().cpu().contiguous().numpy()
    return array
