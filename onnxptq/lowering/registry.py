"""Which ONNX operators can be lowered to torch, keyed by (domain, operator, since_version).

A *builder* turns one node into a *kernel* once, at lowering time; the kernel is what runs at every step.
Builders read their attributes through NodeSpec, which remembers what was read: an attribute that no
builder asked for is an attribute whose meaning would be lost, and declines the node.

Versions: a registration serves every opset from its ``since_version`` to the next registration of the
same operator, but only inside [MIN_OPSET, REVIEWED_OPSET]. An operator that ONNX redefines after
REVIEWED_OPSET is declined rather than run with its older meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from onnxptq.graph.surgeon import constant_node_value
from onnxptq.types import Array

MIN_OPSET = 7
"""The oldest opset of onnxruntime, whose results the lowering is tested against."""

REVIEWED_OPSET = 28
"""The newest opset whose operator definitions were read and tested."""

_STANDARD_DOMAINS = ("", "ai.onnx")

Value: TypeAlias = torch.Tensor | tuple[torch.Tensor | None, ...]
Kernel: TypeAlias = Callable[..., Value]
"""Takes one tensor per node input (None where an optional input is absent); gives one tensor, or a tuple
with one entry per node output. Never writes to its arguments."""


class Declined(Exception):  # noqa: N818 - a decision with a reason, caught in this package
    """A builder cannot express this node; the text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """A node that cannot be lowered. ``version`` is that of ONNX's definition at the graph's opset."""

    node: str
    op: str
    domain: str
    version: int
    reason: str

    @property
    def kind(self) -> str:
        """The operator with its domain, where that is not ONNX's, and its version."""
        name = f"{self.domain}.{self.op}" if self.domain else self.op
        return f"{name} version {self.version}"

    def __str__(self) -> str:
        return f"{self.kind} (node {self.node!r}): {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class NodeSpec:
    """What a builder may know about its node: attributes, constant inputs, which inputs and outputs exist."""

    node: gs.Node
    version: int
    opset: int
    _read: set[str] = field(default_factory=set)
    _static: set[int] = field(default_factory=set)

    @property
    def op(self) -> str:
        """The operator's name."""
        return str(self.node.op)

    @property
    def n_inputs(self) -> int:
        """Number of inputs as written, absent optional ones in the middle included."""
        return len(self.node.inputs)

    @property
    def n_outputs(self) -> int:
        """Number of outputs as written, up to the last one that has a name."""
        named = [i for i, t in enumerate(self.node.outputs) if t.name]
        return named[-1] + 1 if named else 0

    @property
    def static_inputs(self) -> frozenset[int]:
        """Inputs whose constant value was built into the kernel."""
        return frozenset(self._static)

    def unread_attributes(self) -> tuple[str, ...]:
        """Attributes of the node that the builder never asked for."""
        return tuple(name for name in self.node.attrs if name not in self._read)

    def has_input(self, index: int) -> bool:
        """Whether input ``index`` is present."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def has_output(self, index: int) -> bool:
        """Whether anybody may read output ``index``."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute as graphsurgeon holds it."""
        self._read.add(name)
        value = self.node.attrs.get(name, default)
        if isinstance(value, gs.Node.AttributeRef):
            raise Declined(f"attribute {name} refers to a function's parameter")
        return value

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attribute(name, default))

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.attribute(name, default))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attribute(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """A list of integers, or None where the attribute is absent."""
        value = self.attribute(name)
        return None if value is None else tuple(int(v) for v in value)

    def ignore(self, *names: str) -> None:
        """Declare attributes that carry no meaning for the result (``kernel_shape`` repeats the weight's)."""
        self._read.update(names)

    def is_constant(self, index: int) -> bool:
        """Whether input ``index`` is present and constant."""
        return self.has_input(index) and _constant_of(self.node.inputs[index]) is not None

    def peek(self, index: int) -> Array | None:
        """The value of a constant input, or None; the kernel still receives the tensor."""
        if not self.has_input(index):
            return None
        constant = _constant_of(self.node.inputs[index])
        if constant is None:
            return None
        value: Array = constant.values
        return value

    def constant(self, index: int) -> Array | None:
        """The value of a constant input, or None. The kernel may then ignore the tensor that it is given."""
        value = self.peek(index)
        if value is not None:
            self._static.add(index)
        return value

    def constant_integers(self, index: int) -> tuple[int, ...] | None:
        """The value of a constant integer input as a flat tuple, or None."""
        value = self.constant(index)
        return None if value is None else tuple(int(v) for v in np.asarray(value).reshape(-1))

    def rank(self, index: int) -> int | None:
        """The rank of input ``index`` where the graph states it."""
        if not self.has_input(index):
            return None
        shape = self.node.inputs[index].shape
        return None if shape is None else len(shape)


def _constant_of(tensor: gs.Tensor) -> gs.Constant | None:
    """The constant behind ``tensor``: an initializer, or the tensor attribute of a Constant node."""
    if isinstance(tensor, gs.Constant):
        return tensor
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant":
        return constant_node_value(tensor.inputs[0])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One registration. ``host_inputs`` are read on the CPU; ``host_output`` marks readers of shapes."""

    domain: str
    op: str
    since_version: int
    build: Callable[[NodeSpec], Kernel]
    host_inputs: frozenset[int]
    host_output: bool
    note: str


_ENTRIES: dict[tuple[str, str], dict[int, Entry]] = {}
Builder: TypeAlias = Callable[[NodeSpec], Kernel]


def register(
    domain: str,
    op: str,
    since_version: int,
    *,
    host_inputs: Iterable[int] = (),
    host_output: bool = False,
    note: str = "",
) -> Callable[[Builder], Builder]:
    """Register the decorated builder for ``op`` from opset ``since_version`` on.

    Args:
        domain: "" for the standard operators.
        op: the operator's name.
        since_version: the first opset that the builder serves.
        host_inputs: inputs that are shapes, axes and the like; they are read on the CPU.
        host_output: the operator reads only its input's shape, and its result stays on the CPU.
        note: what the builder declines, for the operator table.
    """

    def add(build: Builder) -> Builder:
        versions = _ENTRIES.setdefault((domain, op), {})
        if since_version in versions:
            raise ValueError(f"{domain or 'ai.onnx'}.{op} version {since_version} is registered twice")
        versions[since_version] = Entry(
            domain=domain,
            op=op,
            since_version=since_version,
            build=build,
            host_inputs=frozenset(host_inputs),
            host_output=host_output,
            note=note,
        )
        return build

    return add


def entries() -> tuple[Entry, ...]:
    """Every registration, by domain, operator and version."""
    found = [entry for versions in _ENTRIES.values() for entry in versions.values()]
    return tuple(sorted(found, key=lambda e: (e.domain, e.op, e.since_version)))


def lookup(domain: str, op: str, opset: int) -> Entry | None:
    """The registration with the greatest since_version <= ``opset``; None if there is none."""
    versions = _ENTRIES.get((_plain(domain), op), {})
    served = [version for version in versions if version <= opset]
    return versions[max(served)] if served else None


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A node ready to run. ``captured`` are tensors that it reads behind its inputs, for its subgraphs."""

    node: gs.Node
    entry: Entry
    kernel: Kernel
    static_inputs: frozenset[int]
    captured: tuple[str, ...] = ()


def prepare(node: gs.Node, opsets: Mapping[str, int]) -> Prepared | Unsupported:
    """Build the kernel of ``node``, or say why there is none. Never raises for a valid node."""
    domain = _plain(node.domain)
    opset = opsets.get(domain, 1)
    version = _definition_version(domain, node.op, opset)

    def unsupported(reason: str) -> Unsupported:
        return Unsupported(node=node.name, op=node.op, domain=domain, version=version, reason=reason)

    entry = lookup(domain, node.op, opset)
    if entry is None:
        return unsupported("no lowering for this operator")
    if domain == "" and opset < MIN_OPSET:
        return unsupported(f"opset {opset} is older than {MIN_OPSET}")
    if domain == "" and version > REVIEWED_OPSET:
        return unsupported(f"its definition changed after opset {REVIEWED_OPSET}")
    spec = NodeSpec(node, version, opset)
    try:
        kernel = entry.build(spec)
    except Declined as reason:
        return unsupported(str(reason))
    unread = spec.unread_attributes()
    if unread:
        return unsupported(f"attribute {', '.join(unread)} is not handled")
    return Prepared(node, entry, kernel, spec.static_inputs)


def opsets_of(graph: gs.Graph) -> Mapping[str, int]:
    """The opset of each domain that ``graph`` imports."""
    found = {_plain(entry.domain): int(entry.version) for entry in (graph.import_domains or ())}
    found[""] = int(graph.opset)
    return found


def check_supported(graph: gs.Graph, nodes: Iterable[gs.Node] | None = None) -> tuple[Unsupported, ...]:
    """Every node that has no torch form, in graph order. Cheap; loads no weights.

    Args:
        graph: where the opsets come from.
        nodes: the nodes to check; all of ``graph`` by default.
    """
    opsets = opsets_of(graph)
    found = []
    for node in graph.nodes if nodes is None else nodes:
        if node.op == "Constant" and constant_node_value(node) is not None:
            continue
        prepared = prepare(node, opsets)
        if isinstance(prepared, Unsupported):
            found.append(prepared)
    return tuple(found)


def _plain(domain: str | None) -> str:
    return "" if domain is None or domain in _STANDARD_DOMAINS else domain


def _definition_version(domain: str, op: str, opset: int) -> int:
    """The since_version of ONNX's definition at ``opset``; ``opset`` itself where ONNX has none."""
    try:
        return int(onnx.defs.get_schema(op, opset, domain).since_version)
    except onnx.defs.SchemaError:
        return opset
