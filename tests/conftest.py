"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from onnxptq.ranks import Ranks

# No deadlines: a loaded machine must not fail a test. The same examples every time where machines judge.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def testbed() -> Path:
    """The folder of real models and data; tests that need it are skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("ONNXPTQ_TESTBED", root / ".." / "shared")).resolve()
    if not (folder / "models").is_dir():
        pytest.skip(f"no testbed at {folder} (set ONNXPTQ_TESTBED)")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Rank 0 of two processes; the other one serves."""
    from tests.unit.rank_work import two_ranks

    with two_ranks() as found:
        yield found
