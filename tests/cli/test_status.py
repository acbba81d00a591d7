"""`status`: what a script reads of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.run.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunDir(tmp_path / "run").open()
    return tmp_path / "run"


def test_all_fields_and_one(run, capsys):
    RunDir(run).write_status("failed", step=17, rank=None, reason="out of memory\nin rank 1", ok=True)
    assert main(["status", str(run)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == json.loads((run / "status.json").read_text()).keys()
    expected = {"status": "failed", "step": "17", "rank": "null", "reason": "out of memory in rank 1", "ok": "true"}
    assert lines | expected == lines
    for field, text in expected.items():
        assert main(["status", str(run), field]) == 0
        assert capsys.readouterr() == (f"{text}\n", "")


@pytest.mark.parametrize(
    ("text", "words", "code", "message"),
    [
        ('{"status": "done"}', ["stauts"], 2, "status.json has no field stauts; did you mean status?"),
        ('{"status": "done"}', ["reason"], 2, "status.json has no field reason; it has status"),
        (None, ["status"], 74, "there is no status.json"),
        ('{"status', [], 74, "status.json: not what this version writes (not JSON: "),
        ('["done"]', [], 74, "status.json"),
    ],
)
def test_errors_are_one_line(run, capsys, text, words, code, message):
    if text is not None:
        (run / "status.json").write_text(text)
    assert main(["status", str(run), *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_what_is_no_run_is_refused(tmp_path, run, capsys):
    assert main(["status", str(tmp_path / "rnu"), "status"]) == 2
    assert f"did you mean {run}?" in capsys.readouterr().err
