"""The cluster of the tests is what it claims to be: nodes are apart, signals go where they should, `down` is clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.integration.slurm.clusters import SCRIPT, Cluster, remains

pytestmark = pytest.mark.slurm

# Notes each signal that it gets, as a line `<who> <signal>`, until it is killed, which USR2 does too. The batch script
# starts one task and the task a worker, which SLURM never asks anything.
RECORDER = """\
    import os, pathlib, signal, subprocess, sys

    def note(number, frame):
        os.write(log, f"{who} {signal.Signals(number).name[3:]}\\n".encode())

    folder, who = pathlib.Path(sys.argv[1]), sys.argv[2]
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, note)
    os.write(log, f"{who} ready\\n".encode())
    if who == "batch":
        subprocess.run(["srun", sys.executable, folder / "recorder.py", folder, "task"])
        os.write(log, b"batch end\\n")
    if who == "task":
        subprocess.Popen([sys.executable, folder / "recorder.py", folder, "worker"])
    while True:
        signal.pause()
"""


READY = {"batch ready", "task ready", "worker ready"}


class Recorded:
    """A job of a batch script, a task and its worker, that note their signals."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        folder.mkdir()
        (folder / "recorder.py").write_text(f"#!{sys.executable} -SE\n{textwrap.dedent(RECORDER)}")
        self.cluster = cluster
        self._log = folder / "log"
        self._noted = 0
        options = (f"--output={folder}/out", "--nodes=1", "--open-mode=append", *options)
        self.job = cluster.sbatch(folder / "recorder.py", str(folder), "batch", options=options)
        self.expect(READY)

    @property
    def lines(self) -> list[str]:
        """What has been noted since the last `expect`."""
        return self._log.read_text().splitlines()[self._noted :] if self._log.exists() else []

    def expect(self, lines: set[str]) -> None:
        """Waits until these lines, in any order, are what has been noted since the last call."""
        self.cluster.wait_until(lambda: set(self.lines) >= lines, f"{lines} in {self._log}", self.job)
        assert set(self.lines) == lines
        self._noted += len(self.lines)


@pytest.fixture
def recorded(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Recorded]]:
    """`recorded(name, *options)`: such a job."""
    jobs = []

    def start(name: str, *options: str) -> Recorded:
        jobs.append(Recorded(cluster, tmp_path / name, *options))
        return jobs[-1]

    yield start
    for job in jobs:
        if cluster.state(job.job) == "RUNNING":
            cluster.signal(job.job, "USR2", "--full")


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """`script("line ...")`: a batch script."""

    def write(text: str) -> Path:
        path = tmp_path / "script.sbatch"
        path.write_text(f"#!/bin/bash\n{text}\n")
        return path

    return write


def test_up_and_idle(cluster):
    assert cluster.states() == {"node1": "idle", "node2": "idle", "node3": "idle"}
    # That nothing remains after `down` says something only where all of this is seen before.
    assert set(remains(cluster.directory)) == {"files", "links", "cgroups", "processes"}


def test_nodes_are_apart(cluster, script, tmp_path):
    for node in cluster.nodes:
        cluster.run_on(node, "touch", f"/dev/shm/{node}")
    look = 'echo "$(hostname) $(hostname -i) $(echo /dev/shm/*) $(pgrep --count --full "cluster[.]sh liv[e]")"'
    options = [f"--output={tmp_path}/log", "--nodes=2"]
    job = cluster.sbatch(script(f"srun --output={tmp_path}/out-%t bash -c '{look}'"), options=options)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    seen = [(tmp_path / f"out-{task}").read_text().split() for task in (0, 1)]
    assert [line[0] for line in seen] == cluster.nodes_of(job)
    assert len({line[1] for line in seen}) == 2
    assert [line[2] for line in seen] == [f"/dev/shm/{line[0]}" for line in seen]
    assert [line[3] for line in seen] == ["1", "1"]  # the first process of its own node


def test_gpus(cluster, script, tmp_path):
    options = [f"--output={tmp_path}/log", "--gpus-per-node=2"]
    job = cluster.sbatch(script("srun bash -c 'echo $CUDA_VISIBLE_DEVICES'"), options=options)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert (tmp_path / "log").read_text() == "0,1\n"


