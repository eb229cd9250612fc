"""How far a quantized model is from a float one, or from another quantized one, for any two ONNX files with the same
inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxptq.errors import FeedError, UsageError
from onnxptq.listing import listed
from onnxptq.runtime import Provider, Session, open_exposed
from onnxptq.types import Feeds, Progress, Sample, started
from onnxptq.validate.exposure import DEFAULT_GROUP_BYTES, staged
from onnxptq.validate.layers import LayerQuality, compare_layers
from onnxptq.validate.metrics import OutputMetrics, QualityMeter

__all__ = ["Comparison", "LayerQuality", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The distance of two models over ``samples`` feeds; ``layers`` over the first few of them."""

    samples: int
    outputs: tuple[OutputMetrics, ...]
    layers: tuple[LayerQuality, ...] = ()
    notes: tuple[str, ...] = ()


def compare(
    reference: Path,
    quantized: Path,
    feeds: Feeds,
    *,
    labels: Sequence[int] | npt.NDArray[np.int64] | None = None,
    origin: Callable[[int], str] = "labels, sample {}".format,
    layers: bool = False,
    exact: bool = False,
    provider: Provider = "cpu",
    work_dir: Path,
    layer_samples: int = 8,
    scores: Collection[str] | None = None,
    inner: Sequence[str] = (),
    selected: Collection[str] = (),
    changed: Collection[str] = (),
    group_bytes: int = DEFAULT_GROUP_BYTES,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models over ``feeds`` and measure the distance of their outputs.

    Args:
        feeds: samples keyed by the reference's input names.
        labels: one class per row of class scores, for accuracy.
        origin: names a label in errors, by its place among ``labels``.
        layers: also compare the inner tensors that both files have by name. These are run in the exact
            session, since exposing a tensor to the default one would undo the fusions around it.
        exact: run both models with exact QDQ semantics instead of onnxruntime's defaults.
        work_dir: an existing folder for temporary files.
        layer_samples: how many samples, spread evenly over the feeds, the inner tensors are compared on.
        scores: names of the outputs that hold class scores; None to decide by shape.
        inner: tensors of both files that are compared as outputs are.
        selected: names of the reference's outputs that have as many rows as a model finds.
        changed: inner tensors that mean something else in the two files, and are not compared.
        group_bytes: largest size of the inner tensors of one sample that are held at once.

    Raises:
        FeedError: no samples, fewer labels than rows, or a label that is no class.
        UsageError: the models differ in their number of inputs or outputs, or ``scores`` names no output.
        OutputCheckError: an output that is not ``selected`` has different shapes in the two models.
        InvalidModelError, EnvironmentMismatchError, RunError: as ``runtime.Session``.
    """
    if len(feeds) == 0:
        raise FeedError("There is no sample to compare the models on.", "Give data with at least one sample.")
    # Float operators may be fused in the reference: its own arithmetic changes by float rounding alone.
    first = _opened(reference, inner, work_dir, provider=provider, exact=exact, fused=True)
    second = _opened(quantized, inner, work_dir, provider=provider, exact=exact)
    notes: list[str] = []
    inputs = _matched("input", first.input_names, second.input_names, notes)
    ours, theirs = ([n for n in session.output_names if n not in inner] for session in (first, second))
    outputs = [*_matched("output", ours, theirs, notes), *((name, name) for name in inner)]
    _require_outputs(scores, first.output_names)
    known = None if labels is None else np.asarray(labels, np.int64)
    meter = QualityMeter(outputs, scores, known, origin, plain=inner, selected=selected)
    chosen = set(np.linspace(0, len(feeds) - 1, min(layer_samples, len(feeds))).astype(int).tolist())
    kept: list[Sample] = []
    tick = started(progress, "Comparing the models", len(feeds))
    for i, sample in enumerate(feeds):
        meter.update(first.run(sample), second.run({b: sample[a] for a, b in inputs}))
        if layers and i in chosen:
            kept.append(sample)
        tick()
    results = meter.results()
    if known is not None and not any(result.labelled for result in results):
        notes.append("The labels were not used: no output looks like class scores.")
    elif known is not None:
        notes += [
            f"The labels were not held against output '{result.name}': some are beyond its columns."
            for result in results
            if result.top1_agreement is not None and not result.labelled
        ]
    if selected:
        notes.append(_selection_note(results, inner, len(feeds)))
    del first, second
    rows: tuple[LayerQuality, ...] = ()
    if layers:
        with ExitStack() as stack:
            paths = [stack.enter_context(staged(path, work_dir)) for path in (reference, quantized)]
            rows, remarks = compare_layers(
                paths[0], paths[1], inputs, kept, group_bytes, progress, changed=changed
            )
            notes += remarks
        if len(kept) < len(feeds):
            notes.append(f"The inner tensors were compared on {len(kept)} of the {len(feeds)} samples.")
    return Comparison(samples=len(feeds), outputs=results, layers=rows, notes=tuple(notes))


def _selection_note(results: Sequence[OutputMetrics], inner: Sequence[str], samples: int) -> str:
    """Why outputs behind a selection tell little, and what is compared instead."""
    names = [result.name for result in results if result.is_selected]
    resized = max(result.resized for result in results)
    instead = f" {listed(inner)} in front of it are compared instead." if inner else ""
    return (
        f"Rows of {listed(names)} are what each model selects and need not belong together "
        f"(their numbers differ for {resized} of {samples} inputs).{instead}"
    )


def _opened(path: Path, inner: Sequence[str], work_dir: Path, **options: Any) -> Session:
    if not inner:
        return Session(path, **options)
    with staged(path, work_dir) as copy:
        return open_exposed(copy, inner, **options)


def _matched(
    what: str, reference: Sequence[str], quantized: Sequence[str], notes: list[str]
) -> list[tuple[str, str]]:
    """Pairs of names, equal ones where possible, else by order."""
    if set(reference) == set(quantized):
        return [(name, name) for name in reference]
    if len(reference) != len(quantized):
        raise UsageError(
            f"The reference has {len(reference)} {what}s ({', '.join(reference)}), "
            f"the quantized model {len(quantized)} ({', '.join(quantized)}).",
            f"Compare models with the same {what}s.",
        )
    pairs = list(zip(reference, quantized, strict=True))
    listed = ", ".join(f"{a} = {b}" for a, b in pairs)
    notes.append(f"The {what}s have different names and were matched by their order: {listed}.")
    return pairs


def _require_outputs(scores: Collection[str] | None, outputs: Sequence[str]) -> None:
    for name in scores or ():
        if name not in outputs:
            raise UsageError(
                f"'{name}' is no output of the reference model.", f"Its outputs: {', '.join(outputs)}."
            )
