"""Small networks shaped like detectors, segmenters and point-cloud models, exported by torch and lowered.

Exported at batch 2 with a dynamic batch, compared with onnxruntime at batch 3.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from onnxptq.lowering import check_supported, lower
from onnxptq.runtime import Session

TOLERANCE = 1e-4
"""Largest difference relative to the largest output: float32 sums in another order."""


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU())


class Yolo(nn.Module):
    """Two scales joined by nearest upsampling, max-pool pyramid, boxes decoded on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8, 2), conv(8, 16, 2)
        self.lateral, self.head = conv(24, 8), nn.Conv2d(8, 3 * 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.down(a)
        b = b + F.max_pool2d(b, 5, 1, 2)
        y = self.head(self.lateral(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1)))
        n, _, h, w = y.shape
        y = y.view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).sigmoid()
        xy, wh, score = y.split((2, 2, 3), 4)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([columns, rows], 2).view(1, 1, h, w, 2).float()
        xy = (xy * 2 - 0.5 + grid) * 4
        wh = (wh * 2) ** 2 * torch.tensor([8.0, 12.0])
        return torch.cat([xy, wh, score], 4).view(n, -1, 7)


class Ssd(nn.Module):
    """Anchor heads on two scales, boxes from centre form, softmax scores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 2), conv(8, 8, 2)
        self.boxes = nn.ModuleList([nn.Conv2d(8, 16, 3, padding=1) for _ in range(2)])
        self.scores = nn.ModuleList([nn.Conv2d(8, 20, 3, padding=1) for _ in range(2)])
        self.register_buffer("priors", torch.rand(4 * (16 * 16 + 8 * 8), 4) + 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.a(x)]
        maps.append(self.b(maps[0]))
        n = x.shape[0]
        box = torch.cat(
            [h(m).permute(0, 2, 3, 1).reshape(n, -1, 4) for h, m in zip(self.boxes, maps, strict=True)], 1
        )
        score = torch.cat(
            [h(m).permute(0, 2, 3, 1).reshape(n, -1, 5) for h, m in zip(self.scores, maps, strict=True)], 1
        )
        priors: Any = self.priors
        centre = priors[..., :2] + box[..., :2] * 0.1 * priors[..., 2:]
        size = priors[..., 2:] * torch.exp(box[..., 2:] * 0.2)
        return torch.cat([centre - size / 2, centre + size / 2], -1), score.softmax(-1)


class UNet(nn.Module):
    """Encoder and decoder with transposed convolution, group and instance normalization, crop by slicing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.LeakyReLU(0.1))
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ELU())
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        up = self.up(self.b(F.avg_pool2d(a, 2, ceil_mode=True)))
        return self.out(torch.cat([a, up[:, :, : a.shape[2], : a.shape[3]]], 1))


