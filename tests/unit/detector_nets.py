"""Small detectors whose outputs are as many boxes as they find."""

from __future__ import annotations

import numpy as np
import onnx

from tests.unit.small_nets import Net


def _proposals(net: Net) -> tuple[str, str]:
    """A backbone, a box and three class scores per cell, and what is left of them: features and chosen boxes."""
    x = net.op("Relu", "r1", net.conv("c1", "x", (12, 3, 3, 3), strides=[2, 2]))
    x = net.op("Relu", "r2", net.conv("c2", x, (16, 12, 3, 3), strides=[2, 2]))
    flat = net.constant("flat", np.array([1, 4, -1]))
    boxes = net.op(
        "Transpose",
        "boxes",
        net.op("Reshape", "cells", net.conv("box", x, (4, 16, 1, 1)), flat),
        perm=[0, 2, 1],
    )
    chances = net.op("Sigmoid", "chances", net.conv("score", x, (3, 16, 1, 1)))
    scores = net.op("Reshape", "scores", chances, net.constant("wide", np.array([1, 3, -1])))
    limits = (
        net.constant("most", np.array(30)),
        net.constant("overlap", np.float32(0.5)),
        net.constant("least", np.float32(0.55)),
    )
    kept = net.op("NonMaxSuppression", "kept", boxes, scores, *limits)
    rows = net.op("Gather", "rows", kept, net.constant("two", np.array(2)), axis=1)
    return x, net.op("Gather", "found", boxes, rows, axis=1)


def one_stage() -> onnx.ModelProto:
    """Boxes that survive a suppression."""
    net = Net(seed=3, opset=17)
    _, found = _proposals(net)
    return net.proto({"x": [1, 3, 16, 16]}, [found])


def two_stages() -> onnx.ModelProto:
    """The same, and layers that look at the features inside each of them."""
    net = Net(seed=3, opset=17)
    features, found = _proposals(net)
    rois = net.op("Reshape", "rois", found, net.constant("four", np.array([-1, 4])))
    count = net.op("Gather", "count", net.op("Shape", "shape", rois), net.constant("zero", np.array([0])))
    batch = net.op("Expand", "batch", net.constant("first", np.array([0])), count)
    crops = net.op(
        "RoiAlign", "crops", features, rois, batch, output_height=2, output_width=2, sampling_ratio=2
    )
    hidden = net.op("Relu", "hidden", net.linear("fc", net.op("Flatten", "vector", crops), 64, 24))
    return net.proto({"x": [1, 3, 16, 16]}, [found, net.linear("classes", hidden, 24, 5)])
