"""Latency of 8-bit files of common architectures: ours beside onnxruntime's own, both in time of the float network.

    python -m benchmarks.architectures [--architecture resnet50 ...]

The networks are timm's (extra ``zoo``), with random weights, and batch statistics of random pictures: their
outputs tell nothing, but they run the kernels that trained ones would. Ours is quantized for ``ort-cpu`` with
nearest rounding, so that no node is left in float for the sake of outputs; onnxruntime's file is that of its advice
for x86 (``minmax``). Rows that the results file already holds are not measured again (``--force`` does, ``--stale``
does where onnxptq's code has changed since).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.beds import cache_folder
from benchmarks.latency import measure
from benchmarks.process import end_children_on_termination, run_measured
from benchmarks.results import ResultsFile, default_path, is_wanted, source_id

ARCHITECTURES = (
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "inception_v3",
    "densenet121",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "regnety_008",
    "cspdarknet53",
    "ghostnet_100",
    "hrnet_w18_small",
    "dla34",
    "ese_vovnet19b_dw",
    "convnext_atto",
    "mobilevit_s",
    "edgenext_xx_small",
    "poolformer_s12",
)
CONSOLE = Console(highlight=False, soft_wrap=True)
PICTURES = 4
SIZE = (3, 224, 224)
INPUT = "pictures"


def main() -> int:
    """Measure what is missing and print everything; 1 if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--stale", action="store_true", help="measure again what other code of onnxptq gave")
    given = parser.parse_args()
    end_children_on_termination()
    results = ResultsFile(given.out)
    for name in given.architecture:
        key = f"architectures/{name}"
        if is_wanted(results, key, force=given.force, stale=given.stale):
            CONSOLE.print(f"{key} ...")
            results.add("architectures", key, {"source": source_id(), **_row(name, given.rounds)})
    return _print(results)


def _row(name: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = _model(name)
            pictures = np.random.default_rng(0).standard_normal((PICTURES, *SIZE), dtype=np.float32)
            return measure(pictures[:1], _files(model, pictures, Path(folder)), rounds, 0)
        except _FailedError as error:
            return {"error": str(error)}


class _FailedError(Exception):
    """A file could not be made."""


def _model(name: str) -> Path:
    """The float network, kept in the cache."""
    model = cache_folder("architectures") / f"{name}.onnx"
    if not model.exists():
        # In a process of its own, so that torch's memory and threads are gone when latency is measured.
        code = "import sys; from benchmarks.architectures import export; export(sys.argv[1], sys.argv[2])"
        _run([sys.executable, "-c", code, name, str(model)], "timm")
    return model


def _files(model: Path, pictures: npt.NDArray[np.float32], folder: Path) -> Mapping[str, Path]:
    """The float network, ours and onnxruntime's."""
    data, ours, theirs = (folder / name for name in ("pictures.npy", "ours.onnx", "onnxruntime.onnx"))
    np.save(data, pictures)
    command = [sys.executable, "-m", "onnxptq", "quantize", str(model), "-q", "--calib", str(data)]
    command += ["--method", "rtn", "--holdout", "0", "--no-report", "-o", str(ours)]
    _run(command, "onnxptq")
    command = [sys.executable, "-m", "benchmarks.peers.onnxruntime_static", "--model", str(model)]
    command += ["--data", str(data), "--input-name", INPUT, "--output", str(theirs), "--setting", "minmax"]
    _run(command, "onnxruntime")
    return {"float": model, "ours": ours, "onnxruntime": theirs}


def _run(command: list[str], what: str) -> None:
    measured = run_measured(command)
    if measured.failure is not None:
        raise _FailedError(f"{what}: {measured.failure}")


def export(name: str, path: str) -> None:
    """Write timm's network of this name with random weights, its batch statistics taken from random pictures."""
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    pictures = torch.randn(8, *SIZE)
    with torch.no_grad():
        for _ in range(3):
            network.train()(pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given: dict[str, Any] = {"input_names": [INPUT], "opset_version": 17, "dynamo": False}
        torch.onnx.export(network.eval(), (pictures[:1],), path, **given)


def _print(results: ResultsFile) -> int:
    table = Table("network", "float, ms", "ours", "onnxruntime")
    failed = 0
    for row in results.rows("architectures"):
        name = row["key"].removeprefix("architectures/")
        if row.get("error"):
            failed += 1
            table.add_row(name, f"[red]{row['error']}[/red]")
            continue
        ratios = (f"{row['ratios'][f'{tool}/float']['median']:.2f}" for tool in ("ours", "onnxruntime"))
        table.add_row(name, f"{row['milliseconds']['float']['median']:.1f}", *ratios)
    CONSOLE.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
