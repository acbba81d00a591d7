"""A rank dies, hangs, fails or goes astray: the job ends in time, all name the right rank, and it can be resumed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_cifar.config import Config, to_yaml
from tests import REPOSITORY
from tests.integration.faults.jobs import START_SECONDS, Job, Jobs

WORLD_SIZE, STEPS, AT_STEP = 3, 18, 8
TIMEOUT_SECONDS, END_SECONDS = 120, 60
"""The jobs' `run.timeout_seconds`, which no test but those of `STALL` waits for, and how long a job may take to end: as
long as a busy machine needs, and too short for a rank that would wait for the timeout."""
STALL_SECONDS = 8
STALL = f"run.timeout_seconds={STALL_SECONDS}"
"""For the faults that only the timeout finds."""


@pytest.fixture
def run(jobs: Jobs, tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Job]:
    """`run(**options)`: starts the job of these tests in `tmp_path`, or resumes it."""
    path = tmp_path / "config.yaml"
    path.write_text(
        to_yaml(
            tiny(
                "batch.global_size=12",
                "train.epochs=3",
                "run.log_every_steps=1",
                "checkpoint.every_steps=5",
                f"run.timeout_seconds={TIMEOUT_SECONDS}",
            )
        )
    )

    def start(*overrides: str, world_size: int = WORLD_SIZE, directory: str = "run", **options: Any) -> Job:
        arguments = ("train", "--config", path, f"run.dir={tmp_path / directory}", *overrides)
        return jobs.start(world_size, *arguments, **options)

    return start


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    """The hash of an undisturbed run; filled by `require_golden`."""
    return {}


def require_resumes(run: Callable[..., Job], golden: dict[str, str]) -> None:
    """The same job again ends with the weights of a run that nothing disturbed."""
    job = run()
    saved = list(job.run_dir.glob("checkpoints/step-*"))  # one that was being written when the job died is lost
    assert job.wait(START_SECONDS) == [0] * WORLD_SIZE, job
    assert bool(saved) == bool(re.search(r"resume     from the checkpoint of step \d", job.stdout(0)))
    require_golden(job, run, golden)


def require_golden(job: Job, run: Callable[..., Job], golden: dict[str, str]) -> None:
    """The job has ended with the weights of a run that nothing disturbed."""
    if not golden:
        undisturbed = run(directory="golden")
        assert undisturbed.wait(START_SECONDS) == [0] * WORLD_SIZE, undisturbed
        assert undisturbed.summary()["steps"] == STEPS
        golden["sha256"] = undisturbed.summary()["weights_sha256"]
    assert job.summary()["weights_sha256"] == golden["sha256"]


def require_named(job: Job, codes: list[int], culprit: int, what: str, *, own_code: int) -> None:
    """The culprit ended with `own_code`; all others with 70 and one line, the same, that names it and says `what`."""
    assert codes == [own_code if rank == culprit else 70 for rank in range(len(codes))], job
    for rank in set(range(len(codes))) - {culprit}:
        line = f"dist_cifar: error: rank {rank}: rank {culprit} ("
        assert len(job.errors(rank)) == 1 and job.errors(rank)[0].startswith(line), job
        assert f"pid {job.pids[culprit]}) {what}" in job.errors(rank)[0], job
        assert "Traceback" not in job.stderr(rank), job
    status = job.status()
    assert (status["status"], status["rank"]) == ("failed", culprit) and status["reason"].startswith(what), status
    assert list(job.run_dir.glob(".tmp-*")) == []


# --- a rank is killed or stopped ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "agent"), [(1, True), (0, True), (0, False), (2, False)])
def test_a_killed_rank_is_named_and_the_run_can_be_resumed(run, golden, rank, agent):
    job = run(agent=agent)
    job.wait_for_step(AT_STEP)
    job.kill(rank)
    require_named(job, job.wait(END_SECONDS), rank, "was killed or lost at step ", own_code=-signal.SIGKILL)
    require_resumes(run, golden)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "agent"), [(1, True), (0, False)])
def test_a_stopped_rank_is_named_and_killed(run, golden, rank, agent):
    job = run(STALL, agent=agent)
    job.wait_for_step(AT_STEP)
    job.stop(rank)
    codes = job.wait(STALL_SECONDS + END_SECONDS)
    require_named(job, codes, rank, "was killed or lost at step ", own_code=-signal.SIGKILL)
    require_resumes(run, golden)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_a_job_that_is_suspended_for_longer_than_its_timeout_continues(run, strategy):
    overrides, ranks = (f"strategy.name={strategy}", "strategy.virtual_ranks=2"), range(2)
    undisturbed = run(*overrides, directory="undisturbed", world_size=2)
    assert undisturbed.wait(START_SECONDS) == [0, 0], undisturbed
    job = run(*overrides, STALL, world_size=2)
    for step in (AT_STEP // 2, AT_STEP):
        job.wait_for_step(step)
        for rank in ranks:
            job.stop(rank)
        time.sleep(1.5 * STALL_SECONDS)
        for rank in ranks:
            job.go_on(rank)
    assert job.wait(START_SECONDS) == [0, 0], job
    assert job.summary()["weights_sha256"] == undisturbed.summary()["weights_sha256"]


@pytest.mark.slow
def test_a_main_thread_that_waits_for_ever_in_a_gpus_collective_is_ended_by_its_watch(run):
    """Rank 0 sees no timeout itself: its any-reduce, in the background, does."""
    job = run(STALL, world_size=2, inject={0: ["hang_at", AT_STEP], 1: ["stop_before_any_reduce", AT_STEP]})
    codes = job.wait(STALL_SECONDS + END_SECONDS)
    require_named(job, codes, 1, f"was killed or lost at step {AT_STEP}: its process is stopped", own_code=-9)


@pytest.mark.slow
def test_a_rank_that_stops_while_the_job_comes_together_ends_it(run):
    job = run(STALL, inject={1: ["stop_before_joining"]}, agent=False)
    deadline = time.monotonic() + STALL_SECONDS + END_SECONDS
    while job.left_over() != [job.pids[1]] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.left_over() == [job.pids[1]]  # nobody has learned its name: its launcher kills it
    job.kill(1)
    assert job.wait(END_SECONDS) == [2, -9, 2]
    waited = f"rank 0 of 3 has waited {STALL_SECONDS} s (run.timeout_seconds) for ranks that have not connected: 1;"
    assert len(job.errors(0)) == 1 and waited in job.errors(0)[0], job


def test_ranks_that_do_not_come_together_end_within_the_timeout(run):
    """Also one whose own wait has no end: it ends itself."""
    job = run(STALL, inject={1: ["hang_while_joining"]})
    assert job.wait(STALL_SECONDS + END_SECONDS) == [2, 2, 2], job
    waited = f"rank 1 of 3 on {socket.gethostname()} waited {STALL_SECONDS} s (run.timeout_seconds) for all ranks"
    assert len(job.errors(1)) == 1 and waited in job.errors(1)[0], job


# --- a rank fails or hangs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "agent"), [(1, True), (0, False)])
def test_an_exception_is_told_by_all_and_traced_by_one(run, golden, rank, agent):
    job = run(inject={rank: ["raise_at", AT_STEP]}, agent=agent)
    codes = job.wait(END_SECONDS)
    require_named(job, codes, rank, f"failed at step {AT_STEP}: ValueError: injected", own_code=70)
    assert job.stderr(rank).rstrip().endswith("ValueError: injected") and not job.errors(rank)
    require_resumes(run, golden)


@pytest.mark.slow
def test_a_rank_whose_main_thread_hangs_is_named_with_its_place(run, golden):
    job = run(STALL, inject={1: ["hang_at", AT_STEP]})
    codes = job.wait(END_SECONDS)
    require_named(job, codes, 1, f"hung at step {AT_STEP}: its main thread is in trainer.py:", own_code=70)
    require_resumes(run, golden)


@pytest.mark.slow
@pytest.mark.parametrize("injection", [["skip_any_reduce", AT_STEP], ["skip_gather", 2]])
def test_a_rank_that_skips_a_collective_is_named(run, golden, injection):
    job = run(STALL, inject={1: injection})
    assert job.wait(END_SECONDS) == [70, 70, 70], job
    status = job.status()
    assert (status["status"], status["rank"]) == ("failed", 1), status
    assert "the order of the collectives" in status["reason"], status
    assert "rank 1" in job.errors(0)[0] and "the order of the collectives" in job.errors(0)[0], job
    require_resumes(run, golden)


def test_a_flipped_bit_is_found_at_the_next_checkpoint(run, golden):
    job = run(inject={2: ["flip_bit", AT_STEP, "fc.weight"]})
    assert job.wait(END_SECONDS) == [70, 70, 70], job
    assert not (job.run_dir / "checkpoints/step-00000010").exists()
    lines = [line for rank in range(WORLD_SIZE) for line in job.errors(rank)]
    assert len(lines) == 1 and lines == job.errors(0)  # all know it, one says it
    named = r"the weights \(\S+, by its SHA-256\) differs between ranks: rank 2 has .*from most: \[2\]"
    assert re.search(named, lines[0]), lines
    assert job.status()["rank"] == 2
    require_resumes(run, golden)


def test_the_flipped_tensor_is_named(run):
    """Found in the step in which it flips, before it has spread to the others."""
    job = run("checkpoint.every_steps=1", inject={2: ["flip_bit", 1, "fc.weight"]})
    assert job.wait(END_SECONDS) == [70, 70, 70], job
    assert "the weights (fc.weight, by its SHA-256) differs between ranks: rank 2 has" in job.errors(0)[0]


@pytest.mark.parametrize("whom", ["lowest", "itself"])
def test_a_roll_call_that_blames_another_rank_is_caught(run, whom):
    """The mutants: with them, the check of this file does not pass."""
    job = run(inject={rank: ["blame", whom] for rank in range(WORLD_SIZE)})
    job.wait_for_step(AT_STEP)
    job.kill(1)
    codes = job.wait(END_SECONDS)
    assert codes[1] == -9
    with pytest.raises(AssertionError):
        require_named(job, codes, 1, "was killed or lost at step ", own_code=-signal.SIGKILL)


# --- a real launcher ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_with_a_stopped_rank_leaves_nothing(run, tmp_path):
    directory = tmp_path / "run"
    command = (
        f"{Path(sys.executable).parent}/torchrun --standalone --nproc-per-node 2 dist_cifar/train.py"
        f" --config {tmp_path}/config.yaml run.dir={directory} train.epochs=2000 {STALL}"
    )
    agent = subprocess.Popen(
        shlex.split(command), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (directory / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        victim = next(pid for pid in ranks_in(directory) if "\0LOCAL_RANK=1\0" in environment(pid))
        os.kill(victim, signal.SIGSTOP)
        _, err = agent.communicate(timeout=STALL_SECONDS + END_SECONDS)
    finally:
        agent.kill()
        agent.communicate()
    assert agent.returncode == 1
    assert f"pid {victim}) was killed or lost at step" in err and "rank 0: rank 1 (" in err
    assert ranks_in(directory) == []
    status = json.loads((directory / "status.json").read_text())
    assert (status["status"], status["rank"]) == ("failed", 1)


def ranks_in(directory: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={directory}" in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


# --- two jobs, one run directory ---------------------------------------------------------------------------------


def test_a_second_job_in_the_run_directory_is_refused_and_disturbs_nothing(run, golden):
    first = run()
    first.wait_for_step(2)
    first.stop(0)  # it holds the lock and will not end
    second = run(STALL)
    assert second.wait(END_SECONDS) == [2, 2, 2], second
    assert f"pid {first.pids[0]}, since " in second.errors(0)[0] and "is using it" in second.errors(0)[0]
    assert second.stdout(0).count("waiting up to 4 s for another job") == 1
    assert not second.errors(1)
    first.go_on(0)
    assert first.wait(START_SECONDS) == [0, 0, 0], first
    require_golden(first, run, golden)


def test_a_job_waits_for_one_that_is_about_to_end(run, golden):
    first = run()  # its other ranks must still be waiting for the one that stops
    first.wait_for_step(2)
    first.stop(0)
    second = run()
    deadline = time.monotonic() + START_SECONDS
    while "waiting up to" not in second.stdout(0) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in range(WORLD_SIZE):
        first.kill(rank)
    assert second.wait(START_SECONDS) == [0, 0, 0], second
    assert first.wait(END_SECONDS) == [-9, -9, -9]
