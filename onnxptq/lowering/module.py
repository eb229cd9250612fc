"""A sub-range of an ONNX graph as a differentiable torch module.

``lower(graph, inputs=..., outputs=...)`` executes only the nodes between the two, on tensors that keep
their ONNX names. Every read of a tensor by a node (an *edge*, see ``types.Site``) can pass through a hook;
initializers are buffers that share the file's memory until ``parameters_for`` turns them into parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch

from onnxptq.errors import UnsupportedOperatorError
from onnxptq.lowering.dtypes import tensor_of
from onnxptq.lowering.program import ABSENT, Hook, Program, Step, compile_program
from onnxptq.lowering.registry import Declined
from onnxptq.types import GRAPH_OUTPUT


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """The steps for one set of fetched tensors; ``frees[i]`` are the slots that nobody reads after step i."""

    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    feeds: tuple[tuple[str, int], ...]
    constants: tuple[tuple[int, str], ...]
    fetches: tuple[tuple[str, int], ...]


class LoweredModule(torch.nn.Module):
    """The torch form of a sub-range of a graph. Build it with ``lower``.

    Inference semantics throughout (normalization uses its stored statistics, dropout is the identity),
    whatever ``train()`` says. Results are deterministic on the CPU.
    """

    def __init__(self, program: Program, *, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._program = program
        self._slot_names = {slot: name for name, slot in program.slots.items()}
        self._steps_by_name = {step.name: step for step in program.steps}
        self._output_hooks: dict[str, Hook] = {}
        self._plans: dict[tuple[str, ...], _Plan] = {}
        # Buffer names may not hold dots, and ONNX names are full of them.
        self._keys = {self._slot_names[slot]: f"constant_{slot}" for slot in program.constants}
        self._host_values = {
            slot: _load(constant, constant.name) for slot, constant in program.host_constants.items()
        }
        for slot, constant in program.constants.items():
            name = self._slot_names[slot]
            self.register_buffer(self._keys[name], _load(constant, name), persistent=False)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that are executed, in order."""
        return tuple(step.name for step in self._program.steps)

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the initializers that the nodes read as tensors."""
        return tuple(self._keys)

    @property
    def sites(self) -> tuple[tuple[str, str, int], ...]:
        """Every edge that accepts a hook, as (tensor, consumer, input index)."""
        return tuple((tensor, consumer, i) for (consumer, i), tensor in self._program.sites.items())

    def constant(self, name: str) -> torch.Tensor:
        """The tensor of initializer ``name``: its parameter if it has become one, else the shared buffer.

        Raises:
            KeyError: the nodes read no such initializer.
        """
        key = self._keys[name]
        parameter = self._parameters.get(key)
        if parameter is not None:
            return parameter
        buffer = self._buffers[key]
        assert buffer is not None
        return buffer

    def parameters_for(self, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
        """Turn initializers into trainable parameters (their own copy of the values) and return them by name.

        Names that are parameters already are returned as they are.

        Raises:
            KeyError: the nodes read no such initializer as a tensor.
            ValueError: the initializer does not hold floats.
        """
        found: dict[str, torch.nn.Parameter] = {}
        for name in names:
            key = self._keys[name]
            value = self.constant(name)
            if not isinstance(value, torch.nn.Parameter):
                if not value.is_floating_point():
                    raise ValueError(f"initializer {name!r} holds {value.dtype}; only floats can be trained")
                value = torch.nn.Parameter(value.detach().clone())
                del self._buffers[key]
                self._non_persistent_buffers_set.discard(key)
                self.register_parameter(key, value)
            found[name] = value
        return found

    def set_hook(self, site_tensor: str, consumer: str, input_index: int, fn: Hook | None) -> None:
        """Make input ``input_index`` of ``consumer`` read ``fn(value of site_tensor)``; None removes it.

        With ``consumer`` GRAPH_OUTPUT the hook applies to what ``forward`` returns for ``site_tensor``
        (the index is ignored); nodes that read the tensor are not affected.

        Raises:
            ValueError: there is no such edge here, or its constant value was built into the operation
                (shapes, axes and similar).
        """
        if consumer == GRAPH_OUTPUT:
            if site_tensor not in self.outputs:
                raise ValueError(f"tensor {site_tensor!r} is no output of this range")
            hooks: dict[str, Hook] = self._output_hooks
            if fn is None:
                hooks.pop(site_tensor, None)
            else:
                hooks[site_tensor] = fn
            return
        if self._program.sites.get((consumer, input_index)) != site_tensor:
            raise ValueError(
                f"input {input_index} of node {consumer!r} is no hookable read of {site_tensor!r}"
            )
        step = self._steps_by_name[consumer]
        if fn is None:
            step.hooks.pop(input_index, None)
        else:
            step.hooks[input_index] = fn

    def set_branch(self, node: str, fn: Hook) -> None:
        """Add ``fn`` of what ``node`` reads as its first input, hooks applied, to its one output.

        Raises:
            ValueError: no such node is executed here.
        """
        step = self._steps_by_name.get(node)
        if step is None:
            raise ValueError(f"node {node!r} is not executed in this range")
        step.branch = fn

    def clear_hooks(self) -> None:
        """Remove every hook and branch."""
        self._output_hooks.clear()
        for step in self._program.steps:
            step.hooks.clear()
            step.branch = None

    def forward(
        self, feed: Mapping[str, torch.Tensor], *, fetch: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the nodes that ``fetch`` needs.

        Args:
            feed: one tensor for each input that the fetched tensors depend on; more is allowed.
            fetch: any tensors between the inputs and the outputs, by default the outputs.

        Raises:
            ValueError: a needed input is missing from ``feed``, or a fetched tensor does not exist here.
        """
        plan = self._plan_for(self.outputs if fetch is None else tuple(fetch))
        values: list[torch.Tensor | None] = [None] * self._program.n_slots
        device = self._fill(plan, values, feed)
        for step, frees in plan.steps:
            _execute(step, values, device)
            for slot in frees:
                values[slot] = None
        found: dict[str, torch.Tensor] = {}
        for name, slot in plan.fetches:
            value = values[slot]
            assert value is not None
            hook = self._output_hooks.get(name)
            found[name] = value if hook is None else hook(value)
        return found

    def walk(self, feed: Mapping[str, torch.Tensor]) -> Walk:
        """A run towards the outputs that stops where it is asked to.

        Args:
            feed: one tensor for each input that the outputs depend on.

        Raises:
            ValueError: one of them is missing.
        """
        plan = self._plan_for(self.outputs)
        values: list[torch.Tensor | None] = [None] * self._program.n_slots
        device = self._fill(plan, values, feed)
        own = {*self._host_values, *(slot for slot, _ in plan.constants)}
        return Walk(plan.steps, values, device, self._program.slots, own)

    def _fill(
        self, plan: _Plan, values: list[torch.Tensor | None], feed: Mapping[str, torch.Tensor]
    ) -> torch.device | None:
        """Put constants and fed tensors into their slots; the device to move to, None on the CPU."""
        for slot, value in self._host_values.items():
            values[slot] = value
        parameters, buffers = self._parameters, self._buffers
        device: torch.device | None = None
        for slot, key in plan.constants:
            constant = buffers[key] if key in buffers else parameters[key]
            values[slot] = constant
            if constant is not None and constant.device.type != "cpu":
                device = constant.device
        for name, slot in plan.feeds:
            if name not in feed:
                raise ValueError(f"no value is fed for tensor {name!r}")
            values[slot] = feed[name]
            if feed[name].device.type != "cpu":
                device = feed[name].device
        return device

    def _plan_for(self, fetch: tuple[str, ...]) -> _Plan:
        plan = self._plans.get(fetch)
        if plan is None:
            plan = self._plans[fetch] = self._make_plan(fetch)
        return plan

    def _make_plan(self, fetch: tuple[str, ...]) -> _Plan:
        slots = self._program.slots
        unknown = [name for name in fetch if name not in slots]
        if unknown:
            raise ValueError(f"tensor {unknown[0]!r} is not computed in this range")
        fetched = {slots[name] for name in fetch}
        live = set(fetched)
        chosen: list[tuple[Step, tuple[int, ...]]] = []
        kept = set(self._program.constants) | set(self._program.host_constants) | {ABSENT}
        for step in reversed(self._program.steps):
            writes = {slot for slot in step.writes if slot != ABSENT}
            if not writes & live:
                continue
            dead = (writes | set(step.reads)) - live - kept
            chosen.append((step, tuple(sorted(dead))))
            live -= writes
            live |= set(step.reads)
        constants = self._program.constants
        return _Plan(
            steps=tuple(reversed(chosen)),
            feeds=tuple((name, slots[name]) for name in self.inputs if slots[name] in live),
            constants=tuple((slot, self._keys[self._slot_names[slot]]) for slot in constants if slot in live),
            fetches=tuple((name, slots[name]) for name in fetch),
        )


