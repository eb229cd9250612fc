"""Subsets of feeds are chosen by content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxptq.calibrate.feeds import open_feeds
from onnxptq.samples import Draw, ListFeeds, pick_samples
from onnxptq.types import InputSpec, Sample


def _samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(3).astype(np.float32), "i": np.array([i])} for i in range(count)]


def _ids(samples: object) -> list[int]:
    return [int(s["i"][0]) for s in samples]  # type: ignore[attr-defined]


def test_order_does_not_matter() -> None:
    samples = _samples(20)
    first = _ids(pick_samples(ListFeeds(samples), 7))
    assert first == _ids(pick_samples(ListFeeds(samples[::-1]), 7))
    assert len(set(first)) == 7
    assert first != sorted(first)


def test_smaller_subsets_are_parts_of_larger_ones() -> None:
    feeds = ListFeeds(_samples(20))
    assert _ids(pick_samples(feeds, 12))[:5] == _ids(pick_samples(feeds, 5))


@pytest.mark.parametrize("count", [0, 3, 100])
def test_asking_for_more_than_there_is(count: int) -> None:
    assert len(pick_samples(ListFeeds(_samples(3)), count)) == min(3, count)
    assert pick_samples(ListFeeds([]), count) == []


def test_a_draw_deals_on_and_begins_anew() -> None:
    draw = Draw(ListFeeds(_samples(10)))
    whole, middle, around = (_ids(part) for part in draw.take((0, 10), (4, 3), (8, 4)))
    assert sorted(whole) == list(range(10))
    assert middle == whole[4:7]
    assert around == whole[8:] + whole[:2]


def test_a_draw_of_opened_data_reads_what_it_deals_and_deals_the_same() -> None:
    samples = _samples(10)
    inputs = [
        InputSpec(name="x", dtype=np.dtype(np.float32), shape=(3,)),
        InputSpec(name="i", dtype=np.dtype(np.int64), shape=(1,)),
    ]
    opened = open_feeds(samples, inputs, spool_dir=Path("unused"))
    draw, plain = Draw(opened), Draw(ListFeeds(samples))
    assert draw.order == plain.order
    assert [_ids(part) for part in draw.take((0, 3), (8, 4))] == [
        _ids(part) for part in plain.take((0, 3), (8, 4))
    ]


def test_fingerprints_see_values_types_shapes_and_names() -> None:
    variants: list[Sample] = [
        {"x": np.zeros((2, 3), np.float32)},
        {"x": np.zeros((3, 2), np.float32)},
        {"x": np.zeros((2, 3), np.int32)},
        {"y": np.zeros((2, 3), np.float32)},
        {"x": np.ones((2, 3), np.float32)},
    ]
    assert len({ListFeeds([v]).fingerprint for v in variants}) == len(variants)
    assert ListFeeds(variants).fingerprint == ListFeeds(list(variants)).fingerprint
