"""Pictures of a report as inline SVG: the same bytes for the same report, in the colours of the page."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from onnxptq.validate.report import BitRow, BlockScore, TensorQuality

# Placeholders for the variables of the page's style sheet, so that pictures follow light and dark mode.
_INK, _MUTED, _LINE, _ACCENT, _WARN = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent", _WARN: "--warn"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxptq",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "path.simplify": False,
}


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """One picture of so many inches."""
    # A font that is missing is replaced, and text stays text in SVG: nothing that a user should hear of.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def network_chart(tensors: Sequence[TensorQuality], marked: Sequence[TensorQuality], title: str) -> str:
    """SQNR of each tensor along the network; ``marked`` ones stand out, and a dashed line shows weights rounded to
    nearest where that is known. Empty if no SQNR is finite."""
    finite = [t for t in tensors if math.isfinite(t.sqnr_db)]
    if not finite:
        return ""
    with _drawing(9.0, 3.0) as (figure, axes):
        positions = [t.position for t in finite]
        values = [t.sqnr_db for t in finite]
        nearest = [
            (t.position, t.nearest_sqnr_db)
            for t in finite
            if t.nearest_sqnr_db is not None and math.isfinite(t.nearest_sqnr_db)
        ]
        if nearest:
            axes.plot(*zip(*nearest, strict=True), color=_MUTED, linewidth=1.0, linestyle="--")
        axes.plot(positions, values, color=_ACCENT, linewidth=1.0, alpha=0.6)
        axes.plot(positions, values, "o", color=_ACCENT, markersize=3.5)
        worst = [t for t in marked if math.isfinite(t.sqnr_db)]
        axes.plot([t.position for t in worst], [t.sqnr_db for t in worst], "o", color=_WARN, markersize=5.5)
        axes.set_xlabel("tensor, from input to output")
        axes.set_ylabel("SQNR (dB)")
        axes.grid(axis="y", color=_LINE, linewidth=0.6)
        axes.set_xlim(-0.5, max(positions) + 0.5)
        axes.set_ylim(min(0.0, *values, *(value for _, value in nearest)), None)
        return _svg(figure, "network", title)


def range_chart(tensor: TensorQuality, key: str, title: str) -> str:
    """The calibration histogram of a tensor, logarithmic, with the range that its quantizer represents."""
    histogram = tensor.histogram
    if histogram is None:
        return ""
    with _drawing(3.6, 1.6) as (figure, axes):
        edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
        counts = np.asarray(histogram.counts, np.float64)
        axes.stairs(np.where(counts > 0, counts, np.nan), edges, fill=True, color=_ACCENT, baseline=0.5)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * max(1.0, float(counts.max(initial=1.0))))
        low, high = histogram.low, histogram.high
        if tensor.low is not None and tensor.high is not None:
            low, high = min(low, tensor.low), max(high, tensor.high)
            axes.axvspan(tensor.low, tensor.high, color=_WARN, alpha=0.10, linewidth=0)
            for end in (tensor.low, tensor.high):
                axes.axvline(end, color=_WARN, linewidth=1.5)
        margin = 0.03 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        _few_ticks(axes)
        return _svg(figure, key, title)


def curvature_chart(blocks: Sequence[BlockScore], title: str) -> str:
    """S of each block, logarithmic, with the boundaries of packs. Empty where no S is finite and positive."""
    known = [(b.block, b.curvature) for b in blocks if b.curvature is not None]
    shown = [(i, value) for i, value in known if math.isfinite(value) and value > 0.0]
    if not shown:
        return ""
    with _drawing(9.0, 2.6) as (figure, axes):
        packs = sorted({b.pack for b in blocks})
        for pack in packs:
            members = [b.block for b in blocks if b.pack == pack]
            shade = 0.10 if pack % 2 else 0.03
            axes.axvspan(min(members) - 0.5, max(members) + 0.5, color=_ACCENT, alpha=shade, linewidth=0)
        axes.plot(*zip(*shown, strict=True), color=_ACCENT, linewidth=1.0, alpha=0.6)
        axes.plot(*zip(*shown, strict=True), "o", color=_ACCENT, markersize=4.5)
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        _logarithmic_over_counts(axes, "block; shades are packs", "S")
        return _svg(figure, "curvature", title)


def bits_chart(packs: Sequence[BitRow], title: str) -> str:
    """Bits of weights and activations along the packs. Empty where none were chosen."""
    if not any(p.weight_bits or p.activation_bits for p in packs):
        return ""
    with _drawing(9.0, 2.4) as (figure, axes):
        places = np.arange(len(packs))
        axes.bar(places - 0.2, [p.weight_bits or 0 for p in packs], 0.38, color=_ACCENT)
        axes.bar(places + 0.2, [p.activation_bits or 0 for p in packs], 0.38, color=_WARN)
        axes.set_ylim(0, 8.5)
        axes.set_yticks([0, 2, 4, 6, 8])
        axes.grid(axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.7, len(packs) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("pack")
        axes.set_ylabel("bits")
        return _svg(figure, "bits", title)


def omega_chart(blocks: Sequence[BlockScore], title: str) -> str:
    """Omega of each block, logarithmic. Empty where none is finite and positive."""
    shown = [(b.block, b.omega) for b in blocks if b.omega is not None and 0.0 < b.omega < math.inf]
    if not shown:
        return ""
    with _drawing(9.0, 2.2) as (figure, axes):
        axes.bar([i for i, _ in shown], [value for _, value in shown], 0.7, color=_ACCENT)
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        _logarithmic_over_counts(axes, "block", "Omega")
        return _svg(figure, "omega", title)


def loss_chart(packs: Sequence[BitRow], part: Literal["weights", "activations"], title: str) -> str:
    """Loss against bits, one line per pack, named by its number. Empty where no loss is positive."""
    curves = {p.pack: p.weight_loss if part == "weights" else p.activation_loss for p in packs}
    lines = {
        pack: [(bits, loss) for bits, loss in sorted(curve.items()) if 0.0 < loss < math.inf]
        for pack, curve in curves.items()
    }
    lines = {pack: line for pack, line in lines.items() if line}
    if not lines:
        return ""
    with _drawing(4.4, 3.2) as (figure, axes):
        colour = _ACCENT if part == "weights" else _WARN
        for pack, line in lines.items():
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.0, alpha=0.7)
            # They take turns, so that fewer names overlap.
            bits, loss = line[pack % len(line)]
            axes.annotate(str(pack), (bits, loss), color=_INK, fontsize=8)
        _logarithmic_over_counts(axes, f"bits of {part}", "loss at the output")
        return _svg(figure, f"loss-{part}", title)


def _logarithmic_over_counts(axes: Axes, across: str, up: str) -> None:
    """Whole numbers along the x axis, powers of ten along the y axis."""
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def _few_ticks(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=5)
    axes.minorticks_off()
    top = axes.get_ylim()[1]
    decades = range(math.ceil(math.log10(top)))
    step = max(1, len(decades) // 3)
    axes.set_yticks(
        [10.0**k for k in decades[::step]], [f"1e{k}" if k > 1 else str(10**k) for k in decades[::step]]
    )


def _svg(figure: Figure, key: str, title: str) -> str:
    """The figure as an <svg> element without namespaces, metadata, fixed size, or idle ids."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    # Several pictures share the page: an id is kept only if it is referred to, and made unique.
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :]
