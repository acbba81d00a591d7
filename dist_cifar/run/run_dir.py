"""The run directory: the files that a run writes, its lock and its status.

Contract: `config.yaml` is the resolved config of the latest start, `status.json` says `running`, `saved`, `done` or
`failed` and is always whole, `metrics.jsonl`, `summary.json` and `predictions.npz` hold the results, `events.jsonl` the
history, `checkpoints/` all that a resume needs. Only rank 0 writes, except that any rank may record a failure in
`status.json`. One job at a time: rank 0 holds the directory's lock, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_cifar import config as configuration
from dist_cifar.config import Config
from dist_cifar.errors import ConfigError, DataError, LaunchError, nearest, nearest_path
from dist_cifar.run.atomic_io import write_atomic

logger = logging.getLogger(__name__)

_SILENCE_SECONDS = 600.0
"""A job on another host that holds no visible lock is considered dead after it has written nothing for this long: some
file systems do not show its lock."""
LOCK_SECONDS = 10.0
"""How long a job should wait for another one to leave the run directory: a requeued job may start while its predecessor
is still dying."""


class RunDir:
    """Paths and small files of one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.profile = self.path / "checkpoints", self.path / "profile"
        self.report = self.path / "report.html"
        self._config, self._status, self._summary = (
            self.path / name for name in ("config.yaml", "status.json", "summary.json")
        )

    @classmethod
    def of(cls, config: Config) -> RunDir:
        """The run directory that `config`, as `load_config` returns it, names."""
        assert config.run.dir is not None
        return cls(config.run.dir)

    def open(self) -> None:
        """Creates the directory. Raises `DataError` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise DataError(
                f"run.dir={self.path}: cannot be written ({error.strerror}); give another with run.dir=PATH"
            ) from None

    @contextmanager
    def lock(self, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Creates the directory and keeps other jobs out of it for a `with` block.

        Waits for a job that uses it, and logs that; raises `LaunchError`, which names that job, if it does not leave.
        Where the file system has no locks, it logs a warning and continues.
        """
        self.open()
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                self._wait_for_lock(descriptor, wait_seconds)
            except OSError as error:
                logger.info(
                    f"warning: {self.path} cannot be locked ({error.strerror}): make sure that no other job uses this"
                    " run directory"
                )
            else:
                facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(facts).encode(), 0)
            yield
        finally:
            os.close(descriptor)  # and with it the lock

    def _wait_for_lock(self, descriptor: int, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        waits = False
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"run.dir={self.path}: {holder} is using it; stop that job, or give another run directory with"
                    " run.dir=PATH"
                )
            if not waits:
                logger.info(f"waiting up to {wait_seconds:g} s for {holder} to leave {self.path}")
                waits = True
            time.sleep(0.1)

    def write_config(self, config: Config) -> None:
        """Saves the resolved config. A file of that name that a person wrote, or edited, is kept beside it."""
        if os.path.lexists(self._config) and not _is_own(self._config):
            kept = next(path for n in range(1, 10_000) if not os.path.lexists(path := _kept(self._config, n)))
            os.rename(self._config, kept)
            logger.info(f"warning: {self._config} was not written by this program: it is kept as {kept.name}")
        text = configuration.to_yaml(config)
        write_atomic(self._config, f"{_OWN}{_sha256(text)}\n{text}")

    def previous_config(self) -> Config | None:
        """The config that was saved last, or None if there is no readable one."""
        try:
            return configuration.load_config(self._config) if self._config.exists() else None
        except ConfigError:
            return None

    def write_status(self, status: str, **details: Any) -> None:
        """Writes `status.json`."""
        facts = {"status": status, **details, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_atomic(self._status, json.dumps(facts, indent=2) + "\n")

    def write_failure(self, job: tuple[str, int], rank: int | None, reason: str) -> None:
        """Records that a rank failed (None: it is unknown which). Any rank may call it, and several do.

        `job` is host and process id of the job's rank 0. Nothing is written if `status.json` is another job's, or if it
        already has how this one ended: the first failure counts.
        """
        status = self.status()
        if status.get("status") == "running" and (status.get("host"), status.get("pid")) == job:
            facts = {**status, "status": "failed", "rank": rank, "reason": reason, "time": time.time()}
            writer = f"-{socket.gethostname()}-{os.getpid()}"  # other ranks write theirs
            write_atomic(self._status, json.dumps(facts, indent=2) + "\n", writer=writer)
            self.append_event("failed", step=status.get("step"), rank=rank, reason=reason)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Saves the result of the run."""
        write_atomic(self._summary, json.dumps(summary, indent=2) + "\n")

    def write_profile(self, summary: Mapping[str, Any]) -> Path:
        """Saves the times of the phases of a step; returns the directory, which also holds the traces."""
        self.profile.mkdir(exist_ok=True)
        write_atomic(self.profile / "summary.json", json.dumps(summary, indent=2) + "\n")
        return self.profile

    def append_event(self, event: str, **facts: Any) -> None:
        """Adds one line to `events.jsonl`, the history that a resume does not rewrite.

        Events are `started`, `checkpoint`, `lr_reduction`, `saved`, `failed` and `done`, each with the time and most
        with the step.
        """
        line = json.dumps({"time": time.time(), "event": event, **facts}) + "\n"
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:  # one write: other ranks may append too
            file.write(line)

    def append_digests(self, row: Mapping[str, Any]) -> None:
        """Adds one line to `digests.jsonl`."""
        with open(self.path / "digests.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def status(self) -> dict[str, Any]:
        """The content of `status.json`; empty if there is none. Raises `DataError`."""
        return _object(self._status)

    def is_lost(self) -> bool:
        """Whether `status.json` says `running` although the job has died: nobody holds its lock."""
        if self.status().get("status") != "running" or self._is_locked():
            return False
        status = self.status()  # again: a job that has just ended wrote it before it released the lock
        files = [path for path in self.path.iterdir() if path.is_file()]
        silence = time.time() - max(path.stat().st_mtime for path in files)
        is_seen = status.get("host") == socket.gethostname() or silence > _SILENCE_SECONDS
        return status.get("status") == "running" and is_seen

    def _is_locked(self) -> bool:
        """Whether a job holds the lock; True also where that cannot be told."""
        try:
            with open(self.path / ".lock", "rb") as file:  # closing it releases the lock
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:  # held, or a file system without locks
            return True
        return False

    def events(self) -> list[dict[str, Any]]:
        """The lines of `events.jsonl`, oldest first."""
        return _rows(self.path / "events.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, as they were logged."""
        return _rows(self.path / "metrics.jsonl")

    def config(self) -> Config:
        """The config of the latest start. Raises `ConfigError`."""
        if not self._config.exists():
            raise ConfigError(f"{self.path}: no training has begun here, there is no {self._config.name}; train first")
        return configuration.load_config(self._config)

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; empty if there is none. Raises `DataError`."""
        return _object(self._summary)

    def profile_summary(self) -> dict[str, Any]:
        """The content of `profile/summary.json`; empty if there is none. Raises `DataError`."""
        return _object(self.profile / "summary.json")


_OWN = "# Written by dist_cifar, which replaces it at each start; SHA-256 of what follows: "


def _is_own(path: Path) -> bool:
    """Whether a file is as `write_config` left it."""
    try:
        first, _, text = path.read_bytes().decode().partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return not path.is_symlink() and first == _OWN + _sha256(text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(path: Path, number: int) -> Path:
    """`config.kept.yaml`, `config.kept-2.yaml` and so on."""
    return path.with_name(f"{path.stem}.kept{'' if number == 1 else f'-{number}'}{path.suffix}")


def require_run(path: Path) -> Path:
    """Returns `path` if it is a run directory; raises `ConfigError`, which names the nearest one, if it is not."""
    if is_run(path):
        return path
    raise ConfigError(f"{path}: this is no run directory; {_suggestion(path)}")


def _suggestion(path: Path) -> str:
    if path.name == "checkpoints" and is_run(path.parent):
        return f"did you mean {path.parent}?"
    inside = sorted(entry.name for entry in path.iterdir() if is_run(entry)) if path.is_dir() else []
    if inside:
        return f"it holds some, give one of them: {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}"
    parent = path.parent if path.parent.is_dir() else nearest_path(path.parent)
    for folder in (parent, Path("runs")):
        if folder is not None and folder.is_dir():
            name = nearest(path.name, [entry.name for entry in folder.iterdir() if is_run(entry)])
            if name is not None:
                return f"did you mean {folder / name}?"
    return "give the run.dir of a training"


def is_run(path: Path) -> bool:
    """Whether `path` is a directory to which a training has begun to write."""
    return (path / "checkpoints").is_dir()


def latest_run(folder: Path) -> Path:
    """The run directory in `folder` with a checkpoint whose status was written last. Raises `ConfigError`."""
    runs = [path for path in folder.iterdir() if is_run(path)] if folder.is_dir() else []
    written = {path: (path / "status.json").stat().st_mtime for path in runs if (path / "status.json").exists()}
    if not written:
        raise ConfigError(f"there is no run in {folder}/; train one, or say which with --checkpoint RUN")
    return max(written, key=written.__getitem__)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file. Raises `DataError` if it is damaged."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("not an object of JSON")
        return found
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, and run the training again") from None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines: the last one may be half written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _holder(descriptor: int) -> str:
    """The job that holds a lock file, according to the file."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["time"]))
        return f"another job (host {holder['host']}, pid {holder['pid']}, since {since})"
    except (OSError, ValueError, LookupError, TypeError):  # it has only just started
        return "another job"
