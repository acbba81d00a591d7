"""Records what a result depends on besides the config and the data: arithmetic, versions, hardware, source.

Contract: `make_deterministic` makes torch choose the same kernels every time, and `numerics_fingerprint` names
everything that makes it choose others. Two runs with equal configs, equal data and equal fingerprints have equal bits
in strategy `exact`. The code of a package is identified by its version; whoever edits it in place is trusted to know
what that does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import dist_cifar
from dist_cifar.config import Config, flatten, own_files
from dist_cifar.distributed.cores import available_cores
from dist_cifar.distributed.process_env import pin_cublas_workspace

_SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR")
"""Environment variables that choose the instructions of CPU kernels."""

_GPU_SWITCHES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_CUDNN_V8_API_DISABLED",
)
"""Those that choose the kernels of a GPU."""

_EXTENSIONS = ("avx", "amx", "fma", "sve", "asimd")
"""Vector extensions, by which kernel libraries choose."""


def choose_kernels(device: torch.device, *, bitwise: bool) -> None:
    """Makes this process use deterministic kernels where bits are promised, and else those that cuDNN finds fastest."""
    if bitwise:
        make_deterministic(device)
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def make_deterministic(device: torch.device) -> None:
    """Makes this process use deterministic kernels only. CPU kernels always are, at one number of threads.

    Call it before the first use of cuBLAS. Source: torch's notes on reproducibility.
    """
    if device.type == "cuda":
        pin_cublas_workspace(os.environ)
        torch.use_deterministic_algorithms(True)
        # It would cost a pass over each new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
        torch.backends.cudnn.benchmark = False  # it would choose by the clock


def numerics_fingerprint(device: torch.device) -> dict[str, str | int]:
    """Everything that decides how `device` rounds in this process, as JSON: name to value."""
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
            "triton": installed_version("triton") or "",
            **{name: os.environ.get(name, "") for name in _GPU_SWITCHES},
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
    """The value of one of these keys for the first processor in Linux's `/proc/cpuinfo`; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition("\t")[0] in keys), "")


def hardware() -> str:
    """The processor's name and how many cores this process may use. Family and model are added to a name without a
    number, such as a hypervisor's "AMD EPYC", which may stand for processors of different speeds."""
    name = _processor("model name") or platform.processor() or platform.machine()
    family, model = _processor("cpu family"), _processor("model")
    if family and not any(letter.isdigit() for letter in name):
        name += f" (family {family}, model {model})"
    return f"{name}, {available_cores()} cores"


def versions() -> dict[str, str]:
    """The versions of the packages that the result depends on."""
    packages = ("torchvision", "accelerate", "numpy", "pillow")
    ours = {"dist_cifar": dist_cifar.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {name: importlib.metadata.version(name) for name in packages}


_OF_EACH_RANK = ("data.root", "data.url", "data.cache_dir", "data.stage_dir", "run.device", "run.threads_per_rank")
"""Fields that may differ between the ranks of a job: where each finds the data, whose content is compared when it is
read, and what it computes on, which the communicator and strategy `exact` compare."""


def shared_facts(config: Config) -> dict[str, object]:
    """What must be the same on every rank of a training, by name: the config, the packages, the code."""
    facts = {key: value for key, value in flatten(config).items() if key not in _OF_EACH_RANK}
    optional = {name: installed_version(name) for name in ("numba", "triton", "deepspeed")}
    packages = {f"the version of {name}": version for name, version in (versions() | optional).items()}
    own = {f"the SHA-256 of {name}": known for name, known in own_files(config).items()}
    return facts | packages | own | {"the SHA-256 of the code of dist_cifar": _code_sha256()}


def _code_sha256() -> str:
    """The hash of all modules of this package: a checkout may have another code under the same version."""
    root = Path(dist_cifar.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def installed_version(package: str) -> str | None:
    """The version of a package, which is not imported; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the source, with `-dirty` if it was changed; None unless git tracks the source.

    A package that is installed in a folder of another project is not part of its history.
    """
    try:
        _git("ls-files", "--error-unmatch", "--", "__init__.py")
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _git(*arguments: str) -> str:
    """What git says about the source."""
    folder = Path(dist_cifar.__file__).parent
    return subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the architecture and vector capability of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
