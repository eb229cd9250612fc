"""Attention and RotaryEmbedding.

Attention: Y = softmax(cap(sqrt(s) Q (sqrt(s) K)^T) + bias) V, cap(t) = c tanh(t / c), where the bias joins
the mask, the causal limit j <= i + offset and the padding limit j < nonpad_kv_seqlen. offset is the length
of the past, or nonpad_kv_seqlen - q_length. A row that may see nothing gives zeros. Fewer key heads than
query heads are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.dtypes import torch_dtype
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _allowed(
    q_length: int, k_length: int, offset: Tensor, bounds: tuple[int, int], device: torch.device
) -> Tensor:
    """Which keys each query may see, as (batch or 1, 1, q, k); a (left, right) bound of -1 is none."""
    query = torch.arange(q_length, device=device).reshape(1, -1, 1) + offset.to(device).reshape(-1, 1, 1)
    ahead = torch.arange(k_length, device=device).reshape(1, 1, -1) - query
    left, right = bounds
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    return seen.unsqueeze(1)


def _bias(mask: Tensor | None, k_length: int) -> Tensor | None:
    """The additive form of a mask, padded with -inf to the full key length."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    missing = k_length - mask.shape[-1]
    return F.pad(mask, (0, missing), value=-math.inf) if missing > 0 else mask


def _softmax(scores: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Softmax over keys; a row of -inf gives zeros."""
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(safe if dtype is None else safe.to(dtype), dim=-1).to(scores.dtype)
    return weights.masked_fill(empty, 0.0)


@register("", "Attention", 23)
def attention(spec: NodeSpec) -> Kernel:
    """Attention with all its outputs; the fourth is the score matrix at the stage that the node asks for."""
    q_heads, k_heads = spec.integer("q_num_heads", 0), spec.integer("kv_num_heads", 0)
    scale, cap = spec.attribute("scale"), spec.number("softcap", 0.0)
    left, right = spec.integer("left_window_size", -1), spec.integer("right_window_size", -1)
    if spec.integer("is_causal", 0):
        right = 0
    stage = spec.integer("qk_matmul_output_mode", 0)
    precision = spec.attribute("softmax_precision")
    dtype = None if precision is None else torch_dtype(int(precision))
    if stage not in range(4):
        raise Declined(f"qk_matmul_output_mode {stage}")

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        past_k: Tensor | None = None,
        past_v: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        is_flat = q.dim() == 3
        if is_flat:
            q, k, v = _heads(q, q_heads), _heads(k, k_heads), _heads(v, k_heads)
        offset = torch.zeros(1, dtype=torch.int64)
        if past_k is not None and past_v is not None:
            offset = offset + past_k.shape[2]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        elif valid is not None:
            offset = valid.long() - q.shape[2]
        present = (k, v)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else float(scale))
        scores = (q * root) @ (k * root).transpose(-1, -2)
        stages = [scores]
        scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
        stages.append(scores)
        length = k.shape[2]
        bias = _bias(mask, length)
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        if left >= 0 or right >= 0:
            seen = _allowed(q.shape[2], length, offset, (left, right), q.device)
            scores = scores.masked_fill(~seen, -math.inf)
        if valid is not None:
            keys = torch.arange(length, device=q.device).reshape(1, 1, 1, -1)
            scores = scores.masked_fill(keys >= valid.reshape(-1, 1, 1, 1), -math.inf)
        stages.append(scores)
        weights = _softmax(scores, dtype)
        stages.append(weights)
        y = weights @ v
        if is_flat:
            y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
        return y, *present, stages[stage]

    return _first(run) if spec.n_outputs == 1 else run


def _first(run: Callable[..., tuple[Tensor, ...]]) -> Kernel:
    return lambda *args: run(*args)[0]


@register("", "RotaryEmbedding", 23)
def rotary_embedding(spec: NodeSpec) -> Kernel:
    """Rotate pairs of features by position: (a, b) -> (a cos - b sin, a sin + b cos)."""
    interleaved = bool(spec.integer("interleaved", 0))
    rotated = spec.integer("rotary_embedding_dim", 0)
    heads = spec.integer("num_heads", 0)

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        is_flat = x.dim() == 3
        y = x.reshape(x.shape[0], x.shape[1], heads, -1) if is_flat else x.transpose(1, 2)
        if positions is not None:
            cos, sin = cos[positions.long()], sin[positions.long()]
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        width = rotated or y.shape[-1]
        turn, rest = y[..., :width], y[..., width:]
        a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, dim=-1)
        real, imaginary = a * cos - b * sin, a * sin + b * cos
        if interleaved:
            turn = torch.stack([real, imaginary], dim=-1).flatten(-2)
        else:
            turn = torch.cat([real, imaginary], dim=-1)
        y = torch.cat([turn, rest], dim=-1)
        return y.reshape(x.shape) if is_flat else y.transpose(1, 2)

    return run
