"""A small Swin transformer on digits: Liu et al., "Swin Transformer", ICCV 2021.

``python -m models.swin_digits OUT.onnx`` writes the classifier: input ``image`` [batch, 1, 16, 16] float32 as
:mod:`models.digits` makes it, output ``logits`` [batch, 10]. ``--train OUT.npz`` trains the weights anew (a minute
or two on one core) and says how many held-out digits they recognise.

Attention inside windows of 4 x 4 tokens; every other block moves the windows by half their side, and a mask
keeps apart what the move brings together; the bias of a pair of tokens is looked up by their relative position:

    softmax(Q K^T / sqrt(d) + B[relative position] + mask) V

It is written the way it is published, with views, permutations, rolls and sizes taken from tensors, so that the
exported graph looks like those of the large networks.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from models.digits import CLASSES, SIDE
from models.manifest import RepositoryFile
from models.training import Schedule, TrainedManifest, TrainedModel

MANIFEST = TrainedManifest(
    name="swin_digits",
    form="pictures",
    weights=RepositoryFile(
        relative_path="models/weights/swin_digits.npz",
        sha256="919223b9defa728ab0904f10fb7bf65558b9521953373515dc8287a27a7599a9",
    ),
    input_name="image",
    input_shape=("batch", 1, SIDE, SIDE),
    output_name="logits",
    output_shape=("batch", CLASSES),
    opset=17,
    accuracy=0.965,
)
SCHEDULE = Schedule(epochs=100, rate=4e-3)

_WINDOW = 4
_SHIFT = _WINDOW // 2
_FARTHEST = 2
"""Pixels by which training pictures are moved."""


class WindowAttention(nn.Module):
    """Attention within each window, ``x`` [windows, tokens, channels]."""

    position: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.zeros((2 * _WINDOW - 1) ** 2, heads), std=0.02))
        self.register_buffer("position", relative_position(_WINDOW))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` [windows of a picture, tokens, tokens] is added to the scores."""
        windows, tokens, channels = x.shape
        split = self.qkv(x).reshape(windows, tokens, 3, self.heads, channels // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.bias[self.position.view(-1)].view(tokens, tokens, -1)
        scores = scores + bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            scores = scores.view(windows // count, count, self.heads, tokens, tokens)
            scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, tokens, tokens)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, tokens, channels)
        projected: Tensor = self.projection(mixed)
        return projected


class Block(nn.Module):
    """Attention and MLP halves, ``x`` [batch, side, side, channels]; windows are moved by ``shift`` tokens."""

    mask: Tensor | None

    def __init__(self, channels: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.register_buffer("mask", shifted_mask(side, shift) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = merge_windows(self.attention(split_windows(y), self.mask), self.side)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchMerging(nn.Module):
    """Four neighbours become one token: [batch, side, side, channels] -> [batch, side / 2, side / 2, out]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Half the side."""
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


class SwinDigits(nn.Module):
    """Two stages of two blocks: 8 x 8 tokens of 24 channels, then 4 x 4 of 48."""

    def __init__(self) -> None:
        super().__init__()
        first, second = 24, 48
        self.patches = nn.Conv2d(1, first, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(first)
        self.stage1 = nn.Sequential(Block(first, 2, SIDE // 2, 0), Block(first, 2, SIDE // 2, _SHIFT))
        self.merging = PatchMerging(first, second)
        # One window covers the whole map, so there is nothing to shift.
        self.stage2 = nn.Sequential(*(Block(second, 4, SIDE // 4, 0) for _ in range(2)))
        self.last_norm = nn.LayerNorm(second)
        self.head = nn.Linear(second, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 1, 16, 16] -> [batch, 10]."""
        x = self.norm(self.patches(image).permute(0, 2, 3, 1))
        x = self.stage2(self.merging(self.stage1(x)))
        logits: Tensor = self.head(self.last_norm(x).mean((1, 2)))
        return logits


def split_windows(x: Tensor) -> Tensor:
    """[batch, side, side, channels] -> [batch x windows, tokens, channels]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // _WINDOW, _WINDOW, width // _WINDOW, _WINDOW, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, _WINDOW * _WINDOW, channels)


def merge_windows(x: Tensor, side: int) -> Tensor:
    """The inverse of :func:`split_windows`."""
    count = side // _WINDOW
    x = x.view(-1, count, count, _WINDOW, _WINDOW, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, x.shape[-1])


def relative_position(window: int) -> Tensor:
    """For each pair of tokens of a window, the number of their relative position: [tokens, tokens]."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    down = rows.reshape(-1, 1) - rows.reshape(1, -1) + window - 1
    right = columns.reshape(-1, 1) - columns.reshape(1, -1) + window - 1
    return down * (2 * window - 1) + right


def shifted_mask(side: int, shift: int) -> Tensor:
    """-100 for pairs of tokens that only a shift brought into one window: [windows, tokens, tokens]."""
    place = torch.arange(side)
    # Tokens that were rolled over the edge, and the part of the last windows that was there before them.
    zone = (place >= side - _WINDOW).long() + (place >= side - shift).long()
    regions = split_windows((3 * zone[:, None] + zone[None, :]).view(1, side, side, 1).float()).squeeze(-1)
    return torch.where(regions[:, None, :] == regions[:, :, None], 0.0, -100.0)


def moved(images: Tensor, chance: torch.Generator) -> Tensor:
    """Each picture moved by up to two pixels, its edge repeated."""
    by = torch.randint(-_FARTHEST, _FARTHEST + 1, (len(images), 2), generator=chance)
    side = images.shape[-1]
    wide = nn.functional.pad(images, [_FARTHEST] * 4, mode="replicate")
    rows, columns = (_FARTHEST + by[:, i, None] + torch.arange(side) for i in (0, 1))
    return wide[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


MODEL = TrainedModel(manifest=MANIFEST, make=SwinDigits, augment=moved, schedule=SCHEDULE)


if __name__ == "__main__":
    sys.exit(MODEL.main(sys.argv[1:]))
