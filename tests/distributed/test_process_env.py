"""Variables that were set for something else."""

from __future__ import annotations

import pytest

from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.distributed.process_env import prepare_environment
from dist_cifar.errors import LaunchError

TWO = DistEnv(world_size=2, local_world_size=2)


@pytest.mark.parametrize("value", ["1", "2", "x"])
def test_numba_without_its_compiler_is_refused(value):
    with pytest.raises(LaunchError, match=f"NUMBA_DISABLE_JIT={value}: .*; unset it"):
        prepare_environment(DistEnv(), {"NUMBA_DISABLE_JIT": value})


@pytest.mark.parametrize("value", ["", "0", " 0 "])
def test_numba_with_its_compiler(value):
    prepare_environment(DistEnv(), {"NUMBA_DISABLE_JIT": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_PROC_BIND", "true"), ("OMP_PROC_BIND", "close"), ("OMP_PLACES", "cores"), ("GOMP_CPU_AFFINITY", "0-3")],
)
def test_several_ranks_of_a_node_are_not_bound_to_the_same_cores(name, value, caplog):
    environ = {name: value, "OMP_NUM_THREADS": "1"}
    prepare_environment(TWO, environ)
    assert environ == {"OMP_NUM_THREADS": "1"} and f"{name} would bind the 2 ranks" in caplog.text


@pytest.mark.parametrize("env", [DistEnv(), DistEnv(world_size=2, local_world_size=1)])
def test_one_rank_of_a_node_may_be_bound(env, caplog):
    environ = {"OMP_PROC_BIND": "true"}
    prepare_environment(env, environ)
    assert environ == {"OMP_PROC_BIND": "true"} and not caplog.text


def test_what_binds_nothing_is_kept():
    environ = {"OMP_PROC_BIND": "FALSE", "OMP_PLACES": "", "KMP_AFFINITY": "disabled"}
    prepare_environment(TWO, environ)
    assert len(environ) == 3
