"""A small point transformer on digits: Zhao et al., "Point Transformer", ICCV 2021.

``python -m models.point_transformer_digits OUT.onnx`` writes the classifier: input ``points`` [batch, 32, 3] float32
as :mod:`models.digits` makes it, output ``logits`` [batch, 10]. ``--train OUT.npz`` trains the weights anew (two or
three minutes on one core) and says how many held-out digits they recognise.

Vector attention over the k nearest neighbours j of each point i, one weight per neighbour and channel:

    y_i = sum_j softmax_j( gamma(q_i - k_j + delta_ij) / sqrt(d) ) * (v_j + delta_ij),
    delta_ij = theta(p_i - p_j)

with gamma and theta MLPs of two layers. Between two such blocks half of the points remain, each with the maximum
over its neighbours' features. As the order of the points is random, the remaining half is the first one; the
published network looks for points far from each other instead.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from models.digits import CLASSES, POINTS
from models.manifest import RepositoryFile
from models.training import Schedule, TrainedManifest, TrainedModel

MANIFEST = TrainedManifest(
    name="point_transformer_digits",
    form="points",
    weights=RepositoryFile(
        relative_path="models/weights/point_transformer_digits.npz",
        sha256="0fa6723f221675869cad2f9c448f55f0f83d944bc693544d5b911841feef47bb",
    ),
    input_name="points",
    input_shape=("batch", POINTS, 3),
    output_name="logits",
    output_shape=("batch", CLASSES),
    opset=17,
    accuracy=0.9383,
)
SCHEDULE = Schedule(epochs=60)

_NEIGHBOURS = 8


class Dense(nn.Module):
    """A layer and its normalization over all points of the batch: [..., channels] -> [..., out]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, out, bias=False)
        self.norm = nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        """The axes before the last one stay."""
        rows = self.norm(self.layer(x.reshape(-1, x.shape[-1])))
        normalized: Tensor = rows.reshape(*x.shape[:-1], -1)
        return normalized


class VectorAttention(nn.Module):
    """The sum above, for features x [batch, points, channels] at coordinates p [batch, points, 2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.theta = nn.Sequential(nn.Linear(2, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.gamma = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))

    def forward(self, p: Tensor, x: Tensor) -> Tensor:
        """New features of the same shape."""
        near = nearest(p, p)
        q, k, v = self.q(x), take(self.k(x), near), take(self.v(x), near)
        delta = self.theta(p.unsqueeze(2) - take(p, near))
        weights = (self.gamma(q.unsqueeze(2) - k + delta) * self.scale).softmax(dim=2)
        mixed: Tensor = (weights * (v + delta)).sum(dim=2)
        return mixed


class Block(nn.Module):
    """Vector attention between two layers, with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = Dense(channels, channels), Dense(channels, channels)
        self.attention = VectorAttention(channels)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, p: Tensor, x: Tensor) -> Tensor:
        """New features of the same shape."""
        mixed = self.attention(p, self.first(x).relu())
        mixed = self.norm(mixed.reshape(-1, x.shape[-1])).reshape(x.shape).relu()
        y: Tensor = self.last(mixed)
        return (x + y).relu()


class TransitionDown(nn.Module):
    """The first ``count`` points, each with the maximum over what its neighbours are and where they are."""

    def __init__(self, channels: int, out: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.layer = nn.Sequential(
            nn.Conv2d(channels + 2, out, kernel_size=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )

    def forward(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and features of the points that remain."""
        kept = p[:, : self.count]
        near = nearest(kept, p)
        around = torch.cat([take(p, near) - kept.unsqueeze(2), take(x, near)], dim=-1)
        pooled = self.layer(around.permute(0, 3, 1, 2)).max(dim=-1).values
        return kept, pooled.transpose(1, 2)


class PointTransformerDigits(nn.Module):
    """32 points of 32 channels, then 16 of 64."""

    def __init__(self) -> None:
        super().__init__()
        first, second = 32, 64
        self.embedding = Dense(3, first)
        self.block1 = Block(first)
        self.down = TransitionDown(first, second, POINTS // 2)
        self.block2 = Block(second)
        self.head = nn.Sequential(nn.Linear(second, second), nn.ReLU(), nn.Linear(second, CLASSES))

    def forward(self, points: Tensor) -> Tensor:
        """[batch, 32, 3] -> [batch, 10]."""
        p = points[..., :2]
        x = self.block1(p, self.embedding(points).relu())
        p, x = self.down(p, x)
        logits: Tensor = self.head(self.block2(p, x).mean(dim=1))
        return logits


def nearest(centres: Tensor, p: Tensor) -> Tensor:
    """Numbers of the points p that are nearest to each centre: [batch, centres, neighbours]."""
    lengths = p.square().sum(-1)
    distances = centres.square().sum(-1).unsqueeze(2) - 2 * centres @ p.transpose(1, 2) + lengths.unsqueeze(1)
    return distances.topk(_NEIGHBOURS, dim=-1, largest=False).indices


def take(x: Tensor, near: Tensor) -> Tensor:
    """The rows ``near`` of x [batch, points, channels]: [batch, centres, neighbours, channels]."""
    batch, centres, count = near.shape
    channels = x.shape[-1]
    rows = torch.gather(x, 1, near.reshape(batch, -1, 1).expand(-1, -1, channels))
    return rows.reshape(batch, centres, count, channels)


def disturbed(points: Tensor, chance: torch.Generator) -> Tensor:
    """Each set stretched and moved as a whole, its points moved a little and put in another order."""
    batch, count, _ = points.shape
    stretch = 1 + 0.15 * (2 * torch.rand(batch, 1, 2, generator=chance) - 1)
    shift = 0.1 * (2 * torch.rand(batch, 1, 2, generator=chance) - 1)
    p = points[..., :2] * stretch + shift + 0.02 * torch.randn(batch, count, 2, generator=chance)
    return torch.cat([p, points[..., 2:]], dim=-1)[:, torch.randperm(count, generator=chance)]


MODEL = TrainedModel(manifest=MANIFEST, make=PointTransformerDigits, augment=disturbed, schedule=SCHEDULE)


if __name__ == "__main__":
    sys.exit(MODEL.main(sys.argv[1:]))
