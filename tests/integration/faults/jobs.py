"""Jobs of real rank processes, to be killed, stopped and corrupted.

Contract: `Jobs.start(world_size, *argv)` runs `dist_cifar.cli.main(argv)` on every rank, each in a process of its own,
forked from a zygote (`zygote.py`) that has imported everything: a job starts in a fraction of a second. The processes
are as good as launched ones: they can be killed (`Job.kill`), stopped (`Job.stop`) and looked at, and they have their
own standard output and error (`Job.stdout`, `Job.stderr`: text so far).

Ranks meet in the store of rank 0, which dies with it. With `agent=True` (the default) this process serves another one
at MASTER_PORT, as torchrun's agent does, and the ranks have torchrun's variables; with `agent=False` nobody is there.

What must happen inside a rank (an exception at a step, a flipped bit) is injected: `inject={rank: [name, *arguments]}`
names a function in `injections.py`, which the rank calls before it starts.

    job = jobs.start(3, "train", "--config", path, "run.timeout_seconds=5", inject={1: ["raise_at", 4]})
    job.wait_for_step(2)          # until metrics.jsonl of run.dir has a row of that step; fails if the job ends first
    job.kill(1)                   # SIGKILL; job.stop(1) is SIGSTOP, job.go_on(1) SIGCONT
    codes = job.wait(30)          # exit codes by rank, -9 for a rank that SIGKILL ended; AssertionError if one lives on
    job.left_over()               # process ids of ranks still alive

`Jobs.close` ends all that still runs; so does the end of this process, however it comes.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from tests import REPOSITORY

START_SECONDS = 300.0
"""How long a job that nothing disturbs may take, on a busy machine."""
VOLATILE = {
    "seconds",
    "images_per_second",
    "images_per_second_per_rank",
    "data_wait_share",
    "rank_work_share",
    "straggler_ratio",
    "memory_bytes",
}
"""What a row of metrics says of the machine, which a run may not have in common with another one."""


class End(NamedTuple):
    """How and when (monotonic clock) a process ended."""

    code: int
    time: float


class Job:
    """One job; see the module."""

    def __init__(self, pids: list[int], outputs: list[Path], run_dir: Path, ended: dict[int, End], store: Any) -> None:
        self.pids = pids
        """Process ids, by rank."""
        self.run_dir = run_dir
        self._outputs, self._ended, self._store = outputs, ended, store

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        os.kill(self.pids[rank], signal.SIGKILL)

    def stop(self, rank: int) -> None:
        """SIGSTOP."""
        os.kill(self.pids[rank], signal.SIGSTOP)

    def go_on(self, rank: int) -> None:
        """SIGCONT."""
        os.kill(self.pids[rank], signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM to every rank, as a launcher or a batch system sends it."""
        for pid in self.left_over():
            os.kill(pid, signal.SIGTERM)

    def stdout(self, rank: int) -> str:
        return self._outputs[rank].with_suffix(".out").read_text()

    def stderr(self, rank: int) -> str:
        return self._outputs[rank].with_suffix(".err").read_text()

    def errors(self, rank: int) -> list[str]:
        """The lines of the program's own errors on standard error."""
        return [line for line in self.stderr(rank).splitlines() if line.startswith("dist_cifar: error: ")]

    def left_over(self) -> list[int]:
        """Processes that have not ended."""
        return [pid for pid in self.pids if pid not in self._ended]

    def wait(self, timeout_seconds: float) -> list[int]:
        """The exit codes of all ranks; AssertionError if one has not ended by then."""
        deadline = time.monotonic() + timeout_seconds
        while self.left_over() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self.left_over(), f"alive after {timeout_seconds} s: {self.left_over()} of {self.pids}\n{self}"
        return [self._ended[pid].code for pid in self.pids]

    def seconds_between_ends(self) -> float:
        """How much longer than the first one the last rank lived; all have ended."""
        times = [self._ended[pid].time for pid in self.pids]
        return max(times) - min(times)

    def wait_for_step(self, step: int) -> None:
        """Until `metrics.jsonl` has a row of this step or a later one."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.left_over():
            try:
                rows = (self.run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
            except FileNotFoundError:
                rows = []
            if rows and json.loads(rows[-1])["step"] >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"no step {step} in {self.run_dir}\n{self}")

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    def __repr__(self) -> str:
        parts = [f"rank {i}:\n{self.stdout(i)[-1500:]}{self.stderr(i)[-3000:]}" for i in range(len(self.pids))]
        return "\n".join(parts)


class Jobs:
    """The zygote, and the jobs that it has started. One thread at a time may use it."""

    def __init__(self, directory: Path) -> None:
        """`directory` takes the ranks' outputs."""
        self._directory, self._count = directory, 0
        self._ended: dict[int, End] = {}
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._zygote: subprocess.Popen[str] | None = None

    def start(
        self,
        world_size: int,
        *argv: object,
        env: Mapping[str, str] | None = None,
        inject: Mapping[int, Sequence[Any]] | None = None,
        agent: bool = True,
        cwd: Sequence[Path] | None = None,
    ) -> Job:
        """`argv` is that of the command line; the `run.dir=...` in it is what the job's methods look into.

        `cwd` has a directory for each rank to be started in; a relative `run.dir` is meant from that of rank 0.
        """
        directories = cwd or [REPOSITORY] * world_size
        arguments = [str(argument) for argument in argv]
        named = next(argument for argument in reversed(arguments) if argument.startswith("run.dir="))
        run_dir = directories[0] / named.removeprefix("run.dir=")
        self._count += 1
        store, port = None, _free_port()
        if agent:
            store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            port = store.port
        outputs = [self._directory / f"{self._count}-{rank}" for rank in range(world_size)]
        pids = []
        for rank in range(world_size):
            place = {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            agents = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"} if agent else {}
            request = {
                "argv": arguments,
                "env": {name: str(value) for name, value in place.items()} | agents | dict(env or {}),
                "cwd": str(directories[rank]),
                "stdout": str(outputs[rank].with_suffix(".out")),
                "stderr": str(outputs[rank].with_suffix(".err")),
                "inject": list((inject or {}).get(rank, [])),
            }
            pids.append(self._ask(request)["pid"])
        return Job(pids, outputs, run_dir, self._ended, store)

    def close(self) -> None:
        """Kills the zygote, and with it every rank."""
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
            self._reader.join()
            for stream in (self._zygote.stdin, self._zygote.stdout):
                if stream is not None:
                    stream.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._zygote is None:
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.faults.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
            )
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            assert self._answers.get(timeout=START_SECONDS) == {"ready": True}
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return self._answers.get(timeout=START_SECONDS)

    def _read(self) -> None:
        assert self._zygote is not None and self._zygote.stdout is not None
        for line in self._zygote.stdout:
            answer = json.loads(line)
            if "ended" in answer:
                self._ended[answer["ended"]] = End(answer["code"], time.monotonic())
            else:
                self._answers.put(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
