"""Every test of this folder draws the same numbers whatever ran before it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.lowering import lowering_oracle


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    lowering_oracle.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
