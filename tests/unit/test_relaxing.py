"""Which nodes are left in float, on made-up noises."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from onnxptq.relaxing import find_relaxation, measure_noise
from onnxptq.types import PerTensor, QParams, QType, Quantizer, QuantPlan, Solution

NOISE = {
    "a": 1e-2,
    "b": 4e-2,
    "c": 1e-4,
    "d": 2e-4,
    "e": 1e-4,
    "f": 1e-5,
    "g": 1e-5,
    "h": 1e-5,
    "i": 1e-5,
    "j": 1e-5,
}


def _plan(node: str) -> QuantPlan:
    quantizer = Quantizer(
        quantizer_id=node, tensor=node, role="weight", qtype=QType.signed(8), granularity=PerTensor(),
        symmetric=True, sites=(), scale_group=node,
    )  # fmt: skip
    return QuantPlan(target="t", quantizers=(quantizer,))


def _solution() -> Solution:
    qparams = QParams(
        scale=np.ones((), np.float32),
        zero_point=np.zeros((), np.int32),
        qtype=QType.signed(8),
        granularity=PerTensor(),
    )
    return Solution(
        qparams=dict.fromkeys(NOISE, qparams), weights={n: np.full(1, i) for i, n in enumerate(NOISE)}
    )


def _score(plan: QuantPlan, solution: Solution) -> float:
    (quantizer,) = plan.quantizers
    assert set(solution.weights) == {quantizer.tensor}, "the other nodes must keep their float weights"
    return -10 * math.log10(NOISE[quantizer.tensor])


def _relaxed(floor: float) -> dict[str, str]:
    reached = -10 * math.log10(sum(NOISE.values()))
    return dict(find_relaxation(_measured(), (), floor=floor, reached=reached))


def _measured() -> Mapping[str, float]:
    return measure_noise(_plan, sorted(NOISE), _solution(), _score)


def test_the_worst_nodes_go_until_the_rest_fits() -> None:
    assert list(_relaxed(18.0)) == ["b"]
    assert list(_relaxed(25.0)) == ["b", "a"]
    assert "14.0 dB" in _relaxed(18.0)["b"]


def test_nothing_goes_where_the_floor_is_met() -> None:
    assert _relaxed(10.0) == {}


def test_where_too_many_would_go_only_those_do_that_spoil_the_whole() -> None:
    assert list(_relaxed(40.0)) == ["b", "a"]
    even = dict.fromkeys(NOISE, 1e-2)
    assert find_relaxation(even, (), floor=20.0, reached=10.0) == {}
    one = {**even, "b": 1.0}
    assert list(find_relaxation(one, (), floor=20.0, reached=-0.4)) == ["b"]


def test_one_node_of_a_small_network_may_go_but_never_all() -> None:
    small = {"a": 1e-3, "b": 4e-1, "c": 2e-3}
    assert list(find_relaxation(small, (), floor=20.0, reached=3.9)) == ["b"]
    assert find_relaxation(small, ["b"], floor=40.0, reached=25.0) == {}
    assert find_relaxation({"a": 1.0}, (), floor=20.0, reached=0.0) == {}


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_noises_that_do_not_add_up_are_scaled(factor: float) -> None:
    total = sum(NOISE.values())
    reached = -10 * math.log10(total * factor)
    # Without b a fifth of the noise is left, whatever the whole amounts to.
    left = -10 * math.log10((total - NOISE["b"]) * factor)
    found = find_relaxation(_measured(), (), floor=left - 0.01, reached=reached)
    assert list(found) == ["b"]


def test_a_second_look_goes_on_where_the_first_fell_short() -> None:
    # Without b the outputs reach 18 dB, not the 20 dB that its share of the noise promised.
    assert list(find_relaxation(_measured(), ["b"], floor=19.8, reached=18.0)) == ["a"]
    assert find_relaxation(_measured(), ["b", "a"], floor=40.0, reached=18.0) == {}
