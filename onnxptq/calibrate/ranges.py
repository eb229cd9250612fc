"""From calibration statistics to the parameters of every activation quantizer of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxptq.calibrate.observers import Observer, choose_qparams
from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.statistics import TensorStatistics, combined
from onnxptq.types import QParams, Quantizer, QuantPlan


def choose_ranges(
    plan: QuantPlan,
    calibration: Calibration,
    observer: Observer,
    overrides: Mapping[str, Observer] | None = None,
) -> dict[str, QParams]:
    """Parameters of every activation quantizer, by quantizer id.

    Quantizers of one scale group share parameters: those of the member that holds all values of the others
    (the tensor in front of data movement, or behind a Concat), or else of all members taken together.

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
        statistics = {q.tensor: calibration.statistics[q.tensor] for q in members}
        widest = max(statistics, key=lambda name: (*_extent(statistics[name]), name))
        leader = next(q for q in members if q.tensor == widest)
        qparams = choose_qparams(
            _covering(statistics[widest], list(statistics.values())),
            leader.qtype,
            symmetric=leader.symmetric,
            observer=overrides.get(widest, observer),
            bounds=leader.bounds,
        )
        result.update({q.quantizer_id: qparams for q in members})
    return result


def _extent(s: TensorStatistics) -> tuple[float, int]:
    """Width of the range with 0 in it, then the number of values behind it."""
    return max(s.maximum, 0.0) - min(s.minimum, 0.0), s.elements


def _covering(widest: TensorStatistics, members: Sequence[TensorStatistics]) -> TensorStatistics:
    if all(widest.minimum <= m.minimum and m.maximum <= widest.maximum for m in members):
        return widest
    return combined(members)
