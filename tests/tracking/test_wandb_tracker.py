"""The W&B adapter. Whatever opens a run does so in a process of its own, with a fake key and a server on loopback."""

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dist_cifar.config import Config, flatten, load_config
from dist_cifar.errors import ConfigError
from dist_cifar.run import predictions
from dist_cifar.tracking.exactly_once import named, public_config
from dist_cifar.tracking.registry import open_trackers
from dist_cifar.tracking.wandb_tracker import WandbTracker, _log_checkpoints, run_id, wanted_mode
from tests import PATIENCE_SECONDS, REPOSITORY, small_runs, wandb_file
from tests.fake_wandb import FakeWandb

KEY = "0123456789abcdef0123456789abcdef01234567"

RUN = """
import signal, sys, time
from pathlib import Path
from dist_cifar.config import load_config
from dist_cifar.tracking.registry import open_trackers
from dist_cifar.tracking.base import Results
from dist_cifar.tracking.console import log_to_stream

handlers = {number: (lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
for number, handler in handlers.items():
    signal.signal(number, handler)
start = time.monotonic()
log_to_stream(sys.stdout, "SAY ")
trackers = open_trackers(load_config(None, sys.argv[2:]), Path(sys.argv[1]), resume_step=None)
print(f"OPEN {time.monotonic() - start}", [type(tracker).__name__ for tracker in trackers], flush=True)
assert all(signal.getsignal(number) is handler for number, handler in handlers.items())
for step in (10, 20, 10, 30):  # a step done again, as after a crash
    for tracker in trackers:
        tracker.log({"kind": "train", "step": step, "epoch": step / 4, "samples": step * 128, "loss": 1 / step})
for tracker in trackers:
    tracker.log({"kind": "eval", "step": 30, "epoch": 7.5, "accuracy": 0.75})
sys.stdin.read()  # until the test lets the run end
start = time.monotonic()
for tracker in trackers:
    tracker.finish(75, Results(summary={"test/accuracy": 0.5}))
print(f"FINISH {time.monotonic() - start}", "wandb" in sys.modules, flush=True)
"""
HISTORY = [
    {"global_step": step, "epoch": step / 4, "samples": step * 128, "train/loss": 1 / step} for step in (10, 20, 10, 30)
] + [{"global_step": 30, "epoch": 7.5, "eval/accuracy": 0.75}]


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Nothing of the caller's W&B, no proxy, no reports to anyone."""
    kept = {key: value for key, value in os.environ.items() if not re.match("(?i)wandb|.*_proxy|netrc", key)}
    home = {"HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(REPOSITORY)}
    return kept | home | variables


@contextmanager
def started(tmp_path: Path, *overrides: str, **variables: str) -> Iterator[subprocess.Popen]:
    (tmp_path / "run").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, str(tmp_path / "run"), *overrides],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env=environment(tmp_path, **variables),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(tmp_path: Path, *overrides: str, **variables: str) -> str:
    with started(tmp_path, *overrides, **variables) as process:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, output
        return output


def seconds(output: str, what: str) -> float:
    return float(re.search(rf"^{what} (\S+)", output, re.M)[1])


def offline_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def without_own(values: dict) -> dict:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def assert_key_is_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


# --- pure functions ----------------------------------------------------------------------------------------------


def test_wandb_mode_decides_only_where_auto_is_asked():
    assert wanted_mode("auto", {}) == wanted_mode("auto", {"WANDB_MODE": "shared"}) == "auto"
    assert wanted_mode("auto", {"WANDB_MODE": "dryrun"}) == "offline"
    assert wanted_mode("auto", {"WANDB_MODE": "disabled"}) == "disabled"
    assert wanted_mode("online", {"WANDB_MODE": "disabled"}) == "online"


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": " Yes "}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "auto"),
        ({"WANDB_DISABLED": ""}, "auto"),
        ({"WANDB_MODE": "Offline"}, "offline"),
    ],
)
def test_the_users_off_is_obeyed(environ, mode):
    assert wanted_mode("auto", environ) == mode and wanted_mode("online", environ) == "online"


