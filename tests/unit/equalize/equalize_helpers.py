"""Models for the tests of ``onnxptq.equalize``, and the comparison that all of its exactness tests share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxptq.equalize.apply import apply_factors
from onnxptq.equalize.limits import Limits, factor_limits
from onnxptq.equalize.observe import observe
from onnxptq.equalize.rules import RULES
from onnxptq.equalize.run import Equalization, find_rescaling
from onnxptq.equalize.tracing import Trace, Tracer
from onnxptq.graph.classes import variable_of
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import exposed_copy
from onnxptq.graph.surgeon import import_graph
from onnxptq.runtime import Session, concrete_shapes
from onnxptq.types import CanonicalModel, Feeds, InputSpec, Sample
from tests.unit.graph.graph_helpers import build, feed_for, node


class Samples:
    """Feeds made of a list."""

    fingerprint = "samples"
    description = "samples"

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = tuple(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)


def canonical(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> CanonicalModel:
    for entry in model.graph.output:
        if not entry.type.tensor_type.HasField("shape"):
            # Shape inference knows no custom operators; the checker wants some shape, and these are pictures.
            for axis in range(4):
                entry.type.tensor_type.shape.dim.add().dim_param = f"d{axis}"
    path = folder / name
    onnx.save(model, str(path))
    graph = import_graph(model, folder)
    return CanonicalModel(
        path=path,
        graph=graph,
        source=path,
        source_bytes=path.stat().st_size,
        fingerprint="0",
        opset=graph.opset,
        inputs=tuple(
            InputSpec(name=t.name, dtype=np.dtype(t.dtype), shape=tuple(t.shape)) for t in graph.inputs
        ),
        outputs=tuple(t.name for t in graph.outputs),
        user_names={},
    )


def samples_for(model: onnx.ModelProto, count: int) -> Samples:
    return Samples(feed_for(model, seed=seed) for seed in range(count))


def traced(model: CanonicalModel, sample: Sample) -> Trace:
    shapes, values = concrete_shapes(model, sample, "cpu")
    return Tracer(GraphIndex(model.graph), shapes, values).run(RULES)


def observed_limits(model: CanonicalModel, trace: Trace, sample: Sample) -> Limits:
    """Limits of the factors by the values of one sample."""
    labels = {bounds.tensor: trace.labels[bounds.tensor] for bounds in trace.bounds}
    shapes, _ = concrete_shapes(model, sample, "cpu")
    spreads = observe(
        model, Samples([sample]), labels, trace.classes,
        sizes=shapes, positions=[0], provider="cpu", group_bytes=1 << 30, tick=lambda: None,
    )  # fmt: skip
    return factor_limits(trace, spreads)


def random_factors(trace: Trace, seed: int, limits: Limits) -> dict[int, float]:
    """ln s of every free variable: powers of two, with which float arithmetic commutes without rounding."""
    rng = np.random.default_rng(seed)
    roots = {r for labels in trace.labels.values() for r in np.unique(trace.classes.roots(labels)).tolist()}
    free = sorted({variable_of(root)[0] for root in roots if not trace.classes.is_pinned(root)})
    factors = {}
    for variable in free:
        low, high = (np.clip(end / np.log(2), -3, 3) for end in limits.get(variable, (-9.0, 9.0)))
        factors[variable] = float(rng.integers(int(np.ceil(low)), int(np.floor(high)) + 1)) * np.log(2.0)
    return factors


def assert_exact(model: CanonicalModel, sample: Sample, *, seed: int = 0) -> Trace:
    """Rescale every free channel at random: each tensor T must become T / s to the last bit, outputs stay T.

    Powers of two change no rounding, so the tolerance is 0: onnxruntime runs the same kernels on both.
    """
    trace = traced(model, sample)
    factors = random_factors(trace, seed, observed_limits(model, trace, sample))
    folder = model.path.parent
    result = apply_factors(model, trace, factors, folder / "rescaled.onnx")
    onnx.checker.check_model(str(result.path), full_check=True)
    names = [name for name in trace.labels if name not in {spec.name for spec in model.inputs}]
    before, after = (_values(m, names, sample) for m in (model, result))
    for name in names:
        scale = trace.classes.factors(trace.labels[name], factors).astype(np.float32)
        np.testing.assert_array_equal(after[name] * scale, before[name], err_msg=name)
    for name in model.outputs:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    return trace


def _values(model: CanonicalModel, names: Sequence[str], sample: Sample) -> Mapping[str, np.ndarray]:
    path = model.path.with_name(f"exposed_{model.path.name}")
    exposed_copy(model.path, names, path)
    return Session(path, exact=True, threads=1).run(sample)


def pinned_share(trace: Trace, name: str) -> float:
    """The fraction of a tensor's distinct classes that are held at 1."""
    roots = np.unique(trace.classes.roots(trace.labels[name])).tolist()
    return sum(trace.classes.is_pinned(root) for root in roots) / len(roots)


def free_classes(trace: Trace, name: str) -> int:
    """How many factors of a tensor can be chosen."""
    roots = np.unique(trace.classes.roots(trace.labels[name])).tolist()
    return sum(not trace.classes.is_pinned(root) for root in roots)


def equalize(model: CanonicalModel, feeds: Feeds, **options: Any) -> tuple[CanonicalModel, Equalization]:
    """The model rescaled as unseen samples judge best, and what was done."""
    return find_rescaling(model, feeds, **options).judged()


def unbalanced(spread: float = 30.0) -> onnx.ModelProto:
    """Linear depthwise convolution whose channels differ by ``spread``, undone by the weights behind it."""
    rng = np.random.default_rng(0)
    ratio = np.geomspace(1 / spread, spread, 16).astype(np.float32)
    weights = {
        "w1": rng.standard_normal((16, 3, 1, 1)).astype(np.float32),
        "w2": rng.standard_normal((16, 1, 3, 3)).astype(np.float32) * ratio[:, None, None, None],
        "w3": rng.standard_normal((8, 16, 1, 1)).astype(np.float32) / ratio[None, :, None, None],
    }
    nodes = [
        node("Conv", "x w1", "a"),
        node("Conv", "a w2", "b", group=16),
        node("Conv", "b w3", "y"),
    ]
    return build(nodes, {"x": (1, 3, 10, 10)}, ["y"], weights)
