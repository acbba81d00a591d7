"""How the only rank of a job ends; jobs of several ranks are in `tests/integration/faults`."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from dist_cifar.distributed.processes import own_identity
from dist_cifar.errors import CheckpointError, ConfigError, TrainingError
from dist_cifar.job.failure_exit import FailureExit
from dist_cifar.run.run_dir import RunDir

LONE_RANK: Any = SimpleNamespace(rank=0, step=3, identities=[own_identity()])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("set this"), 2, "set this"),
        (CheckpointError("none is\n whole"), 74, "none is whole"),
        (TrainingError("loss is nan"), 70, "loss is nan"),
        (MemoryError("Unable to allocate 2.79 TiB"), 2, "out of memory: Unable to allocate 2.79 TiB; set batch."),
        (
            OSError(28, "No space left on device"),
            74,
            "run.dir={}: [Errno 28] No space left on device; free space",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line_and_the_status(tmp_path, capsys, error, code, line):
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running", step=3)
    assert FailureExit(run_dir, LONE_RANK).fail(error, None) == code
    out, err = capsys.readouterr()
    line = line.format(tmp_path)
    assert out == "" and err.count("\n") == 1 and err.startswith(f"dist_cifar: error: {line}")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["rank"], status["step"]) == ("failed", 0, 3) and line in status["reason"]


def test_a_defect_is_a_traceback_and_exit_code_70(tmp_path, capsys):
    RunDir(tmp_path).write_status("running", step=3)
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError as error:
        assert FailureExit(RunDir(tmp_path), LONE_RANK).fail(error, None) == 70
    err = capsys.readouterr().err
    assert err.startswith("dist_cifar: rank 0 failed:\nTraceback") and "ZeroDivisionError: oh" in err
    assert RunDir(tmp_path).status()["status"] == "failed"


def test_a_status_that_cannot_be_written_hides_no_error(tmp_path, capsys):
    assert FailureExit(RunDir(tmp_path / "nowhere"), LONE_RANK).fail(ConfigError("set this"), None) == 2
    assert "set this" in capsys.readouterr().err
