"""Checks of the run directory and the disk that it is on."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import counted
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.checkpoint import CheckpointStore, weights_sha256
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools.doctor.findings import GIB, Finding, failed, graded, ok, severity, size

_FREE_BYTES = 5 * GIB, GIB // 2
"""Free space on the run directory's disk: less is a warning, less still a failure."""
_FSYNC_SECONDS = 0.1, 5.0
"""Time to write 1 MiB durably: more is a warning, more still a failure."""


def check_run_directory(path: Path) -> Finding:
    """Checks whether the run directory can be written, has room and makes what is written durable fast enough."""
    run_dir = RunDir(path)
    run_dir.open()
    free = shutil.disk_usage(path).free
    seconds = []
    with tempfile.TemporaryDirectory(dir=path, prefix=".doctor-") as folder:
        for i in range(5):
            started = time.perf_counter()
            write_atomic(Path(folder) / str(i), bytes(2**20))
            seconds.append(time.perf_counter() - started)
    sync = statistics.median(seconds)
    text = (
        f"{path}: {size(free)} free, {size(_FREE_BYTES[0])} wanted; 1 MiB is on the disk after {1000 * sync:.1f} ms,"
        f" {1000 * _FSYNC_SECONDS[0]:.0f} ms or less wanted"
    )
    by_room = graded("run directory", text, "make room, or give another run.dir", free, *_FREE_BYTES)
    hint = "checkpoints will take long: give a run.dir on a faster disk"
    by_speed = graded("run directory", text, hint, -sync, *(-limit for limit in _FSYNC_SECONDS))
    return max((by_room, by_speed), key=severity)


def check_checkpoint(path: Path) -> Finding:
    """Checks whether a checkpoint reads back as it was written."""
    if not os.access(path, os.W_OK):
        return failed("checkpoint", f"{path}: there is no directory to write one to", "see the line run directory")
    with tempfile.TemporaryDirectory(dir=path, prefix=".doctor-") as folder:
        store = CheckpointStore(
            Path(folder) / "checkpoints",
            keep_last=1,
            keep_best=1,
            keep_every_steps=None,
            on_write_error="raise",
        )
        tensors = {"weight": torch.randn(2**20)}
        started = time.perf_counter()
        store.begin_save(1, {"model": tensors}, {})
        store.wait(must_succeed=True)
        checkpoint = store.load_newest()
        seconds = time.perf_counter() - started
        if checkpoint is None or weights_sha256(checkpoint.tensors["model"]) != weights_sha256(tensors):
            return failed("checkpoint", f"{path}: does not read back as it was written", "give another run.dir")
    return ok("checkpoint", f"4 MiB written and read back, every byte, in {seconds:.2f} s")


def check_shared(communicator: Communicator, path: Path) -> Finding:
    """Checks whether all ranks see the same run directory. A collective."""
    token = communicator.broadcast(secrets.token_hex(8))
    name = path / f".doctor-{token}"
    error = ""
    if communicator.rank == 0:
        try:
            write_atomic(name, token)
        except OSError as caught:
            error = caught.strerror or str(caught)
    written = communicator.broadcast(error)
    deadline = time.monotonic() + 5  # a network file system may show a new name late
    while not written and not name.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = communicator.all_gather_object((socket.gethostname(), not written and name.exists()))
    if communicator.rank == 0 and not written:
        name.unlink()
    if written:
        return failed("run directory shared", f"{path}: cannot be written ({written})", "give another run.dir")
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        hint = "give a run.dir on a file system that all nodes share"
        return failed("run directory shared", f"{path}: {', '.join(blind)} do not see what rank 0 writes", hint)
    hosts = len({host for host, _ in seen})
    return ok(
        "run directory shared", f"{counted(len(seen), 'rank')} on {counted(hosts, 'host')}: all see what rank 0 writes"
    )
