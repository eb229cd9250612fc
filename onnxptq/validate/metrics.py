"""How far the outputs of two models are apart, in constant memory.

With reference r and quantized q, over all elements of all samples:

    SQNR     10 log10( sum r^2 / sum (r - q)^2 )  in dB
    cosine   sum r q / sqrt( sum r^2  sum q^2 )

and for an output of class scores, one row per sample: top-1 agreement is the fraction of rows in which both
models rank the same class first, top-5 agreement that in which the reference's first class is among the
quantized model's first five, accuracy the fraction in which the label is ranked first. Of equal scores the
lower class number ranks higher; a row with NaN ranks none. Sums are in double precision; counts are exact, so the
order of the samples changes a value by no more than double rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxptq.errors import FeedError, OutputCheckError
from onnxptq.types import Array

_BLOCK = 1 << 16
"""Elements taken at once: their doubles stay in the processor's cache."""

_TOP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMetrics:
    """The distance of one output between two models.

    ``nonfinite`` counts the values that are NaN or Inf in either model, ``nonfinite_reference`` those that are so
    in the reference already. The latter are left out of the float measures, and their rows out of the top-1 and top-5
    agreement: nothing is to be met there. ``sqnr_db``
    is +inf where the outputs are equal, -inf where only the reference is zero, NaN where the quantized model has NaN
    or Inf in place of a number. Float measures are None for integer
    and boolean outputs, which have ``equal_fraction``; the ones from ``top1_agreement`` on are None for
    outputs that are no class scores, accuracies also without labels. Fractions are in [0, 1].

    ``is_selected`` says that the output lies behind a selection such as NonMaxSuppression: it has as many rows as a
    model finds, nothing tells which rows of the two models belong together, and other outputs are held against bounds
    instead. ``resized`` samples are left out because the two models found different numbers.
    """

    name: str
    elements: int
    rows: int
    nonfinite: int = 0
    nonfinite_reference: int = 0
    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    equal_fraction: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    labelled: int = 0
    reference_accuracy: float | None = None
    quantized_accuracy: float | None = None
    is_selected: bool = False
    resized: int = 0

    @property
    def lost(self) -> int:
        """Values that are numbers in the reference, and NaN or Inf in the quantized model."""
        return self.nonfinite - self.nonfinite_reference

    @property
    def is_void(self) -> bool:
        """Whether there is nothing to compare: no number in the reference, or no sample with equally many rows."""
        return 0 < self.elements == self.nonfinite_reference or (self.resized > 0 and not self.elements)


