"""The report: one HTML page about a run, or about several, compared.

Contract: what is shown comes from run directories alone (no data set, no checkpoint), and the page needs no network and
no other file. A run may be anywhere between its first second and its end; what it has not written yet is
left out. Everything that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_cifar.config import Config, describe, flatten
from dist_cifar.run import predictions
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.predictions import Predictions, wilson_interval
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tracking.base import Results

logger = logging.getLogger(__name__)

NAME = "report.html"
"""Name of the page about several runs, in the current directory."""
_POINTS = 600
"""Of a curve: more than a screen can show are averaged."""
_RANKS = 8
"""More lines in one chart cannot be told apart."""
_BINS = 10
"""Of the calibration."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds."""

    path: Path
    name: str
    config: Config
    status: dict[str, Any]
    summary: dict[str, Any]
    """Empty before the end."""
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    predictions: Predictions | None
    profile: dict[str, Any]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events of its starts."""
        return [event for event in self.events if event["event"] == "started"]


def read_run(path: Path) -> Run:
    """Reads a run directory. Raises `ConfigError` or `DataError` for files that are not what a run writes."""
    run_dir = RunDir(path)
    config, status = run_dir.config(), run_dir.status()
    if run_dir.is_lost():
        status["status"] = "lost"
    return Run(
        path=path,
        name=config.run.name,
        config=config,
        status=status,
        summary=run_dir.summary(),
        rows=run_dir.metrics(),
        events=run_dir.events(),
        predictions=predictions.read(path),
        profile=run_dir.profile_summary(),
    )


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page about the runs at `paths`; returns where it is."""
    if out is None:
        out = RunDir(paths[0]).report if len(paths) == 1 else Path(NAME)
    write_atomic(out, render([read_run(path) for path in paths]))
    return out


class ReportTracker:
    """Writes the report of a run when it is done. See `dist_cifar.tracking.base.Tracker`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._run_dir = run_dir

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing: the report reads `metrics.jsonl`."""

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        if results is None:
            return
        try:
            write_report([self._run_dir])
        except Exception as error:  # the run is done all the same
            logger.info(f"warning: no report ({' '.join(str(error).split())}); see dist-cifar report --help")


def render(runs: Sequence[Run], *, refresh_seconds: float | None = None) -> str:
    """The page; with `refresh_seconds`, one that asks its server for news and shows them."""
    names = _distinct_names(runs)
    if len(runs) == 1:
        body = _headline(runs[0]) + _curves(runs, names) + _details(runs[0])
        title = f"{names[0]}: {_state(runs[0])}"
    else:
        body = _comparison(runs, names) + _curves(runs, names) + _config_differences(runs, names)
        body += "".join(
            f"<details><summary>{escape(name)}</summary>{_headline(run)}{_details(run)}</details>"
            for run, name in zip(runs, names, strict=True)
        )
        title = f"{len(runs)} runs"
    live = "" if refresh_seconds is None else f"<script>{_LIVE % (1000 * refresh_seconds)}</script>"
    stale = '<p class="banner stale">dist-cifar watch has ended: this is what it showed last.</p>' if live else ""
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>{stale}{body}"
        f"<footer>dist_cifar, {escape(made)}</footer></main><script>{_SCRIPT}</script>{live}</body></html>\n"
    )


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _state(run: Run) -> str:
    status = run.status.get("status", "not begun")
    if status == "failed":
        return f"failed: {run.status.get('reason', 'for an unknown reason')}"
    if status == "done" or not run.starts:
        return str(status)
    last = max((row["step"] for row in run.rows), default=0)
    if status == "lost":
        return f"{_ENDS['lost']} at step {last:,} of {run.starts[-1]['total_steps']:,}"
    return f"{status}, step {last:,} of {run.starts[-1]['total_steps']:,}"


# --- the first screen --------------------------------------------------------------------------------------------


