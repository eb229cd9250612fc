"""Regenerate ``tests/golden``: what every target does to a set of small networks, as text that can be reviewed.

python -m tools.golden_placements
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.surgeon import import_graph
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import Granularity, PerAxis, PerGroup, Quantizer, QuantPlan

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def render(plan: QuantPlan) -> str:
    """A plan as text: one line per quantizer and one per edge that reads it."""
    lines = [f"target {plan.target}"]
    for quantizer in sorted(plan.quantizers, key=lambda q: q.quantizer_id):
        lines.append(_headline(quantizer))
        lines += [f"    -> {site.consumer}[{site.input_index}]" for site in quantizer.sites]
    lines += [f"float {skip.site}: {skip.reason}" for skip in sorted(plan.skips, key=lambda s: s.site)]
    return "\n".join(lines) + "\n"


def _headline(quantizer: Quantizer) -> str:
    parts = [quantizer.role, quantizer.quantizer_id, _grid(quantizer), _granularity(quantizer.granularity)]
    if quantizer.scale_group != quantizer.quantizer_id:
        parts.append(f"scale of {quantizer.scale_group}")
    if quantizer.derived_from is not None:
        parts.append("scale " + " * ".join(quantizer.derived_from))
    return "  ".join(part for part in parts if part)


def _grid(quantizer: Quantizer) -> str:
    qtype = quantizer.qtype
    kind = "symmetric" if quantizer.symmetric else "asymmetric"
    return f"{qtype.storage}[{qtype.qmin},{qtype.qmax}] {kind}"


def _granularity(granularity: Granularity) -> str:
    match granularity:
        case PerAxis(axis):
            return f"axis {axis}"
        case PerGroup(axis, group_size):
            return f"axis {axis} groups of {group_size}"
    return ""


def golden_texts() -> Mapping[str, str]:
    """The text of every golden file, by file name."""
    from tests.unit.small_nets import NETS

    texts = {}
    for name, build in NETS.items():
        with tempfile.TemporaryDirectory() as folder:
            index = GraphIndex(import_graph(build(), Path(folder)))
        for target, place in TARGETS.items():
            texts[f"{name}.{target}.txt"] = render(place(index, PlacementRequest()))
    return texts


def main() -> None:
    """Write every golden file; files that no network makes are removed."""
    texts = golden_texts()
    for path in GOLDEN.glob("*.txt"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (GOLDEN / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
