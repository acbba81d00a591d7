"""What came out of a verification: the rows of digests of each trial, how they compare, and the table.

Contract: pure functions. Two rows are equal if every tensor and every total has the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_cifar.config import Config, own_components
from dist_cifar.errors import TrainingError
from dist_cifar.tools.verify.plan import Trial

_NAMES_SHOWN = 5
"""Tensors that an error names."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The state after one step."""

    step: int
    values: Mapping[str, str]
    """Maps the name of a tensor, or `total NAME`, to text that stands for its bits."""


def parse_row(line: bytes | str) -> Row:
    """Parses a line of `digests.jsonl`. Totals become text, so that a NaN equals itself."""
    fields = json.loads(line)
    totals = {f"total {name}": repr(value) for name, value in fields["totals"].items()}
    return Row(step=fields["step"], values=fields["digests"] | totals)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first step that is not the same in all trials."""

    step: int
    names: dict[str, list[str]]
    """Maps the name of each trial that differs from the first to what differs, or to nothing if it lacks the step."""


def first_difference(runs: Mapping[str, Sequence[Row]], steps: int) -> Difference | None:
    """Compares every row of steps 1 to `steps` with the first row of that step in the first of `runs`.

    A run may have several rows of a step, which it repeated after a resume: all must be equal.
    """
    found: dict[str, dict[int, list[Mapping[str, str]]]] = {}
    for name, rows in runs.items():
        found[name] = {}
        for row in rows:
            found[name].setdefault(row.step, []).append(row.values)
    first = next(iter(found))
    for step in range(1, steps + 1):
        if step not in found[first]:
            return Difference(step=step, names={first: []})
        expected = found[first][step][0]
        different: dict[str, list[str]] = {}
        for name, by_step in found.items():
            rows_of_step = by_step.get(step, [])
            names = {
                key
                for values in rows_of_step
                for key in expected.keys() | values.keys()
                if expected.get(key) != values.get(key)
            }
            if names or not rows_of_step:
                different[name] = sorted(names)
        if different:
            return Difference(step=step, names=different)
    return None


def describe(difference: Difference, first: str) -> str:
    """Describes the difference in a line; `first` is the trial that the others are compared with."""
    parts = []
    for trial, names in difference.names.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        other = f"from {first}" if trial != first else "from itself"
        listed = ", ".join(names[:_NAMES_SHOWN])
        parts.append(f"{trial} differs {other} in {listed}{more}" if names else f"{trial} has no digests of it")
    return f"step {difference.step}: {'; '.join(parts)}"


def own_hint(config: Config) -> str:
    """Why components of the user's own may differ between numbers of ranks; empty where the config names none."""
    own = [f"{section}.{field}={name}" for _, section, field, name in own_components(config)]
    if not own:
        return ""
    return (
        f"; {', '.join(own)}: what a forward pass or a step draws from Python's or numpy's generators, keeps in Python"
        " attributes or reads from the clock or a file is not the same on every number of ranks: draw from torch, keep"
        " it in buffers"
    )


def state_digest(rows: Sequence[Row], step: int) -> str:
    """16 hex digits that stand for the whole state after `step`; empty if the rows lack that step."""
    values = next((row.values for row in rows if row.step == step), None)
    return "" if values is None else hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def require_resumed(trial: Trial, segments: Sequence[Sequence[Row]], steps: int) -> None:
    """Raises `TrainingError` if a later segment of `trial` did not resume, or has no step that is compared."""
    for segment, rows in zip(trial.segments, segments, strict=True):
        if rows is not segments[0] and rows[0].step == 1:
            raise TrainingError(
                f"{trial.name}: {segment.world_size} ranks began at step 1 and had a checkpoint to resume"
            )
        if rows[0].step > steps:
            raise TrainingError(
                f"{trial.name}: the {segment.world_size} ranks began at step {rows[0].step}, after the {steps} steps"
                " that are compared: steps are too quick to be stopped in time; give more with --steps"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial's line of the table and of the JSON."""

    name: str
    world_sizes: list[int]
    steps: int
    """How many steps were compared, in every row."""
    replayed_steps: int
    """How many of them were repeated after a resume."""
    seconds: float
    digest: str
    equal: bool


def outcome(trial: Trial, rows: Sequence[Row], first: Sequence[Row], *, steps: int, seconds: float) -> Outcome:
    """Compares the rows of a trial with those of the first trial."""
    compared = Counter(row.step for row in rows if row.step <= steps)
    return Outcome(
        name=trial.name,
        world_sizes=[segment.world_size for segment in trial.segments],
        steps=len(compared),
        replayed_steps=sum(count - 1 for count in compared.values()),
        seconds=round(seconds, 1),
        digest=state_digest(rows, steps),
        equal=first_difference({"first": first, trial.name: rows}, steps) is None,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The table of all trials."""
    width = max(len("trial"), *(len(row.name) for row in outcomes))
    lines = [f"{'trial':<{width}}  {'steps':>6}  {'replayed':>8}  {'seconds':>8}  {'last digest':<16}  equal"]
    for row in outcomes:
        lines.append(
            f"{row.name:<{width}}  {row.steps:>6}  {row.replayed_steps:>8}  {row.seconds:>8.1f}  {row.digest:<16}"
            f"  {'yes' if row.equal else 'NO'}"
        )
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, *lines, rule])


def machine_line(numerics: Mapping[str, Any]) -> str:
    """What to compare when two machines have different digests, without the long list of vector extensions."""
    return "machine: " + ", ".join(
        f"{name}={value}" for name, value in numerics.items() if value != "" and name != "extensions"
    )
