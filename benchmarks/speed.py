"""Speed and memory of onnxptq and of what it writes.

    python -m benchmarks.speed [--part latency ...] [--quick]

Parts: ``latency`` of written files; ``calibration``, relative to plain inference; ``whole`` runs of ours and of
onnxruntime; ``memory`` against onnxruntime's percentile method; ``growth`` of memory from 32 to 256 samples.
Comparisons are made in turns, so read ratios. Rows that the results file already holds are not measured again
(``--force`` does, ``--stale`` does where onnxptq's code has changed since).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.beds import BEDS, model_path
from benchmarks.costs import RunFailedError, growth, memory_by_count, whole_runs
from benchmarks.process import end_children_on_termination, run_measured
from benchmarks.producing import prepare, produce
from benchmarks.results import ResultsFile, default_path, is_wanted, source_id
from benchmarks.settings import SETTINGS

CONSOLE = Console(highlight=False, soft_wrap=True)
OBSERVERS = ("auto", "minmax", "percentile", "mse", "entropy")
_SETTINGS = {setting.label: setting for setting in SETTINGS}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row: its key, what measures it, and what it must show."""

    key: str
    measure: Callable[[], Row]
    checks: Callable[[Mapping[str, Any]], list[Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int
    calibration_samples: int
    calibration_rounds: int
    repeats: int
    timeout: float
    is_quick: bool


def main() -> int:
    """Measure what is missing and print everything; 1 if something misses its bound or failed."""
    given = _arguments()
    end_children_on_termination()
    results = ResultsFile(given.out)
    sizes = Sizes(
        rounds=15 if given.quick else 150,
        calibration_samples=8 if given.quick else 32,
        calibration_rounds=1 if given.quick else 5,
        repeats=1 if given.quick else 2,
        timeout=given.timeout,
        is_quick=given.quick,
    )
    tasks = [task for part in given.part for task in PARTS[part](given.bed, sizes)]
    for number, task in enumerate(tasks, 1):
        if not is_wanted(results, task.key, force=given.force, stale=given.stale):
            CONSOLE.print(f"[{number}/{len(tasks)}] {task.key}: known")
            continue
        CONSOLE.print(f"[{number}/{len(tasks)}] {task.key} ...")
        values: Row = {"source": source_id()}
        try:
            values |= task.measure()
            values["checks"] = [] if given.quick else task.checks(values)
        except (RunFailedError, LookupError) as error:
            values["error"] = str(error)
        results.add("speed", task.key, values)
    return _print(given.out, results, {task.key for task in tasks})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=[], help="default: those of each part")
    parser.add_argument("--quick", action="store_true", help="few rounds and samples; nothing is judged")
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--stale", action="store_true", help="measure again what other code of onnxptq gave")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one process")
    return parser.parse_args()


def _check(claim: str, value: float, bound: float, *, is_least: bool = False) -> Row:
    passed = value >= bound if is_least else value <= bound
    return {"claim": claim, "value": value, "bound": bound, "is_least": is_least, "passed": passed}


def _key(part: str, name: str, sizes: Sizes) -> str:
    return f"speed/{part}/{name}" + ("/quick" if sizes.is_quick else "")


def _latency(beds: list[str], sizes: Sizes) -> Iterator[Task]:
    for bed in beds or ["efficientnet", "vit"]:
        for threads in (0, 1):

            def measure(bed: str = bed, threads: int = threads) -> Row:
                prepare(BEDS[bed])
                files = {"float": model_path(BEDS[bed])}
                for name, label in (("ours", "onnxptq:default"), ("onnxruntime", "onnxruntime:minmax")):
                    limit = 16 if sizes.is_quick else None
                    made = produce(BEDS[bed], _SETTINGS[label], limit, timeout=sizes.timeout)
                    if made.error is not None:
                        raise RunFailedError(f"{label}: {made.error}")
                    files[name] = made.path
                command = ["benchmarks.latency", "--bed", bed, "--threads", str(threads)]
                command += ["--rounds", str(sizes.rounds)]
                for name, path in files.items():
                    command += ["--file", f"{name}={path}"]
                return _job(command, sizes.timeout)

            def checks(row: Mapping[str, Any], bed: str = bed) -> list[Row]:
                # Judged with the number of threads that a user gets without asking.
                if bed != "efficientnet" or row["threads"] != 0:
                    return []
                faster, other = row["ratios"]["float/ours"], row["ratios"]["ours/onnxruntime"]
                return [
                    _check("throughput / FP32's, median", faster["median"], 1.8, is_least=True),
                    # Slower means that even the lower quartile is: equal files differ by noise either way.
                    _check("time / time of onnxruntime's file, lower quartile", other["quartiles"][0], 1.0),
                ]

            yield Task(key=_key("latency", f"{bed}/{threads} threads", sizes), measure=measure, checks=checks)


