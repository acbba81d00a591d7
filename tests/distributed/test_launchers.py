"""Each launcher's variables: a process is the rank that it says, or is refused with their names."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from dist_cifar.distributed.launch_env import DistEnv, launcher_rank, lone_environ, read_env, refuse_lone_task
from dist_cifar.distributed.processes import launcher_process
from dist_cifar.errors import LaunchError

PMI = {"PMI_RANK": "3", "PMI_SIZE": "4"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
PORT = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def world(prefix: str) -> dict[str, str]:
    return {f"{prefix}RANK": "3", f"{prefix}SIZE": "4", f"{prefix}LOCAL_RANK": "1", f"{prefix}LOCAL_SIZE": "2"}


LAUNCHERS = {
    "Open MPI": world("OMPI_COMM_WORLD_") | PORT,
    "jsrun": world("JSM_NAMESPACE_") | PORT | {"PMIX_RANK": "3"},
    "MVAPICH2": world("MV2_COMM_WORLD_") | PORT,
    "MVAPICH 3": world("MVP_COMM_WORLD_") | PORT,
    "Horovod": world("HOROVOD_") | PORT | {"HOROVOD_GLOO_RENDEZVOUS_PORT": "40000"},
    "hydra, Intel MPI": PMI | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"} | PORT,
    "PALS": PMI | {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "PALS_RANKID": "3", "PALS_APID": "a"} | PORT,
    "PALS without a local size": PMI | {"PALS_LOCAL_RANKID": "1", "LOCAL_WORLD_SIZE": "2", "PALS_APID": "a"} | PORT,
    "Flux": {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_ID": "f", **PMI}
    | {"FLUX_JOB_NNODES": "2", "MASTER_ADDR": "n1"},
    "srun": STEP,
    "srun of an older version": {
        name.replace("STEP_NODELIST", "JOB_NODELIST").replace("_STEP_TASKS", "_TASKS"): value
        for name, value in STEP.items()
    },
    "srun --mpi=pmi2": STEP | PMI | {"PMI_JOBID": "77.0"},
    "srun --mpi=pmix": STEP | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.77.0"},
    "srun, WORLD_SIZE of the template": STEP | {"WORLD_SIZE": "4"} | PORT,
    "srun, RANK and WORLD_SIZE of the template": STEP | {"WORLD_SIZE": "4", "RANK": "3"} | PORT,
    "srun, all of the template": STEP | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"} | PORT,
    "srun, empty values of the template": STEP | {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": ""},
    "mpirun, RANK of the script": world("OMPI_COMM_WORLD_") | PORT | {"RANK": "3", "WORLD_SIZE": "4"},
}


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launchers_rank(environ):
    env = read_env(environ)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert env.master_addr == "n1" and 0 < env.master_port < 65536 and env.launcher != "none"
    assert launcher_rank(environ) == "3" and read_env(lone_environ(environ)) == DistEnv()


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS)
def test_no_variable_can_be_taken_away_without_a_word(environ):
    """What is left is the same place, or an error that names a variable: never a process alone."""
    for name in environ:
        left = {other: value for other, value in environ.items() if other != name}
        try:
            env = read_env(left)
        except LaunchError as error:
            assert any(other in str(error) for other in environ), (name, str(error))
        else:
            assert (env.rank, env.world_size) == (3, 4) or "SLURM_STEP_ID" not in left, name


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS)
@pytest.mark.parametrize("value", ["x", "-1", "99999999999999999999", "4.0", " "])
def test_nonsense_in_any_variable_is_one_line(environ, value):
    for name in environ:
        try:
            env = read_env(environ | {name: value})
        except LaunchError as error:
            assert "\n" not in str(error)
        else:
            assert 0 <= env.rank < env.world_size


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun@1"}, "PMIX_RANK=0 is set but no variable says how many"),
        ({"PALS_RANKID": "1"}, "PALS_RANKID=1 is set but no variable"),
        ({"PMI_RANK": "1"}, "PMI_RANK set but PMI_SIZE missing; start with mpiexec"),
        ({"FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE set but FLUX_TASK_RANK missing; start with flux run"),
        (PMI, "PMI_RANK, PMI_SIZE set but MPI_LOCALRANKID, MPI_LOCALNRANKS missing"),
        (STEP | {"RANK": "0"}, "RANK=0 and SLURM_PROCID=3, by which it is 3, contradict each other"),
        (STEP | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and SLURM_STEP_NUM_TASKS=4, by which it is 4, contradict"),
        (STEP | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "RANK=0 and SLURM_PROCID=3"),
        (STEP | {"LOCAL_RANK": "0"}, "LOCAL_RANK=0 and SLURM_LOCALID=1"),
        (STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=4, and another launcher says .* alone"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2 is set for torchrun and this process was started without it"),
        ({"WORLD_SIZE": "2", **PORT}, "RANK missing"),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **PORT}, "RANK=2 and LOCAL_RANK=0, .*LOCAL_WORLD_SIZE is"),
    ],
)
def test_what_does_not_tell_the_rank_is_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        read_env(environ)


@pytest.mark.parametrize(
    ("environ", "local"),
    [
        ({"MASTER_ADDR": "job-master-0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (0, 1)),  # PyTorchJob
        ({"MASTER_ADDR": "job-master-0"}, (0, 1)),
        ({"MASTER_ADDR": "job-master-0", "LOCAL_WORLD_SIZE": "1"}, (0, 1)),
        ({"MASTER_ADDR": "127.0.0.1"}, (1, 2)),
        ({"MASTER_ADDR": "localhost"}, (1, 2)),
        ({"MASTER_ADDR": "n1", "LOCAL_RANK": "1"}, (1, 2)),
    ],
)
def test_the_place_within_the_node_is_derived(environ, local):
    env = read_env({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "23456"} | environ)
    assert (env.rank, env.local_rank, env.local_world_size) == (1, *local)


def test_the_first_pod_may_be_told_loopback():
    pod = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert read_env(pod | {"MASTER_ADDR": "localhost"}).has_several_nodes
    with pytest.raises(LaunchError, match="MASTER_ADDR=localhost is this node alone"):
        read_env(pod | {"MASTER_ADDR": "localhost", "RANK": "1"})


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "1", **PORT},
        {"PMI_NO_FORK": "1", "PET_NNODES": "1", "PMIX_MCA_gds": "hash"},
    ],
)
def test_alone_where_the_launcher_says_so(environ):
    assert read_env(environ).world_size == 1


def test_ranks_that_a_script_has_started_inside_a_task():
    own = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **PORT}
    assert read_env(STEP | own).rank == 5
    alone = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    assert read_env(alone | own).world_size == 8


@pytest.mark.parametrize("address", ["nowhere-x9", "127.0.1.1", "10.1.2.3"])
def test_ranks_of_one_node_need_no_name_service(address):
    assert read_env(
        LAUNCHERS["Open MPI"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": address}
    ).master_addr == ("127.0.0.1")


def test_a_secret_makes_another_key_of_the_job():
    plain, one, two = (
        read_env(STEP | secret) for secret in ({}, {"DIST_CIFAR_SECRET": "a"}, {"DIST_CIFAR_SECRET": "b"})
    )
    assert len({plain.job, one.job, two.job}) == 3 and "77" in plain.job
    assert "77.0" not in one.job and one.job == read_env(STEP | {"DIST_CIFAR_SECRET": "a", "SLURM_PROCID": "2"}).job
    assert plain.master_port == one.master_port


# --- a shell of SLURM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4: this job has 4 tasks"),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}, "SLURM_NTASKS_PER_NODE=4: this job has 8 tasks"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "SLURM_JOB_NUM_NODES=2: this job has 2 tasks"),
    ],
)
def test_a_shell_of_several_tasks_is_no_place_to_train_while_its_job_lives(shell, message, caplog):
    shell |= {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1700000000"}
    with pytest.raises(LaunchError, match=message):
        refuse_lone_task(shell, wall_time=1.6e9)
    with caplog.at_level(logging.WARNING):
        refuse_lone_task(shell, wall_time=1.8e9)
    assert "SLURM_JOB_ID=7 has ended" in caplog.text and "trains alone" in caplog.text


# --- jobs without a number -----------------------------------------------------------------------------------------


def test_ranks_of_one_node_are_told_apart_by_the_process_that_started_them(monkeypatch):
    environ = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    env = read_env(environ)
    assert env.launcher == "mpi" and env.job == read_env(environ | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}).job
    monkeypatch.setattr("dist_cifar.distributed.launchers.launcher_process", lambda variable: "")
    with pytest.raises(LaunchError, match=r"PALS_APID and PMI_JOBID missing, which tell jobs apart; .* MASTER_PORT"):
        read_env(environ)
    assert read_env(environ | {"MASTER_PORT": "4711"}).master_port == 4711


def test_the_launchers_process_is_seen_through_scripts():
    code = "from dist_cifar.distributed.processes import launcher_process as of; print(of('PMI_RANK'), of('NOT_SET'))"
    script = ["sh", "-c", 'sh -c "$0 -c \\"$1\\"; true"; true', sys.executable, code]
    result = subprocess.run(script, env=os.environ | {"PMI_RANK": "0"}, capture_output=True, text=True, check=True)
    launcher, parent = result.stdout.split()
    assert launcher.startswith(f"{os.getpid()}:") and not parent.startswith(f"{os.getpid()}:")
    assert launcher_process("NOT_SET").startswith(f"{os.getppid()}:")
