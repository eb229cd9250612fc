"""The report as JSON, as a page and on the terminal, hostile names included."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import PurePath
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from onnxptq.types import LayerRank, PackOutcome, Skip
from onnxptq.validate import wording
from onnxptq.validate.html import render_html, render_sensitivity, worst_tensors
from onnxptq.validate.latency import Latency
from onnxptq.validate.metrics import OutputMetrics
from onnxptq.validate.parity import EdgeParity, OutputParity, Parity
from onnxptq.validate.report import (
    SCHEMA_VERSION,
    BitPlanFacts,
    BitRow,
    BlockScore,
    BranchFacts,
    BranchRow,
    DataFacts,
    Histogram,
    ModelFacts,
    OutputFacts,
    QuantizedRow,
    Report,
    SizeRow,
    SoftmaxRow,
    StageTime,
    TensorQuality,
    plain,
)
from onnxptq.validate.sensitivity import SensitivityReport
from onnxptq.validate.summary import render_summary

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]></svg><iframe src='https://example.org'>",
    "$\\frac{1}{0}$ {{ 7*7 }} {% if %}",
    "[bold red]not markup[/bold red] [/]",
    "名前/テンソル:0",
)


def _scores(**changes: Any) -> OutputMetrics:
    values: dict[str, Any] = {
        "name": "scores",
        "elements": 70,
        "rows": 10,
        "sqnr_db": 31.5,
        "cosine": 0.9996,
        "max_abs_error": 0.25,
        "top1_agreement": 0.99,
        "top5_agreement": 1.0,
    }
    return OutputMetrics(**{**values, **changes})


def _tensor(name: str, position: int, sqnr: float, **changes: Any) -> TensorQuality:
    values: dict[str, Any] = {
        "tensor": name,
        "position": position,
        "sqnr_db": sqnr,
        "minimum": -1.0,
        "maximum": 3.0,
        "low": -0.9,
        "high": 2.5,
        "histogram": Histogram(low=-1.0, high=3.0, counts=(0, 3, 1000, 40, 0, 1)),
    }
    return TensorQuality(**{**values, **changes})


def _report(names: tuple[str, ...] = ("conv/out", "relu", "fc"), **changes: Any) -> Report:
    parity = Parity(
        samples=2,
        edges=(
            EdgeParity(
                quantizer_id="q", tensor=names[0], role="activation", elements=9, different=0, max_steps=0.0
            ),
        ),
        outputs=(OutputParity(name=names[0], exact_sqnr_db=31.0, fast_sqnr_db=math.inf),),
        provider="cpu",
    )
    latency = Latency(
        reference_ms=8.0,
        quantized_ms=4.0,
        ratio=0.5,
        ratio_low=0.45,
        ratio_high=0.55,
        pairs=20,
        batch=1,
        threads=0,
        provider="cpu",
    )
    rows = tuple(
        QuantizedRow(
            quantizer_id=name,
            tensor=name,
            role=("activation", "weight", "bias")[i % 3],
            bits=8,
            storage="uint8",
            granularity="per channel (axis 0)",
            symmetric=True,
            scale=(1e-3, 2e-3),
            zero_point=(0, 0),
            readers=(name, "graph output"),
        )
        for i, name in enumerate(names)
    )
    tensors = [_tensor(name, i, 40.0 - i) for i, name in enumerate(names)]
    tensors.append(_tensor("equal", len(names), math.inf))
    values: dict[str, Any] = {
        "model": ModelFacts(
            path=f"/models/{names[0]}", fingerprint="f" * 8, opset=17, parameters=10, bytes=100
        ),
        "output": OutputFacts(path="out.onnx", bytes=30, sha256="a" * 8),
        "target": "ort-cpu",
        "method": "calibrated",
        "recipe": {"target": "ort-cpu", "exclude": list(names), "samples": np.int64(64), "gate": 0.5},
        "calibration": DataFacts(description=f"pictures in {names[0]}", count=64),
        "heldout": DataFacts(description="held out", count=10),
        "quantized": rows,
        "skips": tuple(Skip(site=name, reason=f"because of {names[0]}") for name in names),
        "tensors": tuple(tensors),
        "outputs": (_scores(name=names[0]),),
        "parity": parity,
        "latency": latency,
        "kernels": {"QLinearConv": 3, "Relu": 1, "DequantizeLinear": 2, names[0]: 1},
        "sizes": (SizeRow(component="quantized weights", before=80, after=20),),
        "stages": (StageTime(name="calibrate", seconds=61.0), StageTime(name="check", seconds=0.01)),
        "peak_memory_bytes": 1_500_000_000,
        "versions": {"onnx": "1.2.3"},
        "notes": names,
    }
    return Report(**{**values, **changes})


class _Page(HTMLParser):
    """Collects tags, attributes and text, and checks that the tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_json_is_plain_and_complete() -> None:
    report = _report()
    text = json.dumps(report.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["schema_version"] == SCHEMA_VERSION
    assert list(content) == [
        *("schema_version", "model", "output", "target", "method", "recipe", "calibration", "heldout"),
        *("quantized", "skips", "tensors", "outputs", "parity", "latency", "kernels", "sizes", "stages"),
        *(
            "peak_memory_bytes",
            "versions",
            "notes",
            "blocks",
            "packs",
            "tuning",
            "softmax",
            "bit_plan",
            "branches",
        ),
    ]
    assert content["tensors"][-1]["sqnr_db"] == "inf"
    assert content["parity"]["outputs"][0]["fast_sqnr_db"] == "inf"
    assert content["parity"]["max_steps"] == 0.0
    assert content["parity"]["elements"] == 9
    assert content["recipe"]["samples"] == 64
    assert content["skips"][0] == {"site": "conv/out", "reason": "because of conv/out"}
    assert text == json.dumps(_report().to_json(), allow_nan=False)


def test_numbers_that_json_lacks() -> None:
    assert plain([math.inf, -math.inf, math.nan, np.float32(0.5), np.int8(3), {1: (True, None)}]) == [
        *("inf", "-inf", None, 0.5, 3),
        {"1": [True, None]},
    ]


@pytest.mark.parametrize("names", [("conv/out", "relu", "fc"), HOSTILE], ids=["plain", "hostile"])
def test_the_page_is_well_formed_and_self_contained(names: tuple[str, ...]) -> None:
    html = render_html(_report(names))
    page = _parsed(html)
    assert page.tags.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    )
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "srcset", "data", "action", "xmlns"}
        if name.endswith("href"):
            assert value.startswith("#")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)\"']*)", html))
    if names is not HOSTILE:
        assert "http:" not in html
        assert "https:" not in html
        assert "//" not in html.replace("/models//", "")
    shown = "".join(page.text)
    for name in names:
        assert name in shown


