"""Choosing an observer by what the network's output says.

No observer wins everywhere: on convolutional networks the mean squared error of a tensor predicts the
damage well, on transformers with a few massive activations clipping them is ruinous although it hardly
shows in that error. So the candidates are tried on the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxptq.calibrate.observers import Observer
from onnxptq.types import Progress

CANDIDATES: Sequence[Observer] = (
    Observer(name="mse", norm=2.0),
    Observer(name="mse", norm=2.4),
    Observer(name="percentile", percentile=99.999),
    Observer(name="mse", norm=4.0),
    Observer(name="mse", norm=6.0),
    Observer(name="minmax"),
    Observer(name="minmax", margin=1.15),
)


def select_observer(
    evaluate: Callable[[Observer], float],
    candidates: Sequence[Observer] = CANDIDATES,
    progress: Progress | None = None,
) -> tuple[Observer, dict[str, float]]:
    """The candidate of the highest score, the earlier one on a tie, and all scores by label.

    Args:
        evaluate: the quality of the network's outputs under an observer, in dB.
    """
    step = progress.start("choose ranges", len(candidates)) if progress else None
    scores: dict[str, float] = {}
    best, best_score = candidates[0], float("-inf")
    for candidate in candidates:
        score = evaluate(candidate)
        scores[label(candidate)] = score
        if score > best_score:
            best, best_score = candidate, score
        if step:
            step()
    return best, scores


def label(observer: Observer) -> str:
    """``mse p=2.4`` and the like, for people."""
    name: str = observer.name
    if name == "mse":
        name = f"mse p={observer.norm:g}"
    elif name == "percentile":
        name = f"percentile {observer.percentile:g}"
    return name if observer.margin == 1.0 else f"{name} x {observer.margin:g}"
