"""The results file: one JSON per machine and day, one row per measurement, written after every row."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.beds import ROOT, testbed_path

SCHEMA = 1
_PACKAGES = (
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxsim",
    "onnx-graphsurgeon",
    "numpy",
    "scipy",
    "torch",
    "pillow",
)


def machine() -> dict[str, Any]:
    """The processor and memory; nothing that names the machine."""
    info = _lines("/proc/cpuinfo")
    flags = set(info.get("flags", "").split())
    telling = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
    memory = int(_lines("/proc/meminfo").get("MemTotal", "0 kB").split()[0]) / 2**20
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "model": "-".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "flags": telling,
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of everything whose version may change a number."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_id() -> str:
    """Eight hex digits of the hash of the package's source, so that a row tells which code it measured."""
    hasher = hashlib.sha256()
    for path in sorted([*(ROOT / "onnxptq").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]):
        hasher.update(path.relative_to(ROOT).as_posix().encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:8]


def commit() -> str:
    """The commit that is checked out, "" outside a repository."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return ""
    return found.stdout.strip()


def default_path() -> Path:
    """``results/<date>-<processor>-<cores>c.json``."""
    facts = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|processor|cpu", "", facts["cpu"].lower())).strip("-")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return ROOT / "benchmarks" / "results" / f"{today}-{slug}-{facts['cores']}c.json"


def command_line() -> str:
    """This command as anyone would type it, without where its results went."""
    module = Path(sys.argv[0]).stem
    given = sys.argv[1:]
    if "--out" in given:
        place = given.index("--out")
        given = given[:place] + given[place + 2 :]
    text = " ".join(["python", "-m", f"benchmarks.{module}", *map(shlex.quote, given)])
    return text.replace(str(testbed_path().resolve()), "$ONNXPTQ_TESTBED").replace(str(ROOT), ".")


class ResultsFile:
    """Rows by key. A row is ``{"key": ..., "benchmark": ..., "source": ..., ...}``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content.get("schema") != SCHEMA:
                raise SystemExit(f"'{path}' has another schema; give another --out.")
            self._rows = {row["key"]: row for row in content["rows"]}

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of ``key``, if it was measured without failing."""
        row = self._rows.get(key)
        return None if row is None or row.get("error") else row

    def rows(self, benchmark: str) -> list[dict[str, Any]]:
        """All rows of one benchmark, failed ones too."""
        return [row for row in self._rows.values() if row["benchmark"] == benchmark]

    def add(self, benchmark: str, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Put a row in place of the one with the same key, and write the file."""
        row = {
            "key": key,
            "benchmark": benchmark,
            "source": source_id(),
            **values,
            "commit": commit(),
            "command": command_line(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self._rows[key] = row
        content = {
            "schema": SCHEMA,
            "machine": machine(),
            "versions": versions(),
            "rows": [self._rows[name] for name in sorted(self._rows)],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)
        return row


def is_wanted(results: ResultsFile, key: str, *, force: bool, stale: bool) -> bool:
    """Whether to measure ``key``: it is absent or failed, or it is asked for again."""
    row = results.get(key)
    return row is None or force or (stale and row["source"] != source_id())


def _lines(path: str) -> dict[str, str]:
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
