"""Whether factors help: the outputs of a quantized imitation on samples that the factors have not seen.

The imitation rounds every rescalable activation to 8 bits over its observed range and every weight that
reads one to ``weight_bits`` per output channel. It needs no plan and no target, and stands for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.equalize.apply import rescaled_graph
from onnxptq.equalize.observe import Spread
from onnxptq.equalize.tracing import Trace
from onnxptq.graph.save import save_graph
from onnxptq.graph.surgeon import free_name
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, symmetric_qparams
from onnxptq.runtime import Provider, open_transient, signal_and_noise
from onnxptq.types import Array, CanonicalModel, PerAxis, PerTensor, QParams, QType, Sample

Floats = npt.NDArray[np.float64]

_CEILING_DB = 100.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """Scores factors of ``model``.

    Attributes:
        spreads: ranges of the activations to round, in the units of the model before rescaling.
        weight_bits: grid of the weights, 8 or finer.
        samples: unseen inputs; ``references`` are the float outputs for them.
    """

    model: CanonicalModel
    trace: Trace
    spreads: Mapping[str, Spread]
    symmetric: bool
    weight_bits: int
    samples: Sequence[Sample]
    references: Sequence[Mapping[str, Array]]
    provider: Provider

    def score(self, factors: Mapping[int, float]) -> Floats:
        """Signal-to-noise ratio of every sample in dB, averaged over the float outputs, with ``factors``.

        ``factors``: ln s by variable.
        """
        # Exact, or onnxruntime moves Q/DQ pairs around and rounds tensors that are not meant to be.
        session = open_transient(
            self.model.path.with_name(f"trial_{self.model.path.name}"),
            lambda path: save_graph(self._imitation(factors), path, share=True),
            provider=self.provider,
            exact=True,
            fused=True,
        )
        return np.array(
            [_similarity(r, session.run(x)) for x, r in zip(self.samples, self.references, strict=True)]
        )

    def _imitation(self, factors: Mapping[int, float]) -> gs.Graph:
        graph = rescaled_graph(self.model, self.trace, factors)
        tensors = graph.tensors()
        taken = set(tensors)
        for name, spread in self.spreads.items():
            _round(graph, tensors[name], self._qparams(spread, factors), taken)
        nodes = {node.name: node for node in graph.nodes}
        rounded: dict[tuple[str, int], gs.Constant] = {}
        for product in self.trace.products:
            if product.rows is not None and product.source in self.spreads:
                node = nodes[product.node.name]
                old = node.inputs[product.index]
                key = (old.name, product.rows)
                if key not in rounded:
                    values = _rounded(old.values, product.rows, self.weight_bits)
                    rounded[key] = gs.Constant(free_name(old.name, taken), values)
                node.inputs[product.index] = rounded[key]
        return graph.toposort()

    def _qparams(self, spread: Spread, factors: Mapping[int, float]) -> QParams:
        scale = self.trace.classes.factors(spread.roots, factors)
        low, high = float((spread.low / scale).min()), float((spread.high / scale).max())
        if self.symmetric:
            return symmetric_qparams(np.asarray(max(-low, high, 0.0)), QType.signed(8), PerTensor())
        return asymmetric_qparams(low, high, QType.unsigned(8))


def _round(graph: gs.Graph, tensor: gs.Tensor, qparams: QParams, taken: set[str]) -> None:
    """Let every node that reads ``tensor`` read it rounded; ``taken`` are the names of tensors so far."""
    readers = [(node, i) for node in tensor.outputs for i, t in enumerate(node.inputs) if t is tensor]

    def name(kind: str) -> str:
        return free_name(f"{tensor.name}/trial {kind}", taken)

    scale = gs.Constant(name("scale"), np.asarray(qparams.scale))
    zero = gs.Constant(name("zero"), np.asarray(qparams.zero_point.astype(qparams.qtype.storage)))
    integers = gs.Variable(name("integers"), dtype=np.dtype(qparams.qtype.storage))
    result = gs.Variable(name("rounded"), dtype=np.float32)
    for op, source, target in (("QuantizeLinear", tensor, integers), ("DequantizeLinear", integers, result)):
        graph.nodes.append(gs.Node(op, target.name, inputs=[source, scale, zero], outputs=[target]))
    for node, i in readers:
        node.inputs[i] = result


def _rounded(weight: Array, axis: int, bits: int) -> Array:
    peaks = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis % weight.ndim))
    return fake_quantize(weight, symmetric_qparams(peaks, QType.signed(bits, "int32"), PerAxis(axis)))


def _similarity(expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    scores = []
    for name, reference in expected.items():
        value = found[name]
        if np.issubdtype(value.dtype, np.floating) and value.shape == reference.shape:
            scores.append(_decibel(*signal_and_noise(reference, value)))
    return sum(scores) / len(scores) if scores else 0.0


def is_better(scores: Floats, than: Floats) -> bool:
    """Whether the mean gain exceeds twice its standard error over the samples: more than their scatter explains."""
    gains = scores - than
    if gains.size < 2:
        return bool(gains.mean() > 0)
    return bool(gains.mean() > 2 * gains.std(ddof=1) / math.sqrt(gains.size))


def _decibel(signal: float, noise: float) -> float:
    if signal <= 0 or noise <= 0 or not math.isfinite(noise):
        return _CEILING_DB if noise == 0 else -_CEILING_DB
    return min(_CEILING_DB, 10 * math.log10(signal / noise))
