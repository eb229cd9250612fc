"""What a user wants from a quantization run: one frozen value, read from and written to YAML.

Every command-line option of ``onnxptq quantize`` that changes the result is a field here, under the same
name, so a run can be repeated from its report.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onnxptq.errors import RecipeError
from onnxptq.settings import Settings, load_yaml

Target = Literal["ort-cpu", "tensorrt", "simulate"]
ObserverChoice = Literal["auto", "mse", "minmax", "percentile", "entropy"]
Method = Literal["auto", "rtn", "pack-ptq", "brecq", "qdrop", "adaround", "aiqvit"]
Effort = Literal["fast", "balanced", "paper"]
Allocator = Literal["exact", "greedy"]
LowRank = Literal["off", "merge", "branch", "auto"]

_FLOOR_DB = 20.0
_ROUNDING: tuple[Method, ...] = ("brecq", "qdrop", "adaround")
_LEARNT: tuple[Method, ...] = (*_ROUNDING, "aiqvit")


class TensorRule(BaseModel):
    """Exceptions for the tensors or nodes that ``match`` names (see :mod:`onnxptq.selectors` for patterns)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str = Field(min_length=1)
    observer: Literal["mse", "minmax", "percentile", "entropy"] | None = None
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    activation_bits: int | None = Field(default=None, ge=2, le=8)


