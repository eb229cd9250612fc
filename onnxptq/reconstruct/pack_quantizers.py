"""Everything that is learnt in one pack, hooked into its lowered form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from onnxptq.graph.attention import find_attention
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.lowering import LoweredModule
from onnxptq.lowering.quantized import quantizers_by_edge, quantizing_hooks, set_hooks
from onnxptq.quantizers.affine import largest_scale
from onnxptq.quantizers.focusing import FocusedActivation, can_focus
from onnxptq.quantizers.low_rank import Factors, LowRankWeight
from onnxptq.quantizers.trainable import (
    AdaRoundWeight,
    KeptWeight,
    LearnedActivation,
    LearnedWeight,
    ScaledWeight,
    StraightThroughWeight,
)
from onnxptq.reconstruct.learning import Learning
from onnxptq.types import FloatArray, Pack, PerTensor, QParams, Quantizer, QuantPlan, Solution


@dataclass(slots=True)
class _Bias:
    """A bias b + u d, with u its root mean square and d learnt from 0."""

    start: torch.Tensor
    unit: float
    change: torch.nn.Parameter

    def value(self) -> torch.Tensor:
        return self.start + self.unit * self.change


class _Made:
    """A constant of the network that is made of what is learnt: at every read, or once for all of them."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make
        self._made: torch.Tensor | None = None
        self._held: torch.Tensor | None = None

    def __call__(self, _: torch.Tensor) -> torch.Tensor:
        """In place of the constant that the file holds."""
        return self._make() if self._held is None else self._held

    def hold(self) -> None:
        """Make it; reads are of this from now on."""
        self._made = self._make()
        self._held = self._made.detach().requires_grad_(self._made.requires_grad)

    def release(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What was made, and its gradient where there is one; reads make it anew from now on."""
        made, held, self._made, self._held = self._made, self._held, None, None
        return None if made is None or held is None or held.grad is None else (made, held.grad)


class PackQuantizers:
    """The trainable quantizers and biases of one pack. Making it puts hooks on ``module``.

    What several packs share (a weight read in both, a scale group with members in both) is learnt in the
    first of them: ``settled`` names the quantizers that are not to move any more. Weights with ``corrections``
    are learnt through these.
    """

    def __init__(
        self,
        index: GraphIndex,
        pack: Pack,
        module: LoweredModule,
        plan: QuantPlan,
        solution: Solution,
        settings: Learning,
        *,
        settled: Collection[str],
        corrections: Mapping[str, Sequence[Factors]] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._plan, self._solution = plan, solution
        self.weights: dict[str, LearnedWeight] = {}
        self.activations: dict[str, LearnedActivation | FocusedActivation] = {}
        self._biases: dict[str, _Bias] = {}
        self._ids: dict[str, str] = {}
        self._constants: dict[str, _Made] = {}
        tensors = index.graph.tensors()
        quantizer_at = quantizers_by_edge(plan)
        focused = _softmax_edges(index) if settings.focuses_softmax else frozenset()
        set_hooks(module, quantizing_hooks(index.graph, pack, plan, solution))
        for site in pack.sites:
            edge = (site.tensor, site.consumer, site.input_index)
            quantizer = quantizer_at.get(edge)
            if quantizer is None or quantizer.role == "bias" or quantizer.quantizer_id in settled:
                continue
            qparams = solution.qparams[quantizer.quantizer_id]
            if quantizer.role == "weight":
                if quantizer.quantizer_id not in self._ids:
                    value = np.asarray(tensors[site.tensor].values, np.float32)
                    start = np.asarray(solution.weights.get(site.tensor, value), np.float32)
                    candidates = (corrections or {}).get(site.tensor, ())
                    learned = _weight(value, start, qparams, settings, candidates)
                    self.weights[site.tensor] = learned.to(device)
                    self._ids[quantizer.quantizer_id] = site.tensor
                    self._constants[site.tensor] = _Made(self.weights[site.tensor])
                module.set_hook(*edge, self._constants[site.tensor])
            elif isinstance(qparams.granularity, PerTensor) and settings.activation_scale_rate > 0.0:
                activation = self.activations.get(quantizer.scale_group)
                if activation is None:
                    wants_focus = (site.consumer, site.input_index) in focused
                    activation = _activation(plan, quantizer, qparams, wants_focus=wants_focus).to(device)
                    self.activations[quantizer.scale_group] = activation
                module.set_hook(*edge, activation)
        if settings.bias_rate > 0.0:
            self._add_biases(index, pack, module, device)

    def _add_biases(
        self, index: GraphIndex, pack: Pack, module: LoweredModule, device: str | torch.device
    ) -> None:
        own = set(pack.nodes)
        for layer in find_linears(index):
            bias, node = layer.bias, layer.bias_node
            if bias is None or node is None or layer.bias_index is None or node.name not in own:
                continue
            if layer.weight.name not in self.weights or len(index.uses(bias.name)) != 1:
                continue
            start = np.asarray(self._solution.weights.get(bias.name, bias.values), np.float32)
            unit = float(np.sqrt(np.mean(np.square(start, dtype=np.float64))))
            if unit == 0.0 or not np.isfinite(unit):
                continue
            learned = _Bias(
                torch.from_numpy(np.array(start)).to(device),
                unit,
                torch.nn.Parameter(torch.zeros(start.shape, device=device)),
            )
            self._biases[bias.name] = learned
            self._constants[bias.name] = _Made(learned.value)
            module.set_hook(bias.name, node.name, layer.bias_index, self._constants[bias.name])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not self.weights and not self.activations

    def groups(self, settings: Learning) -> list[dict[str, object]]:
        """Parameters with their learning rates, as a torch optimizer takes them, and whether these stay constant."""
        stays = settings.weights == "adaround" and not settings.anneals_rounding
        weights = list(self.weights.values())
        scales = [w.scale.log for w in weights if isinstance(w, ScaledWeight)]
        found: Iterable[tuple[list[torch.nn.Parameter], float, bool]] = (
            ([p for w in weights for p in w.latents], settings.latent_rate, stays),
            (scales, settings.weight_scale_rate, False),
            (
                [p for a in self.activations.values() for p in a.parameters()],
                settings.activation_scale_rate,
                False,
            ),
            ([b.change for b in self._biases.values()], settings.bias_rate, False),
        )
        return [
            {"params": params, "lr": rate, "is_constant": is_constant}
            for params, rate, is_constant in found
            if params and rate > 0.0
        ]

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is learnt, in a fixed order."""
        weights = [p for w in self.weights.values() for p in w.parameters() if p.requires_grad]
        scales = [p for a in self.activations.values() for p in a.parameters()]
        return [*weights, *scales, *(b.change for b in self._biases.values())]

    def state(self) -> list[torch.Tensor]:
        """A copy of all that is learnt."""
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go back to a former ``state``."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)

    @contextmanager
    def hard(self) -> Iterator[None]:
        """Within it the pack computes with the weights as ``hardened`` would leave them; nothing may be learnt."""
        for weight in self.weights.values():
            weight.eval()
        try:
            with torch.no_grad(), self.once():
                yield
        finally:
            for weight in self.weights.values():
                weight.train()

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within it all passes read the same weights and biases, made once; at its end the sums of their gradients go
        on to what they are made of."""
        constants = self._constants.values()
        try:
            for constant in constants:
                constant.hold()
            yield
        finally:
            found = [pair for constant in constants if (pair := constant.release()) is not None]
        if found:
            made, gradients = zip(*found, strict=True)
            torch.autograd.backward(made, gradients)

    def indecision(self, beta: float) -> torch.Tensor:
        """AdaRound's regulariser, summed over the weights; zero without any."""
        parts = [w.indecision(beta) for w in self.weights.values() if isinstance(w, AdaRoundWeight)]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def hardened(self) -> Solution:
        """The solution with what was learnt here in it; biases that inherit their scale do not follow yet."""
        qparams: dict[str, QParams] = dict(self._solution.qparams)
        weights = dict(self._solution.weights)
        by_tensor: Mapping[str, str] = {tensor: i for i, tensor in self._ids.items()}
        for tensor, learned in self.weights.items():
            qparams[by_tensor[tensor]], weights[tensor] = learned.hardened()
        for quantizer in self._plan.quantizers:
            activation = self.activations.get(quantizer.scale_group)
            if quantizer.role == "activation" and activation is not None:
                qparams[quantizer.quantizer_id] = activation.hardened()
        for name, bias in self._biases.items():
            weights[name] = bias.value().detach().cpu().numpy()
        return replace(self._solution, qparams=qparams, weights=weights)

    def learned_ids(self) -> set[str]:
        """Quantizers that are settled once this pack is learnt."""
        groups = set(self.activations)
        return set(self._ids) | {q.quantizer_id for q in self._plan.quantizers if q.scale_group in groups}


def unfocused(index: GraphIndex, plan: QuantPlan, solution: Solution) -> tuple[str, ...]:
    """Of each read of softmax weights whose range has no two ends to learn, the reason."""
    quantizer_at = {(site.consumer, site.input_index): q for q in plan.quantizers for site in q.sites}
    found = []
    for edge in sorted(_softmax_edges(index)):
        quantizer = quantizer_at.get(edge)
        if quantizer is None:
            found.append("the product that reads it stays in float")
        elif not can_focus(solution.qparams[quantizer.quantizer_id]):
            bits = quantizer.qtype.bits
            found.append(
                f"{plan.target} has no zero points"
                if quantizer.symmetric
                else f"a grid of {bits} bits has no integers left to begin above 0"
            )
    return tuple(found)


def _softmax_edges(index: GraphIndex) -> frozenset[tuple[str, int]]:
    """Node and input of every read of softmax weights, or of their roots."""
    return frozenset(found.edge for found in find_attention(index))


def _activation(
    plan: QuantPlan, quantizer: Quantizer, qparams: QParams, *, wants_focus: bool
) -> LearnedActivation | FocusedActivation:
    """Both ends are learnt where that is wanted, and where the grid begins above 0 already."""
    if can_focus(qparams) and (wants_focus or int(qparams.zero_point) < qparams.qtype.qmin):
        return FocusedActivation(qparams)
    members = [q for q in plan.quantizers if q.scale_group == quantizer.scale_group]
    return LearnedActivation(qparams, min(largest_scale(member, qparams) for member in members))


def _weight(
    value: FloatArray,
    start: FloatArray,
    qparams: QParams,
    settings: Learning,
    candidates: Sequence[Factors],
) -> LearnedWeight:
    learn_scale = settings.weight_scale_rate > 0.0
    if candidates:
        # The closed form has moved the weight by the correction, which is learnt here: it counts once.
        return LowRankWeight(value, value, qparams, candidates, learn_scale=learn_scale)
    if settings.weights == "kept":
        return KeptWeight(start, qparams, learn_scale=learn_scale)
    if settings.weights == "adaround":
        return AdaRoundWeight(value, start, qparams)
    return StraightThroughWeight(value, start, qparams, learn_scale=learn_scale)
