"""Options, their documentation, and what they become in a recipe."""

from __future__ import annotations

from typing import get_args

import click
import pytest
from click.testing import CliRunner
from onnxptq.cli.main import cli
from onnxptq.cli.options import PICTURE_FLAGS, picture_options
from onnxptq.cli.quantize import quantize

from onnxptq.calibrate.feeds import ImagePreprocess
from onnxptq.calibrate.run import DEFAULT_GROUP_BYTES
from onnxptq.errors import RecipeError
from onnxptq.packing import DEFAULT_MEMORY
from onnxptq.recipe import Recipe

SETTINGS = sorted(set(Recipe.model_fields) - {"rules", "preprocess"})
"""Recipe fields with an option of their own; rules need a file, and pictures have options for each field."""


PICTURES = ImagePreprocess.model_fields


def _options(command: click.Command) -> dict[str, click.Option]:
    return {p.name: p for p in command.params if isinstance(p, click.Option) and p.name}


def test_every_setting_of_a_recipe_is_an_option_of_the_same_name() -> None:
    options = _options(quantize)
    assert set(Recipe.model_fields) - set(options) == {"rules"}


def _recipe_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> Recipe:
    """The recipe that a command line becomes."""
    seen: list[Recipe] = []

    class StopError(Exception):
        pass

    def stop(*_: object, recipe: Recipe, **__: object) -> None:
        seen.append(recipe)
        raise StopError

    monkeypatch.setattr("onnxptq.pipeline.quantize", stop)
    CliRunner().invoke(cli, ["quantize", "net.onnx", "--calib", "data", *options])
    return seen[0]


def test_options_that_are_not_given_leave_the_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _recipe_of(monkeypatch) == Recipe()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("-w", "4", "-a", "6"), {"weight_bits": 4, "activation_bits": 6}),
        (("-t", "simulate", "--method", "rtn"), {"target": "simulate", "method": "rtn", "observer": "mse"}),
        (("--exclude", "a", "--exclude", "b"), {"exclude": ("a", "b")}),
        (("--no-equalize", "--no-compensate"), {"equalize": False, "compensate": False}),
        (("--no-rotate",), {"rotate": False}),
        (("--holdout", "0"), {"holdout": 0.0}),
        (("--seed", "0"), {"seed": 0}),
        (("--size", "8", "--color", "BGR"), {"preprocess": {"size": [8, 8], "color": "BGR"}}),
    ],
)
def test_options_become_settings(
    options: tuple[str, ...], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _recipe_of(monkeypatch, *options).model_dump() == {**Recipe().model_dump(), **changes}


def test_options_win_over_the_recipe_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text("target: tensorrt\nweight_bits: 4\npreprocess: {color: BGR, size: [8, 8]}\n")
    recipe = _recipe_of(monkeypatch, "--recipe", str(path), "-w", "6", "--size", "9")
    assert (recipe.target, recipe.weight_bits) == ("tensorrt", 6)
    assert recipe.preprocess == {"color": "BGR", "size": [9, 9]}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_documented_default_is_the_recipes(name: str) -> None:
    said = _options(quantize)[name].help or ""
    default = Recipe.model_fields[name].default
    if "[default: " not in said:
        assert default in (None, ())
        return
    written = said.split("[default: ")[1].rstrip("]")
    if isinstance(default, bool):
        assert written == ("yes" if default else "no")
    elif name == "max_memory":
        # Not a number of the recipe: without a budget those of calibration and of packs apply.
        assert written == f"{DEFAULT_GROUP_BYTES >> 20}; {DEFAULT_MEMORY >> 20} for packs"
    else:
        assert written == str(default)


@pytest.mark.parametrize("name", [n for n in PICTURE_FLAGS if "Literal" in str(PICTURES[n].annotation)])
def test_pictures_have_the_choices_of_their_fields(name: str) -> None:
    # The command line writes them again, as it would have to import what reads pictures otherwise.
    offered = _options(quantize)[name].type
    assert isinstance(offered, click.Choice)
    assert tuple(offered.choices) == get_args(PICTURES[name].annotation)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_option_is_documented(command: str) -> None:
    for option in _options(cli.commands[command]).values():
        if option.name != "help":
            assert option.help, f"{command} {option.opts}"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_fits_a_wide_terminal(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], terminal_width=100)
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 100


def test_picture_flags_win_over_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("p") / "pictures.yaml"
    path.write_text("size: [224, 224]\nmean: [0.5, 0.5, 0.5]\n")
    options = picture_options(path, {"size": "192,256", "std": "1,2,3", "color": "BGR", "layout": None})
    assert options == {"size": [192, 256], "mean": [0.5, 0.5, 0.5], "std": [1, 2, 3], "color": "BGR"}


@pytest.mark.parametrize(
    ("text", "size"), [("224", [224, 224]), ("192x256", [192, 256]), ("192,256", [192, 256])]
)
def test_sizes(text: str, size: list[int]) -> None:
    assert picture_options(None, {"size": text}) == {"size": size}


@pytest.mark.parametrize("text", ["16.7", "8,8.5", "inf", "nan"])
def test_sizes_that_are_no_pixels(text: str) -> None:
    with pytest.raises(click.BadParameter, match="whole number"):
        picture_options(None, {"size": text})


@pytest.mark.parametrize("text", ["", "axb", "1,,2", "nan,red"])
def test_texts_that_are_no_numbers(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a list of numbers"):
        picture_options(None, {"size": text})


def test_an_absent_picture_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(RecipeError, match="absent"):
        picture_options(tmp_path_factory.mktemp("p") / "absent.yaml", {})
