"""The documentation says what the code does: links, options, fields, defaults, codes and the example."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import numpy as np
import onnx
import pytest
import yaml
from PIL import Image
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cli.main import EXIT_CODES, cli
from cli.options import choices
from onnxptq import errors
from onnxptq.calibrate.feeds import ImagePreprocess
from onnxptq.calibrate.feeds.decode import SUFFIXES
from onnxptq.inspection import Inspection
from onnxptq.recipe import Recipe, TensorRule
from onnxptq.reporting import versions
from onnxptq.targets import TARGETS
from onnxptq.validate.compare import Comparison
from onnxptq.validate.report import SCHEMA_VERSION, Report
from tests.unit.small_nets import Net

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
OWN = [page for page in PAGES if page.name != "operators.md"]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """The anchors that code hosts make of headings: lower case, no punctuation, dashes for blanks."""
    titles = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _options(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    names = {
        name
        for parameter in command.get_params(context)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    return {name for name in names if name.startswith("--")}


COMMANDS = {name: _options(command) for name, command in cli.commands.items()}
ALL_OPTIONS = set().union(*COMMANDS.values(), _options(cli))


def _rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below ``heading``, its head left out."""
    text = f"\n{(ROOT / page).read_text(encoding='utf-8')}".split(f"\n{heading}\n", 1)[1]
    table = next(block for block in text.split("\n\n") if block.lstrip().startswith("|"))
    lines = [line for line in table.strip().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def _words(text: str) -> set[str]:
    """Everything between backticks."""
    return set(re.findall(r"`([^`]+)`", text))


# ---- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = page if not path else page.parent / path
        if not place.exists() or (anchor and anchor not in _anchors(place)):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    waiting, seen = [ROOT / "README.md"], {ROOT / "README.md"}
    while waiting:
        page = waiting.pop()
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            place = (page.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place.is_file() and place not in seen:
                seen.add(place)
                waiting.append(place)
    assert {p for p in PAGES if p.name != "CHANGELOG.md"} <= seen


@pytest.mark.parametrize("page", OWN, ids=_name)
def test_named_source_files_exist(page: Path) -> None:
    """Paths between backticks that look like the repository's own."""
    text = page.read_text(encoding="utf-8")
    named = {
        word for word in _words(text) if re.fullmatch(r"(onnxptq|cli|tests|tools|models|docs)/[\w./-]+", word)
    }
    assert not [word for word in sorted(named) if not (ROOT / word).exists()]


# ---- options ----------------------------------------------------------------------------------


def _own_lines(page: Path) -> Iterator[str]:
    """Lines that speak of onnxptq's options: not pip's, git's and torchrun's, and not the other tools' columns."""
    for line in re.sub(r"torchrun .*? -m onnxptq", "onnxptq", page.read_text(encoding="utf-8")).splitlines():
        if line.startswith(("pip ", "python ")):
            continue
        if page.name == "migration.md" and line.startswith("|"):
            line = line.split("|", 2)[2]
        yield line


@pytest.mark.parametrize("page", OWN, ids=_name)
def test_options_exist(page: Path) -> None:
    named = {option for line in _own_lines(page) for option in OPTION.findall(line)}
    assert not named - ALL_OPTIONS


@pytest.mark.parametrize("page", OWN, ids=_name)
def test_commands_have_the_options_they_are_shown_with(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"(?:`|\$ |^)onnxptq (\w+)([^`\n]*)", text, re.MULTILINE)
    for command, rest in shown:
        assert command in COMMANDS, command
        assert not set(OPTION.findall(rest)) - COMMANDS[command], (command, rest)


def test_every_option_is_documented() -> None:
    named = {option for page in OWN for line in _own_lines(page) for option in OPTION.findall(line)}
    obvious = {"--help", "--version", "--verbose"}
    assert not set().union(*COMMANDS.values()) - named - obvious


# ---- recipes and data -------------------------------------------------------------------------


def _shown_default(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | dict):
        return f"`{value}`"
    return str(value)


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}


def test_recipe_fields_and_defaults() -> None:
    table = {row[0].strip("`"): row[2] for row in _rows("docs/recipes.md", "## Fields")}
    assert table == {name: _shown_default(value) for name, value in _defaults(Recipe).items()}


def test_recipe_options() -> None:
    """The second column holds the options of the same setting, and ``none`` only where there is none."""
    for name, options, *_ in _rows("docs/recipes.md", "## Fields"):
        field = name.strip("`")
        named = set(OPTION.findall(options))
        assert named <= COMMANDS["quantize"]
        if field != "preprocess":
            option = "--" + field.replace("_", "-")
            assert (option in named) == (option in COMMANDS["quantize"]), field


def test_recipe_choices() -> None:
    meaning = {row[0].strip("`"): row[3] for row in _rows("docs/recipes.md", "## Fields")}
    for name in ("target", "method", "effort", "loss", "low_rank", "allocator", "observer", "provider"):
        assert set(choices(name).choices) <= _words(meaning[name]), name


def test_rule_fields() -> None:
    table = {row[0].strip("`"): row[1] for row in _rows("docs/recipes.md", "## Rules")}
    expected = {
        name: "required" if value is PydanticUndefined else _shown_default(value)
        for name, value in _defaults(TensorRule).items()
    }
    assert table == expected


def test_picture_keys() -> None:
    rows = _rows("docs/feeds.md", "## Pictures")
    assert [row[0].strip("`") for row in rows] == list(ImagePreprocess.model_fields)
    for name, option, *_ in rows:
        flag = "--" + name.strip("`").replace("_", "-")
        assert option.strip("`") == (flag if flag in COMMANDS["quantize"] else "none")


def test_picture_suffixes() -> None:
    row = next(
        row for row in _rows("docs/feeds.md", "# Calibration and evaluation data") if "picture" in row[0]
    )
    listed = re.search(r"\(([^)]*)\)", row[0])
    assert listed is not None
    assert {f".{name}" for name in listed[1].split(", ")} == SUFFIXES


def test_the_example_recipe_is_valid() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe = Recipe.create(yaml.safe_load(example))
    assert len(recipe.rules) == 2
    ImagePreprocess.from_options(recipe.preprocess)


# ---- reports and exit codes -------------------------------------------------------------------


def _parts(kind: Any) -> Iterator[type]:
    """The dataclasses inside an annotation such as ``tuple[X, ...] | None``."""
    if is_dataclass(kind) and isinstance(kind, type):
        yield kind
    for part in get_args(kind):
        yield from _parts(part)


def _nested(kind: type) -> set[type]:
    found = {kind}
    for hint in get_type_hints(kind).values():
        for part in _parts(hint):
            found |= _nested(part)
    return found


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in sorted(
        _nested(Report) | _nested(Comparison) | _nested(Inspection), key=lambda kind: str(kind)
    )
}


