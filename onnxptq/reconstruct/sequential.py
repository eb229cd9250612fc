"""Closed-form rounding inside one pack, layer after layer, on what the quantized layers in front compute.

For a layer y = W x + b that reads x in the float network and x' in the quantized one (its own activation
quantizer included), weight and bias are chosen for

    min E|| W x + b - (W_new x' + b_new) ||^2,     W_new on its grid

with the sums of :mod:`onnxptq.reconstruct.gram` and the rounding of :mod:`onnxptq.reconstruct.closed_form`.
So every layer makes up for the errors of all that came before it, not for its own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import torch

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear
from onnxptq.lowering.quantized import Hooks, quantizing_hooks
from onnxptq.quantizers import torch_affine
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.ranks import Ranks
from onnxptq.reconstruct.closed_form import round_weights
from onnxptq.reconstruct.damping import DAMPINGS, choose_damping
from onnxptq.reconstruct.device_rows import add_on_device, device_rows
from onnxptq.reconstruct.fitted_grid import round_on_fitted_grid
from onnxptq.reconstruct.gram import Gram, has_rows, layer_rows, weight_matrix, weight_tensor
from onnxptq.reconstruct.pack_data import InnerValues, PackData
from onnxptq.reconstruct.rounding import compensable_layers
from onnxptq.types import FloatArray, Pack, QParams, QuantPlan, Solution

MAX_WIDTH = 8192
"""Layers with more inputs keep the nearest grid points: solving for them takes minutes."""

ROUNDING_DAMPING = 0.1
"""For spreading the errors of roundings; the damping of the start is chosen per layer."""

_FEWEST_FITTED_BITS = 4
"""With coarser weights, gradient steps end better where they begin on the grids that fit the weights alone: the Swin
on digits by 0.3 dB at 3 bits (two seeds). With 4 bits it ends alike; ResNet-20, with activations of 8, ends 0.4 dB
higher from fitted ones."""

SAMPLES = 512
"""Most samples that sums are taken over: beyond it they only become more exact."""

_ROWS_PER_INPUT = 64
"""Rows over all samples, per input of the layer. With 8, solving for the errors of the layers in front learns
them by heart: ResNet-20 at 3 bits then agrees with its float network on 74 % of unseen samples instead of 82."""

_ROWS_PER_LAYER = 16_384
"""Rows over all samples, at least, unless these are ``_ENOUGH_PER_INPUT``."""

_ENOUGH_PER_INPUT = 512
"""Rows per input that narrow layers need no more than: a depthwise kernel has 9 inputs, and hundreds of groups."""

_ELEMENTS_AT_ONCE = 1 << 24
"""Elements of the rows that are added in one go; hundreds of groups would fill gigabytes otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTask:
    """A layer to be solved: ``matrix`` is its float weight, ``quantizer_id`` the quantizer of that.

    ``gram`` holds the sums of what it reads; ``sums`` the same about the means where ``bias`` is one that can make
    up for them. ``ridge`` is the damping that serves unseen samples best.
    """

    layer: Linear
    quantizer_id: str
    matrix: FloatArray
    gram: Gram
    sums: Gram
    ridge: float
    bias: gs.Constant | None

    def solved(self, solution: Solution, weight: FloatArray, *, beside: FloatArray | None = None) -> Solution:
        """``solution`` with ``weight`` in the layer, in the form of ``matrix``, and the bias that fits it, and what a
        branch adds ``beside`` it."""
        weights = {**solution.weights, self.layer.weight.name: weight_tensor(self.layer, weight)}
        if self.bias is not None:
            bias = np.asarray(self.bias.values, np.float32)
            shift = _shift(self.matrix, weight if beside is None else weight + beside, self.gram)
            if np.isfinite(shift).all():
                weights[self.bias.name] = (bias + shift.reshape(bias.shape)).astype(np.float32)
        return replace(solution, weights=weights)


Solve = Callable[[LayerTask, Solution], Solution]

Value = TypeVar("Value")


def rounded(task: LayerTask, solution: Solution) -> Solution:
    """Solved without a grid, then rounded with error compensation, on the grid that serves that best."""
    weight, grid = round_on_fitted_grid(
        task.matrix,
        task.sums,
        solution.qparams[task.quantizer_id],
        damping=ROUNDING_DAMPING,
        ridge=task.ridge,
    )
    return task.solved(replace(solution, qparams={**solution.qparams, task.quantizer_id: grid}), weight)


def begun(task: LayerTask, solution: Solution) -> Solution:
    """The same as a start for gradient steps, which move scales themselves."""
    qparams = solution.qparams[task.quantizer_id]
    if qparams.qtype.bits >= _FEWEST_FITTED_BITS:
        return rounded(task, solution)
    weight = round_weights(task.matrix, task.sums, qparams, damping=ROUNDING_DAMPING, ridge=task.ridge)
    return task.solved(solution, weight)


