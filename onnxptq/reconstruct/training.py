"""Learning one pack: its quantized outputs are drawn to the float ones.

    loss = noise over signal (:mod:`onnxptq.reconstruct.objective`)
           + decision / P * indecision(beta)                    AdaRound only; P = sum over o of channels * V_o

so that AdaRound's term weighs as much as beside the published sum of squares over channels. beta falls from 20 to 2
after the warm-up.

Weights near the boundary between two integers swing from one to the other with the steps (Nagel et al., arXiv
2203.11086), and where the last step leaves them is chance. So all that is learnt is averaged on the way, over about
1 / ``_AVERAGED`` steps, and samples that judge choose between the average and what the last step left.

Learning rates fall to 0 along a cosine. With effort ``paper`` that of AdaRound's latents is constant, as published.

Where the easy samples come first (the curriculum of AIQViT, arXiv 2502.04628), step t of T draws from the share
min(1, 0.5 + 0.5 t / T) of the samples with the lowest loss, which is measured ``RANKINGS`` times on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from onnxptq.lowering.network import Values
from onnxptq.memory import SLACK, return_memory
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.objective import Norms, Objective, noise_over_signal, norms_of
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.suffix import Suffix

RANKINGS = 10
"""How often samples are ranked anew where the easy ones come first."""

_SLACK = 4 * SLACK
"""Bytes of freed memory that stay: the next step needs them again."""

_AVERAGED = 0.05
"""Share of the last step in the running average of what is learnt."""

_LOWEST_GAIN = 0.005
"""A judgement that improves by less counts as flat."""


def train(
    data: PackData,
    learned: PackQuantizers,
    settings: Learning,
    generator: torch.Generator,
    suffix: Suffix | None = None,
    *,
    order: Sequence[int] | None = None,
    tick: Callable[[], None] | None = None,
) -> tuple[float, float, int]:
    """Learn in place; the state that was judged best remains.

    Args:
        suffix: what follows the pack, where the network's outputs count as well.
        order: all samples, of which the first judge and the others teach; None draws it.
        tick: called after every step.

    Returns:
        The local loss before and after, and the steps that were taken: none where the pack writes integers only, or
        no gradient reaches what could learn.
    """
    if order is None:
        order = torch.randperm(len(data), generator=generator).tolist()
    held_out = settings.judges(len(data))
    judges, pupils = order[:held_out], order[held_out:]
    norms = norms_of(data, judges or pupils)
    if not norms.variance:
        return 0.0, 0.0, 0
    objective = Objective(data, norms, suffix)
    # An undecided AdaRound weight is closer to the float one than what would be hardened now.
    with learned.hard():
        best = objective.begin(judges or pupils)
    before = after = objective.start[0]
    best_state, averaged, stale, done = learned.state(), learned.state(), 0, 0
    optimizer = torch.optim.Adam(learned.groups(settings))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    every = max(1, settings.steps // settings.checks)
    for chosen in _lessons(data, learned, pupils, norms, settings, generator):
        optimizer.zero_grad(set_to_none=True)
        masks = _seeds(chosen, generator) if settings.mixing > 0.0 else {}
        with learned.once():
            for part in data.chunks(chosen):
                found = data.module(_mixed(data, part, settings.mixing, masks))
                loss = objective(found, part) * (len(part) / len(chosen))
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        data.ranks.sum_gradients(parameters_of(optimizer))
        if not any(parameter.grad is not None for parameter in parameters_of(optimizer)):
            # Operators that no gradient passes stand between all that could learn and what is compared.
            break
        beta = _sharpness(done / settings.steps, settings)
        if beta is not None:
            undecided = learned.indecision(beta) * (settings.decision / norms.positions)
            undecided.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        _hold_constant(optimizer)
        if judges:
            _move_towards(averaged, learned.parameters())
        return_memory(_SLACK)
        done += 1
        if tick is not None:
            tick()
        if judges and done % every == 0:
            seen, local, state = _better(learned, averaged, objective, judges)
            stale = 0 if seen < (1.0 - _LOWEST_GAIN) * best else stale + 1
            if seen < best:
                best, after, best_state = seen, local, state
            if stale >= settings.patience:
                break
    if not judges:
        with learned.hard():
            return before, objective.measured(pupils)[0], done
    learned.restore(best_state)
    return before, after, done


@torch.no_grad()
def _move_towards(averaged: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """Move a running average, in place."""
    for average, parameter in zip(averaged, parameters, strict=True):
        average.lerp_(parameter, _AVERAGED)


def _better(
    learned: PackQuantizers, averaged: Sequence[torch.Tensor], objective: Objective, judges: Sequence[int]
) -> tuple[float, float, list[torch.Tensor]]:
    """The loss and the local loss of what is learnt or of its average, whichever judges prefer, and that state; what
    is learnt stays as it is."""
    found = []
    current = learned.state()
    for state in (current, [average.clone() for average in averaged]):
        learned.restore(state)
        with learned.hard():
            local, distant = objective.measured(judges)
        found.append((objective.combined(local, distant), local, state))
    learned.restore(current)
    return min(found, key=lambda entry: entry[0])


def _hold_constant(optimizer: torch.optim.Optimizer) -> None:
    """Take the schedule back where rates are constant."""
    for group in optimizer.param_groups:
        if group["is_constant"]:
            group["lr"] = group["initial_lr"]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """What an optimizer moves, in a fixed order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _lessons(
    data: PackData,
    learned: PackQuantizers,
    pupils: Sequence[int],
    norms: Norms,
    settings: Learning,
    generator: torch.Generator,
) -> Iterator[list[int]]:
    """The samples of every step, each drawn from those that are open to it."""
    size = batch_size(settings, len(pupils), settings.steps)
    stages = RANKINGS if settings.is_easy_first else 1
    bounds = [settings.steps * stage // stages for stage in range(stages + 1)]
    for begin, end in pairwise(bounds):
        known = pupils
        if settings.is_easy_first and begin < end:
            known = _easiest(data, learned, pupils, norms, 0.5 + 0.5 * begin / settings.steps)
        yield from draws(known, size, end - begin, generator)


@torch.no_grad()
def _easiest(
    data: PackData, learned: PackQuantizers, pupils: Sequence[int], norms: Norms, share: float
) -> list[int]:
    """The ``share`` of the pupils whose loss is lowest now, rounded up; of equal ones the first."""
    own: dict[int, float] = {}
    with learned.hard():
        for part in data.chunks(pupils):
            found = data.apart(data.module(data.quantized(part)), part)
            wanted = data.apart(data.targets(part), part)
            each = (float(noise_over_signal(*both, norms)) for both in zip(found, wanted, strict=True))
            own.update(zip(part, each, strict=True))
    losses = {number: loss for part in data.ranks.gather(own) for number, loss in part.items()}
    order = sorted(range(len(pupils)), key=lambda i: (losses[pupils[i]], i))
    return [pupils[i] for i in order[: math.ceil(share * len(pupils))]]


def batch_size(settings: Learning, count: int, steps: int) -> int:
    """Samples per step, so that ``steps`` take each of ``count`` samples no more often than the settings allow."""
    if settings.passes is None:
        return settings.batch
    return min(settings.batch, max(1, round(settings.passes * count / max(1, steps))))


def draws(pupils: Sequence[int], batch: int, steps: int, generator: torch.Generator) -> list[list[int]]:
    """The samples of every step: each pass takes all of them, in a new order."""
    size = min(batch, len(pupils))
    queue: list[int] = []
    while len(queue) < size * steps:
        queue.extend(pupils[i] for i in torch.randperm(len(pupils), generator=generator).tolist())
    return [queue[i * size : (i + 1) * size] for i in range(steps)]


def _sharpness(progress: float, settings: Learning) -> float | None:
    if settings.weights != "adaround" or progress < settings.warm_up:
        return None
    return 20.0 - 18.0 * (progress - settings.warm_up) / (1.0 - settings.warm_up)


def _seeds(chosen: Sequence[int], generator: torch.Generator) -> Mapping[int, int]:
    """A seed per sample, so that masks depend neither on passes nor on processes."""
    drawn = torch.randint(1 << 62, (len(chosen),), generator=generator).tolist()
    return dict(zip(chosen, drawn, strict=True))


def _mixed(data: PackData, chosen: Sequence[int], probability: float, seeds: Mapping[int, int]) -> Values:
    quantized = data.quantized(chosen)
    if probability <= 0.0:
        return quantized
    generators = [torch.Generator().manual_seed(seeds[i]) for i in chosen]
    floats = data.float_inputs(chosen)
    mixed = {}
    for name, value in quantized.items():
        shapes = [part[name].shape for part in data.apiece(chosen)]
        drawn = [torch.rand(shape, generator=g) for shape, g in zip(shapes, generators, strict=True)]
        is_float = (torch.cat(drawn) if len(chosen) > 1 else drawn[0]) < probability
        mixed[name] = torch.where(is_float.to(value.device), floats[name], value)
    return mixed
