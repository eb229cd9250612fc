"""From calibration statistics to the parameters of every activation quantizer of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from onnxptq.calibrate.observers import Observer, choose_qparams
from onnxptq.calibrate.run import Calibration
from onnxptq.types import QParams, Quantizer, QuantPlan


def choose_ranges(
    plan: QuantPlan, calibration: Calibration, observer: Observer, overrides: Mapping[str, Observer] | None = None
) -> dict[str, QParams]:
    """Parameters of every activation quantizer, by quantizer id.

    Quantizers of one scale group share the parameters of the member with the widest range: the others hold
    a subset of its values, or are joined to it.

    Args:
        overrides: observers of single tensors, by tensor name; a group follows its widest member.
    """
    overrides = overrides or {}
    groups: dict[str, list[Quantizer]] = {}
    for quantizer in plan.quantizers:
        if quantizer.role == "activation":
            groups.setdefault(quantizer.scale_group, []).append(quantizer)
    result: dict[str, QParams] = {}
    for members in groups.values():
        leader = max(members, key=lambda q: (calibration.statistics[q.tensor].absmax, q.quantizer_id))
        qparams = choose_qparams(
            calibration.statistics[leader.tensor],
            leader.qtype,
            symmetric=leader.symmetric,
            observer=overrides.get(leader.tensor, observer),
        )
        result.update({q.quantizer_id: qparams for q in members})
    return result
