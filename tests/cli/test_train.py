"""`train`: what it prints instead of training, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dist_cifar.cli import main
from dist_cifar.config import describe
from tests import PATIENCE_SECONDS
from tests.cli.small import SMALL


def test_the_run_directory_is_printed_and_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    for words, expected in (
        ([], "runs/cifar10_resnet18"),
        (["--config", "mine.yaml"], "runs/mine"),
        (["--config", "mine.yaml", "run.name=other"], "runs/other"),
        (["run.dir=a b/'c"], "a b/'c"),
    ):
        assert main(["train", "--print-run-dir", *words]) == 0
        assert capsys.readouterr() == (f"{expected}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_one_rank_prints_it(monkeypatch, capsys):
    for name in ("RANK", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert main(["train", "--print-run-dir"]) == 0
            assert capsys.readouterr().out == ""


def test_a_config_that_is_refused_has_no_run_directory(capsys):
    assert main(["train", "--print-run-dir", "run.name=a/b"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "run.name" in err


def test_printing_it_imports_no_torch():
    code = "import sys; from dist_cifar.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "--print-run-dir"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_the_help_has_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {key}  (" in out for key, *_ in describe()) and "local_rank" not in out


TRAIN_AND_LIST = """
import sys
from dist_cifar.cli import main
from dist_cifar.config import describe
code = main(["train", *sys.argv[1:]])
print(code, *{name.partition(".")[0] for name in sys.modules}, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_one_rank_imports_no_slow_package(tmp_path, strategy):
    """Each of them takes longer than all else that happens before the first step."""
    words = [*SMALL, "batch.global_size=16", "run.device=cpu", "tracking.wandb=disabled", f"run.dir={tmp_path}/run"]
    words += ["model.name=resnet8", "train.max_steps=1", f"strategy.name={strategy}"]
    command = [sys.executable, "-c", TRAIN_AND_LIST, *words]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert (last[0], last[-1]) == ("0", "False")
    assert not {"torchvision", "wandb", "matplotlib", "deepspeed"} & set(last)


STOPPED_IN_THE_FINAL_TEST = """
import os, signal, sys, time
from dist_cifar.cli import main
from dist_cifar.evaluate import Evaluator
def interrupted(self, model):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
Evaluator.test = interrupted
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_signal_during_the_final_test_ends_the_run_and_the_next_start_finishes_it(tmp_path):
    words = [*SMALL, "batch.global_size=16", "run.device=cpu", "tracking.wandb=disabled", f"run.dir={tmp_path}/run"]
    words += ["model.name=resnet8", "train.max_steps=1"]
    command = [sys.executable, "-c", STOPPED_IN_THE_FINAL_TEST, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "dist_cifar: stopped by SIGTERM; nothing was lost, run it again\n"
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "saved"
    subprocess.run([sys.executable, "-m", "dist_cifar", "train", *words], check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
