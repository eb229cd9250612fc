"""What ``onnxptq sensitivity`` found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxptq.validate.report import SCHEMA_VERSION, BitRow, BlockScore, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """How much the network's output suffers from quantizing single blocks and packs. All names are the user's.

    Attributes:
        model, fingerprint: the file and its contents.
        target: whose placement was measured.
        loss: the measure at the output: ``kl`` or ``relative`` (see :mod:`onnxptq.lowering.output_loss`).
        weight_bits, activation_bits: of the network whose blocks have the scores S and Omega.
        samples: calibration samples that losses per number of bits were measured on.
        blocks: their scores, and the packs that follow from them.
        packs: the loss of each pack alone per number of bits.
    """

    model: str
    fingerprint: str
    target: str
    loss: str
    weight_bits: int
    activation_bits: int
    samples: int
    blocks: tuple[BlockScore, ...]
    packs: tuple[BitRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings and finite numbers, under ``schema_version``."""
        return {"schema_version": SCHEMA_VERSION, **plain(self)}