def solve_layers(
    index: GraphIndex,
    pack: Pack,
    plan: QuantPlan,
    solution: Solution,
    data: PackData,
    solve: Solve,
    *,
    settled: Collection[str],
    has_floats: bool = False,
) -> Solution:
    """Apply ``solve`` to one layer of the pack after the other, each with the sums that the solved ones in front
    of it leave (with ``has_floats``, those of float inputs as well). Of several processes the first one solves.

    Layers with ``settled`` quantizers stay as they are.
    """
    own = set(pack.nodes)
    reads = {(s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}
    inner = InnerValues(data, SAMPLES)
    for layer in compensable_layers(index, plan, MAX_WIDTH):
        if layer.node.name not in own:
            continue
        quantizer = reads.get((layer.node.name, 1 - layer.weight_index))
        qparams = None if quantizer is None else solution.qparams[quantizer.quantizer_id]
        weight = reads[layer.node.name, layer.weight_index].quantizer_id
        if weight in settled:
            continue
        hooks = quantizing_hooks(index.graph, pack, plan, solution)
        halves = _sums(layer, qparams, inner, hooks, data.ranks, has_floats=has_floats)
        if not halves or not all(half.is_finite for half in halves):
            continue
        change: Solution | None = None
        if data.ranks.rank == 0:
            solved = solve(_task(index, layer, halves, weight, data.network.device), solution)
            change = Solution(
                qparams=_changed(solved.qparams, solution.qparams),
                weights=_changed(solved.weights, solution.weights),
                branches=_changed(solved.branches, solution.branches),
            )
        change = data.ranks.broadcast(change)
        assert change is not None
        solution = replace(
            solution,
            qparams={**solution.qparams, **change.qparams},
            weights={**solution.weights, **change.weights},
            branches={**solution.branches, **change.branches},
        )
    return solution


def _changed(found: Mapping[str, Value], known: Mapping[str, Value]) -> dict[str, Value]:
    """The entries that are not those that were known."""
    return {name: value for name, value in found.items() if value is not known.get(name)}


def _sums(
    layer: Linear,
    qparams: QParams | None,
    inner: InnerValues,
    hooks: Hooks,
    ranks: Ranks,
    *,
    has_floats: bool,
) -> list[Gram]:
    """Sums over two halves of the samples, or over all where they run in one piece; none for layers whose rows
    cannot be told."""
    if not has_rows(layer):
        return []
    groups, _, width = weight_matrix(layer, layer.weight.values).shape
    wanted = max(_ROWS_PER_INPUT * width, min(_ROWS_PER_LAYER, _ENOUGH_PER_INPUT * width))
    each = -(-wanted // inner.count)
    halves = [Gram.empty(groups, width, has_floats=has_floats) for _ in range(2)]
    for number, samples, value, changed in inner.at(layer.input.name, hooks):
        limit = each * samples
        pieces = -(-limit * groups * width // _ELEMENTS_AT_ONCE)
        parts = min(max(pieces, 2), max(1, len(value)))
        for k, (x, other) in enumerate(
            zip(*(torch.tensor_split(v, parts) for v in (value, changed)), strict=True)
        ):
            _add(halves[(number + k) % 2], layer, x, other, qparams, -(-limit // parts))
    return [half for half in (half.sum_over(ranks) for half in halves) if half.rows]


def _add(
    gram: Gram, layer: Linear, value: torch.Tensor, changed: torch.Tensor, qparams: QParams | None, limit: int
) -> None:
    """Add about ``limit`` rows of what the layer reads: in the float network, and in the quantized one before
    ``qparams``."""
    if value.device.type != "cpu":
        read = changed if qparams is None else torch_affine.fake_quantize(changed, qparams)
        add_on_device(gram, device_rows(layer, value, limit), device_rows(layer, read, limit))
        return
    array = changed.numpy() if qparams is None else fake_quantize(changed.numpy(), qparams)
    rows = layer_rows(layer, value.numpy(), array, limit)
    assert rows is not None
    gram.add(*rows)


def _task(
    index: GraphIndex, layer: Linear, halves: Sequence[Gram], weight: str, device: torch.device
) -> LayerTask:
    matrix = weight_matrix(layer, np.asarray(layer.weight.values, np.float32))
    channels = matrix.shape[0] * matrix.shape[1]
    has_bias = (
        layer.bias is not None
        and len(index.uses(layer.bias.name)) == 1
        and int(np.prod(layer.bias.shape)) == channels
    )
    used = [half.centred() if has_bias else half for half in halves]
    gram = halves[0] if len(halves) == 1 else halves[0].plus(halves[1])
    return LayerTask(
        layer=layer,
        quantizer_id=weight,
        matrix=matrix,
        gram=gram,
        sums=gram.centred() if has_bias else gram,
        ridge=choose_damping(matrix, *used, device=device) if len(used) == 2 else DAMPINGS[-1],
        bias=layer.bias if has_bias else None,
    )


def _shift(matrix: FloatArray, rounded: FloatArray, gram: Gram) -> FloatArray:
    """W m - W_new m' per output channel."""
    rows = max(1, gram.rows)
    before = np.einsum("gck,gk->gc", matrix.astype(np.float64), gram.float_total / rows)
    after = np.einsum("gck,gk->gc", rounded.astype(np.float64), gram.quantized_total / rows)
    return np.asarray((before - after).reshape(-1), np.float32)
