"""`train` and `launch`: the bits of the command line, stops, failures, and a process that is left as it was."""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dist_cifar
from dist_cifar import plugins, stopping
from dist_cifar.api import launching
from dist_cifar.config import Config, OptimizerConfig, RunConfig, checked, flatten
from dist_cifar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    RankError,
    StoppedError,
    TrainingError,
    UserError,
)
from dist_cifar.job.failure_exit import FailureExit
from dist_cifar.run.run_dir import RunDir
from tests import REPOSITORY

EXACT = ("strategy.name=exact", "train.epochs=4", "run.log_every_steps=1")


class Interrupting(io.StringIO):
    """Standard output as a notebook has it, without a descriptor; a signal comes when a text is printed."""

    def __init__(self, text: str, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self._text, self._number = text, number

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._text and self._text in self.getvalue():
            self._text = ""
            os.kill(os.getpid(), self._number)
        return written


def state_of_the_process() -> dict[str, object]:
    logger = logging.getLogger("dist_cifar")
    return {
        "signals": [signal.getsignal(number) for number in stopping.SIGNALS],
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "logging": (logger.handlers[:], logger.level, logger.propagate),
        "gc": (gc.isenabled(), gc.get_freeze_count()),
        "own hook": sys.unraisablehook.__module__.startswith("dist_cifar"),  # pytest has one for each phase of a test
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def unchanged_process():
    """Every call leaves the process as it was, however it ends; the fixture is what the tests below share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    before = state_of_the_process()
    yield
    assert state_of_the_process() == before
    assert not stopping.stop_requested()
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_bits_are_those_of_the_command_line_also_after_stops(tiny, tmp_path, monkeypatch):
    config = tiny(*EXACT, f"run.dir={tmp_path}/whole")
    whole = dist_cifar.train(config)
    assert whole.status == "done" and whole.run_dir == tmp_path / "whole"
    assert whole.summary == RunDir(whole.run_dir).summary()
    assert [row["step"] for row in whole.metrics if row["kind"] == "train"] == list(range(1, 21))
    shown = f"<RunResult: done, test accuracy {whole.summary['test_accuracy']:.2%}, 20 steps, {tmp_path}/whole>"
    assert repr(whole) == shown

    values = flatten(config) | {"run.dir": f"{tmp_path}/command"}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    words = [word.replace("=None", "=null") for word in words if not word.endswith("=[]")]
    command = [sys.executable, "dist_cifar/train.py", *words]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert RunDir(tmp_path / "command").summary()["weights_sha256"] == whole.summary["weights_sha256"]

    parts = tiny(*EXACT, f"run.dir={tmp_path}/parts")
    monkeypatch.setattr(sys, "stdout", Interrupting("train  step      3"))
    first = dist_cifar.train(parts)
    assert (first.status, first.summary, first.metrics[-1]["step"]) == ("saved", {}, 4)
    monkeypatch.setattr(sys, "stdout", Interrupting("train  step      7"))
    second = dist_cifar.launch(parts, ranks=2)
    assert second.status == "saved" and 7 <= second.metrics[-1]["step"] < 20
    assert "ranks      2 x cpu, 1 thread each, strategy exact" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", Interrupting(""))
    third = dist_cifar.launch(parts, ranks=2, must_resume=True)
    assert third.status == "done" and third.summary["world_size"] == 2
    assert third.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert [row["step"] for row in third.metrics if row["kind"] == "train"] == list(range(1, 21))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)])
def test_a_stop_before_there_is_anything_to_save_is_raised(tiny, monkeypatch, number, error):
    monkeypatch.setattr(sys, "stdout", Interrupting("run        ", number))
    monkeypatch.setattr(stopping, "_deferred", True)  # as a training that was called directly leaves it
    with pytest.raises(error):
        dist_cifar.train(tiny())


def test_a_signal_in_the_final_test_leaves_the_run_saved(tiny, monkeypatch):
    monkeypatch.setattr("dist_cifar.evaluate.Evaluator.test", lambda self, model: os.kill(os.getpid(), signal.SIGINT))
    result = dist_cifar.train(tiny("train.max_steps=1"))
    assert (result.status, result.summary) == ("saved", {})


FAILING = """
import os, signal
if os.environ.get("RANK") == "1":
    from dist_cifar.trainer import Trainer
    def failing_step(self, batch):
        {}
    Trainer.train_step = failing_step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "messages"),
    [
        ("raise ZeroDivisionError('oh')", ("rank 1 failed: ZeroDivisionError: oh", "in failing_step")),
        ("os.kill(os.getpid(), signal.SIGKILL)", ("rank 1", "was killed")),
    ],
)
def test_a_rank_that_fails_comes_back_as_an_exception(tiny, tmp_path, monkeypatch, statement, messages):
    (tmp_path / "sitecustomize.py").write_text(FAILING.format(statement))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{REPOSITORY}")
    with pytest.raises(RankError) as raised:
        dist_cifar.launch(tiny(), ranks=2)
    assert raised.value.rank == 1 and all(message in str(raised.value) for message in messages)
    assert bool(raised.value.traceback) == ("Zero" in statement)
    assert RunDir(tmp_path / "run").status()["rank"] == 1


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_as_it_is_and_is_in_the_status(tiny, monkeypatch):
    def fail(self, batch):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("dist_cifar.trainer.Trainer.train_step", fail)
    with pytest.raises(ZeroDivisionError, match="oh"):
        dist_cifar.train(tiny())
    status = RunDir(tiny().run.dir).status()
    assert status["status"] == "failed" and "ZeroDivisionError: oh" in status["reason"]


