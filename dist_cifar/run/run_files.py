"""The one reader of the files of a run directory, which may be anything: half written, damaged, of another version.

Contract: what is returned has the shape that this version writes. A file that has not is a `DataError` of one line with
its path; a line of JSON lines that has not is skipped and counted. A file that is missing is empty. Only regular files
of at most `MAX_BYTES` are read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_cifar.errors import DataError

MAX_BYTES = 2**30
"""The size of the largest file that is read; the rows of a run of a million steps take half of it."""
_STALE_ATTEMPTS = 5
"""How often a file is opened that a network disk has replaced in the meantime."""

_NOT_FINITE = ("nan", "inf", "-inf")
"""The floats for which JSON has no word; rows hold them as strings."""

Check = Callable[[Any], bool]
"""Whether a value, None for a missing one, is what it should be."""
Shape = Mapping[str, Check]


# --- what values may be --------------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """True or False."""
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A whole number, 0 or more, that a float holds exactly."""
    return type(value) is int and 0 <= value <= 2**53


def is_positive(value: Any) -> bool:
    """A whole number, 1 or more."""
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """A number, which may be nan or infinite."""
    is_special = type(value) is float and not math.isfinite(value)  # of an int that no float holds it is an error
    return is_special or (type(value) in (int, float) and abs(value) <= 1e100)


def is_finite(value: Any) -> bool:
    """A number that is neither nan nor infinite."""
    return is_number(value) and math.isfinite(value)


def is_amount(value: Any) -> bool:
    """A finite number, 0 or more."""
    return is_finite(value) and value >= 0


def is_time(value: Any) -> bool:
    """Seconds since 1970, of a year that calendars have."""
    return is_finite(value) and -62_000_000_000 <= value <= 253_000_000_000


def optional(check: Check) -> Check:
    """What `check` wants, or nothing."""
    return lambda value: value is None or check(value)


def each(check: Check) -> Check:
    """A list of what `check` wants."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def by_name(check: Check) -> Check:
    """An object whose values are what `check` wants."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def is_confusion(value: Any) -> bool:
    """A table of counts with as many rows as columns, of at least one sample."""
    return (
        each(each(is_count))(value)
        and all(len(row) == len(value) for row in value)
        and 0 < sum(map(sum, value)) < 2**53
    )


def misfit(found: Mapping[str, Any], shape: Shape) -> str | None:
    """What is wrong with an object, e.g. `step is "x"`; None if it has the shape. Further keys are allowed."""
    for key, check in shape.items():
        if not check(found.get(key)):
            return f"{key} is {json.dumps(found[key])[:60]}" if key in found else f"{key} is missing"
    return None


# --- what files hold -----------------------------------------------------------------------------------------------


