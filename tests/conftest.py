"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def testbed() -> Path:
    """The folder of real models and data; tests that need it are skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("ONNXPTQ_TESTBED", root / ".." / "shared")).resolve()
    if not (folder / "models").is_dir():
        pytest.skip(f"no testbed at {folder} (set ONNXPTQ_TESTBED)")
    return folder