def _headline(run: Run) -> str:
    summary, evaluations = run.summary, run.of_kind("eval")
    cards = []
    if summary:
        cards.append(("test accuracy", f"{summary['test_accuracy']:.2%}", f"95% interval {_interval(run)}"))
        epoch = summary["best_step"] * summary["epochs"] / summary["steps"]
        chosen = f"{summary['best_val_accuracy']:.2%} on the {summary['best_chosen_on']} split"
        cards.append(("best epoch", f"{epoch:g} of {summary['epochs']:g}", chosen))
    elif evaluations:
        best = max(evaluations, key=lambda row: row["accuracy"])
        cards.append((f"best {best['split']} accuracy", f"{best['accuracy']:.2%}", f"epoch {_number(best['epoch'])}"))
    trained = run.of_kind("train")
    if trained and not summary:
        loss, accuracy = (_points(trained[-1:], key) for key in ("loss", "accuracy"))
        note = f"accuracy {accuracy[0][1]:.2%}" if accuracy else ""
        cards.append(("training loss", _number(loss[0][1]) if loss else "not finite", note))
    if run.rows:
        last = run.rows[-1]
        left = seconds_left(run)
        done = f"epoch {_number(last['epoch'])}, step {last['step']:,}"
        note = done if left is None else f"{done}; about {duration(left)} of training left"
        cards.append(("time", duration(summary.get("wall_seconds", last["seconds"])), note))
    speeds = [row["images_per_second"] for row in trained]
    if speeds:
        speed = summary.get("images_per_second", float(np.median(speeds)))
        waits = [row["data_wait_share"] for row in trained]
        wait = summary.get("data_wait_share", float(np.mean(waits)))
        cards.append(("throughput", f"{speed:,.0f} images/s", f"data wait {wait:.1%} of a step"))
    if run.starts:
        sizes = [start["world_size"] for start in run.starts]
        changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
        hardware = ", ".join(dict.fromkeys(start["device"] for start in run.starts))
        shown = " → ".join(map(str, changes)) if len(changes) <= 5 else ", ".join(map(str, sorted(set(changes))))
        cards.append(("world size", shown, f"{hardware}, {_count(len(sizes), 'start')}"))
    cards.append(("model", run.config.model.name, f"{run.config.strategy.name}, {run.config.compute.precision}"))
    shown = "".join(
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in cards
    )
    state = run.status.get("status", "")
    banner = f'<p class="banner">{escape(_state(run))}</p>' if state not in ("done", "running") else ""
    share = _share_done(run)
    bar = "" if share is None else f'<div class="progress"><i style="width:{share:.1%}"></i></div>'
    return f'{banner}{bar}<section class="cards">{shown}</section>'


def _share_done(run: Run) -> float | None:
    """Of the steps, while the run trains."""
    if run.status.get("status") != "running" or not run.starts:
        return None
    return min(1.0, max((row["step"] for row in run.rows), default=0) / run.starts[-1]["total_steps"])


def seconds_left(run: Run) -> float | None:
    """Of training at the latest speed, evaluations not counted; None for a run that does not train."""
    trained = run.of_kind("train")
    if run.status.get("status") != "running" or not run.starts or not trained:
        return None
    last = trained[-1]
    samples_of_step = last["samples"] / last["step"]
    return (run.starts[-1]["total_steps"] - last["step"]) * samples_of_step / last["images_per_second"]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _interval(run: Run) -> str:
    confusion = np.array(run.summary["test_confusion"])
    low, high = wilson_interval(int(np.trace(confusion)), int(confusion.sum()))
    return f"{low:.2%} to {high:.2%}"


def duration(seconds: float) -> str:
    """As a person says it."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {int(seconds % 60)} s"
        if minutes
        else f"{seconds:.0f} s"
    )


# --- curves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    color: int
    points: list[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place on the x axis where something happened."""

    x: float
    kind: str
    """`cut` or `start`."""
    label: str
    color: str
    """A colour of CSS."""
    text: str = ""
    """Written beside it."""


