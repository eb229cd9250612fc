"""Running a command and measuring what it took: wall time, CPU time, peak memory.

``ru_maxrss`` is not used: Linux starts it at the memory of the process that forked. The peak is the larger of
the main process's ``VmHWM`` and the resident memory of the whole process tree, sampled ten times a second.
Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.beds import ROOT

_PERIOD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a command took. ``cpu_s`` includes children that ended; ``tail`` is the end of what it printed."""

    returncode: int
    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    tail: str

    @property
    def failure(self) -> str | None:
        """Why it failed in one line, None where it did not."""
        if self.returncode == 0:
            return None
        lines = [line.strip() for line in self.tail.splitlines() if line.strip(" ^~")]
        return f"exit {self.returncode}: {lines[-1][:300] if lines else 'no output'}"

    def costs(self) -> dict[str, float]:
        """Numbers for a results row."""
        return {
            "wall_s": round(self.wall_s, 2),
            "cpu_s": round(self.cpu_s, 2),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
        }


def run_measured(command: Sequence[str | Path], *, timeout: float = 3600.0) -> Measured:
    """Run ``command`` in the repository's root, to its end or to ``timeout`` seconds (then returncode 124)."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        peak, sampled, returncode = 0.0, 0.0, 0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = returncode = os.waitstatus_to_exitcode(status)
                    break
                now = time.perf_counter()
                if now - start > timeout:
                    raise TimeoutError
                peak = max(peak, _status_mb(process.pid, "VmHWM"))
                if now - sampled >= _PERIOD:
                    sampled = now
                    peak = max(peak, _tree_mb(process.pid))
                time.sleep(_PERIOD / 5)
        except TimeoutError:
            _kill(process)
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = returncode = 124
        except BaseException:
            _kill(process)
            raise
        wall = time.perf_counter() - start
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8000))
        tail = log.read().decode(errors="replace")
    return Measured(
        returncode=returncode,
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_mb=peak,
        tail=tail,
    )


def end_children_on_termination() -> None:
    """Let a SIGTERM to this process end what it measures too, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _status_mb(pid: int, field: str) -> float:
    return _field_mb(Path(f"/proc/{pid}/status"), field)


def _field_mb(path: Path, field: str) -> float:
    try:
        text = path.read_text()
    except OSError:
        return 0.0
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _tree_mb(pid: int) -> float:
    """Resident memory of a process and all below it; pages that several share count once (PSS)."""
    pids = [pid, *_below(pid)]
    if len(pids) == 1:
        return _status_mb(pid, "VmRSS")
    return sum(_field_mb(Path(f"/proc/{member}/smaps_rollup"), "Pss") for member in pids)


def _below(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children = [int(child) for child in (task / "children").read_text().split()]
                found += [member for child in children for member in (child, *_below(child))]
    return found
