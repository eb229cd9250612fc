"""User data of any common kind as feeds: samples exactly as the model's inputs want them."""

from onnxptq.calibrate.feeds.digests import digest
from onnxptq.calibrate.feeds.faults import blamed
from onnxptq.calibrate.feeds.holdout import split_holdout, without_shared
from onnxptq.calibrate.feeds.labels import label_origin, read_labels
from onnxptq.calibrate.feeds.opening import open_feeds
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.records import RecordFeeds

__all__ = [
    "ImagePreprocess",
    "RecordFeeds",
    "blamed",
    "digest",
    "label_origin",
    "open_feeds",
    "read_labels",
    "split_holdout",
    "without_shared",
]
