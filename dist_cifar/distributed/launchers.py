"""What the launchers of clusters tell a process of its place: Open MPI, MPICH and its kin, Flux and SLURM's srun.

Contract: `find_place` knows a process that one of them has started from one that none has. A place whose variables are
not all there is completed from those of SLURM where these say the same, or is refused with the names of what is
missing. torchrun's variables, which others set too, are read by `launch_env`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_cifar.distributed.processes import launcher_process
from dist_cifar.errors import LaunchError

_STEP_TASKS = "SLURM_STEP_NUM_TASKS"
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers the shells of sbatch and salloc, which are steps of one task each, from here on."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process's rank in its job, as a launcher says it."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    job: str
    """The launcher's own key of the job; empty if it has none."""
    first_host: str = ""
    """The node of rank 0, where that is known."""
    names: tuple[str, str, str, str]
    """The variables that hold the four numbers, in that order."""


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The names of one launcher's variables; of several names for one number the first that is set counts."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    command: str


def _world(name: str, prefix: str, job: tuple[str, ...], command: str) -> _Launcher:
    return _Launcher(
        name=name,
        rank=f"{prefix}RANK",
        size=f"{prefix}SIZE",
        local_rank=(f"{prefix}LOCAL_RANK",),
        local_size=(f"{prefix}LOCAL_SIZE",),
        job=job,
        command=command,
    )


_LAUNCHERS = (
    _world("mpi", "OMPI_COMM_WORLD_", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"), "mpirun"),
    _world("mpi", "JSM_NAMESPACE_", ("PMIX_NAMESPACE",), "jsrun"),
    _world("mpi", "MV2_COMM_WORLD_", ("MPIRUN_ID",), "mpirun"),
    _world("mpi", "MVP_COMM_WORLD_", ("MPIRUN_ID",), "mpirun"),
    _world("mpi", "HOROVOD_", ("HOROVOD_GLOO_RENDEZVOUS_PORT",), "horovodrun"),
    _Launcher(  # before PMI, whose variables it sets too
        name="flux",
        rank="FLUX_TASK_RANK",
        size="FLUX_JOB_SIZE",
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_size=(),
        job=("FLUX_JOB_ID",),
        command="flux run",
    ),
    _Launcher(  # MPICH, Intel MPI, Cray PALS
        name="mpi",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        job=("PALS_APID", "PMI_JOBID"),
        command="mpiexec",
    ),
)
_RANKS_WITHOUT_SIZE = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE")
"""Ranks of launchers that tell how many there are to nobody but MPI."""
RANKS = (*(known.rank for known in _LAUNCHERS), "SLURM_PROCID", *_RANKS_WITHOUT_SIZE)
"""Variables that hold the rank, in the order of trust."""
SIZES = (*(known.size for known in _LAUNCHERS), _STEP_TASKS)
"""Variables that hold the number of ranks."""
_MPI = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "MV2_", "MVP_", "MPIRUN_", "PALS_", "JSM_", "ALPS_", "HOROVOD_")
PREFIXES = ("SLURM_", "FLUX_", *_MPI)
"""How the launchers' variables begin."""


def find_place(environ: Mapping[str, str]) -> Place | None:
    """This process's place; None if no launcher has started it. Raises `LaunchError`."""
    for known in _LAUNCHERS:
        if known.rank in environ or known.size in environ:
            return _from_launcher(known, environ)
    if is_step(environ):
        return _from_slurm(environ)
    for name in _RANKS_WITHOUT_SIZE:
        if name in environ:
            raise LaunchError(
                f"launch: {name}={environ[name]} is set but no variable says how many ranks there are; start with"
                f" torchrun, srun or mpirun, or unset {name} to run alone"
            )
    return None


def number(environ: Mapping[str, str], name: str) -> int:
    """The whole number in a variable. Raises `LaunchError`."""
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"launch: {name}={environ[name]!r} is not a whole number") from None


def require(environ: Mapping[str, str], needed: Sequence[str], what_to_do: str) -> None:
    """Raises `LaunchError` if some of the variables are missing."""
    missing = [name for name in needed if name not in environ]
    if missing:
        present = ", ".join(name for name in needed if name in environ)
        raise LaunchError(f"launch: {present} set but {', '.join(missing)} missing; {what_to_do}")


# --- MPI, Flux -----------------------------------------------------------------------------------------------------


