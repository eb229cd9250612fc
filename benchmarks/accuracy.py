"""Accuracy of onnxptq and its peers on real models and data.

    python -m benchmarks.accuracy [--bed resnet20 ...] [--setting onnxptq:default ...] [--samples 32]

Every file is made in a process of its own from the same decoded calibration samples and measured with
onnxruntime on the separate evaluation samples. Rows that the results file already holds are not measured again
(``--force`` does, ``--stale`` does where onnxptq's code has changed since).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.beds import BEDS, Bed
from benchmarks.process import end_children_on_termination, run_measured
from benchmarks.producing import prepare, produce
from benchmarks.results import ResultsFile, default_path, is_wanted, source_id
from benchmarks.settings import FLOORS, OURS, SETTINGS, Setting, interpreter, shortfalls

CONSOLE = Console(highlight=False, soft_wrap=True)
WIDE = 200
"""Columns of the table where the output is no terminal."""


def main() -> int:
    """Measure what is missing and print the table; 1 if a row misses its floor or failed."""
    given = _arguments()
    end_children_on_termination()
    results = ResultsFile(given.out)
    wanted = [
        (BEDS[bed], setting)
        for bed in given.bed
        for setting in SETTINGS
        if bed in setting.beds and (not given.setting or setting.label in given.setting)
    ]
    for number, (bed, setting) in enumerate(wanted, 1):
        key = _key(bed, setting, given.samples)
        title = f"[{number}/{len(wanted)}] {bed.name} {setting.label}"
        if not is_wanted(results, key, force=given.force, stale=given.stale and setting.tool == OURS):
            CONSOLE.print(f"{title}: known")
        elif setting.tool != OURS and interpreter(setting.tool) is None:
            CONSOLE.print(f"{title}: not installed, left out")
        else:
            CONSOLE.print(f"{title} ...")
            row = results.add(
                "accuracy", key, _measured(bed, setting, given.samples, given.timeout, given.force)
            )
            CONSOLE.print(f"    {row['error'] if row.get('error') else _summary(row)}")
    rows = [
        row for row in results.rows("accuracy") if row["bed"] in given.bed and row["limit"] == given.samples
    ]
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDE).print(_table(rows))
    _say_stale(rows)
    bad = [row["key"] for row in rows if row.get("error") or row.get("shortfalls")]
    CONSOLE.print(f"{given.out}: {len(rows)} rows, {len(bad)} below their floor or failed")
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    labels = [setting.label for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=list(BEDS))
    parser.add_argument("--setting", nargs="+", choices=labels, default=[], help="default: all")
    parser.add_argument("--samples", type=int, help="at most this many per split; floors are not judged then")
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--stale", action="store_true", help="measure again onnxptq's rows of other code")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one process")
    return parser.parse_args()


def _key(bed: Bed, setting: Setting, limit: int | None) -> str:
    return f"accuracy/{bed.name}/{setting.label}" + ("" if limit is None else f"/{limit}")


def _measured(bed: Bed, setting: Setting, limit: int | None, timeout: float, fresh: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"bed": bed.name, "tool": setting.tool, "setting": setting.name, "limit": limit}
    prepare(bed, limit)
    made = produce(bed, setting, limit, timeout=timeout, fresh=fresh)
    row |= {"recipe": dict(setting.recipe), "seed": 0, **made.facts}
    if setting.tool == OURS:
        row["source"] = made.source
    if made.error is not None:
        return {**row, "error": made.error}
    sessions: dict[str, Any] = {}
    for session in ("default", "exact") if setting.tool == OURS else ("default",):
        found = measured_quality(bed, made.path, session, limit, timeout)
        if "error" in found:
            return {**row, "error": f"{session} session: {found['error']}"}
        row["float"] = found.pop("float")
        row["evaluation_samples"] = found.pop("samples")
        row["nodes"] = found.pop("nodes")
        sessions[session] = found
    row["sessions"] = sessions
    floor = FLOORS.get((bed.name, setting.label))
    if floor is not None and limit is None:
        row["floor"] = {name: value for name, value in _fields(floor).items() if value is not None}
        row["shortfalls"] = shortfalls(floor, row)
    return row


def measured_quality(
    bed: Bed, model: Path, session: str, limit: int | None, timeout: float
) -> dict[str, Any]:
    """The distance of a file from its float model, measured in a process of its own; ``error`` where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "quality.json"
        command = [sys.executable, "-m", "benchmarks.quality", "--bed", bed.name, "--model", str(model)]
        command += ["--session", session, "--result", str(result)]
        command += [] if limit is None else ["--samples", str(limit)]
        measured = run_measured(command, timeout=timeout)
        if measured.failure is not None:
            return {"error": measured.failure}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _fields(floor: object) -> dict[str, float | None]:
    return {name: getattr(floor, name) for name in ("agreement", "sqnr_db", "top1_loss", "map50_loss")}


