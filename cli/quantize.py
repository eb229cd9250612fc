"""``onnxptq quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe

from .options import (
    MODEL,
    PICTURE_FLAGS,
    calibration_option,
    choices,
    given,
    image_options,
    max_pack_blocks_option,
    output_loss_option,
    output_options,
    picture_options,
    samples_option,
    selector_options,
    unknown_operators_option,
    work_dir_option,
)
from .progress import TerminalProgress

if TYPE_CHECKING:
    from onnxptq.pipeline import Result


@click.command()
@click.argument("model", type=MODEL)
@calibration_option
@click.option(
    "--eval",
    "evaluation",
    metavar="DATA",
    help="Inputs for the quality numbers; calibration samples among them are left out. "
    "[default: a fifth of --calib is held out]",
)
@click.option(
    "--labels",
    metavar="FILE",
    help="Labels of the evaluation inputs (.json, .csv, .npy, .npz, or 'folders').",
)
@click.option("-o", "--output", type=MODEL, help="Result. [default: MODEL.int8.onnx]")
@click.option(
    "--report",
    "report_dir",
    type=MODEL,
    help="Folder of report.html and report.json. [default: OUTPUT.report]",
)
@click.option("--no-report", is_flag=True, help="Write no report.")
@click.option("--recipe", "recipe_path", type=MODEL, help="YAML with any of the settings below; options win.")
@click.option("-t", "--target", type=choices("target"), help="Where the file will run. [default: ort-cpu]")
@click.option(
    "--method",
    type=choices("method"),
    help="auto; pack-ptq: reconstruct packs of blocks; brecq, qdrop, adaround, aiqvit: as published; rtn: plain "
    "round-to-nearest. [default: auto]",
)
@click.option(
    "--effort",
    type=choices("effort"),
    help="How packs are solved: in closed form, with a few hundred gradient steps each, or with 20 000. "
    "Left out: fast for auto, else balanced.",
)
@click.option(
    "--loss",
    type=choices("loss"),
    help="What gradient steps make small: the error of a pack's outputs; that weighed by its effect on the "
    "network's output; or it and the error of the network's output. [default: plain]",
)
@click.option(
    "--low-rank",
    type=choices("low_rank"),
    help="merge: learn weights through low-rank corrections, merged before rounding. branch: add what rounding has "
    "spoilt beside layers, in float, where that pays. auto: measure them. Left out: merge for aiqvit, else off.",
)
@click.option(
    "--low-rank-candidates",
    metavar="R,R,...",
    help="Ranks that merge chooses from, as far as a layer goes. Left out: 10,20,50,100,150.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Gradient steps per pack, instead of as many as --effort takes.",
)
@click.option(
    "--easy-first/--no-easy-first",
    default=None,
    help="Gradient steps see the samples with the lowest loss first. Left out: with aiqvit.",
)
@click.option(
    "--focus/--no-focus",
    default=None,
    help="Gradient steps learn both ends of softmax ranges. Left out: with aiqvit.",
)
@click.option(
    "--tune/--no-tune",
    default=None,
    help="Gradient steps on the network's outputs learn scales and biases in the end. Left out: with auto, where "
    "gradient steps are taken.",
)
@click.option(
    "--softmax-root",
    type=int,
    metavar="N",
    help="Quantize softmax weights by their N-th root (target simulate): finer for small ones. Left out: what "
    "measures best with method auto, else 1.",
)
@max_pack_blocks_option
@output_loss_option
@unknown_operators_option
@click.option("-w", "--weight-bits", type=int, help="2 to 8. [default: 8]")
@click.option("-a", "--activation-bits", type=int, help="2 to 8. [default: 8]")
@click.option(
    "--residuals/--no-residuals",
    default=None,
    help="simulate: quantize the sums of residual connections as well. [default: no]",
)
@click.option(
    "--average-bits",
    type=float,
    help="Choose bits per pack: this many on average over weights, and with simulate over activations.",
)
@click.option("--average-activation-bits", type=float, help="Another average for activations (simulate).")
@click.option("--max-size", type=float, metavar="MB", help="Choose bits of weights: at most this file size.")
@click.option(
    "--max-loss", type=float, help="Choose bits of weights: the smallest file within this expected loss."
)
@click.option(
    "--allocator",
    type=choices("allocator"),
    help="exact, or the greedy one of the Pack-PTQ paper. [default: exact]",
)
@click.option("--plan", metavar="FILE", help="Apply the bits of a plan.yaml (see docs/mixed_precision.md).")
@click.option(
    "--observer",
    type=choices("observer"),
    help="How activation ranges are chosen. [default: auto]",
)
@click.option("--percentile", type=float, help="For the percentile observer. [default: 99.999]")
@selector_options
@click.option(
    "--equalize/--no-equalize",
    default=None,
    help="Rescale channels, exactly, beforehand. Left out: with every method but rtn.",
)
@click.option(
    "--rotate/--no-rotate",
    default=None,
    help="Try rotated channels, exact as well. Left out: with every method but rtn.",
)
@click.option(
    "--shift/--no-shift",
    default=None,
    help="Try channels shifted to the middle of their ranges, exact as well. Left out: behind "
    "activations for tensorrt, in attention at 8 bits, and everywhere with aiqvit.",
)
@click.option(
    "--compensate/--no-compensate",
    default=None,
    help="Try error-compensated rounding. Left out: with every method but rtn.",
)
@click.option(
    "--correct-bias/--no-correct-bias",
    default=None,
    help="Correct biases where that helps; with rtn, in any case. Left out: with every method but rtn.",
)
@click.option(
    "--floor",
    metavar="DB",
    help="Leave nodes in float until the outputs reach this; 0 for never, auto for 20 with 8 bits and never "
    "with fewer. [default: auto]",
)
@click.option(
    "--enough",
    type=float,
    metavar="DB",
    help="Try nothing more once the outputs reach this; above 100 for never. [default: 35.0]",
)
@samples_option
@click.option("--holdout", type=float, help="Share held out where --eval is absent. [default: 0.2]")
@click.option("--opset", type=int, help="Raise the model to this opset.")
@click.option(
    "--simplify/--no-simplify", default=None, help="Clean the model with onnxsim first. [default: yes]"
)
@click.option(
    "--provider",
    type=choices("provider"),
    help="Runs calibration and checks. [default: cpu]",
)
@click.option(
    "--max-memory",
    type=int,
    metavar="MIB",
    help="Budget for activations held at once. [default: 1024; 2048 for packs]",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Gate: fail unless every output reaches this.")
@click.option(
    "--min-agreement", type=float, metavar="SHARE", help="Gate: fail unless top-1 agrees this often."
)
@click.option("--seed", type=int, help="For --calib random, rotations and gradient steps. [default: 0]")
@work_dir_option
@image_options
@output_options
@click.pass_obj
def quantize(
    ranks: Ranks | None,
    /,
    model: Path,
    calib: str,
    evaluation: str | None,
    labels: str | None,
    output: Path | None,
    report_dir: Path | None,
    no_report: bool,
    recipe_path: Path | None,
    preprocess: Path | None,
    work_dir: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL (float ONNX) to a QDQ file, check it, and report on it.

    \b
    onnxptq quantize model.onnx --calib photos/
    onnxptq quantize model.onnx --calib photos/ -t tensorrt --exclude '*/head/*' --min-agreement 0.98
    """
    from onnxptq.pipeline import quantize as run

    pictures = picture_options(preprocess, {name: settings.pop(name) for name in PICTURE_FLAGS})
    recipe = _recipe(recipe_path, settings, pictures)
    target = output or model.with_name(f"{model.stem}.int8.onnx")
    folder = None if no_report else report_dir or target.with_name(f"{target.stem}.report")
    with TerminalProgress(quiet=quiet or as_json, verbose=verbose) as progress:
        result = run(
            model,
            target,
            calibration=calib,
            evaluation=evaluation,
            labels=labels,
            recipe=recipe,
            report_dir=folder,
            work_dir=work_dir,
            progress=progress,
            ranks=ranks or ALONE,
        )
    try:
        if as_json:
            click.echo(json.dumps(result.report.to_json(), indent=2))
        elif not quiet:
            _show(result)
    except OSError as error:
        error.add_note(f"The model was written to '{result.output}'.")
        raise


def _show(result: Result) -> None:
    from onnxptq.validate.summary import render_summary

    console = Console(highlight=False)
    page = None if result.report_dir is None else result.report_dir / "report.html"
    console.print(render_summary(result.report, page))
    console.print(f"output  {result.output}", soft_wrap=True, markup=False)
    if page is not None:
        console.print(f"report  {page}", soft_wrap=True, markup=False)


def _recipe(path: Path | None, settings: dict[str, Any], pictures: dict[str, Any]) -> Recipe:
    base = Recipe.from_yaml(path) if path is not None else Recipe()
    changes = given(settings)
    if pictures:
        changes["preprocess"] = {**base.preprocess, **pictures}
    return base.updated(**changes)