def test_ids_are_unique_and_referred_to() -> None:
    page = _parsed(render_html(_report()))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name.endswith("href")}
    used |= {m for _, value in page.attributes for m in re.findall(r"url\(#([^)]+)\)", value)}
    assert used == set(ids)


def test_the_page_is_reproducible() -> None:
    html = render_html(_report())
    assert html == render_html(_report())
    assert not re.search(r"20\d\d-\d\d-\d\d", html)


def test_the_page_shows_what_the_report_says() -> None:
    report = _report(outputs=(_scores(reference_accuracy=0.75, quantized_accuracy=0.7321, labelled=10),))
    text = "".join(_parsed(render_html(report)).text)
    for expected in ("99.00 %", "31.5 dB", "73.21 %", "75.00 %", "2.00 ×", "30 % of", "1 min 1 s", "1.50 GB"):
        assert expected in text, expected
    assert "3 integer kernels" in text
    assert text.count("because of conv/out") == 1  # grouped by reason


def test_a_bare_report_renders() -> None:
    bare = Report(
        model=ModelFacts(path="m", fingerprint="", opset=17, parameters=0, bytes=0),
        output=OutputFacts(path="o", bytes=0),
        target="simulate",
        method="rtn",
        recipe={},
        calibration=DataFacts(description="", count=1),
    )
    assert "not measured" in "".join(_parsed(render_html(bare)).text)
    assert "not measured" in _terminal(bare)
    json.dumps(bare.to_json(), allow_nan=False)


def test_pictures_survive_extreme_values() -> None:
    one = Histogram(low=0.5, high=0.5 + 1e-7, counts=(10,))
    wide = Histogram(low=-1e30, high=1e30, counts=(1, 0, 10**12))
    tensors = (
        _tensor("one", 0, 3.0, histogram=one, low=0.0, high=1e9),
        _tensor("wide", 1, -300.0, histogram=wide),
        _tensor("none", 2, 5.0, histogram=None),
        _tensor("nan", 3, math.nan),
        _tensor("float", 4, 1.0, low=None, high=None),
        _tensor("empty", 5, 2.0, histogram=Histogram(low=0.0, high=1.0, counts=(0, 0))),
    )
    _parsed(render_html(_report(tensors=tensors)))