_KINDS = {"cut": "plateau: the rate was cut", "start": "resumed, on so many ranks"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over the epochs."""

    title: str
    series: list[Series]
    percent: bool = False
    log: bool = False
    marks: Sequence[Mark] = ()
    limit: float | None = None
    """A value to be compared with, if it lies among those of the series."""
    limit_name: str = ""


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    several = len(runs) > 1

    def lines(kind: str, key: str, label: str, *, faint: bool = False, color: int = 0) -> list[Series]:
        found = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = _points(run.of_kind(kind), key)
            if points:
                title = f"{name}, {label}" if several else label
                found.append(Series(name=title, color=i if several else color, points=points, faint=faint))
        return found

    cuts = [mark for i, run in enumerate(runs) for mark in _cuts(run, f"var(--c{i % 8})" if several else "var(--c7)")]
    rates = [replace(mark, text=mark.label.rpartition(" ")[2]) for mark in cuts]
    resumes = [] if several else _resumes(runs[0])
    clips = {run.config.optimizer.max_grad_norm for run in runs}
    split = next((row["split"] for run in runs for row in run.of_kind("eval")), "validation")
    charts = [
        Chart(
            title="Loss",
            series=lines("train", "loss", "training", faint=True, color=1) + lines("eval", "loss", split),
            marks=cuts,
        ),
        Chart(
            title="Accuracy",
            series=lines("train", "accuracy", "training", faint=True, color=1) + lines("eval", "accuracy", split),
            percent=True,
            marks=cuts,
        ),
        Chart(title="Learning rate", series=lines("train", "lr", "learning rate"), log=True, marks=rates),
        Chart(
            title="Gradient norm, before clipping",
            series=lines("train", "grad_norm", "mean since the last row"),
            limit=clips.pop() if len(clips) == 1 else None,
            limit_name="optimizer.max_grad_norm",
        ),
        Chart(title="Training images/s", series=lines("train", "images_per_second", "all ranks"), marks=resumes),
        Chart(
            title="Images/s of each rank while it works, before it waits for others",
            series=_of_ranks(runs),
            marks=resumes,
        ),
        Chart(
            title="Data wait, share of a step",
            series=lines("train", "data_wait_share", "mean of ranks"),
            percent=True,
            marks=resumes,
        ),
    ]
    shown = "".join(_svg(chart) for chart in charts if chart.series)
    return f'<section><h2>Curves</h2><div class="charts">{shown}</div></section>' if shown else ""


def _cuts(run: Run, color: str) -> list[Mark]:
    """A resume may have done one again: each step once."""
    seen = {event["step"]: event["lr"] for event in run.events if event["event"] == "lr_reduction"}
    return [
        Mark(x=step / _steps_per_epoch(run), kind="cut", label=f"plateau: lr {_number(lr)}", color=color)
        for step, lr in sorted(seen.items())
    ]


def _resumes(run: Run) -> list[Mark]:
    found = []
    for start in run.starts[1:]:
        label = f"resumed on {_count(start['world_size'], 'rank')} at step {start['step']:,}"
        x = start["step"] / _steps_per_epoch(run)
        found.append(Mark(x=x, kind="start", label=label, color="var(--dim)", text=str(start["world_size"])))
    return found


def _steps_per_epoch(run: Run) -> int:
    return run.starts[-1]["steps_per_epoch"]


def _of_ranks(runs: Sequence[Run]) -> list[Series]:
    """The speed of each rank of a single run by itself: the others wait for the one with the least.

    Of many ranks, the slowest, the median and the fastest of each row: lines for all could not be told apart.
    """
    rows = [row for row in runs[0].of_kind("train") if row.get("rank_work_share")] if len(runs) == 1 else []
    speeds = [
        (row, [row["images_per_second"] / len(shares) / share for share in shares])
        for row in rows
        for shares in [row["rank_work_share"]]
        if min(shares) > 0
    ]
    ranks = max((len(of_row) for _, of_row in speeds), default=0)
    if ranks > _RANKS:
        names = ["slowest rank", "median rank", "fastest rank"]
        speeds = [(row, [min(of_row), float(np.median(of_row)), max(of_row)]) for row, of_row in speeds]
    else:
        names = [f"rank {rank}" for rank in range(ranks)]
    found = []
    for i, name in enumerate(names):
        own = [{"epoch": row["epoch"], "speed": of_row[i]} for row, of_row in speeds if i < len(of_row)]
        found.append(Series(name=name, color=i, points=_points(own, "speed")))
    return found


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have a finite one, averaged where there are too many to see."""
    points = [(row["epoch"], float(row[key])) for row in rows if row.get(key) is not None]
    points = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(len(points) / _POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 262, 68, 14, 12, 46


def _svg(chart: Chart) -> str:
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    log = chart.log and min(ys) > 0 and max(ys) > 5 * min(ys)
    low, high = min(ys), max(ys)
    if log:
        low, high = math.log10(low), math.log10(high)
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))  # a mean of equal values may differ in its last bit
    margin = (abs(high) * 0.1 or 1.0) if is_flat else (high - low) * 0.06
    floor = 0.0 if not log and low >= 0 and low < high / 3 else low - margin
    low, high = floor, high + margin
    if chart.percent:
        high = min(high, 1.0) if max(ys) <= 1 else high
    right = max(xs) or 1.0

    def at_x(x: float) -> float:
        return _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        value = math.log10(y) if log else y
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    if log and len(ticks) < 3:  # less than a decade
        ticks = _ticks(10**low, 10**high)
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{_number(tick, chart.percent)}</text>'
        for tick in ticks
    )
    grid += "".join(
        f'<text x="{at_x(tick):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(0, right)
    )
    marks = "".join(
        f'<line class="mark" style="stroke:{mark.color}" x1="{at_x(mark.x):.1f}" x2="{at_x(mark.x):.1f}" y1="{_TOP}"'
        f' y2="{_HEIGHT - _BOTTOM}"><title>{escape(mark.label)}</title></line>'
        f'<text x="{at_x(mark.x) - 4:.1f}" y="{_TOP + 10 if mark.kind == "start" else _HEIGHT - _BOTTOM - 6}"'
        f' text-anchor="end">{escape(mark.text)}</text>'
        for mark in chart.marks
    )
    limited = chart.limit is not None and low <= chart.limit <= high
    if limited:
        at = f"{at_y(chart.limit or 0.0):.1f}"
        marks += f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>'
    lines, legend, data = "", "", []
    for series in chart.series:
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in series.points)
        color = f"var(--c{series.color % 8})"
        faint = ' class="faint"' if series.faint else ""
        if len(series.points) == 1:
            x, y = series.points[0]
            lines += f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{color}"{faint}/>'
        lines += f'<polyline points="{points}" stroke="{color}"{faint}/>'
        legend += f'<span><i style="background:{color}"{faint}></i>{escape(series.name)}</span>'
        data.append(
            {
                "name": series.name,
                "px": [round(at_x(x), 1) for x, _ in series.points],
                "text": [f"{_number(y, chart.percent)} at epoch {x:.4g}" for x, y in series.points],
            }
        )
    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        color = next(mark.color for mark in chart.marks if mark.kind == kind)
        legend += f'<span><i class="mark" style="border-color:{color}"></i>{_KINDS[kind]}</span>'
    if limited:
        legend += f'<span><i class="limit"></i>{escape(chart.limit_name)}</span>'
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{escape(chart.title)} over epochs" data-series="{escape(json.dumps(data))}">'
        f'{grid}{marks}{lines}<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">epoch'
        f'</text></svg><div class="legend">{legend}</div><div class="readout">&nbsp;</div></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10**low and 10**high, with 2 and 5 times them where these are few."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low <= math.log10(tick) <= high]


