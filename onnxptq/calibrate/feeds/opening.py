"""One entry point for every kind of calibration and evaluation data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from onnxptq.calibrate.feeds.folders import Reading, open_path
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.records import RecordFeeds, build_set, spread
from onnxptq.calibrate.feeds.spool import Spool
from onnxptq.calibrate.feeds.streams import open_object
from onnxptq.calibrate.feeds.synthetic import random_set
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

RANDOM = "random"


def open_feeds(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    preprocess: ImagePreprocess | None = None,
    spool_dir: Path,
    limit: int | None = None,
    seed: int = 0,
) -> RecordFeeds:
    """Samples for the model's inputs from whatever the user has.

    Args:
        source: a path (str or Path) to

            - a folder of pictures, sub-folders included;
            - a folder of .npy or .npz files, one or more samples each; for several inputs also one
              sub-folder of .npy files per input;
            - one .npz keyed by input name, or one .npy, stacked along axis 0;
            - test_data_set_*/input_*.pb, or a folder that holds such folders;

            or the string "random" (a folder of that name is "./random"); or an array, a dict of arrays,
            an onnxruntime CalibrationDataReader, a torch DataLoader, or any iterable of dicts, arrays or
            tuples. It must end; what can be read only once is read to its end into ``spool_dir``.
        inputs: the model's inputs, in order. Axis 0 is taken as the batch.
        preprocess: for pictures and uint8 pixels. None: guessed from the input's shape for picture
            files, and arrays must already be what the model reads. Float arrays are never preprocessed.
        spool_dir: folder for temporary files, which live as long as the feeds.
        limit: at most this many single samples, spread evenly over the source.
        seed: for "random" only.

    Returns:
        Feeds whose values are decoded and checked while iterating; the first sample is checked here.

    Raises:
        FeedError: nothing usable, or something that does not fit the inputs.
    """
    if not inputs:
        raise FeedError("The model has no inputs, so no data can be fed.", "Check the model.")
    if limit is not None and limit < 1:
        raise FeedError(f"A limit of {limit} samples leaves none.", "Give a limit of at least 1.")
    if isinstance(source, str) and source == RANDOM:
        feeds = RecordFeeds(random_set(inputs, preprocess, limit, seed))
        feeds.source.read(0)
        return feeds
    reading = Reading(inputs=tuple(inputs), preprocess=preprocess, spool=Spool(spool_dir))
    if isinstance(source, str | os.PathLike):
        records, origin = open_path(Path(source), reading)
    else:
        records, origin = open_object(source, reading)
    used = reading.used_preprocess
    if used is not None:
        reading.notes.append(f"preprocessing: {used.describe()}")
    elif preprocess is not None:
        reading.notes.append("preprocessing not used, the arrays are taken as the model's own values")
    settings = used.model_dump_json() if used is not None else ""
    opened = build_set(
        records, inputs, origin=origin, notes=reading.notes, settings=settings, preprocess=used
    )
    rows = spread(opened.total, opened.total if limit is None else limit)
    feeds = RecordFeeds(opened, rows, "spread evenly" if len(rows) < opened.total else "")
    feeds.source.read(feeds.rows[0])
    return feeds
