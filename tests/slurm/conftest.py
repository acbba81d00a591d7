"""The cluster of this folder's tests: one for the whole session, idle at the start of each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from clusters import Cluster, missing, remains


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
