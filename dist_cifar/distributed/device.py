"""Which device a rank computes on.

Contract: every command asks here. torch is imported when a device is chosen or GPUs are counted, not before.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dist_cifar.distributed.accelerate_env import forces_cpu
from dist_cifar.distributed.cores import bind_near
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    import torch


def visible_gpus(setting: str) -> int:
    """Number of GPUs that ranks of this process may use with `run.device=setting`; 0 where they compute on the CPU."""
    if setting == "cpu" or (setting == "auto" and forces_cpu(os.environ)):
        return 0
    import torch

    return torch.cuda.device_count() if setting == "cuda" or torch.cuda.is_available() else 0


def sees_only_its_own(env: DistEnv, gpus: int) -> bool:
    """Whether each of several ranks of this node is shown one GPU: it is then number 0 for every rank.

    It is each one's own, as `srun --gpus-per-task=1` has it; the communicator refuses ranks that share one.
    """
    return gpus == 1 and env.local_world_size > 1


def bind_to_cores_near(device: torch.device) -> None:
    """Binds this process to the cores of its GPU's NUMA node, from which memory and the GPU are reached sooner."""
    if device.type == "cuda":
        import torch

        gpu: Any = torch.cuda.get_device_properties(device)  # its type names no place
        bind_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")


def choose_device(setting: str, env: DistEnv) -> torch.device:
    """The device of this rank for `run.device=setting`. Raises `ConfigError` or `LaunchError` if it has none."""
    gpus = visible_gpus(setting)
    import torch

    if gpus == 0:
        if setting == "cuda":
            raise ConfigError("run.device: cuda was set and torch finds no GPU; set run.device=cpu, or fix the driver")
        return torch.device("cpu")
    index = 0 if sees_only_its_own(env, gpus) else env.local_rank
    if index >= gpus:
        raise LaunchError(
            f"launch: {env.local_world_size} ranks on this node and {gpus} GPUs; start one rank for each GPU, or set"
            " run.device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
