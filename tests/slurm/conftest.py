"""The cluster of this folder's tests: a real one, for as long as the session takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from clusters import Cluster

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
