"""The bits of every pack as a file that people read and edit: ``plan.yaml``.

One entry per pack, in network order, in the user's names. Only the bits and the nodes count when a plan is
applied; everything else says why they were chosen and may be left out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxptq.allocate.choices import Allocation, Choice, PackChoices, average_bits
from onnxptq.errors import RecipeError
from onnxptq.recipe import Recipe, read_yaml_mapping
from onnxptq.types import CanonicalModel, Pack, Sensitivity
from onnxptq.version import __version__

_HEADER = """\
# Bits per pack. Change weight_bits and activation_bits as you like, then apply the file again:
#     onnxptq quantize MODEL --calib DATA --plan plan.yaml
"""

_DIGITS = 6

MEGABYTE = 1_000_000
"""What file sizes are given in."""


class PackEntry(BaseModel):
    """One pack.

    Attributes:
        index: its position in the network.
        nodes: the nodes that the bits hold for.
        weight_bits, activation_bits: None where it quantizes no weights (or no activations).
        inputs, outputs: the tensors it reads from other packs and writes for them.
        blocks: indices of its blocks; ``sensitivity`` (S) and ``omega`` have one number for each.
        weights, activations: elements of its quantized weights, and of what it reads quantized per sample.
        weight_loss, activation_loss: measured loss per number of bits, with nothing else quantized.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    index: int = Field(ge=0)
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    activation_bits: int | None = Field(default=None, ge=2, le=8)
    inputs: tuple[str, ...] = Field(default=(), alias="from")
    outputs: tuple[str, ...] = Field(default=(), alias="to")
    blocks: tuple[int, ...] = ()
    sensitivity: tuple[float, ...] = ()
    omega: tuple[float, ...] = ()
    weights: int | None = None
    activations: int | None = None
    weight_loss: dict[int, float] = Field(default_factory=dict)
    activation_loss: dict[int, float] = Field(default_factory=dict)
    nodes: tuple[str, ...] = Field(min_length=1)

    @property
    def scores(self) -> dict[int, tuple[float, float]]:
        """S and Omega of each block; empty where somebody has left out or changed some of them."""
        lengths = {len(self.blocks), len(self.sensitivity), len(self.omega)}
        pairs = zip(self.sensitivity, self.omega, strict=False)
        return dict(zip(self.blocks, pairs, strict=False)) if len(lengths) == 1 else {}


class BitPlan(BaseModel):
    """Bits for all packs of one model.

    Attributes:
        version: of the program that wrote it.
        model: name of the model file, and ``fingerprint`` its contents; an absent one is not compared.
        target: where the file was to run.
        budget: what was asked for, by the names of the recipe.
        average_weight_bits, average_activation_bits: true averages over elements.
        expected_loss: the sum of the chosen costs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = ""
    model: str = ""
    fingerprint: str = ""
    target: str = ""
    allocator: Literal["exact", "greedy", ""] = ""
    budget: dict[str, float] = Field(default_factory=dict)
    average_weight_bits: float | None = None
    average_activation_bits: float | None = None
    weight_bytes: int | None = None
    expected_loss: float | None = None
    packs: tuple[PackEntry, ...] = Field(min_length=1)

    def to_yaml(self) -> str:
        """The file's text."""
        values = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for entry, pack in zip(values["packs"], self.packs, strict=True):
            # JSON has no infinity, YAML has; and its keys are texts.
            entry.update({n: _rounded(getattr(pack, n)) for n in ("sensitivity", "omega") if n in entry})
            entry.update(
                {n: _rounded(getattr(pack, n)) for n in ("weight_loss", "activation_loss") if n in entry}
            )
        text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
        return _HEADER + text

    def to_json(self) -> dict[str, Any]:
        """The same content for a report, without what is absent."""
        return self.model_dump(mode="python", by_alias=True, exclude_defaults=True)


