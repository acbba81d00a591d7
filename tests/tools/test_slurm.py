"""`submit` without a cluster: what it renders and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dist_cifar.cli.main import main
from dist_cifar.errors import ConfigError
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools.slurm import REPOSITORY, Request, render, template

HOSTILE = "it's $(touch hacked) `touch hacked` \"#\\ %j; touch hacked"
REQUEST = Request(
    arguments=("--config", "configs/cpu_resnet20.yaml", "run.dir=runs/first"),
    directory=Path("/shared/dist_cifar"),
    nodes=2,
    gpus_per_node=4,
    ranks_per_node=4,
    time="4:00:00",
    partition="gpu",
)
GOLDEN = """\
#SBATCH --job-name=dist_cifar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Clusters differ: edit these, and take one # away.
#SBATCH --partition=gpu
#SBATCH --chdir=/shared/dist_cifar
##SBATCH --account=project
##SBATCH --constraint=h100

ranks_per_node=4
max_requeues=1000 # times that the run resumes after it saved itself
max_restarts=3    # times that it resumes after a crash
srun_options=()   # e.g. (--container-image=/shared/torch.sqsh --container-mounts=/shared)
container=()      # e.g. (apptainer exec --nv /shared/torch.sif)
# module load cuda
if [[ -e .venv/bin/activate ]]; then source .venv/bin/activate; fi

set -- --config configs/cpu_resnet20.yaml run.dir=runs/first
source slurm/job.sh || exit
train_ranks torchrun "$@"
"""


def rendered(name: str = "train", **changes: object) -> str:
    return render(template(name), dataclasses.replace(REQUEST, **changes))


def test_golden():
    text = rendered()
    assert text[text.index("#SBATCH") :] == GOLDEN
    assert text.startswith("#!/bin/bash\n")


def test_without_gpus_none_are_asked_for():
    text = rendered(gpus_per_node=0, ranks_per_node=2)
    assert "gpus" not in re.sub(r"^# .*$", "", text, flags=re.MULTILINE) and "\nranks_per_node=2\n" in text


def test_one_task_for_each_rank_without_torchrun():
    text = rendered("train_srun")
    assert "#SBATCH --ntasks-per-node=4\n" in text and "torchrun" not in text.partition("\nset -- ")[2]


def test_sweep():
    text = rendered("sweep", array="1-4%2", arguments=("runs.txt", "--config", "a.yaml"))
    assert "#SBATCH --array=1-4%2\n" in text and "\nset -- runs.txt --config a.yaml\n" in text


@pytest.mark.parametrize("name", ["train", "train_srun", "sweep"])
def test_everything_is_quoted(name, tmp_path):
    """bash reads back what was given, and runs none of it."""
    text = rendered(
        name, arguments=(HOSTILE, f"run.dir={HOSTILE}"), container=HOSTILE, job_name=HOSTILE, account=HOSTILE
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    body = "\n".join(re.findall(r"^(?:container=\(.*|set -- .*)$", text, re.MULTILINE))
    shown = subprocess.run(
        ["bash", "-c", f'{body}\nprintf "%s\\0" "$@" "${{container[@]}}"'], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.stdout.split("\0")[:-1] == [HOSTILE, f"run.dir={HOSTILE}", "apptainer", "exec", "--nv", HOSTILE]
    assert list(tmp_path.iterdir()) == []
    header = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    escaped = HOSTILE.replace("\\", "\\\\")  # sbatch reads an escape in single quotes too
    assert [f"--job-name={escaped}"] in [shlex.split(line) for line in header]
    assert "#SBATCH --output=%x" not in text  # which would make a path of the name


@pytest.mark.parametrize("changes", [{"job_name": "a\nb"}, {"arguments": ("run.dir=a\nb",)}, {"partition": "a\tb"}])
def test_a_line_break_is_refused(changes):
    with pytest.raises(ConfigError, match=f"--{next(iter(changes)).replace('_', '-')} .*control character"):
        rendered(**changes)


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """A sbatch that accepts all, and keeps what it is given in this file."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/bash\necho "[$*]" >>{calls}\ncat >/dev/null\necho said "$*"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(REPOSITORY)
    return calls


