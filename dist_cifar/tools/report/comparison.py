"""Compares several runs: their results image by image, and what differs in their configs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_cifar.config import flatten
from dist_cifar.tools.report.formats import duration, number
from dist_cifar.tools.report.read import Run
from dist_cifar.tools.report.sections import shown_value

NONE = "-"
"""A cell of which a run has nothing."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value with what is written smaller below it."""

    text: str
    below: str = ""
    is_code: bool = False


def result_cells(first: Run, run: Run) -> list[Cell]:
    """The row of `run` in the table of results, without its name; differences are to `first`."""
    summary, last = run.summary, run.rows[-1] if run.rows else {}
    evaluations = [row["accuracy"] for row in run.of_kind("eval")]
    sizes = ", ".join(dict.fromkeys(str(start["world_size"]) for start in run.starts))
    return [
        Cell(text=f"{summary['test_accuracy']:.2%}", below=run.accuracy_interval) if summary else Cell(text=NONE),
        Cell(text=NONE) if run is first else accuracy_difference(first, run),
        Cell(text=NONE if summary.get("test_accuracy_tta") is None else f"{summary['test_accuracy_tta']:.2%}"),
        Cell(text=f"{max(evaluations):.2%}", below=run.watched) if evaluations else Cell(text=NONE),
        Cell(text=number(last["epoch"]) if last else NONE),
        Cell(text=duration(summary.get("wall_seconds", last["seconds"])) if last else NONE),
        Cell(text=f"{summary['images_per_second']:,.0f}" if summary else NONE),
        Cell(text=sizes or NONE),
        Cell(text=f"{run.config.strategy.name}, {run.config.compute.precision}"),
        Cell(text=summary["weights_sha256"][:12], is_code=True) if summary else Cell(text=run.state),
    ]


def accuracy_difference(first: Run, run: Run) -> Cell:
    """The difference of the test accuracies, in points, with its 95% interval.

    Both must be about the same images: each is a pair, and the differences of pairs vary less than those of means.
    """
    before, now = first.predictions, run.predictions
    if before is None or now is None:
        return Cell(text=NONE)
    if not np.array_equal(before.labels, now.labels):
        return Cell(text="other images")
    right = [(found.predicted == found.labels).astype(np.float64) for found in (before, now)]
    change = 100 * (right[1] - right[0])
    mean, half = float(change.mean()), 1.959964 * float(change.std()) / math.sqrt(len(change))
    return Cell(text=f"{mean:+.2f}", below=f"{mean - half:+.2f} to {mean + half:+.2f}")


def config_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The values of each run for the fields of the config in which any of them differ."""
    flat = [flatten(run.config) for run in runs]
    return {
        key: [shown_value(config[key]) for config in flat]
        for key in flat[0]
        if key not in ("run.name", "run.dir") and any(config[key] != flat[0][key] for config in flat)
    }