def _number(value: float, percent: bool = False) -> str:
    """Four digits at most, as a person writes them: 0.25, 1e-4, 12,000."""
    if percent:
        return f"{100 * value:.4g}%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-2:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


# --- what the model gets wrong -----------------------------------------------------------------------------------


def _details(run: Run) -> str:
    parts = [_profile(run), _timeline(run), _settings(run)]
    if run.summary and run.predictions is not None:
        shown = run.predictions
        parts = [_classes(run), _mistakes(shown), _calibration(shown), _augmentation(shown), *parts]
    return "".join(parts)


def _classes(run: Run) -> str:
    classes = list(run.summary["test_class_accuracy"])
    confusion = np.array(run.summary["test_confusion"])
    totals = np.maximum(confusion.sum(axis=1), 1)
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in classes)
    body = ""
    for i, name in enumerate(classes):
        cells = ""
        for j, count in enumerate(confusion[i]):
            if not count:  # a hundred classes have ten thousand cells
                cells += "<td></td>"
                continue
            kind, share = ("good" if i == j else "bad"), count / totals[i]
            strength = share if i == j else min(1.0, 4 * share)
            note = f"{int(count)} of {int(totals[i])} {name} were taken for {classes[j]}"
            cells += f'<td class="{kind}" style="--s:{strength:.2f}" title="{escape(note)}">{int(count)}</td>'
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    bars = ""
    for name, share in run.summary["test_class_accuracy"].items():
        width = 0.0 if share is None else share
        text = "-" if share is None else f"{share:.1%}"
        bars += (
            f'<div class="bar"><span>{escape(name)}</span><div><i style="width:{width:.1%}"></i></div>'
            f"<b>{text}</b></div>"
        )
    fits = " fits" if len(classes) <= 12 else ""
    return (
        f'<section><h2>Classes</h2><p>{escape(_confused(confusion, classes))}</p><div class="two"><figure><figcaption>'
        "Confusion: true class (row), predicted class (column), number of test images</figcaption>"
        f'<div class="scroll"><table class="confusion{fits}"><tr><th></th>{head}</tr>{body}</table>'
        f"</div></figure><figure><figcaption>Accuracy of each class</figcaption>{bars}</figure></div></section>"
    )


def _small_share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "below 0.1%"