def _from_launcher(known: _Launcher, environ: Mapping[str, str]) -> Place:
    what_to_do = f"start with {known.command}, or unset them all to run alone"
    require(environ, [known.rank, known.size], what_to_do)
    rank, world_size = number(environ, known.rank), number(environ, known.size)
    local_rank = next((name for name in known.local_rank if name in environ), "LOCAL_RANK")
    local_size = next((name for name in known.local_size if name in environ), "LOCAL_WORLD_SIZE")
    if world_size == 1:
        numbers = (0, 1)
    elif local_rank in environ and local_size in environ:
        numbers = (number(environ, local_rank), number(environ, local_size))
    elif known.name == "flux" and local_rank in environ and _ranks_of_node(environ, world_size):
        numbers = (number(environ, local_rank), _ranks_of_node(environ, world_size))
    elif is_step(environ) and (environ.get("SLURM_PROCID"), _step_tasks(environ)) == (environ[known.rank], world_size):
        return _from_slurm(environ)
    else:
        needed = [known.rank, known.size, (*known.local_rank, local_rank)[0], (*known.local_size, local_size)[0]]
        require(environ, needed, what_to_do)
        raise AssertionError("one of them is missing")
    job = next((environ[name] for name in known.job if name in environ), "")
    if not job and world_size == numbers[1] > 1:
        job = launcher_process(known.rank)
    if not job and "MASTER_PORT" not in environ and world_size > 1:
        names = " and ".join(known.job)
        raise LaunchError(
            f"launch: {known.size} is set but {names} missing, which tell jobs apart; start with {known.command}, or"
            " give all ranks a port of your own in MASTER_PORT (mpirun -x MASTER_PORT)"
        )
    return Place(
        launcher=known.name,
        rank=rank,
        world_size=world_size,
        local_rank=numbers[0],
        local_world_size=numbers[1],
        job=f"{known.name} {job}",
        first_host=first_host(environ["SLURM_JOB_NODELIST"]) if "SLURM_JOB_NODELIST" in environ else "",
        names=(known.rank, known.size, local_rank, local_size),
    )


def _ranks_of_node(environ: Mapping[str, str], world_size: int) -> int:
    """Flux's ranks of each node; 0 where they cannot be the same on all."""
    nodes = number(environ, "FLUX_JOB_NNODES") if "FLUX_JOB_NNODES" in environ else 0
    return world_size // nodes if nodes > 0 and world_size % nodes == 0 else 0


# --- SLURM ---------------------------------------------------------------------------------------------------------


def is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process, and not only the shell above it."""
    return "SLURM_STEP_ID" in environ and number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _step_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_NTASKS" if _STEP_TASKS not in environ and "SLURM_NTASKS" in environ else _STEP_TASKS
    require(environ, ["SLURM_STEP_ID", name], "start with srun, or unset them all to run alone")
    return number(environ, name)


def _from_slurm(environ: Mapping[str, str]) -> Place:
    world_size = _step_tasks(environ)
    names = ("SLURM_PROCID", _STEP_TASKS, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    if world_size == 1:
        return Place(launcher="none", rank=0, world_size=1, local_rank=0, local_world_size=1, job="", names=names)
    per_node, hosts = (
        step if step in environ or job not in environ else job
        for step, job in (
            ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
            ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        )
    )
    needed = ["SLURM_PROCID", "SLURM_LOCALID", hosts, per_node, "SLURM_NODEID", "SLURM_JOB_ID"]
    require(environ, [*needed, "SLURM_STEP_ID"], "start with srun, or with torchrun in one task a node")
    text = environ[per_node]
    tasks, node = _tasks_per_node(text, per_node), number(environ, "SLURM_NODEID")
    if sum(tasks) != world_size or not 0 <= node < len(tasks):
        raise LaunchError(
            f"launch: SLURM_STEP_NUM_TASKS={world_size}, {per_node}={text} and SLURM_NODEID={node}"
            " contradict each other; start with srun, which sets them all"
        )
    job = ".".join([environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]])
    return Place(
        launcher="slurm",
        rank=number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        job=f"slurm {job}, start {environ.get('SLURM_RESTART_COUNT', '0')}",
        first_host=first_host(environ[hosts]),
        names=names,
    )


def first_host(nodelist: str) -> str:
    """The first host of a SLURM host list: `n[03-05,9]-ib,x` gives `n03-ib`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise LaunchError(f"launch: SLURM's list of nodes {nodelist!r} is not a host list")
    return "".join(part or "" for part in match.groups())


def _tasks_per_node(text: str, name: str) -> list[int]:
    """`2(x3),1` gives [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part)
        if not match:
            raise LaunchError(f"launch: {name}={text!r} is not a list of counts")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks
