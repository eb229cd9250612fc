"""The method section: load, canonicalize, equalize, calibrate, place, solve, write, check, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxptq import feeding, forming, running, steps
from onnxptq.arguments import as_recipe, model_path
from onnxptq.publish import (
    require_apart,
    require_distinct,
    require_writable,
    require_writable_folder,
    staging,
)
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe
from onnxptq.runtime import require_runtime
from onnxptq.types import Progress
from onnxptq.validate.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run made: the file, its report, and the folder of the written report (None if none was asked)."""

    output: Path
    report: Report
    report_dir: Path | None


def quantize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    calibration: object,
    evaluation: object | None = None,
    labels: object | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    report_dir: str | Path | None = None,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Quantize ``model`` and prove the result.

    Args:
        model: path of a float ONNX file.
        output: path of the result; ``<model>.int8.onnx`` beside the model by default.
        calibration: inputs to calibrate on: anything that :func:`onnxptq.calibrate.feeds.open_feeds` reads.
        evaluation: inputs for the quality numbers; by default a part of ``calibration`` is held out.
        labels: class labels of the evaluation data (see :func:`onnxptq.calibrate.feeds.read_labels`).
        recipe: all other settings, or a dict of some of them.
        report_dir: where ``report.json`` and ``report.html`` go; none are written by default.
        work_dir: folder for caches; calibration found there is reused.
        progress: told about every long step.
        ranks: processes that share the samples; called on the first of them, while the others serve.

    Raises:
        OnnxPtqError: see :mod:`onnxptq.errors`. No output file is left behind then.
    """
    source, wanted = model_path(model), as_recipe(recipe)
    target = Path(output) if output is not None else source.with_name(f"{source.stem}.int8.onnx")
    require_runtime()
    require_distinct(source, target)
    require_writable(target)
    places = {"--report": report_dir, "--work-dir": work_dir}
    require_apart(
        target, {option: None if place is None else Path(place) for option, place in places.items()}
    )
    if report_dir is not None:
        require_writable_folder(Path(report_dir), steps.REPORT_FILES)
    with running.start(wanted, work_dir, progress, ranks) as run:
        float_model = steps.canonical_model(run, source)
        data = feeding.open_data(run, float_model, calibration, evaluation, labels)
        with feeding.blaming(run, float_model, data):
            form = forming.prepared(run, float_model, data)
            form = steps.allocated(run, float_model, form)
            solved = steps.solved(run, form)
            with staging(target) as staged:
                steps.write(run, form.model, solved, staged, data.samples.correction[0])
                checks = steps.check(run, float_model, form, solved, staged, data)
                report = steps.report(run, form.model, solved, form.statistics, staged, target, data, checks)
                folder = steps.write_report(run, report, report_dir)
                steps.require_quality(run, report, folder)
        steps.forget_packs(solved)
    return Result(output=target, report=report, report_dir=folder)
