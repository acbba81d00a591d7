"""Profiles the steps of a training for `run.profile=true`: a table of their phases, and a trace of a few of them.

Contract: `phase(name)` marks the beginning of a phase, and costs next to nothing while no profile is open. A profile
skips the first `SKIPPED_STEPS` after a start, times the phases of the next `TIMED_STEPS`, undisturbed, and then traces
`TRACED_STEPS` with torch's profiler. It changes no result.

On a CPU a phase lasts from its call to the next. On a GPU the calls record events in the stream of the computation, and
a phase lasts as long as the GPU takes from one to the next, including what it waits for the host; the host waits for
nothing. `reduction` is the time that a step still waits when the rank's own gradients are complete: what is hidden
behind the backward pass does not count. In `deepspeed` and `fsdp` it cannot be told from the backward pass.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

SKIPPED_STEPS, TIMED_STEPS, TRACED_STEPS = 5, 20, 3
PHASES = {
    "data": "data wait",
    "forward": "forward",
    "backward": "backward",
    "reduction": "reduction",
    "optimizer": "optimizer",
    "other": "other",
}
"""The phases of a step, with their names in the table. A step begins with the first. Phases with other names, such as
evaluations and checkpoints, belong to no step."""

_open: Profile | None = None


def phase(name: str) -> None:
    """Marks the beginning of the phase `name`: one of `PHASES`, or something outside of the step."""
    if _open is not None:
        _open.enter(name)


def reduction_follows(parameters: Iterable[nn.Parameter]) -> None:
    """Makes the phase `reduction` begin when the last gradient of these parameters is complete in a backward pass."""
    expected = list(parameters)
    arrived = 0

    def count(_: torch.Tensor) -> None:
        nonlocal arrived
        arrived += 1
        if arrived % len(expected) == 0 and _open is not None:
            _open.mark("reduction")

    for parameter in expected:
        parameter.register_post_accumulate_grad_hook(count)


class Profile:
    """The phases of one rank. Open as a context manager around the loop, one at a time in a process."""

    def __init__(self, directory: Path, *, rank: int, device: torch.device) -> None:
        """`directory` is created when there is something to write."""
        self._directory, self._rank, self._device = directory, rank, device
        self._thread = threading.get_ident()
        self._begun_steps = 0
        self._steps: list[list[tuple[str, Any]]] = []
        """For each timed step its marks: the phase that begins, and when."""
        self._tracer: torch.profiler.profile | None = None
        self._annotation: torch.profiler.record_function | None = None
        self.is_complete = False

    def __enter__(self) -> Profile:
        global _open
        assert _open is None
        _open = self
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _open
        _open = None
        self._stop_tracing()

    def enter(self, name: str) -> None:
        """See `phase`."""
        if name == "data":
            self._begin_step()
        self.mark(name)
        if self._tracer is not None and threading.get_ident() == self._thread:
            self._annotate(PHASES.get(name, name))

    def mark(self, name: str) -> None:
        """Begins a phase in the table but not in the trace."""
        if SKIPPED_STEPS < self._begun_steps <= SKIPPED_STEPS + TIMED_STEPS:
            self._steps[-1].append((name, self._now()))

    def milliseconds(self) -> list[dict[str, float]]:
        """The duration of each phase of each timed step, complete ones alone. On a GPU it waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [self._durations(marks, ends) for marks, (ends, *_) in zip(self._steps, self._steps[1:], strict=False)]

    def _begin_step(self) -> None:
        self._begun_steps += 1
        timed = self._begun_steps - SKIPPED_STEPS
        if 0 < timed <= TIMED_STEPS:
            self._steps.append([])
        elif timed == TIMED_STEPS + 1:
            self._steps.append([("data", self._now())])  # the end of the last one
            self._start_tracing()
        elif self._tracer is not None:
            self._annotate(None)
            self._tracer.step()
            if timed > TIMED_STEPS + 1 + TRACED_STEPS:
                self._stop_tracing()
                self.is_complete = True

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _durations(self, marks: list[tuple[str, Any]], end: tuple[str, Any]) -> dict[str, float]:
        durations: dict[str, float] = {}
        for (name, start), (_, stop) in zip(marks, [*marks[1:], end], strict=True):
            seconds = start.elapsed_time(stop) / 1e3 if self._device.type == "cuda" else stop - start
            durations[name] = durations.get(name, 0.0) + 1e3 * seconds
        return durations

    # --- the trace -----------------------------------------------------------------------------------------------

    def _start_tracing(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs on every rank that it starts and stops
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=self._write_trace,
        )
        self._tracer.start()

    def _write_trace(self, tracer: torch.profiler.profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        tracer.export_chrome_trace(str(self._directory / trace_name(self._rank)))

    def _stop_tracing(self) -> None:
        self._annotate(None)
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer = None

    def _annotate(self, label: str | None) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if label is not None:
            self._annotation = torch.profiler.record_function(label)
            self._annotation.__enter__()


def trace_name(rank: int) -> str:
    """Name of the file with a rank's trace, which chrome://tracing and Perfetto open."""
    return f"rank_{rank}.trace.json.gz"


def summarize(ranks: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The content of `profile/summary.json`, computed from `Profile.milliseconds` of every rank.

    `timed_steps`; `milliseconds_per_step`: mean over ranks of the mean over steps, and `_min`, `_max` over steps of the
    mean over ranks; `phases`: for each of `PHASES` that occurred `milliseconds` (mean over ranks of the mean over
    steps), `share` of the step, `slowest_rank` and `slowest_milliseconds` (the mean over steps on that rank). The
    milliseconds of the phases add up to those of the step.
    """
    names = [name for name in PHASES if any(name in step for steps in ranks for step in steps)]
    means = [
        {name: statistics.fmean(step.get(name, 0.0) for step in steps) if steps else 0.0 for name in names}
        for steps in ranks
    ]
    totals = [
        statistics.fmean(sum(step.get(name, 0.0) for name in names) for step in together)
        for together in zip(*ranks, strict=True)
    ]
    whole = statistics.fmean(sum(mean.values()) for mean in means)
    phases = {}
    for name in names:
        slowest = max(range(len(means)), key=[mean[name] for mean in means].__getitem__)
        milliseconds = statistics.fmean(mean[name] for mean in means)
        phases[name] = {
            "milliseconds": milliseconds,
            "share": milliseconds / whole,
            "slowest_rank": slowest,
            "slowest_milliseconds": means[slowest][name],
        }
    return {
        "timed_steps": len(totals),
        "milliseconds_per_step": whole,
        "milliseconds_per_step_min": min(totals, default=0.0),
        "milliseconds_per_step_max": max(totals, default=0.0),
        "phases": phases,
    }


def lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, text) of the printed table."""
    rows = []
    for name, label in PHASES.items():
        if name in summary["phases"]:
            row = summary["phases"][name]
            text = f"{row['milliseconds']:8.2f} ms {row['share']:6.1%}"
            if summary["world_size"] > 1:
                text += f"   most on rank {row['slowest_rank']}: {row['slowest_milliseconds']:.2f} ms"
            rows.append((label, text))
    low, high = summary["milliseconds_per_step_min"], summary["milliseconds_per_step_max"]
    text = (
        f"{summary['milliseconds_per_step']:8.2f} ms ({low:.2f} to {high:.2f}), mean of {summary['timed_steps']} steps"
    )
    rows.append(("a step", text))
    if "reduction" not in summary["phases"] and summary["world_size"] > 1:
        rows.append(("", f"{summary['strategy']}: the reduction is part of forward and backward"))
    return rows
