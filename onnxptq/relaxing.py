"""Leaving in float what quantization cannot serve: the few nodes that alone spoil the network's outputs.

Noise of different nodes adds up nearly independently, so with n_i the output noise (relative to the signal)
of quantizing node i alone, the nodes are taken out from the worst on until the rest stays within the
noise that the floor allows. Everything taken out is reported with what it would have cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from onnxptq.types import Progress, QuantPlan, Solution, started

Score = Callable[[QuantPlan, Solution], float]
"""Quality in dB of a plan under a solution."""

LARGEST_SHARE = 0.2
"""Of the quantized nodes at most this share is taken out, but always one; a network that needs more is not rescued
so, save from nodes that spoil it by themselves."""

_SPOILING_SHARE = 0.5
"""A node that makes more than this share of the noise is taken out even where the floor stays out of reach."""


def measure_noise(
    plan_of: Callable[[str], QuantPlan],
    nodes: Sequence[str],
    solution: Solution,
    score: Score,
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """The output noise, relative to the signal, of quantizing each of ``nodes`` alone.

    Args:
        plan_of: the plan that quantizes one node alone.
        solution: of the whole plan; its parameters serve the single-node plans.
    """
    tick = started(progress, "rank nodes", len(nodes))
    noise: dict[str, float] = {}
    for node in nodes:
        plan = plan_of(node)
        # What is only quantized together with its neighbours makes no noise of its own.
        noise[node] = _noise(score(*_restricted(plan, solution))) if plan.quantizers else 0.0
        tick()
    return noise


def find_relaxation(
    noise: Mapping[str, float], declined: Collection[str], *, floor: float, reached: float
) -> Mapping[str, str]:
    """More nodes to leave in float so that the outputs reach ``floor`` dB, each with its reason.

    Where that would take too many of them, those that each make most of the noise that the worse ones leave.

    Args:
        noise: of every node, as :func:`measure_noise` found it.
        declined: those that are in float already.
        reached: quality without quantizing ``declined``, in dB.
    """
    quantized = {node: own for node, own in noise.items() if node not in declined}
    # The single noises explain the whole up to a factor, which the rest is assumed to keep.
    left = sum(quantized.values())
    factor = _noise(reached) / max(left, 1e-30)
    room = max(1, math.floor(LARGEST_SHARE * len(noise))) - len(declined) if len(noise) > 1 else 0
    found: dict[str, str] = {}
    spoiling, spoils = 0, True
    for node in sorted(quantized, key=lambda name: (-noise[name], name)):
        if left * factor <= _noise(floor):
            break
        spoils = spoils and noise[node] > _SPOILING_SHARE * left
        spoiling += spoils
        found[node] = (
            f"left in float: quantized alone it leaves {_decibel(noise[node]):.1f} dB at the output, "
            f"and the outputs stayed below {floor:g} dB"
        )
        left -= noise[node]
    if len(found) <= room:
        return found
    return {node: found[node] for node in list(found)[: max(0, min(spoiling, room))]}


def _restricted(plan: QuantPlan, solution: Solution) -> tuple[QuantPlan, Solution]:
    """The quantizers of ``plan`` that ``solution`` knows, and the new values of their weights alone."""
    known = tuple(q for q in plan.quantizers if q.quantizer_id in solution.qparams)
    touched = {q.tensor for q in known}
    weights = {name: value for name, value in solution.weights.items() if name in touched}
    return QuantPlan(target=plan.target, quantizers=known), replace(solution, weights=weights)


def _noise(decibel: float) -> float:
    return float(10.0 ** (-decibel / 10.0))


def _decibel(noise: float) -> float:
    return -10.0 * math.log10(max(noise, 1e-30))
