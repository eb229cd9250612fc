"""The report as one self-contained page: no script, no font, no picture, no style from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from onnxptq.validate import wording
from onnxptq.validate.charts import (
    bits_chart,
    curvature_chart,
    loss_chart,
    network_chart,
    omega_chart,
    range_chart,
)
from onnxptq.validate.report import BlockScore, Report, TensorQuality, plain
from onnxptq.validate.sensitivity import SensitivityReport

WORST = 10
"""Number of tensors shown with their histograms."""

_OPTIONAL = ("top1_agreement", "quantized_accuracy", "equal_fraction")
_LONG_TABLE = 12
"""Rows above which a table starts folded."""


def render_html(report: Report) -> str:
    """The page, as text. The same report gives the same bytes.

    Every name and text of the report is escaped; only the pictures are inserted as markup.
    """
    worst = worst_tensors(report.tensors)
    return _template("report.html.j2").render(
        r=report,
        w=wording,
        output_name=PurePath(report.output.path).name,
        has={name: any(getattr(o, name) is not None for o in report.outputs) for name in _OPTIONAL},
        verdict=wording.verdict(report),
        # Safe: made by matplotlib from numbers, without any text of the report.
        network=Markup(network_chart(report.tensors, worst, "SQNR of each tensor along the network")),
        curvature=Markup(curvature_chart(report.blocks, "S of each block, with the packs")),
        are_packed=_are_packed(report.blocks),
        are_scored=any(block.curvature is not None for block in report.blocks),
        bits=Markup(
            bits_chart(() if report.bit_plan is None else report.bit_plan.packs, "bits of each pack")
        ),
        worst=[
            (tensor, Markup(range_chart(tensor, f"range{i}", "histogram and chosen range")))
            for i, tensor in enumerate(worst)
        ],
        ranks=[(pack.pack, rank) for pack in report.packs for rank in pack.ranks],
        skips=wording.skips_by_reason(report.skips),
        grids=wording.count_by_grid(report),
        kernels=sorted((report.kernels or {}).items(), key=lambda item: (-item[1], item[0])),
        kernel_counts=wording.kernel_counts(report.kernels or {}),
        recipe=yaml.safe_dump(plain(report.recipe), sort_keys=False, allow_unicode=True),
        long=_LONG_TABLE,
        total_seconds=sum(stage.seconds for stage in report.stages),
    )


def render_sensitivity(report: SensitivityReport) -> str:
    """The page of ``onnxptq sensitivity``, as text, under the same rules."""
    return _template("sensitivity.html.j2").render(
        r=report,
        w=wording,
        model_name=PurePath(report.model).name,
        curvature=Markup(curvature_chart(report.blocks, "S of each block, with the packs")),
        are_packed=_are_packed(report.blocks),
        omega=Markup(omega_chart(report.blocks, "Omega of each block")),
        weights=Markup(loss_chart(report.packs, "weights", "loss against bits of weights")),
        activations=Markup(loss_chart(report.packs, "activations", "loss against bits of activations")),
        bits=sorted({b for p in report.packs for b in (*p.weight_loss, *p.activation_loss)}),
    )


def _are_packed(blocks: Sequence[BlockScore]) -> bool:
    """Whether any pack is more than a single block."""
    return len({block.pack for block in blocks}) < len(blocks)


def worst_tensors(tensors: Sequence[TensorQuality], count: int = WORST) -> list[TensorQuality]:
    """The quantized tensors with the lowest finite SQNR, worst first; float ones where none is quantized."""
    finite = [t for t in tensors if math.isfinite(t.sqnr_db) and t.histogram is not None]
    quantized = [t for t in finite if t.low is not None]
    return sorted(quantized or finite, key=lambda t: (t.sqnr_db, t.position))[:count]


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["finite"] = _is_finite
    return environment.get_template(name)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
