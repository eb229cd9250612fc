"""The two sessions of the parity check, beyond the corruptions of ``test_corrupted_files``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxptq.errors import OutputCheckError
from onnxptq.runtime import Session, group_within
from onnxptq.targets import PlacementRequest
from onnxptq.types import Sample
from onnxptq.validate import exposure, parity
from onnxptq.validate.metrics import OutputMeter
from onnxptq.validate.parity import OutputParity, Parity, check_parity
from tests.unit.validate.written_model import Written, network, run_outputs, samples, write


def _check(written: Written, folder: Path, **options: Any) -> Parity:
    feeds = options.pop("samples", written.samples)
    return check_parity(
        written.path, written.model, written.plan, written.solution, feeds, work_dir=folder, **options
    )


def test_every_quantizer_is_compared(int8: Written, tmp_path: Path) -> None:
    result = _check(int8, tmp_path)
    assert [edge.quantizer_id for edge in result.edges] == [q.quantizer_id for q in int8.plan.quantizers]
    assert result.max_steps == 0.0
    elements = {edge.quantizer_id: edge.elements for edge in result.edges}
    assert elements["x"] == sum(s["x"].size for s in int8.samples)
    assert elements["w1"] == 6 * 6 * 3 * 3  # once, not once per sample
    assert result.elements == sum(elements.values())


@pytest.mark.parametrize("group_bytes", [1, 5_000, 1 << 30])
def test_groups_do_not_change_the_result(int8: Written, tmp_path: Path, group_bytes: int) -> None:
    assert _check(int8, tmp_path, group_bytes=group_bytes) == _check(int8, tmp_path)


def test_known_sizes_spare_the_run_that_measures_them(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _check(int8, tmp_path, group_bytes=5_000)
    elements = {q.tensor: 100 for q in int8.plan.quantizers if q.role == "activation"}
    measured: list[str] = []
    monkeypatch.setattr(parity, "sizes_of", lambda _, names, *__, **___: measured.extend(names) or {})
    assert _check(int8, tmp_path, group_bytes=5_000, elements=elements) == plain
    assert measured == []


def test_sqnr_is_that_of_the_sessions(int8: Written, tmp_path: Path) -> None:
    result = {output.name: output for output in _check(int8, tmp_path).outputs}
    for exact in (True, False):
        for name in int8.model.outputs:
            wanted = np.concatenate([run_outputs(int8.model.path, s)[name].ravel() for s in int8.samples])
            found = np.concatenate(
                [run_outputs(int8.path, s, exact=exact)[name].ravel() for s in int8.samples]
            )
            wanted, found = wanted.astype(float), found.astype(float)
            sqnr = 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum())
            shown = result[name].exact_sqnr_db if exact else result[name].fast_sqnr_db
            assert shown == pytest.approx(sqnr, abs=1e-9)


class _Spoiled(Session):
    """A session whose default (not exact) run of the quantized file returns ``change`` of its outputs."""

    change: Any = None

    def __init__(self, model: Path, **options: Any) -> None:
        super().__init__(model, **options)
        self._is_spoiled = not options.get("exact", False) and model.name != "canonical.onnx"

    def run(self, feed: Sample, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        values: Mapping[str, Any] = super().run(feed, outputs)
        return {k: type(self).change(v) if self._is_spoiled else v for k, v in values.items()}


def _with_nan(value: np.ndarray) -> np.ndarray:
    value.flat[0] = np.nan
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_nan, "NaN or Inf"),
        (lambda v: v[:, :-1], "has shape"),
        # Saturated sums: what a kernel that overflows makes of large values.
        (lambda v: np.clip(v, -0.5, 0.5), "default session output '(scores|features)' has"),
    ],
    ids=["nan", "shape", "saturated"],
)
def test_a_wrong_default_session_is_refused(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr(_Spoiled, "change", staticmethod(change))
    monkeypatch.setattr(parity, "Session", _Spoiled)
    with pytest.raises(OutputCheckError, match=message):
        _check(int8, tmp_path, samples=samples(8))


def test_one_step_of_kernel_rounding_is_accepted(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hundredth output off by 1 % of the largest: less than the quantization error already there."""

    def nudge(value: np.ndarray) -> np.ndarray:
        value.flat[::100] += 0.01 * np.abs(value).max()
        return value

    monkeypatch.setattr(_Spoiled, "change", staticmethod(nudge))
    monkeypatch.setattr(parity, "Session", _Spoiled)
    _check(int8, tmp_path, samples=samples(8))


