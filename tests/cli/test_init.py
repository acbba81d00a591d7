"""`init`: what it writes, and what it leaves as it is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from dist_cifar.cli import init, main
from tests import REPOSITORY


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }


def test_it_writes_what_the_repository_has(tmp_path, capsys):
    assert main(["init", str(tmp_path / "a b")]) == 0
    written = files(tmp_path / "a b")
    kept_by_git = {
        f"{folder}/{name}": content
        for folder in ("configs", "launch", "slurm")
        for name, content in files(REPOSITORY / folder).items()
    }
    assert written == kept_by_git | {"my_models.py": (init.PROJECT / "my_models.py").read_bytes()}
    assert os.access(tmp_path / "a b/launch/local.sh", os.X_OK)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["wrote", "configs/"],
        ["wrote", "launch/"],
        ["wrote", "slurm/"],
        ["wrote", "my_models.py"],
    ]
    assert lines[4:] == [
        f"next: cd '{tmp_path}/a b'",
        "next: dist-cifar train --ranks 2 --config configs/quickstart.yaml",
    ]


def test_here_is_where_it_writes_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert (tmp_path / "slurm/train.sbatch").exists() and "next: cd" not in capsys.readouterr().out


def test_no_file_is_overwritten(tmp_path, capsys):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/train.sbatch").write_text("mine")
    (tmp_path / "my_models.py").symlink_to("nowhere")
    assert main(["init", str(tmp_path)]) == 0
    assert "kept  slurm/train.sbatch, my_models.py: what exists" in capsys.readouterr().out
    before = files(tmp_path)
    assert before["slurm/train.sbatch"] == b"mine" and (tmp_path / "my_models.py").is_symlink()
    (tmp_path / "configs/quickstart.yaml").unlink()
    assert main(["init", str(tmp_path)]) == 0
    assert "wrote configs/     1 file: " in capsys.readouterr().out
    assert files(tmp_path) == before


def test_a_file_that_cannot_be_written_to_its_end_is_not_left_behind(tmp_path, monkeypatch, capsys):
    """It would be kept the next time."""

    def full(descriptor: int, mode: str) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    assert main(["init", str(tmp_path)]) == 74
    assert capsys.readouterr().err.count("\n") == 1 and files(tmp_path) == {}


@pytest.mark.parametrize(
    ("folder", "code", "message"),
    [
        ("file/x", 2, "file is no folder"),
        ("link", 2, "link/configs cannot be made: there is a file in its way"),
        ("taken", 2, "taken/configs cannot be made: there is a file in its way"),
        ("/proc/x", 74, "/proc/x"),
        ("x" * 300, 74, "File name too long"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path, monkeypatch, capsys, folder, code, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("link").symlink_to("nowhere")
    Path("taken").mkdir()
    Path("taken/configs").write_text("mine")
    before = files(tmp_path)
    assert main(["init", folder]) == code
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == "" and files(tmp_path) == before


def test_the_example_is_a_network(tmp_path):
    assert main(["init", str(tmp_path)]) == 0
    specification = importlib.util.spec_from_file_location("my_models", tmp_path / "my_models.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    images = torch.zeros(2, 3, 32, 32)
    assert module.Net(num_classes=7)(images).shape == (2, 7)
    wide = module.Net(num_classes=10, width=64)
    assert wide(images).shape == (2, 10) and wide.head.in_features == 256
