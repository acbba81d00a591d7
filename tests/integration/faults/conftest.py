"""The fixture of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.faults.jobs import Jobs


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> Iterator[Jobs]:
    """Starts jobs; see `jobs.py`."""
    starter = Jobs(tmp_path_factory.mktemp("jobs"))
    yield starter
    starter.close()
