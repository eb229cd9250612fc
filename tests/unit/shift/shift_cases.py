"""Networks for the tests of ``onnxptq.shift``, and the comparison that all of its exactness tests share."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxptq.runtime import SAME_FUNCTION, Session, difference
from onnxptq.shift.attention import Grids
from onnxptq.shift.run import NO_GRIDS, Shift, shift
from onnxptq.types import CanonicalModel, ShiftedPlace
from tests.unit.equalize.equalize_helpers import Samples, canonical, samples_for
from tests.unit.rotate import rotate_nets as nets

WIDTH = 12


def shifted(
    proto: onnx.ModelProto,
    folder: Path,
    count: int = 6,
    *,
    where: ShiftedPlace = "between layers",
    grids: Grids = NO_GRIDS,
) -> tuple[CanonicalModel, CanonicalModel, Shift]:
    """The model and its shifted form, held against onnxruntime's outputs on inputs that were not looked at."""
    source = canonical(proto, folder)
    samples = list(samples_for(proto, count + 3))
    result, found = shift(source, Samples(samples[:count]), work_dir=folder, where=where, grids=grids)
    onnx.checker.check_model(str(result.path), full_check=True)
    before, after = (Session(path, exact=True, threads=1) for path in (source.path, result.path))
    for sample in samples[count:]:
        assert difference(before.run(sample), after.run(sample)) <= SAME_FUNCTION
    if where != "behind activations":
        # Nothing remains to be computed at run time.
        assert [n.op for n in source.graph.nodes] == [n.op for n in result.graph.nodes]
    assert (result is source) == (not found.tensors)
    return source, result, found


class Parts(nets.Blocks):
    """A tensor of ``WIDTH`` channels of [1, 6, 4] that may be shifted, and what reads it."""

    def begin(self) -> str:
        raise NotImplementedError

    def end(self, *outputs: str) -> onnx.ModelProto:
        return self.proto({"x": [1, 6, 4, 7]}, outputs)


def also_added(net: Parts) -> str:
    x = net.begin()
    return net.op("Add", "y", x, net.linear("f", x, WIDTH, WIDTH))


def also_seen(net: Parts) -> str:
    x = net.begin()
    net.linear("y", x, WIDTH, 5)
    return x


def no_bias(net: Parts) -> str:
    return net.op("MatMul", "y", net.begin(), net.weight("w", WIDTH, 5))


READ_OTHERWISE = (also_added, also_seen, no_bias)
"""Whatever the tensor is, it stays: not every reader can take a shift up."""
