"""The machinery that turns a target's placement table into quantizers.

A table has one :class:`Row` per operator type; a row says which inputs carry an activation quantizer,
which one is a weight, what becomes of the bias, and whether a kernel needs a quantizer on its output.
Everything that a row cannot say (residual sums, shared scales) is a function of the target's file that
works on a :class:`Placer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_graphsurgeon as gs

from onnxptq.graph.choosing import only_chooses
from onnxptq.graph.index import GraphIndex, constant_value, is_constant, is_float32
from onnxptq.types import (
    GRAPH_OUTPUT,
    Granularity,
    PerAxis,
    PerTensor,
    QType,
    Quantizer,
    QuantPlan,
    Site,
    Skip,
)

MOVEMENT_OPS = frozenset(
    {
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "MaxPool",
        "GlobalMaxPool",
        "ReduceMax",
        "ReduceMin",
        "Slice",
        "Gather",
        "Split",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
    }
)
"""Operators whose outputs hold only values of their first input: a quantized input needs no new scale."""


def moves_values(node: gs.Node) -> bool:
    """Whether the outputs of ``node`` hold only values of its first input."""
    return node.op in MOVEMENT_OPS or (node.op == "Resize" and node.attrs.get("mode", "nearest") == "nearest")


FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Activations that kernels fuse into the linear operator before them; nothing may stand in between."""

_WITHOUT_A_ROW = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers stay in float"),
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"), "this target leaves {op} in float"
    ),
    "Gather": "a table that is looked up stays in float",
}
"""Why weights stay as they are, by operator, where a target has no row for it."""

_FEW_WEIGHTS = 64
"""Constants of fewer values are no weights worth a word."""

