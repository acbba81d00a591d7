"""Variables of the environment, set for something else, with which the ranks of a job would not work, or not well.

Contract: called before torch, numpy and numba are imported, which read them. What cannot work is refused by name; what
is harmless to leave out is left out, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import LaunchError

logger = logging.getLogger(__name__)

_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""They bind the threads of a process to cores, counted from the first one: all ranks of a node to the same ones."""


def pin_cublas_workspace(environ: MutableMapping[str, str]) -> None:
    """Sets what makes cuBLAS deterministic, unless it is set. cuBLAS reads it once in the life of a process.

    Source: torch's notes on reproducibility.
    """
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prepare_environment(env: DistEnv, environ: MutableMapping[str, str]) -> None:
    """Refuses or leaves out what was set for other programs. Raises `LaunchError`."""
    if environ.get("NUMBA_DISABLE_JIT", "0").strip() not in ("", "0"):
        raise LaunchError(
            f"launch: NUMBA_DISABLE_JIT={environ['NUMBA_DISABLE_JIT']}: the kernels of this program are compiled by"
            " numba and cannot run without that; unset it"
        )
    binding = [name for name in _BINDING if environ.get(name, "false").lower() not in ("", "false", "none", "disabled")]
    if env.local_world_size > 1 and binding:
        for name in binding:
            del environ[name]
        logger.warning(
            "warning: %s would bind the %d ranks of a node to the same cores: ignored",
            ", ".join(binding),
            env.local_world_size,
        )
