"""``onnxptq sensitivity``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxptq.ranks import ALONE, Ranks

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
    from onnxptq.validate.report import BitRow
    from onnxptq.validate.sensitivity import SensitivityReport


@click.command()
@click.argument("model", type=MODEL)
@calibration_option
@click.option("--report", "report_dir", type=MODEL, help="Folder for sensitivity.html and sensitivity.json.")
@click.option(
    "-t",
    "--target",
    type=choices("target"),
    help="Whose quantizers are measured. [default: simulate]",
)
@click.option("-w", "--weight-bits", type=int, help="Of the network whose blocks are scored. [default: 4]")
@click.option("-a", "--activation-bits", type=int, help="Of its activations. [default: 4]")
@max_pack_blocks_option
@output_loss_option
@unknown_operators_option
@selector_options
@samples_option
@work_dir_option
@image_options
@output_options
@click.pass_obj
def sensitivity(
    ranks: Ranks | None,
    /,
    model: Path,
    calib: str,
    report_dir: Path | None,
    work_dir: Path | None,
    preprocess: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    **settings: Any,
) -> None:
    """Show where MODEL is sensitive: scores of its blocks, and the loss of each pack at 2 to 8 bits.

    Nothing is reconstructed and no model is written.
    """
    from onnxptq.surveying import DEFAULTS
    from onnxptq.surveying import sensitivity as run

    pictures = picture_options(preprocess, {name: settings.pop(name) for name in PICTURE_FLAGS})
    recipe = DEFAULTS.updated(**given(settings), preprocess=pictures)
    with TerminalProgress(quiet=quiet or as_json, verbose=verbose) as progress:
        found = run(
            model,
            calibration=calib,
            recipe=recipe,
            report_dir=report_dir,
            work_dir=work_dir,
            progress=progress,
            ranks=ranks or ALONE,
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif not quiet:
        _print(found)
        if report_dir is not None:
            click.echo(f"report  {report_dir / 'sensitivity.html'}")


def _print(found: SensitivityReport) -> None:
    console = Console(highlight=False)
    table = Table("block", "pack", "from", "to", "S", "Omega", title="Blocks", title_justify="left")
    for b in found.blocks:
        ends = (escape(b.start), escape(b.end))
        table.add_row(str(b.block), str(b.pack), *ends, f"{b.curvature or 0:.4g}", f"{b.omega or 0:.4g}")
    console.print(table)
    console.print(_losses("Loss by bits of weights", [(p, p.weights, p.weight_loss) for p in found.packs]))
    console.print(
        _losses("Loss by bits of activations", [(p, p.activations, p.activation_loss) for p in found.packs])
    )
    console.print(
        f"loss: {found.loss}, on {found.samples} calibration samples; one pack at a time, for {found.target}"
    )


def _losses(title: str, rows: list[tuple[BitRow, int | None, Mapping[int, float]]]) -> Table:
    bits = sorted({b for _, _, losses in rows for b in losses})
    table = Table("pack", "elements", *map(str, bits), title=title, title_justify="left")
    for pack, elements, losses in rows:
        cells = (f"{losses[b]:.2g}" if b in losses else "" for b in bits)
        table.add_row(str(pack.pack), f"{elements or 0:,}", *cells)
    return table
