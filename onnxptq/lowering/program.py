"""From a sub-range of a graph to a straight list of steps over numbered slots.

Placement: a tensor is on the *host* if it comes from Shape or Size, or from nodes whose data inputs are all
on the host; everything else is on the *device*. Shape arithmetic therefore stays on CPU integers whatever
the module's device is, and a batch size is never read back from an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
import torch

from onnxptq.graph.index import read_tensors
from onnxptq.graph.surgeon import constant_node_value
from onnxptq.lowering.foreign import prepare_foreign, refusal
from onnxptq.lowering.registry import (
    Kernel,
    Prepared,
    Unsupported,
    opsets_of,
    prepare,
)

Hook = Callable[[torch.Tensor], torch.Tensor]

ABSENT = 0
"""The slot of an input that is not there; it always holds None."""


@dataclass(slots=True, eq=False)
class Step:
    """One node: reads slots, runs its kernel, writes slots.

    ``to_device`` and ``to_host`` are the argument positions to move when the module is not on the CPU.
    ``hooks`` and ``branch`` are shared by every plan that holds this step; what ``branch`` makes of the first
    argument is added to the result.
    """

    name: str
    op: str
    kernel: Kernel
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    to_device: tuple[int, ...]
    to_host: tuple[int, ...]
    hooks: dict[int, Hook] = field(default_factory=dict)
    branch: Hook | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """Steps in order, and what the slots mean.

    ``constants`` and ``host_constants`` map a slot to the initializer that fills it; ``sites`` maps
    (consumer, input index) to the tensor read there, without the inputs that were built into kernels.
    """

    steps: tuple[Step, ...]
    slots: Mapping[str, int]
    n_slots: int
    constants: Mapping[int, gs.Constant]
    host_constants: Mapping[int, gs.Constant]
    sites: Mapping[tuple[str, int], str]


def compile_program(graph: gs.Graph, *, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
    """Select the nodes between ``inputs`` and ``outputs`` and give every tensor a slot.

    Raises:
        UnsupportedOperatorError: neither torch nor onnxruntime can run a needed node here; every such node is named.
        ValueError: an output does not exist, or needs a graph input that is not among ``inputs``.
    """
    needed = needed_nodes(graph, inputs=inputs, outputs=outputs)
    opsets = opsets_of(graph)
    prepared: list[Prepared] = []
    refused: list[Unsupported] = []
    for node in needed:
        result = prepare(node, opsets)
        if isinstance(result, Unsupported):
            result = prepare_foreign(node, opsets, result)
        if isinstance(result, Unsupported):
            refused.append(result)
        else:
            prepared.append(result)
    if refused:
        raise refusal(refused)
    return _Layout(inputs).build(prepared, outputs, _constants_of(graph))


def needed_nodes(graph: gs.Graph, *, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[gs.Node, ...]:
    """The nodes that compute ``outputs`` from ``inputs`` and constants, in graph order. No Constant nodes.

    Raises:
        ValueError: an output does not exist, ``inputs`` lack a graph input, or the nodes are not sorted.
    """
    producers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
    constants = _constants_of(graph)
    fed = set(inputs)
    wanted = [name for name in outputs if name not in fed]
    chosen: set[int] = set()
    missing: dict[str, str] = {}
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen or name in fed or name in constants:
            continue
        seen.add(name)
        node = producers.get(name)
        if node is None:
            missing[name] = "is no tensor of the graph" if name in outputs else "must be among the inputs"
            continue
        chosen.add(id(node))
        wanted.extend(t.name for t in read_tensors(node) if t.name)
    if missing:
        raise ValueError("; ".join(f"tensor {name!r} {why}" for name, why in sorted(missing.items())))
    nodes = tuple(node for node in graph.nodes if id(node) in chosen)
    _check_sorted(nodes, fed | set(constants))
    return nodes


def _check_sorted(nodes: Sequence[gs.Node], known: set[str]) -> None:
    for node in nodes:
        for tensor in read_tensors(node):
            if tensor.name and tensor.name not in known:
                raise ValueError(
                    f"node {node.name!r} reads {tensor.name!r} before it is computed: sort the graph"
                )
        known.update(t.name for t in node.outputs if t.name)


def _constants_of(graph: gs.Graph) -> dict[str, gs.Constant]:
    """Initializers and values of Constant nodes, by tensor name. Values are not loaded."""
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        if node.op == "Constant":
            value = constant_node_value(node)
            if value is not None:
                found[node.outputs[0].name] = value
        for tensor in read_tensors(node):
            if isinstance(tensor, gs.Constant):
                found[tensor.name] = tensor
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant):
            found[tensor.name] = tensor
    return found


def _holds_integers(constant: gs.Constant) -> bool:
    # graphsurgeon gives types that numpy lacks as ONNX's number; all of those are floats or 4-bit.
    return isinstance(constant.dtype, np.dtype) and constant.dtype.kind in "iu"


class _Layout:
    """Slot numbers and placement while a program is laid out."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.slots: dict[str, int] = {}
        self.n_slots = ABSENT + 1
        self.constants: dict[int, gs.Constant] = {}
        self.host_constants: dict[int, gs.Constant] = {}
        self._host_slots: dict[str, int] = {}
        self._on_host: set[str] = set()
        for name in inputs:
            self._new_slot(name)

    def build(
        self, prepared: Sequence[Prepared], outputs: Sequence[str], constants: Mapping[str, gs.Constant]
    ) -> Program:
        steps = tuple(self._step(p, constants) for p in prepared)
        for name in outputs:
            if name not in self.slots:
                self._constant_slot(name, constants[name])
        sites = {
            (p.node.name, i): t.name
            for p in prepared
            for i, t in enumerate(p.node.inputs)
            if t.name and i not in p.static_inputs and i not in p.entry.host_inputs
        }
        return Program(
            steps=steps,
            slots=self.slots,
            n_slots=self.n_slots,
            constants=self.constants,
            host_constants=self.host_constants,
            sites=sites,
        )

    def _step(self, prepared: Prepared, constants: Mapping[str, gs.Constant]) -> Step:
        node, entry = prepared.node, prepared.entry
        names = [*(t.name for t in node.inputs), *prepared.captured]
        data = [name for i, name in enumerate(names) if name and i not in entry.host_inputs]
        is_host = self._runs_on_host(data, constants)
        reads, to_device, to_host = [], [], []
        for i, name in enumerate(names):
            if not name or i in prepared.static_inputs:
                reads.append(ABSENT)
                continue
            wants_host = is_host or i in entry.host_inputs
            if name not in self.slots and name in constants:
                lay = self._host_constant_slot if wants_host else self._constant_slot
                reads.append(lay(name, constants[name]))
                continue
            if name in constants and wants_host:
                reads.append(self._host_constant_slot(name, constants[name]))
                continue
            reads.append(self.slots[name])
            if wants_host and name not in self._on_host:
                to_host.append(i)
            elif not wants_host and name in self._on_host and not entry.host_output:
                to_device.append(i)
        writes = []
        for tensor in node.outputs:
            writes.append(self._new_slot(tensor.name) if tensor.name else ABSENT)
            if tensor.name and (is_host or entry.host_output):
                self._on_host.add(tensor.name)
        return Step(
            node.name,
            node.op,
            prepared.kernel,
            tuple(reads),
            tuple(writes),
            tuple(to_device),
            tuple(to_host),
        )

    def _runs_on_host(self, data: Sequence[str], constants: Mapping[str, gs.Constant]) -> bool:
        variable = [name for name in data if name not in constants]
        if any(name not in self._on_host for name in variable):
            return False
        # Only constants: integers are shape arithmetic, floats are weights.
        return bool(variable) or all(_holds_integers(constants[name]) for name in data)

    def _new_slot(self, name: str) -> int:
        slot = self.n_slots
        self.n_slots += 1
        self.slots[name] = slot
        return slot

    def _constant_slot(self, name: str, constant: gs.Constant) -> int:
        slot = self._new_slot(name)
        self.constants[slot] = constant
        return slot

    def _host_constant_slot(self, name: str, constant: gs.Constant) -> int:
        if name not in self._host_slots:
            self._host_slots[name] = self.n_slots
            self.host_constants[self.n_slots] = constant
            self.n_slots += 1
        return self._host_slots[name]
