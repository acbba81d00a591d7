"""Draws the results of `augment.py`, `peers.py` and `time_to_accuracy.py` as the pages show them.

    python benchmarks/publish/plot.py benchmarks/results/augment.json docs/augment.png
    python benchmarks/publish/plot.py benchmarks/results/peers.json docs/peers.png
    python benchmarks/publish/plot.py benchmarks/results/time_to_accuracy.json benchmarks/results/accuracy.json \\
        docs/time_to_accuracy.png

Contract: everything in the picture comes from the JSON files. Bars from zero on a linear axis: their lengths are the
rates. A whisker runs from the slowest to the fastest round. The background is opaque, for light and dark pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.legend_handler import HandlerTuple
from tables import PEER, grouped, rounds

OURS, OTHERS, INK, FAINT = "#c2410c", "#64748b", "#1e293b", "#cbd5e1"
OURS_LIGHT, OTHERS_LIGHT = "#fdba74", "#b6c2d1"
LABELS = {"torchvision v2, one draw a batch (weaker)": "torchvision v2, batch\n(weaker: one draw a batch)"}


def draw_augment(result: dict[str, Any], path: Path) -> None:
    rows = sorted(result["results"], key=lambda row: row["images_per_second_median"])
    medians, lows, highs = ([row[f"images_per_second_{kind}"] for row in rows] for kind in ("median", "min", "max"))
    errors = [
        [median - low for median, low in zip(medians, lows, strict=True)],
        [high - median for median, high in zip(medians, highs, strict=True)],
    ]
    colours = [OURS if row["name"] == "dist_cifar" else OTHERS for row in rows]

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained", facecolor="white")
    axes.barh(range(len(rows)), medians, xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.62)
    axes.set_yticks(range(len(rows)), [LABELS.get(row["name"], row["name"]) for row in rows])
    for place, (row, high) in enumerate(zip(rows, highs, strict=True)):
        ratio = row["ours_over_this_median"]
        text = f"{row['images_per_second_median']:,}" + (f"   (ours: {ratio:.0f}x)" if ratio != 1 else "")
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(text, (high, place), (7, 0), textcoords="offset points", va="center", bbox=clear)
    axes.set_xlim(0, max(highs) * 1.16)
    _clean(axes)
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


PROGRAMS = {
    "dist_cifar ddp": "dist_cifar, ddp",
    "dist_cifar exact": "dist_cifar, exact",
    "accelerate": "Accelerate\nexample",
    "ddp_tutorial": "PyTorch DDP\ntutorial",
    "pytorch_cifar": "pytorch-cifar",
    "timm": "timm train.py",
    "lightning": "Lightning",
}
"""Names of the programs, from the top of each panel; ours by their strategy."""
MODELS = {"resnet20": "ResNet-20", "resnet18": "ResNet-18"}


def program(row: dict[str, Any]) -> str:
    """The key of `PROGRAMS` that a row of `peers.json` belongs to; rows of no program have none."""
    return f"dist_cifar {row['variant']}" if row["name"] == "dist_cifar" else row["name"]


def draw_peers(result: dict[str, Any], path: Path) -> None:
    """A panel for each shape (rows) and model (columns), with a pair of bars for each program."""
    rows = [row for row in result["results"] if program(row) in PROGRAMS]
    models = list(dict.fromkeys(row["model"] for row in rows))
    shapes = list(dict.fromkeys((row["ranks"], row["threads_per_rank"]) for row in rows))
    programs = [name for name in PROGRAMS if any(program(row) == name for row in rows)]
    height = 1.3 + len(shapes) * (0.6 + 0.5 * len(programs))
    figure, panels = plt.subplots(
        len(shapes),
        len(models),
        figsize=(9.5, height),
        layout="constrained",
        facecolor="white",
        sharex="col",
        sharey=True,
        squeeze=False,
    )
    for shape, line in zip(shapes, panels, strict=True):
        for model, axes in zip(models, line, strict=True):
            found = [row for row in rows if (row["model"], row["ranks"], row["threads_per_rank"]) == (model, *shape)]
            _pairs(axes, found, programs)
            ranks, threads = (
                f"{count} {what}{'s' if count > 1 else ''}" for count, what in zip(shape, WHAT, strict=True)
            )
            each = " each" if shape[0] > 1 else ""
            axes.set_title(f"{MODELS.get(model, model)}, {ranks} with {threads}{each}", loc="left", fontsize=11)
    for model, axes in zip(models, panels[0], strict=True):
        axes.set_xlim(0, 1.2 * max(row["images_per_second_max"] for row in rows if row["model"] == model))
    panels[0][0].set_yticks(range(len(programs)), [PROGRAMS[name] for name in programs])
    panels[0][0].invert_yaxis()
    figure.suptitle("Training images per second, end to end", x=0.01, ha="left", fontweight="bold", fontsize=13)
    squares = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (OURS, OTHERS, OURS_LIGHT, OTHERS_LIGHT)]
    kinds = [(squares[0], squares[1]), (squares[2], squares[3])]
    names = ["bf16 (peers: tuned by hand)", "fp32 (peers: as documented)"]
    figure.legend(
        kinds,
        names,
        handler_map={tuple: HandlerTuple(None)},
        loc="outside upper right",
        ncols=2,
        frameon=False,
        fontsize=10,
    )
    figure.supxlabel(
        f"Same model, images, augmentation, global batch of {result['global_batch']}; every program on the same cores."
        f"\nMedian of n = {rounds(result)} interleaved rounds, whiskers from minimum to maximum."
        f" {result['hardware']}.",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.savefig(path, dpi=130)


WHAT = ("rank", "thread")
BAR = 0.36
"""Height of one of two bars."""


def _pairs(axes: Any, rows: list[dict[str, Any]], programs: list[str]) -> None:
    """The bars of one panel: bf16 above fp32."""
    for row in rows:
        is_ours, is_bf16 = row["name"] == "dist_cifar", row["precision"] == "bf16"
        place = programs.index(program(row)) + (-0.5 if is_bf16 else 0.5) * BAR
        colour = {(1, 1): OURS, (1, 0): OURS_LIGHT, (0, 1): OTHERS, (0, 0): OTHERS_LIGHT}[is_ours, is_bf16]
        median, low, high = (row[f"images_per_second_{kind}"] for kind in ("median", "min", "max"))
        whisker = {"elinewidth": 1, "capsize": 2}
        axes.barh(
            place, median, BAR, xerr=[[median - low], [high - median]], color=colour, ecolor=INK, error_kw=whisker
        )
        axes.annotate(f"{median:,.0f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    for name in set(programs) - {program(row) for row in rows}:
        axes.annotate("not run", (0, programs.index(name)), (5, 0), textcoords="offset points", va="center", fontsize=9)
    _clean(axes)


CURVES = {"resnet18_sgd": "#0f766e", "default_resnet18": "#7c3aed"}
"""Recipes whose accuracy is drawn after each of their epochs, and the colours."""
LEAST_PERCENT = 80.0


def draw_time_to_accuracy(result: dict[str, Any], accuracy: dict[str, Any], path: Path) -> None:
    """Time as a multiple of the peer's on the same machine: a dot and a ring for each run of the peer and the recipe,
    and of other recipes a curve of what was watched, too, whose seconds are shared evenly among the epochs. The legend
    has the median times; the accuracies stand in the tables, for one machine each."""
    peers = grouped([row for row in result["runs"] if row["program"] == PEER], "hardware")
    unit = {machine: statistics.median(row["seconds"] for row in rows) for (machine,), rows in peers.items()}
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained", facecolor="white")
    counts = Counter(row["program"] for row in result["runs"])
    programs = sorted(counts, key=lambda name: (name != PEER, -counts[name]))
    ours = LinearSegmentedColormap.from_list("ours", [OURS, OURS_LIGHT])(np.linspace(0, 1, len(programs) - 1))
    for program, colour in zip(programs, [OTHERS, *ours], strict=True):
        rows = [row for row in result["runs"] if row["program"] == program and row["hardware"] in unit]
        times = [row["seconds"] / unit[row["hardware"]] for row in rows]
        _tests(axes, times, rows, colour, label=f"{program}: {statistics.median(times):.2f}x")
    for row in accuracy["runs"]:
        if row["recipe"] in CURVES and row["hardware"] in unit and row["alone"]:
            epoch_time = row["wall_seconds"] / row["epochs"] / unit[row["hardware"]]
            points = [(epoch * epoch_time, 100 * share) for epoch, share in row["curve"]]
            watched = "" if row["best_chosen_on"] == "test" else " (curve: validation)"
            label, colour = f"{row['recipe']}: {points[-1][0]:.1f}x{watched}", CURVES[row["recipe"]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=label)
            _tests(axes, [points[-1][0]], [row], colour)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.5, 0.9 * axes.dataLim.xmin))
    axes.set_ylim(LEAST_PERCENT, axes.dataLim.ymax + 0.5)
    axes.set_xlabel("time of initialisation, training and test, as a multiple of airbench94's")
    axes.set_ylabel("test accuracy, percent")
    axes.legend(frameon=False, loc="lower left", fontsize=10)
    _clean(axes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    figure.suptitle("Accuracy against time", x=0.01, ha="left", fontweight="bold", fontsize=13)
    machines = ";\n".join(f"{seconds / 60:.1f} minutes on an {machine}" for machine, seconds in unit.items())
    note = f"A dot is the final test, a ring that with TTA; images of {result['runs'][0]['data']}.\n1x is {machines}."
    figure.supxlabel(note, x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=130)


def _tests(axes: Any, times: list[float], rows: list[dict[str, Any]], colour: Any, **options: Any) -> None:
    """The final test of each run, and that with TTA of those that have one."""
    axes.scatter(times, [100 * row["test_accuracy"] for row in rows], color=colour, s=24, zorder=3, **options)
    for time, row in zip(times, rows, strict=True):
        if row["test_accuracy_tta"] is not None:
            axes.scatter(time, 100 * row["test_accuracy_tta"], facecolors="none", edgecolors=colour, s=36, zorder=3)


def _clean(axes: Any) -> None:
    """Faint lines for the eye to follow, and nothing else."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


DRAWINGS = {"augment": draw_augment, "peers": draw_peers, "time_to_accuracy": draw_time_to_accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="result", help="JSON files of benchmarks/results")
    parser.add_argument("picture", type=Path, help="file to write; its ending names the format")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "ytick.color": INK})
    DRAWINGS[results[0]["benchmark"]](*results, arguments.picture)


if __name__ == "__main__":
    main()
