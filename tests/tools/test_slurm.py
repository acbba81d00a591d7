"""`submit` without a cluster: what it renders and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.errors import ConfigError
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools.slurm import Request, job_environment, render, sweep_lines, template
from tests import REPOSITORY

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
#SBATCH --cpus-per-task=32
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
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
    return render(template(REPOSITORY, name), dataclasses.replace(REQUEST, **changes))


def test_golden():
    text = rendered()
    assert text[text.index("#SBATCH") :] == GOLDEN
    assert text.startswith("#!/bin/bash\n")


def test_without_gpus_none_are_asked_for():
    text = rendered(gpus_per_node=0, ranks_per_node=2)
    assert "gpus" not in re.sub(r"^# .*$", "", text, flags=re.MULTILINE) and "\nranks_per_node=2\n" in text


@pytest.mark.parametrize(
    ("changes", "cores"),
    [({}, 32), ({"gpus_per_node": 1, "ranks_per_node": 1}, 8), ({"gpus_per_node": 0}, 8), ({"cpus_per_task": 5}, 5)],
)
def test_a_task_of_many_ranks_has_cores_for_each_of_their_gpus(changes, cores):
    assert f"\n#SBATCH --cpus-per-task={cores}\n" in rendered(**changes)


def test_one_task_for_each_rank_without_torchrun():
    text = rendered("train_srun")
    assert "\n#SBATCH --cpus-per-task=8\n" in text
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
    assert (
        "#SBATCH --output=slurm/logs/%x" not in text and "#SBATCH --output=slurm/logs/dist_cifar-%" in text
    )  # which would make a path of the name


@pytest.mark.parametrize("changes", [{"job_name": "a\nb"}, {"arguments": ("run.dir=a\nb",)}, {"partition": "a\tb"}])
def test_a_line_break_is_refused(changes):
    with pytest.raises(ConfigError, match=f"--{next(iter(changes)).replace('_', '-')} .*control character"):
        rendered(**changes)


def test_more_options_and_a_setup():
    text = rendered(sbatch=("--mem=64G", "gres=gpu:h100:4"), setup=("module load cuda", "conda activate x"))
    header, _, body = text.partition("\n\n")
    assert header.endswith("#SBATCH --mem=64G\n#SBATCH --gres=gpu:h100:4") or "\n#SBATCH --gres=gpu:h100:4\n" in header
    assert "\nmodule load cuda\nconda activate x\nif [[ -e .venv/bin/activate ]]" in body
    with pytest.raises(ConfigError, match=r"--setup .*control character"):
        rendered(setup=("a\nb",))


@pytest.mark.parametrize("name", ["train", "train_srun", "sweep", "preflight", "data"])
def test_logs_have_a_folder_that_is_there(name):
    folder = re.search(r"^#SBATCH --output=(.*)/%x", template(REPOSITORY, name), re.MULTILINE)[1]
    assert (REPOSITORY / folder).is_dir() and folder != "."


# --- the environment ---------------------------------------------------------------------------------------------

OF_THE_SHELL = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "SLURM_CONF": "/etc/slurm.conf",
    "VIRTUAL_ENV": "/v",
    "MPI_HOME": "/m",
}
OF_ITS_JOB = (
    "SLURM_JOB_ID SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPUS_PER_TASK SLURM_NTASKS SLURM_MEM_PER_CPU"
    " SLURM_JOB_END_TIME SLURM_EXPORT_ENV"
    " SRUN_CPUS_PER_TASK SALLOC_PARTITION SLURMD_NODENAME SBATCH_PARTITION SBATCH_EXPORT RANK LOCAL_RANK"
    " WORLD_SIZE MASTER_ADDR MASTER_PORT PMI_RANK PMIX_RANK OMPI_COMM_WORLD_RANK CUDA_VISIBLE_DEVICES OMP_NUM_THREADS"
    " TORCHELASTIC_RUN_ID ACCELERATE_MIXED_PRECISION FLUX_TASK_RANK PALS_RANKID"
    " MV2_COMM_WORLD_RANK ROCR_VISIBLE_DEVICES MPI_LOCALRANKID"
)


def test_a_job_is_given_nothing_of_this_shells_own_job(said):
    environ = OF_THE_SHELL | dict.fromkeys(OF_ITS_JOB.split(), "1")
    assert job_environment(environ) == OF_THE_SHELL
    assert said == ["warning: submit: not handed on: SBATCH_EXPORT, SBATCH_PARTITION; give such options with --sbatch"]
    said.clear()
    assert job_environment(OF_THE_SHELL) == OF_THE_SHELL and not said


def test_a_variable_that_only_the_job_has_is_no_fault(sbatch):
    assert main(["submit", "data.cache_dir=$SURELY_NOT_SET_HERE/cache", "run.dir=$HOME/x"]) == 0
    assert main(["submit", "run.dir=~nobody-at-all/x"]) == 2


# --- sweeps ------------------------------------------------------------------------------------------------------


def read_by_the_job(path: Path, task: int) -> list[str]:
    """What the batch script reads in a line of a sweep's file."""
    line = next(line for line in template(REPOSITORY, "sweep").splitlines() if line.startswith("read -ra overrides"))
    script = f'{line}\nfor word in "${{overrides[@]}}"; do printf "%s\\0" "$word"; done'
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(["bash", "-c", script, "bash", path], capture_output=True, env=environ, check=False)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(
    "content",
    [
        b"run.seed=1 optimizer.lr=2e-3\nrun.seed=2\n",
        b"run.seed=1\r\nrun.seed=2\r\n",
        b"run.seed=1\r\nrun.seed=2",
        b"\xef\xbb\xbfrun.seed=1\n\xef\xbb\xbfx\n",
        b"  run.seed=1 \t run.name=a\\b  \n",
        "run.name=é\u00a0猫\u2028x\n".encode(),
        b"a=$HOME b=* c=it's d=`x` e=\\\n",
        b"a\n\nb\n",
        b"a\x85b\n".decode("latin-1").encode(),
        b'tracking.wandb_tags=["a","b"]\n',
    ],
)
def test_a_sweeps_file_is_read_as_the_job_reads_it(tmp_path, content):
    (tmp_path / "runs.txt").write_bytes(content)
    lines = sweep_lines(content)
    assert [read_by_the_job(tmp_path / "runs.txt", number) for number in range(1, len(lines) + 1)] == lines
    assert read_by_the_job(tmp_path / "runs.txt", len(lines) + 1) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a=1\na=\xe9\n", "line 2: it is not UTF-8"),
        (b'a=1\nb="two words"\n', "line 2: quotes are not read here"),
        (b"a='x'\n", "line 1: quotes are not read here"),
        (b"a=1\x0bb=2\n", "line 1: it holds a control character"),
        (b"a=1\rb=2\n", "line 1: it holds a control character"),
        ("a=1\n".encode("utf-16"), "line 1: it is not UTF-8"),
    ],
)
def test_what_the_job_would_read_otherwise_is_refused(content, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        sweep_lines(content)


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
        (["--nodes", "9"], "strategy.virtual_ranks: 9 ranks cannot share 8 virtual ranks"),
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


def test_elsewhere_than_beside_the_scripts(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/slurm/train.sbatch" in line and "`dist-cifar init` write one here" in line


def test_the_scripts_of_a_project_are_filled_in_as_they_were_edited(sbatch, tmp_path, monkeypatch, capsys):
    (tmp_path / "slurm").mkdir()
    script = tmp_path / "slurm/train.sbatch"
    script.write_text(template(REPOSITORY, "train").replace("max_requeues=1000", "max_requeues=7"))
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "\nmax_requeues=7 " in printed and f"#SBATCH --chdir={tmp_path}\n" in printed
    script.write_text(script.read_text().replace("container=()", "container=(podman run image)"))
    assert main(["submit", "--container", "image.sif"]) == 2
    assert "has no line that begins with 'container=()'" in capsys.readouterr().err


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
