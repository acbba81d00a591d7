"""Ten random kill schedules, and mutants that they catch; `schedules.py` plays as many as it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.faults import schedules
from tests.integration.faults.jobs import Jobs
from tests.integration.faults.schedules import Outcome, Played

MUTANT_SEED = 0
"""Its first jobs are saved and gone on with, so a mutant of the resume has something to spoil."""


@pytest.fixture(scope="module")
def golden(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a run on one rank ends with that nothing disturbs."""
    return schedules.golden(jobs, tmp_path_factory.mktemp("golden"))


@pytest.fixture
def play(jobs: Jobs, tmp_path: Path) -> Callable[..., Played]:
    """`play(seed, expected)`: plays a schedule."""
    return lambda seed, *arguments, **options: schedules.run(
        jobs, tmp_path, *schedules.draw(seed), *arguments, **options
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_ended_at_random_ends_as_one_that_is_not(play, golden, seed):
    play(seed, golden)


@pytest.mark.parametrize("mutant", ["forget_adams_steps", "repeat_batch"])
def test_a_resume_that_changes_the_training_is_caught_by_the_weights(play, golden, mutant):
    played = play(MUTANT_SEED, None, mutant=mutant)
    assert any(step > 0 for step in played.resumed)
    assert played.outcome[0] != golden[0]


def test_a_resume_that_forgets_sums_is_caught_by_the_rows(play, golden):
    played = play(MUTANT_SEED, None, mutant="forget_sums")
    assert played.outcome[0] == golden[0]
    assert played.outcome[1] != golden[1]


def test_a_hundred_schedules_are_of_every_kind():
    drawn = [schedules.draw(seed) for seed in range(100)]
    segments = [segment for some, _ in drawn for segment in some]
    assert {len(some) for some, _ in drawn} == {1, 2, 3, 4, 5}
    assert {segment.event for segment in segments} == set(schedules.MOMENTS)
    kinds = {(segment.world_size, segment.signal.name, len(segment.victims)) for segment in segments}
    assert kinds == {
        (world_size, name, count)
        for world_size in schedules.WORLD_SIZES
        for name in ("SIGKILL", "SIGTERM")
        for count in (1, world_size)
    }
    assert drawn == [schedules.draw(seed) for seed in range(100)]
