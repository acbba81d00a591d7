"""Reads the launcher's variables, in this order of trust: torchrun's, which Accelerate and DeepSpeed's launcher set as
well, Open MPI's, and those of a SLURM step.

Contract: a process that was started as one of several never takes itself for the only one. Variables of which some are
missing or that contradict each other raise `LaunchError` with their names. Nothing here looks at anything but the
variables. This module and `accelerate_env` are the only ones that know which variables tell a process its rank.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_cifar.distributed.accelerate_env import USE_CPU
from dist_cifar.errors import LaunchError

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers the shells of sbatch and salloc, which are steps of one task each, from here on."""
_LOWEST_PORT, _PORTS = 10000, 20000
"""Derived ports: below those that kernels give to outgoing connections."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A rank's variables, as torchrun sets them."""
_AGENT = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE")
"""What torchrun's agent sets beside them."""
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "OMPI_", "PMIX_")
"""Other variables of launchers."""
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Variables that hold the rank, in the order of trust."""


@dataclass(frozen=True, kw_only=True)
class DistEnv:
    """Rank and peers of this process in its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank within the node."""
    local_world_size: int = 1
    """Ranks on this node."""
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """The job's port, as libraries know it; 0 when there is one rank. The rendezvous uses one of `candidate_ports`."""
    launcher: str = "none"
    """`torchrun` (and every launcher that sets its variables, such as Accelerate's), `mpi`, `slurm` or `none`."""
    job: str = ""
    """Key of the job: equal on all its ranks, different for each job, step and start that the launcher numbers."""

    @property
    def has_several_nodes(self) -> bool:
        """Whether some ranks are on other nodes than this one."""
        return self.local_world_size < self.world_size

    def variables(self) -> dict[str, str]:
        """The same as torchrun's variables, for the libraries that read them."""
        values = self.rank, self.world_size, self.local_rank, self.local_world_size, self.master_addr, self.master_port
        return dict(zip(_TORCHRUN, map(str, values), strict=True))


def read_env(environ: Mapping[str, str]) -> DistEnv:
    """The rank and the job that `environ` describes. Raises `LaunchError`."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        env = _from_torchrun(environ)
    elif any(name in environ for name in _OPEN_MPI):
        env = _from_open_mpi(environ)
    elif _is_step(environ) and _step_tasks(environ) > 1:
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
    if not (
        0 <= env.local_rank <= env.rank < env.world_size and env.local_rank < env.local_world_size <= env.world_size
    ):
        raise LaunchError(
            f"launch: RANK={env.rank} LOCAL_RANK={env.local_rank} LOCAL_WORLD_SIZE={env.local_world_size}"
            f" WORLD_SIZE={env.world_size} contradict each other (launcher: {env.launcher});"
            " 0 <= LOCAL_RANK <= RANK < WORLD_SIZE and LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE must hold"
        )
    if env.has_several_nodes and (env.master_addr in ("localhost", "::1") or env.master_addr.startswith("127.")):
        raise LaunchError(
            f"launch: MASTER_ADDR={env.master_addr} is this node alone, and {env.world_size} ranks of which"
            f" {env.local_world_size} are here are on several nodes; set it to the name or address of rank 0's node"
        )
    return env


def refuse_lone_task(environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for a process without a launcher in the shell of a SLURM job of several tasks.

    It would train alone. Only for commands whose process is a rank: `verify` starts its ranks itself.
    """
    if read_env(environ).launcher != "none":
        return
    tasks = _number(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    if "SLURM_JOB_ID" in environ and not _is_step(environ) and tasks > 1:
        raise LaunchError(
            f"launch: SLURM_NTASKS={tasks}: this job has {tasks} tasks and this process was started without srun; put"
            " srun before the command (or torchrun), or unset SLURM_NTASKS to run alone"
        )


def check_local_rank(environ: Mapping[str, str], local_rank: int | None) -> None:
    """Raises `LaunchError` if `--local_rank`, which DeepSpeed's launcher adds to the command, is not LOCAL_RANK."""
    if local_rank is not None and environ.get("LOCAL_RANK") != str(local_rank):
        found = f"LOCAL_RANK={environ['LOCAL_RANK']}" if "LOCAL_RANK" in environ else "LOCAL_RANK is not set"
        raise LaunchError(
            f"launch: --local_rank={local_rank} was given and {found}; leave the option to DeepSpeed's launcher, which"
            " sets both"
        )


def launcher_rank(environ: Mapping[str, str]) -> str:
    """The rank as the launcher wrote it, unchecked; "0" without a launcher. Tells which process reports an error."""
    return next((environ[name] for name in _RANKS if environ.get(name)), "0")


def lone_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a child process that is no rank of this process's job."""
    return {
        name: value
        for name, value in environ.items()
        if name == USE_CPU or not (name.startswith(_PREFIXES) or name in (*_TORCHRUN, *_AGENT))
    }


def rank_environ(environ: Mapping[str, str], env: DistEnv) -> dict[str, str]:
    """`environ` for a child process that is the rank `env` of a job of its own."""
    return lone_environ(environ) | env.variables() | {"TORCHELASTIC_RUN_ID": env.job}


def _from_torchrun(environ: Mapping[str, str]) -> DistEnv:
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    if environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    _require(environ, needed, "start with torchrun or accelerate, or unset them all to run alone")
    is_one_group = environ.get("GROUP_WORLD_SIZE") == "1"
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if is_one_group and name in environ and (tasks := _number(environ, name)) > 1:
            raise LaunchError(
                f"launch: {name}={tasks} and GROUP_WORLD_SIZE=1: {tasks} torchruns were started that do not know each"
                f" other; give each --nnodes {tasks} --rdzv-backend c10d --rdzv-endpoint HOST:PORT, or leave torchrun"
                f" out, or unset {name} if they are to train alone"
            )
    world_size = _number(environ, "WORLD_SIZE")
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), "WORLD_SIZE")
    job = f"{environ.get('TORCHELASTIC_RUN_ID', '')}:{environ.get('MASTER_PORT', '')}"
    if is_one_group:  # on several nodes each agent counts its own restarts
        job += f":{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return DistEnv(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, local),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0,
        launcher="torchrun",
        job=job,
    )


