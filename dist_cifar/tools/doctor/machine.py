"""Checks of one process and its host: packages, GPUs, limits and signals."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from dist_cifar.config import Config
from dist_cifar.distributed.cores import available_cores
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import counted
from dist_cifar.run.provenance import installed_version
from dist_cifar.tools.doctor.findings import GIB, Finding, failed, graded, ok, size, warning
from dist_cifar.tools.slurm import CORES_OF_GPU

OLDEST = {"torch": (2, 11), "torchvision": (0, 26), "accelerate": (1, 10), "numpy": (2, 0), "safetensors": (0, 5)}
"""The oldest versions that are supported."""
OPTIONAL = ("deepspeed", "wandb", "onnxruntime")
"""Packages that some configs and commands need."""
_SHM_BYTES = GIB // 2, 64 * 2**20 + 1
"""Size of /dev/shm: less is a warning, less still a failure. NCCL needs some for each pair of GPUs, and 64 MiB is what
a container gets by default."""
_OPEN_FILES = 1024
_CORES_OF_GPU = 4, 1
"""Cores of a rank that computes on a GPU: less is a warning, less still a failure."""
_OTHERS_BYTES = GIB
"""Memory of a GPU that others may use before it is a warning."""


def needed_extras(config: Config) -> list[str]:
    """The optional packages that the config needs."""
    found = ["deepspeed"] if config.strategy.name == "deepspeed" else []
    return found + (["wandb"] if config.tracking.wandb in ("online", "offline") else [])


def check_versions(extras: Sequence[str] = ()) -> Finding:
    """Finds packages that are missing or older than supported; `extras` are optional ones that are needed."""
    found, old, absent = {"python": platform.python_version()}, [], []
    for name in (*OLDEST, *OPTIONAL):
        version = installed_version(name)
        if version is None:
            if name in OLDEST or name in extras:
                old.append(f"{name} is missing")
            else:
                absent.append(name)
            continue
        found[name] = version
        oldest = OLDEST.get(name, (0,))
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < oldest:
            old.append(f"{name} {version} is older than {'.'.join(map(str, oldest))}")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    text += f"; not installed, and not needed: {', '.join(absent)}" if absent else ""
    packages = f"'.[{','.join(extras)}]'" if extras else "."
    hint = f"pip install -U -e {packages}"
    return failed("versions", f"{'; '.join(old)} ({text})", hint) if old else ok("versions", text)


def check_gpus(device: torch.device) -> Finding:
    """Finds the GPUs that this process sees, and whether they reach each other's memory."""
    count = torch.cuda.device_count()
    if count == 0:
        if device.type == "cpu" and shutil.which("nvidia-smi") is None:
            return ok("GPUs", "none; ranks compute on the CPU")
        return warning("GPUs", "nvidia-smi is here and torch finds none", "fix the driver, or set run.device=cpu")
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(count)))
    lonely = [f"{i}-{j}" for i in range(count) for j in range(i) if not torch.cuda.can_device_access_peer(i, j)]
    text = f"{count} x {names}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if total - free - torch.cuda.memory_reserved(device) > _OTHERS_BYTES:
            used = f"{size(total - free)} of {size(total)} of number {device.index} are in use before the start"
            return warning("GPUs", f"{text}; {used}", "see nvidia-smi for who else computes there")
    if lonely:
        return warning("GPUs", f"{text}; no peer access between {', '.join(lonely)}", "see nvidia-smi topo -m")
    return ok("GPUs", f"{text}, each reaches the memory of the others" if count > 1 else text)


def check_cores(device: torch.device, env: DistEnv) -> Finding:
    """Checks how many cores each rank of a GPU has: its loop, the backward pass, the batches and what NCCL runs are
    threads of one process, and a step is as fast as they start kernels."""
    cores = available_cores()
    each = cores / env.local_world_size
    text = f"{cores} for {counted(env.local_world_size, 'rank')} of this host"
    if device.type != "cuda":
        return ok("cores", text)
    hint = f"ask for more, e.g. sbatch --cpus-per-task={CORES_OF_GPU * env.local_world_size} of one torchrun a node"
    return graded("cores", f"{text}, {_CORES_OF_GPU[0]} a GPU wanted", hint, each, *_CORES_OF_GPU)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Checks the size of the file system in memory."""
    if not path.is_dir():
        return warning("shared memory", f"{path} is missing", "mount a tmpfs there")
    total = shutil.disk_usage(path).total
    hint = "give the container more, e.g. docker run --shm-size=8g"
    return graded("shared memory", f"{path}: {size(total)}, {size(_SHM_BYTES[0])} wanted", hint, total, *_SHM_BYTES)


def check_open_files() -> Finding:
    """Checks how many files a process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    return graded("open files", f"limit {soft:,}, {_OPEN_FILES:,} wanted", "ulimit -n 65536", count, _OPEN_FILES, 256)


def _record_signal(received: list[int], number: int, frame: object) -> None:
    received.append(number)


def check_signals() -> Finding:
    """Checks whether the signals that stop a run arrive in this process."""
    lost = []
    watched = signal.set_wakeup_fd(-1)  # what it sends to itself is not to end it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        received: list[int] = []
        before = signal.signal(number, partial(_record_signal, received))
        try:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 1
            while not received and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            signal.signal(number, before)
        lost += [] if received else [number.name]
    signal.set_wakeup_fd(watched, warn_on_full_buffer=False)
    if lost:
        return failed(
            "signals", f"{', '.join(lost)} blocked", "the process inherits that: look at what starts the ranks"
        )
    return ok("signals", "SIGTERM, SIGUSR1 and SIGINT arrive")
