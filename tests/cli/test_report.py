"""`report` of several directories, as a shell's `runs/*` gives them."""

from __future__ import annotations

import pytest

from dist_cifar.cli import main
from dist_cifar.config import load_config
from dist_cifar.run.run_dir import RunDir


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two runs, one that has not begun, a folder and a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "runs/never"):
        RunDir(name).checkpoints.mkdir(parents=True)
    for name in ("runs/a", "runs/b"):
        RunDir(name).write_config(load_config(None, [f"run.dir={name}"]))
        RunDir(name).write_status("running", step=0, world_size=1)
    (tmp_path / "runs/logs").mkdir()
    (tmp_path / "runs/report.html").touch()
    return tmp_path / "runs"


def test_what_has_not_begun_is_skipped_and_named(folder, capsys):
    assert main(["report", *sorted(f"runs/{path.name}" for path in folder.iterdir())]) == 0
    out, err = capsys.readouterr()
    assert "report.html" in out and (folder.parent / "report.html").exists()
    assert err.splitlines() == [
        "dist_cifar: warning: report: skipped, because no training has begun there: runs/logs, runs/never,"
        " runs/report.html"
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["runs/a", "runs/nowhere"], "runs/nowhere: this is no run directory"),
        (["runs/logs"], "runs/logs: this is no run directory"),
        (["runs/logs", "runs/never"], "no training has begun in any of these"),
    ],
)
def test_what_is_not_there_is_an_error(folder, capsys, paths, message):
    assert main(["report", *paths]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