def test_it_is_tested_and_then_submitted(sbatch, capsys):
    assert main(["submit", "--dry-run", "--nodes", "2", "run.dir=runs/x"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash") and "set -- run.dir=runs/x" in out and "said --test-only" in err
    assert sbatch.read_text() == "[--test-only]\n"
    assert main(["submit", "--nodes", "2", "run.dir=runs/x"]) == 0
    assert capsys.readouterr().out == "said\n"
    assert sbatch.read_text() == "[--test-only]\n" * 2 + "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3"], "strategy.virtual_ranks: 8 virtual ranks cannot be shared equally by 3 ranks"),
        (["--nodes", "0"], "argument --nodes: 0 is not a whole number, 1 or more"),
        (["--gpus-per-node", "-1"], "argument --gpus-per-node: -1 is not a whole number, 0 or more"),
        (["--nodes", "two"], "argument --nodes: two is not a whole number, 1 or more"),
        (["model.name=resnet99"], "model.name"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--sweep", "nowhere.txt"], "submit: --sweep nowhere.txt: cannot be read"),
        (["--sweep", "README.md"], "submit: --sweep README.md, line 1: "),
        (["--sweep", "LINES", "run.dir=x"], "line 1: command line: run.dir is given twice"),
        (["--job-name", "a\nb"], "--job-name 'a\\nb' holds a line break"),
        (["--patition", "gpu"], "unrecognized arguments: --patition"),
    ],
)
def test_bad_input(sbatch, capsys, arguments, message):
    (sbatch.parent / "lines").write_text("run.seed=1")
    assert main(["submit", *(argument.replace("LINES", str(sbatch.parent / "lines")) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert not sbatch.exists()


def test_elsewhere_than_in_the_repository(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit"]) == 2
    assert f"cd {REPOSITORY}" in capsys.readouterr().err


def test_what_sbatch_says_is_passed_on(sbatch, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\ncat >/dev/null\necho bad partition >&2\nexit 1\n")
    assert main(["submit"]) == 2
    assert "submit: refused by sbatch (bad partition)" in capsys.readouterr().err
    (tmp_path / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main(["submit"]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


# --- slurm/job.sh ------------------------------------------------------------------------------------------------


def status_fields(directory: Path, *names: str) -> list[str]:
    """What the function of the batch scripts reads in `status.json`."""
    script = 'source slurm/job.sh; run_dir=$1; shift; for name; do printf "%s\\0" "$(status "$name")"; done'
    done = subprocess.run(
        ["bash", "-c", script, "bash", directory, *names], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "reason",
    [
        "ValueError: x",
        "exit code 74, see log",
        "ends with a comma,",
        'it says "no", twice: "no"',
        "C:\\temp\\",
        'a line: "status": "done"',
        "$(touch hacked) `touch hacked` %s *",
        "Grüße",
        'first\n  "status": "done"\nlast',
    ],
)
def test_the_batch_scripts_read_the_status_of_a_run(tmp_path, reason):
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running", step=7, world_size=2)
    assert status_fields(tmp_path, "status", "step", "rank", "reason") == ["running", "7", "", ""]
    status = run_dir.status()
    run_dir.write_failure((status["host"], status["pid"]), 1, reason)
    assert run_dir.status()["reason"] == reason
    *others, text = status_fields(tmp_path, "status", "step", "rank", "host", "reason")
    assert others == ["failed", "7", "1", status["host"]]
    assert json.loads(f'"{text}"') == reason  # as JSON escapes it: a line for the log
    assert not (REPOSITORY / "hacked").exists()


def test_without_a_status_the_batch_scripts_read_nothing(tmp_path):
    assert status_fields(tmp_path, "status", "step") == ["", ""]