class DeepLab(nn.Module):
    """Dilated branches, image pooling, bilinear upsampling to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 2)
        self.branches = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.pool, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y.mean((2, 3), keepdim=True)), size=y.shape[2:], mode="bilinear")
        y = self.out(torch.cat([*(F.relu(b(y)) for b in self.branches), pooled], 1))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class SegFormer(nn.Module):
    """Attention with reduced keys, depthwise mixing, fused maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 7, 4, 3), nn.LayerNorm(16)
        self.q, self.kv, self.reduce = nn.Linear(16, 16), nn.Linear(16, 32), nn.Conv2d(16, 16, 2, 2)
        self.fc1, self.mix, self.fc2 = (
            nn.Linear(16, 32),
            nn.Conv2d(32, 32, 3, 1, 1, groups=32),
            nn.Linear(32, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        n, c, h, w = y.shape
        t = y.flatten(2).transpose(1, 2)
        s = self.norm(t)
        q = self.q(s).reshape(n, -1, 2, 8).permute(0, 2, 1, 3)
        small = self.reduce(s.transpose(1, 2).reshape(n, c, h, w)).flatten(2).transpose(1, 2)
        k, v = self.kv(small).reshape(n, -1, 2, 2, 8).permute(2, 0, 3, 1, 4)
        t = t + ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(n, -1, c)
        m = self.fc1(self.norm(t))
        m = self.mix(m.transpose(1, 2).reshape(n, 32, h, w)).flatten(2).transpose(1, 2)
        t = t + self.fc2(F.gelu(m))
        return F.interpolate(t.transpose(1, 2).reshape(n, c, h, w), scale_factor=4.0, mode="bicubic")


class Dgcnn(nn.Module):
    """Edge convolution on the k nearest neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.out = nn.Conv2d(6, 16, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, points = x.shape
        inner = -2 * x.transpose(2, 1) @ x
        square = (x**2).sum(1, keepdim=True)
        near = (-square - inner - square.transpose(2, 1)).topk(4, dim=-1)[1]
        base = torch.arange(n, device=x.device).view(-1, 1, 1) * points
        flat = x.transpose(2, 1).reshape(n * points, 3)[(near + base).view(-1)].view(n, points, 4, 3)
        centre = x.transpose(2, 1).unsqueeze(2).expand(-1, -1, 4, -1)
        edges = torch.cat([flat - centre, centre], 3).permute(0, 3, 1, 2)
        y = F.leaky_relu(self.edge(edges), 0.2).max(dim=-1)[0]
        return self.out(torch.cat([y.max(-1)[0], y.mean(-1)], 1))


class PointNet2(nn.Module):
    """Grouping within a radius around fixed centres, then a shared MLP and the maximum of each group."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.out = (
            nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        points = x.transpose(1, 2)
        centres = points[:, ::4]
        distance = ((centres.unsqueeze(2) - points.unsqueeze(1)) ** 2).sum(-1)
        order = torch.where(distance > 1.0, distance + 99.0, distance).sort(-1)[1][..., :8]
        index = order.unsqueeze(-1).expand(-1, -1, -1, 3)
        grouped = points.unsqueeze(1).expand(-1, centres.shape[1], -1, -1).gather(2, index)
        grouped = (grouped - centres.unsqueeze(2)).permute(0, 3, 1, 2)
        return self.out(self.mlp(grouped).max(3)[0].mean(2))


class Masked(nn.Module):
    """In-place writes, clamps, masks, rolls and cumulative sums, as exporters turn them into scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.conv(F.pad(x, (2, 1), mode="reflect")))
        y = torch.roll(y, 2, -1).clamp(-1.0, 2.0)
        z = y.clone()
        z[:, :, ::2] = y[:, :, ::2] * 2
        z = z.masked_fill(z < -0.3, 0.5)
        return torch.cumsum(z, -1) / torch.arange(1, z.shape[-1] + 1) + y.flip(1).prod(1, keepdim=True)


NETWORKS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (Yolo, (3, 32, 32)),
    (Ssd, (3, 32, 32)),
    (UNet, (3, 33, 30)),
    (DeepLab, (3, 30, 34)),
    (SegFormer, (3, 32, 32)),
    (Dgcnn, (3, 24)),
    (PointNet2, (3, 32)),
    (Masked, (3, 20)),
]


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
@pytest.mark.parametrize(("build", "shape"), NETWORKS, ids=[b.__name__ for b, _ in NETWORKS])
def test_network_equals_onnxruntime(
    build: Callable[[], nn.Module], shape: tuple[int, ...], opset: int
) -> None:
    torch.manual_seed(0)
    network = build().eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter's own deprecations and its remarks about constants are not ours.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.randn(2, *shape),),
            file,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
            opset_version=opset,
        )
    graph = gs.import_onnx(onnx.load_from_string(file.getvalue()))
    for i, node in enumerate(graph.nodes):
        node.name = f"{node.op}_{i}"
    assert check_supported(graph) == ()
    module = lower(graph, inputs=["x"], outputs=[t.name for t in graph.outputs])
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    want = Session(file.getvalue(), threads=1).run({"x": x})
    value = torch.from_numpy(x).requires_grad_(True)
    found = module({"x": value})
    for name, array in want.items():
        got = found[name].detach().numpy()
        assert got.shape == array.shape
        assert np.abs(got - array).max() <= TOLERANCE * np.abs(array).max(), name
    torch.stack([v.square().mean() for v in found.values()]).sum().backward()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()
    # The network itself has the same gradient: onnxruntime cannot tell that.
    again = torch.from_numpy(x).requires_grad_(True)
    results = network(again)
    results = results if isinstance(results, tuple) else (results,)
    torch.stack([v.square().mean() for v in results]).sum().backward()
    assert again.grad is not None
    scale = float(again.grad.abs().max())
    assert float((value.grad - again.grad).abs().max()) <= TOLERANCE * scale
