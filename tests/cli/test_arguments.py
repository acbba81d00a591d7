"""Numbers and paths that cannot be, refused before the work begins."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.cli.arguments import new_file, new_folder, path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "x", "--json", "reslts/a.json"], r"no folder reslts; did you mean results/a.json\?"),
        (["report", "x", "--out", "nowhere/a.html"], "no folder nowhere; make it first"),
        (["doctor", "--json", "results"], "results is a folder; give a file in it"),
        (["verify", "--json", "file/a.json"], "file is no folder"),
        (["export", "x", "--to", "onnx", "--out", "file/deep/er"], "file is no folder"),
        (["watch", "x", "--port", "99999"], "99999 is not a port"),
        (["watch", "x", "--port", "http"], "http is not a whole number, 0 or more"),
        (["predict", "x", "--top", "three"], "three is not a whole number, 1 or more"),
        (["predict", "x", "--top", "-1"], "expected one argument|-1 is not a whole number"),
    ],
)
def test_a_path_or_number_that_cannot_be_is_refused_at_once(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "file").touch()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("of_path", [path, new_file, new_folder])
def test_a_home_that_the_shell_has_not_expanded_is_expanded(tmp_path, monkeypatch, of_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert of_path("~/a.yaml") == tmp_path / "a.yaml"
    assert path("a~") == Path("a~")


def test_the_home_of_nobody_is_refused(capsys):
    assert main(["train", "--config=~nobody-of-this-name/a.yaml"]) == 2
    assert "there is no such home" in capsys.readouterr().err


def test_a_folder_that_is_not_writable_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == tmp_path))
    assert main(["report", "x", "--out", str(tmp_path / "a.html")]) == 2
    assert f"{tmp_path} is not writable; choose another folder" in capsys.readouterr().err
