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
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_cifar import predictions
from dist_cifar.config import Config, describe, flatten
from dist_cifar.files import write_atomic
from dist_cifar.predictions import Predictions, wilson_interval
from dist_cifar.rundir import RunDir

NAME = "report.html"
_POINTS = 600
"""Of a curve: more than a screen can show are averaged."""
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
    config = run_dir.config()
    profiled = run_dir.profile / "summary.json"
    return Run(
        path=path,
        name=config.run.name,
        config=config,
        status=run_dir.status(),
        summary=run_dir.summary(),
        rows=run_dir.metrics(),
        events=run_dir.events(),
        predictions=predictions.read(path),
        profile=json.loads(profiled.read_text()) if profiled.exists() else {},
    )


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page about the runs at `paths`; returns where it is."""
    if out is None:
        out = paths[0] / NAME if len(paths) == 1 else Path(NAME)
    write_atomic(out, render([read_run(path) for path in paths]))
    return out


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
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>{body}"
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
    return f"{status}, step {last:,} of {run.starts[-1]['total_steps']:,}"


# --- the first screen --------------------------------------------------------------------------------------------


def _headline(run: Run) -> str:
    summary, evaluations = run.summary, run.of_kind("eval")
    cards = []
    if summary:
        cards.append(("test accuracy", f"{summary['test_accuracy']:.2%}", f"95 % interval {_interval(run)}"))
        epoch = summary["best_step"] * summary["epochs"] / summary["steps"]
        chosen = f"{summary['best_val_accuracy']:.2%} on the {summary['best_chosen_on']} split"
        cards.append(("best epoch", f"{epoch:g} of {summary['epochs']:g}", chosen))
    elif evaluations:
        best = max(evaluations, key=lambda row: row["accuracy"])
        cards.append((f"best {best['split']} accuracy", f"{best['accuracy']:.2%}", f"epoch {best['epoch']:g}"))
    if run.rows:
        last = run.rows[-1]
        epochs = f"{last['epoch']:g} epochs, {last['step']:,} steps"
        cards.append(("time", _duration(summary.get("wall_seconds", last["seconds"])), epochs))
    speeds = [row["images_per_second"] for row in run.of_kind("train")]
    if speeds:
        speed = summary.get("images_per_second", float(np.median(speeds)))
        waits = [row["data_wait_share"] for row in run.of_kind("train")]
        wait = summary.get("data_wait_share", float(np.mean(waits)))
        cards.append(("throughput", f"{speed:,.0f} images/s", f"data wait {wait:.1%} of a step"))
    if run.starts:
        sizes = [start["world_size"] for start in run.starts]
        changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
        hardware = ", ".join(dict.fromkeys(start["device"] for start in run.starts))
        cards.append(("world size", " → ".join(map(str, changes)), f"{hardware}, {len(sizes)} start(s)"))
    cards.append(("model", run.config.model.name, f"{run.config.train.strategy}, {run.config.train.precision}"))
    shown = "".join(
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in cards
    )
    state = run.status.get("status", "")
    banner = f'<p class="banner">{escape(_state(run))}</p>' if state not in ("done", "running") else ""
    return f'{banner}<section class="cards">{shown}</section>'


def _interval(run: Run) -> str:
    confusion = np.array(run.summary["test_confusion"])
    low, high = wilson_interval(int(np.trace(confusion)), int(confusion.sum()))
    return f"{low:.2%} to {high:.2%}"


def _duration(seconds: float) -> str:
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
class Chart:
    """Lines over the epochs."""

    title: str
    series: list[Series]
    percent: bool = False
    log: bool = False
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Places on the x axis, with what happened there."""


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

    cuts = []
    for run in runs:
        steps_per_epoch = run.starts[-1]["steps_per_epoch"] if run.starts else 1
        seen = {event["step"]: event["lr"] for event in run.events if event["event"] == "lr_cut"}
        cuts += [(step / steps_per_epoch, f"plateau: lr {lr:.3g}") for step, lr in sorted(seen.items())]
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
        Chart(title="Learning rate", series=lines("train", "lr", "learning rate"), log=True, marks=cuts),
        Chart(title="Gradient norm, before clipping", series=lines("train", "grad_norm", "mean since the last row")),
        Chart(title="Training images/s", series=lines("train", "images_per_second", "all ranks")),
        Chart(title="Own work of each rank, before it waits, share of a step", series=_of_ranks(runs), percent=True),
        Chart(
            title="Data wait, share of a step", series=lines("train", "data_wait_share", "mean of ranks"), percent=True
        ),
    ]
    shown = "".join(_svg(chart) for chart in charts if chart.series)
    return f'<section><h2>Curves</h2><div class="charts">{shown}</div></section>' if shown else ""


