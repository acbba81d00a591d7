"""Ranks that `train --ranks N` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_cifar import stopping
from dist_cifar.cli import main
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.job import local_ranks
from dist_cifar.job.local_ranks import outcome, run_ranks


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([2, 2], 2),
        ([70, 74], 74),
        ([70, 70], 70),
        ([70, -9], 70),
        ([0, -9], 137),
        ([-15, -15], 143),
    ],
)
def test_the_code_is_that_of_the_rank_that_failed_first(codes, code):
    assert outcome(codes) == code


def python(code: str) -> list[str]:
    return ["/bin/sh", "-c", code]


def test_every_rank_has_its_place_and_nothing_of_another_launcher(tmp_path):
    code = f"env > {tmp_path}/$RANK"
    environ = {"PATH": os.environ["PATH"], "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "n1"}
    assert run_ranks(3, python(code), environ=environ) == 0
    envs = []
    for rank in range(3):
        lines = (tmp_path / str(rank)).read_text().splitlines()
        envs.append(read_env(dict(line.split("=", 1) for line in lines)))
        assert not any(line.startswith("SLURM_") for line in lines)
    assert [(env.rank, env.world_size, env.local_rank, env.local_world_size) for env in envs] == [
        (rank, 3, rank, 3) for rank in range(3)
    ]
    assert len({(env.job, env.master_port, env.master_addr) for env in envs}) == 1


def test_the_others_do_not_wait_for_ever_for_one_that_failed(monkeypatch):
    monkeypatch.setattr(local_ranks, "_GRACE_SECONDS", 0.2)
    started = time.monotonic()
    assert run_ranks(2, python('[ "$RANK" = 1 ] && exit 74; exec sleep 60'), environ=dict(os.environ)) == 74
    assert time.monotonic() - started < 30


def test_a_signal_reaches_every_rank():
    rank = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    code = f"from dist_cifar.job.local_ranks import run_ranks; import sys; sys.exit(run_ranks(2, {python(rank)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


@pytest.mark.parametrize("found", [{"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}])
def test_ranks_of_another_launcher_are_not_started_again(found, monkeypatch, capsys):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--ranks", "3"]) == 2
    assert "--ranks 3 was given and a launcher has started 2" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_after_a_signal_no_rank_is_started(monkeypatch, name, code):
    monkeypatch.setattr(stopping, "_received", [signal.Signals[name]])
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a rank is started"))
    assert local_ranks.exit_codes(2, ["true"], {}) == [code, code]