Bias = Literal["int32", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one operator type is quantized.

    ``weight`` is the input that is a per-channel weight when it is constant (and an activation otherwise);
    ``weight_axis`` gives the axis kept, from the node. ``quantize_output`` asks for a quantizer behind the
    operator and its fused activation, unless ``output_is_idle`` gives a reason against it. ``decline`` returns
    a reason to leave a node in float, or None.
    """

    activations: tuple[int, ...]
    weight: int | None = None
    weight_axis: Callable[[gs.Node], int | None] | None = None
    bias: int | None = None
    bias_storage: Bias = "float"
    quantize_output: bool = False
    output_is_idle: Callable[[gs.Node, GraphIndex], str | None] = lambda node, index: None
    decline: Callable[[gs.Node, GraphIndex], str | None] = lambda node, index: None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """What the user asked for, already resolved to node names.

    ``weight_bits`` and ``activation_bits`` are defaults; ``bits_of`` overrides them per node as
    (weight, activation). ``residuals`` asks for sums of residual connections where a target has the choice.
    ``declined`` maps a node to the reason why it must stay in float.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weight_storage: Literal["int8", "int4"] = "int8"
    residuals: bool = False
    bits_of: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    uncalibrated: Mapping[str, str] = field(default_factory=dict)


def channel_axis_of_gemm(node: gs.Node) -> int:
    """The output-channel axis of a Gemm's second input."""
    return 0 if node.attrs.get("transB", 0) else 1


def channel_axis_of_matmul(node: gs.Node) -> int | None:
    """The output-channel axis of a MatMul's second input, the last of a matrix.

    A vector has one output channel, and onnxruntime's integer kernel takes no scales per channel of a stack of
    matrices: these have one scale.
    """
    return 1 if len(node.inputs[1].shape) == 2 else None


class Placer:
    """Collects quantized edges and groups them into quantizers."""

    def __init__(
        self,
        index: GraphIndex,
        request: PlacementRequest,
        *,
        activation: Callable[[int], QType],
        symmetric: bool,
    ) -> None:
        self.index = index
        self.request = request
        self._activation = activation
        self._symmetric = symmetric
        self._edges: dict[str, dict[Site, tuple[QType, Granularity, bool]]] = {}
        self._bias: list[tuple[gs.Node, int, gs.Node]] = []
        self._weight_of: dict[tuple[str, int], str] = {}
        self._quantizers: dict[str, Quantizer] = {}
        self._weight_ids: dict[tuple[str, int], str] = {}
        self._mapped: dict[str, int] = {}
        self.skips: list[Skip] = []
        self.quantized_nodes: set[str] = set()

    # ---- rows ---------------------------------------------------------------------------------

    def apply(self, table: Mapping[str, Row]) -> None:
        """Quantize every node that has a row and is not declined. Weights of others are told to stay as they are."""
        for node in self.index.nodes:
            row = table.get(node.op) if node.domain in ("", None) else None
            if row is not None:
                self.apply_row(node, row)
            elif reason := _why_weights_stay(node):
                reason = self.request.declined.get(node.name, reason)
                self.skips.append(Skip(site=node.name, reason=reason))

    def apply_row(self, node: gs.Node, row: Row) -> None:
        """Quantize ``node`` as ``row`` says, unless there is a reason not to."""
        reason = self.request.declined.get(node.name) or self._structural_reason(node, row)
        if reason:
            self.skips.append(Skip(site=node.name, reason=reason))
            return
        self.quantized_nodes.add(node.name)
        for i in row.activations:
            self.add_edge(node, i)
        if row.weight is not None:
            if is_constant(node.inputs[row.weight]):
                axis = row.weight_axis(node) if row.weight_axis else None
                self._add_weight(node, row.weight, axis)
            else:
                self.add_edge(node, row.weight)
        if row.bias_storage == "int32" and row.bias is not None and len(node.inputs) > row.bias:
            bias = node.inputs[row.bias]
            if is_constant(bias) and row.weight is not None and is_constant(node.inputs[row.weight]):
                self.add_bias(node, row.bias, node, row.weight)
        if row.quantize_output:
            idle = row.output_is_idle(node, self.index)
            if idle:
                self.skips.append(Skip(site=node.name, reason=idle))
            else:
                self.quantize_tensor(self.behind_activation(node))

    def add_bias(self, node: gs.Node, i: int, product: gs.Node, weight: int) -> None:
        """Store the constant that ``node`` adds at input ``i`` in int32, on the grid of ``product``'s sums.

        Left in float where it does not hold one value per output channel (a Gemm may add a matrix or a scalar),
        because only a channel has one scale.
        """
        quantizer = self._quantizers[self._weight_of[product.name, weight]]
        if isinstance(quantizer.granularity, PerAxis):
            channels = product.inputs[weight].shape[quantizer.granularity.axis]
            if list(node.inputs[i].shape) == [channels]:
                self._bias.append((node, i, product))

    def _structural_reason(self, node: gs.Node, row: Row) -> str | None:
        inputs = [*row.activations, *([] if row.weight is None else [row.weight])]
        constant = [is_constant(node.inputs[i]) for i in inputs if i < len(node.inputs)]
        if all(constant):
            return "all its inputs are constant"
        if not any(constant) and only_chooses(self.index, node.outputs[0].name):
            return "it only chooses which elements are taken, and rounding would change the choice"
        for i in inputs:
            tensor = node.inputs[i]
            if tensor.dtype is not None and not is_float32(tensor):
                return f"its input '{tensor.name}' is not float32"
            if tensor.name in self.request.uncalibrated:
                return f"its input '{tensor.name}' cannot be calibrated: {self.request.uncalibrated[tensor.name]}"
        return row.decline(node, self.index)

    def _bits(self, node: gs.Node | None) -> tuple[int, int]:
        default = (self.request.weight_bits, self.request.activation_bits)
        return default if node is None else self.request.bits_of.get(node.name, default)

    # ---- edges --------------------------------------------------------------------------------

    def add_edge(self, node: gs.Node, i: int) -> None:
        """Quantize what ``node`` reads at input ``i`` as an activation (a constant there: per tensor)."""
        tensor = node.inputs[i]
        if is_constant(tensor):
            self._add_weight(node, i, None)
            return
        site = Site(tensor=tensor.name, consumer=node.name, input_index=i)
        asked = self._bits(node)[1]
        qtype = self._activation(asked)
        if qtype.bits != asked:
            self._mapped[node.name] = asked
        self._edges.setdefault(tensor.name, {})[site] = (qtype, PerTensor(), self._symmetric)

    def quantize_tensor(self, name: str, like: gs.Node | None = None) -> None:
        """Quantize every read of tensor ``name``, the caller's included."""
        if name in self.request.uncalibrated:
            return
        qtype = self._activation(self._bits(like)[1])
        edges = self._edges.setdefault(name, {})
        for use in self.index.uses(name):
            site = Site(tensor=name, consumer=use.node.name, input_index=use.index)
            edges.setdefault(site, (qtype, PerTensor(), self._symmetric))
        if name in self.index.output_names:
            site = Site(tensor=name, consumer=GRAPH_OUTPUT, input_index=0)
            edges.setdefault(site, (qtype, PerTensor(), self._symmetric))

    def move_edge(self, node: gs.Node, i: int, to: gs.Node, j: int) -> None:
        """Let ``to`` read at input ``j`` the quantized values that ``node`` was to read at input ``i``, and ``node``
        what follows from them."""
        if to.inputs[j].name in self.request.uncalibrated:
            return
        site = Site(tensor=node.inputs[i].name, consumer=node.name, input_index=i)
        moved = Site(tensor=to.inputs[j].name, consumer=to.name, input_index=j)
        self._edges.setdefault(moved.tensor, {})[moved] = self._edges[site.tensor].pop(site)

    def release(self, node: gs.Node) -> None:
        """Let ``node`` read float values again."""
        for edges in self._edges.values():
            for site in [s for s in edges if s.consumer == node.name]:
                del edges[site]

    def is_quantized_edge(self, tensor: str, node: gs.Node) -> bool:
        """Whether ``node`` reads quantized values of ``tensor``."""
        return any(site.consumer == node.name for site in self._edges.get(tensor, ()))

    def has_quantizer(self, tensor: str) -> bool:
        """Whether any reader of ``tensor`` reads quantized values."""
        return bool(self._edges.get(tensor))

    def behind_activation(self, node: gs.Node) -> str:
        """The output of ``node``, or of the activation that its kernel fuses."""
        output: str = node.outputs[0].name
        follower = self.index.sole_user(output)
        if follower is not None and follower.op in FUSED_ACTIVATIONS and follower.inputs[0].name == output:
            return str(follower.outputs[0].name)
        return output

    # ---- weights ------------------------------------------------------------------------------

    def _add_weight(self, node: gs.Node, i: int, axis: int | None) -> None:
        tensor = node.inputs[i]
        bits = self._bits(node)[0] if axis is not None else max(self._bits(node))
        storage = self.request.weight_storage if bits <= 4 else "int8"
        key = (tensor.name, -1 if axis is None else axis)
        site = Site(tensor=tensor.name, consumer=node.name, input_index=i, is_weight=True)
        known = self._weight_ids.get(key)
        if known is not None and self._quantizers[known].qtype.bits == bits:
            self._weight_of[node.name, i] = known
            old = self._quantizers[known]
            self._quantizers[known] = replace(old, sites=(*old.sites, site))
            return
        quantizer_id = tensor.name if tensor.name not in self._quantizers else f"{tensor.name}@{node.name}"
        self._weight_ids[key] = self._weight_of[node.name, i] = quantizer_id
        self._quantizers[quantizer_id] = Quantizer(
            quantizer_id=quantizer_id,
            tensor=tensor.name,
            role="weight",
            qtype=QType.signed(bits, storage),
            granularity=PerTensor() if axis is None else PerAxis(axis),
            symmetric=True,
            sites=(site,),
            scale_group=quantizer_id,
        )

    # ---- result -------------------------------------------------------------------------------

    def finish(self, target: str, groups: ScaleGroups | None = None) -> QuantPlan:
        """The plan, with one scale per group of ``groups`` (default: one per tensor)."""
        groups = groups or ScaleGroups()
        quantizers = _separate_grids(
            [
                quantizer
                for name, edges in self._edges.items()
                for quantizer in _split_by_type(
                    name, edges, groups.of(name), known_bounds(self.index.producer(name))
                )
            ]
        )
        quantizers += list(self._quantizers.values())
        reads = {(s.consumer, s.input_index): q.quantizer_id for q in quantizers for s in q.sites}
        for node, i, product in self._bias:
            bias_id = f"{node.inputs[i].name}@{node.name}"
            quantizers.append(
                Quantizer(
                    quantizer_id=bias_id,
                    tensor=node.inputs[i].name,
                    role="bias",
                    qtype=QType.signed(32, "int32"),
                    granularity=PerAxis(0),
                    symmetric=True,
                    sites=(
                        Site(tensor=node.inputs[i].name, consumer=node.name, input_index=i, is_weight=True),
                    ),
                    scale_group=bias_id,
                    derived_from=(reads[product.name, 0], reads[product.name, 1]),
                )
            )
        mapped = [
            Skip(site=node, reason=f"{bits}-bit activations are not executed by {target}: mapped to 8 bits")
            for node, bits in self._mapped.items()
        ]
        return QuantPlan(target=target, quantizers=tuple(quantizers), skips=(*self.skips, *mapped))


_BOUNDED: Mapping[str, tuple[float, float]] = {
    "Relu": (0.0, math.inf),
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


def _why_weights_stay(node: gs.Node) -> str | None:
    """What is told of a node that a target has no row for; None where it holds no weights."""
    if not any(_is_weight(tensor) for tensor in node.inputs):
        return None
    if node.domain not in ("", None):
        return f"operators of {node.domain} stay in float"
    reason = _WITHOUT_A_ROW.get(node.op)
    return reason and reason.format(op=node.op)


def _is_weight(tensor: gs.Tensor) -> bool:
    return (
        is_constant(tensor)
        and is_float32(tensor)
        and len(tensor.shape) >= 2
        and math.prod(tensor.shape) >= _FEW_WEIGHTS
    )


def known_bounds(node: gs.Node | None) -> tuple[float, float] | None:
    """Limits that no output of ``node`` can leave, whatever its input."""
    if node is None:
        return None
    if node.op == "Clip":
        ends = [constant_value(t) for t in node.inputs[1:3] if t.name]
        if len(ends) == 2 and all(end is not None and end.size == 1 for end in ends):
            low, high = (float(end.reshape(())) for end in ends if end is not None)
            return low, high
    return _BOUNDED.get(node.op)


def _split_by_type(
    tensor: str,
    edges: Mapping[Site, tuple[QType, Granularity, bool]],
    group: str,
    bounds: tuple[float, float] | None,
) -> Iterable[Quantizer]:
    """One quantizer per distinct grid asked for on the edges of ``tensor``."""
    kinds = list(dict.fromkeys(edges.values()))
    for kind in kinds:
        qtype, granularity, symmetric = kind
        yield Quantizer(
            quantizer_id=tensor if len(kinds) == 1 else f"{tensor}@{qtype.storage}_{qtype.bits}",
            tensor=tensor,
            role="activation",
            qtype=qtype,
            granularity=granularity,
            symmetric=symmetric,
            sites=tuple(sorted(site for site, k in edges.items() if k == kind)),
            scale_group=group,
            bounds=bounds,
        )


def _separate_grids(quantizers: list[Quantizer]) -> list[Quantizer]:
    """Only equal grids can share a scale: a group that holds several becomes one group for each."""
    grids: dict[str, set[tuple[QType, bool]]] = {}
    for q in quantizers:
        grids.setdefault(q.scale_group, set()).add((q.qtype, q.symmetric))
    return [
        q
        if len(grids[q.scale_group]) == 1
        else replace(q, scale_group=f"{q.scale_group}@{q.qtype.storage}_{q.qtype.bits}")
        for q in quantizers
    ]


class ScaleGroups:
    """Tensors that must share a scale: a union-find, named by the member that was first in alphabetical order."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, tensor: str) -> str:
        """The name of the group that ``tensor`` is in."""
        while (parent := self._parent.get(tensor, tensor)) != tensor:
            tensor = parent
        return tensor

    def join(self, tensors: Iterable[str]) -> None:
        """Put ``tensors``, and whatever already shares a scale with one of them, into one group."""
        roots = sorted({self.of(tensor) for tensor in tensors})
        self._parent.update(dict.fromkeys(roots[1:], roots[0]))


def tie_movements(placer: Placer, groups: ScaleGroups | None = None) -> ScaleGroups:
    """Scale groups that make a quantizer behind data movement repeat the scale in front of it.

    Where a movement operator reads quantized values, everything behind it is already on that grid:
    quantizing again with the same scale is exact, with any other scale it adds noise.
    """
    groups = groups or ScaleGroups()
    for node in placer.index.nodes:
        for tensor in node.outputs:
            if placer.has_quantizer(tensor.name):
                source = _quantized_source(placer, tensor.name)
                if source is not None:
                    groups.join((tensor.name, source))
    return groups


def _quantized_source(placer: Placer, tensor: str) -> str | None:
    """The quantized tensor whose values ``tensor`` moves around, if there is one."""
    node = placer.index.producer(tensor)
    while node is not None and moves_values(node) and not is_constant(node.inputs[0]):
        source: str = node.inputs[0].name
        if placer.is_quantized_edge(source, node):
            return source
        node = placer.index.producer(source)
    return None
