"""What the launcher's variables mean."""

from __future__ import annotations

import re

import pytest

from dist_cifar.distributed.launch_env import (
    DistEnv,
    check_local_rank,
    launcher_rank,
    lone_environ,
    rank_environ,
    read_env,
    refuse_lone_task,
)
from dist_cifar.distributed.launchers import first_host
from dist_cifar.errors import LaunchError
from tests import REPOSITORY

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "123",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "1994981377",
    "MASTER_ADDR": "n1",
}
ONE_AGENT = TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
"""As torchrun sets them on one node."""


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_alone():
    assert read_env({}) == DistEnv()
    assert read_env({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == DistEnv()


def test_torchrun():
    env = read_env(TORCHRUN)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert (env.master_addr, env.master_port, env.launcher) == ("n1", 29400, "torchrun")
    assert read_env(env.variables()) == env


def test_srun_without_torchrun():
    env = read_env(SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (4, 5, 0, 1)
    assert env.master_addr == "gpu07" and env.launcher == "slurm"
    assert 10000 <= env.master_port < 30000
    assert read_env(SLURM | {"SLURM_JOB_ID": "124"}).master_port != env.master_port
    assert read_env(SLURM | {"SLURM_STEP_ID": "1"}).master_port != env.master_port


def test_torchrun_is_trusted_before_mpirun_and_mpirun_before_srun():
    assert read_env(SLURM | OPEN_MPI | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert read_env(SLURM | OPEN_MPI).launcher == "mpi"


# --- jobs are told apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (TORCHRUN, {"MASTER_PORT": "29401"}),
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "other"}),
        (ONE_AGENT, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (SLURM, {"SLURM_JOB_ID": "124"}),
        (SLURM, {"SLURM_STEP_ID": "1"}),
        (SLURM, {"SLURM_RESTART_COUNT": "1"}),
        (OPEN_MPI, {"OMPI_MCA_ess_base_jobid": "1994981378"}),
        (OPEN_MPI, {"PMIX_NAMESPACE": "prterun-n1-77@1"}),
    ],
)
def test_another_job_step_or_start_has_another_key(environ, change):
    assert read_env(environ | change).job != read_env(environ).job


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (TORCHRUN, {"RANK": "2", "LOCAL_RANK": "0"}),
        # On several nodes each agent counts its own restarts.
        (TORCHRUN | {"GROUP_WORLD_SIZE": "2"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (SLURM, {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}),
        (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}),
    ],
)
def test_all_ranks_have_one_key_and_one_port(environ, change):
    one, other = read_env(environ), read_env(environ | change)
    assert (one.job, one.master_port, one.master_addr) == (other.job, other.master_port, other.master_addr)


# --- other launchers ---------------------------------------------------------------------------------------------


def test_deepspeeds_launcher():
    """What its `launch.py` sets."""
    environ = without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    env = read_env(environ)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert env.has_several_nodes and not read_env(environ | {"LOCAL_SIZE": "4"}).has_several_nodes


def test_deepspeeds_option_must_be_the_local_rank():
    check_local_rank({}, None)
    check_local_rank(TORCHRUN, 1)
    with pytest.raises(LaunchError, match=r"--local_rank=0 was given and LOCAL_RANK=1;"):
        check_local_rank(TORCHRUN, 0)
    with pytest.raises(LaunchError, match=r"--local_rank=0 was given and LOCAL_RANK is not set;"):
        check_local_rank({}, 0)


def test_open_mpi():
    env = read_env(OPEN_MPI)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert env.master_addr == "n1" and env.launcher == "mpi" and 10000 <= env.master_port < 30000
    assert read_env(OPEN_MPI | {"MASTER_PORT": "4711"}).master_port == 4711
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    alone |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert read_env(alone).world_size == 1


def test_where_rank_0_of_open_mpi_is():
    here = without(OPEN_MPI, "MASTER_ADDR")
    assert read_env(here | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).master_addr == "127.0.0.1"
    assert read_env(here | {"SLURM_JOB_NODELIST": "gpu[07-08]"}).master_addr == "gpu07"
    with pytest.raises(LaunchError, match=r"OMPI_COMM_WORLD_SIZE=4.*MASTER_ADDR is not set.*mpirun -x MASTER_ADDR"):
        read_env(here)


@pytest.mark.parametrize("missing", [name for name in OPEN_MPI if name.startswith("OMPI_COMM")])
def test_missing_variables_of_open_mpi_are_named(missing):
    with pytest.raises(LaunchError, match=rf"{missing} missing"):
        read_env(without(OPEN_MPI, missing))


def test_open_mpi_without_a_name_for_the_job_needs_a_port():
    with pytest.raises(LaunchError, match="PMIX_NAMESPACE and OMPI_MCA_ess_base_jobid missing"):
        read_env(without(OPEN_MPI, "OMPI_MCA_ess_base_jobid"))
    assert read_env(without(OPEN_MPI, "OMPI_MCA_ess_base_jobid") | {"MASTER_PORT": "4711"}).master_port == 4711


