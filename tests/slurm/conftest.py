"""The cluster of this folder's tests: a real one, for as long as the session takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from clusters import Cluster
from runs import STEPS, Run, arguments, environment

_NODES = 3


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root")
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"a SLURM cluster needs {', '.join(missing)}; see make test-slurm")
    cluster = Cluster(_NODES)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """Three nodes, idle."""
    _cluster.reset()
    yield _cluster
    _cluster.reset()


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run on one rank, without SLURM."""
    run = Run(tmp_path_factory.mktemp("golden"))
    subprocess.run(
        [sys.executable, "-m", "dist_cifar", "train", *arguments(run.dir)],
        env=environment(run.folder),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert run.step() == STEPS - 1
    assert len({row["lr"] for row in run.rows()}) > 8  # warm-up, and cuts by the plateau
    return run