def _confused(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    """The five most frequent mistakes."""
    wrong = confusion * (1 - np.eye(len(classes), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    listed = [f"{classes[true]} taken for {classes[taken]} ({wrong[true, taken]:,})" for true, taken in pairs]
    return f"Most frequent mistakes: {', '.join(listed)}." if listed else "No mistakes."


def _mistakes(found: Predictions) -> str:
    tiles = ""
    for index, image in zip(found.worst_indices, found.worst_images, strict=True):
        true, taken = found.labels[index], found.predicted[index]
        shares = found.probabilities[index]
        text = f"{found.classes[true]}, taken for {found.classes[taken]}"
        tiles += (
            f'<figure class="tile"><img src="{_png(image)}" alt="test image {index}: {escape(text)}">'
            f"<figcaption><b>{escape(found.classes[taken])}</b> {shares[taken]:.1%}<br>is"
            f" {escape(found.classes[true])} ({_small_share(shares[true])})</figcaption></figure>"
        )
    wrong = int((found.predicted != found.labels).sum())
    note = f"{wrong:,} of {len(found.labels):,} test images are classified wrongly."
    if tiles:
        note += " These gave their true class the least probability, the worst first."
    return f'<section><h2>Worst mistakes</h2><p>{note}</p><div class="tiles">{tiles}</div></section>'


def _calibration(found: Predictions) -> str:
    """The reliability diagram and the expected calibration error of Guo et al. (2017)."""
    confidence = found.probabilities.max(axis=1).astype(np.float64)
    right = found.predicted == found.labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    error, accuracies, shares = 0.0, [], []
    for i in range(_BINS):
        inside = bins == i
        if not inside.any():
            continue
        accuracy, mean, share = float(right[inside].mean()), float(confidence[inside].mean()), float(inside.mean())
        error += share * abs(accuracy - mean)
        note = f"{int(inside.sum()):,} images, confidence {mean:.1%}, accuracy {accuracy:.1%}"
        accuracies.append((i, accuracy, note))
        shares.append((i, share, note))
    average = float(confidence.mean())
    return (
        "<section><h2>Calibration</h2><p>The dashed line is a model that is as sure as it is right. Expected"
        f" calibration error {error:.2%} ({_BINS} bins): mean confidence {average:.1%}, accuracy {right.mean():.1%}."
        '</p><div class="two">'
        + _bars("Accuracy of the images at each confidence", "accuracy", accuracies, diagonal=True)
        + _bars("How many images have that confidence", "share of images", shares, diagonal=False)
        + "</div></section>"
    )


def _bars(title: str, axis: str, bars: Iterable[tuple[int, float, str]], *, diagonal: bool) -> str:
    """A chart of (bin of the confidence, share, note)."""
    left, top, width, height = 68, 14, 470, 200
    bars = list(bars)
    full = 1.0 if diagonal else next(limit for limit in (0.2, 0.4, 1.0) if max(y for _, y, _ in bars) <= limit)
    shown = "".join(
        f'<rect x="{left + i * width / _BINS + 1:.1f}" width="{width / _BINS - 2:.1f}"'
        f' y="{top + height * (1 - y / full):.1f}" height="{height * y / full:.1f}"'
        f' fill="var(--c0)"><title>{note}</title></rect>'
        for i, y, note in bars
    )
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{top + height * (1 - t / 4):.0f}"'
        f' y2="{top + height * (1 - t / 4):.0f}"/><text x="{left - 6}" y="{top + 4 + height * (1 - t / 4):.0f}"'
        f' text-anchor="end">{25 * t * full:g}%</text>'
        f'<text x="{left + width * t / 4:.0f}" y="{top + height + 22}" text-anchor="middle">{25 * t}%</text>'
        for t in range(5)
    )
    line = f'<line class="sure" x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top}"/>' if diagonal else ""
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 560 262" role="img" aria-label="{title}">{grid}'
        f'{shown}{line}<text x="{left + width / 2}" y="{top + height + 43}" text-anchor="middle">confidence</text>'
        f'<text x="14" y="{top + height / 2}" text-anchor="middle" transform="rotate(-90 14 {top + height / 2})">'
        f"{axis}</text></svg></figure>"
    )


def _augmentation(found: Predictions) -> str:
    rows, columns = found.augmented.shape[:2]
    gap = 2
    sheet = np.full((rows * (32 + gap) - gap, columns * (32 + gap) - gap, 4), 0, np.uint8)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (32 + gap), j * (32 + gap)
            sheet[top : top + 32, left : left + 32, :3] = found.augmented[i, j]
            sheet[top : top + 32, left : left + 32, 3] = 255
    return (
        "<section><h2>Augmentation</h2><p>Training images as they are (left) and as the first epochs see them.</p>"
        f'<figure class="small"><img class="sheet" src="{_png(sheet)}" alt="augmented training images"></figure>'
        "</section>"
    )


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


# --- how it ran --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One job of the run: from a start to what ended it."""

    start: dict[str, Any]
    end_time: float
    end: str
    """`saved`, `failed`, `done`, `running`, or `lost` for a job that said nothing more."""
    note: str
    checkpoints: list[dict[str, Any]]


def segments(run: Run) -> list[Segment]:
    """The jobs of a run, oldest first."""
    found = []
    starts = [i for i, event in enumerate(run.events) if event["event"] == "started"]
    for i, after in itertools.pairwise([*starts, len(run.events)]):
        job = run.events[i:after]
        ends = [event for event in job if event["event"] in ("saved", "failed", "done")]
        if ends:
            end, last = ends[0]["event"], ends[0]["time"]
        elif after == len(run.events) and run.status.get("status") == "running":
            end, last = "running", time.time()
        else:
            end, last = "lost", job[-1]["time"]
        found.append(
            Segment(
                start=job[0],
                end_time=last,
                end=end,
                note=str(ends[0].get("reason", "")) if ends else "",
                checkpoints=[event for event in job if event["event"] == "checkpoint"],
            )
        )
    return found


_ENDS = {
    "saved": "stopped by a signal or its time limit, and saved",
    "failed": "failed",
    "done": "done",
    "running": "running",
    "lost": "ended without a word (killed, or its node died)",
}


def _timeline(run: Run) -> str:
    jobs = segments(run)
    if not jobs:
        return ""
    first, last = jobs[0].start["time"], max(job.end_time for job in jobs)
    largest = max(job.start["world_size"] for job in jobs)

    def share(seconds: float) -> str:
        return f"{100 * seconds / max(last - first, 1e-9):.2f}%"

    bars, rows = "", ""
    for i, job in enumerate(jobs):
        end = _ENDS[job.end] + (f": {job.note}" if job.note else "")
        size, seconds = job.start["world_size"], job.end_time - job.start["time"]
        what = f"{_count(size, 'rank')} on {job.start['host']}, from step {job.start['step']:,}: {_ENDS[job.end]}"
        bars += (
            f'<div class="job {job.end}" style="left:{share(job.start["time"] - first)};width:{share(seconds)};'
            f'height:{20 + 24 * size / largest:.0f}px" title="{escape(what)}">{size}</div>'
        )
        bars += "".join(
            f'<i class="tick{" best" if event["best"] else ""}" style="left:{share(event["time"] - first)}"'
            f' title="checkpoint of step {event["step"]:,}"></i>'
            for event in job.checkpoints
        )
        saved = f"{len(job.checkpoints)}, last at step {job.checkpoints[-1]['step']:,}" if job.checkpoints else "none"
        rows += (
            f"<tr><td>{i + 1}</td><td>{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(job.start['time']))}</td>"
            f'<td>{size}</td><td><i class="dot {job.end}"></i>{escape(end)}</td><td>{duration(seconds)}</td>'
            f"<td>{job.start['step']:,}</td><td>{saved}</td><td>{escape(job.start['strategy'])}</td></tr>"
        )
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first))
    return (
        "<section><h2>Timeline</h2><p>Each bar is a job with its number of ranks; the ticks below are checkpoints,"
        f' the tall ones those of a new best model.</p><div class="jobs" role="img" aria-label="timeline">{bars}</div>'
        f'<div class="ends"><span>{begin}</span><span>{duration(last - first)} later</span></div>'
        '<div class="scroll"><table class="runs"><tr><th>job</th><th>started</th><th>ranks</th><th>end</th>'
        f"<th>time</th><th>from step</th><th>checkpoints</th><th>strategy</th></tr>{rows}</table></div></section>"
    )


