"""The reference model: the same function as the package's network, the same bytes every time."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from models import efficientnet_lite0
from models.efficientnet_lite0 import MANIFEST
from models.manifest import PackageFile
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.errors import EnvironmentMismatchError, OutputCheckError, OutputPathError

_MISSING = [
    name
    for name in (MANIFEST.architecture_module, MANIFEST.weights.module, "skimage")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)} (the demo extra)"
)

_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return efficientnet_lite0.build(tmp_path_factory.mktemp("model") / "deep" / "net.onnx")


def _picture(name: str) -> np.ndarray:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    image = Image.open(path).convert("RGB")
    side = round(min(image.size) * 224 / 256)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def test_logits_equal_the_package_network(built: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(MANIFEST.weights.locate(), weights_only=True))
    pictures = np.concatenate([_picture("coffee.png"), _picture("camera.png"), _picture("chelsea.png")])
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(pictures)).numpy()

    got = ort.InferenceSession(str(built)).run(None, {"image": pictures})[0]

    # 50 layers of float32 sums in another order: 2e-6 of the largest logit is measured.
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("picture", "label"), [("coffee.png", 967), ("camera.png", 872)], ids=["espresso", "tripod"]
)
def test_it_recognises_photographs(built: Path, picture: str, label: int) -> None:
    logits = ort.InferenceSession(str(built)).run(["logits"], {"image": _picture(picture)})[0]
    assert logits.argmax() == label


def test_interface_and_nodes(built: Path) -> None:
    model = onnx.load(built)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    dims = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert tuple(dims) == MANIFEST.input_shape
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == list(
        MANIFEST.output_shape
    )
    assert [(o.domain, o.version) for o in model.opset_import] == [("", MANIFEST.opset)]
    counts = Counter(node.op_type for node in model.graph.node)
    counts.pop("Constant", None)
    # Padding and BatchNorm live in the convolutions, and nothing computes shapes.
    assert counts == {"Conv": 49, "Clip": 33, "Add": 9, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}


def test_bytes_do_not_depend_on_the_process(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    subprocess.run(
        [sys.executable, "-m", "models.efficientnet_lite0", str(again)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONHASHSEED": "12345"},
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    assert again.read_bytes() == built.read_bytes()


def test_a_wrong_export_leaves_the_old_file(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "net.onnx"
    output.write_bytes(b"old")
    wrong = onnx.load(built)
    bias = next(t for t in wrong.graph.initializer if t.dims == [1000])
    values = onnx.numpy_helper.to_array(bias).copy()
    values[7] += 0.1
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(efficientnet_lite0, "_export", lambda _network: wrong)

    with pytest.raises(OutputCheckError, match=r"differs from torch"):
        efficientnet_lite0.build(output)

    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dataclasses.replace(MANIFEST.weights, sha256="0" * 64)
    monkeypatch.setattr(efficientnet_lite0, "MANIFEST", dataclasses.replace(MANIFEST, weights=weights))
    with pytest.raises(EnvironmentMismatchError, match=r"expects 0000"):
        efficientnet_lite0.build(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_an_absent_package_is_named() -> None:
    file = PackageFile(distribution="no-such-thing", module="no_such_thing", relative_path="x", sha256="")
    with pytest.raises(EnvironmentMismatchError, match=r"no-such-thing is not installed"):
        file.locate()


def test_an_unwritable_folder_is_named(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(efficientnet_lite0, "_export", lambda _network: onnx.load(built))
    with pytest.raises(OutputPathError, match=r"file/net\.onnx"):
        efficientnet_lite0.build(tmp_path / "file" / "net.onnx")


def test_preprocessing_is_what_the_library_reads() -> None:
    options = ImagePreprocess.from_options(MANIFEST.preprocessing.options())
    image = Image.effect_mandelbrot((300, 280), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    array = options.apply(image, "a picture")
    assert array.shape == (3, 224, 224)
    # A byte v becomes (v - 127) / 128, so white is exactly 1 and black -127/128.
    assert options.apply(Image.new("RGB", (256, 256), "white"), "white").max() == 1.0
    assert options.apply(Image.new("RGB", (256, 256), "black"), "black").min() == np.float32(-127 / 128)
