"""Latency of several files of one model at batch 1, measured in turns so that a noisy machine disturbs all alike.

``python -m benchmarks.latency --bed B --file float=F.onnx --file ours=Q.onnx --result OUT.json``

In every round each file runs once, in an order that rotates; the ratio of two files is taken within a round.
Reported are medians, and for every pair of files the median and quartiles of time(a) / time(b).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.beds import BEDS, decoded
from benchmarks.quality import open_session

_WARM_UP = 5


def measure(sample: npt.NDArray[Any], files: Mapping[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds per file and ratios per pair."""
    sessions = {name: open_session(path, threads=threads) for name, path in files.items()}
    feeds = {name: {session.get_inputs()[0].name: sample} for name, session in sessions.items()}
    for name, session in sessions.items():
        for _ in range(_WARM_UP):
            session.run(None, feeds[name])
    times: dict[str, list[float]] = {name: [] for name in files}
    names = list(files)
    for number in range(rounds):
        shift = number % len(names)
        turn = names[shift:] + names[:shift]
        # Forward and backward in turns, so that no file always follows the same one.
        for name in turn if (number // len(names)) % 2 == 0 else turn[::-1]:
            start = time.perf_counter()
            sessions[name].run(None, feeds[name])
            times[name].append(1e3 * (time.perf_counter() - start))
    ratios = {}
    for a, b in itertools.permutations(names, 2):
        low, middle, high = statistics.quantiles(
            [x / y for x, y in zip(times[a], times[b], strict=True)], n=4, method="inclusive"
        )
        ratios[f"{a}/{b}"] = {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return {
        "milliseconds": {
            name: {"median": round(statistics.median(t), 3), "least": round(min(t), 3)}
            for name, t in times.items()
        },
        "ratios": ratios,
        "rounds": rounds,
        "threads": threads,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bed", choices=BEDS, required=True)
    parser.add_argument("--file", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--threads", type=int, default=0, help="0: onnxruntime's choice")
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    files = {name: Path(path) for name, _, path in (entry.partition("=") for entry in given.file)}
    sample = np.array(decoded(BEDS[given.bed], "evaluation").values()[:1])
    given.result.write_text(json.dumps(measure(sample, files, given.rounds, given.threads)))


if __name__ == "__main__":
    main()
