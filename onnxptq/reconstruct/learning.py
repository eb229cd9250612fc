"""How packs are learnt: one frozen value per preset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Settings of the reconstruction loop.

    Attributes:
        weights: ``straight-through`` latents, or ``adaround``, or ``kept`` integers (see
            :mod:`onnxptq.quantizers.trainable`), or ``low-rank`` corrections of float weights
            (:mod:`onnxptq.quantizers.low_rank`).
        ranks: candidates for the rank of these; the largest is taken where none is searched for.
        search_steps: steps of :mod:`onnxptq.reconstruct.rank_search` per pack, before ``steps``.
        is_closed_form_first: whether layers are rounded with error compensation before anything is learnt.
        adds_branches: whether layers get a low-rank branch then, where it pays
            (:mod:`onnxptq.reconstruct.branches`); gradient steps leave it as it is.
        steps: gradient steps per pack.
        batch: samples per step, at most.
        passes: how often the steps take every sample, at most: with few samples, steps are smaller. None: as often
            as it comes.
        is_easy_first: whether steps draw from the samples with the lowest loss, at first from half of them.
        focuses_softmax: whether softmax weights that a product reads get ranges with two learnt ends
            (:mod:`onnxptq.quantizers.focusing`), where their grid allows it, instead of a learnt scale.
        mixing: probability with which an element of the pack's input is the float one instead of the one that
            the quantized network in front computes (QDrop).
        held_out: share of the samples that only judge, the same for all packs; with some, the best state seen wins
            and a pack whose judgement stays flat for ``patience`` of the ``checks`` stops early. 0 trains on all
            samples, to the end.
        latent_rate: Adam's rate for latents: in steps of the grid, or of a for AdaRound.
        anneals_rounding: whether the rate of AdaRound's latents falls to 0 along a cosine, as all others do.
        weight_scale_rate, activation_scale_rate: the same for logarithms of scales; 0 keeps them.
        bias_rate: the same for biases, relative to the root mean square of each; 0 keeps them.
        weighting: exponent of the Fisher weights of a pack's outputs (:mod:`onnxptq.reconstruct.fisher`); 0 weighs
            all elements alike.
        is_global: whether the loss at the network's outputs counts as well (:mod:`onnxptq.reconstruct.suffix`).
        output_loss: how outputs of the network are compared there and in the end.
        is_tuned: whether scales and biases of the whole network are learnt on its outputs once all packs are solved
            (:mod:`onnxptq.reconstruct.tuning`).
        tuning_steps: gradient steps that this takes, at most.
        warm_up: share of the steps before AdaRound's indecision counts.
        decision: its weight.
    """

    weights: Literal["straight-through", "adaround", "low-rank", "kept"] = "straight-through"
    ranks: tuple[int, ...] = (10, 20, 50, 100, 150)
    search_steps: int = 0
    is_closed_form_first: bool = True
    adds_branches: bool = False
    steps: int = 300
    batch: int = 32
    passes: float | None = 24
    is_easy_first: bool = False
    focuses_softmax: bool = False
    mixing: float = 0.0
    held_out: float = 0.125
    checks: int = 10
    patience: int = 3
    latent_rate: float = 1e-2
    anneals_rounding: bool = True
    weight_scale_rate: float = 1e-3
    activation_scale_rate: float = 1e-3
    bias_rate: float = 1e-3
    weighting: float = 0.0
    is_global: bool = False
    output_loss: Literal["auto", "kl", "relative"] = "auto"
    is_tuned: bool = False
    tuning_steps: int = 300
    warm_up: float = 0.2
    decision: float = 0.01

    def judges(self, samples: int) -> int:
        """How many of ``samples`` judge, and are not learnt from."""
        return math.ceil(self.held_out * samples) if samples > 1 else 0


FAST = Learning(steps=0)
BALANCED = Learning()
PAPER = Learning(
    weights="adaround",
    is_closed_form_first=False,
    steps=20_000,
    batch=16,
    passes=None,
    mixing=0.5,
    held_out=0.0,
    latent_rate=3e-3,
    anneals_rounding=False,
    weight_scale_rate=0.0,
    activation_scale_rate=4e-5,
    bias_rate=0.0,
)
TUNING = Learning(
    weights="kept",
    is_closed_form_first=False,
    passes=16,
    checks=1,
    latent_rate=0.0,
    weight_scale_rate=3e-4,
    activation_scale_rate=1e-4,
    bias_rate=3e-4,
)
"""Of the whole network on its outputs: small steps to the end, which then is taken or not. Gradients of the scales of
activations are far from exact behind many roundings, so that larger steps lose more often."""
