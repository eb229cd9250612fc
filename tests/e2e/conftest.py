"""What the end-to-end tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.command import Bench, classifier, pictures


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A small classifier and ten samples."""
    folder, work = tmp_path / "user", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    made = Bench(folder=folder, work=work, capsys=capsys)
    made.write(classifier())
    np.savez(made.data, x=pictures(10))
    return made