def _of_ranks(runs: Sequence[Run]) -> list[Series]:
    """What each rank of a single run did by itself: the one with the most is the one that others wait for."""
    rows = [row for row in runs[0].of_kind("train") if "rank_work_share" in row] if len(runs) == 1 else []
    ranks = max((len(row["rank_work_share"]) for row in rows), default=0)
    found = []
    for rank in range(ranks):
        own = [row | {"work": row["rank_work_share"][rank]} for row in rows if rank < len(row["rank_work_share"])]
        found.append(Series(name=f"rank {rank}", color=rank, points=_points(own, "work")))
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


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 250, 58, 12, 12, 30


def _svg(chart: Chart) -> str:
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    log = chart.log and min(ys) > 0 and max(ys) > 5 * min(ys)
    low, high = min(ys), max(ys)
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
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
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{_number(tick, chart.percent)}</text>'
        for tick in ticks
    )
    grid += "".join(
        f'<text x="{at_x(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(0, right)
    )
    marks = "".join(
        f'<line class="mark" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
        f"<title>{escape(label)}</title></line>"
        for x, label in chart.marks
    )
    lines, legend, data = "", "", []
    for series in chart.series:
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in series.points)
        color = f"var(--c{series.color % 8})"
        faint = ' opacity="0.55"' if series.faint else ""
        if len(series.points) == 1:
            x, y = series.points[0]
            lines += f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{color}"{faint}/>'
        lines += f'<polyline points="{points}" stroke="{color}"{faint}/>'
        legend += f'<span><i style="background:{color}"></i>{escape(series.name)}</span>'
        data.append(
            {
                "name": series.name,
                "px": [round(at_x(x), 1) for x, _ in series.points],
                "text": [f"{_number(y, chart.percent)} at epoch {x:.4g}" for x, y in series.points],
            }
        )
    legend += '<span><i class="mark"></i>plateau: the rate was cut</span>' if chart.marks else ""
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{escape(chart.title)} over epochs" data-series="{escape(json.dumps(data))}">'
        f'{grid}{marks}{lines}<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 1}" text-anchor="end">epoch</text>'
        f'</svg><div class="legend">{legend}</div><div class="readout">&nbsp;</div></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10**low and 10**high, with 2 and 5 times them where these are few."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low <= math.log10(tick) <= high]


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.4g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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
            kind, share = ("good" if i == j else "bad"), count / totals[i]
            strength = share if i == j else min(1.0, 4 * share)
            note = f"{int(count)} of {int(totals[i])} {name} were taken for {classes[j]}"
            cells += f'<td class="{kind}" style="--s:{strength:.2f}" title="{escape(note)}">{int(count) or ""}</td>'
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    bars = ""
    for name, share in run.summary["test_class_accuracy"].items():
        width = 0.0 if share is None else share
        text = "-" if share is None else f"{share:.1%}"
        bars += (
            f'<div class="bar"><span>{escape(name)}</span><div><i style="width:{width:.1%}"></i></div>'
            f"<b>{text}</b></div>"
        )
    return (
        '<section><h2>Classes</h2><div class="two"><figure><figcaption>Confusion: true class (row), predicted class'
        f' (column)</figcaption><div class="scroll"><table class="confusion"><tr><th></th>{head}</tr>{body}</table>'
        f"</div></figure><figure><figcaption>Accuracy of each class</figcaption>{bars}</figure></div></section>"
    )