def _rounded(values: Mapping[int, float] | Sequence[float]) -> dict[int, float] | list[float]:
    if isinstance(values, Mapping):
        return {bits: _round(value) for bits, value in values.items()}
    return [_round(value) for value in values]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def build_bit_plan(
    model: CanonicalModel,
    packs: Sequence[Pack],
    sensitivities: Sequence[Sensitivity],
    choices: Sequence[PackChoices],
    allocation: Allocation,
    *,
    source: CanonicalModel,
    recipe: Recipe,
) -> BitPlan:
    """The plan of an allocation, in the user's names.

    Args:
        model: what was packed: ``source``, maybe in another form that computes the same.
        source: as the user gave it, in canonical form. Nodes that only the other form has (roots of softmax outputs,
            shifts) have no bits of their own; a pack of nothing else is left out.
    """
    known = known_nodes(source)
    scores = {s.block: s for s in sensitivities}
    by_pack = {bits.pack: bits for bits in allocation.bits}
    of_pack = {choice.pack: choice for choice in choices}
    return BitPlan(
        version=__version__,
        model=model.source.name,
        fingerprint=source.source_sha256,
        target=recipe.target,
        allocator=recipe.allocator,
        budget=recipe.bit_budget,
        average_weight_bits=_round(allocation.average_weight_bits),
        average_activation_bits=_round(allocation.average_activation_bits),
        weight_bytes=allocation.weight_bytes,
        expected_loss=_round(allocation.cost),
        packs=tuple(
            PackEntry(
                index=pack.index,
                weight_bits=by_pack[pack.index].weights,
                activation_bits=by_pack[pack.index].activations,
                inputs=tuple(map(model.user_name, pack.inputs)),
                outputs=tuple(map(model.user_name, pack.outputs)),
                blocks=tuple(b.index for b in pack.blocks),
                sensitivity=tuple(_round(scores[b.index].curvature) for b in pack.blocks),
                omega=tuple(_round(scores[b.index].omega) for b in pack.blocks),
                weights=of_pack[pack.index].weight_elements,
                activations=of_pack[pack.index].activation_elements,
                weight_loss=_losses(of_pack[pack.index].weights),
                activation_loss=_losses(of_pack[pack.index].activations),
                nodes=nodes,
            )
            for pack in packs
            if (nodes := tuple(name for name in pack.nodes if name in known))
        ),
    )


def _losses(choices: Sequence[Choice]) -> dict[int, float]:
    return {c.bits: _round(c.cost) for c in choices}


def read_bit_plan(path: Path) -> BitPlan:
    """Read a plan.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or holds unknown keys or illegal values; the
            message names the file, the pack and its first node.
    """
    values = read_yaml_mapping(path)
    try:
        return BitPlan.model_validate(values)
    except ValidationError as error:
        items = error.errors()
        # What is wrong with packs leaves none, which pydantic mentions as well.
        of_packs = [item for item in items if item["loc"][0:1] == ("packs",) and len(item["loc"]) > 1]
        items = [item for item in items if item["loc"] != ("packs",) or not of_packs]
        raise RecipeError(
            f"Invalid plan '{path}': " + "; ".join(_explain(item, values) for item in items),
            "Correct the file; docs/mixed_precision.md lists its keys.",
        ) from None


def _explain(item: Any, values: Mapping[str, Any]) -> str:
    place = list(item["loc"])
    prefix = ""
    fields: Sequence[str] = list(BitPlan.model_fields)
    if len(place) >= 2 and place[0] == "packs" and isinstance(place[1], int):
        prefix = f"{_pack_label(values['packs'][place[1]], place[1])}: "
        place = place[2:]
        fields = [f.alias or name for name, f in PackEntry.model_fields.items()]
    name = ".".join(map(str, place)) or "(whole)"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), fields, n=2)
        return f"{prefix}unknown key '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if item["type"] == "missing":
        return f"{prefix}'{name}' is missing"
    return f"{prefix}'{name}': {item['msg']} (got {item['input']!r})"


def _pack_label(entry: Any, position: int) -> str:
    index = entry.get("index", position) if isinstance(entry, dict) else position
    nodes = entry.get("nodes") if isinstance(entry, dict) else None
    first = f" (from node '{nodes[0]}')" if isinstance(nodes, list) and nodes else ""
    return f"pack {index}{first}"


