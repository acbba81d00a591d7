"""`run.profile`: what is timed adds up, what is traced opens, and the weights do not know of it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cifar import trainer
from dist_cifar.config import Config
from dist_cifar.distributed.any_reduce import AsyncAnyReduce
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.run import step_profiler
from dist_cifar.run.step_profiler import Profile, phase

STEPS = step_profiler.SKIPPED_STEPS + step_profiler.TIMED_STEPS + 1 + step_profiler.TRACED_STEPS
LONG = (f"train.max_steps={STEPS + 2}", "train.epochs=20", "eval.every_epochs=20", "strategy.virtual_ranks=2")


def train(communicator: Communicator, config: Config) -> str:
    """What the run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert trainer.train(config, communicator)
    return out.getvalue()


def weights(config: Config) -> str:
    return json.loads(Path(config.run.dir, "summary.json").read_text())["weights_sha256"]


@pytest.mark.parametrize("strategy", ["exact", "ddp", "deepspeed", "fsdp"])
def test_two_ranks_write_a_summary_and_traces_and_train_to_the_same_weights(ranks, tiny, tmp_path, strategy):
    plain = tiny(*LONG, f"strategy.name={strategy}", f"run.dir={tmp_path}/plain")
    profiled = tiny(*LONG, f"strategy.name={strategy}", f"run.dir={tmp_path}/profiled", "run.profile=true")
    ranks.run(2, train, plain)
    said = ranks.run(2, train, profiled)[0]
    assert "\n  data wait " in said and "most on rank" in said
    assert weights(profiled) == weights(plain)
    assert not Path(plain.run.dir, "profile").exists()

    summary = json.loads(Path(profiled.run.dir, "profile/summary.json").read_text())
    known = set(step_profiler.PHASES) if strategy in ("exact", "ddp") else set(step_profiler.PHASES) - {"reduction"}
    assert set(summary["phases"]) == known
    assert (summary["timed_steps"], summary["world_size"]) == (step_profiler.TIMED_STEPS, 2)
    assert sum(row["milliseconds"] for row in summary["phases"].values()) == pytest.approx(
        summary["milliseconds_per_step"]
    )
    assert sum(row["share"] for row in summary["phases"].values()) == pytest.approx(1)
    for row in summary["phases"].values():
        assert row["slowest_milliseconds"] >= row["milliseconds"] > 0
    for rank in range(2):
        with gzip.open(Path(profiled.run.dir, "profile", step_profiler.trace_name(rank)), "rt") as file:
            events = json.load(file)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for name in ("data wait", "forward", "backward", "optimizer", "other"):
            assert names.count(name) % step_profiler.TRACED_STEPS == 0 < names.count(name), name
        assert any(event["name"] == "aten::convolution" for event in events)


def train_without_a_vote_under_way(communicator: Communicator, config: Config) -> int:
    """The steps that began; fails if one does while the ranks vote."""
    patch, votes, steps = pytest.MonkeyPatch(), [0], [0]
    start, result, enter = AsyncAnyReduce.start, AsyncAnyReduce.result, Profile.enter

    def start_one(vote: AsyncAnyReduce, *arguments: Any) -> None:
        votes[0] += 1
        start(vote, *arguments)

    def end_one(vote: AsyncAnyReduce) -> list[bool]:
        votes[0] -= 1
        return result(vote)

    def enter_one(opened: Profile, name: str) -> None:
        if name == "data":  # a step begins
            steps[0] += 1
            assert votes == [0]
        enter(opened, name)

    patch.setattr(AsyncAnyReduce, "start", start_one)
    patch.setattr(AsyncAnyReduce, "result", end_one)
    patch.setattr(Profile, "enter", enter_one)
    try:
        train(communicator, config)
    finally:
        patch.undo()
    return steps[0]


def test_the_profiler_starts_and_stops_while_no_collective_is_under_way(ranks, tiny):
    """Stopped during one, torch's profiler writes to memory that it has freed: one run in a hundred crashed."""
    config = tiny("train.max_steps=8", "train.epochs=20", "eval.every_epochs=20", "run.profile=true")
    assert ranks.run(2, train_without_a_vote_under_way, config) == [8, 8]


def test_a_run_that_ends_early_says_what_there_is(ranks, tiny):
    config = tiny("train.max_steps=8", "train.epochs=20", "eval.every_epochs=20", "run.profile=true")
    assert "mean of 2 steps" in ranks.run(1, train, config)[0]
    assert json.loads(Path(config.run.dir, "profile/summary.json").read_text())["timed_steps"] == 2
    few = tiny("train.max_steps=4", "run.profile=true", f"run.dir={config.run.dir}-few")
    assert "the run was shorter than 7 steps" in ranks.run(1, train, few)[0]
    assert not Path(few.run.dir, "profile").exists()


@pytest.fixture
def wait(monkeypatch):
    """A function that lets some seconds pass on the profiler's clock, on which no time passes otherwise."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(step_profiler, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def advance(seconds):
        clock.now += seconds

    return advance


def test_phases_last_until_the_next_and_what_is_outside_of_a_step_does_not_count(tmp_path, wait):
    with Profile(tmp_path, rank=0, device=torch.device("cpu")) as opened:
        for _ in range(step_profiler.SKIPPED_STEPS + 3):
            phase("data")
            phase("forward")
            wait(0.02)
            phase("data wait of another kind")  # no phase of a step
            wait(0.05)
            phase("forward")
            wait(0.02)
            phase("other")
    steps = opened.milliseconds()
    assert len(steps) == 2
    summary = step_profiler.summarize([steps, [{"forward": 400.0}, {"forward": 600.0}]])
    assert set(summary["phases"]) == {"data", "forward", "other"}
    forward = summary["phases"]["forward"]
    assert (forward["slowest_rank"], forward["slowest_milliseconds"]) == (1, 500.0)
    assert 2 * forward["milliseconds"] - 500 == pytest.approx(40)
    assert summary["milliseconds_per_step"] == pytest.approx((500 + sum(map(sum, map(_own, steps))) / 2) / 2)


def _own(step: dict[str, float]) -> list[float]:
    return [milliseconds for name, milliseconds in step.items() if name in step_profiler.PHASES]


def test_reduction_begins_at_the_last_gradient(tmp_path, wait):
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    step_profiler.reduction_follows(parameters)
    with Profile(tmp_path, rank=0, device=torch.device("cpu")) as opened:
        for _ in range(step_profiler.SKIPPED_STEPS + 2):
            phase("data")
            phase("backward")
            wait(0.01)
            sum(parameter.sum() for parameter in parameters).backward()
            wait(0.02)
            phase("other")
    (step,) = opened.milliseconds()
    assert (step["backward"], step["reduction"]) == pytest.approx((10, 20))


def test_nothing_is_left_open_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Profile(tmp_path, rank=0, device=torch.device("cpu")):
        raise ZeroDivisionError
    phase("forward")
    with Profile(tmp_path, rank=0, device=torch.device("cpu")):
        pass
