"""The cluster of this folder's tests: one for the whole session, idle at the start of each test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.integration.slurm.clusters import Cluster, missing, remains
from tests.integration.slurm.runs import STEPS, Run, arguments, environment


@pytest.fixture(scope="session")
def slurm(clean_environment: None) -> None:
    """Skips where this machine cannot have a cluster. Fails instead in CI, and with DIST_CIFAR_SLURM=1."""
    lacks = missing()
    if lacks:
        message = f"a SLURM cluster needs {' and '.join(lacks)}; see make test-slurm"
        if os.environ.get("CI") == "true" or os.environ.get("DIST_CIFAR_SLURM") == "1":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def session_cluster(slurm: None) -> Iterator[Cluster]:
    cluster = Cluster(3)
    yield cluster
    cluster.close()
    assert remains(cluster.directory) == {}


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """Three nodes, idle."""
    yield session_cluster
    session_cluster.reset()


@pytest.fixture(scope="session")
def golden(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
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
