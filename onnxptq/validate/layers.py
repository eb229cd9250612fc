"""How far the inner tensors that two model files share by name are apart.

A quantized file may hold a tensor T of the float model in three ways:

::

    producer -> T -> [Clip ->] QuantizeLinear -> DequantizeLinear -> D        before T, behind D
    producer -> S -> [Clip ->] QuantizeLinear -> DequantizeLinear -> T        before S, behind T
    producer -> T                                                             before T

The second is how quantized graph outputs keep their name. The pattern is read from the graph; the suffixes
that tools give to S and D play no part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxptq.errors import OnnxPtqError
from onnxptq.listing import listed
from onnxptq.runtime import element_types, group_within, open_exposed
from onnxptq.types import Progress, Sample, started
from onnxptq.validate.exposure import sizes_of
from onnxptq.validate.metrics import OutputMeter
from onnxptq.validate.reading import WrittenModel

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """One tensor that both files have, in topological order of the reference.

    ``sqnr_db`` compares it as the quantized network computes it, errors of earlier layers included;
    ``quantized_sqnr_db`` as its readers see it, behind its own quantizer (None where it has none).
    """

    tensor: str
    position: int
    elements: int
    sqnr_db: float
    quantized_sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class _Shared:
    """A tensor of the reference, and its names in the quantized file before and behind its quantizer.

    A graph input is not fetched: its value before the quantizer is the feed.
    """

    tensor: str
    before: str
    behind: str | None
    is_input: bool

    @property
    def units(self) -> list[tuple[int, str]]:
        """What a run must return: (0 for the reference or 1 for the quantized model, tensor)."""
        ends = [] if self.is_input else [(0, self.tensor), (1, self.before)]
        return ends if self.behind is None else [*ends, (1, self.behind)]


def compare_layers(
    reference: Path,
    quantized: Path,
    inputs: Sequence[tuple[str, str]],
    samples: Sequence[Sample],
    group_bytes: int,
    progress: Progress | None = None,
    *,
    changed: Collection[str] = (),
) -> tuple[tuple[LayerQuality, ...], list[str]]:
    """Compare the shared float tensors in exact sessions.

    Args:
        reference, quantized: staged models (see ``exposure.staged``).
        inputs: (name in the reference, name in the quantized model) of each graph input.
        samples: keyed by the reference's input names; at least one.
        group_bytes: largest size of the tensors of one sample that are held at once.
        changed: tensors that only share a name.

    Returns:
        The layers, and remarks about tensors of one name that could not be compared.
    """
    remarks: list[str] = []
    shared = shared_tensors(WrittenModel(reference), WrittenModel(quantized), dict(inputs), remarks)
    others = [item.tensor for item in shared if item.tensor in changed]
    if others:
        remarks.append(
            "Not compared, as the file was made from a form of the network in which they hold other values "
            f"(channels rescaled, rotated or shifted, constants folded): {listed(others)}. Their noise is in the "
            "report of the run that made it."
        )
        shared = [item for item in shared if item.tensor not in changed]
    feeds = [(dict(sample), {b: sample[a] for a, b in inputs}) for sample in samples]
    sizes: dict[str, int] = {}
    for side, path in enumerate((reference, quantized)):
        names = [name for item in shared for where, name in item.units if where == side]
        found = sizes_of(path, names, feeds[0][side], exact=True)
        sizes |= {f"{side}{name}": size for name, size in found.items()}
    units = [[f"{side}{name}" for side, name in item.units] for item in shared]
    groups = group_within(units, sizes, group_bytes)
    tick = started(progress, "Comparing the layers", len(groups) * len(samples))
    meters = [_LayerMeter(item) for item in shared]
    for members in groups:
        runs = [
            _Run(path, [name for i in members for where, name in shared[i].units if where == side])
            for side, path in enumerate((reference, quantized))
        ]
        for ours, theirs in feeds:
            a, b = runs[0](ours), runs[1](theirs)
            for i in members:
                meters[i].update(a, b)
            tick()
    kept = [meter for meter in meters if not meter.is_mismatched]
    apart = [meter.shared.tensor for meter in meters if meter.is_mismatched]
    if apart:
        remarks.append(f"Not compared, as their shape is another in the quantized file: {listed(apart)}.")
    return tuple(meter.result(i) for i, meter in enumerate(kept)), remarks


class _Run:
    """Fetches tensors of one model; a feed's own values come along."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._names = names
        # onnxruntime takes an empty list of outputs for all of them.
        self._session = open_exposed(path, names, exact=True) if names else None

    def __call__(self, feed: Sample) -> Sample:
        return feed if self._session is None else {**feed, **self._session.run(feed, self._names)}