class Walk:
    """A run of a module that stops at inner tensors and goes on from there, with the hooks that nodes then have.

    Build it with :meth:`LoweredModule.walk`.
    """

    def __init__(
        self,
        steps: Sequence[tuple[Step, tuple[int, ...]]],
        values: list[torch.Tensor | None],
        device: torch.device | None,
        slots: Mapping[str, int],
        constants: Collection[int],
    ) -> None:
        self._steps = iter(steps)
        self._values = values
        self._device = device
        self._slots = slots
        self._constants = constants

    def reach(self, tensor: str) -> torch.Tensor:
        """The value of a tensor, once the nodes up to the one that writes it have run.

        Raises:
            ValueError: the outputs do not depend on it, or the last node that reads it has run.
        """
        slot = self._slots[tensor]
        while self._values[slot] is None:
            step, frees = next(self._steps, (None, ()))
            if step is None:
                raise ValueError(f"tensor {tensor!r} is not on the way any more")
            _execute(step, self._values, self._device)
            for free in frees:
                self._values[free] = None
        value = self._values[slot]
        assert value is not None
        return value

    @property
    def held_bytes(self) -> int:
        """Memory of the values that nodes still to be run will read, what was fed included."""
        held = (v for slot, v in enumerate(self._values) if v is not None and slot not in self._constants)
        storages = (value.untyped_storage() for value in held)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _execute(step: Step, values: list[torch.Tensor | None], device: torch.device | None) -> None:
    """Run one node, with its hooks and its branch, on the values in their slots."""
    args = [values[i] for i in step.reads]
    if device is not None:
        _move(step, args, device)
    for i, fn in step.hooks.items():
        value = args[i]
        assert value is not None
        args[i] = fn(value)
    try:
        result = step.kernel(*args)
    except Exception as error:
        error.add_note(f"in node {step.name!r} ({step.op})")
        raise
    if step.branch is not None:
        read = args[0]
        assert read is not None
        assert not isinstance(result, tuple)
        result = result + step.branch(read)
    if isinstance(result, tuple):
        for slot, value in zip(step.writes, result, strict=False):
            values[slot] = value
        values[ABSENT] = None
    else:
        values[step.writes[0]] = result


