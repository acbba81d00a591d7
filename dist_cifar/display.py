"""What rank 0 shows: a progress bar when a person watches, plain lines in a job's log, nothing from other ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm


class Display:
    """Prints to standard output on the rank that `speaks`, and only there."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._bar: tqdm[Any] | None = None

    def say(self, line: str) -> None:
        """One line."""
        if self._speaks:
            tqdm.write(line, file=sys.stdout) if self._bar is not None else print(line, flush=True)

    def start(self, total_steps: int, step: int) -> None:
        """The training begins at `step`."""
        if self._speaks and sys.stdout.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def stepped(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def row(self, row: Mapping[str, Any]) -> None:
        """One row of metrics: a line in a log, and for a person the bar shows the training's latest."""
        if self._bar is not None and row["kind"] == "train":
            self._bar.set_postfix_str(f"loss {row['loss']:.3f} acc {row['accuracy']:.3f} lr {row['lr']:.2e}")
        else:
            self.say(format_row(row))

    def stop(self) -> None:
        """The training is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_row(row: Mapping[str, Any]) -> str:
    """A row of `metrics.jsonl` as one line."""
    line = f"{row['kind']:>5}  step {row['step']:>6}  epoch {row['epoch']:>7.2f}"
    line += f"  loss {_number(row['loss'], '.4f')}  accuracy {_number(row['accuracy'], '.4f')}"
    if row["kind"] == "train":
        line += f"  lr {row['lr']:.3e}  grad norm {_number(row['grad_norm'], '.3f')}"
        line += f"  {row['images_per_second']:,.0f} images/s  data wait {row['data_wait_share']:.1%}"
        line += f"  skipped {row['skipped_steps']}" if row.get("skipped_steps") else ""
    return line


def _number(value: float | str | None, form: str) -> str:
    """A value that may be missing, of steps that were all skipped; read from a file, one may be the string "nan"."""
    return "-" if value is None else format(float(value), form)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, framed by a line above and below."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([rule, *lines, rule])
