"""The batch scripts on a real SLURM: whatever happens to the job, the run ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.integration.slurm.clusters import Cluster
from tests.integration.slurm.runs import Run, arguments, environment

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ONE_RANK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Callable[..., tuple[int, Run]]:
    """`submit("train.sbatch", options, ...)`: a job and its run."""

    def start(
        script: str | Path,
        options: list[str],
        *overrides: str,
        seconds: str = "0.15",
        crash: str = "0 0",
        name: str = "job",
    ) -> tuple[int, Run]:
        run = Run(tmp_path / name)
        job = cluster.sbatch(
            REPOSITORY / "slurm" / script,
            *arguments(run.dir, *overrides),
            options=[f"--output={run.folder}/job.log", "--cpus-per-task=1", *options],
            env=environment(run.folder, seconds, crash),
            cwd=REPOSITORY,
        )
        return job, run

    return start


def edited(tmp_path: Path, script: str, old: str, new: str) -> Path:
    """A copy of a script with one line edited, as a person would."""
    text = (REPOSITORY / "slurm" / script).read_text()
    assert old in text
    path = tmp_path / script
    path.write_text(text.replace(old, new))
    return path


def preempt(cluster: Cluster, nodes: int) -> int:
    """A job of the higher partition that wants all of some nodes, and ends at once."""
    options = ["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"]
    return int(cluster.run("sbatch", "--parsable", *options))


@pytest.mark.parametrize("script", ["train.sbatch", "train_srun.sbatch"])
def test_two_nodes_of_two_ranks(cluster, submit, golden, script):
    tasks = 1 if script == "train.sbatch" else 2
    job, run = submit(script, ["--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=2"], seconds="0")
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
    run.require_equal(golden)
    assert "4 x cpu" in run.log() and "done" in run.log()
    logs = {path.name: path.read_text() for path in (run.dir / "logs" / f"{job}-0").iterdir()}
    assert sorted(logs) == [f"rank-{rank}.log" for rank in range(4)]
    assert "test accuracy" in logs["rank-0.log"]
    assert not any("step" in text for name, text in logs.items() if name != "rank-0.log")
    assert run.requeues() == []


def test_preemption(cluster, submit, golden):
    """Under torchrun; without it five times, below."""
    job, run = submit("train.sbatch", TWO_NODES)
    cluster.wait_until(lambda: run.step() >= 5, "step 5", job)
    preempt(cluster, 2)
    cluster.wait_until(lambda: run.status().get("status") == "saved", "saved", job)
    stopped_at = run.status()["step"]
    assert cluster.wait(job)["Restarts"] == "1"
    assert run.requeues() == ["saved"]
    assert f"stopped and saved at step {stopped_at}; requeued" in run.log()
    assert f"from the checkpoint of step {stopped_at}" in run.log()
    run.require_equal(golden)


def test_five_preemptions(cluster, submit, golden):
    job, run = submit("train_srun.sbatch", TWO_NODES, seconds="0.6")  # slow: they must not end before the last cycle
    for cycle in range(5):
        goal = run.step() + 1
        cluster.wait_until(lambda goal=goal: run.step() >= goal, f"step {goal} in cycle {cycle}", job)
        preempt(cluster, 2)
        cluster.wait_until(lambda cycle=cycle: len(run.requeues()) == cycle + 1, f"requeue {cycle + 1}", job)
    assert cluster.wait(job)["Restarts"] == "5"
    assert run.requeues() == ["saved"] * 5
    run.require_equal(golden)


def test_the_end_of_the_time(cluster, submit, golden):
    """Three jobs at once, on one node each: one is told by SLURM (--signal), one watches the clock, and the third is in
    a step that is longer than its time, and is killed.

    SLURM may send the signal a minute early: to the two that are not to be told it sends one that is ignored.
    """
    untold = [*ONE_RANK, "--signal=B:URG@1"]
    told, told_run = submit("train.sbatch", [*ONE_RANK, "--time=3", "--signal=B:USR1@90"], seconds="3 0.1", name="told")
    watching, watching_run = submit("train_srun.sbatch", [*untold, "--time=1"], seconds="2 0.1", name="watching")
    late, late_run = submit("train.sbatch", [*untold, "--time=2"], seconds="300 0.1", name="late")
    for job, run, kind in ((told, told_run, "saved"), (watching, watching_run, "saved"), (late, late_run, "stopped")):
        assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
        first, *others = run.requeues()
        assert first == kind and set(others) <= {"saved"}  # others: on a machine that does not get done in a minute
        assert len(run.requeues()) == int(cluster.job(job)["Restarts"])
        run.require_equal(golden)
    assert "(SIGUSR1): saving" in told_run.log() and "SIGUSR1" not in watching_run.log()
    assert "(the end of its time" in watching_run.log()
    assert "the time is over; requeued" in late_run.log()


def test_requeue_by_hand(cluster, submit, golden):
    job, run = submit("train.sbatch", TWO_NODES)
    cluster.wait_until(lambda: run.step() >= 5, "step 5", job)
    cluster.run("scontrol", "requeue", str(job))
    assert cluster.wait(job)["Restarts"] == "1"
    assert run.requeues() == []  # SLURM does it
    run.require_equal(golden)


def test_scancel_ends_it_for_good_and_leaves_no_process(cluster, submit):
    job, run = submit("train.sbatch", ["--nodes=2", "--gpus-per-node=2"])
    cluster.wait_until(lambda: run.step() >= 5, "step 5", job)
    ours = "dist_cifar.train|torchrun|job_script|slurmstepd"
    nodes = [node for node in cluster.nodes if cluster.processes(node, ours)]
    assert len(nodes) == 2
    cluster.run("scancel", str(job))
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    for node in nodes:
        cluster.wait_until(lambda node=node: not cluster.processes(node, ours), f"no process on {node}", job)
    assert run.status()["status"] == "saved"  # and it can be resumed where it is submitted again
    assert run.requeues() == []
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("how", ["killed", "cut", "killed under the batch script"])
def test_node_failure(cluster, submit, golden, how):
    job, run = submit("train.sbatch", ["--nodes=2", "--gpus-per-node=1"], "run.timeout_seconds=10")
    cluster.wait_until(lambda: run.step() >= 7, "step 7", job)
    nodes = cluster.nodes_of(job)
    lost = nodes[0] if how.endswith("script") else nodes[1]
    (cluster.cut if how == "cut" else cluster.fail)(lost)
    job_after = cluster.wait(job)
    assert job_after["JobState"] == "COMPLETED" and int(job_after["Restarts"]) >= 1, run.log()
    assert lost not in cluster.nodes_of(job)
    run.require_equal(golden, once=False)


def test_a_job_whose_first_attempt_crashes(cluster, submit, golden):
    """It is started again where it is, since it has left a checkpoint, and does not come further."""
    job, run = submit("train_srun.sbatch", TWO_NODES, seconds="0", crash="7 1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
    assert run.requeues() == ["restarted", "crashed"] and cluster.job(job)["Restarts"] == "1"
    reason = "rank 0 failed at step 8: RuntimeError: the recorder breaks this attempt"
    assert f"{reason}; started again on the same nodes" in run.log() and f"{reason}; requeued" in run.log()
    assert {path.name for path in (run.dir / "logs").iterdir()} == {f"{job}-0", f"{job}-0.1", f"{job}-1"}
    run.require_equal(golden, once=False)


@pytest.mark.parametrize("script", ["train.sbatch", "train_srun.sbatch"])
def test_a_rank_that_is_killed_is_started_again_on_the_same_nodes(cluster, submit, golden, script):
    job, run = submit(script, TWO_NODES)
    cluster.wait_until(lambda: run.step() >= 7, "step 7", job)
    node = cluster.nodes_of(job)[1]
    rank = cluster.processes(node, "python -u -m dist_cifar.train")[-1]
    cluster.run_on(node, "kill", "-KILL", str(rank))
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
    assert run.requeues() == ["restarted"] and cluster.job(job)["Restarts"] == "0"
    assert "was killed or lost" in run.log()
    run.require_equal(golden, once=False)


def test_a_job_that_always_crashes_is_given_up(cluster, submit, tmp_path):
    script = edited(tmp_path, "train.sbatch", "max_restarts=3 ", "max_restarts=1 ")
    job, run = submit(script, ONE_RANK, seconds="0", crash="2 9")
    assert cluster.wait(job)["JobState"] == "FAILED", run.log()
    assert run.requeues() == ["crashed"] and cluster.job(job)["Restarts"] == "1"
    assert "not requeued: already started again 1 times (crashed), and the limit is 1" in run.log()


def test_refused_arguments_are_not_tried_again(cluster, submit):
    job, run = submit("train.sbatch", ONE_RANK, "model.name=resnet99")
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "model.name" in run.log() and "not requeued" in run.log()


def test_from_two_nodes_to_one(cluster, submit, golden):
    job, run = submit("train.sbatch", ["--nodes=2", "--gpus-per-node=1"])
    cluster.wait_until(lambda: run.step() >= 5, "step 5", job)
    cluster.run("scontrol", "requeuehold", str(job))
    cluster.wait_until(lambda: "held" in cluster.run("squeue", "-h", "-j", str(job), "-o", "%r"), "a held job", job)
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=1", "NumCPUs=1")
    cluster.run("scontrol", "release", str(job))
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
    assert "2 x cpu" in run.log() and "1 x cpu" in run.log()
    run.require_equal(golden)


def test_run_directory_that_one_node_cannot_write(cluster, submit, golden):
    for lost, name in ((1, "other"), (0, "first")):
        job, run = submit("train_srun.sbatch", [*TWO_NODES, "--hold"], seconds="0", name=name)
        run.dir.mkdir()
        node = cluster.nodes[lost]
        cluster.run_on(node, "mount", "--bind", str(run.dir), str(run.dir))
        cluster.run_on(node, "mount", "-o", "remount,ro,bind", str(run.dir))
        cluster.run("scontrol", "update", f"JobId={job}", f"NodeList={cluster.nodes[0]},{cluster.nodes[1]}")
        cluster.run("scontrol", "release", str(job))
        state = cluster.wait(job)["JobState"]
        cluster.run_on(node, "umount", str(run.dir))
        if lost == 1:  # only rank 0 writes, and the log of the other rank is not worth a run
            assert state == "COMPLETED", run.log()
            run.require_equal(golden)
        else:
            assert state == "FAILED" and run.requeues() == []
            assert re.search(rf"run\.dir={run.dir}: cannot be written \(Read-only file system\)", run.log())
            assert "not requeued" in run.log()


def test_the_data_are_staged_once_on_each_node(cluster, submit, golden):
    job, run = submit(
        "train_srun.sbatch",
        ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"],
        "data.stage_dir=/dev/shm/staged",
        seconds="0",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.log()
    run.require_equal(golden)
    for node in cluster.nodes_of(job):
        files = cluster.run_on(node, "find", "/dev/shm/staged", "-name", "train_images.npy").stdout.split()
        assert len(files) == 1
        cluster.run_on(node, "rm", "-r", "/dev/shm/staged")


def test_array_of_four_with_two_at_a_time(cluster, tmp_path):
    sweep = [f"run.seed={seed} train.epochs=2" for seed in range(1, 5)]
    commands = [arguments(tmp_path / f"golden-{task}", *line.split()) for task, line in enumerate(sweep, start=1)]
    program = f"from dist_cifar.cli import main\nassert not any(main(['train', *c]) for c in {commands!r})"
    subprocess.run([sys.executable, "-c", program], env=environment(tmp_path), check=True, stdout=subprocess.DEVNULL)

    shared = [value for value in arguments(tmp_path) if not value.startswith(("run.dir=", "train.epochs="))]
    (tmp_path / "runs.txt").write_text("\n".join(sweep))  # no line break at the end: a person's file
    old = "folder=runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID"
    job = cluster.sbatch(
        edited(tmp_path, "sweep.sbatch", old, f"folder={tmp_path}/swept"),
        str(tmp_path / "runs.txt"),
        *shared,
        options=[f"--output={tmp_path}/%a.log", "--cpus-per-task=1", "--array=1-4%2"],
        env=environment(tmp_path),
        cwd=REPOSITORY,
    )
    spans, hashes = [], set()
    for task in range(1, 5):
        end = cluster.wait(f"{job}_{task}")
        assert end["JobState"] == "COMPLETED", (tmp_path / f"{task}.log").read_text()
        spans.append((end["StartTime"], end["EndTime"]))
        golden, swept = (
            json.loads((tmp_path / folder / "summary.json").read_text())["weights_sha256"]
            for folder in (f"golden-{task}", f"swept/{task}")
        )
        assert golden == swept
        hashes.add(golden)
        assert "wandb_group: swept" in (tmp_path / "swept" / str(task) / "config.yaml").read_text()
    assert len(hashes) == 4
    assert all(sum(start <= moment < end for start, end in spans) <= 2 for moment, _ in spans)
    assert any(sum(start <= moment < end for start, end in spans) == 2 for moment, _ in spans)


def test_preflight_on_two_nodes(cluster, tmp_path):
    folder = tmp_path / "verify"
    values = [value for value in arguments(tmp_path) if not value.startswith(("run.dir=", "tracking.", "checkpoint."))]
    job = cluster.sbatch(
        REPOSITORY / "slurm/preflight.sbatch",
        *("--steps", "6", "--world-sizes", "1,2", "--dir", str(folder), *values),
        options=[*TWO_NODES, f"--output={tmp_path}/job.log", "--cpus-per-task=1"],
        cwd=REPOSITORY,
    )
    state = cluster.wait(job)["JobState"]
    log = (tmp_path / "job.log").read_text()
    assert state == "COMPLETED" and "all equal: " in log, log
    assert len(re.findall(r"^[01]: node[12]: \d+ cores, \d+ GiB", log, re.MULTILINE)) == 2


def test_data_are_cached_by_a_job_and_found_by_the_next(cluster, tmp_path):
    values = [value for value in arguments(tmp_path) if value.startswith("data.")]
    options = [f"--output={tmp_path}/job.log", "--cpus-per-task=1", "--open-mode=append"]
    for _ in range(2):
        job = cluster.sbatch(
            REPOSITORY / "slurm/data.sbatch",
            *(*values, f"data.cache_dir={tmp_path}/cache"),
            options=options,
            cwd=REPOSITORY,
        )
        assert cluster.wait(job)["JobState"] == "COMPLETED"
    lines = (tmp_path / "job.log").read_text().splitlines()
    assert len(lines) == 6 and lines[:3] == lines[3:]
    assert lines[1].startswith(f"cache    {tmp_path}/cache/synthetic-") and Path(lines[1].split()[1]).is_dir()