class _LayerMeter:
    """Accumulates one tensor."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared
        self.is_mismatched = False
        self._before = OutputMeter(shared.tensor, is_scores=False)
        self._behind = OutputMeter(shared.tensor, is_scores=False)

    def update(self, reference: Sample, quantized: Sample) -> None:
        """Add one sample, unless the shapes show that the files only share a name."""
        ours, before = reference[self.shared.tensor], quantized[self.shared.before]
        behind = before if self.shared.behind is None else quantized[self.shared.behind]
        self.is_mismatched |= not ours.shape == before.shape == behind.shape
        if not self.is_mismatched:
            self._before.update(ours, before)
            self._behind.update(ours, behind)

    def result(self, position: int) -> LayerQuality:
        """The quality over all samples."""
        before, behind = self._before.result(), self._behind.result()
        assert before.sqnr_db is not None
        return LayerQuality(
            tensor=self.shared.tensor,
            position=position,
            elements=before.elements,
            sqnr_db=before.sqnr_db,
            quantized_sqnr_db=None if self.shared.behind is None else behind.sqnr_db,
        )


def shared_tensors(
    reference: WrittenModel, quantized: WrittenModel, inputs: dict[str, str], remarks: list[str]
) -> list[_Shared]:
    """Float tensors that both files have under one name, in the reference's order.

    Args:
        inputs: names of the graph inputs, in the reference and in the quantized model.
        remarks: gets one where the types of such tensors cannot be found out.
    """
    common = reference.producers.keys() & quantized.producers.keys()
    floats, present = (_float_tensors(written, common, remarks) for written in (reference, quantized))
    pairs = quantized.pairs(frozenset(reference.nodes) | frozenset(reference.producers))
    behind: dict[str, str] = {}
    for pair in pairs.values():
        if pair.source is not None:
            behind.setdefault(pair.source, pair.output)
    result = []
    for tensor, name in inputs.items():
        if tensor in floats and name in behind:
            result.append(_Shared(tensor, name, behind[name], is_input=True))
    for tensor in reference.producers:
        if tensor not in floats or tensor not in present or tensor not in quantized.producers:
            continue
        if tensor not in pairs:
            result.append(_Shared(tensor, tensor, behind.get(tensor), is_input=False))
        elif (source := pairs[tensor].source) is not None and source not in inputs.values():
            result.append(_Shared(tensor, source, tensor, is_input=False))
    return result


def _float_tensors(written: WrittenModel, wanted: Set[str], remarks: list[str]) -> set[str]:
    """Names of the float tensors that the caller feeds, or that nodes write and are among ``wanted``.

    The onnx package knows no types behind operators of other domains; onnxruntime, which runs them, does.
    """
    types = _types(written.model)
    if not types.keys() >= wanted:
        types = _types(onnx.shape_inference.infer_shapes(written.model)) | types
    untyped = [name for name in written.producers if name in wanted and name not in types]
    if untyped:
        try:
            types |= element_types(written.path, untyped)
        except OnnxPtqError as error:
            remarks.append(
                f"Not compared, as onnxruntime does not tell their type: {listed(untyped)}. {error.message}"
            )
    return {name for name, kind in types.items() if kind in _FLOATS}


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types where they are known."""
    entries = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {entry.name: entry.type.tensor_type.elem_type for entry in entries}
    return {name: kind for name, kind in types.items() if kind}