@pytest.mark.parametrize("name", KINDS)
def test_every_field_of_a_report_is_documented(name: str) -> None:
    words = _words((ROOT / "docs/reports.md").read_text(encoding="utf-8"))
    assert not {field.name for field in fields(KINDS[name])} - words


def test_report_table_lists_what_is_there() -> None:
    named = {word for row in _rows("docs/reports.md", "## report.json") for word in _words(row[0])}
    assert named == {"schema_version", *(field.name for field in fields(Report))}
    text = (ROOT / "docs/reports.md").read_text(encoding="utf-8")
    assert f"`schema_version` is {SCHEMA_VERSION}." in text
    assert set(versions("")) <= _words(text)


def _codes() -> set[int]:
    found = {errors.EXIT_INTERRUPTED, 0}
    waiting: list[type[errors.OnnxPtqError]] = [errors.OnnxPtqError]
    while waiting:
        kind = waiting.pop()
        found.add(kind.exit_code)
        waiting += kind.__subclasses__()
    return found


def test_exit_codes() -> None:
    documented = {int(row[0]) for row in _rows("docs/reports.md", "## Exit codes")}
    assert documented == _codes()
    assert documented == {int(code) for code in re.findall(r"^ +(\d+) ", EXIT_CODES, re.MULTILINE)}


# ---- targets and dependencies -----------------------------------------------------------------


def test_targets_are_listed() -> None:
    readme = {word for row in _rows("README.md", "## Targets") for word in _words(row[0])}
    assert readme == set(TARGETS)
    headings = _anchors(ROOT / "docs/targets.md")
    assert set(TARGETS) <= headings


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_rows_of_the_target_tables_are_documented(target: str) -> None:
    module = __import__(f"onnxptq.targets.{target.replace('-', '_')}", fromlist=["TABLE"])
    operators = " ".join(row[0] for row in _rows("docs/targets.md", f"## {target}"))
    assert set(module.TABLE) <= set(re.findall(r"\w+", operators))


def test_dependencies_are_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.split(r"[><=]", line)[0] for line in project["dependencies"]}
    table = {
        sorted(_words(row[0]))[-1] if len(_words(row[0])) == 1 else row[0].split("`")[1]
        for row in _rows("docs/dependencies.md", "## Always installed")
    }
    assert table == required
    words = _words((ROOT / "docs/dependencies.md").read_text(encoding="utf-8"))
    for extra, lines in project["optional-dependencies"].items():
        assert f"onnxptq[{extra}]" in words
        assert {re.split(r"[><=]", line)[0] for line in lines} <= words


# ---- the example ------------------------------------------------------------------------------


def _classifier(path: Path) -> None:
    net = Net()
    net.conv("stem", "image", (8, 3, 3, 3), strides=[2, 2])
    net.op("Relu", "act", "stem")
    net.conv("body", "act", (8, 8, 3, 3))
    net.op("GlobalAveragePool", "pool", "body")
    net.op("Flatten", "flat", "pool")
    net.op("Gemm", "scores", "flat", net.weight("head.w", 8, 5, scale=2.0), net.weight("head.b", 5))
    onnx.save(net.proto({"image": ("n", 3, 16, 16)}, ["scores"]), path)


def test_the_python_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(example.strip().splitlines()) <= 12
    _classifier(tmp_path / "model.onnx")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        # A colour and a little noise, so that samples differ in more than noise.
        pixels = rng.integers(0, 200, 3) + rng.integers(0, 56, (20, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNXPTQ_CACHE", str(tmp_path / "cache"))
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"^scores: \d+\.\d dB on held-out inputs$", said, re.MULTILINE)
    assert "in float: scores: excluded by 'Gemm'" in said
    onnx.checker.check_model("model.int8.onnx")
    report = json.loads(Path("report/report.json").read_text(encoding="utf-8"))
    assert report["schema_version"] == SCHEMA_VERSION
    assert Path("report/report.html").is_file()
