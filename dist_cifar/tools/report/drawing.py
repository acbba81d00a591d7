"""Lays charts out: data to positions in an SVG, which the macros of `templates/charts.html.j2` write.

Contract: pure functions. Positions are in units of the SVG's view box, with y growing downwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_cifar.tools.report.charts import MARK_MEANINGS, Chart, Mark, Series
from dist_cifar.tools.report.formats import number


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a view box, and the edges of the area that data is drawn in."""

    width: int = 560
    height: int = 262
    left: int
    right: int
    top: int
    bottom: int

    @property
    def middle_x(self) -> float:
        """The middle of the area, between left and right."""
        return (self.left + self.right) / 2

    @property
    def middle_y(self) -> float:
        """The middle of the area, between top and bottom."""
        return (self.top + self.bottom) / 2


LINES = Frame(left=68, right=546, top=12, bottom=216)
BARS = Frame(left=68, right=538, top=14, bottom=214)


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class DrawnMark:
    """A vertical line at `x`, with its text left of it at the height `text_y`."""

    x: float
    text_y: float
    mark: Mark


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline; one of a single point is drawn as a dot."""

    series: Series
    color: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A `Chart` that is laid out."""

    chart: Chart
    frame: Frame
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    marks: list[DrawnMark]
    legend_marks: list[tuple[str, str]]
    """(colour, meaning) of each kind of mark."""
    limit_y: float | None
    lines: list[Line]
    readout: str
    """JSON for `static/report.js`: what it shows under the pointer."""


def line_chart(chart: Chart) -> LineChart:
    """Lays out a chart that has at least one point."""
    values = [y for series in chart.series for _, y in series.points]
    log = chart.log and min(values) > 0 and max(values) > 5 * min(values)
    low, high = _value_range(chart, values, log=log)
    right = max(x for series in chart.series for x, _ in series.points) or 1.0
    frame = LINES

    def at_x(x: float) -> float:
        return frame.left + x / right * (frame.right - frame.left)

    def at_y(y: float) -> float:
        value = math.log10(y) if log else y
        return frame.top + (high - value) / (high - low) * (frame.bottom - frame.top)

    y_ticks = log_ticks(low, high) if log else ticks(low, high)
    if log and len(y_ticks) < 3:  # less than a decade
        y_ticks = ticks(10**low, 10**high)
    kinds: dict[str, str] = {}
    for mark in chart.marks:
        kinds.setdefault(mark.kind, mark.color)
    return LineChart(
        chart=chart,
        frame=frame,
        y_ticks=[Tick(at=at_y(tick), label=number(tick, percent=chart.percent)) for tick in y_ticks],
        x_ticks=[Tick(at=at_x(tick), label=f"{tick:g}") for tick in ticks(0, right)],
        marks=[
            DrawnMark(
                x=at_x(mark.epoch), text_y=frame.top + 10 if mark.kind == "start" else frame.bottom - 6, mark=mark
            )
            for mark in chart.marks
        ],
        legend_marks=[(color, MARK_MEANINGS[kind]) for kind, color in kinds.items()],
        limit_y=at_y(chart.limit) if chart.limit is not None and low <= chart.limit <= high else None,
        lines=[
            Line(
                series=series,
                color=f"var(--c{series.color % 8})",
                points=[(at_x(x), at_y(y)) for x, y in series.points],
            )
            for series in chart.series
        ],
        readout=_readout(chart, at_x),
    )


def _value_range(chart: Chart, values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """The ends of the y axis, in powers of ten on a logarithmic one."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))  # a mean of equal values may differ in its last bit
    margin = (abs(high) * 0.1 or 1.0) if is_flat else (high - low) * 0.06
    floor = 0.0 if not log and low >= 0 and low < high / 3 else low - margin
    ceiling = high + margin
    return floor, min(ceiling, 1.0) if chart.percent and max(values) <= 1 else ceiling


def _readout(chart: Chart, at_x: Callable[[float], float]) -> str:
    return json.dumps(
        [
            {
                "name": series.name,
                "px": [round(at_x(x), 1) for x, _ in series.points],
                "text": [f"{number(y, percent=chart.percent)} at epoch {x:.4g}" for x, y in series.points],
            }
            for series in chart.series
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar over one bin of the confidence."""

    x: float
    y: float
    width: float
    height: float
    note: str


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Bars over the confidence from 0 to 100 %; `diagonal` draws the line of perfect calibration."""

    title: str
    axis: str
    bins: int
    frame: Frame
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    bars: list[Bar]
    diagonal: bool


def bar_chart(
    title: str, axis: str, shares: Sequence[tuple[int, float, str]], *, bins: int, diagonal: bool
) -> BarChart:
    """Lays out (bin, share, note)s, at least one, of `bins` equal bins."""
    frame = BARS
    width, height = frame.right - frame.left, frame.bottom - frame.top
    full = 1.0 if diagonal else next(limit for limit in (0.2, 0.4, 1.0) if max(y for _, y, _ in shares) <= limit)
    return BarChart(
        title=title,
        axis=axis,
        bins=bins,
        frame=frame,
        y_ticks=[Tick(at=frame.top + height * (1 - t / 4), label=f"{25 * t * full:g}%") for t in range(5)],
        x_ticks=[Tick(at=frame.left + width * t / 4, label=f"{25 * t}%") for t in range(5)],
        bars=[
            Bar(
                x=frame.left + i * width / bins + 1,
                y=frame.top + height * (1 - share / full),
                width=width / bins - 2,
                height=height * share / full,
                note=note,
            )
            for i, share, note in shares
        ],
        diagonal=diagonal,
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    raw = max((high - low) / 5, 1e-300)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10**low and 10**high, with 2 and 5 times them where these are few."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if tick > 0 and low <= math.log10(tick) <= high]