def _mistakes(found: Predictions) -> str:
    tiles = ""
    for index, image in zip(found.worst_indices, found.worst_images, strict=True):
        true, taken = found.labels[index], found.predicted[index]
        shares = found.probabilities[index]
        text = f"{found.classes[true]}, taken for {found.classes[taken]}"
        tiles += (
            f'<figure class="tile"><img src="{_png(image)}" alt="test image {index}: {escape(text)}">'
            f"<figcaption><b>{escape(found.classes[taken])}</b> {shares[taken]:.1%}<br>is"
            f" {escape(found.classes[true])} ({shares[true]:.1%})</figcaption></figure>"
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
    error, bars, side = 0.0, "", 240
    for i in range(_BINS):
        inside = bins == i
        if not inside.any():
            continue
        accuracy, mean = float(right[inside].mean()), float(confidence[inside].mean())
        error += inside.mean() * abs(accuracy - mean)
        note = f"{int(inside.sum()):,} images, confidence {mean:.1%}, accuracy {accuracy:.1%}"
        bars += (
            f'<rect x="{40 + i * side / _BINS + 1:.1f}" width="{side / _BINS - 2:.1f}"'
            f' y="{10 + side * (1 - accuracy):.1f}" height="{side * accuracy:.1f}" fill="var(--c0)">'
            f"<title>{note}</title></rect>"
        )
    labels = "".join(
        f'<text x="{40 + side * t / 4:.0f}" y="{side + 26}" text-anchor="middle">{25 * t} %</text>'
        f'<text x="36" y="{14 + side * (1 - t / 4):.0f}" text-anchor="end">{25 * t} %</text>'
        for t in range(5)
    )
    return (
        "<section><h2>Calibration</h2><p>Accuracy of the images at each confidence; the dashed line is a model that is"
        f" as sure as it is right. Expected calibration error {error:.2%} ({_BINS} bins).</p><figure class='small'>"
        f'<svg viewBox="0 0 {side + 60} {side + 44}" role="img" aria-label="reliability diagram">{bars}'
        f'<line class="sure" x1="40" y1="{side + 10}" x2="{side + 40}" y2="10"/>{labels}'
        f'<text x="{40 + side / 2}" y="{side + 42}" text-anchor="middle">confidence</text></svg></figure></section>'
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
    scale = 980 / max(last - first, 1e-9)
    bars, rows = "", ""
    for i, job in enumerate(jobs):
        left, width = 10 + (job.start["time"] - first) * scale, max(3.0, (job.end_time - job.start["time"]) * scale)
        what = (
            f"{job.start['world_size']} rank(s) on {job.start['host']}, from step {job.start['step']}: {_ENDS[job.end]}"
        )
        bars += (
            f'<rect class="{job.end}" x="{left:.1f}" y="10" width="{width:.1f}" height="26" rx="3">'
            f"<title>{escape(what)}</title></rect>"
        )
        if width > 26:
            bars += f'<text class="on" x="{left + 6:.1f}" y="27">{job.start["world_size"]}</text>'
        bars += "".join(
            f'<line class="tick{" best" if event["best"] else ""}" x1="{at:.1f}" x2="{at:.1f}" y1="36" y2="44">'
            f"<title>checkpoint of step {event['step']}</title></line>"
            for event in job.checkpoints
            for at in [10 + (event["time"] - first) * scale]
        )
        saved = f"{len(job.checkpoints)}, last at step {job.checkpoints[-1]['step']:,}" if job.checkpoints else "none"
        rows += (
            f"<tr><td>{i + 1}</td><td>{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(job.start['time']))}</td>"
            f"<td>{_duration(job.end_time - job.start['time'])}</td><td>{job.start['world_size']}</td>"
            f"<td>{escape(job.start['strategy'])}</td><td>{job.start['step']:,}</td><td>{saved}</td>"
            f"<td>{escape(_ENDS[job.end] + (f': {job.note}' if job.note else ''))}</td></tr>"
        )
    return (
        "<section><h2>Timeline</h2><p>Each bar is a job with its number of ranks; the ticks below are checkpoints,"
        f' those of a new best model tall.</p><svg viewBox="0 0 1000 52" role="img" aria-label="timeline">{bars}</svg>'
        '<div class="scroll"><table><tr><th>job</th><th>started</th><th>time</th><th>world size</th><th>strategy</th>'
        f"<th>from step</th><th>checkpoints</th><th>end</th></tr>{rows}</table></div></section>"
    )


def _profile(run: Run) -> str:
    if not run.profile:
        return ""
    from dist_cifar import profile  # imports torch, which nothing else here needs

    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in profile.lines(run.profile)
    )
    return f'<section><h2>Where the time of a step goes</h2><div class="scroll"><table>{rows}</table></div></section>'


def _settings(run: Run) -> str:
    defaults = {key: default for key, _, default, _ in describe()}
    meanings = {key: text for key, _, _, text in describe()}
    rows = ""
    for key, value in flatten(run.config).items():
        shown = _setting(value)
        changed = ' class="changed"' if shown != defaults[key] else ""
        rows += (
            f'<tr{changed}><td title="{escape(meanings[key])}"><code>{escape(key)}</code></td>'
            f"<td><code>{escape(shown)}</code></td></tr>"
        )
    facts = ""
    for name in ("git_revision", "weights_sha256", "data_sha256", "inexact_since_step"):
        if run.summary.get(name) is not None:
            facts += f"<tr><td>{name}</td><td><code>{escape(str(run.summary[name]))}</code></td></tr>"
    for name in ("versions", "numerics"):
        for key, value in run.summary.get(name, {}).items():
            facts += f"<tr><td>{escape(key)}</td><td><code>{escape(str(value))}</code></td></tr>"
    return (
        f"<section><h2>Settings</h2><p>{escape(str(run.path))}. Values that differ from the default are marked.</p>"
        f'<div class="two"><div class="scroll"><table>{rows}</table></div><div class="scroll"><table>{facts}</table>'
        "</div></div></section>"
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
            f"{max(evaluations):.2%}" if evaluations else "-",
            f"{run.rows[-1]['epoch']:g}" if run.rows else "-",
            _duration(summary.get("wall_seconds", run.rows[-1]["seconds"])) if run.rows else "-",
            f"{summary['images_per_second']:,.0f}" if summary else "-",
            ", ".join(dict.fromkeys(str(start["world_size"]) for start in run.starts)) or "-",
            escape(f"{run.config.train.strategy}, {run.config.train.precision}"),
            f"<code>{summary['weights_sha256'][:12]}</code>" if summary else escape(_state(run)),
        ]
        rows += f'<tr><td><i class="dot" style="background:var(--c{i % 8})"></i>{escape(name)}</td>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = (
        "run",
        "test accuracy (95 %)",
        "best eval",
        "epochs",
        "time",
        "images/s",
        "world size",
        "strategy",
        "weights",
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<section><h2>Results</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div></section>'


def _config_differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = [flatten(run.config) for run in runs]
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td><code>{escape(_setting(config[key]))}</code></td>" for config in flat)
        + "</tr>"
        for key in flat[0]
        if any(config[key] != flat[0][key] for config in flat)
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = f"<table><tr><th>setting</th>{head}</tr>{rows}</table>" if rows else "<p>The configs are equal.</p>"
    return f'<section><h2>Settings that differ</h2><div class="scroll">{body}</div></section>'


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2330;--dim:#667085;--line:#e3e7ee;--card:#f6f8fb;--good:34,139,84;
--bad:200,60,50;--c0:#2563c9;--c1:#d9730d;--c2:#1f8a5b;--c3:#b3369a;--c4:#7a5cc7;--c5:#0e8fa3;--c6:#a8720b;--c7:#c2413b}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--fg:#e4e8ef;--dim:#98a2b3;--line:#2b323d;--card:#1a2029;
--good:64,190,120;--bad:235,95,85;--c0:#6ea2ff;--c1:#f0a04b;--c2:#4cc38a;--c3:#e07bce;--c4:#a995f0;--c5:#45c4d6;
--c6:#d9a53f;--c7:#f07f78}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 40px}h1{font-size:1.5rem;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:30px 0 8px}p{color:var(--dim);margin:4px 0 10px;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
.label{color:var(--dim);font-size:.8rem}.value{font-size:1.2rem;font-weight:650;overflow-wrap:anywhere}
.note{color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}.banner{border-left:4px solid var(--c7);padding:6px 10px;
background:var(--card);color:var(--fg)}.charts,.two{display:grid;gap:14px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}figure{margin:0;min-width:0}
.charts figure,.two figure,.small{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:4px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font-size:11px}svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.grid{stroke:var(--line)}line.mark{stroke:var(--c7);stroke-dasharray:4 4}line.cursor{stroke:var(--dim)}
.legend,.readout{font-size:.8rem;color:var(--dim);display:flex;flex-wrap:wrap;gap:2px 14px}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
line.sure{stroke:var(--fg);stroke-dasharray:5 4;stroke-width:1.5}
.legend i.mark{background:var(--c7)}.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}td,th{padding:3px 8px;text-align:left;
border-bottom:1px solid var(--line);vertical-align:top}th{font-weight:600;color:var(--dim)}code{font-size:.82rem;
overflow-wrap:anywhere}.changed td{background:color-mix(in srgb,var(--c1) 14%,transparent)}
.confusion td{text-align:right;min-width:32px;font-variant-numeric:tabular-nums;border:1px solid var(--line)}
.confusion tr:first-child th{vertical-align:bottom}.confusion tr:first-child span{writing-mode:vertical-rl;
transform:rotate(180deg)}.good{background:rgba(var(--good),calc(var(--s)*.6))}
.bad{background:rgba(var(--bad),calc(var(--s)*.7))}.bar{display:grid;grid-template-columns:92px 1fr 52px;gap:8px;
align-items:center;font-size:.85rem;margin:5px 0}.bar div{background:var(--line);border-radius:4px;height:12px}
.bar i{display:block;height:12px;border-radius:4px;background:var(--c0)}.bar b{text-align:right;font-weight:500}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:10px}.tile img{width:100%;
image-rendering:pixelated;border-radius:4px;display:block}.tile figcaption{font-weight:400;font-size:.78rem;
color:var(--dim);overflow-wrap:anywhere}.tile b{color:var(--fg)}.small{max-width:720px}.small svg{max-width:340px}
.sheet{width:100%;image-rendering:pixelated}.tick{stroke:var(--dim)}.tick.best{stroke:var(--c0);stroke-width:2.5}
rect.done,rect.running{fill:var(--c2)}rect.saved{fill:var(--c0)}rect.failed{fill:var(--c7)}rect.lost{fill:var(--c6)}
svg text.on{fill:#fff;font-weight:600}details{border:1px solid var(--line);border-radius:8px;padding:8px 12px;
margin-top:14px}summary{cursor:pointer;font-weight:600}footer{color:var(--dim);font-size:.8rem;margin-top:30px}
@media(max-width:560px){.charts svg text{font-size:17px}}
"""

_SCRIPT = """
function wire(){for(const svg of document.querySelectorAll('svg[data-series]')){
  const series=JSON.parse(svg.dataset.series),out=svg.parentNode.querySelector('.readout');
  const cursor=document.createElementNS('http://www.w3.org/2000/svg','line');
  cursor.setAttribute('class','cursor');cursor.setAttribute('y1',12);cursor.setAttribute('y2',220);
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
setInterval(async()=>{try{
  const news=await(await fetch('version')).text();
  if(version!==null&&news!==version){
    const page=new DOMParser().parseFromString(await(await fetch('.')).text(),'text/html');
    document.querySelector('main').replaceWith(page.querySelector('main'));document.title=page.title;wire();
  }
  version=news;
}catch(error){}},%d);
"""
