"""Comparing two models on data, and holding the result against bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx

from onnxptq.arguments import model_path, require_choice, require_share
from onnxptq.calibrate.feeds import (
    ImagePreprocess,
    RecordFeeds,
    blamed,
    label_origin,
    open_feeds,
    read_labels,
)
from onnxptq.errors import FeedError, OnnxPtqError, OutputCheckError, QualityGateError, UsageError
from onnxptq.graph import proto
from onnxptq.graph.boundary import ends_of
from onnxptq.graph.links import numbered_copy
from onnxptq.graph.specs import input_specs
from onnxptq.room import temporary_folder
from onnxptq.runtime import Provider, require_runtime
from onnxptq.types import InputSpec, Progress
from onnxptq.validate.changed import recorded
from onnxptq.validate.compare import Comparison, compare
from onnxptq.validate.metrics import OutputMetrics, comparable


def validate(
    reference: str | Path,
    quantized: str | Path,
    *,
    data: object,
    labels: object | None = None,
    preprocess: Mapping[str, Any] | None = None,
    layers: bool = False,
    exact: bool = False,
    limit: int | None = None,
    provider: Provider = "cpu",
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare ``quantized`` with ``reference`` on ``data``.

    Any two files will do whose inputs and outputs correspond, by name or else by order; either may hold quantization
    operators.

    Args:
        data, labels, preprocess: as in :func:`onnxptq.quantize`.
        layers: also compare every tensor that both files name.
        exact: run both files with exact QDQ arithmetic instead of integer kernels.
        min_sqnr: in dB, for every float output. min_agreement, min_accuracy: shares in [0, 1].

    Raises:
        QualityGateError: a bound is missed.
        UsageError: the two files do not belong together, or an argument cannot be.
        OnnxPtqError: the models or the data cannot be used.
    """
    require_choice("provider", provider, get_args(Provider))
    require_share("min_agreement", min_agreement)
    require_share("min_accuracy", min_accuracy)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}.", "Give a number of samples, or none.")
    require_runtime()
    float_path, other_path, options = model_path(reference), model_path(quantized), preprocess or {}
    specs = input_specs(float_path)
    _require_same_inputs(float_path, specs, other_path, input_specs(other_path))
    renamed: list[str] = []
    with (
        temporary_folder() as scratch,
        _numbered((float_path, other_path), scratch, renamed) as (first, second),
    ):
        ends = ends_of(first, second)
        feeds = open_feeds(
            data,
            specs,
            preprocess=resolve_preprocess(specs, options),
            spool_dir=scratch,
            limit=limit,
        )
        try:
            with blamed(first, [feeds], provider, progress):
                found = compare(
                    first,
                    second,
                    feeds,
                    labels=None if labels is None else read_labels(labels, feeds),  # type: ignore[arg-type]
                    origin=label_origin(labels, feeds),
                    layers=layers,
                    exact=exact,
                    inner=ends.inner,
                    selected=ends.selected,
                    changed=_changed(first, second) if layers else (),
                    provider=provider,
                    work_dir=scratch,
                    progress=progress,
                )
        except OutputCheckError as error:
            # Nothing was written here, so nothing failed its own checks: the two files do not belong together.
            raise UsageError(f"{reference} and {quantized}: {error.message}", _SAME_NETWORK) from error
    require_gates(found.outputs, min_sqnr=min_sqnr, min_agreement=min_agreement, min_accuracy=min_accuracy)
    random = "The data are random: what was measured says nothing of real inputs."
    notes = (random if feeds.source.is_random else None, pictures_note(feeds, options))
    return replace(found, notes=(*(note for note in notes if note is not None), *renamed, *found.notes))


def _changed(*paths: Path) -> set[str]:
    """What the files themselves say they hold in other forms."""
    models = (onnx.load(str(path), load_external_data=False) for path in paths)
    return {name for model in models for name in recorded(proto.metadata(model.metadata_props))}


@contextmanager
def _numbered(paths: Sequence[Path], folder: Path, notes: list[str]) -> Iterator[list[Path]]:
    """The models, or copies in ``folder`` that onnxruntime takes in spite of repeated names of nodes.

    ``notes`` get what was renamed; errors are about the models themselves.
    """
    found = []
    for i, path in enumerate(paths):
        copy = numbered_copy(path, folder / f"numbered_{i}")
        found.append(path if copy is None else copy[0])
        if copy is not None and (note := f"{path}: {copy[1]}") not in notes:
            notes.append(note)
    try:
        yield found
    except OnnxPtqError as error:
        message = error.message
        for copied, path in zip(found, paths, strict=True):
            message = message.replace(str(copied), str(path))
        if message == error.message:
            raise
        raise type(error)(message, error.remedy) from error