def _profile(run: Run) -> str:
    if not run.profile:
        return ""
    from dist_cifar.run import step_profiler  # imports torch, which nothing else here needs

    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in step_profiler.lines(run.profile)
    )
    return f'<section><h2>Where the time of a step goes</h2><div class="scroll"><table>{rows}</table></div></section>'


def _settings(run: Run) -> str:
    defaults = flatten(Config())
    meanings = {key: text for key, _, _, text in describe()}
    values = flatten(run.config)
    changed, rest = "", ""
    for key, value in values.items():
        row = (
            f'<tr><td title="{escape(meanings[key])}"><code>{escape(key)}</code></td>'
            f"<td><code>{escape(_setting(value))}</code></td></tr>"
        )
        if value == defaults[key]:
            rest += row
        else:
            changed += row
    facts = dict.fromkeys(("git_revision", "weights_sha256", "data_sha256", "inexact_since_step"))
    facts |= {name: run.summary.get(name) for name in facts}
    facts |= run.summary.get("versions", {}) | run.summary.get("numerics", {})
    machine = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return (
        f"<section><h2>Settings</h2><p>Of {escape(str(run.path))}: what differs from the defaults.</p>"
        f'<div class="two"><div class="scroll"><table class="settings">{changed}</table></div>'
        f'<div class="scroll"><table>{machine}</table></div></div>'
        '<details><summary>All that is as by default</summary><table class="settings">'
        f"{rest}</table></details></section>"
    )


