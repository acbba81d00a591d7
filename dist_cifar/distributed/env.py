"""Reads what the launcher said: torchrun's and Accelerate's variables, or those of a SLURM step.

Contract: a process that was started as one of several never takes itself for the only one. Variables that are there in
part or contradict each other raise `LaunchError` with their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_cifar.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class DistEnv:
    """This process's place in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank within the node."""
    local_world_size: int = 1
    """Ranks on this node."""
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """Where rank 0 listens; 0 when there is one rank."""
    launcher: str = "none"
    """`torchrun` (also Accelerate's and everything that speaks its variables), `slurm` or `none`."""

    def variables(self) -> dict[str, str]:
        """The same as torchrun's variables, for the libraries that read them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def read_env(environ: Mapping[str, str]) -> DistEnv:
    """The place that `environ` describes. Raises `LaunchError`."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        env = _from_torchrun(environ)
    elif "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env = _from_slurm(environ)
    elif "MASTER_ADDR" in environ or "MASTER_PORT" in environ:
        # `accelerate launch --cpu --num_processes 2` starts one process and leaves only these two behind.
        raise LaunchError(
            "launch: MASTER_ADDR and MASTER_PORT are set but RANK and WORLD_SIZE are not: several ranks were asked for"
            " and one process was started; use torchrun, or accelerate launch with --config_file"
            " launch/accelerate/cpu.yaml"
        )
    else:
        env = DistEnv()
    if not 0 <= env.local_rank <= env.rank < env.world_size:
        raise LaunchError(
            f"launch: RANK={env.rank} LOCAL_RANK={env.local_rank} WORLD_SIZE={env.world_size} contradict each other"
            f" (launcher: {env.launcher}); 0 <= LOCAL_RANK <= RANK < WORLD_SIZE must hold"
        )
    return env


def _from_torchrun(environ: Mapping[str, str]) -> DistEnv:
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    if environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in environ]
    if missing:
        present = [name for name in needed if name in environ]
        raise LaunchError(
            f"launch: {', '.join(present)} set but {', '.join(missing)} missing; start with torchrun or accelerate,"
            " or unset them all to run alone"
        )
    world_size = _number(environ, "WORLD_SIZE")
    return DistEnv(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world_size,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0,
        launcher="torchrun",
    )


def _from_slurm(environ: Mapping[str, str]) -> DistEnv:
    needed = [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_JOB_ID",
    ]
    missing = [name for name in needed if name not in environ]
    if missing:
        raise LaunchError(
            f"launch: this is a step of {environ['SLURM_STEP_NUM_TASKS']} SLURM tasks but"
            f" {', '.join(missing)} missing; start with srun, or with torchrun in one task a node"
        )
    tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return DistEnv(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[_number(environ, "SLURM_NODEID")],
        master_addr=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        # Below the ephemeral ports, and another one for each job and step of a shared node.
        master_port=int(
            environ.get("MASTER_PORT")
            or 10000 + (_number(environ, "SLURM_JOB_ID") * 7 + _number(environ, "SLURM_STEP_ID")) % 20000
        ),
        launcher="slurm",
    )


def available_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def first_host(nodelist: str) -> str:
    """The first host of a SLURM host list: `n[03-05,9]-ib,x` gives `n03-ib`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise LaunchError(f"launch: SLURM_STEP_NODELIST={nodelist!r} is not a host list")
    return "".join(part or "" for part in match.groups())


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` gives [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise LaunchError(f"launch: SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of counts")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"launch: {name}={environ[name]!r} is not a whole number") from None