class Recipe(Settings):
    """All settings of a run; the defaults need no reading.

    Args:
        target: where the file will run.
        method: ``auto`` equalizes channels, corrects biases and picks ranges by measuring the output, and with
            fewer than 8 bits solves the network pack by pack; ``rtn`` is plain round-to-nearest with one
            observer, the baseline, with rescaled channels and corrected biases where ``equalize`` and
            ``correct_bias`` ask for them. ``pack-ptq`` reconstructs packs of blocks; ``brecq`` and ``qdrop`` single
            blocks, ``adaround`` single layers, as published; ``aiqvit`` single blocks through low-rank
            corrections of their weights.
        effort: how packs are solved. ``fast`` takes no gradient step, ``balanced`` a few hundred per pack,
            ``paper`` 20 000. None is ``fast`` for ``auto`` and ``balanced`` for the other methods.
        steps: gradient steps per pack, instead of as many as the effort takes; the size of a step stays the same.
        max_pack_blocks: blocks in a pack at most.
        output_loss: how the network's outputs are compared where blocks are scored, bits chosen and scales tuned:
            ``kl`` divergence of class scores, ``relative`` squared error, or ``auto`` by their shapes. Scores of
            tokens (batch, tokens, classes) and of positions (batch, classes, ...) have to be asked for.
        loss: what gradient steps make small: ``plain`` noise over signal of a pack's outputs, or with ``fisher``
            the same with each channel weighed by how much it moves the network's output.
        unknown_operators: what becomes of operators that have no torch form where packs are solved: ``float`` lets
            onnxruntime run them in between, unquantized, and nothing is learnt through them; ``refuse`` stops methods
            that need torch, and has ``auto`` round layers one by one.
        low_rank: ``merge`` learns weights through low-rank corrections, of ranks that are searched for, and merges
            these before rounding; ``off`` learns the weights themselves; ``branch`` puts what rounding has spoilt
            beside the layers where that pays, in float and of low rank; ``auto`` measures all of these that go with
            method and effort. None is ``merge`` for ``aiqvit`` and ``off`` for the other methods.
        low_rank_candidates: ranks that ``merge`` chooses from, as far as a layer goes; None is 10, 20, 50, 100
            and 150.
        easy_first: whether gradient steps see the samples with the lowest loss first. None does so for ``aiqvit``.
        focus: whether gradient steps learn both ends of softmax ranges, instead of their scale. None does so for
            ``aiqvit``.
        tune: whether gradient steps on the network's outputs learn scales and biases in the end. None does so for
            ``auto``.
        softmax_root: the order of the root of softmax weights that is put on a uniform grid, so that points for the
            weights lie the closer the smaller they are; 1 takes the weights themselves. For ``simulate``; None is
            what leaves least noise there for ``auto``, and 1 for other methods and targets.
        weight_bits, activation_bits: grid sizes, 2 to 8. A deployment target maps what it cannot run to 8.
            Where bits are chosen per pack, the analysis starts from these (default: nearest to the average).
        residuals: whether ``simulate`` quantizes the sums of residual connections as well.
        observer: how activation ranges are chosen; ``auto`` measures several on calibration samples.
        percentile: percent of values kept by the percentile observer.
        include, exclude: node selectors, a list or a single one; with ``include`` only matching nodes are quantized.
        rules: per-tensor exceptions; the last match wins.
        equalize, rotate, compensate, correct_bias: what every method but ``rtn`` tries, and can be turned off.
            None is that; packs in closed form cannot do without the last two.
        shift: whether channels shifted to the middle of their ranges are tried. None does so behind activations
            only, by subtractions, for a target whose activations are symmetric about 0, and at 8 bits shifts the
            values of attention against the noise of quantized attention weights; with ``aiqvit`` it tries all.
        samples: at most this many calibration samples, spread evenly over the data.
        holdout: share of the samples kept out of calibration for the quality numbers, where no evaluation
            data is given.
        opset: raise the model to this opset.
        simplify: whether onnxsim cleans the model first.
        provider: execution provider for calibration and checks.
        max_memory: budget in MiB for activations held at once.
        preprocess: how pictures become inputs (the fields of ImagePreprocess); what is absent is guessed.
        min_sqnr, min_agreement: quality gates on held-out samples (dB; share of equal top-1).
        floor: where the outputs stay below this many dB on calibration samples, the nodes that spoil them
            are left in float and reported; None turns this off, ``auto`` is 20 dB with 8 bits and off with fewer.
        enough: once the outputs reach this many dB on calibration samples, no further alternative for the
            weights is tried; None tries all. Packs are solved regardless.
        seed: for rotations, for the order of samples in gradient steps, and for random calibration data where
            that was asked for.
        average_bits: choose bits per pack so that weights, and on their own activations, average this many. Targets
            that execute 8-bit activations keep them at 8.
        average_activation_bits: another average for activations.
        max_size: choose bits of weights so that the file takes at most this many megabytes (10^6 bytes).
        max_loss: choose bits of weights so that the expected output loss stays within this, at least size.
        allocator: ``exact``, or the ``greedy`` one of the Pack-PTQ paper (averages only), for comparison.
        plan: file with the bits of every pack, to apply instead of choosing.

    Raises:
        RecipeError: unknown keys (with the nearest known ones) or illegal values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Target = "ort-cpu"
    method: Method = "auto"
    effort: Effort | None = None
    steps: int | None = Field(default=None, ge=1)
    max_pack_blocks: int | None = Field(default=4, ge=1)
    loss: Literal["plain", "fisher", "global-local"] = "plain"
    output_loss: Literal["auto", "kl", "relative"] = "auto"
    unknown_operators: Literal["float", "refuse"] = "float"
    low_rank: LowRank | None = None
    low_rank_candidates: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    easy_first: bool | None = None
    focus: bool | None = None
    tune: bool | None = None
    softmax_root: int | None = Field(default=None, ge=1, le=8)
    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    residuals: bool = False
    observer: ObserverChoice = "auto"
    percentile: float = Field(default=99.999, gt=50.0, le=100.0)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[TensorRule, ...] = ()
    equalize: bool | None = None
    rotate: bool | None = None
    shift: bool | None = None
    compensate: bool | None = None
    correct_bias: bool | None = None
    samples: int = Field(default=256, ge=1)
    holdout: float = Field(default=0.2, ge=0.0, lt=1.0)
    opset: int | None = Field(default=None, ge=13, le=26)
    simplify: bool = True
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    max_memory: int | None = Field(default=None, ge=1)
    preprocess: dict[str, Any] = Field(default_factory=dict)
    min_sqnr: float | None = None
    min_agreement: float | None = Field(default=None, ge=0.0, le=1.0)
    floor: float | Literal["auto"] | None = "auto"
    enough: float | None = 35.0
    seed: int = Field(default=0, ge=0)
    average_bits: float | None = Field(default=None, ge=2.0, le=8.0)
    average_activation_bits: float | None = Field(default=None, ge=2.0, le=8.0)
    max_size: float | None = Field(default=None, gt=0.0)
    max_loss: float | None = Field(default=None, ge=0.0)
    allocator: Allocator = "exact"
    plan: str | None = None

    @field_validator("low_rank_candidates", mode="before")
    @classmethod
    def _numbers_in_a_text(cls, value: object) -> object:
        """As the command line gives them, between commas."""
        return value.split(",") if isinstance(value, str) else value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_selector(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _baseline_is_plain(self) -> Self:
        if self.method == "rtn" and self.observer == "auto":
            object.__setattr__(self, "observer", "mse")
        if self.method == "rtn" and self.effort is not None:
            raise ValueError("method rtn learns nothing, so it takes no effort")
        tried = [name for name in ("rotate", "shift", "compensate") if getattr(self, name)]
        if self.method == "rtn" and tried:
            raise ValueError(
                f"method rtn rounds to nearest and takes no {' or '.join(tried)}; of the exact changes to a model it "
                "takes equalize"
            )
        return self

    @model_validator(mode="after")
    def _closed_form_is_whole(self) -> Self:
        left = [name for name in ("compensate", "correct_bias") if getattr(self, name) is False]
        if left and self._is_closed_form:
            raise ValueError(
                f"{left[0]} cannot be left out where packs are solved in closed form: layers are rounded with the "
                "error spread over the rest, and biases follow from it (method rtn does neither)"
            )
        return self

    @model_validator(mode="after")
    def _only_simulated(self) -> Self:
        if self.residuals and self.target != "simulate":
            raise ValueError(
                "residuals is for target simulate: tensorrt quantizes sums of residual connections in any case, "
                "ort-cpu adds them faster in float"
            )
        if (self.softmax_root or 1) > 1 and self.target != "simulate":
            raise ValueError(f"softmax_root is for target simulate: no kernel of {self.target} takes powers")
        return self

    @model_validator(mode="after")
    def _options_of_learning(self) -> Self:
        if self.low_rank == "merge":
            if not self.learns:
                raise ValueError("low_rank merge is learnt: it needs effort balanced or paper")
            if not self._can_merge:
                raise ValueError(f"method {self.method} learns roundings, so it takes no low_rank merge")
        if self.low_rank in ("branch", "auto") and len(self.low_rank_choices) < (self.low_rank == "auto") + 1:
            raise ValueError(
                f"low_rank {self.low_rank} needs method auto or pack-ptq, effort fast or balanced, and packs, which "
                "auto solves below 8 bits or where an effort is given"
            )
        if self.effort == "fast" and self.method in _LEARNT:
            raise ValueError(f"method {self.method} is learnt: it needs effort balanced or paper")
        if self.steps is not None and not self.learns:
            raise ValueError("steps are gradient steps: they need effort balanced or paper")
        if self.loss != "plain" and not self.learns:
            raise ValueError(
                f"loss {self.loss} is made small by gradient steps: it needs effort balanced or paper"
            )
        if self.low_rank_candidates == ():
            raise ValueError("low_rank_candidates holds no rank")
        if self.low_rank_candidates and self.low_rank is None and "merge" not in self.low_rank_choices:
            raise ValueError("low_rank_candidates are ranks of low_rank merge")
        if self.easy_first and not self.learns:
            raise ValueError("easy_first orders gradient steps: it needs effort balanced or paper")
        if self.tune and not self.learns:
            raise ValueError("tune takes gradient steps: it needs effort balanced or paper")
        if self.focus and not self.learns:
            raise ValueError("focus is learnt: it needs effort balanced or paper")
        return self

    @property
    def is_low_bit(self) -> bool:
        """Whether anything gets fewer than 8 bits."""
        bits = [self.weight_bits, self.activation_bits]
        bits += [b for rule in self.rules for b in (rule.weight_bits, rule.activation_bits) if b is not None]
        return min(bits) < 8 or bool(self.bit_budget) or self.plan is not None

    @property
    def tries_roots(self) -> bool:
        """Whether the order of the root of softmax weights is chosen by measurement."""
        return self.softmax_root is None and self.method == "auto" and self.target == "simulate"

    @property
    def tries_rotation(self) -> bool:
        """Whether rotated channels are tried."""
        return self.method != "rtn" and self.rotate is not False

    @property
    def tries_rescaling(self) -> bool:
        """Whether channels are rescaled."""
        return self.method != "rtn" if self.equalize is None else self.equalize

    @property
    def compensates(self) -> bool:
        """Whether error-compensated rounding is tried."""
        return self.method != "rtn" and self.compensate is not False

    @property
    def corrects_biases(self) -> bool:
        """Whether biases are corrected."""
        return self.method != "rtn" if self.correct_bias is None else self.correct_bias

    @property
    def tries_shift(self) -> bool:
        """Whether shifted channels are tried between layers; AIQViT makes the offsets of channels behind a LayerNorm
        alike, as it does their scales."""
        return self.method != "rtn" and (self.method == "aiqvit" if self.shift is None else self.shift)

    @property
    def tries_subtraction(self) -> bool:
        """Whether shifted channels are tried behind activations, where the target's grids make that worth it."""
        return self.method != "rtn" and self.shift is not False

    @property
    def shifts_values(self) -> bool:
        """Whether the values of attention are shifted, where their weights are quantized."""
        return self.tries_subtraction and not self.is_low_bit

    @property
    def is_solved_by_packs(self) -> bool:
        """Whether the network is solved pack by pack."""
        if self.method in ("auto", "rtn"):
            return self.method == "auto" and (self.is_low_bit or self.effort is not None)
        return True

    @property
    def low_rank_choices(self) -> tuple[LowRank, ...]:
        """What ``low_rank`` comes to: one, or with ``auto`` all that the method allows; empty where it does not."""
        possible: dict[LowRank, bool] = {
            "off": True,
            "merge": self._can_merge,
            "branch": self._is_closed_form,
        }
        if self.low_rank is None:
            return ("merge",) if self.learns and self.method == "aiqvit" else ("off",)
        asked: tuple[LowRank, ...] = tuple(possible) if self.low_rank == "auto" else (self.low_rank,)
        return tuple(choice for choice in asked if possible[choice])

    @property
    def _can_merge(self) -> bool:
        return self.learns and self.method not in _ROUNDING

    @property
    def _is_closed_form(self) -> bool:
        """Whether packs are rounded in closed form, which branches make up for: other methods and effort ``paper``
        take roundings anew."""
        is_kept = self.method in ("auto", "pack-ptq") and self.reconstruction_effort != "paper"
        return self.is_solved_by_packs and is_kept

    @property
    def merges_low_rank(self) -> bool:
        """Whether weights are learnt through low-rank corrections, and nothing else is tried."""
        return self.low_rank_choices == ("merge",)

    @property
    def is_easy_first(self) -> bool:
        """Whether gradient steps see the samples with the lowest loss first."""
        return self.learns and (self.method == "aiqvit" if self.easy_first is None else self.easy_first)

    @property
    def learns_focus(self) -> bool:
        """Whether gradient steps learn both ends of softmax ranges."""
        return self.learns and (self.method == "aiqvit" if self.focus is None else self.focus)

    @property
    def tunes(self) -> bool:
        """Whether scales and biases are learnt on the network's outputs in the end."""
        return self.learns and (self.method == "auto" if self.tune is None else self.tune)

    @property
    def learns(self) -> bool:
        """Whether gradient steps are taken."""
        return self.is_solved_by_packs and self.reconstruction_effort != "fast"

    @property
    def needs_torch(self) -> bool:
        """Whether nothing can be done unless torch runs the network."""
        return bool(self.bit_budget) or self.method not in ("auto", "rtn")

    @property
    def reconstruction_effort(self) -> Effort:
        """The effort, or the method's own."""
        return self.effort or ("fast" if self.method == "auto" else "balanced")

    @property
    def least_db(self) -> float | None:
        """The floor, where it holds: few bits rarely reach what 8 bits do, so there it must be asked for."""
        if self.floor == "auto":
            return None if self.is_low_bit else _FLOOR_DB
        return self.floor

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        names = ("average_bits", "max_size", "max_loss", "plan")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: bits are chosen by one of them")
        if self.average_activation_bits is not None and self.average_bits is None:
            raise ValueError("average_activation_bits goes with average_bits")
        if self.allocator == "greedy" and self.average_bits is None:
            raise ValueError("the greedy allocator needs average_bits")
        if self.allocator == "greedy" and self.average_activation_bits is not None:
            raise ValueError(
                "the greedy allocator gives weights and activations of a pack the same bits, so it takes "
                "no average_activation_bits"
            )
        if self.target != "simulate" and self.allocator == "greedy":
            raise ValueError(
                "the greedy allocator gives weights and activations of a pack the same bits: it needs --target "
                f"simulate, since {self.target} executes activations at 8"
            )
        if self.target != "simulate" and (self.average_activation_bits or 8.0) < 8.0:
            raise ValueError(
                f"average_activation_bits {self.average_activation_bits:g} is out of reach: {self.target} executes "
                "activations at 8 bits, --target simulate at 2 to 8"
            )
        return self

    @model_validator(mode="after")
    def _start_near_the_average(self) -> Self:
        near = {"weight_bits": self.average_bits, "activation_bits": self.average_of_activations}
        for name, average in near.items():
            if average is not None and name not in self.model_fields_set:
                object.__setattr__(self, name, round(average))
        return self

    @property
    def average_of_activations(self) -> float | None:
        """What activations may average where ``average_bits`` is given: the same, unless they have an average of
        their own or the target executes them at 8 bits."""
        if self.average_bits is None or self.average_activation_bits is not None:
            return self.average_activation_bits
        return self.average_bits if self.target == "simulate" else 8.0

    @property
    def bit_budget(self) -> dict[str, float]:
        """The budget that bits per pack are to be chosen for, by field name; empty where there is none."""
        names = ("average_bits", "average_activation_bits", "max_size", "max_loss")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def create(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from plain values.

        Raises:
            RecipeError: unknown keys (with the nearest known ones) or illegal values.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise cls.refused(error, where) from None

    @classmethod
    def refused(cls, error: ValidationError, where: str = "recipe") -> RecipeError:
        """What is raised instead of ``error``; ``where`` the values come from."""
        return RecipeError(_explain(error, where), _remedy(error))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: unreadable file, invalid YAML, unknown keys or illegal values.
        """
        return cls.create(read_yaml_mapping(Path(path)), where=str(path))

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is absent by default."""
        return yaml.safe_dump(_present(self), sort_keys=False)

    def updated(self, **changes: Any) -> Recipe:
        """A validated copy with ``changes`` applied."""
        return Recipe.create({**self.model_dump(exclude_unset=True), **changes})


def _present(model: BaseModel) -> dict[str, Any]:
    """Plain values of a model; None only where it differs from the default, as it then means something."""
    fields = type(model).model_fields
    values = model.model_dump(mode="json")
    present = {
        name: value for name, value in values.items() if value is not None or fields[name].default is not None
    }
    if isinstance(model, Recipe):
        present["rules"] = [_present(rule) for rule in model.rules]
    return present


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds something else.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read '{path}': {error.strerror}.", "Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise RecipeError(f"'{path}' is not valid YAML: {detail}", "Correct the file.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"'{path}' must hold a mapping, not a {type(values).__name__}.",
            "Write one 'name: value' per line.",
        )
    return {str(key): value for key, value in values.items()}


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for places, item in _failures(error):
        name = ".".join(map(str, places)) or "(whole)"
        if item["type"] == "extra_forbidden":
            known = TensorRule.model_fields if places[0] == "rules" else Recipe.model_fields
            near = difflib.get_close_matches(str(places[-1]), known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            lines.append(f"unknown key '{name}'{hint}")
        elif not places:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            # YAML has lists; that they are kept as tuples is nobody's concern.
            wrong = "Input should be a list" if item["type"] == "tuple_type" else item["msg"]
            lines.append(f"'{name}': {wrong} (got {item['input']!r})")
    return f"Invalid {where}: " + "; ".join(lines)


def _remedy(error: ValidationError) -> str:
    """Where to read on: rules are no option of the command line."""
    if any(item["loc"][:1] == ("rules",) for item in error.errors()):
        return f"Keys of a rule: {', '.join(TensorRule.model_fields)}. See docs/recipes.md#rules."
    return "See: onnxptq quantize --help"


def _failures(error: ValidationError) -> list[tuple[tuple[int | str, ...], dict[str, Any]]]:
    """Each value that was refused: where it is, and what is wrong. Of a value that may have one of several types
    pydantic tells what each of them misses, one by one."""
    found: dict[tuple[int | str, ...], list[dict[str, Any]]] = {}
    for item in error.errors():
        place = item["loc"]
        is_choice = len(place) == 2 and place[0] in Recipe.model_fields and isinstance(place[1], str)
        found.setdefault(place[:1] if is_choice else place, []).append(dict(item))
    return [
        (place, {**items[0], "msg": ", or ".join(item["msg"] for item in items)})
        for place, items in found.items()
    ]
