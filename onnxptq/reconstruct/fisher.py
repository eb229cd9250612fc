"""How much each element of a pack's output matters to the network's output.

The change of the loss at the network's output that an error dz of an inner tensor makes is, to second order,
1/2 dz^T F dz with the Fisher information (for class logits) or the Gauss-Newton matrix (for other outputs) F.
Its diagonal is estimated without bias by one backward pass per sample,

    class logits      g = d sum log p_y / dz,   y drawn from p = softmax(logits) in every row
    other outputs     g = d (v . o / ||o||) / dz,   v standard normal
    weight of z_i     w_i = E[g_i^2],   scaled to mean 1

where y is no class whose logit is NaN or Inf, and o leaves such elements out, and averaged over the samples and over
every axis but that of the channels (:mod:`onnxptq.reconstruct.channels`). What outputs are is chosen as for their
comparison (:mod:`onnxptq.lowering.output_loss`).
(BRECQ, Li et al., arXiv 2102.05426; FIMA-Q, Wu et al., arXiv 2506.11543.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch

from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import LossChoice, choose_loss, class_axis, numbers_of
from onnxptq.ranks import ALONE, Ranks

_LEAST = 0.05
"""Smallest weight: an element that no sample has shown to matter may matter on others."""


def fisher_weights(
    network: BlockNetwork,
    samples: Mapping[int, Values],
    probabilities: Collection[str],
    seed: int,
    ranks: Ranks = ALONE,
    *,
    axes: Mapping[str, int] = MappingProxyType({}),
    asked: LossChoice = "auto",
) -> Mapping[str, torch.Tensor]:
    """Weights of the float tensors between the blocks of ``network``, shaped to broadcast against them.

    A tensor that no gradient reaches has none.

    Args:
        samples: the network's inputs by number, one sample at a time: a network need not treat an axis as a batch.
        probabilities: outputs that hold p itself and not logits.
        seed: of what is drawn; every sample draws from a stream of its own.
        ranks: processes, each with ``samples`` of its own.
        axes: of the channels; a tensor without has them along the last of three axes, else along axis 1.
        asked: how outputs are compared; see :func:`~onnxptq.lowering.output_loss.choose_loss`.

    Raises:
        UsageError: ``kl`` is asked for and an output holds no class scores.
    """
    sums: dict[str, torch.Tensor] = {}
    for number, sample in samples.items():
        generator = torch.Generator().manual_seed((seed << 20) + number)
        values = _run(network, sample)
        inner = {n: v for n, v in values.items() if v.requires_grad and n not in network.outputs}
        target = _target({n: values[n] for n in network.outputs}, asked, probabilities, generator)
        if not inner or not target.requires_grad:
            continue
        found = torch.autograd.grad(target, list(inner.values()), allow_unused=True)
        for (name, value), gradient in zip(inner.items(), found, strict=True):
            if gradient is not None and value.ndim > 1:
                _add(sums, name, _averaged(gradient.detach().square(), axes.get(name)).cpu())
    total: dict[str, torch.Tensor] = {}
    for part in ranks.gather(sums):
        for name, value in part.items():
            _add(total, name, value)
    return {name: _scaled(value).to(network.device) for name, value in total.items()}


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    known = sums.get(name)
    # A tensor whose channels change in number with the sample has no weight per channel.
    sums[name] = value if known is None or known.shape != value.shape else known + value


def _run(network: BlockNetwork, sample: Values) -> Values:
    values = {name: sample[name].to(network.device) for name in network.inputs}
    for block, module in zip(network.blocks, network.modules, strict=True):
        for name, value in module({n: values[n] for n in (*block.inputs, *block.shape_inputs)}).items():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_(True)
            values[name] = value
    return values


def _target(
    outputs: Mapping[str, torch.Tensor],
    asked: LossChoice,
    probabilities: Collection[str],
    generator: torch.Generator,
) -> torch.Tensor:
    kind = choose_loss(outputs, asked)
    parts = []
    for name, value in outputs.items():
        if not value.is_floating_point():
            continue
        if kind == "kl":
            rows = value.movedim(class_axis(value), -1).flatten(0, -2)
            limits = torch.finfo(value.dtype)
            logits = torch.where(torch.isfinite(rows), rows, limits.min)
            log_p = rows.clamp_min(limits.tiny).log() if name in probabilities else logits.log_softmax(dim=1)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(value.device)
            parts.append(log_p.gather(1, drawn).sum())
        else:
            direction = torch.randn(value.shape, generator=generator).to(value.device)
            numbers = numbers_of(value)
            parts.append((direction * numbers).sum() / numbers.detach().norm().clamp_min(1e-30))
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _averaged(squares: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Mean over the batch and over positions; where the ``axis`` that is kept is not known, it is 1 for maps and the
    last for rows of tokens."""
    kept = axis if axis is not None else squares.ndim - 1 if squares.ndim == 3 else 1
    return squares.mean(dim=[other for other in range(squares.ndim) if other != kept], keepdim=True)


def _scaled(total: torch.Tensor) -> torch.Tensor:
    mean = total.mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0.0:
        return torch.ones_like(total)
    weights = (total / mean).clamp_min(_LEAST)
    return weights / weights.mean()