def _setting(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


# --- several runs ------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = ""
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        summary = run.summary
        evaluations = [row["accuracy"] for row in run.of_kind("eval")]
        cells = [
            f"{summary['test_accuracy']:.2%}<br><small>{_interval(run)}</small>" if summary else "-",
            _difference(runs[0], run) if i else "-",
            f"{max(evaluations):.2%}" if evaluations else "-",
            _number(run.rows[-1]["epoch"]) if run.rows else "-",
            duration(summary.get("wall_seconds", run.rows[-1]["seconds"])) if run.rows else "-",
            f"{summary['images_per_second']:,.0f}" if summary else "-",
            ", ".join(dict.fromkeys(str(start["world_size"]) for start in run.starts)) or "-",
            escape(f"{run.config.strategy.name}, {run.config.compute.precision}"),
            f"<code>{summary['weights_sha256'][:12]}</code>" if summary else escape(_state(run)),
        ]
        rows += f'<tr><td><i class="dot" style="background:var(--c{i % 8})"></i>{escape(name)}</td>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = (
        "run",
        "test accuracy (95% interval)",
        "difference",
        "best validation",
        "epochs",
        "time",
        "images/s",
        "world size",
        "strategy",
        "weights",
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f"<section><h2>Results</h2><p>Differences are to {escape(names[0])}, in points, image by image, with their 95%"
        f' interval.</p><div class="scroll"><table class="results"><tr>{head}</tr>{rows}</table></div></section>'
    )


def _difference(first: Run, run: Run) -> str:
    """Of the test accuracies, where both are about the same images; each image is a pair, so these vary less."""
    before, now = first.predictions, run.predictions
    if before is None or now is None:
        return "-"
    if not np.array_equal(before.labels, now.labels):
        return "other images"
    right = [(found.predicted == found.labels).astype(np.float64) for found in (before, now)]
    change = 100 * (right[1] - right[0])
    mean, half = float(change.mean()), 1.959964 * float(change.std()) / math.sqrt(len(change))
    return f"{mean:+.2f}<br><small>{mean - half:+.2f} to {mean + half:+.2f}</small>"


