"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from onnxptq.recipe import Recipe, read_yaml_mapping

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL = click.Path(path_type=Path)

PICTURE_FLAGS = ("size", "resize", "color", "layout", "scale", "mean", "std")
"""The parameters that ``image_options`` adds besides ``preprocess``."""


def choices(field: str) -> click.Choice[str]:
    """What a field of the recipe may be set to."""
    allowed = get_args(Recipe.model_fields[field].annotation)
    # A field that may be left out is a union of a Literal and None.
    words = [word for part in allowed for word in get_args(part) or (part,)]
    return click.Choice([word for word in words if isinstance(word, str)])


calibration_option = click.option(
    "--calib",
    required=True,
    metavar="DATA",
    help="Calibration inputs: a folder of pictures, .npy, .npz or "
    "test_data_set_* samples, one .npz, or the word 'random'.",
)

samples_option = click.option(
    "--samples", type=int, help="At most this many calibration samples. [default: 256]"
)

output_loss_option = click.option(
    "--output-loss",
    type=choices("output_loss"),
    help="How the network's outputs are compared where blocks are scored, bits chosen and scales tuned. kl is "
    "for class scores, also of tokens and maps where it is asked for. [default: auto]",
)

unknown_operators_option = click.option(
    "--unknown-operators",
    type=choices("unknown_operators"),
    help="Operators that packs cannot learn through (inspect names them): left in float inside the network that is "
    "learnt, or refused. [default: float]",
)

max_pack_blocks_option = click.option(
    "--max-pack-blocks", type=int, help="Blocks in a pack, at most. [default: 4]"
)

work_dir_option = click.option(
    "--work-dir", type=MODEL, help="Caches. [default: $ONNXPTQ_CACHE or ~/.cache/onnxptq]"
)


def selector_options(command: Command) -> Command:
    """Which nodes are quantized."""
    command = click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Leave these in float. Repeatable."
    )(command)
    return click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Quantize only these: an op type, a name pattern, or re:REGEX. Repeatable.",
    )(command)


def image_options(command: Command) -> Command:
    """How pictures become model inputs."""
    options = [
        click.option("--preprocess", type=MODEL, metavar="FILE", help="YAML with the picture options below."),
        click.option("--size", metavar="H[,W]", help="Input size in pixels."),
        click.option(
            "--resize", type=click.Choice(["short_side", "exact", "none"]), help="How pictures reach it."
        ),
        click.option("--color", type=click.Choice(["RGB", "BGR", "GRAY"]), help="Channel order."),
        click.option("--layout", type=click.Choice(["NCHW", "NHWC", "auto"]), help="Axis order."),
        click.option(
            "--scale", type=float, help="Factor on the bytes; (v * scale - mean) / std. [default: 1/255]"
        ),
        click.option("--mean", metavar="R,G,B", help="Mean per channel. [default: ImageNet]"),
        click.option("--std", metavar="R,G,B", help="Standard deviation per channel. [default: ImageNet]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def output_options(command: Command) -> Command:
    """How much is said, and to whom."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
        click.option("-q", "--quiet", is_flag=True, help="Errors only."),
        click.option("-v", "--verbose", is_flag=True, help="Say more."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def picture_options(preprocess: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The picture options of the file and of the flags together; a flag wins.

    Raises:
        RecipeError: the file cannot be read.
    """
    values = read_yaml_mapping(preprocess) if preprocess is not None else {}
    return {**values, **{name: _parsed(name, value) for name, value in flags.items() if value is not None}}


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that a command line sets."""
    return {name: value for name, value in settings.items() if value not in (None, ())}


def _parsed(name: str, value: Any) -> Any:
    if name not in ("size", "mean", "std"):
        return value
    try:
        numbers = [float(part) for part in str(value).replace("x", ",").split(",")]
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of numbers", param_hint=f"--{name}") from None
    if name == "size":
        if not all(number.is_integer() for number in numbers):
            raise click.BadParameter(f"'{value}' is not a whole number of pixels", param_hint="--size")
        return [int(n) for n in (numbers if len(numbers) > 1 else numbers * 2)]
    return numbers
