"""Sums of rows that wait for each other are those of the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxptq.reconstruct import gram as module
from onnxptq.reconstruct.gram import Gram, Waiting


@pytest.mark.parametrize("elements", [1, 100, 10**9], ids=["at once", "now and then", "at the end"])
@pytest.mark.parametrize("has_floats", [False, True])
def test_rows_that_wait(elements: int, has_floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING_ELEMENTS", elements)
    rng = np.random.default_rng(0)
    pieces = [rng.standard_normal((2, n, 5)).astype(np.float32) for n in (1, 7, 3, 12)]
    read = [np.round(piece) for piece in pieces]
    waiting = Waiting(Gram.empty(2, 5, has_floats=has_floats))
    for rows, quantized in zip(pieces, read, strict=True):
        waiting.add(rows, quantized)
    found = waiting.finish()
    x, q = (np.concatenate(values, axis=1).astype(np.float64) for values in (pieces, read))
    assert found.rows == 23
    close = {"rtol": 1e-5, "atol": 1e-5}  # products are summed in float32
    np.testing.assert_allclose(found.quantized, np.einsum("gnj,gnk->gjk", q, q), **close)
    np.testing.assert_allclose(found.mixed, np.einsum("gnj,gnk->gjk", q, x), **close)
    np.testing.assert_allclose(found.float_total, x.sum(axis=1), **close)
    np.testing.assert_allclose(found.quantized_total, q.sum(axis=1), **close)
    if has_floats:
        np.testing.assert_allclose(found.floats, np.einsum("gnj,gnk->gjk", x, x), **close)
    else:
        assert found.floats is None


def test_nothing_waits_twice() -> None:
    waiting = Waiting(Gram.empty(1, 3))
    rows = np.ones((1, 4, 3), np.float32)
    waiting.add(rows, rows)
    assert waiting.finish().rows == 4
    assert waiting.finish().rows == 4
