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
from dist_cifar.run.run_files import is_count, is_text, read_lines
from dist_cifar.tracking.base import Results


def encode(row: Mapping[str, Any]) -> str:
    """The row as one line of JSON, without the newline."""
    return json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False)


def rows_until(path: Path, step: int) -> dict[tuple[str, int], tuple[str, dict[str, Any]]]:
    """The lines of a file up to and including `step`, each as text and as a row, by (kind, step), the first of each.

    Lines that hold no row are left out.
    """
    rows: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    for line, row in read_lines(path):
        if row is not None and is_text(row.get("kind")) and is_count(row.get("step")) and row["step"] <= step:
            rows.setdefault((row["kind"], row["step"]), (line, row))
    return rows


class JsonlTracker:
    """Appends rows to `path`. `resume_step` is the step from which the run resumes; with `None` the file is emptied."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = {} if resume_step is None else rows_until(path, resume_step)
        write_atomic(path, "".join(f"{line}\n" for line, _ in kept.values()))
        self._kept = kept
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The rows that were there before the resume, up to its step."""
        return [row for _, row in self._kept.values()]

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