def test_rounding_to_nearest_is_drawn_beside_what_was_solved() -> None:
    plain = _report(tensors=tuple(_tensor(str(i), i, 30.0) for i in range(4)))
    beside = _report(tensors=tuple(_tensor(str(i), i, 30.0, nearest_sqnr_db=12.0 + i) for i in range(4)))
    assert "stroke-dasharray" in render_html(beside)
    assert "stroke-dasharray" not in render_html(plain)
    assert "dashed" in render_html(beside)
    assert "dashed" not in "".join(_parsed(render_html(plain)).text)


def test_packs_are_shown_with_the_curvature_of_their_blocks() -> None:
    scores = [1e-9, math.inf, 3.0, 0.0, 1e6]
    blocks = tuple(
        BlockScore(block=i, pack=i // 2, start="<a>", end="b & c", curvature=score, omega=0.5)
        for i, score in enumerate(scores)
    )
    rank = LayerRank(
        weight="<w>", rank=20, candidates=(10, 20), shares=(0.375, 0.625), before=0.5, after=math.inf
    )
    packs = tuple(
        PackOutcome(pack=i, blocks=2, before=0.5, after=0.25, steps=300, ranks=(rank,) * i) for i in range(3)
    )
    shown = render_html(_report(blocks=blocks, packs=packs))
    text = "".join(_parsed(shown).text)
    assert "Blocks and packs" in text
    assert "0.25" in text
    assert text.count("10: 0.375, 20: 0.625") == 3
    assert "low-rank" not in "".join(_parsed(render_html(_report(blocks=blocks, packs=packs[:1]))).text)
    assert "learnt on the outputs" not in text
    whole = PackOutcome(pack=3, blocks=5, before=0.75, after=0.625, steps=17)
    text = "".join(_parsed(render_html(_report(blocks=blocks, packs=packs, tuning=whole))).text)
    assert "all 5 blocks were learnt on the outputs in 17 steps" in text
    assert "0.75 before, 0.625 after" in text
    assert shown.count("<svg") == render_html(_report()).count("<svg") + 1
    assert "a pack starts where S is lower than before" in shown
    single = tuple(replace(block, pack=block.block) for block in blocks)
    assert "a pack starts" not in render_html(_report(blocks=single))
    assert ">Omega</th>" in shown
    unscored = tuple(replace(block, curvature=None, omega=None) for block in blocks)
    shown = render_html(_report(blocks=unscored))
    assert "Blocks and packs" in "".join(_parsed(shown).text)
    assert ">Omega</th>" not in shown
    assert shown.count("<svg") == render_html(_report()).count("<svg")


def test_branches_are_shown_with_what_they_cost() -> None:
    row = BranchRow(node="<n>", weight="w & v", rank=7, before=0.5, after=0.25, parameters=420, share=0.0375)
    facts = BranchFacts(rows=(row,) * 2, bytes=3360, latency=None)
    text = "".join(_parsed(render_html(_report(branches=facts))).text)
    assert "Low-rank branches" in text
    assert "2 layers get what rounding has spoilt" in text
    assert "the time of the same file" not in text
    assert text.count("w & v") == 2
    latency = Latency(
        reference_ms=2.0, quantized_ms=2.5, ratio=1.25, ratio_low=1.0, ratio_high=1.5, pairs=5, batch=1, threads=0,
        provider="cpu",
    )  # fmt: skip
    text = "".join(_parsed(render_html(_report(branches=replace(facts, latency=latency)))).text)
    assert "1.25 × the time of the same file without them (2.50 ms instead of 2.00 ms)" in text
    assert "Low-rank branches" not in "".join(_parsed(render_html(_report())).text)
    assert json.loads(json.dumps(_report(branches=facts).to_json()))["branches"]["rows"][0]["rank"] == 7


def _bit_rows(count: int, **settings: Any) -> tuple[BitRow, ...]:
    return tuple(
        BitRow(
            pack=i,
            start="<a>",
            end="b & c",
            weights=1000,
            weight_loss={2: 1.0, 8: 1e-4},
            activation_loss={2: 0.0, 8: 0.5},
            **settings,
        )
        for i in range(count)
    )


def test_bits_per_pack_are_shown() -> None:
    plan = BitPlanFacts(
        allocator="exact",
        budget={"average_bits": 3.5},
        average_weight_bits=3.25,
        average_activation_bits=None,
        expected_loss=0.125,
        packs=_bit_rows(3, weight_bits=3),
    )
    shown = render_html(_report(bit_plan=plan))
    text = "".join(_parsed(shown).text)
    for expected in ("Bits per pack", "average bits 3.5", "3.25", "0.125", "1,000"):
        assert expected in text
    assert shown.count("<svg") == render_html(_report()).count("<svg") + 1
    unchosen = replace(plan, packs=_bit_rows(2))
    assert render_html(_report(bit_plan=unchosen)).count("<svg") == render_html(_report()).count("<svg")


def test_ranges_of_softmax_outputs_are_shown() -> None:
    row = SoftmaxRow(
        tensor="<p>",
        bits=4,
        root=1.0,
        low=0.125,
        high=0.375,
        full_db=3.0,
        from_zero_db=12.25,
        free_db=math.inf,
    )
    text = "".join(_parsed(render_html(_report(softmax=(row,)))).text)
    for expected in ("Ranges of softmax outputs", "<p>", "0.125 … 0.375", "12.2 dB", "equal"):
        assert expected in text
    assert "Ranges of softmax outputs" not in render_html(_report())


def test_the_page_of_a_sensitivity_run() -> None:
    blocks = tuple(
        BlockScore(block=i, pack=i // 2, start="<a>", end="b & c", curvature=score, omega=score)
        for i, score in enumerate([1.0, math.inf, 0.0, 2.0])
    )
    report = SensitivityReport(
        model="nets/<net>.onnx",
        fingerprint="abc",
        target="simulate",
        loss="kl",
        weight_bits=4,
        activation_bits=4,
        samples=8,
        blocks=blocks,
        packs=_bit_rows(2),
    )
    shown = render_sensitivity(report)
    assert shown.count("<svg") == 4  # S, Omega, losses of weights and of activations
    text = "".join(_parsed(shown).text)
    assert "<net>.onnx: sensitivity" in text
    assert "Kullback-Leibler" in text
    empty = replace(report, blocks=(), packs=())
    assert render_sensitivity(empty).count("<svg") == 0
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["blocks"][1]["curvature"] == "inf"


def test_the_worst_are_quantized_finite_and_in_order() -> None:
    tensors = [_tensor(str(i), i, 30.0 - i) for i in range(20)]
    tensors += [
        _tensor("float", 20, 0.0, low=None),
        _tensor("inf", 21, math.inf),
        _tensor("nan", 22, math.nan),
    ]
    assert [t.position for t in worst_tensors(tensors)] == list(range(19, 9, -1))


def _terminal(report: Report, width: int = 100, page: PurePath | None = None) -> str:
    console = Console(width=width, highlight=False, file=io.StringIO())
    with console.capture() as capture:
        console.print(render_summary(report, page))
    return capture.get()


def test_the_summary_fits_one_screen() -> None:
    many = tuple(Skip(site=f"node{i}", reason=f"reason {i}") for i in range(50))
    outputs = tuple(_scores(name=f"out{i}") for i in range(30))
    text = _terminal(_report(skips=many, outputs=outputs, notes=tuple("abcdefghijkl")), width=80)
    assert len(text.splitlines()) <= 40
    assert "46 more reasons" in text
    assert "24 more outputs" in text


def test_notes_that_do_not_fit_are_counted_and_the_reason_for_the_size_stands_beside_it() -> None:
    notes = tuple(f"note {i}" for i in range(9))
    larger = OutputFacts(path="out.onnx", bytes=130, note="The output is not smaller: why.")
    report = _report(notes=(*notes, larger.note), output=larger)
    lines = _terminal(report).splitlines()
    size = next(i for i, line in enumerate(lines) if line.startswith("size"))
    assert lines[size + 1].strip() == larger.note
    assert sum(larger.note in line for line in lines) == 1
    assert "note 5" in _terminal(report)
    assert "note 6" not in _terminal(report)
    assert "… 3 more notes with --json or --report" in _terminal(report)
    assert "… 3 more notes in a/report.html" in _terminal(report, page=PurePath("a/report.html"))
    assert "more notes" not in _terminal(_report(notes=notes[:6]))


def test_the_summary_does_not_read_names_as_markup() -> None:
    text = " ".join(_terminal(_report(HOSTILE), width=300).split())
    assert "[bold red]not markup[/bold red] [/]" in text
    assert "<script>alert(1)</script>" in text


@pytest.mark.parametrize(
    ("outputs", "level"),
    [
        ((_scores(),), "good"),
        ((_scores(top1_agreement=0.98),), "fair"),
        ((_scores(top1_agreement=0.5),), "poor"),
        ((_scores(top1_agreement=None, sqnr_db=30.0),), "good"),
        ((_scores(top1_agreement=None, sqnr_db=29.9),), "fair"),
        ((_scores(top1_agreement=None, sqnr_db=-math.inf),), "poor"),
        ((_scores(top1_agreement=None, sqnr_db=math.nan),), "poor"),
        ((_scores(nonfinite=1),), "poor"),
        ((_scores(nonfinite=16, nonfinite_reference=16),), "good"),
        ((_scores(nonfinite=70, nonfinite_reference=70, sqnr_db=math.nan, top1_agreement=None),), "unknown"),
        ((_scores(nonfinite=70, nonfinite_reference=70, sqnr_db=math.nan), _scores()), "good"),
        ((_scores(top1_agreement=1.0, sqnr_db=20.0),), "good"),
        ((_scores(top1_agreement=1.0, sqnr_db=19.9),), "fair"),
        ((_scores(top1_agreement=1.0, sqnr_db=9.3),), "poor"),
        ((_scores(top1_agreement=0.98, sqnr_db=40.0),), "fair"),
        ((_scores(), _scores(top1_agreement=None, sqnr_db=5.0)), "poor"),
        ((_scores(top1_agreement=None, sqnr_db=None, equal_fraction=1.0),), "good"),
        ((), "unknown"),
    ],
)
def test_verdicts(outputs: tuple[OutputMetrics, ...], level: str) -> None:
    assert wording.verdict(_report(outputs=outputs)).level == level


def test_the_verdict_says_how_few_inputs_it_stands_on() -> None:
    few = _report(heldout=DataFacts(description="held out", count=4))
    assert wording.verdict(few).text.endswith(", on only 4 inputs.")
    assert "only" not in wording.verdict(_report(heldout=DataFacts(description="held out", count=100))).text


def test_the_float_models_own_nan_is_not_held_against_the_file() -> None:
    own = wording.verdict(_report(outputs=(_scores(nonfinite=16, nonfinite_reference=16),))).text
    assert "SQNR 31.5 dB, 16 values left out, which are NaN or Inf in the float model too" in own
    both = wording.verdict(_report(outputs=(_scores(nonfinite=18, nonfinite_reference=16),))).text
    assert "2 values are NaN or Inf that are numbers in the float model" in both


def test_almost_all_is_not_all() -> None:
    assert wording.percent(1.0) == "100.00 %"
    assert wording.percent(0.99999) == "99.99 %"
    assert wording.percent(None) == "–"


def test_reports_are_values() -> None:
    report = _report()
    assert replace(report, target="tensorrt").target == "tensorrt"
    with pytest.raises(AttributeError):
        report.target = "x"  # type: ignore[misc]


def test_of_outputs_of_one_level_the_worst_is_named() -> None:
    outputs = tuple(
        _scores(name=name, sqnr_db=db, top1_agreement=None, top5_agreement=None)
        for name, db in (("first", 18.9), ("last", 15.9), ("good", 40.0))
    )
    assert "SQNR 15.9 dB" in wording.verdict(_report(outputs=outputs)).text
    assert "(output last)" in wording.verdict(_report(outputs=outputs)).text


def test_the_verdict_says_that_data_were_random() -> None:
    made_up, own = (DataFacts(description="", count=4, is_random=random) for random in (True, False))
    plain = wording.verdict(_report(calibration=own, heldout=own))
    calibrated = wording.verdict(_report(calibration=made_up, heldout=own))
    assert (calibrated.level, calibrated.text) == (plain.level, f"Calibrated on random data. {plain.text}")
    measured = wording.verdict(_report(calibration=made_up, heldout=made_up))
    assert measured.level == "unknown"
    assert measured.text.startswith("Random data")
    assert measured.text.endswith(plain.text)
    assert "random" in wording.verdict(_report(calibration=made_up, heldout=None, outputs=())).text
