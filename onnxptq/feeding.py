"""The data of a run: opened, told apart, and blamed where the model cannot be run on them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxptq.calibrate.feeds import (
    RecordFeeds,
    blamed,
    label_origin,
    open_feeds,
    read_labels,
    split_holdout,
    without_shared,
)
from onnxptq.comparison import pictures_note, resolve_preprocess
from onnxptq.errors import FeedError
from onnxptq.running import Data, NoteRank, Run
from onnxptq.solving import draw_samples
from onnxptq.types import CanonicalModel, Feeds
from onnxptq.validate.metrics import is_class_scores, require_classes


def open_data(
    run: Run, model: CanonicalModel, calibration: object, evaluation: object | None, labels: object | None
) -> Data:
    """Calibration and held-out samples. Without evaluation data a part of the calibration data is held out.

    Raises:
        FeedError: data or labels cannot be used, or all evaluation samples are calibration samples.
    """
    recipe = run.recipe
    with run.timed("open data"):
        options: Mapping[str, Any] = {
            "preprocess": resolve_preprocess(model.inputs, recipe.preprocess),
            "spool_dir": run.scratch,
        }
        feeds = open_feeds(calibration, model.inputs, limit=recipe.samples, seed=recipe.seed, **options)
        given = None
        if evaluation is not None:
            # Another seed, for random samples must differ as well.
            given = open_feeds(evaluation, model.inputs, seed=recipe.seed + 1, **options)
        for opened in (feeds, given):
            note = None if opened is None else pictures_note(opened, recipe.preprocess)
            if note is not None:
                run.note(note)
        if recipe.is_solved_by_packs and len(feeds.rows) < feeds.source.total:
            run.note(_unused_note(feeds), NoteRank.FIRST)
        calibrating, heldout = _apart(run, feeds, given)
        if heldout is None and labels is not None:
            raise FeedError("Labels were given, but there are no held-out samples.", "Give --eval.")
        return Data(
            calibration=calibrating,
            samples=draw_samples(calibrating, run.progress),
            heldout=heldout,
            labels=None if labels is None or heldout is None else _labels(model, labels, heldout),
            label_origin=label_origin(labels, heldout or calibrating),
            preprocess=feeds.source.preprocess or (given.source.preprocess if given is not None else None),
            is_random=feeds.source.is_random,
            is_heldout_random=(given or feeds).source.is_random,
        )


def _unused_note(feeds: RecordFeeds) -> str:
    """Tells that there is more to solve weights from than is read."""
    total = feeds.source.total
    return (
        f"{len(feeds.rows)} of {total} samples are used. With few bits more samples give better results: "
        f"--samples {total} takes all of them, and as much longer."
    )


def _labels(model: CanonicalModel, source: object, feeds: Feeds) -> npt.NDArray[np.int64] | None:
    """The labels of ``feeds``, held against the classes of the model before any long work."""
    labels = read_labels(source, feeds)  # type: ignore[arg-type]
    outputs = [t for t in model.graph.outputs if t.name in model.outputs]
    scores = [t for t in outputs if len(t.shape or ()) == 2 and np.issubdtype(t.dtype, np.floating)]
    if labels is not None and all(isinstance(t.shape[1], int) for t in scores):
        classes = [t.shape[1] for t in scores if is_class_scores(t.dtype, t.shape)]
        require_classes(labels, classes, label_origin(source, feeds))
    return labels


def _apart(run: Run, feeds: RecordFeeds, evaluation: RecordFeeds | None) -> tuple[Feeds, Feeds | None]:
    """Calibration samples and others to measure quality on, None where there are none; a note says why."""
    if evaluation is not None:
        heldout, shared = without_shared(evaluation, feeds, run.progress)
        if heldout is None:
            raise FeedError(
                f"All {shared} evaluation samples ({evaluation.source.origin}) are calibration samples as well, "
                "so there is nothing to measure quality on.",
                "Give other samples with --eval, or leave it out: a share of the calibration data is then held out.",
            )
        if shared:
            run.note(
                f"{shared} of {len(evaluation.rows)} evaluation samples are calibration samples as well and were "
                "left out.",
                NoteRank.FIRST,
            )
        return feeds, heldout
    if run.recipe.holdout == 0:
        run.note(
            "No sample was held out, as holdout is 0, so no quality is reported; give --eval or a holdout.",
            NoteRank.FIRST,
        )
        return feeds, None
    calibrating, kept_out = split_holdout(feeds, run.recipe.holdout, progress=run.progress)
    if kept_out is None:
        count = len(feeds.rows)
        why, remedy = (
            ("there is only one", "more samples")
            if count == 1
            else (f"all {count} are identical", "samples that differ")
        )
        told = f"No sample was held out, as {why}, so no quality is reported; give --eval or {remedy}."
        run.note(told, NoteRank.FIRST)
    return calibrating, kept_out


def blaming(run: Run, model: CanonicalModel, data: Data) -> AbstractContextManager[None]:
    """Within it, a failed run that is a sample's fault becomes an error that names the sample."""
    sources = [data.calibration, *([] if data.heldout is None else [data.heldout])]
    return blamed(model.path, sources, run.recipe.provider, run.progress)
