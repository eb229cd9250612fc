"""Choosing an observer by what the network's output says.

No observer wins everywhere: on convolutional networks the mean squared error of a tensor predicts the
damage well, on transformers with a few massive activations clipping them is ruinous although it hardly
shows in that error. So the candidates are tried on the whole network, by successive halving (Karnin, Koren
and Somekh, "Almost optimal exploration in multi-armed bandits", ICML 2013): all of them on a few samples, the
better half on four times as many, and so on. What ruins a network shows on any sample; between candidates that are
close, more samples would not decide much either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxptq.calibrate.observers import Observer
from onnxptq.types import Progress, started

CANDIDATES: Sequence[Observer] = (
    Observer(name="mse", norm=2.0),
    Observer(name="percentile", percentile=99.999),
    Observer(name="mse", norm=4.0),
    Observer(name="minmax"),
)
"""From the one that clips most to the one that clips nothing. Norms in between, larger ones and wider ranges were
measured too: each does within half a dB of one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The ``observer`` that won, and the last scores in dB, by label: of those that were tried on all samples, and of
    those that fell behind on fewer of them."""

    observer: Observer
    scores: Mapping[str, float]
    behind: Mapping[str, float]

    @property
    def summary(self) -> str:
        """One line."""
        best = label(self.observer)
        others = [f"{name} {score:.2f}" for name, score in self.scores.items() if name != best]
        found = "; ".join([f"{self.scores[best]:.2f} dB on calibration samples", *others])
        behind = ", ".join(f"{name} {score:.2f}" for name, score in self.behind.items())
        return f"Ranges by {best} ({found}{f'; behind on fewer of them: {behind}' if behind else ''})."


def select_observer(
    evaluate: Callable[[Observer, int], float],
    samples: int,
    candidates: Sequence[Observer] = CANDIDATES,
    progress: Progress | None = None,
) -> Selected:
    """The candidate that wins the last round, the earlier one on a tie.

    Args:
        evaluate: the quality of the network's outputs under an observer on the first so many samples, in dB.
        samples: how many there are; the last round uses all of them.
    """
    rounds = _rounds(len(candidates), samples)
    tick = started(progress, "choose ranges", sum(kept for kept, _ in rounds))
    scores: dict[Observer, float] = {}
    remaining = list(candidates)
    for kept, count in rounds:
        # Sorting is stable and NaN never wins: of equals the earlier candidate stays.
        remaining = sorted(remaining, key=lambda c: -_ordered(scores.get(c, 0.0)))[:kept]
        remaining.sort(key=candidates.index)
        for candidate in remaining:
            scores[candidate] = evaluate(candidate, count)
            tick()
    return Selected(
        observer=max(remaining, key=lambda c: _ordered(scores[c])),
        scores={label(c): scores[c] for c in remaining},
        behind={label(c): scores[c] for c in candidates if c not in remaining},
    )


def _rounds(candidates: int, samples: int) -> list[tuple[int, int]]:
    """(candidates, samples) of each round: half the candidates, four times the samples, down to two and up to all."""
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    halvings = len(sizes) - 1
    return [(size, max(1, samples >> 2 * (halvings - i))) for i, size in enumerate(sizes)]


def _ordered(score: float) -> float:
    return score if score == score else float("-inf")


def label(observer: Observer) -> str:
    """``mse p=2.4`` and the like, for people."""
    name: str = observer.name
    if name == "mse":
        name = f"mse p={observer.norm:g}"
    elif name == "percentile":
        name = f"percentile {observer.percentile:g}"
    return name if observer.margin == 1.0 else f"{name} x {observer.margin:g}"
