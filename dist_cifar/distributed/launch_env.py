"""Reads a process's rank from the launcher's variables: torchrun's, which Accelerate, DeepSpeed's launcher, operators
of Kubernetes and templates of clusters set as well, and those of `launchers`.

Contract: a process that was started as one of several never takes itself for the only one. Values of several launchers
that agree are accepted and complete each other. Variables of which some are missing or that contradict each other raise
`LaunchError` with their names. An empty variable counts as none. This package is the only one that knows which
variables tell a process its rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dist_cifar.distributed import launchers
from dist_cifar.distributed.accelerate_env import USE_CPU
from dist_cifar.distributed.launchers import Place, number, require
from dist_cifar.errors import LaunchError

logger = logging.getLogger(__name__)

_LOWEST_PORT, _PORTS = 10000, 20000
"""Derived ports: below those that kernels give to outgoing connections."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A rank's variables, as torchrun sets them."""
_AGENT = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
"""What the agents of torchrun and DeepSpeed set beside them."""
_BY_AGENT = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "CROSS_RANK")
"""Each tells that RANK and the others were set by an agent for this process."""
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "PET_", *launchers.PREFIXES)
"""Other variables of launchers."""
_SECRET = "DIST_CIFAR_SECRET"
"""A word that the ranks of a job know and others do not; without it the job's key follows from its number."""


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
    """The node of rank 0; loopback if all ranks are on one node, which then needs no name service."""
    master_port: int = 0
    """The job's port, as libraries know it; 0 when there is one rank. The rendezvous uses one of `candidate_ports`."""
    launcher: str = "none"
    """`torchrun` (and all who set its variables, such as Accelerate), `mpi`, `flux`, `slurm` or `none`."""
    job: str = ""
    """Key of the job: equal on all its ranks, different for each job, step and start that the launcher numbers."""

    @property
    def has_several_nodes(self) -> bool:
        """Whether some ranks are on other nodes than this one."""
        return self.local_world_size < self.world_size

    def variables(self, *, gpu: int | None = None) -> dict[str, str]:
        """The same as torchrun's variables, for the libraries that read them.

        Accelerate and DeepSpeed take LOCAL_RANK for the number of this rank's GPU, which it is not where each rank is
        shown one alone; so with `gpu` it is that number.
        """
        local_rank = self.local_rank if gpu is None else gpu
        values = self.rank, self.world_size, local_rank, self.local_world_size, self.master_addr, self.master_port
        return dict(zip(_TORCHRUN, map(str, values), strict=True))


def read_env(environ: Mapping[str, str]) -> DistEnv:
    """The rank and the job that `environ` describes. Raises `LaunchError`."""
    environ = {name: value for name, value in environ.items() if value}
    by_agent = any(name in environ for name in _BY_AGENT)
    place = None if by_agent else launchers.find_place(environ)
    if by_agent or _has_own_ranks(environ, place):
        env = _from_torchrun(environ)
    elif place is not None:
        _refuse_disagreement(environ, place)
        env = _from_place(environ, place)
    elif environ.get("WORLD_SIZE") == "1" and "RANK" not in environ:
        env = DistEnv()  # a template that says so
    elif "RANK" in environ or "WORLD_SIZE" in environ:
        env = _from_torchrun(environ)
    else:
        _refuse_one_of_several(environ)
        env = DistEnv()
    _check(env, environ)
    if not env.has_several_nodes:
        env = dataclasses.replace(env, master_addr="127.0.0.1")
    if env.world_size > 1 and _SECRET in environ:
        key = f"{environ[_SECRET]}\0{env.job}".encode()
        env = dataclasses.replace(env, job=f"secret {hashlib.sha256(key).hexdigest()}")
    return env


