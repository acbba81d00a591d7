"""launch/torchrun.sh on two machines: the nodes of the cluster, without SLURM."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests import REPOSITORY
from tests.integration.slurm.clusters import SCRIPT
from tests.integration.slurm.runs import Run, arguments, environment

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_workers_that_are_killed_start_again_by_themselves(cluster, golden, tmp_path):
    run = Run(tmp_path)
    head, other = cluster.nodes[:2]
    variables = {**environment(run.folder, "0.15"), "NODES": "2", "HEAD": head, "PORT": "29407", "RANKS": "1"}
    with (tmp_path / "job.log").open("w") as log:
        agents = [
            subprocess.Popen(
                [SCRIPT, "inside", node, REPOSITORY / "launch/torchrun.sh", *arguments(run.dir)],
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for node in (head, other)
        ]
    for node, step in ((other, 7), (head, 14)):
        cluster.wait_until(lambda step=step: run.step() >= step, f"step {step}")
        workers = cluster.processes(node, r"^\S*python\S* -u \S*train.py")
        assert len(workers) == 1
        cluster.run_on(node, "kill", f"-{signal.SIGKILL}", str(workers[0]))
    cluster.wait_until(lambda: all(agent.poll() is not None for agent in agents), "the end of both agents")
    assert [agent.returncode for agent in agents] == [0, 0], run.log()
    assert run.log().count("from the checkpoint of step") == 2
    run.require_equal(golden, once=False)
