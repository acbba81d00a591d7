"""The run directory: the files that a run writes, its lock and its status.

Contract: `config.yaml` is the resolved config of the latest start, `status.json` says `running`, `saved`, `done` or
`failed` and is always whole, `metrics.jsonl`, `summary.json` and `predictions.npz` hold the results, `events.jsonl` the
history, `checkpoints/` all that a resume needs. Only rank 0 writes, except that any rank may record a failure in
`status.json`. One job at a time: rank 0 holds the directory's lock, which ends with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_cifar import config as configuration
from dist_cifar.config import Config
from dist_cifar.distributed.processes import was_alive_at
from dist_cifar.errors import ConfigError, DataError, LaunchError, UserError, nearest, nearest_path
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.run_files import (
    EVENTS,
    PROFILE,
    ROWS,
    STATUS,
    SUMMARY,
    read_bytes,
    read_object,
    read_records,
)
from dist_cifar.stopping import at_once

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

    @contextmanager
    def lock(self, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Creates the directory and keeps other jobs out of it for a `with` block.

        Waits for a job that uses it, and logs that; raises `LaunchError`, which names that job, if it does not leave.
        Where locks cannot be trusted (there are none, or two at a time), it logs a warning, and a living job is seen
        from what it writes. Raises `DataError` if the directory cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            with at_once():
                why = self._wait_for_lock(descriptor, wait_seconds)
                if why is not None:
                    logger.info(f"warning: {self.path} cannot be locked ({why}): another job is seen only if it writes")
                    self._wait_for_silence(wait_seconds)
            self.open()
            facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(facts).encode(), 0)
            yield
        finally:
            os.close(descriptor)  # and with it the lock

    def _wait_for_lock(self, descriptor: int, wait_seconds: float) -> str | None:
        """Takes the lock; returns None, or why there is no such thing on this file system."""
        deadline = time.monotonic() + wait_seconds
        waits = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return "two locks at a time succeed" if not self._is_locked() else None
            except BlockingIOError:
                holder = _holder(descriptor)
            except OSError as error:
                return error.strerror
            if time.monotonic() > deadline:
                raise self._in_use(holder)
            if not waits:
                logger.info(f"waiting up to {wait_seconds:g} s for {holder} to leave {self.path}")
                waits = True
            time.sleep(0.1)

    def _wait_for_silence(self, wait_seconds: float) -> None:
        """Raises `LaunchError` if the job that `status.json` names as running is alive: its process on this host, or,
        of another one, if it writes while one waits."""
        try:
            status = self.status()
        except DataError:
            return
        if status.get("status") != "running" or status.get("pid") == os.getpid():
            return
        holder = f"another job (host {status.get('host')}, pid {status.get('pid')})"
        if status.get("host") == socket.gethostname():
            if was_alive_at(status.get("pid", 0), status.get("time", 0.0)):
                raise self._in_use(holder)
            return
        logger.info(f"waiting {wait_seconds:g} s to see whether {holder} still writes to {self.path}")
        before = self._silence_seconds()
        time.sleep(wait_seconds)
        if self._silence_seconds() < before + wait_seconds / 2:
            raise self._in_use(holder)

    def _in_use(self, holder: str) -> LaunchError:
        return LaunchError(
            f"run.dir={self.path}: {holder} is using it; stop that job, or give another run directory with run.dir=PATH"
        )

    def open(self) -> None:
        """Creates the directory. Raises `DataError` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{secrets.token_hex(4)}"
            write_atomic(probe, "")
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"run.dir={self.path}: cannot be written ({error.strerror}); give another with run.dir=PATH")

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
            return self.config()
        except UserError:
            return None

    def write_status(self, status: str, **details: Any) -> None:
        """Writes `status.json`."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "path": os.path.realpath(self.path)}
        facts = {"status": status, **details, **me, "time": time.time()}
        write_atomic(self._status, json.dumps(facts, indent=2) + "\n")

    def write_failure(self, job: tuple[str, int], rank: int | None, reason: str) -> None:
        """Records that a rank failed (None: it is unknown which). Any rank may call it, and several do.

        `job` is host and process id of the job's rank 0. Nothing is written if `status.json` is another job's, or if it
        already has how this one ended: the first failure counts.
        """
        self._write_end(job, "failed", rank=rank, reason=reason)

    def write_stop(self, job: tuple[str, int], step: int | None) -> None:
        """Records that a signal stopped the job where it had nothing to save, as `write_failure` records a failure.

        That is in the final test, after `step`, or before its first step: None.
        """
        self._write_end(job, "saved", **({} if step is None else {"step": step}))

    def _write_end(self, job: tuple[str, int], end: str, **facts: Any) -> None:
        status = self.status()
        if status.get("status") == "running" and (status.get("host"), status.get("pid")) == job:
            status = {**status, "status": end, **facts, "time": time.time()}
            write_atomic(self._status, json.dumps(status, indent=2) + "\n")
            self.append_event(end, **{"step": status.get("step"), **facts})

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
        return read_object(self._status, STATUS)

    def copied_from(self) -> str | None:
        """The run directory of which this one is a copy; None if it is where it was, or was moved.

        `status.json` names the directory in which it was written. What lies there has the same history, if it is the
        original.
        """
        try:
            there = self.status().get("path")
            if there is None or not is_run(Path(there)) or os.path.samefile(there, self.path):
                return None
            begins = [run_dir.events()[0][:1] for run_dir in (self, RunDir(there))]
        except (DataError, OSError, ValueError):
            return None
        return str(there) if begins[0] and begins[0] == begins[1] else None

    def is_lost(self) -> bool:
        """Whether `status.json` says `running` although the job has died: nobody holds its lock. Raises `DataError`."""
        if self.status().get("status") != "running" or self._is_locked():
            return False
        status = self.status()  # again: a job that has just ended wrote it before it released the lock
        is_seen = status.get("host") == socket.gethostname() or self._silence_seconds() > _SILENCE_SECONDS
        return status.get("status") == "running" and is_seen

    def _silence_seconds(self) -> float:
        """How long ago a file of the run was written to; files may be replaced meanwhile."""
        written = 0.0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path):
                with contextlib.suppress(OSError):
                    if entry.is_file():
                        written = max(written, entry.stat().st_mtime)
        return time.time() - written

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

    def events(self) -> tuple[list[dict[str, Any]], int]:
        """The events, oldest first, and the number of lines of `events.jsonl` that are none. Raises `DataError`."""
        return read_records(self.path / "events.jsonl", "event", EVENTS)

    def metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The rows, and the number of lines of `metrics.jsonl` that are none. Raises `DataError`."""
        return read_records(self.path / "metrics.jsonl", "kind", ROWS)

    def config(self) -> Config:
        """The config of the latest start. Raises `ConfigError` or `DataError`."""
        if read_bytes(self._config) is None:
            raise ConfigError(f"{self.path}: no training has begun here, there is no {self._config.name}; train first")
        return configuration.load_written_config(self._config)

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; empty if there is none. Raises `DataError`."""
        found = read_object(self._summary, SUMMARY)
        if found and len(found["test_class_accuracy"]) != len(found["test_confusion"]):
            raise DataError(
                f"{self._summary}: test_class_accuracy and test_confusion are of other classes; move it away"
            )
        return found

    def profile_summary(self) -> dict[str, Any]:
        """The content of `profile/summary.json`; empty if there is none. Raises `DataError`."""
        return read_object(self.profile / "summary.json", PROFILE)


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


def where_it_lies(config: Config, file: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a run directory's own `config.yaml` names the directory as it was called when it was written: this
    one, where the run lies now, unless `overrides` name another."""
    if file is None or file.name != "config.yaml" or not is_run(file.parent):
        return config
    if any(override.startswith("run.dir=") for override in overrides) or not (file.parent / "events.jsonl").exists():
        return config
    written = RunDir.of(config).path
    if os.path.realpath(written) == os.path.realpath(file.parent):
        return config
    logger.warning(f"warning: {file}: the run of {written} was moved or copied; it continues in {file.parent}")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(file.parent)))


def is_run(path: Path) -> bool:
    """Whether `path` is a directory to which a training has begun to write."""
    return (path / "checkpoints").is_dir()


def latest_run(folder: Path) -> Path:
    """The run directory in `folder` with a checkpoint whose status was written last. Raises `ConfigError`."""
    runs = {path.parent.parent for path in folder.glob("*/checkpoints/step-*")}
    written = {path: (path / "status.json").stat().st_mtime for path in runs if (path / "status.json").exists()}
    if not written:
        raise ConfigError(f"there is no run with a checkpoint in {folder}/; train one, or name one: --checkpoint RUN")
    return max(written, key=written.__getitem__)


def _holder(descriptor: int) -> str:
    """The job that holds a lock file, according to the file."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["time"]))
        return f"another job (host {holder['host']}, pid {holder['pid']}, since {since})"
    except (OSError, ValueError, LookupError, TypeError):  # it has only just started
        return "another job"