def _config_differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = [flatten(run.config) for run in runs]
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td><code>{escape(_setting(config[key]))}</code></td>" for config in flat)
        + "</tr>"
        for key in flat[0]
        if key not in ("run.name", "run.dir") and any(config[key] != flat[0][key] for config in flat)
    )
    head = "".join(
        f'<th><i class="dot" style="background:var(--c{i % 8})"></i>{escape(name)}</th>' for i, name in enumerate(names)
    )
    body = f"<table><tr><th>setting</th>{head}</tr>{rows}</table>" if rows else "<p>The configs are equal.</p>"
    return f'<section><h2>Settings that differ</h2><div class="scroll">{body}</div></section>'


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2330;--dim:#667085;--line:#e3e7ee;--card:#f6f8fb;--good:34,139,84;
--bad:200,60,50;--c0:#2563c9;--c1:#d9730d;--c2:#1f8a5b;--c3:#b3369a;--c4:#7a5cc7;--c5:#0e8fa3;--c6:#a8720b;
--c7:#c2413b}@media(prefers-color-scheme:dark){:root{--bg:#12161d;--fg:#e4e8ef;--dim:#98a2b3;--line:#2b323d;
--card:#1a2029;--good:64,190,120;--bad:235,95,85;--c0:#6ea2ff;--c1:#f0a04b;--c2:#4cc38a;--c3:#e07bce;--c4:#a995f0;
--c5:#45c4d6;--c6:#d9a53f;--c7:#f07f78}}*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,sans-serif}main{max-width:1180px;margin:0 auto;padding:20px 16px 40px}h1{font-size:1.5rem;
margin:0 0 14px;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:30px 0 8px}p{color:var(--dim);margin:4px 0 10px;
overflow-wrap:anywhere}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
.label{color:var(--dim);font-size:.8rem}.value{font-size:1.2rem;font-weight:650;overflow-wrap:anywhere}
.note{color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}.banner{border-left:4px solid var(--c7);
padding:6px 10px;background:var(--card);color:var(--fg)}.charts,.two{display:grid;gap:14px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}figure{margin:0;min-width:0}
.charts figure,.two figure,.small{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:4px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font-size:11px}svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.faint{opacity:.6}.grid{stroke:var(--line)}line.mark{stroke-dasharray:4 4}line.cursor{stroke:var(--dim)}
.legend,.readout{font-size:.8rem;color:var(--dim);display:flex;flex-wrap:wrap;gap:2px 14px}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
line.sure{stroke:var(--fg);stroke-dasharray:5 4;stroke-width:1.5}.legend i.mark,.legend i.limit{width:0;height:12px;
border-left:2px dashed;background:none}.legend i.limit{width:14px;height:0;border-left:0;
border-top:2px dotted var(--dim)}line.limit{stroke:var(--dim);stroke-dasharray:2 3}.dot{display:inline-block;
width:9px;height:9px;border-radius:50%;margin-right:6px}.scroll{overflow-x:auto}table{border-collapse:collapse;
font-size:.85rem}td,th{padding:3px 8px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim)}code{font-size:.82rem;overflow-wrap:anywhere}
.confusion td{text-align:right;min-width:32px;
font-variant-numeric:tabular-nums;border:1px solid var(--line)}.confusion tr:first-child th{vertical-align:bottom}
.confusion tr:first-child span{writing-mode:vertical-rl;transform:rotate(180deg)}
.good{background:rgba(var(--good),calc(var(--s)*.6))}.bad{background:rgba(var(--bad),calc(var(--s)*.7))}
.bar{display:grid;grid-template-columns:92px 1fr 52px;gap:8px;align-items:center;font-size:.85rem;margin:5px 0}
.bar div{background:var(--line);border-radius:4px;height:12px}.bar i{display:block;height:12px;border-radius:4px;
background:var(--c0)}.bar b{text-align:right;font-weight:500}.tiles{display:grid;
grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:10px}.tile img{width:100%;image-rendering:pixelated;
border-radius:4px;display:block}.tile figcaption{font-weight:400;font-size:.78rem;color:var(--dim);
overflow-wrap:anywhere}.tile b{color:var(--fg)}.small{max-width:720px}.sheet{width:100%;image-rendering:pixelated}
.jobs{position:relative;height:64px}.job{position:absolute;bottom:20px;min-width:3px;border-radius:3px;
overflow:hidden;white-space:nowrap;color:var(--bg);font-size:.75rem;font-weight:600;text-indent:5px;line-height:20px}
.tick{position:absolute;top:46px;width:1px;height:7px;background:var(--dim)}.tick.best{width:2px;height:14px;
background:var(--c0)}.ends{display:flex;justify-content:space-between;color:var(--dim);font-size:.8rem;
margin-bottom:8px}.job.done,.job.running,.dot.done,.dot.running{background:var(--c2)}
.job.saved,.dot.saved{background:var(--c0)}.job.failed,.dot.failed{background:var(--c7)}
.job.lost,.dot.lost{background:var(--c6)}.results td,.runs td,.runs th,.settings td:first-child{white-space:nowrap}
.runs td:nth-child(4){white-space:normal;min-width:130px}.progress{background:var(--line);
border-radius:3px;overflow:hidden;margin-bottom:10px}.progress i{display:block;height:6px;background:var(--c2)}
.stale{display:none}.lost-server .stale{display:block}details{border:1px solid var(--line);border-radius:8px;
padding:8px 12px;margin-top:14px}summary{cursor:pointer;font-weight:600}footer{color:var(--dim);font-size:.8rem;
margin-top:30px}@media(max-width:560px){svg text{font-size:17px}.charts,.two{gap:10px}.confusion.fits{width:100%;
table-layout:fixed}.confusion.fits td,.confusion.fits th{padding:3px 1px;min-width:0;font-size:.66rem}
.confusion.fits th:first-child{width:72px;overflow-wrap:anywhere}}
"""

_SCRIPT = """
function wire(){for(const svg of document.querySelectorAll('svg[data-series]')){
  const series=JSON.parse(svg.dataset.series),out=svg.parentNode.querySelector('.readout');
  const cursor=document.createElementNS('http://www.w3.org/2000/svg','line');
  cursor.setAttribute('class','cursor');cursor.setAttribute('y1',12);cursor.setAttribute('y2',216);
  svg.addEventListener('pointermove',event=>{
    const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)*560/box.width;
    const near=series.map(one=>one.px.reduce((best,px,i)=>
      Math.abs(px-x)<Math.abs(one.px[best]-x)?i:best,0));
    cursor.setAttribute('x1',series[0].px[near[0]]);cursor.setAttribute('x2',series[0].px[near[0]]);
    svg.append(cursor);
    out.textContent=series.map((one,i)=>one.name+': '+one.text[near[i]]).join(' · ');
  });
  svg.addEventListener('pointerleave',()=>{cursor.remove();out.textContent='\\u00a0';});
}}
wire();
"""

_LIVE = """
let version=null;
const details=()=>[...document.querySelectorAll('details')];
setInterval(async()=>{try{
  const news=await(await fetch('version')).text();
  document.body.classList.remove('lost-server');
  if(version!==null&&news!==version){
    const page=new DOMParser().parseFromString(await(await fetch('.')).text(),'text/html');
    const open=details().map(one=>one.open);
    document.querySelector('main').replaceWith(page.querySelector('main'));document.title=page.title;wire();
    details().forEach((one,i)=>{one.open=open[i]??one.open;});
  }
  version=news;
}catch(error){document.body.classList.add('lost-server');}},%d);
"""