def test_the_config_goes_up_without_passwords():
    config = load_config(None, ["data.url=https://me:secret@mirror.org:8080/c.tar.gz?sig=secret", "optimizer.lr=1e-2"])
    public = public_config(config)
    assert public["data.url"] == "https://mirror.org:8080/c.tar.gz" and public["optimizer.lr"] == 0.01


# --- nothing installed, nothing configured -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_asked_for_and_not_installed(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"tracking.wandb: {mode}.*pip install -e \.\[wandb\]"):
        open_trackers(load_config(None, [f"tracking.wandb={mode}"]), tmp_path, resume_step=None)
    assert list(tmp_path.iterdir()) == []


def test_auto_without_a_key_is_silent_and_does_not_import_wandb(tmp_path):
    output = run(tmp_path)
    assert "SAY" not in output and "['JsonlTracker']" in output and re.search("^FINISH .* False$", output, re.M)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_auto_with_a_netrc_that_has_no_key_for_wandb_is_silent(tmp_path):
    (tmp_path / ".netrc").write_text("machine example.org login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    output = run(tmp_path)
    assert "SAY" not in output and "['JsonlTracker']" in output


def test_online_without_a_key_goes_offline_and_says_so(tmp_path):
    output = run(tmp_path, "tracking.wandb=online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert "no API key: run `wandb login` or set WANDB_API_KEY" in output
    assert output.count(f"wandb sync {tmp_path}/run/wandb\n") == 2 and len(offline_files(tmp_path)) == 1


# --- offline -----------------------------------------------------------------------------------------------------


def test_the_offline_file_holds_everything_and_a_resume_has_the_same_id(tmp_path):
    config = ("optimizer.lr=0.002", "tracking.wandb_group=sweep", "run.name=trial")
    output = run(tmp_path, *config, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    (file,) = offline_files(tmp_path)
    assert f"SAY W&B: this run is offline; upload it with: wandb sync {tmp_path}/run/wandb\n" in output
    assert len(output.splitlines()) == 3, output  # no noise of wandb's own

    content = wandb_file.read(file)
    assert [without_own(row) for row in content["history"]] == HISTORY
    assert without_own(content["config"]) == public_config(load_config(None, config)) | {"git_revision": None}
    assert content["summary"]["test/accuracy"] == 0.5 and content["exit_code"] == 75
    assert content["metrics"] == {"global_step": "", "*": "global_step"}
    assert content["run_id"] == (tmp_path / "run" / "wandb_id").read_text().strip()

    time.sleep(1)  # W&B names its folders by the second
    run(tmp_path, *config, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    first, second = (wandb_file.read(file) for file in offline_files(tmp_path))
    assert first["run_id"] == second["run_id"]
    assert_key_is_nowhere(tmp_path)


def test_an_exception_of_wandb_is_said_once_and_ends_nothing(tmp_path, said):
    class Broken:
        id = "id"
        dir = str(tmp_path / "offline-run" / "files")
        summary: dict = {}  # noqa: RUF012

        def log(self, row, step, commit):
            raise RuntimeError("the helper\nis gone")

        def finish(self, exit_code):
            raise RuntimeError("still gone")

    tracker = WandbTracker(Broken(), tmp_path, offline=False, row_count=0)
    tracker.log({"kind": "train", "step": 1}, 0)
    tracker.log({"kind": "train", "step": 2}, 1)
    tracker.finish(0)
    assert len(said) == 2 and "the helper is gone" in said[0]
    assert f"wandb sync --include-online {tmp_path}/offline-run" in said[1]


@pytest.mark.slow
def test_a_whole_run_is_in_its_offline_file(tmp_path):
    """Two ranks under torchrun: every row, the config, the summary, tables and pictures."""
    words = [
        f"{key}={value}"
        for key, value in (small_runs.VALUES | {"tracking.wandb": "offline", "train.epochs": "1"}).items()
    ]
    words += [f"run.dir={tmp_path / 'run'}", "tracking.wandb_job_type=train", "tracking.wandb_notes=two ranks"]
    words += ["tracking.wandb_checkpoints=true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "dist_cifar/train.py", *words]
    subprocess.run(command, cwd=REPOSITORY, env=environment(tmp_path), check=True, timeout=PATIENCE_SECONDS)
    (file,) = offline_files(tmp_path)
    content = wandb_file.read(file)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [named(json.loads(line)) for line in lines]
    *history, last = [without_own(row) for row in content["history"]]
    assert history == rows[:-1] and last.items() >= rows[-1].items()
    ranks = [key for key in rows[0] if key.startswith("train/rank_work_share/")]
    assert ranks == ["train/rank_work_share/0", "train/rank_work_share/1"]
    assert {"train/grad_norm", "train/lr", "train/memory_bytes", "train/straggler_ratio"} <= rows[0].keys()
    assert rows[0]["train/images_per_second_per_rank"] == rows[0]["train/images_per_second"] / 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert content["summary"]["test_accuracy"] == summary["test_accuracy"] and content["exit_code"] == 0
    assert content["config"]["git_revision"] == summary["git_revision"]
    files = file.parent / "files"
    confusion = json.loads((files / last["test/confusion.path"]).read_text())["data"]
    assert [count for _, _, count in confusion] == np.array(summary["test_confusion"]).flatten().tolist()
    classes = json.loads((files / last["test/classes.path"]).read_text())["data"]
    assert {name: accuracy for name, accuracy, _ in classes} == summary["test_class_accuracy"]
    found = predictions.read(tmp_path / "run")
    pictures = [np.asarray(Image.open(files / name)) for name in last["test/worst_mistakes.filenames"]]
    assert (np.stack(pictures) == found.worst_images).all() and len(pictures) == len(found.worst_indices) > 0
    record = next(record.run for record in wandb_file.records(file) if record.WhichOneof("record_type") == "run")
    assert (record.job_type, record.notes) == ("train", "two ranks")
    (artifact,) = [artifact for artifact in content["artifacts"] if artifact.type == "model"]
    assert set(artifact.aliases) >= {"best", "last"}  # there is one evaluation
    directory = tmp_path / f"run/checkpoints/step-{summary['best_step']:08d}"
    assert json.loads(artifact.metadata) == {"checkpoint": directory.name}
    sizes = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert sizes == {path.name: path.stat().st_size for path in directory.iterdir()}


def test_the_best_and_the_last_checkpoint_are_two_versions_of_an_artifact(tmp_path):
    class Recording:
        id = "id"
        logged: list = []  # noqa: RUF012

        def log_artifact(self, artifact, aliases):
            self.logged.append((artifact.name, artifact.metadata["checkpoint"], [*artifact.manifest.entries], aliases))

    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.safetensors").write_text(name)
    _log_checkpoints(Recording(), {"best": tmp_path / "step-00000001", "last": tmp_path / "step-00000002"})
    assert Recording.logged == [
        ("checkpoint-id", "step-00000001", ["step-00000001.safetensors"], ["best"]),
        ("checkpoint-id", "step-00000002", ["step-00000002.safetensors"], ["last"]),
    ]


# --- kills -------------------------------------------------------------------------------------------------------

KILLED = small_runs.VALUES | {
    "tracking.wandb": "offline",
    "checkpoint.every_steps": "5",
    "data.synthetic_train_size": "400",
}
FAST = {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.1"}
"""W&B writes its file every 15 seconds: the whole run would be shorter."""


def train_process(tmp_path: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    values = KILLED | {"run.dir": str(tmp_path / "run")} | dict(override.split("=", 1) for override in overrides)
    command = [sys.executable, "dist_cifar/train.py", *(f"{key}={value}" for key, value in values.items())]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(tmp_path, **variables))


def stop_after(
    tmp_path: Path,
    rows: int,
    *overrides: str,
    by: int = signal.SIGKILL,
    mode: str = "offline-run",
    **variables: str,
) -> int:
    """Sends a signal when W&B is open and so many rows are in `metrics.jsonl`; returns the exit code."""
    files = f"run/wandb/{mode}-*/*.wandb"
    parts = len(list(tmp_path.glob(files)))
    process = train_process(tmp_path, *overrides, **variables)
    path = tmp_path / "run" / "metrics.jsonl"
    while len(list(tmp_path.glob(files))) == parts or not path.exists() or path.read_text().count("\n") < rows:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(by)
    code = process.wait(timeout=PATIENCE_SECONDS)
    time.sleep(1)  # W&B names its folders by the second, and its helper looks after its parent once a second
    return code


def logged(tmp_path: Path) -> list[dict]:
    return [named(json.loads(line)) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def steps(rows: list[dict]) -> list[tuple]:
    """What tells rows apart: the step, and the names, which say the kind."""
    names = [sorted({key.partition("/")[0] for key in row if "/" in key}) for row in rows]
    return [(row["global_step"], *name) for row, name in zip(rows, names, strict=True)]


@pytest.mark.slow
def test_after_kills_each_row_is_in_one_offline_file_of_one_run(tmp_path):
    """Killed at random moments: what W&B had not written is given again, what it had is not."""
    rows, ahead, parts = random.Random(7), 0, []
    for kill in range(3):
        stop_after(tmp_path, 4 + 4 * kill + rows.randrange(4), **FAST)
        saved = max((int(path.name[5:13]) for path in (tmp_path / "run/checkpoints").glob("step-*")), default=0)
        parts = [wandb_file.read(file) for file in offline_files(tmp_path)]
        ahead += sum(row["global_step"] > saved for row in parts[-1]["history"])
    assert ahead > 0  # or the run has nothing to leave out
    assert train_process(tmp_path, **FAST).wait(timeout=PATIENCE_SECONDS) == 0
    parts = [wandb_file.read(file) for file in offline_files(tmp_path)]
    assert len(parts) == 4 and len({part["run_id"] for part in parts}) == 1
    history = [row for part in parts for row in part["history"]]
    expected = logged(tmp_path)
    assert steps(history) == steps(expected)
    assert [number for part in parts for number in part["numbers"]] == list(range(len(expected)))
    for found, row in zip(history, expected, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr", "eval/accuracy", "test/loss", "epoch", "samples"):
            assert found.get(name) == row.get(name)
    assert history[-1]["test/confusion._type"] == "table-file"


@pytest.mark.slow
def test_sigterm_ends_the_run_and_the_next_job_goes_on_with_it(tmp_path):
    assert stop_after(tmp_path, 5, by=signal.SIGTERM) == 75
    (part,) = [wandb_file.read(file) for file in offline_files(tmp_path)]
    before = logged(tmp_path)
    assert part["exit_code"] == 75 and steps(part["history"]) == steps(before) and len(before) >= 5
    assert train_process(tmp_path).wait(timeout=PATIENCE_SECONDS) == 0
    parts = [wandb_file.read(file) for file in offline_files(tmp_path)]
    history = [row for part in parts for row in part["history"]]
    assert [part["exit_code"] for part in parts] == [75, 0] and len({part["run_id"] for part in parts}) == 1
    assert steps(history) == steps(logged(tmp_path)) and len(history) > len(before)


def test_another_config_in_a_directory_without_a_checkpoint_is_another_run(tmp_path):
    stop_after(tmp_path, 1, "checkpoint.every_steps=null")
    first = (tmp_path / "run/wandb_id").read_text()
    stop_after(tmp_path, 1, "checkpoint.every_steps=null")
    assert (tmp_path / "run/wandb_id").read_text() == first
    stop_after(tmp_path, 1, "checkpoint.every_steps=null", "optimizer.lr=0.01")
    assert (tmp_path / "run/wandb_id").read_text() != first


# --- a server, and none ------------------------------------------------------------------------------------------


def test_online_sends_every_row_under_the_id_of_the_run_directory(tmp_path):
    with FakeWandb() as server:
        output = run(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)  # auto: there is a key
    assert "SAY" not in output
    assert [without_own(row) for row in server.history] == HISTORY
    names = {operation["variables"]["name"] for operation in server.operations if "name" in operation["variables"]}
    assert names == {(tmp_path / "run" / "wandb_id").read_text().strip()}
    assert_key_is_nowhere(tmp_path)


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_unreachable_server_means_offline_before_long(tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the system accepts, and nobody ever answers
        port = listener.getsockname()[1]
        if kind == "closed":
            listener.close()
        output = run(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{port}")
    # wandb alone would wait for a minute and a half.
    assert seconds(output, "OPEN") < 40 and seconds(output, "FINISH") < 20
    (file,) = offline_files(tmp_path)
    start, _, end = output.partition("OPEN")
    assert start.endswith(f"continuing offline, upload it later with: wandb sync {tmp_path}/run/wandb\n")
    assert f"wandb sync {tmp_path}/run/wandb\n" in end
    assert [without_own(row) for row in wandb_file.read(file)["history"]] == HISTORY
    assert_key_is_nowhere(tmp_path)


def test_a_server_that_is_lost_half_way_does_not_hold_up_the_end(tmp_path):
    with FakeWandb() as server, started(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url) as process:
        opened = process.stdout.readline()
        assert opened.startswith("OPEN"), opened + process.communicate()[0]
        server.silent.set()
        before = time.monotonic()
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, output
        assert time.monotonic() - before < 60  # at exit, too
    (file,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert seconds(output, "FINISH") < 40 and f"upload it with: wandb sync --include-online {file.parent}\n" in output
    assert [without_own(row) for row in wandb_file.read(file)["history"]] == HISTORY


ROWS = """
import sys
from pathlib import Path
from dist_cifar.config import load_config
from dist_cifar.tracking.registry import open_trackers
from dist_cifar.tracking.console import log_to_stream

log_to_stream(sys.stdout)
step = int(sys.argv[2])
trackers = open_trackers(load_config(), Path(sys.argv[1]), resume_step=step or None)
for line in sys.stdin:
    for step in range(step + 1, step + 1 + int(line)):
        for tracker in trackers:
            tracker.log({"kind": "train", "step": step, "loss": 1 / step})
for tracker in trackers:
    tracker.finish(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("saved", [5, 12])
def test_a_run_that_was_killed_online_goes_on_where_the_server_is(tmp_path, saved):
    """The server has 10 of 13 rows, W&B's file all; the checkpoint is of an earlier or of a later step."""
    (tmp_path / "run").mkdir()
    with FakeWandb() as server:
        env = environment(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, **FAST)

        def job(step: int) -> subprocess.Popen:
            command = [sys.executable, "-W", "error", "-c", ROWS, str(tmp_path / "run"), str(step)]
            return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=tmp_path, env=env)

        with job(0) as first:
            print(10, file=first.stdin, flush=True)
            deadline = time.monotonic() + 60  # W&B sends every 15 seconds
            while len(server.history) < 10 and time.monotonic() < deadline:
                time.sleep(0.1)
            print(3, file=first.stdin, flush=True)
            while len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) < 13:
                assert first.poll() is None
                time.sleep(0.01)
            time.sleep(1)
            first.kill()
        (file,) = (tmp_path / "run/wandb").glob("run-*/*.wandb")
        assert len(wandb_file.read(file)["history"]) == 13
        assert len(server.history) == 10
        with job(saved) as second:
            second.communicate(f"{17 - saved}\n", timeout=PATIENCE_SECONDS)
    assert [row["global_step"] for row in server.history] == list(range(1, 18))
    assert [row["_step"] for row in server.history] == list(range(17))
    assert [row["global_step"] for row in logged(tmp_path)] == list(range(1, 18))


@pytest.mark.slow
def test_offline_then_online_gives_the_server_the_offline_part(tmp_path):
    """Killed offline, it is resumed online under its id; `wandb sync` then finds nothing to send a second time."""
    stop_after(tmp_path, 6)
    with FakeWandb() as server:
        reach = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        assert train_process(tmp_path, "tracking.wandb=online", **reach).wait(timeout=PATIENCE_SECONDS) == 0
        expected = logged(tmp_path)
        assert steps(server.history) == steps(expected)
        asked = [one["variables"]["name"] for one in server.operations if "RunResumeStatus" in one["query"]]
        assert asked == [(tmp_path / "run" / "wandb_id").read_text().strip()]
        synced = shell(tmp_path, f"wandb sync {tmp_path}/run/wandb", **reach)
        assert "No runs to sync" in synced and steps(server.history) == steps(expected)


@pytest.mark.slow
def test_the_line_for_later_uploads_all_offline_parts_of_a_run(tmp_path):
    stop_after(tmp_path, 6, **FAST)
    stop_after(tmp_path, 10, by=signal.SIGTERM)
    with FakeWandb() as server:
        line = f"wandb sync {tmp_path}/run/wandb"
        said = shell(tmp_path, line, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert said.count("Finished syncing") == len(offline_files(tmp_path)) == 2, said
    assert steps(server.history) == steps(logged(tmp_path))
    assert [row["_step"] for row in server.history] == list(range(len(server.history)))


def shell(tmp_path: Path, line: str, **variables: str) -> str:
    """The output of a line, typed where `wandb` can be found."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", line]
    env = environment(tmp_path, PATH=path, **variables)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=tmp_path)
    return done.stdout + done.stderr


# --- sweeps ------------------------------------------------------------------------------------------------------


def small_sweep(tmp_path: Path) -> None:
    """`configs/sweep.yaml`, its command with words behind it that make the runs small, and what it needs."""
    for folder in ("launch", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    sweep = yaml.safe_load((REPOSITORY / "configs/sweep.yaml").read_text())
    values = small_runs.VALUES | {"tracking.wandb": "offline", "tracking.wandb_group": "lr", "train.epochs": "1"}
    sweep["command"] += [f"{key}={value}" for key, value in values.items()]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))


@pytest.mark.slow
def test_a_sweep_of_two_runs_on_two_ranks(tmp_path):
    """W&B's own `sweep` and `agent`; the runs are offline, and their files are read back."""
    small_sweep(tmp_path)
    trials = {
        "trial-a": {"optimizer.lr": 0.001, "optimizer.weight_decay": 0.0},
        "trial-b": {"optimizer.lr": 3e-05, "optimizer.weight_decay": 0.0005},
    }
    with FakeWandb(list(trials.items())) as server:
        reach = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_AGENT_DISABLE_FLAPPING": "true"}
        created = shell(tmp_path, "wandb sweep sweep.yaml", **reach)
        (line,) = re.findall(r"Run sweep agent with: (wandb agent .*/sweep1)", created)
        output = shell(tmp_path, line, **reach)
    for name, parameters in trials.items():
        run_dir = tmp_path / "runs/sweep-sweep1" / name
        (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")  # of one rank
        content = wandb_file.read(file)
        assert (content["run_id"], content["sweep_id"], content["group"]) == (name, "sweep1", "lr"), output
        assert (run_dir / "wandb_id").read_text() == f"{name}\n"
        config = load_config(run_dir / "config.yaml")
        assert without_own(content["config"]).items() >= public_config(config).items()
        assert content["config"].items() >= parameters.items()
        rows = [named(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert steps(content["history"]) == steps(rows)
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["world_size"] == 2 and content["summary"]["test_accuracy"] == summary["test_accuracy"]
        assert content["summary"]["eval/accuracy"] == summary["best_val_accuracy"] and content["exit_code"] == 0


def test_a_sweep_wants_parameters_that_exist():
    """What the file varies are fields of the config, and the metric is one that is logged."""
    sweep = yaml.safe_load((REPOSITORY / "configs/sweep.yaml").read_text())
    fields = flatten(Config())
    for name, values in sweep["parameters"].items():
        for value in values.get("values", [values.get("min"), values.get("max")]):
            assert load_config(None, [f"{name}={value}"]) and name in fields
    assert sweep["metric"]["name"] in named({"kind": "eval", "accuracy": 0.5})


def test_a_run_directory_is_that_of_one_run_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    assert run_id(tmp_path, os.environ) == run_id(tmp_path, os.environ) == "first"
    monkeypatch.setenv("WANDB_RUN_ID", "second")
    with pytest.raises(ConfigError, match="holds the W&B run first, and the agent of the sweep starts run second"):
        open_trackers(load_config(None, ["tracking.wandb=offline"]), tmp_path, resume_step=None)
    monkeypatch.delenv("WANDB_SWEEP_ID")  # by hand, what the agent began is resumed as it was
    assert run_id(tmp_path, os.environ) == "first"