def _calibration(beds: list[str], sizes: Sizes) -> Iterator[Task]:
    for bed in beds or ["efficientnet", "vit"]:

        def measure(bed: str = bed) -> Row:
            prepare(BEDS[bed])
            command = ["benchmarks.calibration_cost", "--bed", bed]
            command += [
                "--samples",
                str(sizes.calibration_samples),
                "--rounds",
                str(sizes.calibration_rounds),
            ]
            return _job(command, sizes.timeout)

        def checks(row: Mapping[str, Any]) -> list[Row]:
            ratios = row["wall_ratio"]["plain"]
            bounds = {"minmax": 1.5, "mse": 3.0, "entropy": 3.0}
            return [_check(f"{name} / plain inference", ratios[name], b) for name, b in bounds.items()]

        yield Task(key=_key("calibration", bed, sizes), measure=measure, checks=checks)


def _whole(beds: list[str], sizes: Sizes) -> Iterator[Task]:
    for bed in beds or ["vit"]:

        def measure(bed: str = bed) -> Row:
            prepare(BEDS[bed])
            return whole_runs(BEDS[bed], sizes.repeats, sizes.timeout)

        def checks(row: Mapping[str, Any]) -> list[Row]:
            wall = {way: costs["wall_s"] for way, costs in row["medians"].items()}
            return [
                _check(f"{way} / onnxruntime min-max, wall", round(wall[way] / wall["onnxruntime"], 3), 1.0)
                for way in ("ours-minmax", "ours-no-quality", "ours")
            ]

        yield Task(key=_key("whole", bed, sizes), measure=measure, checks=checks)


def _memory(beds: list[str], sizes: Sizes) -> Iterator[Task]:
    for bed in beds or ["efficientnet", "vit"]:
        # A picture takes 242 MB in the ViT; eight are as many as a small machine holds.
        counts = (2, 4) if sizes.is_quick else (4, 8) if bed == "vit" else (8, 16)

        def measure(bed: str = bed, counts: tuple[int, int] = counts) -> Row:
            prepare(BEDS[bed])
            return memory_by_count(BEDS[bed], counts, sizes.timeout, is_quick=sizes.is_quick)

        def checks(row: Mapping[str, Any]) -> list[Row]:
            ours = row["peak_rss_mb"]["ours"][str(row["samples"])]
            share = round(ours / row["percentile_extrapolated_mb"], 4)
            return [_check(f"peak / percentile's (extrapolated), {row['samples']} samples", share, 0.1)]

        yield Task(key=_key("memory", bed, sizes), measure=measure, checks=checks)


def _growth(beds: list[str], sizes: Sizes) -> Iterator[Task]:
    counts = (8, 16) if sizes.is_quick else (32, 256)
    for bed in beds or ["efficientnet"]:
        for observer in OBSERVERS:

            def measure(bed: str = bed, observer: str = observer) -> Row:
                return growth(BEDS[bed], observer, counts, sizes.timeout)

            def checks(row: Mapping[str, Any]) -> list[Row]:
                return [_check("peak at 256 samples / at 32", row["ratio"], 1.15)]

            yield Task(key=_key("growth", f"{bed}/{observer}", sizes), measure=measure, checks=checks)


PARTS: Mapping[str, Callable[[list[str], Sizes], Iterator[Task]]] = {
    "latency": _latency,
    "calibration": _calibration,
    "whole": _whole,
    "memory": _memory,
    "growth": _growth,
}


def _job(module_and_arguments: list[str], timeout: float) -> Row:
    """What a measuring module writes, with the memory that it took."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        measured = run_measured(
            [sys.executable, "-m", *module_and_arguments, "--result", result], timeout=timeout
        )
        if measured.failure is not None:
            raise RunFailedError(f"{module_and_arguments[0]}: {measured.failure}")
        found: Row = json.loads(result.read_text())
        return found


def _print(path: Path, results: ResultsFile, keys: set[str]) -> int:
    failed = 0
    for row in results.rows("speed"):
        if row["key"] not in keys:
            continue
        stale = "" if row["source"] == source_id() else " [yellow](other code of onnxptq)[/yellow]"
        CONSOLE.print(f"[bold]{row['key']}[/bold]{stale}")
        if row.get("error"):
            failed += 1
            CONSOLE.print(f"  [red]{row['error']}[/red]")
            continue
        for name, value in row.items():
            if name in ("milliseconds", "ratios", "wall_s", "wall_ratio", "cpu_ratio", "medians") or (
                name in ("peak_rss_mb", "mb_per_sample", "percentile_extrapolated_mb", "ratio")
            ):
                CONSOLE.print(f"  {name}: {json.dumps(value)}")
        for check in row["checks"]:
            failed += not check["passed"]
            word = "[green]pass[/green]" if check["passed"] else "[red]FAIL[/red]"
            sign = ">=" if check["is_least"] else "<="
            CONSOLE.print(f"  {word} {check['claim']}: {check['value']:g} {sign} {check['bound']:g}")
    CONSOLE.print(f"{path}: {failed} bounds missed or rows failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