_OPEN_MPI = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]


def _from_open_mpi(environ: Mapping[str, str]) -> DistEnv:
    _require(environ, _OPEN_MPI, "start with mpirun, or unset them all to run alone")
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in _OPEN_MPI)
    address = environ.get("MASTER_ADDR")
    if not address and local_world_size == world_size:
        address = "127.0.0.1"
    elif not address and "SLURM_JOB_NODELIST" in environ:
        address = first_host(environ["SLURM_JOB_NODELIST"])
    elif not address:
        raise LaunchError(
            f"launch: OMPI_COMM_WORLD_SIZE={world_size}, of which OMPI_COMM_WORLD_LOCAL_SIZE={local_world_size} are on"
            " this node, and MASTER_ADDR is not set: ranks do not know where rank 0 is; start with"
            " MASTER_ADDR=(its node) mpirun -x MASTER_ADDR"
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or ""
    if not job and "MASTER_PORT" not in environ and world_size > 1:
        raise LaunchError(
            "launch: OMPI_COMM_WORLD_SIZE is set but PMIX_NAMESPACE and OMPI_MCA_ess_base_jobid missing, which tell"
            " jobs apart; start with mpirun, or give a port of your own: MASTER_PORT=(number) mpirun -x MASTER_PORT"
        )
    return DistEnv(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=address,
        master_port=_port(environ, job),
        launcher="mpi",
        job=f"mpi {job}:{environ.get('MASTER_PORT', '')}",
    )


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process, and not only the shell above it."""
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _step_tasks(environ: Mapping[str, str]) -> int:
    _require(environ, ["SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"], "start with srun, or unset them all to run alone")
    return _number(environ, "SLURM_STEP_NUM_TASKS")


def _from_slurm(environ: Mapping[str, str]) -> DistEnv:
    needed = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"]
    needed += ["SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS"]
    _require(environ, needed, "start with srun, or with torchrun in one task a node")
    text = environ["SLURM_STEP_TASKS_PER_NODE"]
    tasks, node, world_size = _tasks_per_node(text), _number(environ, "SLURM_NODEID"), _step_tasks(environ)
    if sum(tasks) != world_size or not 0 <= node < len(tasks):
        raise LaunchError(
            f"launch: SLURM_STEP_NUM_TASKS={world_size}, SLURM_STEP_TASKS_PER_NODE={text} and SLURM_NODEID={node}"
            " contradict each other; start with srun, which sets them all"
        )
    job = ".".join([environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]])
    return DistEnv(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        master_addr=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        master_port=_port(environ, job),
        launcher="slurm",
        job=f"slurm {job}, start {environ.get('SLURM_RESTART_COUNT', '0')}",
    )


def _port(environ: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, or one that another job or step of the same node is unlikely to have."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    return _LOWEST_PORT + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % _PORTS


def candidate_ports(master_port: int, count: int = 8) -> list[int]:
    """Where rank 0 may listen: never `master_port`, which torchrun's agent holds itself."""
    seed = hashlib.sha256(f"dist_cifar {master_port}".encode()).digest()
    first, stride = int.from_bytes(seed[:4], "big"), 2 * int.from_bytes(seed[4:6], "big") + 1
    ports = [_LOWEST_PORT + (first + stride * i) % _PORTS for i in range(count + 1)]
    return [port for port in ports if port != master_port][:count]


def available_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def first_host(nodelist: str) -> str:
    """The first host of a SLURM host list: `n[03-05,9]-ib,x` gives `n03-ib`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise LaunchError(f"launch: SLURM's list of nodes {nodelist!r} is not a host list")
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


def _require(environ: Mapping[str, str], needed: Sequence[str], what_to_do: str) -> None:
    """Raises `LaunchError` if some of the variables are missing."""
    missing = [name for name in needed if name not in environ]
    if missing:
        present = [name for name in needed if name in environ]
        raise LaunchError(f"launch: {', '.join(present)} set but {', '.join(missing)} missing; {what_to_do}")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"launch: {name}={environ[name]!r} is not a whole number") from None