def test_trackers_are_closed_when_a_training_fails(tiny, monkeypatch):
    ends = []

    class Own:
        def __init__(self, config, run_dir):
            pass

        def log(self, row):
            raise AssertionError("no step is done")

        def finish(self, exit_code, results=None):
            ends.append((exit_code, results))

    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_tracker("own")(Own)
    monkeypatch.setattr("dist_cifar.trainer.Trainer.train_step", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dist_cifar.train(tiny("tracking.also=[own]"))
    assert ends == [(70, None)]


def test_an_error_of_the_disk_is_one_for_users(tiny, monkeypatch):
    def fail(self, batch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_cifar.trainer.Trainer.train_step", fail)
    with pytest.raises(DataError, match=r"run\.dir=.*No space left on device; free space"):
        dist_cifar.train(tiny())


def test_nothing_to_resume_is_an_error(tiny):
    with pytest.raises(CheckpointError, match="resume"):
        dist_cifar.train(tiny(), must_resume=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/quickstart.yaml", r"a Config is needed, found .*; load_config\(path\) reads one"),
        (Config(optimizer=OptimizerConfig(lr="1e-3")), r"Config: optimizer\.lr: must be a number"),
        (Config(run=RunConfig(name="a/b")), r"run\.name: must be a name without"),
    ],
)
def test_a_config_is_checked(config, message):
    for call in (dist_cifar.train, lambda config: dist_cifar.launch(config, ranks=1)):
        with pytest.raises(ConfigError, match=message):
            call(config)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(0, "ranks=0; give a whole"), (-1, "1 or more"), (True, "ranks=True"), ("2", "ranks='2'"), (2.0, "ranks=2.0")],
)
def test_ranks_are_a_whole_number(tiny, ranks, message):
    with pytest.raises(ConfigError, match=message):
        dist_cifar.launch(tiny(), ranks=ranks)


def test_ranks_that_cannot_share_the_batch_are_refused_before_any_is_started(tiny, monkeypatch):
    monkeypatch.setattr(launching, "exit_codes", None)
    with pytest.raises(ConfigError, match="9 ranks cannot share 8 virtual ranks"):
        dist_cifar.launch(tiny("strategy.name=exact"), ranks=9)
    with pytest.raises(ConfigError, match="17 ranks cannot share a global batch of 16"):
        dist_cifar.launch(tiny(), ranks=17)
    with pytest.raises(ConfigError, match="16 samples cannot be shared equally by 3 ranks"):
        dist_cifar.launch(tiny("strategy.name=deepspeed"), ranks=3)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(LaunchError, match="this process is rank 1 of 2"):
        dist_cifar.launch(tiny(), ranks=2)


# --- what ranks report -------------------------------------------------------------------------------------------


def report(rank: int, error: Exception, *, notes: tuple[str, ...] = ()) -> dict[str, object]:
    return {
        "rank": rank,
        "failed_rank": getattr(error, "rank", rank),
        "type": type(error).__name__,
        "is_for_users": isinstance(error, UserError),
        "message": str(error),
        "notes": list(notes),
        "traceback": "Traceback: ...",
    }


LOST = RankError("rank 1 (here, pid 7) was killed or lost at step 3: its process is gone", rank=1)


@pytest.mark.parametrize(
    ("reports", "codes", "kind", "message", "rank"),
    [
        ([report(0, LOST), report(1, ValueError("oh"))], [70, 70], RankError, "rank 1 failed: ValueError: oh", 1),
        (
            [report(0, ConfigError("set this")), report(1, ConfigError("set this"))],
            [2, 2],
            ConfigError,
            "set this",
            None,
        ),
        ([report(0, KeyError("a"), notes=("rank 1 was first",)), report(1, OSError("b"))], [70, 70], RankError, "b", 1),
        ([report(0, TrainingError("loss", rank=1))], [70, -9], TrainingError, "loss", 1),
        ([report(0, LOST)], [70, -9], RankError, "was killed or lost at step 3", 1),
        ([], [0, 70, -11], RankError, "rank 2 of 3 was killed by SIGSEGV", 2),
        ([], [0, 3], RankError, "rank 1 of 2 ended with exit code 3", 1),
    ],
)
def test_the_error_is_that_of_the_rank_that_failed_first(reports, codes, kind, message, rank):
    error = launching._failure(reports, codes)
    assert type(error) is kind and message in str(error) and getattr(error, "rank", None) == rank


def test_an_error_class_of_a_plug_in_stays_one_for_users():
    class Mine(UserError):
        pass

    error = launching._failure([report(0, Mine("give a width"), notes=("a note",))], [2])
    assert type(error) is UserError and str(error) == "give a width" and error.__notes__ == ["a note"]


def test_what_another_rank_has_caused_is_raised_with_its_name(tmp_path):
    failure = SimpleNamespace(by=1, rank=1, reason="KeyError: 'a'", is_stop=False, conclusion="failed", sentence=str)
    failure.sentence = lambda identities: "rank 1 failed at step 3: KeyError: 'a'"
    communicator = SimpleNamespace(rank=0, step=3, identities=[SimpleNamespace(host="here", pid=7)] * 2)
    detector = SimpleNamespace(report=lambda error: failure)
    failure_exit = FailureExit(RunDir(tmp_path), communicator)
    with pytest.raises(RankError, match="rank 1 failed at step 3") as lost:
        failure_exit.reraise(RuntimeError("[gloo/transport] Connection closed by peer"), detector)
    assert lost.value.rank == 1
    with pytest.raises(ValueError, match="mine") as own:
        failure_exit.reraise(ValueError("mine"), detector)
    assert own.value.__notes__ == ["rank 1 failed at step 3: KeyError: 'a'"]


def test_a_config_that_was_changed_in_python_has_its_run_directory(tiny):
    config = dataclasses.replace(tiny(), run=RunConfig(name="mine"))
    assert config.run.dir is None and checked(config).run.dir == "runs/mine"
