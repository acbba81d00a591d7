"""`metrics.jsonl`: one JSON object a line, one line a row.

Contract: a row is in the file when `log` returns, and a process that is killed loses none (a machine that loses power
may). Floats are exact: the shortest decimal that reads back to the same float64. JSON has no word for non-finite
floats: they are the strings "nan", "inf" and "-inf", which `float()` reads back. After a resume at step s, the file
holds each (kind, step) once: what a dead process wrote beyond s is removed, and so is a line that it did not complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.tracking.base import Results


def encode(row: Mapping[str, Any]) -> str:
    """The row as one line of JSON, without the newline."""
    return json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False)


def decode(line: str) -> dict[str, Any]:
    """The row of a line that `encode` made."""
    return {name: _number(value) for name, value in json.loads(line).items()}


def rows_until(text: str, step: int) -> dict[tuple[str, int], str]:
    """The lines of `text` up to and including `step`, by (kind, step), the first of each; broken lines are left out."""
    lines: dict[tuple[str, int], str] = {}
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash, or the nothing after the last newline
            continue
        if row["step"] <= step:
            lines.setdefault((row["kind"], row["step"]), line)
    return lines


class JsonlTracker:
    """Appends rows to `path`. `resume_step` is the step from which the run resumes; with `None` the file is emptied."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept: dict[tuple[str, int], str] = {}
        if resume_step is not None and path.exists():
            # A machine that lost power may have left bytes that are no text; their lines are broken lines.
            kept = rows_until(path.read_text(encoding="utf-8", errors="replace"), resume_step)
        write_atomic(path, "".join(f"{line}\n" for line in kept.values()))
        self._kept = kept
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The rows that were there before the resume, up to its step."""
        return [decode(line) for line in self._kept.values()]

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends the row, unless the file had it before the resume (an evaluation done again at the same step)."""
        if (row["kind"], row["step"]) not in self._kept:
            self._file.write(encode(row) + "\n")
            self._file.flush()

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Closes the file. The summary is not a row: it has a file of its own."""
        self._file.close()


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def _number(value: Any) -> Any:
    """The inverse of `_jsonable` for the values of a row."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
