"""Trackers through Accelerate's: TensorBoard's files are read back."""

from __future__ import annotations

import pytest
from accelerate import tracking as accelerates
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_cifar.config import Config, known_names, load_config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tracking.accelerate_private import has_state
from dist_cifar.tracking.exactly_once import named
from dist_cifar.tracking.registry import open_trackers
from dist_cifar.trainer import train


def run(communicator: Communicator, config: Config) -> bool:
    return train(config, communicator)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each curve, over all starts of a run, in the order of writing."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("*/events.out.*")):
        reader = EventAccumulator(str(file), size_guidance={"scalars": 0})
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            curves.setdefault(name, []).extend((event.step, event.value) for event in reader.Scalars(name))
    return curves


def expected(run_dir) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in RunDir(run_dir).metrics()[0]:
        for name, value in named(row).items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return curves


def test_the_names_are_those_that_accelerate_knows():
    assert set(known_names("tracking", "also")) == set(accelerates.LOGGER_TYPE_TO_CLASS) - {"wandb"}


def test_what_is_not_installed_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerates, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match=r"tracking.also: mlflow is not installed; pip install mlflow"):
        open_trackers(load_config(None, ["tracking.also=[mlflow]"]), tmp_path, resume_step=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_every_number_is_in_tensorboards_file_once_after_a_resume_too(ranks, tiny, strategy):
    """On two ranks, of which one opens it; with strategies that ask Accelerate and those that do not."""
    words = ["tracking.also=[tensorboard]", f"strategy.name={strategy}"]
    config = tiny(*words, "train.epochs=1")
    assert ranks.run(2, run, config) == [True, True]
    assert ranks.run(2, run, tiny(*words, "train.epochs=2")) == [True, True]
    folder = RunDir(config.run.dir).path / "tensorboard"
    found, wanted = scalars(folder), expected(config.run.dir)
    assert len(list(folder.glob("*/events.out.*"))) == 2 and found == wanted


def test_rows_that_a_tracker_was_given_are_not_given_again(tmp_path):
    """A process that died had gone beyond the checkpoint."""
    config = load_config(None, ["tracking.also=[tensorboard]"])
    for resume_step in (None, 2):
        trackers = open_trackers(config, tmp_path, resume_step=resume_step)
        for step in range((resume_step or 0) + 1, 6 if resume_step else 5):
            for tracker in trackers:
                tracker.log({"kind": "train", "step": step, "loss": 1 / step})
        trackers[1].finish(0)
        trackers[0].finish(0)
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3, 4, 5]
    assert [path.read_text() for path in tmp_path.glob("*.rows")] == ["." * 5] and not has_state()


def test_a_failure_is_said_once_and_ends_nothing(tmp_path, monkeypatch, said):
    class Broken(accelerates.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir):
            super().__init__()

        def log(self, values, step):
            raise OSError("No space\nleft")

        finish = None  # not callable

    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = load_config(None, ["tracking.also=[tensorboard]"])
    jsonl, tracker = open_trackers(config, tmp_path, resume_step=None)
    for number in range(2):
        tracker.log({"kind": "train", "step": number, "loss": 1.0})
    tracker.finish(0)
    jsonl.finish(0)
    assert said == ["tensorboard: No space left; some of the metrics will be missing there"]
    monkeypatch.setattr(Broken, "start", None)
    (jsonl,) = open_trackers(config, tmp_path, resume_step=None)
    jsonl.finish(0)
    assert said[-1].startswith("tensorboard: ") and said[-1].endswith("; continuing without it")