STATUS: Shape = {
    "status": is_text,
    "host": optional(is_text),
    "pid": optional(is_count),
    "path": optional(is_text),
    "time": optional(is_time),
    "step": optional(is_count),
}
SUMMARY: Shape = {
    "test_accuracy": is_finite,
    "test_loss": is_number,
    "test_accuracy_tta": optional(is_finite),
    "test_loss_tta": optional(is_number),
    "tta": optional(is_text),
    "tta_share": optional(is_finite),
    "test_class_accuracy": by_name(optional(is_finite)),
    "test_confusion": is_confusion,
    "best_val_accuracy": is_finite,
    "best_step": is_count,
    "best_chosen_on": is_text,
    "test_step": optional(is_count),
    "steps": is_positive,
    "epochs": is_amount,
    "wall_seconds": is_amount,
    "images_per_second": is_amount,
    "data_wait_share": is_amount,
    "world_size": is_positive,
    "weights_sha256": is_text,
    "versions": optional(by_name(is_text)),
    "numerics": optional(by_name(lambda value: is_text(value) or is_count(value))),
}
_PHASE: Shape = {
    "milliseconds": is_amount,
    "share": is_amount,
    "slowest_rank": is_count,
    "slowest_milliseconds": is_amount,
}
PROFILE: Shape = {
    "strategy": is_text,
    "world_size": is_positive,
    "timed_steps": is_count,
    "milliseconds_per_step": is_amount,
    "milliseconds_per_step_min": is_amount,
    "milliseconds_per_step_max": is_amount,
    "phases": by_name(lambda value: isinstance(value, dict) and misfit(value, _PHASE) is None),
}
_ROW: Shape = {"kind": is_text, "step": is_count, "epoch": is_amount, "samples": is_count, "seconds": is_amount}
_EVALUATION: Shape = {"loss": is_number, "accuracy": is_finite}
ROWS: Mapping[str, Shape] = {
    "train": {
        "loss": optional(is_number),
        "accuracy": optional(is_number),
        "lr": is_number,
        "grad_norm": optional(is_number),
        "images_per_second": is_amount,
        "data_wait_share": is_amount,
        "rank_work_share": optional(each(is_amount)),
        "skipped_steps": optional(is_count),
    },
    "eval": {**_EVALUATION, "split": is_text},
    "test": {**_EVALUATION, "accuracy_tta": optional(is_finite), "loss_tta": optional(is_number)},
}
"""What a row has by its kind, beside what every row has."""
_EVENT: Shape = {"event": is_text, "time": is_time}
EVENTS: Mapping[str, Shape] = {
    "started": {
        "step": is_count,
        "total_steps": is_positive,
        "steps_per_epoch": is_positive,
        "world_size": is_positive,
        "host": is_text,
        "device": is_text,
        "strategy": is_text,
    },
    "checkpoint": {"step": is_count, "best": is_flag},
    "lr_reduction": {"step": is_count, "lr": is_finite},
}
"""What an event has by its name, beside what every event has."""


# --- reading -------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes | None:
    """The content of a regular file; None if there is no such file."""
    for _ in range(_STALE_ATTEMPTS):
        try:
            return _content(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            found = error
            if error.errno != errno.ESTALE:
                break
    raise DataError(f"{path}: cannot be read ({found.strerror}); fix that, or move the file away") from None


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{path}: is not a regular file; move it away, a run writes a file there")
        if facts.st_size > MAX_BYTES:
            raise DataError(f"{path}: has {facts.st_size:,} bytes, more than a run writes; move it away")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    finally:
        os.close(descriptor)


def read_object(path: Path, shape: Shape) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no file."""
    data = read_bytes(path)
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        wrong: str | None = f"not JSON: {error}" if data else "it is empty"
    else:
        wrong = misfit(found, shape) if isinstance(found, dict) else "not an object of JSON"
    if wrong:
        raise DataError(
            f"{path}: not what this version writes ({wrong}); move it away, the end of a training writes it again"
        )
    assert isinstance(found, dict)
    return found


def read_lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """The whole lines of a file of JSON lines: each as text, and as the object that it holds, with its numbers.

    None stands for the object of a line that holds none. A last line without an end, which begins as an object does, is
    still being written.
    """
    found: list[tuple[str, dict[str, Any] | None]] = []
    lines = (read_bytes(path) or b"").decode(errors="replace").split("\n")
    for line in lines:
        if line.strip():
            found.append((line, _object(line)))
    is_begun = lines[-1].startswith("{") and found[-1][1] is None
    return found[:-1] if is_begun else found


def read_records(path: Path, key: str, shapes: Mapping[str, Shape]) -> tuple[list[dict[str, Any]], int]:
    """The records of a file of JSON lines, and the number of lines that are none.

    `key` is the name under which a record says what it is; `shapes` has the shape of each.
    """
    shape = _ROW if key == "kind" else _EVENT
    lines = read_lines(path)
    records = [
        record
        for _, record in lines
        if record is not None and misfit(record, shape) is None and misfit(record, shapes.get(record[key], {})) is None
    ]
    return records, len(lines) - len(records)


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if not any(f'"{name}"' in line for name in _NOT_FINITE):  # most rows of a long file
        return value
    return {name: _number(item) for name, item in value.items()}


def _number(value: Any) -> Any:
    """A value of a row, with its floats that are not finite."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value
