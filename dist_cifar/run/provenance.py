"""What a result depends on beside the config and the data: the machine's arithmetic, versions, hardware, sources.

Contract: `make_deterministic` makes torch choose the same kernels every time, and `numerics_fingerprint` names
everything that makes it choose others. Two runs with equal configs, equal data and equal fingerprints have equal bits
in strategy `exact`. The code of a package is known by its version: whoever edits it is trusted to know what that does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import dist_cifar
from dist_cifar.distributed.launch_env import available_cores

_SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR")
"""Environment variables that choose the instructions of CPU kernels."""

_EXTENSIONS = ("avx", "amx", "fma", "sve", "asimd")
"""Vector extensions, by which kernel libraries choose."""


def make_deterministic(device: torch.device) -> None:
    """Deterministic kernels from now on, in this process. CPU kernels are, at one number of threads.

    Call it before the first use of cuBLAS. Source: torch's notes on reproducibility.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # A check that costs a pass over each tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
        torch.backends.cudnn.benchmark = False  # it would choose by the clock


def numerics_fingerprint(device: torch.device) -> dict[str, str | int]:
    """Name to value, as JSON returns it, of what decides how `device` rounds in this process."""
    facts: dict[str, str | int] = {
        "dist_cifar": dist_cifar.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if device.type == "cuda":
        return facts | {
            "device": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version() or 0,
            "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
            "tf32": f"{torch.backends.cuda.matmul.allow_tf32} {torch.backends.cudnn.allow_tf32}",
        }
    return facts | {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processor": _processor("model name") or platform.processor(),
        "extensions": " ".join(
            sorted(flag for flag in _processor("flags", "Features").split() if flag.startswith(_EXTENSIONS))
        ),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        **{name: os.environ.get(name, "") for name in _SWITCHES},
    }


def _processor(*keys: str) -> str:
    """What Linux says of the first processor under one of these keys; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition("\t")[0] in keys), "")


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    name = _processor("model name") or platform.processor() or platform.machine()
    return f"{name}, {available_cores()} cores"


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torchvision", "accelerate", "numpy", "pillow")
    ours = {"dist_cifar": dist_cifar.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {name: importlib.metadata.version(name) for name in packages}


def installed_version(package: str) -> str | None:
    """The version of a package, which is not imported; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Commit of the source, with `-dirty` where it was changed; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(dist_cifar.__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
