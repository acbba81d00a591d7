"""Draws the result of `augment.py` as the README shows it.

    python benchmarks/plot.py benchmarks/results/augment.json docs/augment.png

Contract: everything in the picture comes from the JSON file. Bars from zero on a linear axis: their lengths are the
rates. A whisker runs from the slowest to the fastest round. The background is opaque, for light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

OURS, OTHERS, INK, FAINT = "#c2410c", "#64748b", "#1e293b", "#cbd5e1"
LABELS = {"torchvision v2, one draw a batch (weaker)": "torchvision v2, batch\n(weaker: one draw a batch)"}


def draw(result: dict[str, Any], path: Path) -> None:
    rows = sorted(result["results"], key=lambda row: row["images_per_second_median"])
    medians, lows, highs = ([row[f"images_per_second_{kind}"] for row in rows] for kind in ("median", "min", "max"))
    errors = [
        [median - low for median, low in zip(medians, lows, strict=True)],
        [high - median for median, high in zip(medians, highs, strict=True)],
    ]
    colours = [OURS if row["name"] == "dist_cifar" else OTHERS for row in rows]

    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "ytick.color": INK})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained", facecolor="white")
    axes.barh(range(len(rows)), medians, xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.62)
    axes.set_yticks(range(len(rows)), [LABELS.get(row["name"], row["name"]) for row in rows])
    for place, (row, high) in enumerate(zip(rows, highs, strict=True)):
        ratio = row["ours_over_this_median"]
        text = f"{row['images_per_second_median']:,}" + (f"   (ours: {ratio:.0f}x)" if ratio != 1 else "")
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(text, (high, place), (7, 0), textcoords="offset points", va="center", bbox=clear)
    axes.set_xlim(0, max(highs) * 1.16)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("Augmented images per second on one core", x=0.01, ha="left", fontweight="bold", fontsize=13)
    versions = result["versions"]
    named = ("torchvision", "pillow", "kornia", "albumentations", "numba")
    figure.supxlabel(
        f"Flip, rotation, jitter, sharpness, normalisation, erasing; 32x32 pixels, batch {result['batch']}, float32,"
        f" one thread.\nMedian of n = {result['rounds']} interleaved rounds, whiskers from minimum to maximum."
        f" {result['hardware']}.\n" + ", ".join(f"{name} {versions[name]}" for name in named if name in versions),
        x=0.01,
        ha="left",
        fontsize=9,
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file that augment.py wrote")
    parser.add_argument("picture", type=Path, help="file to write; its ending names the format")
    arguments = parser.parse_args()
    draw(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
