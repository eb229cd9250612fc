"""The form of a model whose softmax weights are powers of their roots, on disk and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxptq.graph.forms import write_form
from onnxptq.graph.passes import root_softmax
from onnxptq.runtime import Provider, compare_forms
from onnxptq.types import CanonicalModel, Sample, Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooting:
    """How many softmaxes became powers of order ``power``, which did not, and what that changed in the outputs."""

    power: int
    count: int
    skips: tuple[Skip, ...]
    difference: float

    @property
    def summary(self) -> str:
        """One line."""
        left = "; ".join(f"{skip.site}: {skip.reason}" for skip in self.skips)
        text = "No softmax weights can be quantized by their root"
        if self.count:
            text = (
                f"Softmax weights of {self.count} products are quantized by their root of order {self.power}; the "
                f"float outputs differ by {self.difference:.1e}"
            )
        return f"{text}. Left: {left}." if left else f"{text}."


def root_weights(
    model: CanonicalModel, power: int, sample: Sample, *, work_dir: Path, provider: Provider = "cpu"
) -> tuple[CanonicalModel, Rooting]:
    """The model with softmax weights as powers of their roots, written to ``work_dir/rooted.onnx``.

    The old one is returned where there are none, or where the float outputs on ``sample`` would change.
    """
    graph = model.graph.copy()
    count, skips = root_softmax.run(graph, power)
    if not count:
        return model, Rooting(power=power, count=0, skips=tuple(skips), difference=0.0)
    path = work_dir / "rooted.onnx"
    rooted = write_form(model, graph, path, f"rooted {power}")
    gap, reason = compare_forms(model.path, path, sample, provider=provider)
    if reason:
        skips.append(Skip(site=model.user_name(model.outputs[0]), reason=reason))
        return model, Rooting(power=power, count=0, skips=tuple(skips), difference=gap)
    return rooted, Rooting(power=power, count=count, skips=tuple(skips), difference=gap)
