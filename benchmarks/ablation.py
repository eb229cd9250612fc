"""What each ingredient of the reconstruction brings, at equal gradient steps.

    python -m benchmarks.ablation [--bed resnet20 ...] [--bits 3,3 ...] [--seeds 3]

Variants are the same code with other settings, so rows of one bed and one bit width compare directly. Variants
that draw nothing at random run once, the others once per seed; the table shows the mean and the spread (largest
minus smallest). Evaluation samples are those that no choice was made on. Rows that are known are not measured
again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import measured_quality
from benchmarks.beds import BEDS, Bed
from benchmarks.process import end_children_on_termination
from benchmarks.producing import prepare, produce
from benchmarks.results import ResultsFile, default_path, is_wanted
from benchmarks.settings import OURS, Setting

CONSOLE = Console(highlight=False, soft_wrap=True)

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "nearest": {"method": "rtn"},
    "nearest, biases": {"method": "rtn", "correct_bias": True},
    "nearest, rescaled": {"method": "rtn", "equalize": True},
    "nearest, rescaled, biases": {"method": "rtn", "equalize": True, "correct_bias": True},
    "closed form": {"method": "pack-ptq", "effort": "fast"},
    "closed form, root 3": {"method": "pack-ptq", "effort": "fast", "softmax_root": 3},
    "closed form, root 4": {"method": "pack-ptq", "effort": "fast", "softmax_root": 4},
    "closed form, branches": {"method": "pack-ptq", "effort": "fast", "low_rank": "branch"},
    "packs": {"method": "pack-ptq", "effort": "balanced"},
    "packs, tuned": {"method": "pack-ptq", "effort": "balanced", "tune": True},
    "packs, focus": {"method": "pack-ptq", "effort": "balanced", "focus": True},
    "packs, fisher": {"method": "pack-ptq", "effort": "balanced", "loss": "fisher"},
    "packs, global-local": {"method": "pack-ptq", "effort": "balanced", "loss": "global-local"},
    "packs, low rank": {"method": "pack-ptq", "effort": "balanced", "low_rank": "merge"},
    "packs, easy first": {"method": "pack-ptq", "effort": "balanced", "easy_first": True},
    "packs, shifts": {"method": "pack-ptq", "effort": "balanced", "shift": True},
    "packs, root 4": {"method": "pack-ptq", "effort": "balanced", "softmax_root": 4},
    "packs, no rotation": {"method": "pack-ptq", "effort": "balanced", "rotate": False},
    "packs, no rescaling": {"method": "pack-ptq", "effort": "balanced", "equalize": False},
    "single blocks": {"method": "pack-ptq", "effort": "balanced", "max_pack_blocks": 1},
    "aiqvit": {"method": "aiqvit", "effort": "balanced"},
    "qdrop": {"method": "qdrop", "effort": "balanced"},
    "brecq": {"method": "brecq", "effort": "balanced"},
    "adaround": {"method": "adaround", "effort": "balanced"},
    # The losses and units of two published methods, from the same start and with the same steps as the rest.
    "after GLF-Q": {
        "method": "pack-ptq",
        "effort": "balanced",
        "max_pack_blocks": 1,
        "loss": "global-local",
    },
    "after FIMA-Q": {"method": "qdrop", "effort": "balanced", "loss": "fisher"},
    "auto": {"method": "auto", "effort": "balanced"},
}

SEEDLESS = tuple(name for name in VARIANTS if name.startswith(("nearest", "closed form")))


def main() -> int:
    """Measure what is missing and print a table per bed and bit width; 1 if a run failed."""
    given = _arguments()
    end_children_on_termination()
    results = ResultsFile(given.out)
    rows: list[Mapping[str, Any]] = []
    for bed in given.bed:
        for bits in given.bits:
            for variant in given.variant:
                for seed in range(1 if variant in SEEDLESS else given.seeds):
                    key = f"ablation/{bed}/w{bits[0]}a{bits[1]}/{variant}/{seed}"
                    if is_wanted(results, key, force=given.force, stale=False):
                        CONSOLE.print(f"{key} ...")
                        row = _measured(BEDS[bed], bits, variant, seed, given.timeout)
                        results.add("ablation", key, row)
                    rows.append(next(row for row in results.rows("ablation") if row["key"] == key))
            CONSOLE.print(_table(bed, bits, rows))
    return 1 if any(row.get("error") for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=["resnet20", "pointnet"])
    parser.add_argument("--bits", nargs="+", type=_bits, default=[(4, 4), (3, 3)], metavar="W,A")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--force", action="store_true", help="measure again what is known")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one process")
    return parser.parse_args()


def _bits(text: str) -> tuple[int, int]:
    weights, activations = text.split(",")
    return int(weights), int(activations)


def _measured(bed: Bed, bits: tuple[int, int], variant: str, seed: int, timeout: float) -> dict[str, Any]:
    recipe = {
        "target": "simulate",
        "samples": 1024,
        "weight_bits": bits[0],
        "activation_bits": bits[1],
        "seed": seed,
        **VARIANTS[variant],
    }
    name = f"ablation-w{bits[0]}a{bits[1]}-{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
    setting = Setting(tool=OURS, name=name, beds=(bed.name,), recipe=recipe, split="learning")
    prepare(bed)
    made = produce(bed, setting, None, timeout=timeout)
    row: dict[str, Any] = {"bed": bed.name, "bits": list(bits), "variant": variant, "seed": seed}
    row |= {"recipe": recipe, "source": made.source, **made.facts}
    if made.error is not None:
        return {**row, "error": made.error}
    return {**row, **measured_quality(bed, made.path, "exact", None, timeout)}


def _table(bed: str, bits: tuple[int, int], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{bed}, W{bits[0]}A{bits[1]}: mean (spread)", title_justify="left")
    for column in ("variant", "top-1 %", "agreement %", "SQNR dB", "wall s", "seeds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant in VARIANTS:
        own = [
            row
            for row in rows
            if row["bed"] == bed
            and row["bits"] == list(bits)
            and row["variant"] == variant
            and not row.get("error")
        ]
        if own:
            table.add_row(
                variant,
                _spread([100 * row["top1"] for row in own if "top1" in row]),
                _spread([100 * row["agreement"] for row in own if "agreement" in row]),
                _spread([min(row["sqnr_db"].values()) for row in own]),
                _spread([row["wall_s"] for row in own]),
                str(len(own)),
            )
    return table


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({max(values) - min(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
