"""What a model is made of, and what each target would do with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from onnxptq.arguments import as_recipe, model_path
from onnxptq.errors import EnvironmentMismatchError, InvalidModelError
from onnxptq.graph.attention import Attention, find_attention, find_gelus, find_mixed_weights, find_post_norms
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.lowering import check_supported
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.describe import BlockRow, describe_blocks
from onnxptq.placing import Selectors, placement_request, selector_notes
from onnxptq.recipe import Recipe
from onnxptq.reporting import labelled
from onnxptq.room import temporary_folder
from onnxptq.runtime import infer_types, require_loadable
from onnxptq.targets import TARGETS, WRITTEN_OUT
from onnxptq.types import CanonicalModel, Progress, Skip, UserNode


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetView:
    """What one target would quantize: nodes by operator type, and what it leaves in float."""

    quantized: Mapping[str, int]
    activations: int
    weights: int
    skips: tuple[Skip, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """An attention as :class:`~onnxptq.graph.attention.Attention` has it: nodes and, in the user's names, tensors."""

    form: str
    softmax: str
    product: str
    weights: str
    values: str
    scores: tuple[str, ...]
    is_masked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PostNormRow:
    """A normalization over features and the nodes of the weighted layers that read it."""

    norm: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model after canonicalization.

    ``weight_bytes`` are those of the float initializers; ``untrainable`` names the nodes that learnt methods
    would have to leave in float, with the reason; ``blocks`` are the units that such methods work on. What
    methods for transformers look at: ``attention``, ``post_norms`` and, by tensor, ``gelus``. ``names`` are the nodes
    of the user's file with the tensors that they write, which selectors may name, and what became of them.
    """

    model: str
    opset: int
    inputs: Mapping[str, tuple[int | str | None, ...]]
    outputs: tuple[str, ...]
    operators: Mapping[str, int]
    nodes: int
    parameters: int
    weight_bytes: int
    targets: Mapping[str, TargetView]
    blocks: tuple[BlockRow, ...]
    attention: tuple[AttentionRow, ...]
    post_norms: tuple[PostNormRow, ...]
    gelus: tuple[str, ...]
    untrainable: tuple[Skip, ...]
    notes: tuple[str, ...]
    names: tuple[UserNode, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def inspect(
    model: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Read ``model`` and list its operators, its parameters, and what each target would quantize and why not.

    Raises:
        UsageError: the model cannot be read.
        UnsupportedModelError: it cannot be prepared.
        SelectorError: a selector of ``recipe`` matches nothing.
    """
    source, recipe = model_path(model), as_recipe(recipe)
    with temporary_folder() as folder:
        canonical = canonicalize(
            source,
            folder,
            opset=recipe.opset,
            simplify=recipe.simplify,
            expanded=sorted({op for ops in WRITTEN_OUT.values() for op in ops}),
            infer_types=infer_types,
            progress=progress,
        )
        selectors = Selectors(canonical)
        index = selectors.index
        sizes = [math.prod(int(d) for d in t.shape) for t in _constants(canonical.graph)]
        return Inspection(
            model=str(model),
            opset=canonical.opset,
            inputs={spec.name: spec.shape for spec in canonical.inputs},
            outputs=canonical.outputs,
            operators=dict(Counter(node.op for node in index.nodes).most_common()),
            nodes=len(index.nodes),
            parameters=sum(sizes),
            weight_bytes=sum(4 * size for size in sizes),
            targets={name: _view(name, selectors, recipe) for name in TARGETS},
            blocks=tuple(describe_blocks(find_blocks(canonical.graph), canonical)),
            attention=tuple(_attention_row(found, canonical) for found in find_attention(index)),
            post_norms=tuple(
                PostNormRow(norm=found.norm.name, layers=tuple(layer.node.name for layer in found.layers))
                for found in find_post_norms(index)
            ),
            gelus=tuple(map(canonical.user_name, find_gelus(index))),
            untrainable=tuple(
                Skip(site=gap.node, reason=f"no differentiable form of {gap.kind}")
                for gap in check_supported(canonical.graph)
            ),
            notes=(
                *_refusal(canonical),
                *canonical.notes,
                *(f"{s.site}: {s.reason}" for s in canonical.skips),
                *(found.note for found in find_mixed_weights(index)),
                *selector_notes(selectors, recipe, tuple(TARGETS)),
            ),
            names=canonical.user_nodes,
        )


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """The constants of a graph, and of those inside its nodes."""
    yield from (tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant))
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from _constants(attribute)


def _refusal(model: CanonicalModel) -> tuple[str, ...]:
    """Why the model cannot be quantized, whatever the targets would do with it."""
    try:
        require_loadable(model)
    except InvalidModelError as error:
        return (f"This model cannot be quantized with the CPU provider: {error.message} {error.remedy}",)
    except EnvironmentMismatchError as error:
        return (f"It was not tried whether onnxruntime loads this model: {error.message}",)
    return ()


def _attention_row(found: Attention, model: CanonicalModel) -> AttentionRow:
    return AttentionRow(
        form=found.form,
        softmax=found.softmax.name,
        product=found.product.name,
        weights=model.user_name(found.weights),
        values=model.user_name(found.values),
        scores=tuple(node.name for node in found.scores),
        is_masked=found.is_masked,
    )


def _view(name: str, selectors: Selectors, recipe: Recipe) -> TargetView:
    plan = TARGETS[name](selectors.index, placement_request(selectors, recipe.updated(target=name), {}))
    by_name = selectors.index.by_name
    nodes = {s.consumer for q in plan.quantizers for s in q.sites if s.consumer in by_name}
    return TargetView(
        quantized=dict(Counter(by_name[node].op for node in sorted(nodes)).most_common()),
        activations=sum(q.role == "activation" for q in plan.quantizers),
        weights=sum(q.role == "weight" for q in plan.quantizers),
        skips=labelled(selectors.model, plan.skips),
    )
