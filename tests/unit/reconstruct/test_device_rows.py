"""Rows and sums on a device against the numpy form: the same places, the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.reconstruct.device_rows import add_on_device, device_rows
from onnxptq.reconstruct.gram import Gram, layer_rows
from tests.unit.small_nets import Net, canonical

CONVOLUTIONS = {
    "signal": ((4, 3, 5), [2, 3, 31], {"pads": [2, 1], "strides": [2]}),
    "picture": ((6, 4, 3, 2), [3, 4, 11, 9], {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 3]}),
    "groups": ((6, 2, 3, 3), [2, 4, 8, 8], {"pads": [1, 1, 1, 1], "group": 2}),
    "volume": ((2, 2, 2, 3, 1), [2, 2, 5, 7, 4], {"pads": [0, 1, 0, 1, 2, 0], "strides": [1, 2, 3]}),
}


def _convolution(tmp_path: Path, kernel: tuple[int, ...], shape: list[int], attributes: Any) -> Linear:
    net = Net()
    net.conv("y", "x", kernel, **attributes)
    (layer,) = find_linears(GraphIndex(canonical(net.proto({"x": shape}, ["y"]), tmp_path).graph))
    return layer


@pytest.mark.parametrize("limit", [7, 10_000])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_read_the_same_patches(name: str, limit: int, tmp_path: Path) -> None:
    kernel, shape, attributes = CONVOLUTIONS[name]
    layer = _convolution(tmp_path, kernel, shape, attributes)
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = layer_rows(layer, value, None, limit)
    assert found is not None
    np.testing.assert_array_equal(device_rows(layer, torch.from_numpy(value), limit).numpy(), found[0])


@pytest.mark.parametrize("limit", [5, 1_000])
def test_matrices_read_the_same_rows(limit: int, tmp_path: Path) -> None:
    net = Net()
    net.linear("y", "x", 6, 3)
    (layer,) = find_linears(GraphIndex(canonical(net.proto({"x": [2, 9, 6]}, ["y"]), tmp_path).graph))
    value = np.random.default_rng(0).standard_normal((2, 9, 6)).astype(np.float32)
    found = layer_rows(layer, value, None, limit)
    assert found is not None
    np.testing.assert_array_equal(device_rows(layer, torch.from_numpy(value), limit).numpy(), found[0])


@pytest.mark.parametrize("has_floats", [False, True])
def test_sums_are_the_same(has_floats: bool) -> None:
    rng = np.random.default_rng(1)
    there, here = (Gram.empty(3, 5, has_floats=has_floats) for _ in range(2))
    for count in (40, 17):
        rows = rng.standard_normal((3, count, 5)).astype(np.float32)
        read = (np.round(rows * 2.0) / 2.0).astype(np.float32)
        here.add(rows, read)
        add_on_device(there, torch.from_numpy(rows), torch.from_numpy(read))
    assert there.rows == here.rows == 57
    for name in ("quantized", "mixed", "float_total", "quantized_total", "floats"):
        found, wanted = getattr(there, name), getattr(here, name)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            # Sums of a hundred products in single precision, in another order.
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
