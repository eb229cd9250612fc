"""The two small networks that were trained here: what they compute, what they recognise, how they are exported."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from models import digits, point_transformer_digits, swin_digits
from models.manifest import RepositoryFile
from models.training import TrainedModel, accuracy, load_weights, save_weights, train
from onnxptq.errors import EnvironmentMismatchError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn (the demo extra) is not installed"
)


MODELS = (swin_digits.MODEL, point_transformer_digits.MODEL)
BOTH = pytest.mark.parametrize("model", MODELS, ids=[model.manifest.name for model in MODELS])


@BOTH
def test_the_exported_network_recognises_what_the_manifest_says(model: TrainedModel, tmp_path: Path) -> None:
    path = model.build(tmp_path / "net.onnx")
    heldout = digits.load(model.manifest.form, "heldout")

    logits = ort.InferenceSession(str(path)).run(["logits"], {model.manifest.input_name: heldout.samples})[0]

    reached = (logits.argmax(1) == heldout.labels).mean()
    # Another processor may sum in another order: two digits of 600 that lie on the fence.
    assert reached == pytest.approx(model.manifest.accuracy, abs=2.5 / digits.HELD_OUT)
    with torch.inference_mode():
        expected = model.load_torch()(torch.from_numpy(heldout.samples)).numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@BOTH
def test_interface_and_bytes(model: TrainedModel, tmp_path: Path) -> None:
    first, second = (model.build(tmp_path / f"{i}.onnx") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    proto, manifest = onnx.load(first), model.manifest
    (read,), (written,) = proto.graph.input, proto.graph.output
    assert (read.name, written.name) == (manifest.input_name, manifest.output_name)
    for value, shape in ((read, manifest.input_shape), (written, manifest.output_shape)):
        assert tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) == shape
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", manifest.opset)]
    assert first.stat().st_size < 500_000
    assert manifest.weights.path.stat().st_size < 200_000


def test_the_graphs_look_like_those_of_the_large_networks(tmp_path: Path) -> None:
    """What they are there for: windows and neighbours as exporters write them, undecided and unfolded."""
    swin, points = (
        Counter(node.op_type for node in onnx.load(model.build(tmp_path / "net.onnx")).graph.node)
        for model in MODELS
    )
    # Patterns of shape arithmetic, windows, rolls, and Gelu in its parts.
    assert min(swin[op] for op in ("Shape", "Reshape", "Transpose", "Slice", "Concat", "Erf")) >= 4
    assert swin["Softmax"] == 4
    assert swin["LayerNormalization"] == 11
    assert points["TopK"] == 3
    assert points["GatherElements"] == 8
    assert points["Softmax"] == 2
    assert points["BatchNormalization"] == 7


@BOTH
def test_training_is_repeatable_and_learns(model: TrainedModel, tmp_path: Path) -> None:
    every = digits.load(model.manifest.form, "calib")
    few = digits.Digits(samples=every.samples[:256], labels=every.labels[:256])
    schedule = dataclasses.replace(model.schedule, epochs=2)
    said: list[str] = []
    state = torch.get_rng_state()
    networks = [train(model.make, few, model.augment, schedule, said.append) for _ in range(2)]
    other = train(model.make, few, model.augment, dataclasses.replace(schedule, seed=1))

    assert torch.equal(torch.get_rng_state(), state)
    assert said[0] == said[1]
    for i, network in enumerate((*networks, other)):
        save_weights(network, tmp_path / f"{i}.npz")
    first, second, third = ((tmp_path / f"{i}.npz").read_bytes() for i in range(3))
    assert first == second != third
    before, after = (model.make().eval(), networks[0])
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                net(torch.from_numpy(few.samples)), torch.from_numpy(few.labels)
            )
            for net in (before, after)
        ]
    assert losses[1] < losses[0]


@BOTH
def test_the_program(model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        short = dataclasses.replace(model.schedule, epochs=1, batch=256)
        return dataclasses.replace(model, schedule=short).main(list(arguments))

    assert run("--train", str(tmp_path / "w.npz")) == 0
    assert "recognises 0." in capsys.readouterr().out
    assert (tmp_path / "w.npz").stat().st_size < 200_000
    assert run(str(tmp_path / "net.onnx")) == 0
    assert "checked against torch" in capsys.readouterr().out
    assert run() == 2
    assert run("--help") == 0
    (tmp_path / "file").write_text("in the way")
    assert run(str(tmp_path / "file" / "net.onnx")) == 2
    assert "file/net.onnx" in capsys.readouterr().err


def test_other_weights_are_refused(tmp_path: Path) -> None:
    wrong = dataclasses.replace(swin_digits.MANIFEST.weights, sha256="0" * 64)
    with pytest.raises(EnvironmentMismatchError, match=r"expects 0000"):
        load_weights(swin_digits.SwinDigits(), wrong)
    absent = RepositoryFile(relative_path=str(tmp_path / "none.npz"), sha256="")
    with pytest.raises(EnvironmentMismatchError, match=r"no file"):
        load_weights(swin_digits.SwinDigits(), absent)
    # The weights of the other network lack this one's parameters.
    with pytest.raises(KeyError, match=r"bias|weight"):
        load_weights(swin_digits.SwinDigits(), point_transformer_digits.MANIFEST.weights)


# ---- windows -------------------------------------------------------------------------------------


def test_windows_hold_neighbours_and_come_back() -> None:
    x = torch.arange(2 * 8 * 8 * 3, dtype=torch.float32).reshape(2, 8, 8, 3)
    windows = swin_digits.split_windows(x)
    assert windows.shape == (8, 16, 3)
    assert torch.equal(windows[1].reshape(4, 4, 3), x[0, 0:4, 4:8])
    assert torch.equal(windows[6].reshape(4, 4, 3), x[1, 4:8, 0:4])
    assert torch.equal(swin_digits.merge_windows(windows, 8), x)


def test_the_mask_keeps_apart_what_the_shift_brings_together() -> None:
    """Against the definition: rolled tokens see each other if they were neighbours before the roll."""
    mask = swin_digits.shifted_mask(8, 2)
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), dim=-1)
    rolled = torch.roll(places, (-2, -2), (0, 1))[None].float()
    for window, allowed in zip(swin_digits.split_windows(rolled), mask == 0, strict=True):
        gap = (window[:, None] - window[None]).abs().amax(-1)
        assert torch.equal(allowed, gap < 4)
    assert mask.unique().tolist() == [-100.0, 0.0]


def test_the_bias_depends_on_the_relative_position_alone() -> None:
    position = swin_digits.relative_position(4)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    seen: dict[tuple[int, int], int] = {}
    for i in range(16):
        for j in range(16):
            offset = (int(row[i] - row[j]), int(column[i] - column[j]))
            assert seen.setdefault(offset, int(position[i, j])) == position[i, j]
    assert sorted(seen.values()) == list(range(49))


def test_moved_pictures_keep_what_stays_inside() -> None:
    image = torch.zeros(64, 1, 16, 16)
    image[:, 0, 8, 6] = 1
    moved = swin_digits.moved(image, torch.Generator().manual_seed(0))
    places = [divmod(int(one.argmax()), 16) for one in moved]
    assert {abs(row - 8) for row, _ in places} == {abs(column - 6) for _, column in places} == {0, 1, 2}
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(64))


# ---- points --------------------------------------------------------------------------------------


def test_neighbours_and_what_is_taken_of_them() -> None:
    rng = np.random.default_rng(0)
    p, x = rng.standard_normal((3, 20, 2)), rng.standard_normal((3, 20, 5))
    centres, points = torch.from_numpy(p[:, :7]).float(), torch.from_numpy(p).float()
    near = point_transformer_digits.nearest(centres, points).numpy()
    distances = np.linalg.norm(p[:, :7, None] - p[:, None], axis=-1)
    np.testing.assert_array_equal(near, np.argsort(distances, axis=-1)[..., :8])
    taken = point_transformer_digits.take(torch.from_numpy(x), torch.from_numpy(near)).numpy()
    np.testing.assert_array_equal(taken, x[np.arange(3)[:, None, None], near])


def test_vector_attention_is_the_published_sum() -> None:
    torch.manual_seed(0)
    layer = point_transformer_digits.VectorAttention(6)
    p, x = torch.randn(1, 12, 2), torch.randn(1, 12, 6)
    near = point_transformer_digits.nearest(p, p)[0]
    with torch.inference_mode():
        got = layer(p, x)[0]
        for i in range(12):
            scores, values = [], []
            for j in near[i].tolist():
                delta = layer.theta(p[0, i] - p[0, j])
                scores.append(layer.gamma(layer.q(x[0, i]) - layer.k(x[0, j]) + delta) / 6**0.5)
                values.append(layer.v(x[0, j]) + delta)
            weights = torch.softmax(torch.stack(scores), dim=0)
            torch.testing.assert_close(got[i], (weights * torch.stack(values)).sum(0))


def test_the_order_of_points_matters_only_for_which_remain() -> None:
    network = point_transformer_digits.MODEL.load_torch()
    points = torch.from_numpy(digits.load("points", "heldout").samples[:8])
    chance = torch.Generator().manual_seed(0)
    first, second = (half + torch.randperm(16, generator=chance) for half in (0, 16))
    with torch.inference_mode():
        torch.testing.assert_close(
            network(points), network(points[:, torch.cat([first, second])]), rtol=1e-4, atol=1e-4
        )


def test_accuracy_counts_hits() -> None:
    heldout = digits.Digits(samples=np.eye(10, dtype=np.float32), labels=np.arange(10) // 2 * 2)
    assert accuracy(torch.nn.Identity(), heldout) == 0.5