def test_environment_of_jobs(cluster, script, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    look = "import sys, dist_cifar; print(sys.prefix, dist_cifar.__file__)"
    text = f'echo "$RANK-$SLURM_NTASKS-$MINE"; srun python -c "{look}"'
    job = cluster.sbatch(script(text), options=[f"--output={tmp_path}/log"], env={"MINE": "x"})
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    package = REPOSITORY / "dist_cifar" / "__init__.py"
    assert (tmp_path / "log").read_text().splitlines() == ["--x", f"{sys.prefix} {package}"]


def test_who_gets_a_signal_that_is_sent(cluster, recorded):
    job = recorded("job")
    cluster.signal(job.job, "USR1")
    job.expect({"task USR1"})
    cluster.signal(job.job, "USR1", "--batch")
    job.expect({"batch USR1"})
    cluster.signal(job.job, "USR1", "--full")
    job.expect({"batch USR1", "task USR1"})
    (node,) = cluster.nodes_of(job.job)
    srun = str(cluster.processes(node, "^srun ")[0])
    cluster.run_on(node, "kill", "-USR1", srun)
    job.expect({"task USR1"})
    cluster.run_on(node, "kill", "-TERM", srun)
    job.expect({"batch end"})  # the task was killed, without a TERM before
    cluster.scancel(job.job)
    job.expect({"batch CONT", "batch TERM"})
    assert cluster.wait(job.job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_requeue_and_scancel_ask_everyone_and_then_kill(cluster, recorded):
    job = recorded("job")
    cluster.run("scontrol", "requeue", str(job.job))
    job.expect({"batch CONT", "batch TERM", "task CONT", "task TERM"})
    job.expect(READY)
    assert cluster.job(job.job)["Restarts"] == "1"
    cluster.scancel(job.job)
    job.expect({"batch CONT", "batch TERM", "task CONT", "task TERM"})
    assert cluster.wait(job.job)["JobState"] == "CANCELLED"
    cluster.wait_until(lambda: not any(cluster.processes(node, "recorder") for node in cluster.nodes), "no process")


@pytest.mark.slow
def test_who_gets_a_signal_at_the_end_of_the_time_and_at_preemption(cluster, recorded):
    batch = recorded("batch", "--time=1", "--signal=B:USR1@60", "--nodelist=node1")
    task = recorded("task", "--time=1", "--signal=USR1@60", "--nodelist=node2")
    victim = recorded("victim", "--nodelist=node3")
    options = ["--partition=high", "--nodelist=node3", "--exclusive", "--output=/dev/null", "--wrap=true"]
    winner = int(cluster.run("sbatch", "--parsable", *options))
    victim.expect({"task CONT", "task TERM"})  # at once, and nothing for the batch script
    batch.expect({"batch USR1", "batch CONT"})
    task.expect({"task USR1", "task CONT"})
    victim.expect({"batch CONT", "batch TERM", "task CONT", "task TERM"})  # after the grace time
    assert cluster.wait(winner)["JobState"] == "COMPLETED"
    assert cluster.job(victim.job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_job_leaves_a_dead_node(cluster, recorded):
    job = recorded("job")
    (dead,) = cluster.nodes_of(job.job)
    cluster.fail(dead)
    assert "is dead" in cluster.run_on(dead, "true").stderr
    job.expect(READY)
    assert cluster.nodes_of(job.job) != [dead]
    assert cluster.job(job.job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_node_is_back_before_slurm_has_missed_it(cluster, script):
    job = cluster.sbatch(script("srun sleep 600"), options=["--nodes=2", "--output=/dev/null"])
    cluster.wait_until(lambda: cluster.state(job) == "RUNNING", "a running job")
    _, other = cluster.nodes_of(job)
    cluster.wait_until(lambda: cluster.processes(other, "sleep 600"), "a task")
    cluster.fail(other)
    cluster.heal(other)
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1" and cluster.state(job) == "RUNNING", "a restart")


def hears(cluster: Cluster, node: str, other: str) -> bool:
    """Whether a node's slurmd accepts a connection from another node."""
    return cluster.run_on(node, "timeout", "1", "bash", "-c", f": </dev/tcp/{other}/6818").returncode == 0


def test_a_cut_node_hears_nothing_and_runs_on(cluster, recorded):
    cluster.fail("node2")
    cluster.heal("node2")
    cluster.wait_until(
        lambda: hears(cluster, "node1", "node2"), "a link", seconds=2
    )  # at once, though it has a new one
    cluster.cut("node2")
    assert not hears(cluster, "node1", "node2")
    assert not hears(cluster, "node2", "node1")
    assert hears(cluster, "node1", "node3")
    assert cluster.processes("node2", "^slurmd ")
    cluster.heal("node2")
    cluster.wait_until(lambda: hears(cluster, "node1", "node2"), "a link")


def test_a_session_that_is_killed_is_cleaned_up_by_the_next(cluster, tmp_path):
    """Beside the session's cluster, which must not notice."""
    directory = Path("/run/dist_cifar_slurm.test")
    code = textwrap.dedent(f"""\
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from tests.integration.slurm.clusters import Cluster
        cluster = Cluster(2, pathlib.Path({str(directory)!r}))
        cluster.run("sbatch", "--output=/dev/null", "--nodes=2", "--wrap=srun sleep 600")
        cluster.wait_until(lambda: cluster.processes("node2", "sleep 600"), "a task")
        cluster.fail("node1")
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any("sleep 600" in process for process in remains(directory)["processes"])
    try:
        second = Cluster(2, directory)
        assert second.states() == {"node1": "idle", "node2": "idle"}
        assert not second.run("squeue", "--noheader")
        refused = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert f"process {os.getpid()}, which still runs" in refused.stderr
    finally:
        subprocess.run([SCRIPT, "down"], env={**os.environ, "DIST_CIFAR_CLUSTER": str(directory)}, check=True)
    assert remains(directory) == {}
    assert set(cluster.states().values()) == {"idle"}
