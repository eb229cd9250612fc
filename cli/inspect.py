"""``onnxptq inspect``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .options import MODEL, output_options, selector_options
from .progress import TerminalProgress

if TYPE_CHECKING:
    from onnxptq.inspection import AttentionRow, Inspection, PostNormRow
    from onnxptq.partition.describe import BlockRow
    from onnxptq.types import UserNode


@click.command()
@click.argument("model", type=MODEL)
@selector_options
@click.option("--blocks", is_flag=True, help="Also list the blocks that the network falls into.")
@click.option(
    "--attention", is_flag=True, help="Also list attention, layers behind normalizations, and Gelu outputs."
)
@click.option(
    "--names",
    is_flag=True,
    help="Also list all nodes and what they write, as selectors name them, and what they became.",
)
@output_options
def inspect(
    model: Path,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    blocks: bool,
    attention: bool,
    names: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """List MODEL's operators and parameters, and what each target would quantize and why not."""
    from onnxptq.inspection import inspect as run
    from onnxptq.recipe import Recipe

    with TerminalProgress(quiet=quiet or as_json, verbose=verbose) as progress:
        found = run(model, recipe=Recipe(include=include, exclude=exclude), progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    if quiet:
        return
    console = Console(highlight=False)
    console.print(
        f"{escape(found.model)}: opset {found.opset}, {found.nodes} nodes, {found.parameters:,} parameters, "
        f"{found.weight_bytes / 1e6:.1f} MB of weights as float32",
        soft_wrap=True,
    )
    for name, shape in found.inputs.items():
        console.print(f"  input {escape(name)} {escape(str(list(shape)))}")
    console.print(f"  outputs {escape(', '.join(found.outputs))}")
    _print_transformer_line(console, found, is_listed=attention)
    table = Table(
        "operator", "count", *found.targets, title="Quantized nodes per target", title_justify="left"
    )
    for op, count in found.operators.items():
        table.add_row(op, str(count), *(str(view.quantized.get(op, "")) for view in found.targets.values()))
    console.print(table)
    for name, view in found.targets.items():
        console.print(
            f"{name}: {view.activations} activations, {view.weights} weights, {len(view.skips)} left in float"
        )
        for skip in view.skips if verbose else view.skips[:5]:
            console.print(f"  {escape(skip.site)}: {escape(skip.reason)}", soft_wrap=True)
        if len(view.skips) > 5 and not verbose:
            console.print(f"  ... {len(view.skips) - 5} more with --verbose")
    if blocks:
        console.print(_block_table(found.blocks))
    if attention:
        console.print(_attention_table(found.attention))
        console.print(_norm_table(found.post_norms))
        console.print(f"Gelu outputs: {escape(', '.join(found.gelus)) or 'none'}", soft_wrap=True)
    if names:
        console.print(_name_table(found.names))
    for note in (*found.notes, *(f"{s.site}: {s.reason}" for s in found.untrainable)):
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _print_transformer_line(console: Console, found: Inspection, *, is_listed: bool) -> None:
    """How much there is for methods for transformers, if anything."""
    layers = sum(len(row.layers) for row in found.post_norms)
    if found.attention or layers:
        console.print(
            f"  attention applied in {len(found.attention)} places, {layers} layers behind normalizations"
            f"{'' if is_listed else ' (--attention lists them)'}",
            soft_wrap=True,
        )


def _name_table(rows: Sequence[UserNode]) -> Table:
    table = Table("node", "operator", "writes", "became", title="Names", title_justify="left")
    for row in rows:
        became = "" if row.homes == (row.name,) else ", ".join(row.homes) or f"nothing: {row.reason}"
        cells = (row.name, row.op, ", ".join(row.outputs), became)
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    return table


def _block_table(rows: Sequence[BlockRow]) -> Table:
    table = Table("", "kind", "layers", "weights", "from", "to", title="Blocks", title_justify="left")
    for row in rows:
        ends = (escape(", ".join(names)) for names in (row.inputs, row.outputs))
        table.add_row(str(row.index), row.kind, str(row.layers), f"{row.weights:,}", *ends)
    return table


def _attention_table(rows: Sequence[AttentionRow]) -> Table:
    table = Table("form", "scores", "weights applied by", title="Attention", title_justify="left")
    for row in rows:
        scores = " and ".join(row.scores) or "computed otherwise"
        table.add_row(row.form, escape(scores + (", masked" if row.is_masked else "")), escape(row.product))
    return table


def _norm_table(rows: Sequence[PostNormRow]) -> Table:
    table = Table("normalization", "read by", title="Layers behind normalizations", title_justify="left")
    for row in rows:
        table.add_row(escape(row.norm), escape(", ".join(row.layers)))
    return table