def _check(env: DistEnv, environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for numbers that cannot be, and for ranks that would not find or not know each other."""
    if not (
        0 <= env.local_rank <= env.rank < env.world_size and env.local_rank < env.local_world_size <= env.world_size
    ):
        raise LaunchError(
            f"launch: RANK={env.rank} LOCAL_RANK={env.local_rank} LOCAL_WORLD_SIZE={env.local_world_size}"
            f" WORLD_SIZE={env.world_size} contradict each other (launcher: {env.launcher});"
            " 0 <= LOCAL_RANK <= RANK < WORLD_SIZE and LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE must hold"
        )
    is_loopback = env.master_addr in ("localhost", "::1") or env.master_addr.startswith("127.")
    # Operators of Kubernetes give loopback to the pod of rank 0 alone.
    if env.has_several_nodes and is_loopback and not (env.rank == 0 and _is_pod(environ)):
        raise LaunchError(
            f"launch: MASTER_ADDR={env.master_addr} is this node alone, and {env.world_size} ranks of which"
            f" {env.local_world_size} are here are on several nodes; set it to the name or address of rank 0's node"
        )
    for name in launchers.SIZES:
        if env.world_size == 1 and name in environ and (tasks := number(environ, name)) > 1:
            raise LaunchError(
                f"launch: {name}={tasks}, and {'WORLD_SIZE=1' if 'WORLD_SIZE' in environ else 'another launcher'} says"
                f" that this process is alone: {tasks} would train without each other; start the ranks with one"
                f" launcher, or unset {name} if they are to train alone"
            )


def _refuse_one_of_several(environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for a process without a rank where several were asked for."""
    if "MASTER_ADDR" in environ or "MASTER_PORT" in environ:
        # `accelerate launch --cpu --num_processes 2` starts one process and leaves only these two behind.
        raise LaunchError(
            "launch: MASTER_ADDR and MASTER_PORT are set but RANK and WORLD_SIZE are not: several ranks were asked for"
            " and one process was started; use torchrun, or accelerate launch with --config_file"
            " launch/accelerate/cpu.yaml"
        )
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        if environ.get(name, "1") != "1":
            raise LaunchError(
                f"launch: {name}={environ[name]} is set for torchrun and this process was started without it; put"
                f" torchrun before the command, or unset {name} to run alone"
            )


def refuse_lone_task(environ: Mapping[str, str], *, wall_time: float | None = None) -> None:
    """Raises `LaunchError` for a process without a launcher in the shell of a SLURM job of several tasks.

    It would train alone. Only for commands whose process is a rank: `verify` starts its ranks itself. In a shell that
    has outlived its job it is alone, and a warning says so. `wall_time` is the time now in seconds since 1970.
    """
    environ = {name: value for name, value in environ.items() if value}
    if read_env(environ).launcher != "none" or "SLURM_JOB_ID" not in environ or launchers.is_step(environ):
        return
    nodes = number(environ, "SLURM_JOB_NUM_NODES") if "SLURM_JOB_NUM_NODES" in environ else 1
    if "SLURM_NTASKS" in environ:
        asked, tasks = "SLURM_NTASKS", number(environ, "SLURM_NTASKS")
    elif "SLURM_NTASKS_PER_NODE" in environ:
        asked, tasks = "SLURM_NTASKS_PER_NODE", nodes * number(environ, "SLURM_NTASKS_PER_NODE")
    else:
        asked, tasks = "SLURM_JOB_NUM_NODES", nodes
    if tasks <= 1:
        return
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal() and int(end) < (time.time() if wall_time is None else wall_time):
        logger.warning(
            "warning: SLURM_JOB_ID=%s has ended (SLURM_JOB_END_TIME is past) and its variables are still set; this"
            " process trains alone",
            environ["SLURM_JOB_ID"],
        )
        return
    raise LaunchError(
        f"launch: {asked}={environ[asked]}: this job has {tasks} tasks and this process was started without srun; put"
        f" srun before the command (or torchrun), or unset {asked} to run alone"
    )


def starts_ranks(environ: Mapping[str, str], ranks: int) -> bool:
    """Whether a process that was asked for so many ranks is to start them: it is none itself.

    Raises `LaunchError` if it is a rank of another number of them.
    """
    env = read_env(environ)
    if env.launcher != "none" and env.world_size != ranks:
        raise LaunchError(
            f"launch: --ranks {ranks} was given and a launcher has started {env.world_size} (launcher: {env.launcher});"
            " leave the option out, or the launcher"
        )
    return env.launcher == "none"


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
    return next((environ[name] for name in ("RANK", *launchers.RANKS) if environ.get(name)), "0")


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


# --- torchrun's variables ------------------------------------------------------------------------------------------


def _has_own_ranks(environ: Mapping[str, str], place: Place | None) -> bool:
    """Whether a script inside a launcher's process has started ranks of its own, and told them all of their place."""
    is_complete = all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return is_complete and place is not None and environ["WORLD_SIZE"] not in ("1", str(place.world_size))


def _is_pod(environ: Mapping[str, str]) -> bool:
    return "KUBERNETES_SERVICE_HOST" in environ


def _local_place(environ: Mapping[str, str]) -> tuple[int, int]:
    """The rank within the node and the number of ranks there, which some who set RANK leave out."""
    rank, world_size = number(environ, "RANK"), number(environ, "WORLD_SIZE")
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    if "LOCAL_RANK" not in environ and local_size is None and world_size > 1:
        is_here = environ["MASTER_ADDR"] == "localhost" or environ["MASTER_ADDR"].startswith("127.")
        return (rank, world_size) if is_here and not _is_pod(environ) else (0, 1)  # a container for each rank
    if "LOCAL_RANK" not in environ and (world_size == 1 or environ.get(local_size or "") == "1"):
        return 0, 1
    require(environ, ["RANK", "WORLD_SIZE", "LOCAL_RANK"], "start with torchrun or accelerate, or unset them all")
    local_rank = number(environ, "LOCAL_RANK")
    if local_size is not None:
        return local_rank, number(environ, local_size)
    if local_rank != rank:
        raise LaunchError(
            f"launch: RANK={rank} and LOCAL_RANK={local_rank}, so there are several nodes, and LOCAL_WORLD_SIZE is"
            " missing; set it to the number of ranks of this node"
        )
    return local_rank, world_size


def _from_torchrun(environ: Mapping[str, str]) -> DistEnv:
    needed = ["RANK", "WORLD_SIZE"]
    if environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    require(environ, needed, "start with torchrun or accelerate, or unset them all to run alone")
    is_one_group = environ.get("GROUP_WORLD_SIZE") == "1"
    for name in launchers.SIZES:
        if is_one_group and name in environ and (tasks := number(environ, name)) > 1:
            raise LaunchError(
                f"launch: {name}={tasks} and GROUP_WORLD_SIZE=1: {tasks} torchruns were started that do not know each"
                f" other; give each --nnodes {tasks} --rdzv-backend c10d --rdzv-endpoint HOST:PORT, or leave torchrun"
                f" out, or unset {name} if they are to train alone"
            )
    local_rank, local_world_size = _local_place(environ)
    job = f"{environ.get('TORCHELASTIC_RUN_ID', '')}:{environ.get('MASTER_PORT', '')}"
    if is_one_group:  # on several nodes each agent counts its own restarts
        job += f":{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return DistEnv(
        rank=number(environ, "RANK"),
        world_size=number(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0,
        launcher="torchrun",
        job=job,
    )


# --- other launchers' places ---------------------------------------------------------------------------------------


def _refuse_disagreement(environ: Mapping[str, str], place: Place) -> None:
    """Raises `LaunchError` if torchrun's variables, which a script has exported, say other than the launcher's."""
    numbers = place.rank, place.world_size, place.local_rank, place.local_world_size
    for name, says, its_name in zip(_TORCHRUN, numbers, place.names, strict=False):
        if name in environ and number(environ, name) != says:
            raise LaunchError(
                f"launch: {name}={environ[name]} and {its_name}={environ.get(its_name, says)}, by which it is {says},"
                f" contradict each other; leave {name} to the launcher: unset it in the script"
            )


def _from_place(environ: Mapping[str, str], place: Place) -> DistEnv:
    if place.launcher == "none":
        return DistEnv()
    address = environ.get("MASTER_ADDR") or place.first_host
    if not address and place.local_world_size < place.world_size:
        _, size, _, local_size = place.names
        raise LaunchError(
            f"launch: {size}={place.world_size}, of which {local_size}={place.local_world_size} are on this node, and"
            " MASTER_ADDR is not set: ranks do not know where rank 0 is; start with MASTER_ADDR=(its node) mpirun -x"
            " MASTER_ADDR, or export it before another launcher"
        )
    port = environ.get("MASTER_PORT", "")
    return DistEnv(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        master_addr=address or "127.0.0.1",
        master_port=number(environ, "MASTER_PORT") if port else port_of(place.job),
        launcher=place.launcher,
        job=place.job if place.launcher == "slurm" else f"{place.job}:{port}",
    )


def port_of(job: str) -> int:
    """A port that another job or step of the same node is unlikely to have."""
    return _LOWEST_PORT + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % _PORTS


def candidate_ports(master_port: int, count: int = 8) -> list[int]:
    """Where rank 0 may listen: never `master_port`, which torchrun's agent holds itself."""
    seed = hashlib.sha256(f"dist_cifar {master_port}".encode()).digest()
    first, stride = int.from_bytes(seed[:4], "big"), 2 * int.from_bytes(seed[4:6], "big") + 1
    ports = [_LOWEST_PORT + (first + stride * i) % _PORTS for i in range(count + 1)]
    return [port for port in ports if port != master_port][:count]
