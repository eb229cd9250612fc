"""docs/operators.md says what the registry says."""

from __future__ import annotations

from onnxptq.lowering import entries
from tools.operator_table import TARGET, render


def test_the_committed_table_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == render(), "run: python -m tools.operator_table"


def test_every_operator_has_a_row() -> None:
    text = render()
    assert not [entry.op for entry in entries() if entry.op != "Constant" and f"| {entry.op} | " not in text]
