"""Whether a written file computes what the simulation predicts.

**What the file means.** In an exact session (``session.disable_quant_qdq``, no graph optimization, CPU) the
DequantizeLinear output of every quantized edge must equal ``fake_quantize`` of the tensor in front of its
quantizer, fetched from the same run, and that of every weight and bias ``fake_quantize`` of its float values.
The tolerance is zero: onnxruntime's CPU kernels divide, round half to even, clamp and multiply in single
precision exactly as :mod:`onnxptq.quantizers.affine` does. What a branch adds to its layer's output must be what the
solution's constants make of the layer's input, up to float rounding.

**What the file does.** In the session that production uses, outputs must be finite where the float model's
are, have its shapes, and their SQNR against the float model must not fall more than a margin below the
exact session's. Integer kernels round intermediate sums differently by one step, which is worth less than
``FAST_MARGIN_DB``; a saturating kernel or a wrong fusion is worth far more. The two rounding errors are
different draws from one distribution, so over n output elements the two SQNR differ by chance as well: a
sum of n squares has a relative deviation of sqrt(2/n), the ratio of two of them one of
10 log10(e) sqrt(4/n) = 8.7/sqrt(n) dB, of which three are allowed on top. On activation grids of less than
8 bits a difference in the last digit of a sum moves an element by a coarse step, and all outputs of a sample
share what becomes of it: there n counts rows of the output, not elements. So it does behind a Softmax, where the
whole error may be that of one class that has changed. Above ``CEILING_DB`` differences
do not count: the whole error is then below one step of an 8-bit output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxptq.errors import OutputCheckError
from onnxptq.graph.index import softmax_outputs
from onnxptq.quantizers.affine import expand, fake_quantize
from onnxptq.runtime import Provider, Session, group_within, open_exposed
from onnxptq.types import (
    Array,
    CanonicalModel,
    Progress,
    QParams,
    Quantizer,
    QuantPlan,
    Sample,
    Solution,
    started,
)
from onnxptq.validate.branches import BranchParity, compare_branches
from onnxptq.validate.exposure import DEFAULT_GROUP_BYTES, sizes_of, staged
from onnxptq.validate.metrics import OutputMeter, QualityMeter, sqnr_db
from onnxptq.validate.reading import Pair, WrittenModel
from onnxptq.validate.structure import constants_of, label, locate, row_blocks

FAST_MARGIN_DB = 3.0
_NOTABLE_DB = 3.0
"""A loss to integer kernels that is told."""

_CHANCE_DB = 3 * 8.7
CEILING_DB = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeParity:
    """One quantizer in the exact session: how many elements differ, and by how many steps at most."""

    quantizer_id: str
    tensor: str
    role: str
    elements: int
    different: int
    max_steps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParity:
    """One graph output: SQNR in dB against the float model in the exact and in the fast session.

    None for integer and boolean outputs.
    """

    name: str
    exact_sqnr_db: float | None
    fast_sqnr_db: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was compared, and how it came out."""

    samples: int
    edges: tuple[EdgeParity, ...]
    outputs: tuple[OutputParity, ...]
    provider: str
    branches: tuple[BranchParity, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements compared in the exact session."""
        return sum(edge.elements for edge in self.edges)

    @property
    def max_steps(self) -> float:
        """Largest difference of all edges in the exact session, in quantization steps."""
        return max((edge.max_steps for edge in self.edges), default=0.0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Outputs that integer kernels compute much worse than they are meant.

        With few bits that is no reason to refuse them: on a few samples one step more or less moves all of a sample.
        """
        return tuple(
            f"Output {o.name!r} has {o.fast_sqnr_db:.1f} dB in onnxruntime's default session on {self.samples} "
            f"samples, and {o.exact_sqnr_db:.1f} dB in the file's own arithmetic."
            for o in self.outputs
            if o.exact_sqnr_db is not None
            and o.fast_sqnr_db is not None
            and o.exact_sqnr_db - o.fast_sqnr_db > _NOTABLE_DB
        )


def check_parity(
    path: Path,
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    samples: Sequence[Sample],
    *,
    work_dir: Path,
    elements: Mapping[str, int] = {},
    provider: Provider = "cpu",
    group_bytes: int = DEFAULT_GROUP_BYTES,
    progress: Progress | None = None,
) -> Parity:
    """Run the file at ``path`` in both sessions over ``samples`` and compare (see the module).

    Args:
        samples: a few feeds; at least one.
        work_dir: an existing folder for temporary files.
        elements: how many elements activations of ``model`` have in one sample, as far as that is known; others cost
            a run of the file.
        provider: of the fast session.
        group_bytes: largest size of the tensors of one sample that are exposed at once.
        progress: told about every run.

    Raises:
        OutputCheckError: naming the tensor whose values differ, or the output that is wrong in production.
    """
    if not samples:
        raise ValueError("parity needs at least one sample")
    written = WrittenModel(path)
    located = locate(written, model, plan)
    values = constants_of(model, solution, [q.tensor for q in plan.quantizers if q.role != "activation"])
    edges = [
        _Edge(
            pair=located[q.quantizer_id],
            meter=_EdgeMeter(q, solution.qparams[q.quantizer_id], model),
            constant=values.get(q.tensor),
            elements=elements.get(q.tensor),
        )
        for q in plan.quantizers
    ]
    with staged(path, work_dir) as copy:
        meant = _compare_edges(copy, edges, model.judged, samples, group_bytes, progress)
        found = tuple(edge.meter.result() for edge in edges)
        for quantizer, edge in zip(plan.quantizers, found, strict=True):
            if edge.different:
                raise OutputCheckError(
                    f"{path}: {label(quantizer, model)} computes other values than the simulation: "
                    f"{edge.different} of {edge.elements} elements, by up to {edge.max_steps:.3g} steps."
                )
        branches = compare_branches(copy, model, solution, samples, group_bytes)
        is_coarse = any(q.qtype.bits < 8 for q in plan.quantizers if q.role == "activation")
        outputs = _compare_outputs(copy, path, model, samples, meant, provider, is_coarse, progress)
    return Parity(samples=len(samples), edges=found, outputs=outputs, provider=provider, branches=branches)


class _EdgeMeter:
    """Counts the differences of one quantizer."""

    def __init__(self, quantizer: Quantizer, qparams: QParams, model: CanonicalModel) -> None:
        self._quantizer = quantizer
        self._qparams = qparams
        self._tensor = model.user_name(quantizer.tensor)
        self._elements = self._different = 0
        self._steps = 0.0

    def update(self, source: Array, output: Array) -> None:
        """Compare ``output`` of the file with the simulation of ``source``."""
        if source.shape != output.shape:
            raise OutputCheckError(f"The quantizer of '{self._tensor}' changes its shape.")
        self._elements += output.size
        for block, params in row_blocks(source, self._qparams):
            wanted = fake_quantize(np.asarray(source[block], np.float32), params)
            found = output[block]
            different = ~((wanted == found) | (np.isnan(wanted) & np.isnan(found)))
            if different.any():
                self._different += int(different.sum())
                scale = expand(params.scale, params.granularity, wanted.shape).astype(np.float64)
                steps = np.abs(wanted.astype(np.float64) - found) / scale
                self._steps = max(self._steps, float(np.nan_to_num(steps, nan=np.inf).max()))

    def result(self) -> EdgeParity:
        """The counts so far."""
        return EdgeParity(
            quantizer_id=self._quantizer.quantizer_id,
            tensor=self._tensor,
            role=self._quantizer.role,
            elements=self._elements,
            different=self._different,
            max_steps=self._steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Edge:
    """A quantizer of the file, what counts its differences, the float values of a constant that it encodes, and how
    many elements an activation has in a sample, if that is known."""

    pair: Pair
    meter: _EdgeMeter
    constant: Array | None
    elements: int | None

    def fetched(self, sample: Sample, *, is_first: bool) -> list[str]:
        """What a run on ``sample`` must return. Weights and biases do not depend on it: the first run shows them."""
        if self.constant is not None:
            return [self.pair.output] if is_first else []
        # A graph input is no output that a run can return; its values are in the feed itself.
        return [name for name in (self.pair.source, self.pair.output) if name and name not in sample]


def _compare_edges(
    path: Path,
    edges: Sequence[_Edge],
    outputs: Sequence[str],
    samples: Sequence[Sample],
    group_bytes: int,
    progress: Progress | None,
) -> Sequence[Sample]:
    """Meter every edge in the exact session; returns the ``outputs`` of every sample there."""
    units = [edge.fetched(samples[0], is_first=True) for edge in edges]
    groups = group_within(units, _sizes(path, edges, samples[0]), group_bytes) or [[]]
    tick = started(progress, "check quantizers", len(groups) * len(samples))
    meant: list[Sample] = []
    for number, members in enumerate(groups):
        exposed = {name for i in members for name in units[i]} | set(outputs)
        session = open_exposed(path, sorted(exposed), exact=True)
        for position, sample in enumerate(samples):
            is_first = position == 0
            fetched = {name for i in members for name in edges[i].fetched(sample, is_first=is_first)}
            values = session.run(sample, sorted(fetched | set(outputs if number == 0 else ())))
            if number == 0:
                meant.append({name: values[name] for name in outputs})
            values |= sample
            for edge in (edges[i] for i in members):
                if edge.constant is None:
                    edge.meter.update(values[edge.pair.source or ""], values[edge.pair.output])
                elif is_first:
                    edge.meter.update(edge.constant, values[edge.pair.output])
            tick()
    return meant


def _sizes(path: Path, edges: Sequence[_Edge], sample: Sample) -> Mapping[str, int]:
    """Bytes of what the edges need; a quantizer's output is as large as what it reads."""
    activations = [edge for edge in edges if edge.constant is None]
    sizes = {e.pair.source or "": 4 * e.elements for e in activations if e.elements is not None}
    unknown = {e.pair.source or "" for e in activations} - sizes.keys()
    sizes |= sizes_of(path, sorted(unknown), sample, exact=True)
    sizes |= {e.pair.output: sizes[e.pair.source or ""] for e in activations}
    return sizes | {e.pair.output: 4 * e.constant.size for e in edges if e.constant is not None}


def _compare_outputs(
    copy: Path,
    path: Path,
    model: CanonicalModel,
    samples: Sequence[Sample],
    meant: Sequence[Sample],
    provider: Provider,
    is_coarse: bool,
    progress: Progress | None,
) -> tuple[OutputParity, ...]:
    """Judge the default session by the float model; ``meant`` are the outputs of the exact one."""
    pairs = [(name, name) for name in model.judged]
    exact_meter, fast_meter = QualityMeter(pairs, ()), QualityMeter(pairs, ())
    tick = started(progress, "check outputs", len(samples))
    reference = Session(model.path)
    if model.boundary:
        fast = open_exposed(copy, model.boundary, provider=provider)
    else:
        fast = Session(copy, provider=provider)
    for sample, exact in zip(samples, meant, strict=True):
        wanted, done = reference.run(sample), fast.run(sample)
        for name in model.outputs:
            if not _is_finite_where(wanted[name], done[name]):
                raise OutputCheckError(
                    f"{path}: output '{name}' is NaN or Inf in onnxruntime's default session."
                )
        exact_meter.update(wanted, exact)
        fast_meter.update(wanted, done)
        tick()
    decided = softmax_outputs(model.graph)
    return tuple(
        _judge(path, name, exact_meter.meters[name], fast_meter.meters[name], is_coarse or name in decided)
        for name in model.judged
    )


def _is_finite_where(reference: Array, value: Array) -> bool:
    if not np.issubdtype(value.dtype, np.floating) or reference.shape != value.shape:
        return True
    return bool((np.isfinite(value) | ~np.isfinite(reference)).all())


def _judge(path: Path, name: str, exact: OutputMeter, fast: OutputMeter, by_rows: bool) -> OutputParity:
    summary = exact.result()
    if summary.sqnr_db is None or not summary.elements:
        return OutputParity(name=name, exact_sqnr_db=None, fast_sqnr_db=None)
    meant, done = sqnr_db(*exact.sums), sqnr_db(*fast.sums)
    independent = max(1, summary.rows) if by_rows else summary.elements
    margin = FAST_MARGIN_DB + _CHANCE_DB / math.sqrt(independent)
    if done < min(meant, CEILING_DB) - margin:
        raise OutputCheckError(
            f"{path}: in onnxruntime's default session output '{name}' has {done:.1f} dB against the float "
            f"model, while the file's own arithmetic gives {meant:.1f} dB.",
            "An integer kernel of this onnxruntime computes something else; try another version or target.",
        )
    return OutputParity(name=name, exact_sqnr_db=meant, fast_sqnr_db=done)