def test_no_sample_is_an_error(int8: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        _check(int8, tmp_path, samples=())


def test_the_folders_are_left_clean(int8: Written, tmp_path: Path) -> None:
    before = sorted(int8.path.parent.iterdir())
    _check(int8, tmp_path)
    assert sorted(int8.path.parent.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


def test_sizes_come_from_shapes_or_from_a_run(int8: Written, tmp_path: Path) -> None:
    feed = samples(1, batch=5)[0]
    with exposure.staged(int8.path, tmp_path) as path:
        names = ["c0", "features", "scores", "x"]
        wanted = {"c0": 5 * 6 * 64 * 4, "features": 5 * 6 * 64 * 4, "scores": 5 * 7 * 4, "x": 5 * 4 * 64 * 4}
        assert exposure.sizes_of(path, names, feed, exact=True) == wanted
        # Four bytes per element, whatever the file stores.
        stored = next(t for t in onnx.load(str(path)).graph.initializer if len(t.dims) == 4)
        size = {stored.name: 4 * int(np.prod(stored.dims))}
        assert exposure.sizes_of(path, [stored.name], feed, exact=True) == size


def test_groups_cover_the_units_within_the_limit() -> None:
    sizes = {"a": 4, "b": 3, "c": 9, "d": 1}
    units = [["a"], ["a", "b"], ["c"], ["d"], ["d", "a"]]
    groups = group_within(units, sizes, 8)
    assert groups == [[0, 1], [2], [3, 4]]  # a is counted once; c alone exceeds the limit


def test_what_integer_kernels_lose_is_told() -> None:
    outputs = (
        OutputParity(name="fine", exact_sqnr_db=20.0, fast_sqnr_db=18.0),
        OutputParity(name="lost", exact_sqnr_db=23.7, fast_sqnr_db=3.6),
        OutputParity(name="classes", exact_sqnr_db=None, fast_sqnr_db=None),
    )
    (note,) = Parity(samples=2, edges=(), outputs=outputs, provider="cpu").notes
    assert "'lost' has 3.6 dB" in note
    assert "23.7 dB" in note


def _meter(sqnr_db: float, count: int, rows: int) -> OutputMeter:
    """Of an output with that distance from its reference."""
    meter = OutputMeter("y", is_scores=False)
    reference = np.ones((rows, count // rows))
    meter.update(reference, reference + 10 ** (-sqnr_db / 20))
    return meter


@pytest.mark.parametrize(
    ("exact", "fast", "by_rows", "is_refused"),
    [
        (40.0, 37.5, False, False),
        (40.0, 36.0, False, True),
        # Of 4 independent rows chance alone explains 13 dB.
        (40.0, 36.0, True, False),
        (40.0, 22.0, True, True),
        # Above 60 dB differences do not count.
        (100.0, 58.0, False, False),
        (100.0, 56.0, False, True),
    ],
)
def test_how_much_the_default_session_may_lose(
    exact: float, fast: float, by_rows: bool, is_refused: bool
) -> None:
    """3 dB, and three deviations of 8.7 / sqrt(n) dB: 0.26 dB for 10 000 elements."""
    given = (Path("q.onnx"), "y", _meter(exact, 10_000, 4), _meter(fast, 10_000, 4), by_rows)
    if is_refused:
        with pytest.raises(OutputCheckError, match=f"has {fast} dB .* gives {exact} dB"):
            parity._judge(*given)
    else:
        found = parity._judge(*given)
        assert (found.exact_sqnr_db, found.fast_sqnr_db) == pytest.approx((exact, fast))


def test_probabilities_are_judged_by_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a Softmax one class that changes is most of the error, however many classes there are."""
    model = network()
    model.graph.node.append(onnx.helper.make_node("Softmax", ["scores"], ["rows"], name="softmax"))
    model.graph.node.append(onnx.helper.make_node("Transpose", ["rows"], ["p"], name="turned", perm=[1, 0]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, [7, "batch"]))
    onnx.save(model, str(tmp_path / "network.onnx"))
    written = write(tmp_path / "network.onnx", tmp_path, "ort-cpu", PlacementRequest(), samples(2))
    judged: dict[str, bool] = {}
    judge = parity._judge

    def noted(path: Path, name: str, exact: OutputMeter, fast: OutputMeter, by_rows: bool) -> OutputParity:
        judged[name] = by_rows
        return judge(path, name, exact, fast, by_rows)

    monkeypatch.setattr(parity, "_judge", noted)
    _check(written, tmp_path)
    assert judged == {name: name == "p" for name in written.model.outputs}
