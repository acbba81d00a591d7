"""The front doors, typed as a user types them: real launchers, real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_cifar.cli import main
from dist_cifar.config import Config, to_yaml
from dist_cifar.run.run_dir import RunDir
from tests import PATIENCE_SECONDS, REPOSITORY
from tests.own_warnings import own_warnings

BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def start(command: str, cwd: Path = REPOSITORY, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        shlex.split(command),
        cwd=cwd,
        env=environment() | extra,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {PATIENCE_SECONDS} s\n{out}\n{err}") from None
    return process.returncode, out, err


def run(command: str, cwd: Path = REPOSITORY, **extra: str) -> tuple[int, str, str]:
    return finish(start(command, cwd, **extra))


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def train_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that are of training steps."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_step(directory: Path, step: int) -> None:
    """Until `metrics.jsonl` has a row of that step or a later one."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            rows = (directory / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            rows = []
        if rows and json.loads(rows[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {directory}")


def processes_with(argument: str) -> list[int]:
    """Living processes that have this argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
        except OSError:  # it has just ended
            continue
    return found


def require_no_process(directory: Path) -> None:
    """What trains in the run directory ends now."""
    deadline = time.monotonic() + 5
    while processes_with(f"run.dir={directory}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(f"run.dir={directory}") == []


def variable_of(pid: int, name: str) -> str | None:
    """A variable of a process, as it was started with; None without it, or if the process has ended."""
    try:
        values = dict(part.partition("=")[::2] for part in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    except OSError:
        return None
    return values.get(name)


STRATEGY = ("strategy.name=exact", "strategy.virtual_ranks=2")


@pytest.fixture
def config(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """A config file of eight epochs of five steps, in a strategy that imports neither Accelerate nor DDP."""
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny(*STRATEGY, "train.epochs=8", "run.log_every_steps=1", "checkpoint.every_steps=3")))
    return path


@pytest.fixture(scope="module")
def golden_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Directories of undisturbed runs of `config`, by world size; filled by `golden_run`."""
    return {world_size: tmp_path_factory.mktemp("golden") / "run" for world_size in (1, 2)}


@pytest.fixture
def golden_run(golden_runs: dict[int, Path], config: Path) -> Callable[[int], Path]:
    def get(world_size: int) -> Path:
        directory = golden_runs[world_size]
        if not directory.exists():
            code, out, err = run(
                f"torchrun --standalone --nproc-per-node {world_size} dist_cifar/train.py --config {config}"
                f" run.dir={directory}"
            )
            assert code == 0, err
            assert f"{world_size} x cpu" in out
        return directory

    return get


@pytest.fixture
def golden_hash(golden_run: Callable[[int], Path]) -> Callable[[int], str]:
    return lambda world_size: summary(golden_run(world_size))["weights_sha256"]


# --- the front doors are equivalent ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "cwd"),
    [
        ("python dist_cifar/train.py", REPOSITORY),
        (f"python {REPOSITORY}/dist_cifar/train.py", Path("/")),
        ("python -m dist_cifar train", Path("/")),
        ("dist-cifar train", Path("/")),
        ("accelerate launch dist_cifar/train.py", REPOSITORY),
    ],
)
def test_one_rank(command, cwd, config, golden_hash, tmp_path):
    code, _, err = run(f"{command} --config {config} run.dir={tmp_path}/run", cwd)
    assert code == 0, err
    result = summary(tmp_path / "run")
    assert result["world_size"] == 1 and result["threads_per_rank"] == 1
    assert result["weights_sha256"] == golden_hash(1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_two_ranks_of_accelerate(strategy, config, golden_hash, tmp_path):
    arguments = f"dist_cifar/train.py --config {config} strategy.name={strategy} run.dir={tmp_path}"
    code, out, err = run(f"accelerate launch --config_file launch/accelerate/cpu.yaml {arguments}/run")
    assert code == 0, err
    assert summary(tmp_path / "run")["world_size"] == 2
    if strategy == "exact":
        expected = golden_hash(2)
    else:
        assert run(f"torchrun --standalone --nproc-per-node 2 {arguments}/golden")[0] == 0
        expected = summary(tmp_path / "golden")["weights_sha256"]
    assert summary(tmp_path / "run")["weights_sha256"] == expected
    assert out.count("test accuracy") == 1  # from rank 0 alone
    assert not own_warnings(err)


@pytest.mark.slow
def test_two_tasks_of_srun_without_torchrun(config, golden_hash, tmp_path):
    common = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    command = f"python dist_cifar/train.py --config {config} run.dir={tmp_path}/run"
    tasks = [start(command, **common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    for code, _, err in map(finish, tasks):
        assert code == 0, err
    assert summary(tmp_path / "run")["weights_sha256"] == golden_hash(2)


OPEN_MPI = "mpirun.openmpi --oversubscribe --bind-to none --allow-run-as-root"
"""The launchers have Debian's names, which hold where both are installed."""


def needs(launcher: str) -> pytest.MarkDecorator:
    program = launcher.split()[0]
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [pytest.param(one, marks=needs(one), id=one.split()[0]) for one in (OPEN_MPI, "mpirun.mpich")]
)
def test_two_ranks_of_mpirun(launcher, config, golden_hash, tmp_path):
    code, out, err = run(f"{launcher} -np 2 python dist_cifar/train.py --config {config} run.dir={tmp_path}/run")
    assert code == 0, err
    assert summary(tmp_path / "run")["weights_sha256"] == golden_hash(2)
    assert out.count("test accuracy") == 1 and not own_warnings(err)


@pytest.mark.slow
@needs(OPEN_MPI)
def test_ranks_do_not_outlive_mpirun(config, tmp_path):
    directory = tmp_path / "run"
    process = start(
        f"{OPEN_MPI} -np 2 python dist_cifar/train.py --config {config} run.dir={directory} train.epochs=1000"
    )
    wait_for_step(directory, 1)
    process.kill()
    process.communicate()
    require_no_process(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ("accelerate launch --config_file launch/accelerate/deepspeed.yaml --num_processes 2", "strategy.zero_stage=3"),
        ("accelerate launch --config_file launch/accelerate/fsdp.yaml --num_processes 2", "strategy.name=fsdp"),
        (
            "accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 --num_machines 1",
            "strategy.zero_stage=2",
        ),
        ("deepspeed --num_accelerators 2", ""),
    ],
)
def test_launchers_of_other_strategies(launcher, overrides, config, golden_run, tmp_path):
    """DeepSpeed's own runs `SCRIPT --local_rank=N ARGUMENTS`. The first losses are those of `exact`, to rounding."""
    if launcher.startswith("deepspeed"):
        launcher += f" --master_port {free_port()}"
    code, out, err = run(
        f"{launcher} dist_cifar/train.py --config {config} run.dir={tmp_path}/run train.epochs=1"
        f" {'' if 'strategy.name' in overrides else 'strategy.name=deepspeed'} {overrides}",
        DS_ACCELERATOR="cpu",
    )
    assert code == 0, err
    assert summary(tmp_path / "run")["world_size"] == 2 and out.count("test accuracy") == 1
    assert not own_warnings(err)
    rows, expected = (train_rows(path)[:3] for path in (tmp_path / "run", golden_run(2)))
    assert len(rows) == 3
    for row, other in zip(rows, expected, strict=True):
        assert row["lr"] == other["lr"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two_is_found_out(config):
    code, _, err = run(f"accelerate launch --cpu --num_processes 2 dist_cifar/train.py --config {config}")
    assert code != 0
    assert "dist_cifar: error: launch: MASTER_ADDR and MASTER_PORT are set but RANK and WORLD_SIZE are not" in err


# --- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_a_random_step_and_started_again(config, tmp_path):
    directory, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    # Long enough that the process which kills it is in time on a busy machine.
    command = f"torchrun --standalone --nproc-per-node 2 dist_cifar/train.py --config {config}"
    command += " train.epochs=20 eval.every_epochs=7 checkpoint.every_steps=9"
    assert run(f"{command} run.dir={undisturbed}")[0] == 0
    command += f" run.dir={directory}"
    step = random.Random(os.urandom(8)).randrange(1, 40)
    process = start(command)
    wait_for_step(directory, step)
    assert len(processes_with(f"run.dir={directory}")) >= 3
    process.kill()  # the agent; its ranks are in sessions of their own
    process.communicate()
    require_no_process(directory)
    assert status(directory)["status"] == "running" and RunDir(directory).is_lost()
    # Checkpoints are written beside the training: that of step 9 need not be there yet.
    saved = list(directory.glob("checkpoints/step-*/manifest.json"))
    code, out, err = run(command)
    assert code == 0, err
    assert ("resume     from the checkpoint of step" in out) == bool(saved)
    assert summary(directory)["weights_sha256"] == summary(undisturbed)["weights_sha256"], f"killed after {step}"


@pytest.mark.slow
def test_torchrun_restarts_killed_workers_by_itself(config, golden_hash, tmp_path):
    """Three times in a row: while it starts, soon after, and later; rank 1, rank 0, rank 1."""
    directory = tmp_path / "run"
    process = start(
        "torchrun --standalone --nproc-per-node 2 --max-restarts 3 dist_cifar/train.py"
        f" --config {config} run.dir={directory}"
    )
    killed: list[int] = []
    for attempt, (rank, step) in enumerate([(1, 0), (0, 5), (1, 20)]):
        if step:
            wait_for_step(directory, step)
        killed.append(worker_of(directory, attempt, rank))
        os.kill(killed[-1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert len(set(killed)) == 3
    assert summary(directory)["weights_sha256"] == golden_hash(2)
    assert int(re.findall(r"from the checkpoint of step (\d+)", out)[-1]) >= 13
    require_no_process(directory)


def worker_of(directory: Path, attempt: int, rank: int) -> int:
    """Process id of torchrun's worker, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for pid in processes_with(f"run.dir={directory}"):
            wanted = {"TORCHELASTIC_RESTART_COUNT": str(attempt), "RANK": str(rank)}
            if all(variable_of(pid, name) == value for name, value in wanted.items()):
                return pid
        time.sleep(0.01)
    raise AssertionError(f"no rank {rank} of start {attempt}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75(number, config, golden_hash, tmp_path):
    directory = tmp_path / "run"
    command = f"python dist_cifar/train.py --config {config} run.dir={directory}"
    process = start(command)
    wait_for_step(directory, 7)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # a second one changes nothing
    code, out, err = finish(process)
    assert code == 75, err
    assert status(directory)["status"] == "saved"
    stopped = int(re.search(r"stopped at step (\d+) and saved", out)[1])
    assert f"stopping at step {stopped} ({number.name}): saving" in out
    assert (directory / f"checkpoints/step-{stopped:08d}").is_dir()
    require_resumes(command, directory, stopped, golden_hash(1))


def require_resumes(command: str, directory: Path, step: int, expected: str) -> None:
    """The command continues the run from that step to its end, with these weights."""
    code, out, err = run(command)
    assert code == 0, err
    assert f"from the checkpoint of step {step}" in out
    assert summary(directory)["weights_sha256"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_accelerate_saves_its_only_rank(number, config, golden_hash, tmp_path):
    """SIGTERM goes to the launcher alone, which hands on nothing; Ctrl-C to all processes of the terminal."""
    directory = tmp_path / "run"
    command = f"accelerate launch dist_cifar/train.py --config {config} run.dir={directory}"
    process = start(command)
    wait_for_step(directory, 7)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, out, err = finish(process)  # the rank holds its ends of the pipes until it has ended
    assert status(directory)["status"] == "saved", err
    stopped = int(re.search(r"stopped at step (\d+) and saved", out)[1])
    require_resumes(command, directory, stopped, golden_hash(1))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks(config, golden_hash, tmp_path):
    directory = tmp_path / "run"
    command = f"torchrun --standalone --nproc-per-node 2 dist_cifar/train.py --config {config} run.dir={directory}"
    process = start(command)
    wait_for_step(directory, 5)
    process.terminate()  # the agent hands it on
    code, _, _ = finish(process)
    assert code != 0
    assert status(directory)["status"] == "saved"
    assert run(command)[0] == 0
    assert summary(directory)["weights_sha256"] == golden_hash(2)


# --- errors ------------------------------------------------------------------------------------------------------

BAD = [
    ("run.dri=x", 2, r"run\.dri: unknown key; did you mean run\.dir\?"),
    ("train.epochs=many", 2, r"train\.epochs: must be a number > 0 and <= 1000000000, found many"),
    ("batch.global_size=-3", 2, r"batch\.global_size: must be >= 1 and <= 1000000000, found -3"),
    ("--config nowhere.yaml", 2, r"--config nowhere\.yaml: no such file"),
    ("--confg x", 2, r"unrecognized arguments: --confg"),
    ("data.source=folder data.root=nowhere", 74, r"nowhere"),
    ("run.dir=/dev/null/run", 74, r"run\.dir=/dev/null/run: cannot be written"),
    ("run.device=cuda", 2, r"run\.device: cuda was set and torch finds no GPU"),
    ("--resume", 74, r"--resume: .* holds no checkpoint"),
    ("data.validation_size=119", 2, r"data\.validation_size: 119"),
    ("batch.global_size=128", 2, r"one global batch is 128 samples, the training split has 80"),
]


def only_error(err: str) -> str:
    """The one line that is the program's own error."""
    lines = [line for line in err.splitlines() if line.startswith("dist_cifar: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err.split("dist_cifar: error: ")[0]
    return lines[0]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_input_is_one_line(arguments, code, message, config, tmp_path):
    command = f"python dist_cifar/train.py --config {config} run.dir={tmp_path}/run"
    for key in ("run.dir=", "--config "):
        if arguments.startswith(key):
            command = re.sub(rf"{key}\S+", "", command)
    returned, out, err = run(f"{command} {arguments}")
    assert returned == code, err
    assert re.search(message, only_error(err)) and len(err.splitlines()) == 1
    assert "train  step" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("run.dri=x", r"run\.dri: unknown key"),
        ("strategy.name=deepspeed batch.global_size=15", r"15 samples cannot be shared equally by 2 ranks"),
    ],
)
def test_bad_input_is_said_by_one_rank(overrides, message, config, tmp_path):
    code, _, err = run(
        "torchrun --standalone --nproc-per-node 2 dist_cifar/train.py"
        f" --config {config} run.dir={tmp_path}/run {overrides}"
    )
    assert code == 1  # torchrun flattens every failure to 1
    assert re.search(message, only_error(err))
    assert re.search(r"exitcode *: 2 ", err)


@pytest.mark.parametrize(
    "environ",
    [
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_USE_FSDP": "true"},
        {"WORLD_SIZE": "2"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    ],
)
def test_a_broken_launch_is_refused(environ, config):
    code, _, err = run(f"python dist_cifar/train.py --config {config}", **environ)
    assert code == 2
    assert "launch: " in only_error(err)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero_stage=3 and strategy.zero_stage is 1; set strategy.zero_stage=3",
        ),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "a deepspeed_config_file; the config says everything"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping=0.5 and optimizer.max_grad_norm is 1.0"),
    ],
)
def test_what_accelerates_plugin_would_set_otherwise_is_refused(environ, message, config, capsys, monkeypatch):
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **environ}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", str(config), "strategy.name=deepspeed"]) == 2
    assert f"launch: accelerate was given {message}" in capsys.readouterr().err


def test_deepspeeds_option_is_refused_where_it_contradicts_the_variables(config, capsys, monkeypatch):
    for command in (["train", "--local_rank=1"], ["--local-rank", "1", "verify"]):
        assert main([*command, "--config", str(config)]) == 2
        assert "launch: --local_rank=1 was given and LOCAL_RANK is not set" in capsys.readouterr().err


# --- help --------------------------------------------------------------------------------------------------------


def test_help_lists_every_field_and_imports_no_torch():
    code, out, err = run("python -X importtime -m dist_cifar train --help")
    assert code == 0
    assert (
        "optimizer.lr  (number >= 1e-30 and <= 10000; 0.001)" in out
        and "What a reduction multiplies the learning rate by" in out
    )
    assert "local_rank" not in out and "torch" not in err and "numpy" not in err and "cli" in err


def test_help_of_the_program():
    code, out, _ = run("python -m dist_cifar --help")
    assert code == 0 and "local" not in out and "train" in out and "75 stopped and saved" in " ".join(out.split())


def test_print_config_prints_what_would_run_and_runs_nothing(config, tmp_path):
    code, out, _ = run(f"python -m dist_cifar train --config {config} --print-config train.epochs=3")
    assert code == 0 and "  epochs: 3.0\n" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["", "-P"])
def test_the_front_door_leaves_the_users_path_alone(option, tmp_path):
    """With -P, or PYTHONSAFEPATH, the first entry is not the script's folder."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print(sys.path[:2], file=sys.stderr))\n"
    )
    code, _, err = run(f"python {option} dist_cifar/train.py --print-config", PYTHONPATH=str(tmp_path))
    assert code == 0 and err == f"{[str(REPOSITORY), str(tmp_path)]}\n"


def test_as_a_module_the_front_door_starts_where_the_user_is(tmp_path):
    """There lie the modules that a config may name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print(sys.path[:2], file=sys.stderr))\n"
    )
    (tmp_path / "mine").mkdir()
    path = f"{tmp_path}:{REPOSITORY}"
    code, _, err = run("python -m dist_cifar.train --print-config", tmp_path / "mine", PYTHONPATH=path)
    assert code == 0 and err == f"{[str(tmp_path / 'mine'), str(tmp_path)]}\n"


def test_options_may_stand_between_fields(config, capsys):
    assert main(["train", "--config", str(config), "run.seed=3", "--print-config", "run.name=x", "--resume"]) == 0
    assert "seed: 3" in capsys.readouterr().out
    assert main(["train", "run.seed=3", "--resume", "run.name=x", "--odd"]) == 2
    assert "unrecognized arguments: run.name=x --odd" in capsys.readouterr().err


def test_without_arguments_the_front_door_trains_cifar10_and_says_what_it_misses(tmp_path):
    """The proxy makes the download fail at once, with or without a network."""
    code, _, err = run(f"python {REPOSITORY}/dist_cifar/train.py", tmp_path, https_proxy="http://127.0.0.1:9")
    assert code == 74
    line = only_error(err)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in line
    assert "data/cifar-10-python.tar.gz" in line and "data.source=folder" in line and "data.source=synthetic" in line
