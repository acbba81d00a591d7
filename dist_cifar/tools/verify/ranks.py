"""The rank processes of a segment, and the files that they write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dist_cifar import stopping
from dist_cifar.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_USAGE, TrainingError
from dist_cifar.tools.verify.compare import Row, parse_row
from dist_cifar.tools.verify.plan import Trial


class Ranks:
    """The ranks of a segment that this agent has started. Leaving the `with` kills those that still run."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Starts a rank in a session of its own, where Ctrl-C does not reach it; it dies with this process."""
        with open(log, "wb") as file:
            self._processes[rank] = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=stopping.die_with_launcher,
            )

    def ended(self) -> dict[int, int]:
        """Maps the ranks that have ended by themselves to their exit codes; a negative one is a signal."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def kill(self) -> None:
        """Kills all ranks at once, and waits until none is left."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Tail:
    """The rows of a file while it grows. A line counts once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.rows: list[Row] = []

    def read(self) -> list[Row]:
        """Reads what is new; returns all rows so far."""
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            self.rows += [parse_row(line) for line in whole.splitlines()]
        return self.rows


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def log_path(directory: Path, trial: Trial, index: int, rank: int) -> Path:
    """The file that takes what a rank prints; `index` is that of the segment."""
    return directory / f"{trial.directory}.segment-{index}.rank-{rank}.log"


def segment_failure(directory: Path, trial: Trial, index: int, ended: Mapping[int, int]) -> TrainingError:
    """The error for a segment in which ranks ended by themselves: with rank 0's message, or another's if it has none.

    `ended` maps ranks to exit codes, in the order in which they ended.
    """
    segment = trial.segments[index]
    lines = {
        rank: log_path(directory, trial, index, rank).read_text(encoding="utf-8", errors="replace").splitlines()
        for rank in range(segment.world_size)
    }
    prefix = "dist_cifar: error: "
    errors = [line.removeprefix(prefix) for rank in lines for line in lines[rank] if line.startswith(prefix)]
    rank, code = next(iter(ended.items()))
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    if errors:
        reason = errors[0]
    elif code > 0 and lines[rank]:
        reason = lines[rank][-1]  # the last line of a traceback
    else:
        reason = "no rank says why; their logs are kept"
    error = TrainingError(
        f"verify: {trial.name}: rank {rank} of {segment.world_size} {how} before step {segment.until_step}: {reason}"
    )
    error.exit_code = code if code in (EXIT_USAGE, EXIT_DATA) else EXIT_INTERNAL
    return error
