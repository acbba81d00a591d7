"""What `submit` renders, as the real sbatch reads it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY

pytestmark = pytest.mark.slurm

NAMES = ["plain", "with blank", "it's", 'double "quote"', "$(touch hacked)", "a#b", "back\\slash", "semi;colon", "ä/ö"]


def submit(cluster, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "dist_cifar", "submit", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "SLURM_CONF": str(cluster.directory / "etc/slurm.conf")},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


SHAPES = [
    [f"--nodes={nodes}", f"--gpus-per-node={gpus}", "--cpus-per-task=8", *array, *extra]
    for (nodes, gpus), array, extra in itertools.product(
        ((1, 0), (1, 4), (2, 2)),
        ((), ("--sweep=SWEEP", "--at-once=2")),
        (("--constraint=h100&a100",), ("--container=/shared/an image.sif",)),
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
def test_sbatch_accepts_it(cluster, shape, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.seed=1\nrun.seed=2\n")
    arguments = [argument.replace("SWEEP", str(sweep)) for argument in shape]
    code, script, verdict = submit(cluster, "--dry-run", *arguments)
    assert code == 0, verdict
    assert "to start at" in verdict and script.startswith("#!/bin/bash")
    assert cluster.run("squeue", "-h") == ""


REFUSED = ("--partition=nowhere", "--gpus-per-node=8", "--gpus-per-node=4", "--constraint=v100", "--time=soon")


@pytest.mark.parametrize("argument", REFUSED)
def test_sbatch_refuses_it(cluster, argument):
    """Its nodes have four GPUs and eight cores: two of these for each of those, and not eight."""
    code, _, error = submit(cluster, argument)
    assert code == 2 and "submit: refused by sbatch" in error and error.count("\n") == 1
    assert cluster.run("squeue", "-h") == ""


def test_hostile_names(cluster, tmp_path):
    """sbatch reads each job name as it was given, and nothing of it is run."""
    for name in NAMES:
        code, script, error = submit(cluster, "--dry-run", "--job-name", name, f"run.dir={tmp_path}/{name}")
        assert code == 0, error
        (tmp_path / "script").write_text(script)
        job = cluster.sbatch(tmp_path / "script", options=["--hold"])
        assert cluster.run("squeue", "-h", "-j", str(job), "-o", "%j") == f"{name}\n"
        log = Path(cluster.job(job)["StdOut"])
        assert log.parent == REPOSITORY / "slurm/logs" and log.suffix == ".log"
    assert not (REPOSITORY / "hacked").exists()