def comparable(outputs: Sequence[OutputMetrics]) -> Sequence[OutputMetrics]:
    """The outputs that tell how good a model is: those behind a selection only where there are no others."""
    return [output for output in outputs if not output.is_selected] or outputs


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares; +inf without noise, -inf without signal."""
    if math.isnan(signal) or math.isnan(noise) or math.isinf(signal) or math.isinf(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10.0 * (math.log10(signal) - math.log10(noise))


def _dot(a: Array, b: Array) -> float:
    """The scalar product without the BLAS: its threads would wait for those of onnxruntime."""
    return float(np.einsum("i,i->", a, b))


def is_class_scores(kind: np.dtype[Any], shape: Sequence[object]) -> bool:
    """Whether an output looks like class scores: float, of rank 2, with at least two columns."""
    columns = shape[1] if len(shape) == 2 else 0
    return bool(np.issubdtype(kind, np.floating)) and isinstance(columns, int) and columns >= 2


def require_classes(
    labels: npt.NDArray[np.int64], classes: Collection[int], origin: Callable[[int], str]
) -> None:
    """Refuse labels that no output has a class for.

    Args:
        classes: the number of classes of every output of class scores.
        origin: names a label by its place among ``labels``.

    Raises:
        FeedError: a label is negative, or not below any of ``classes``.
    """
    if not classes:
        return
    most = max(classes)
    wrong = np.flatnonzero((labels < 0) | (labels >= most))
    if wrong.size:
        row = int(wrong[0])
        more = f" (and {wrong.size - 1} more)" if wrong.size > 1 else ""
        raise FeedError(
            f"{origin(row)}: {labels[row]} is no class of this model, which has {most}{more}.",
            f"Classes are counted from 0 to {most - 1}, in the order of the model's scores.",
        )


class OutputMeter:
    """Accumulates the metrics of one output.

    Args:
        name: how the output is called in the result.
        is_scores: whether rows hold class scores; None to decide by the first value: float, of rank 2, with
            at least two columns.
        is_selected: whether the number of rows may differ between the models; see :class:`OutputMetrics`.
    """

    def __init__(self, name: str, *, is_scores: bool | None = None, is_selected: bool = False) -> None:
        self.name = name
        self._is_selected = is_selected
        self._resized = 0
        self._is_scores = is_scores
        self._is_float: bool | None = None
        self._elements = self._rows = self._equal = 0
        self._nonfinite = self._nonfinite_reference = 0
        self._signal = self._noise = self._energy = self._product = self._largest = 0.0
        self._top1 = self._top5 = self._classes = self._ranked = self._told = 0
        self._labelled = self._right_reference = self._right_quantized = 0

    def update(self, reference: Array, quantized: Array, labels: npt.NDArray[np.int64] | None = None) -> None:
        """Add one sample's output of both models; ``labels`` holds one class per row.

        Raises:
            FeedError: rows of class scores and ``labels`` differ in number.
            OutputCheckError: the two have different shapes, and not for a selection.
        """
        if self._is_selected and reference.ndim == quantized.ndim and reference.shape != quantized.shape:
            self._resized += 1
            return
        if reference.shape != quantized.shape:
            raise OutputCheckError(
                f"Output '{self.name}' has shape {list(quantized.shape)} in the quantized model and "
                f"{list(reference.shape)} in the reference."
            )
        if self._is_float is None:
            self._is_float = bool(
                np.issubdtype(reference.dtype, np.floating) and np.issubdtype(quantized.dtype, np.floating)
            )
            if self._is_scores is None:
                self._is_scores = self._is_float and is_class_scores(reference.dtype, reference.shape)
        self._elements += reference.size
        self._rows += reference.shape[0] if reference.ndim else 1
        if not self._is_float:
            self._equal += int((reference == quantized).sum())
            return
        flat, other = reference.reshape(-1), quantized.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            self._add(flat[start : start + _BLOCK], other[start : start + _BLOCK])
        if self._is_scores and reference.size:
            self._rank(
                reference.reshape(-1, reference.shape[-1]), quantized.reshape(-1, reference.shape[-1]), labels
            )

    def _add(self, reference: Array, quantized: Array) -> None:
        r, q = reference.astype(np.float64), quantized.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            signal, energy = _dot(r, r), _dot(q, q)
            if not math.isfinite(signal + energy):
                numbers = np.isfinite(r)
                self._nonfinite += int((~(numbers & np.isfinite(q))).sum())
                self._nonfinite_reference += int((~numbers).sum())
                r, q = r[numbers], q[numbers]
                signal, energy = _dot(r, r), _dot(q, q)
            self._product += _dot(r, q)
            error = np.subtract(r, q, out=r)
            self._noise += _dot(error, error)
            if error.size:
                self._largest = float(np.fmax(self._largest, np.fmax(error.max(), -error.min())))
        self._signal += signal
        self._energy += energy

    def _rank(self, reference: Array, quantized: Array, labels: npt.NDArray[np.int64] | None) -> None:
        first, other = reference.argmax(axis=1), quantized.argmax(axis=1)
        rows = np.arange(len(first))
        self._classes = reference.shape[1]
        self._ranked += len(first)
        told = np.isfinite(reference).all(axis=1)
        # NaN has no rank: a row that holds one puts no class first.
        is_ranked = [~np.isnan(scores).any(axis=1) for scores in (reference, quantized)]
        self._told += int(told.sum())
        self._top1 += int(((first == other) & is_ranked[1])[told].sum())
        score = quantized[rows, first][:, None]
        earlier = np.arange(self._classes)[None, :] < first[:, None]
        rank = ((quantized > score) | ((quantized == score) & earlier)).sum(axis=1)
        self._top5 += int(((rank < _TOP) & is_ranked[1])[told].sum())
        if labels is not None:
            if len(labels) != len(first):
                raise FeedError(
                    f"There are fewer labels than rows of class scores in output '{self.name}'.",
                    "Give one label per sample.",
                )
            self._labelled += len(labels)
            self._right_reference += int(((first == labels) & is_ranked[0]).sum())
            self._right_quantized += int(((other == labels) & is_ranked[1]).sum())

    @property
    def ranked(self) -> int:
        """Number of rows of class scores added so far."""
        return self._ranked

    @property
    def sums(self) -> tuple[float, float]:
        """Sums of the squares of the reference and of the error so far."""
        return self._signal, self._noise

    def result(self) -> OutputMetrics:
        """The metrics of all that was added."""
        if not self._is_float:
            fraction = self._equal / self._elements if self._elements else None
            return OutputMetrics(
                name=self.name,
                elements=self._elements,
                rows=self._rows,
                equal_fraction=fraction,
                is_selected=self._is_selected,
                resized=self._resized,
            )
        norm = math.sqrt(self._signal) * math.sqrt(self._energy)
        told, labelled = self._told, self._labelled
        return OutputMetrics(
            name=self.name,
            elements=self._elements,
            rows=self._rows,
            nonfinite=self._nonfinite,
            nonfinite_reference=self._nonfinite_reference,
            sqnr_db=self._decibels,
            cosine=None if self._is_without_sample else self._cosine(norm),
            max_abs_error=None if self._is_without_sample else self._largest,
            top1_agreement=self._top1 / told if told else None,
            top5_agreement=self._top5 / told if told and self._classes > _TOP else None,
            labelled=labelled,
            reference_accuracy=self._right_reference / labelled if labelled else None,
            quantized_accuracy=self._right_quantized / labelled if labelled else None,
            is_selected=self._is_selected,
            resized=self._resized,
        )

    @property
    def _decibels(self) -> float | None:
        if self._is_without_sample:
            return None
        return math.nan if self._is_spoilt else sqnr_db(self._signal, self._noise)

    @property
    def _is_without_sample(self) -> bool:
        return self._resized > 0 and not self._elements

    @property
    def _is_spoilt(self) -> bool:
        """Whether the quantized model has lost a number, or nothing is left to compare."""
        return self._nonfinite > self._nonfinite_reference or 0 < self._elements == self._nonfinite_reference

    def _cosine(self, norm: float) -> float:
        if self._is_spoilt:
            return math.nan
        if norm > 0.0:
            return min(1.0, max(-1.0, self._product / norm))
        return 1.0 if self._signal == self._energy else 0.0


class QualityMeter:
    """Accumulates the metrics of all outputs.

    Args:
        outputs: (name in the reference, name in the quantized model) of each output.
        scores: names (in the reference) of outputs with class scores; None to decide by shape.
        labels: one class per row of the outputs with class scores, over all samples in order. They are held against
            the outputs that have all their classes: the others are something else.
        origin: names a label in errors, by its place among ``labels``.
        plain: names of those that hold no class scores, whatever their shape.
        selected: names (in the reference) of the outputs that lie behind a selection.
    """

    def __init__(
        self,
        outputs: Collection[tuple[str, str]],
        scores: Collection[str] | None = None,
        labels: npt.NDArray[np.int64] | None = None,
        origin: Callable[[int], str] = "labels, sample {}".format,
        plain: Collection[str] = (),
        selected: Collection[str] = (),
    ) -> None:
        self._pairs = tuple(outputs)
        self._scores = scores
        self._labels = labels
        self._origin = origin
        self._labelled: frozenset[str] | None = None
        self._plain = {*plain, *selected}
        self.meters = {
            name: OutputMeter(name, is_scores=self._are_scores(name), is_selected=name in selected)
            for name, _ in self._pairs
        }

    def update(self, reference: Mapping[str, Array], quantized: Mapping[str, Array]) -> None:
        """Add one sample's outputs of both models.

        Raises:
            FeedError: there are fewer labels than rows of class scores, or a label is no class of any output.
            OutputCheckError: an output has different shapes in the two models, and not for a selection.
        """
        if self._labelled is None:
            self._labelled = self._find_labelled(reference)
        for name, other in self._pairs:
            meter, value = self.meters[name], reference[name]
            labels = None
            if self._labels is not None and name in self._labelled and value.ndim and value.size:
                labels = self._labels[meter.ranked : meter.ranked + value.size // value.shape[-1]]
            meter.update(value, quantized[other], labels)

    def _are_scores(self, name: str) -> bool | None:
        """Whether an output holds class scores; None where its values tell."""
        if name in self._plain:
            return False
        return None if self._scores is None else name in self._scores

    def _find_labelled(self, outputs: Mapping[str, Array]) -> frozenset[str]:
        """The outputs that the labels may belong to."""
        if self._labels is None or not self._labels.size:
            return frozenset()
        classes = {
            name: int(value.shape[-1])
            for name, value in outputs.items()
            if value.ndim
            and name not in self._plain
            and (is_class_scores(value.dtype, value.shape) if self._scores is None else name in self._scores)
        }
        require_classes(self._labels, classes.values(), self._origin)
        return frozenset(name for name, count in classes.items() if count > self._labels.max())

    def results(self) -> tuple[OutputMetrics, ...]:
        """The metrics, in the order of the outputs."""
        return tuple(meter.result() for meter in self.meters.values())
