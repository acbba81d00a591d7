"""What this package uses of Accelerate's private parts is as it was: fails where a version changes it."""

from __future__ import annotations

import os

import pytest
from accelerate.state import PartialState

from dist_cifar.tracking.accelerate_private import any_state, has_state


@pytest.fixture(autouse=True)
def no_state():
    """An earlier test of this process may have left one."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_a_state_is_seen_and_taken_away_by_the_private_parts():
    assert not has_state()
    PartialState(cpu=True)
    assert has_state() and PartialState().num_processes == 1
    PartialState._reset_state()
    assert not has_state()


def test_a_state_that_a_strategy_has_made_is_left_alone():
    own = PartialState(cpu=True)
    with any_state():
        assert PartialState().__dict__ is own.__dict__
    assert has_state(), "the strategy still needs it"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_rank_without_a_state_gets_that_of_a_process_by_itself(monkeypatch, name):
    """Otherwise Accelerate would start a process group of its own, and wait for the job's other ranks in it."""
    monkeypatch.setenv(name, "3")
    with any_state():
        state = PartialState()
        assert (state.num_processes, state.process_index, state.is_main_process) == (1, 0, True)
        assert os.environ[name] == "3"
    assert not has_state()


def test_the_state_is_taken_away_after_an_error():
    with pytest.raises(RuntimeError, match="of the tracker"), any_state():
        raise RuntimeError("of the tracker")
    assert not has_state()