# --- started as one of several -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"},  # the shell of sbatch
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # that of salloc
    ],
)
def test_the_shell_of_a_job_of_several_tasks_is_no_place_to_train(step):
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"} | step
    assert read_env(shell) == DistEnv()  # `verify` starts its own ranks
    with pytest.raises(LaunchError, match=r"SLURM_NTASKS=4: this job has 4 tasks and this process was started without"):
        refuse_lone_task(shell)
    refuse_lone_task(shell | {"SLURM_NTASKS": "1"})
    refuse_lone_task(without(shell, "SLURM_NTASKS"))
    refuse_lone_task(shell | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})  # `srun -n 1`: it was asked for
    refuse_lone_task({"SLURM_NTASKS": "4"})
    refuse_lone_task(shell | ONE_AGENT)  # torchrun in that shell


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_torchruns_that_do_not_know_each_other_are_refused(name):
    assert read_env(ONE_AGENT | {name: "1"}).world_size == 2
    assert read_env(ONE_AGENT | {name: "2", "GROUP_WORLD_SIZE": "2"}).world_size == 2
    with pytest.raises(LaunchError, match=rf"{name}=2 and GROUP_WORLD_SIZE=1: 2 torchruns .* do not know each other"):
        read_env(ONE_AGENT | {name: "2"})


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "localhost", "::1"])
@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI, SLURM], ids=["torchrun", "mpi", "slurm"])
def test_several_nodes_cannot_meet_at_loopback(address, environ):
    assert read_env(environ).has_several_nodes
    with pytest.raises(LaunchError, match=rf"MASTER_ADDR={address} is this node alone"):
        read_env(environ | {"MASTER_ADDR": address})


def test_one_node_may_meet_at_loopback():
    assert read_env(ONE_AGENT | {"MASTER_ADDR": "127.0.0.1"}).master_addr == "127.0.0.1"


# --- child processes, and who reports an error -------------------------------------------------------------------


def test_a_rank_of_another_job_gets_nothing_of_this_launcher():
    environ = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "3",
        "RANK": "5",
        "GROUP_RANK": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "true",
        "SLURM_STEP_ID": "0",
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_NAMESPACE": "7",
        "MASTER_PORT": "29500",
    }
    env = DistEnv(rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="h", master_port=7, job="j")
    assert rank_environ(environ, env) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "3",
        "ACCELERATE_USE_CPU": "true",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "7",
        "TORCHELASTIC_RUN_ID": "j",
    }
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "ACCELERATE_USE_CPU": "true"}
    assert lone_environ(environ) == kept and read_env(lone_environ(environ)) == DistEnv()


@pytest.mark.parametrize("environ", [TORCHRUN, SLURM, OPEN_MPI, ONE_AGENT, {}])
def test_the_rank_that_reports_is_the_rank_that_is_read(environ):
    assert launcher_rank(environ) == str(read_env(environ).rank)


def test_the_rank_that_reports_needs_no_sound_environment():
    assert launcher_rank({"RANK": "x", "WORLD_SIZE": "2"}) == "x"
    assert launcher_rank({"RANK": "", "SLURM_PROCID": "3"}) == "3"


def test_libraries_are_told_the_number_of_the_gpu_that_the_rank_is_shown():
    env = DistEnv(rank=7, world_size=8, local_rank=3, local_world_size=4)
    assert env.variables()["LOCAL_RANK"] == "3" and env.variables(gpu=3) == env.variables()
    assert env.variables(gpu=0) == env.variables() | {"LOCAL_RANK": "0"}


def test_one_package_knows_the_launchers_variables():
    """`SLURM_JOB_END_TIME` and `SLURM_TMPDIR` are about time and disks, `SLURM_CONF` and `_JWT` about the cluster."""
    known = re.compile(
        r'["\'](RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_(ADDR|PORT)|GROUP_\w+|TORCHELASTIC_\w+|ACCELERATE_\w+'
        r"|OMPI_\w+|PMIX?_\w+|PALS_\w+|MV2_\w+|FLUX_\w+|SLURM_(?!JOB_END_TIME|TMPDIR|CONF|JWT)\w+)[\"']"
    )
    package = REPOSITORY / "dist_cifar"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if known.search(path.read_text())}
    assert found == {f"distributed/{name}.py" for name in ("launch_env", "launchers", "accelerate_env")}


# --- partial and contradictory variables -------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variables_are_named(missing):
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"{missing}.* missing"):
        read_env(environ)


@pytest.mark.parametrize("missing", sorted(SLURM.keys() - {"SLURM_STEP_ID"}))
def test_missing_slurm_variables_are_named(missing):
    with pytest.raises(LaunchError, match=rf"{missing} missing"):
        read_env({name: value for name, value in SLURM.items() if name != missing})


def test_one_process_where_several_were_asked_for():
    # what `accelerate launch --cpu --num_processes 2` leaves behind
    with pytest.raises(LaunchError, match="several ranks were asked for and one process was started"):
        read_env({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "4"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "5"},
        {"WORLD_SIZE": "two"},
        {"MASTER_PORT": "x"},
    ],
)
def test_contradictions(change):
    name = next(iter(change))
    with pytest.raises(LaunchError, match=rf"{name}='?{change[name]}"):
        read_env(TORCHRUN | change)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_NODEID": "3"},
        {"SLURM_STEP_TASKS_PER_NODE": "2"},
        {"SLURM_STEP_TASKS_PER_NODE": "a"},
        {"SLURM_STEP_ID": "x"},
    ],
)
def test_contradictions_of_slurm(change):
    with pytest.raises(LaunchError, match=next(iter(change))):
        read_env(SLURM | change)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,9],x", "n03"),
        ("rack1-n[7]-ib", "rack1-n7-ib"),
        ("a[1-2]b,c[3-4]", "a1b"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host