def _summary(row: Mapping[str, Any]) -> str:
    parts = []
    for session, values in row["sessions"].items():
        agreement = "" if "agreement" not in values else f", agreement {values['agreement']:.4f}"
        parts.append(f"{session}: {min(values['sqnr_db'].values()):.2f} dB{agreement}")
    return f"{'; '.join(parts)}; {row['wall_s']:.0f} s, {row['peak_rss_mb']:.0f} MB"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Accuracy (default session / exact session)")
    for column in ("bed", "tool:setting"):
        table.add_column(column, no_wrap=True)
    for column in (
        "task %",
        "float %",
        "agree",
        "SQNR dB",
        "wall s",
        "CPU s",
        "RSS MB",
        "MB",
        "float MB",
        "Q/DQ",
        "floor",
    ):
        table.add_column(column, justify="right")
    order = {setting.label: i for i, setting in enumerate(SETTINGS)}
    beds = list(BEDS)
    for row in sorted(
        rows, key=lambda r: (beds.index(r["bed"]), order.get(f"{r['tool']}:{r['setting']}", 99))
    ):
        name = f"{row['tool']}:{row['setting']}"
        if row.get("error"):
            table.add_row(row["bed"], name, *["–"] * 10, f"[red]{row['error'][:60]}[/red]")
            continue
        sessions = list(row["sessions"].values())
        task = BEDS[row["bed"]].metric
        table.add_row(
            row["bed"],
            name,
            " / ".join(f"{100 * s[task]:.2f}" for s in sessions),
            f"{100 * row['float'][task]:.2f}",
            " / ".join(f"{s['agreement']:.4f}" for s in sessions if "agreement" in s) or "–",
            " / ".join(f"{min(s['sqnr_db'].values()):.2f}" for s in sessions),
            f"{row['wall_s']:.1f}",
            f"{row['cpu_s']:.1f}",
            f"{row['peak_rss_mb']:.0f}",
            f"{row['size_mb']:.2f}",
            f"{row['float_size_mb']:.2f}",
            "/".join(str(count) for count in row["nodes"].values()),
            _verdict(row),
        )
    return table


def _verdict(row: Mapping[str, Any]) -> str:
    if "floor" not in row:
        return ""
    asked = ", ".join(f"{name} {value:g}" for name, value in row["floor"].items())
    lacking = "; ".join(row["shortfalls"])
    return f"[red]FAIL[/red] {lacking}" if lacking else f"[green]pass[/green] ({asked})"


def _say_stale(rows: Sequence[Mapping[str, Any]]) -> None:
    old = [row["key"] for row in rows if row["tool"] == OURS and row["source"] != source_id()]
    if old:
        CONSOLE.print(
            f"[yellow]measured with other code of onnxptq (--stale repeats): {', '.join(old)}[/yellow]"
        )


if __name__ == "__main__":
    sys.exit(main())
