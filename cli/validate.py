"""``onnxptq validate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxptq.errors import QualityGateError

from .options import MODEL, PICTURE_FLAGS, choices, image_options, output_options, picture_options
from .progress import TerminalProgress


@click.command()
@click.argument("reference", type=MODEL)
@click.argument("quantized", type=MODEL)
@click.option(
    "--data", required=True, metavar="DATA", help="Inputs to compare on; never the calibration samples."
)
@click.option("--labels", metavar="FILE", help="Labels for accuracy (.json, .csv, .npy, .npz, or 'folders').")
@click.option("--layers", is_flag=True, help="Also compare every tensor that both files name.")
@click.option(
    "--exact", is_flag=True, help="Run QDQ arithmetic of both as written instead of integer kernels."
)
@click.option("--limit", type=click.IntRange(min=1), help="At most this many samples, spread evenly.")
@click.option(
    "--provider",
    type=choices("provider"),
    default="cpu",
    help="Runs both models. [default: cpu]",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Gate: every float output reaches this.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 1), metavar="SHARE", help="Gate: top-1 agrees this often."
)
@click.option(
    "--min-accuracy",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Gate: top-1 accuracy (needs --labels).",
)
@image_options
@output_options
def validate(
    reference: Path,
    quantized: Path,
    data: str,
    labels: str | None,
    preprocess: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    min_sqnr: float | None,
    min_agreement: float | None,
    min_accuracy: float | None,
    **settings: Any,
) -> None:
    """Compare QUANTIZED with REFERENCE on DATA.

    Any two ONNX files of the same inputs and outputs will do. The reference is the float model as a rule; a quantized
    one shows how far two quantized files are apart.
    """
    from onnxptq.comparison import require_gates
    from onnxptq.comparison import validate as run
    from onnxptq.validate.report import plain

    pictures = picture_options(preprocess, {name: settings.pop(name) for name in PICTURE_FLAGS})
    with TerminalProgress(quiet=quiet or as_json, verbose=verbose) as progress:
        found = run(
            reference, quantized, data=data, labels=labels, preprocess=pictures, progress=progress, **settings
        )
    try:
        require_gates(
            found.outputs, min_sqnr=min_sqnr, min_agreement=min_agreement, min_accuracy=min_accuracy
        )
        missed: QualityGateError | None = None
    except QualityGateError as error:
        missed = error
    if as_json:
        click.echo(json.dumps(plain(found), indent=2))
    elif not quiet:
        _show(found)
    if missed is not None:
        raise missed


def _show(found: Any) -> None:
    console = Console(highlight=False)
    table = Table(
        "output",
        "SQNR dB",
        "cosine",
        "top-1 agree",
        "top-5 agree",
        "accuracy float -> quantized",
        title=f"{found.samples} samples",
        title_justify="left",
    )
    for o in found.outputs:
        accuracy = (
            ""
            if o.quantized_accuracy is None
            else f"{o.reference_accuracy:.4f} -> {o.quantized_accuracy:.4f}"
        )
        table.add_row(
            escape(o.name),
            _number(o.sqnr_db, ".2f"),
            _number(o.cosine, ".6f"),
            _number(o.top1_agreement, ".4f"),
            _number(o.top5_agreement, ".4f"),
            accuracy,
        )
    console.print(table)
    if found.layers:
        layers = Table(
            "tensor", "SQNR dB", "behind its quantizer", title="Layer by layer", title_justify="left"
        )
        for row in found.layers:
            layers.add_row(
                escape(row.tensor), _number(row.sqnr_db, ".2f"), _number(row.quantized_sqnr_db, ".2f")
            )
        console.print(layers)
    for note in found.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
