"""Chooses the curves of the report: which series of which runs are in which chart.

Contract: a chart is plain data, without pixels; `drawing` lays it out. Values that are not finite leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dist_cifar.errors import counted
from dist_cifar.tools.report.formats import number
from dist_cifar.tools.report.read import Run

MAX_CURVE_POINTS = 600
"""Points of one curve: more than a screen can show are averaged."""
MAX_RANK_CURVES = 8
"""Ranks that get a curve each; more lines in one chart cannot be told apart."""
MARK_MEANINGS = {"lr_reduction": "plateau: the learning rate was reduced", "start": "resumed, with the number of ranks"}
"""The text of each kind of mark in the legend."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    color: int
    points: list[tuple[float, float]]
    """(epoch, value)."""
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A position on the x axis where something happened."""

    epoch: float
    kind: str
    """`lr_reduction` or `start`."""
    label: str
    color: str
    """A colour of CSS."""
    text: str = ""
    """Text beside the mark."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over the epochs."""

    title: str
    series: list[Series]
    percent: bool = False
    log: bool = False
    marks: Sequence[Mark] = ()
    limit: float | None = None
    """A value to compare the series with, drawn if it lies among theirs."""
    limit_name: str = ""


def curves(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """The charts of which the runs have at least one point."""
    several = len(runs) > 1

    def lines(kind: str, key: str, label: str = "", *, faint: bool = False, color: int = 0) -> list[Series]:
        found = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = points_of(run.of_kind(kind), key)
            if points:
                of_run = label or run.watched
                title = f"{name}, {of_run}" if several else of_run
                found.append(Series(name=title, color=i if several else color, points=points, faint=faint))
        return found

    colors = [f"var(--c{i % 8})" if several else "var(--c7)" for i in range(len(runs))]
    reductions = [mark for run, color in zip(runs, colors, strict=True) for mark in _lr_reductions(run, color)]
    labelled = [replace(mark, text=mark.label.rpartition(" ")[2]) for mark in reductions]
    resumes = [] if several else _resumes(runs[0])
    limits = {run.config.optimizer.max_grad_norm for run in runs}
    charts = [
        Chart(
            title="Loss",
            series=lines("train", "loss", "training", faint=True, color=1) + lines("eval", "loss"),
            marks=reductions,
        ),
        Chart(
            title="Accuracy",
            series=lines("train", "accuracy", "training", faint=True, color=1) + lines("eval", "accuracy"),
            percent=True,
            marks=reductions,
        ),
        Chart(title="Learning rate", series=lines("train", "lr", "learning rate"), log=True, marks=labelled),
        Chart(
            title="Gradient norm, before clipping",
            series=lines("train", "grad_norm", "mean since the last row"),
            limit=limits.pop() if len(limits) == 1 else None,
            limit_name="optimizer.max_grad_norm",
        ),
        Chart(title="Training images/s", series=lines("train", "images_per_second", "all ranks"), marks=resumes),
        Chart(
            title="Images/s of each rank while it works, before it waits for others",
            series=rank_speeds(runs[0]) if not several else [],
            marks=resumes,
        ),
        Chart(
            title="Data wait, share of a step",
            series=lines("train", "data_wait_share", "mean of ranks"),
            percent=True,
            marks=resumes,
        ),
    ]
    return [chart for chart in charts if chart.series]


def _lr_reductions(run: Run, color: str) -> list[Mark]:
    """One mark for each step at which the learning rate was reduced; a resume may have repeated some."""
    if not run.starts:  # the log that says how long an epoch is was damaged
        return []
    rates = {event["step"]: event["lr"] for event in run.events if event["event"] == "lr_reduction"}
    return [
        Mark(epoch=step / _steps_per_epoch(run), kind="lr_reduction", label=f"plateau: lr {number(lr)}", color=color)
        for step, lr in sorted(rates.items())
    ]


def _resumes(run: Run) -> list[Mark]:
    found = []
    for start in run.starts[1:]:
        label = f"resumed on {counted(start['world_size'], 'rank')} at step {start['step']:,}"
        epoch = start["step"] / _steps_per_epoch(run)
        found.append(Mark(epoch=epoch, kind="start", label=label, color="var(--dim)", text=str(start["world_size"])))
    return found


def _steps_per_epoch(run: Run) -> int:
    return run.starts[-1]["steps_per_epoch"]


def rank_speeds(run: Run) -> list[Series]:
    """The speed of each rank by itself: the others wait for the slowest.

    Of many ranks, the slowest, the median and the fastest of each row: lines for all could not be told apart.
    """
    speeds = []
    for row in run.of_kind("train"):
        shares = row.get("rank_work_share")
        if shares and min(shares) > 0:
            speeds.append((row["epoch"], [row["images_per_second"] / len(shares) / share for share in shares]))
    ranks = max((len(of_row) for _, of_row in speeds), default=0)
    if ranks > MAX_RANK_CURVES:
        names = ["slowest rank", "median rank", "fastest rank"]
        speeds = [(epoch, [min(of_row), float(np.median(of_row)), max(of_row)]) for epoch, of_row in speeds]
    else:
        names = [f"rank {rank}" for rank in range(ranks)]
    found = []
    for i, name in enumerate(names):
        own = [{"epoch": epoch, "speed": of_row[i]} for epoch, of_row in speeds if i < len(of_row)]
        found.append(Series(name=name, color=i, points=points_of(own, "speed")))
    return found


def points_of(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have a finite one, averaged where there are too many to see."""
    points = [(row["epoch"], float(row[key])) for row in rows if row.get(key) is not None]
    points = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(len(points) / MAX_CURVE_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
