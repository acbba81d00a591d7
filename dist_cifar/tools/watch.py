"""Serves a live report of a run while it trains, on a page of this machine or in the terminal.

Contract: nothing is written, and the run knows nothing of it. The page is served on the loopback address alone.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_cifar.errors import EXIT_DONE, DataError, LaunchError, UserError, counted, one_line, printable
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools.report import Run, read_run, render
from dist_cifar.tools.report.formats import duration
from dist_cifar.tracking.console import format_row

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 2.0
_FILES = ("status.json", "metrics.jsonl", "events.jsonl", "summary.json", "config.yaml")
_BARS = "▁▂▃▄▅▆▇█"


def serve(paths: Sequence[Path], port: int) -> int:
    """Serves the page about the runs at `paths` until Ctrl-C. Raises `LaunchError` for a port that is not free."""
    try:
        server = make_server(paths, port)
    except OSError as error:
        raise LaunchError(
            f"watch: port {port} of 127.0.0.1 cannot be used ({error.strerror}); give another with --port, or 0"
        ) from None
    port = server.server_address[1]
    logger.info(
        f"http://127.0.0.1:{port}/ until Ctrl-C; from another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
    )
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return EXIT_DONE
    return EXIT_DONE


def make_server(paths: Sequence[Path], port: int) -> http.server.ThreadingHTTPServer:
    """A server of `/`, the page, and `/version`, which changes whenever the page would."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not is_own_host(self.headers.get("Host", "")):
                self._send(403, "text/plain", "this page is for this machine: open it as http://127.0.0.1")
                return
            try:
                if self.path == "/version":
                    self._send(200, "text/plain", version(paths))
                elif self.path == "/":
                    page = render([read_run(path) for path in paths], refresh_seconds=REFRESH_SECONDS)
                    self._send(200, "text/html", page)
                else:
                    self._send(404, "text/plain", "there is / and /version")
            except ConnectionError:
                raise
            except (UserError, OSError) as error:
                self._send(500, "text/plain", one_line(error))

        def _send(self, status: int, kind: str, text: str) -> None:
            data = text.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Keeps a line for each request, one every two seconds, out of the terminal."""

    return _Server(("127.0.0.1", port), Handler)


class _Server(http.server.ThreadingHTTPServer):
    """Keeps quiet about browsers that leave before they have read, and answers on in spite of whatever else fails."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, OSError):
            logger.warning(f"watch: a request failed: {type(error).__name__}: {one_line(error)}")


def is_own_host(host: str) -> bool:
    """Whether the `Host` that a browser asked for is a name of the loopback address.

    Another site may point a name of its own at 127.0.0.1, and its page would read this one as its own.
    """
    name = re.sub(r":[0-9]*$", "", host.strip().lower())
    return name in ("localhost", "127.0.0.1", "[::1]") or name.endswith(".localhost")


def version(paths: Sequence[Path]) -> str:
    """A text that changes when a file of one of the runs changes, or its job dies."""
    found = []
    for path in paths:
        lost = False
        with contextlib.suppress(DataError):  # the page says what is wrong
            lost = RunDir(path).is_lost()
        found.append("lost" if lost else "")
        for name in _FILES:
            try:
                status = (path / name).stat()
            except OSError:
                found.append("-")
            else:
                found.append(f"{status.st_mtime_ns}.{status.st_size}")
    return " ".join(found)


# --- the terminal ------------------------------------------------------------------------------------------------


def show(path: Path) -> int:
    """Shows the run in the terminal until it ends or Ctrl-C; once, where the output is no terminal."""
    try:
        while True:
            run = read_run(path)
            if not sys.stdout.isatty():
                print(screen(run, 100))
                return EXIT_DONE
            print("\033[H\033[2J" + screen(run, shutil.get_terminal_size().columns), flush=True)
            if run.status.get("status") != "running":
                return EXIT_DONE
            time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        return EXIT_DONE


def screen(run: Run, width: int) -> str:
    """The state of a run as text."""
    status = run.status.get("status", "not started")
    lines = [f"{run.name}  {status}  {run.path}"]
    if status == "failed":
        lines.append(f"reason: {run.status.get('reason')}")
    trained, evaluated = run.of_kind("train"), run.of_kind("eval")
    if run.starts:
        start = run.starts[-1]
        lines.append(f"{counted(start['world_size'], 'rank')} on {start['device']}, strategy {start['strategy']}")
        step = run.rows[-1]["step"] if run.rows else start["step"]
        lines.append(_progress(step, start["total_steps"], run.seconds_left, width))
    for title, rows, key in (
        ("training loss", trained, "loss"),
        ("eval accuracy", evaluated, "accuracy"),
        ("images/s", trained, "images_per_second"),
    ):
        values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if values:
            lines.append(f"{title:<14} {sparkline(values, max(10, width - 34))}  {values[-1]:,.4g}")
    lines += [format_row(row) for row in (*trained[-3:], *evaluated[-5:], *run.of_kind("test"))]
    lines += [f"note: {note}" for note in run.notes]
    return "\n".join(printable(line)[:width] for line in lines)


def _progress(step: int, total: int, seconds: float | None, width: int) -> str:
    share = min(1.0, step / total)
    cells = max(10, min(50, width - 60))
    bar = "#" * int(share * cells) + "." * (cells - int(share * cells))
    line = f"[{bar}] step {step:,} of {total:,}, {share:.0%}"
    return line if seconds is None else f"{line}, about {duration(seconds)} left"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` bars, each the mean of its share."""
    size = math.ceil(len(values) / width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(_BARS[int((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in means)
