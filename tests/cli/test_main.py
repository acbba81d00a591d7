"""Errors become exit codes and one line; logging is set up for the time of a command."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from dist_cifar import stopping
from dist_cifar.cli import export, main
from dist_cifar.config import load_config
from dist_cifar.errors import CheckpointError, ConfigError, TrainingError

ROOT_LOGGER = logging.getLogger("dist_cifar")


def test_a_defect_has_an_exit_code_of_its_own():
    code = "import sys; from dist_cifar import stopping; sys.exit(stopping.run_stoppable(lambda: 1 // 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 70 and "ZeroDivisionError" in done.stderr


def test_the_help_imports_nothing_slow():
    code = "import sys; from dist_cifar.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'numpy', 'yaml', 'tqdm', 'multiprocessing'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "75 stopped and saved" in " ".join(out.split()) and out.splitlines()[-1] == "set()"


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("set\n it"), 2, "set it"),
        (CheckpointError("none"), 74, "none"),
        (TrainingError("nan"), 70, "nan"),
        (OSError(28, "No space left on device", "x"), 74, "[Errno 28] No space left on device: 'x'; free space"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line, rank):
    def fail(options):
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("dist_cifar.job.error_line._RANK0_SECONDS", 0.0)
    monkeypatch.setattr(export, "run", fail)
    assert main(["export", "x", "--to", "onnx"]) == code
    out, err = capsys.readouterr()
    prefix = "" if rank == "0" else f"rank {rank}: "
    assert out == "" and err.count("\n") == 1 and err.startswith(f"dist_cifar: error: {prefix}{line}")


def test_another_rank_leaves_it_to_rank_0_that_ends_the_job(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("dist_cifar.stopping.stop_requested", lambda: True)
    assert main(["train", "run.nme=x"]) == 2
    assert capsys.readouterr() == ("", "")


def test_a_defect_is_no_one_line_error(monkeypatch):
    def fail(options):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(export, "run", fail)
    with pytest.raises(OSError, match="Bad file"):
        main(["export", "x", "--to", "onnx"])


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGHUP", 75)])
def test_a_signal_is_one_line_and_an_exit_code(monkeypatch, capfd, name, code):
    def stop(options):
        raise stopping.Stopped(name)

    monkeypatch.setattr(stopping, "_reported", False)
    monkeypatch.setattr(export, "run", stop)
    assert main(["export", "x", "--to", "onnx"]) == code
    assert capfd.readouterr().err == f"dist_cifar: stopped by {name}; nothing was lost, run it again\n"


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(options):
        raise OSError(28, "No space left on device", "x/model.onnx")

    monkeypatch.setattr(export, "run", full)
    assert main(["export", "x", "--to", "onnx"]) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert "x/model.onnx" in line and "free space" in line


# --- logging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_warnings_are_shown_by_rank_0(monkeypatch, capsys, rank, shown):
    def warn(options):
        load_config(None, ["train.precision=fp32"])
        ROOT_LOGGER.info("not shown")
        return 0

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(export, "run", warn)
    assert main(["export", "x", "--to", "onnx"]) == 0
    line = "dist_cifar: warning: command line: keys have new names: train.precision is now compute.precision\n"
    assert capsys.readouterr() == ("", line if shown else "")


def test_what_a_command_shows_ends_with_it(monkeypatch):
    def log(options):
        ROOT_LOGGER.handlers, ROOT_LOGGER.propagate = [logging.NullHandler()], False
        ROOT_LOGGER.setLevel(logging.DEBUG)
        return 0

    before = ROOT_LOGGER.handlers[:], ROOT_LOGGER.level, ROOT_LOGGER.propagate
    monkeypatch.setattr(export, "run", log)
    assert main(["export", "x", "--to", "onnx"]) == 0
    assert (ROOT_LOGGER.handlers, ROOT_LOGGER.level, ROOT_LOGGER.propagate) == before
