"""Running a model with inner tensors exposed, in groups that fit a memory budget.

Models anywhere on disk can be exposed: they are linked into the work folder first, because a variant must
lie beside the external data that it shares, and the user's folder may not be writable.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from onnxptq.graph import proto
from onnxptq.graph.links import link, link_data
from onnxptq.runtime import open_exposed
from onnxptq.types import Sample

DEFAULT_GROUP_BYTES = 1 << 28
"""Exposed tensors of one sample held at once when the user states no budget."""

_MEASURED_AT_FIRST = 16
_MEASURED_BYTES = 1 << 28


@contextlib.contextmanager
def staged(path: Path, work_dir: Path) -> Iterator[Path]:
    """A link to (else a copy of) the model and its external data, in a folder of its own in ``work_dir``."""
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=".expose-") as folder:
        result = Path(folder) / path.name
        link(path, result)
        link_data(onnx.load(str(path), load_external_data=False), path.parent, Path(folder))
        yield result


def sizes_of(path: Path, tensors: Sequence[str], sample: Sample, *, exact: bool) -> Mapping[str, int]:
    """Bytes of each tensor for ``sample``: from the file's shapes where they are known, else by running it.

    Sizes from shapes assume 4 bytes per element.
    """
    model = onnx.load(str(path), load_external_data=False)
    dims = _bound_dimensions(model, sample)
    sizes: dict[str, int] = {}
    wanted = set(tensors)
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            sizes[tensor.name] = 4 * proto.element_count(tensor)
    for entry in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if entry.name in wanted and entry.type.tensor_type.HasField("shape"):
            shape = [
                d.dim_value if d.HasField("dim_value") else dims.get(d.dim_param)
                for d in entry.type.tensor_type.shape.dim
            ]
            if all(d is not None for d in shape):
                sizes[entry.name] = 4 * math.prod(d for d in shape if d is not None)
    unknown = [name for name in dict.fromkeys(tensors) if name not in sizes]
    count = _MEASURED_AT_FIRST
    while unknown:
        chunk, unknown = unknown[:count], unknown[count:]
        values = open_exposed(path, chunk, exact=exact).run(sample, chunk)
        measured = {name: value.nbytes for name, value in values.items()}
        sizes |= measured
        # Every chunk costs a session; small tensors are measured many at once.
        count = max(1, int(_MEASURED_BYTES * len(chunk) // max(1, sum(measured.values()))))
    return sizes


def _bound_dimensions(model: onnx.ModelProto, sample: Sample) -> dict[str, int]:
    """The values that ``sample`` gives to symbolic dimensions of the graph's inputs."""
    bound: dict[str, int] = {}
    for entry in model.graph.input:
        value = sample.get(entry.name)
        if value is not None:
            for dim, size in zip(entry.type.tensor_type.shape.dim, value.shape, strict=False):
                if dim.dim_param:
                    bound[dim.dim_param] = size
    return bound