def lower(graph: gs.Graph, *, inputs: Sequence[str], outputs: Sequence[str]) -> LoweredModule:
    """The nodes of ``graph`` between ``inputs`` and ``outputs`` as a torch module.

    Args:
        graph: a graph whose nodes are sorted and uniquely named; it is not changed. Subgraph-carrying
            operators are not lowered.
        inputs: tensors that the caller will feed (graph inputs or any inner tensors).
        outputs: tensors that the caller wants.

    Raises:
        UnsupportedOperatorError: a needed node cannot be lowered; raised before any value is loaded.
        ValueError: ``outputs`` need a graph input that is not among ``inputs``.
    """
    return LoweredModule(
        compile_program(graph, inputs=inputs, outputs=outputs), inputs=inputs, outputs=outputs
    )


def _load(constant: gs.Constant, name: str) -> torch.Tensor:
    try:
        return tensor_of(constant.values)
    except Declined as reason:
        raise UnsupportedOperatorError(f"Initializer {name!r} cannot be used by torch: {reason}") from None


def _move(step: Step, args: list[torch.Tensor | None], device: torch.device) -> None:
    for i in step.to_device:
        value = args[i]
        args[i] = None if value is None else value.to(device)
    for i in step.to_host:
        value = args[i]
        args[i] = None if value is None else value.cpu()
