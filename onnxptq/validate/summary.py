"""The report on one screen of a terminal."""

from __future__ import annotations

from pathlib import PurePath

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from onnxptq.validate import wording
from onnxptq.validate.latency import Latency
from onnxptq.validate.metrics import OutputMetrics
from onnxptq.validate.report import Report

_COLOURS = {"good": "green", "fair": "yellow", "poor": "red", "unknown": "default"}
_OUTPUTS = 6
_REASONS = 4
_NOTES = 6


def render_summary(report: Report, page: PurePath | None = None) -> RenderableType:
    """A verdict, a table of the main numbers, and what was left in float. Names are never read as markup.

    Args:
        page: where the written report is; None where none was written.
    """
    verdict = wording.verdict(report)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _rows(report, page):
        grid.add_row(Text(name), Text(value))
    colour = _COLOURS[verdict.level]
    title = Text(f"{PurePath(report.model.path).name} → {PurePath(report.output.path).name}")
    return Group(Panel(Text(verdict.text, style=f"bold {colour}"), title=title, border_style=colour), grid)


def _rows(report: Report, page: PurePath | None) -> list[tuple[str, str]]:
    rows = [("target", f"{report.target}, method {report.method}")]
    rows += [("quality" if i == 0 else "", _output(o)) for i, o in enumerate(report.outputs[:_OUTPUTS])]
    if len(report.outputs) > _OUTPUTS:
        rows.append(("", f"… and {len(report.outputs) - _OUTPUTS} more outputs"))
    if report.heldout is not None:
        count = report.heldout.count
        plural = "" if count == 1 else "s"
        rows.append(("", f"on {count} held-out input{plural}, calibrated on {report.calibration.count}"))
    rows.append(("size", _size(report)))
    if report.output.note:
        rows.append(("", report.output.note))
    if report.latency is not None:
        rows.append(("speed", _speed(report.latency)))
    if report.kernels:
        counts = wording.kernel_counts(report.kernels)
        rows.append(
            (
                "kernels",
                f"{counts['integer']} integer, {counts['float']} float, {counts['conversion']} conversions",
            )
        )
    if report.parity is not None:
        rows.append(("checked", wording.parity_line(report)))
    grids = wording.count_by_grid(report)
    rows.append(("quantized", "; ".join(f"{count} {kind}" for kind, count in grids) or "nothing"))
    reasons = wording.skips_by_reason(report.skips)
    rows += [
        ("in float" if i == 0 else "", f"{_sites(sites)}: {reason}")
        for i, (reason, sites) in enumerate(reasons[:_REASONS])
    ]
    if len(reasons) > _REASONS:
        rows.append(("", f"… {len(reasons) - _REASONS} more reasons {_elsewhere(page)}"))
    notes = [note for note in report.notes if note != report.output.note]
    rows += [("note" if i == 0 else "", note) for i, note in enumerate(notes[:_NOTES])]
    if len(notes) > _NOTES:
        rows.append(("", f"… {len(notes) - _NOTES} more notes {_elsewhere(page)}"))
    rows.append(("took", _took(report)))
    return rows


def _elsewhere(page: PurePath | None) -> str:
    return "with --json or --report" if page is None else f"in {page}"


def _output(output: OutputMetrics) -> str:
    return f"{output.name}: {wording.headline(output)}"


def _speed(latency: Latency) -> str:
    batch = "" if latency.batch is None else f"batch {latency.batch}, "
    return (
        f"{wording.speed(latency.ratio)}: {latency.quantized_ms:.2f} ms, float {latency.reference_ms:.2f} ms "
        f"(ratio {latency.ratio:.2f}, quartiles {latency.ratio_low:.2f}–{latency.ratio_high:.2f}; "
        f"{batch}{latency.provider})"
    )


def _size(report: Report) -> str:
    before, after = report.model.bytes, report.output.bytes
    ratio = f" ({after / before:.2f} of it)" if before else ""
    return f"{wording.size(before)} → {wording.size(after)}{ratio}"


def _sites(sites: list[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{len(sites)} places ({sites[0]}, …)"


def _took(report: Report) -> str:
    total = wording.seconds(sum(stage.seconds for stage in report.stages))
    peak = report.peak_memory_bytes
    return total if peak is None else f"{total}, peak memory {wording.size(peak)}"