_SAME_NETWORK = "Compare two files of the same network."


def _require_same_inputs(
    reference: Path, specs: Sequence[InputSpec], quantized: Path, others: Sequence[InputSpec]
) -> None:
    """Refuse models of which one sample cannot be the input of both.

    Raises:
        UsageError: inputs differ in number, type, rank, or in dimensions that both fix.
    """
    by_name = {spec.name: spec for spec in others}
    if by_name.keys() == {spec.name for spec in specs}:
        pairs = [(spec, by_name[spec.name]) for spec in specs]
    elif len(specs) == len(others):
        pairs = list(zip(specs, others, strict=True))
    else:
        listed = (f"{len(some)} ({', '.join(spec.name for spec in some)})" for some in (specs, others))
        raise UsageError(
            f"The inputs differ: {reference} has {next(listed)}, {quantized} has {next(listed)}.",
            _SAME_NETWORK,
        )
    for a, b in pairs:
        if a.dtype != b.dtype or not _can_be_equal(a.shape, b.shape):
            raise UsageError(
                f"The inputs differ: {reference} reads '{a.name}' as {_described(a)}, {quantized} reads "
                f"'{b.name}' as {_described(b)}.",
                _SAME_NETWORK,
            )


def _can_be_equal(a: Sequence[int | str | None], b: Sequence[int | str | None]) -> bool:
    """Whether one array may have both shapes. No dimensions may also mean that the file does not give the shape."""
    if not a or not b:
        return True
    fixed = ((m, n) for m, n in zip(a, b, strict=False) if isinstance(m, int) and isinstance(n, int))
    return len(a) == len(b) and all(m == n for m, n in fixed)


def _described(spec: InputSpec) -> str:
    return f"{spec.dtype} [{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


def resolve_preprocess(specs: Sequence[InputSpec], options: Mapping[str, Any]) -> ImagePreprocess | None:
    """``options`` over a guess from the one input's shape; None where nothing is known of pictures.

    Raises:
        FeedError: an illegal option.
    """
    guess = None
    if len(specs) == 1:
        with suppress(FeedError):
            guess = ImagePreprocess.guess(specs[0])
    return ImagePreprocess.from_options(options, base=guess) if options else guess


def pictures_note(feeds: RecordFeeds, options: Mapping[str, Any]) -> str | None:
    """What pixels go through and what of it was guessed, or that ``options`` went unused; None for neither."""
    used = feeds.source.preprocess
    if used is not None:
        return f"Pictures: {used.describe(stated=options.keys())}"
    if options and not feeds.source.is_random:
        return f"The picture options were not used for {feeds.source.origin}, which holds the model's own values."
    return None


def require_gates(
    outputs: Sequence[OutputMetrics],
    *,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
) -> None:
    """Raise QualityGateError for the first bound that is missed or cannot be judged."""
    missed = missed_gate(outputs, min_sqnr=min_sqnr, min_agreement=min_agreement, min_accuracy=min_accuracy)
    if missed is not None:
        raise missed


def missed_gate(
    outputs: Sequence[OutputMetrics],
    *,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
) -> QualityGateError | None:
    """The first bound that is missed or cannot be judged, if there is one. NaN meets no bound."""
    outputs = comparable(outputs)
    gates = (
        ("--min-sqnr", min_sqnr, "sqnr_db", "SQNR in dB", "held-out data with float outputs"),
        ("--min-agreement", min_agreement, "top1_agreement", "top-1 agreement", "a model with class scores"),
        ("--min-accuracy", min_accuracy, "quantized_accuracy", "top-1 accuracy", "class scores and --labels"),
    )
    for option, bound, field, meaning, needed in gates:
        if bound is None:
            continue
        values = {o.name: getattr(o, field) for o in outputs if getattr(o, field) is not None}
        if not values:
            return QualityGateError(
                f"{option} cannot be judged: no output has a {meaning}.", f"It needs {needed}."
            )
        for name, value in values.items():
            if not value >= bound:
                return QualityGateError(
                    f"Output '{name}': {meaning} is {value:.4g}, {option} asks for {bound:g}.",
                    "Exclude the tensors that suffer most, or calibrate on more data.",
                )
    return None
