"""Splits the history of a run into its jobs, for the timeline.

Contract: a job is what lies between two `started` events; the last one may still run.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

from dist_cifar.errors import counted
from dist_cifar.tools.report.formats import duration
from dist_cifar.tools.report.read import LOST, Run

ENDS = {
    "saved": "stopped by a signal or its time limit, and saved",
    "failed": "failed",
    "done": "done",
    "running": "running",
    "lost": LOST,
}
"""The ways in which a job may end, with their text."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One job of the run: from a start to what ended it."""

    start: dict[str, Any]
    end_time: float
    end: str
    """A key of `ENDS`."""
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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A tick of the timeline."""

    left: str
    """A CSS length, as in `Job`."""
    step: int
    best: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """A bar of the timeline and a row of its table."""

    left: str
    width: str
    height_pixels: float
    end: str
    title: str
    checkpoints: list[Checkpoint]
    started: str
    world_size: int
    end_text: str
    duration: str
    first_step: int
    saved: str
    strategy: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The jobs of a run on one axis of time."""

    jobs: list[Job]
    started: str
    duration: str


def timeline(run: Run) -> Timeline | None:
    """The timeline of a run; None before its first start."""
    found = segments(run)
    if not found:
        return None
    first, last = found[0].start["time"], max(segment.end_time for segment in found)
    largest = max(segment.start["world_size"] for segment in found)
    jobs = [_job(segment, first=first, span_seconds=max(last - first, 1e-9), largest=largest) for segment in found]
    return Timeline(jobs=jobs, started=_clock(first), duration=duration(last - first))


def _job(segment: Segment, *, first: float, span_seconds: float, largest: int) -> Job:
    def share(seconds: float) -> str:
        return f"{100 * seconds / span_seconds:.2f}%"

    start, checkpoints, end = segment.start, segment.checkpoints, ENDS[segment.end]
    seconds, size = segment.end_time - start["time"], start["world_size"]
    return Job(
        left=share(start["time"] - first),
        width=share(seconds),
        height_pixels=20 + 24 * size / largest,
        end=segment.end,
        title=f"{counted(size, 'rank')} on {start['host']}, from step {start['step']:,}: {end}",
        checkpoints=[
            Checkpoint(left=share(event["time"] - first), step=event["step"], best=event["best"])
            for event in checkpoints
        ],
        started=_clock(start["time"]),
        world_size=size,
        end_text=f"{end}: {segment.note}" if segment.note else end,
        duration=duration(seconds),
        first_step=start["step"],
        saved=f"{len(checkpoints)}, last at step {checkpoints[-1]['step']:,}" if checkpoints else "none",
        strategy=start["strategy"],
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