def executed(plan: BitPlan, activation_bits: int | None) -> BitPlan:
    """The plan with the figures of the bits that it has now: somebody may have edited them, or the target may execute
    its activations at ``activation_bits`` throughout (None: at those of the plan).

    A figure that does not follow from the file is left out, and so is a budget that the bits were not chosen for.
    """
    packs = tuple(
        pack.model_copy(update={"activation_bits": activation_bits})
        if activation_bits is not None and pack.activation_bits is not None
        else pack
        for pack in plan.packs
    )
    figures = {
        "average_weight_bits": _average([(p.weights, p.weight_bits) for p in packs]),
        "average_activation_bits": _average([(p.activations, p.activation_bits) for p in packs]),
        "expected_loss": _expected_loss(packs),
    }
    if packs == plan.packs and all(_is_near(getattr(plan, name), value) for name, value in figures.items()):
        return plan
    changed: dict[str, Any] = {"packs": packs, "weight_bytes": None, "budget": {}, "allocator": ""}
    return plan.model_copy(update={**changed, **figures})


def _average(entries: Sequence[tuple[int | None, int | None]]) -> float | None:
    known = [(n, bits) for n, bits in entries if n is not None and bits is not None]
    if not any(n for n, _ in known) or len(known) < sum(bits is not None for _, bits in entries):
        return None
    return _round(average_bits(known))


def _expected_loss(packs: Sequence[PackEntry]) -> float | None:
    costs = [
        losses.get(bits)
        for pack in packs
        for losses, bits in (
            (pack.weight_loss, pack.weight_bits),
            (pack.activation_loss, pack.activation_bits),
        )
        if bits is not None
    ]
    known = [cost for cost in costs if cost is not None]
    return _round(sum(known)) if len(known) == len(costs) else None


def _is_near(stated: float | None, found: float | None) -> bool:
    # What was stated was added up before the parts were rounded for the file.
    return stated == found or (
        None not in (stated, found) and math.isclose(stated or 0.0, found or 0.0, rel_tol=1e-3)
    )


def known_nodes(model: CanonicalModel) -> dict[str, str]:
    """The nodes of ``model`` by the names that a plan may give them: their own, or those of what they write."""
    known = {model.user_name(t.name): n.name for n in model.graph.nodes for t in n.outputs if t.name}
    known.update({node.name: node.name for node in model.graph.nodes})
    return known


def planned_bits(
    plan: BitPlan, model: CanonicalModel, path: Path, default: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """Bits of weights and activations per node of ``model`` as :class:`PlacementRequest` takes them.

    Args:
        model: as the user gave it, in canonical form.
        path: the plan's file, for errors.
        default: bits where the plan gives none.

    Raises:
        RecipeError: the plan is for another model, names a node that the model lacks (with near matches),
            or names a node twice.
    """
    if plan.fingerprint and plan.fingerprint != model.source_sha256:
        made_for = f" ('{plan.model}')" if plan.model else ""
        raise RecipeError(
            f"The plan '{path}' was made for another model{made_for}: its fingerprint {plan.fingerprint[:12]}... "
            f"is not that of '{model.source}', {model.source_sha256[:12]}...",
            "Make a plan for this model, or remove 'fingerprint' from the file if its nodes are the same.",
        )
    known = known_nodes(model)
    bits: dict[str, tuple[int, int]] = {}
    owner: dict[str, int] = {}
    for entry in plan.packs:
        for name in entry.nodes:
            node = known.get(name)
            if node is None:
                near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
                raise RecipeError(
                    f"The plan '{path}' names a node in pack {entry.index} that the model lacks: '{name}'.",
                    f"Nearest: {', '.join(near)}." if near else "'onnxptq inspect --blocks' lists the model.",
                )
            if node in owner:
                raise RecipeError(
                    f"The plan '{path}' names node '{name}' in pack {owner[node]} and in pack {entry.index}.",
                    "Remove it from one of them.",
                )
            owner[node] = entry.index
            bits[node] = (entry.weight_bits or default[0], entry.activation_bits or default[1])
    return bits
