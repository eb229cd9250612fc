"""The torch quantizer equals the numpy one bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxptq.quantizers import affine, torch_affine
from onnxptq.types import Granularity, PerAxis, PerGroup, PerTensor, QParams, QType

GRIDS = {
    "u2": QType.unsigned(2),
    "u4": QType.unsigned(4),
    "u8": QType.unsigned(8),
    "s3": QType.signed(3),
    "s8": QType.signed(8),
    "s16": QType.signed(16, "int16"),
    "s32": QType.signed(32, "int32"),
}
LAYOUTS: dict[str, tuple[Granularity, tuple[int, ...]]] = {
    "tensor": (PerTensor(), ()),
    "axis0": (PerAxis(0), (6,)),
    "last": (PerAxis(-1), (7,)),
    "group": (PerGroup(1, 3), (6, 2, 7)),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_numpy_bit_for_bit(grid: str, layout: str) -> None:
    rng = np.random.default_rng(3)
    qtype, (granularity, shape) = GRIDS[grid], LAYOUTS[layout]
    scale = rng.uniform(0.01, 0.3, shape).astype(np.float32)
    if qtype.bits == 32:
        scale = scale * np.float32(1e-9)  # so that values reach the limits of int32
    low, high = max(qtype.qmin, -1000), min(qtype.qmax, 1000)
    zero_point = rng.integers(low, high + 1, shape).astype(np.int32)
    if qtype.bits == 32:
        zero_point = np.zeros(shape, np.int32)
    params = QParams(scale=scale, zero_point=zero_point, qtype=qtype, granularity=granularity)
    x = rng.normal(size=(6, 5, 7)).astype(np.float32)
    # Ties, both zeros, values beyond the grid and beyond the integers, infinities.
    x[0, 0] = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -0.0, 0.0], np.float32) * np.float32(scale.reshape(-1)[0])
    x[1, 0] = np.array([1e9, -1e9, 1e38, -1e38, np.inf, -np.inf, 1e-38], np.float32)
    want = affine.fake_quantize(x, params)
    found = torch_affine.fake_quantize(torch.from_numpy(x), params).numpy()
    assert found.dtype == np.float32
    assert found.tobytes() == want.tobytes()


def test_one_quantizer_serves_tensors_of_several_shapes() -> None:
    params = affine.symmetric_qparams(np.array([1.0, 2.0]), QType.signed(4), PerAxis(1))
    apply = torch_affine.fake_quantizer(params)
    for shape in ((1, 2), (3, 2, 4), (1, 2)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        assert np.array_equal(apply(torch.from_numpy(x)).numpy(), affine.fake_quantize(x, params))


def test_groups_fit_the_shape_of_every_tensor() -> None:
    scale = np.random.default_rng(0).uniform(0.01, 0.3, (6, 2)).astype(np.float32)
    zero_point = np.zeros(scale.shape, np.int32)
    params = QParams(scale=scale, zero_point=zero_point, qtype=QType.signed(4), granularity=PerGroup(1, 3))
    apply = torch_affine.fake_quantizer(params)
    for width in (6, 4, 5):
        x = np.random.default_rng(width).normal(size=(6, width)).astype(np.float32)
        assert np.array_equal(apply(torch.from_numpy(x)).numpy(), affine.fake_quantize(x, params))
