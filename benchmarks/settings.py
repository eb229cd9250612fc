"""What is measured on which bed, and the floor that a row must reach."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.beds import BEDS, cache_folder

ALL = tuple(BEDS)
OURS = "onnxptq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to quantize. ``recipe`` is onnxptq's; a peer gets ``peer_setting``."""

    tool: str
    name: str
    beds: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    peer_setting: str = ""
    split: Literal["calibration", "learning"] = "calibration"

    @property
    def label(self) -> str:
        """Tool and setting in one word, unique."""
        return f"{self.tool}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least that a row must reach, in every session it is measured in. Losses are in points (of 100)."""

    agreement: float | None = None
    sqnr_db: float | None = None
    top1_loss: float | None = None
    map50_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A tool: its script, the distribution that gives its version, the module that shows it is installed."""

    script: str
    distribution: str
    module: str


PEERS: Mapping[str, Peer] = {
    "onnxruntime": Peer(script="onnxruntime_static", distribution="onnxruntime", module="onnxruntime"),
    "onnxsim": Peer(script="onnxsim_static", distribution="onnxsim", module="onnxsim"),
    "nncf": Peer(script="nncf_ptq", distribution="nncf", module="nncf"),
    "modelopt": Peer(script="modelopt_ptq", distribution="nvidia-modelopt", module="modelopt"),
}


def _few_bits(
    weights: int, activations: int, method: str, beds: tuple[str, ...], *, steps: int | None = None
) -> Setting:
    """Every product of the network at these bits, first and last layer included.

    ``method`` is ``rtn``, an effort of ``pack-ptq``, or ``auto-`` and an effort; ``steps`` of gradients are taken in
    each pack, or as many as the effort takes.
    """
    solved: dict[str, Any] = {"method": "pack-ptq", "effort": method}
    if method == "rtn":
        solved = {"method": "rtn"}
    elif method.startswith("auto-"):
        solved = {"method": "auto", "effort": method.removeprefix("auto-")}
    bits = {"weight_bits": weights, "activation_bits": activations}
    if steps is not None:
        solved = {**solved, "steps": steps}
    return Setting(
        tool=OURS,
        name=f"w{weights}a{activations}-{method}" + ("" if steps is None else f"-{steps}"),
        beds=beds,
        recipe={"target": "simulate", "samples": 1024, **bits, **solved},
        split="learning",
    )


SETTINGS: tuple[Setting, ...] = (
    Setting(tool=OURS, name="default", beds=ALL),
    Setting(tool=OURS, name="rtn", beds=ALL, recipe={"method": "rtn"}),
    Setting(tool=OURS, name="simulate", beds=("resnet20", "vit"), recipe={"target": "simulate"}),
    Setting(
        tool=OURS, name="simulate-residuals", beds=("vit",), recipe={"target": "simulate", "residuals": True}
    ),
    Setting(
        tool=OURS, name="simulate-rtn", beds=("resnet20",), recipe={"target": "simulate", "method": "rtn"}
    ),
    Setting(tool=OURS, name="tensorrt", beds=("vit", "swin", "points"), recipe={"target": "tensorrt"}),
    Setting(tool=OURS, name="tensorrt-rtn", beds=("vit",), recipe={"target": "tensorrt", "method": "rtn"}),
    *(
        _few_bits(weights, activations, method, beds)
        for weights, activations, beds in (
            (6, 6, ("vit",)),
            (4, 8, ("resnet20", "efficientnet", "vit", "pointnet")),
            (4, 4, ("resnet20", "efficientnet", "vit", "pointnet", "swin", "points")),
            (3, 3, ("resnet20", "vit", "pointnet", "swin", "points")),
        )
        for method in ("rtn", "fast", "balanced", "auto-balanced")
    ),
    _few_bits(4, 4, "auto-balanced", ("efficientnet",), steps=600),
    # Without attention, and without gradient steps, auto and pack-ptq are the same.
    *(
        _few_bits(weights, activations, "auto-fast", ("vit", "swin", "points"))
        for weights, activations in ((6, 6), (4, 8), (4, 4), (3, 3))
    ),
    *(
        Setting(
            tool=OURS,
            name=f"mixed3-{effort}",
            beds=("resnet20",),
            recipe={
                "target": "simulate",
                "samples": 1024,
                "average_bits": 3.0,
                "method": "pack-ptq",
                "effort": effort,
            },
            split="learning",
        )
        for effort in ("fast", "balanced")
    ),
    Setting(tool="onnxruntime", name="default", beds=ALL, peer_setting="default"),
    Setting(tool="onnxruntime", name="minmax", beds=ALL, peer_setting="minmax"),
    Setting(tool="onnxruntime", name="minmax-linear", beds=("vit",), peer_setting="minmax-linear"),
    Setting(tool="onnxsim", name="default", beds=ALL, peer_setting="default"),
    Setting(
        tool="nncf",
        name="default",
        beds=tuple(b for b in ALL if b != "vit"),
        peer_setting="default",
    ),
    Setting(tool="nncf", name="transformer", beds=("vit",), peer_setting="transformer"),
    Setting(tool="modelopt", name="max", beds=ALL, peer_setting="max"),
)

FLOORS: Mapping[tuple[str, str], Floor] = {
    ("efficientnet", "onnxptq:default"): Floor(agreement=0.985, sqnr_db=20.5),
    ("resnet20", "onnxptq:default"): Floor(agreement=0.985, sqnr_db=29.5, top1_loss=0.3),
    ("resnet20", "onnxptq:simulate"): Floor(sqnr_db=31.5),
    ("vit", "onnxptq:default"): Floor(agreement=0.995, sqnr_db=33.0),
    ("vit", "onnxptq:simulate"): Floor(agreement=0.995, sqnr_db=30.0),
    ("vit", "onnxptq:simulate-residuals"): Floor(agreement=0.995, sqnr_db=30.0),
    ("vit", "onnxptq:tensorrt"): Floor(agreement=0.99, sqnr_db=24.5),
    ("pointnet", "onnxptq:default"): Floor(agreement=0.97),
    ("fastestdet", "onnxptq:default"): Floor(sqnr_db=20.0, map50_loss=1.0),
    ("resnet20", "onnxptq:w4a8-balanced"): Floor(agreement=0.96, top1_loss=0.55),
    ("resnet20", "onnxptq:w4a8-auto-balanced"): Floor(agreement=0.96, top1_loss=0.55),
    ("resnet20", "onnxptq:w4a4-balanced"): Floor(agreement=0.90, top1_loss=0.55),
    ("resnet20", "onnxptq:w4a4-auto-balanced"): Floor(agreement=0.90, top1_loss=0.55),
    ("resnet20", "onnxptq:w3a3-balanced"): Floor(agreement=0.84, top1_loss=3.35),
    ("resnet20", "onnxptq:w3a3-auto-balanced"): Floor(agreement=0.84, top1_loss=3.35),
    ("efficientnet", "onnxptq:w4a8-balanced"): Floor(top1_loss=2.5),
    ("efficientnet", "onnxptq:w4a8-auto-balanced"): Floor(top1_loss=2.5),
    ("efficientnet", "onnxptq:w4a4-balanced"): Floor(top1_loss=8.0),
    ("efficientnet", "onnxptq:w4a4-auto-balanced"): Floor(top1_loss=8.0),
    ("efficientnet", "onnxptq:w4a4-auto-balanced-600"): Floor(top1_loss=8.0),
    ("vit", "onnxptq:w4a8-fast"): Floor(top1_loss=1.0),
    ("vit", "onnxptq:w4a8-auto-fast"): Floor(top1_loss=1.0),
    ("vit", "onnxptq:w4a4-fast"): Floor(top1_loss=3.0),
    ("vit", "onnxptq:w4a4-auto-fast"): Floor(top1_loss=3.0),
    ("vit", "onnxptq:w3a3-fast"): Floor(top1_loss=13.0),
    ("vit", "onnxptq:w3a3-auto-fast"): Floor(top1_loss=13.0),
    ("vit", "onnxptq:w6a6-balanced"): Floor(agreement=0.99, top1_loss=0.4),
    ("vit", "onnxptq:w6a6-auto-balanced"): Floor(agreement=0.99, top1_loss=0.4),
    ("vit", "onnxptq:w4a8-balanced"): Floor(agreement=0.98, top1_loss=0.6),
    ("vit", "onnxptq:w4a8-auto-balanced"): Floor(agreement=0.98, top1_loss=0.6),
    ("vit", "onnxptq:w4a4-balanced"): Floor(agreement=0.96, top1_loss=2.0),
    ("vit", "onnxptq:w4a4-auto-balanced"): Floor(agreement=0.96, top1_loss=2.0),
    ("vit", "onnxptq:w3a3-balanced"): Floor(agreement=0.89, top1_loss=7.0),
    ("vit", "onnxptq:w3a3-auto-balanced"): Floor(agreement=0.89, top1_loss=7.0),
    ("pointnet", "onnxptq:w4a4-balanced"): Floor(top1_loss=2.0),
    ("pointnet", "onnxptq:w4a4-auto-balanced"): Floor(top1_loss=2.0),
    ("pointnet", "onnxptq:w3a3-balanced"): Floor(top1_loss=6.0),
    ("pointnet", "onnxptq:w3a3-auto-balanced"): Floor(top1_loss=6.0),
    ("swin", "onnxptq:w4a4-fast"): Floor(top1_loss=2.0),
    ("swin", "onnxptq:w4a4-auto-fast"): Floor(top1_loss=2.0),
    ("swin", "onnxptq:w4a4-balanced"): Floor(top1_loss=2.0),
    ("swin", "onnxptq:w4a4-auto-balanced"): Floor(top1_loss=2.0),
    ("points", "onnxptq:w4a4-fast"): Floor(top1_loss=2.0),
    ("points", "onnxptq:w4a4-auto-fast"): Floor(top1_loss=2.0),
    ("points", "onnxptq:w4a4-balanced"): Floor(top1_loss=2.0),
    ("points", "onnxptq:w4a4-auto-balanced"): Floor(top1_loss=2.0),
}


def interpreter(tool: str) -> Path | None:
    """The Python that has ``tool``, None if none was found."""
    base = Path(os.environ.get("ONNXPTQ_PEERS") or cache_folder("peers"))
    own = base / tool / "bin" / "python"
    if own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec(PEERS[tool].module) is not None else None


def tool_version(tool: str, python: Path) -> str:
    """The version of ``tool`` in that environment."""
    code = f"import importlib.metadata as m; print(m.version({PEERS[tool].distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def shortfalls(floor: Floor, row: Mapping[str, Any]) -> list[str]:
    """What a row lacks to its floor, in words; every session counts, the worst output of each."""
    found = []
    for session, values in row["sessions"].items():
        checks = (
            ("agreement", floor.agreement, values.get("agreement")),
            ("SQNR", floor.sqnr_db, min(values["sqnr_db"].values())),
        )
        found += [
            f"{session}: {name} {value:.4g} < {bound:g}"
            for name, bound, value in checks
            if bound is not None and not (value is not None and value >= bound)
        ]
        losses = (("top1", floor.top1_loss), ("map50", floor.map50_loss))
        for name, bound in losses:
            if bound is None:
                continue
            loss = 100 * (row["float"][name] - values[name])
            # Accuracies are multiples of 1/count; a loss that equals its bound passes in spite of rounding.
            if not loss <= bound + 1e-9:
                found.append(f"{session}: {name} loses {loss:.2f} points > {bound:g}")
    return found
