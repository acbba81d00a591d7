"""What the launcher's variables mean."""

from __future__ import annotations

import pytest

from dist_cifar.distributed.env import DistEnv, first_host, read_env
from dist_cifar.errors import LaunchError

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


def test_torchrun_under_srun_is_torchrun():
    assert read_env(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variables_are_named(missing):
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"{missing}.* missing"):
        read_env(environ)


@pytest.mark.parametrize("missing", sorted(SLURM.keys() - {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"}))
def test_missing_slurm_variables_are_named(missing):
    with pytest.raises(LaunchError, match=rf"{missing} missing"):
        read_env({name: value for name, value in SLURM.items() if name != missing})


def test_one_process_where_several_were_asked_for():
    # what `accelerate launch --cpu --num_processes 2` leaves behind
    with pytest.raises(LaunchError, match="several ranks were asked for and one process was started"):
        read_env({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "-1"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": "two"}])
def test_contradictions(change):
    with pytest.raises(LaunchError):
        read_env(TORCHRUN | change)


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
