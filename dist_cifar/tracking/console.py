"""Shows the progress of a run on rank 0: a bar when a person watches, plain lines in a job's log.

Contract: the package logs what a user should see with `logging`, at level INFO, in loggers below `dist_cifar`. A
`Console` prints those of rank 0 on standard output, beside the progress bar; the lines of other ranks are not shown.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from dist_cifar.errors import printable
from dist_cifar.terminal import coloured

ROOT_LOGGER = logging.getLogger("dist_cifar")


class Console:
    """Prints to standard output on the main process, and only there. Attached to the loggers while it is open."""

    def __init__(self, *, is_main_process: bool) -> None:
        self._is_main_process = is_main_process
        self._bar: Any = None
        self._handler = LineHandler(self.line)

    def __enter__(self) -> Console:
        self._outer = ROOT_LOGGER.handlers[:], ROOT_LOGGER.level, ROOT_LOGGER.propagate
        ROOT_LOGGER.handlers, ROOT_LOGGER.propagate = [self._handler], False
        ROOT_LOGGER.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        ROOT_LOGGER.handlers, ROOT_LOGGER.level, ROOT_LOGGER.propagate = self._outer

    def line(self, line: str) -> None:
        """Prints one line."""
        if self._is_main_process:
            line = coloured(printable(line), sys.stdout)
            self._bar.write(line, file=sys.stdout) if self._bar is not None else print(line, flush=True)

    def start(self, total_steps: int, step: int) -> None:
        """Shows the bar, from `step` on."""
        if self._is_main_process and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=step,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def advance(self) -> None:
        """Moves the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def row(self, row: Mapping[str, Any]) -> None:
        """Shows one row of metrics: as a line, or for a person, if it is of the training, beside the bar."""
        if self._bar is not None and row["kind"] == "train":
            self._bar.set_postfix_str(
                f"loss {_number(row['loss'], '.3f')} acc {_number(row['accuracy'], '.3f')} lr {row['lr']:.1e}"
                f" {row['images_per_second']:,.0f} images/s"
            )
        else:
            self.line(format_row(row))

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LineHandler(logging.Handler):
    """Hands each message to a function."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


def log_to_stream(stream: TextIO, prefix: str = "") -> None:
    """Shows the package's lines on `stream`, for a command that trains nothing."""
    ROOT_LOGGER.handlers = [
        LineHandler(lambda line: print(coloured(f"{prefix}{printable(line)}", stream), file=stream, flush=True))
    ]
    ROOT_LOGGER.propagate = False
    ROOT_LOGGER.setLevel(logging.INFO)


def format_row(row: Mapping[str, Any]) -> str:
    """A row of `metrics.jsonl` as one line."""
    line = f"{row['kind']:>5}  step {row['step']:>6}  epoch {row['epoch']:>7.2f}"
    line += f"  loss {_number(row.get('loss'), '.4f')}  accuracy {_number(row.get('accuracy'), '.4f')}"
    if row.get("accuracy_tta") is not None:
        line += f"  with TTA {_number(row['accuracy_tta'], '.4f')}"
    if row["kind"] == "train":
        line += f"  lr {row['lr']:.3e}  grad norm {_number(row.get('grad_norm'), '.3f')}"
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
