"""Where a network is sensitive to quantization, without quantizing it: :func:`sensitivity`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxptq import feeding, forming, reporting, running, steps
from onnxptq.allocating import survey_bits
from onnxptq.arguments import as_recipe, model_path
from onnxptq.publish import require_writable_folder, write_texts
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe
from onnxptq.runtime import require_runtime
from onnxptq.types import Progress
from onnxptq.validate.html import render_sensitivity
from onnxptq.validate.sensitivity import SensitivityReport

DEFAULTS = Recipe(target="simulate", method="pack-ptq", weight_bits=4, activation_bits=4)

_REPORT_FILES = ("sensitivity.json", "sensitivity.html")


def sensitivity(
    model: str | Path,
    *,
    calibration: object,
    recipe: Recipe | Mapping[str, Any] | None = None,
    report_dir: str | Path | None = None,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> SensitivityReport:
    """S and Omega of every block of ``model``, its packs, and the loss of each pack alone per number of bits.

    Nothing is rounded with compensation, learnt or written but the report: this takes a fraction of what
    ``quantize`` takes.

    Args:
        model: path of a float ONNX file.
        calibration: inputs to calibrate and measure on, as for :func:`onnxptq.quantize`.
        recipe: target, selectors, observer and so on; 4 bits for ``simulate`` by default. Channels are not
            rescaled, whatever it says.
        report_dir: where ``sensitivity.json`` and ``sensitivity.html`` go; none are written by default.
        work_dir: folder for caches; calibration found there is reused.
        progress: told about every long step.
        ranks: as for ``quantize``.

    Raises:
        OnnxPtqError: see :mod:`onnxptq.errors`.
    """
    require_runtime()
    if report_dir is not None:
        require_writable_folder(Path(report_dir), _REPORT_FILES)
    source_path, wanted = model_path(model), as_recipe(recipe, DEFAULTS).updated(equalize=False)
    with running.start(wanted, work_dir, progress, ranks) as run:
        source = steps.canonical_model(run, source_path)
        data = feeding.open_data(run, source, calibration, None, None)
        with feeding.blaming(run, source, data):
            form = forming.prepared(run, source, data)
            survey = survey_bits(form.solver)
        report = SensitivityReport(
            model=str(model),
            fingerprint=source.source_sha256,
            target=wanted.target,
            loss=survey.costs.loss,
            weight_bits=wanted.weight_bits,
            activation_bits=wanted.activation_bits,
            samples=len(data.samples.trial),
            blocks=reporting.block_scores(source, survey.packing),
            packs=reporting.bit_rows(source, survey.packing, survey.costs.packs),
        )
        if report_dir is not None:
            written = json.dumps(report.to_json(), indent=2) + "\n"
            write_texts(
                Path(report_dir),
                dict(zip(_REPORT_FILES, (written, render_sensitivity(report)), strict=True)),
            )
    return report
