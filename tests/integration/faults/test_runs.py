"""Whole runs that are killed, stopped and damaged: each fails as it should, resumes, and ends as if nothing had been.

Every run here is that of one config with strategy `exact`, so one golden run serves all, and a run may resume with
another number of ranks than it was disturbed on. What happens is injected at a step (`injections.py`), not timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_cifar.config import Config, to_yaml
from tests.integration.faults.disk import contents, flip_bit, remount, small_disk, truncate
from tests.integration.faults.jobs import START_SECONDS, VOLATILE, Job, Jobs

STEPS, REDUCTION_AT_STEP = 8, 4
TIMEOUT_SECONDS, END_SECONDS = 120, 60
"""The jobs' `run.timeout_seconds`, which no test waits for, and how long after the first rank the last one may end: as
long as a busy machine needs, and too short for a rank that would wait for the timeout."""
CHECKPOINT_BYTES = 3_300_000

Run = Callable[..., Job]


@pytest.fixture
def config(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """The config of all runs: two steps an epoch, a reduced learning rate from steps 4 and 6, a save at each step."""
    path = tmp_path / "config.yaml"
    overrides = (
        "model.name=resnet20",  # its best checkpoint is one that is removed later
        "strategy.name=exact",
        "strategy.virtual_ranks=4",
        "batch.global_size=16",
        "data.synthetic_train_size=72",
        "train.epochs=4",
        "optimizer.warmup_epochs=0",
        "plateau.patience_evaluations=0",
        "plateau.threshold=0.9",
        "checkpoint.every_steps=1",
        "run.log_every_steps=3",
        f"run.timeout_seconds={TIMEOUT_SECONDS}",
    )
    path.write_text(to_yaml(tiny(*overrides)))
    return path


@pytest.fixture
def run(jobs: Jobs, config: Path, tmp_path: Path) -> Run:
    """`run(world_size, *overrides, **options)`: starts the job in `tmp_path`, or resumes it."""

    def start(world_size: int, *arguments: str, directory: Path = tmp_path / "run", **options: Any) -> Job:
        return jobs.start(world_size, "train", "--config", config, f"run.dir={directory}", *arguments, **options)

    return start


@pytest.fixture(scope="module")
def once() -> dict[str, Any]:
    """What the fixtures below make at their first use."""
    return {}


@pytest.fixture
def golden(run: Run, once: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The result of a run that nothing disturbed."""
    if "golden" not in once:
        job = run(2, directory=tmp_path / "golden")
        assert job.wait(START_SECONDS) == [0, 0], job
        once["golden"] = result(job)
        assert len({row["lr"] for row in once["golden"]["rows"] if row["kind"] == "train"}) == 3
    return once["golden"]


@pytest.fixture
def stopped(run: Run, once: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that was stopped after step 5: checkpoints of steps 2 (the best), 4 and 5."""
    if "stopped" not in once:
        job = run(2, inject={0: ["signal_at", 4, "SIGTERM"]})
        assert job.wait(START_SECONDS) == [75, 75], job
        once["stopped"] = tmp_path_factory.mktemp("stopped") / "run"
        shutil.move(job.run_dir, once["stopped"])
    return Path(shutil.copytree(once["stopped"], tmp_path / "run"))


def result(job: Job) -> dict[str, Any]:
    """All of a run that may not depend on how it was computed, or on what happened to it."""
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("weights_sha256", "test_accuracy", "test_loss", "best_step", "best_val_accuracy", "steps")
    return {
        "rows": [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows],
        **{name: job.summary()[name] for name in names},
    }


def require_done(job: Job, golden: dict[str, Any], *, from_step: int | None) -> None:
    """The job went on from the checkpoint of this step, and the run is what it was to be."""
    assert set(job.wait(START_SECONDS)) == {0}, str(job)
    assert resumed_from(job) == from_step, str(job)
    for name, value in result(job).items():
        assert value == golden[name], name
    assert job.status()["status"] == "done" and job.summary()["inexact_since_step"] is None
    assert temporaries(job.run_dir) == []


def resumed_from(job: Job) -> int | None:
    said = re.search(r"^resume     from the checkpoint of step (\d+)$", job.stdout(0), re.M)
    return int(said[1]) if said else None


def temporaries(directory: Path) -> list[Path]:
    return list(directory.rglob(".tmp*"))


def checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("checkpoints/step-*"))


def last_written(job: Job, began: int) -> int:
    """The step of the newest checkpoint: `began` is the one whose write was under way, perhaps, when the job died."""
    step = int(checkpoints(job.run_dir)[-1].name.removeprefix("step-"))
    assert step in (began - 1, began)
    return step


def require_killed(job: Job, rank: int = 0) -> None:
    """This rank was killed by SIGKILL; the others said so and left in time."""
    world_size = len(job.pids)
    assert job.wait(START_SECONDS) == [-9 if i == rank else 70 for i in range(world_size)], job
    assert job.seconds_between_ends() < END_SECONDS
    if world_size > 1:
        assert (job.status()["status"], job.status()["rank"]) == ("failed", rank)


def require_refused(job: Job, code: int, *messages: str) -> None:
    """All ranks ended with `code`, and rank 0 with one line that holds the messages."""
    assert set(job.wait(END_SECONDS)) == {code}, job
    assert len(job.errors(0)) == 1 and "Traceback" not in job.stderr(0), job
    assert all(message in job.errors(0)[0] for message in messages), job


# --- the writer dies ---------------------------------------------------------------------------------------------

DEATHS = [
    # Step whose checkpoint is being written, call, on what, how often before; the checkpoint that is there afterwards.
    ((2, "mkdir", r"\.tmp-step.*", 1, 1), (4, "write", r"state\.json", 1, 3), (6, "write", r"model\..*", 1, 5)),
    ((2, "fsync", r"optimizer\..*", 1, 1), (4, "write", r"manifest\.json", 1, 3), (6, "fsync", r"\.tmp-step.*", 1, 5)),
    ((2, "replace", r"\.tmp-step.*", 1, 1), (4, "fsync", r"checkpoints", 2, 4), (6, "write", r"\.tmp-latest-.*", 1, 6)),
    ((2, "replace", r"\.tmp-best-.*", 1, 2), (4, "replace", r"step-.*", 1, 4), (5, "unlink", r"model\..*", 1, 5)),
    ((2, "replace", r"\.tmp-latest-.*", 1, 2), (4, "rmdir", r"\.tmp-step.*", 1, 4), (5, "fsync", "checkpoints", 4, 5)),
]


@pytest.mark.parametrize("deaths", DEATHS, ids=lambda deaths: "-".join(f"{death[1]}@{death[0]}" for death in deaths))
def test_the_writer_is_killed_three_times_at_another_call(run, golden, deaths):
    from_step = None
    for world_size, (at_step, call, name, number, kept) in zip((2, 4, 1), deaths, strict=True):
        job = run(world_size, inject={0: ["in_save", at_step, call, name, number, "SIGKILL"]})
        require_killed(job)
        assert resumed_from(job) == from_step, job
        from_step = kept
    require_done(run(2), golden, from_step=from_step)


# --- signals -----------------------------------------------------------------------------------------------------

STOPS = {
    "one_rank_only": {1: ["signal_at", 3, "SIGTERM"]},
    "again_in_the_last_save": {
        0: [
            "several",
            ["signal_at", 3, "SIGTERM", "SIGUSR1"],
            ["in_save", 4, "replace", r"\.tmp-step.*", 1, "SIGTERM"],
        ]
    },
    "while_a_save_is_held_up": {
        0: ["several", ["hold_writes"], ["in_save", 2, "replace", r"\.tmp-step.*", 1, "SIGTERM"]]
    },
}


def check_stop(run: Run, golden: dict[str, Any], inject: dict[int, list[Any]]) -> None:
    """A job that gets signals saves and ends with 75; what it says that it saved is there."""
    job = run(2, inject=inject)
    assert job.wait(START_SECONDS) == [75, 75], job
    assert job.seconds_between_ends() < END_SECONDS
    assert job.status()["status"] == "saved"
    step = int(re.search(r"stopped at step (\d+) and saved", job.stdout(0))[1])
    assert step < STEPS and job.status()["step"] == step
    assert temporaries(job.run_dir) == []
    require_done(run(1), golden, from_step=step)


@pytest.mark.parametrize("inject", STOPS.values(), ids=STOPS)
def test_a_signal_stops_and_saves(run, golden, inject):
    check_stop(run, golden, inject)


def test_a_last_save_that_is_not_waited_for_is_caught(run, golden):
    with pytest.raises(AssertionError, match=r"\nassert (\d) == (?!\1)\d"):
        check_stop(run, golden, {0: ["several", *STOPS["while_a_save_is_held_up"][0][1:], ["forget_last_save"]]})


# --- the end of the job's time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["run.time_limit_seconds", "SLURM_JOB_END_TIME"])
def test_the_end_of_the_jobs_time_is_not_awaited(run, golden, by):
    """15 seconds are kept in reserve; the steps are slow enough that one second more does not last for all."""
    limit_seconds, started = 16, time.time()
    slow = {rank: ["slow_steps", 0.3] for rank in range(2)}
    if by == "SLURM_JOB_END_TIME":
        job = run(2, inject=slow, env={by: str(int(started) + limit_seconds + 1)})
    else:
        job = run(2, f"{by}={limit_seconds}", inject=slow)
    assert job.wait(START_SECONDS) == [75, 75], job
    assert time.time() - started < limit_seconds
    status = job.status()
    assert status["status"] == "saved" and status["step"] < STEPS
    require_done(run(4), golden, from_step=status["step"])


# --- damage ------------------------------------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.safetensors", "ranks.safetensors", "state.json", "manifest.json")


def check_falls_back(run: Run, golden: dict[str, Any], directory: Path, trusted: bool = False) -> None:
    """The newest checkpoint, of step 5, is skipped and the one before it is loaded; both are said."""
    job = run(2, inject={0: ["trust_checkpoints"]} if trusted else None)
    assert job.wait(START_SECONDS) == [0, 0], job
    assert job.summary()["weights_sha256"] == golden["weights_sha256"], "weights_sha256"
    require_done(job, golden, from_step=4)
    assert f"damaged checkpoint skipped: {directory}/checkpoints/step-00000005" in job.stdout(0)
    assert f"falling back to {directory}/checkpoints/step-00000004" in job.stdout(0)


@pytest.mark.parametrize("damage", [truncate, *(pytest.param(flip_bit, id=name) for name in FILES)])
def test_a_damaged_checkpoint_is_skipped(run, golden, stopped, damage, request):
    newest = checkpoints(stopped)[-1]
    assert {path.name for path in newest.iterdir()} == set(FILES) and newest.name == "step-00000005"
    name = request.node.callspec.id
    damage(newest / (name if name in FILES else "optimizer.safetensors"))
    check_falls_back(run, golden, stopped)


def test_a_store_that_does_not_verify_is_caught(run, golden, stopped):
    flip_bit(checkpoints(stopped)[-1] / "model.safetensors")
    with pytest.raises(AssertionError, match=r"^weights_sha256"):
        check_falls_back(run, golden, stopped, trusted=True)


@pytest.mark.parametrize("stale", [True, False])
def test_latest_and_best_are_for_people_only(run, golden, stopped, stale):
    for name in ("latest", "best"):
        path = stopped / "checkpoints" / name
        path.write_text("step-00000004\n") if stale else path.unlink()
    require_done(run(1), golden, from_step=5)


def test_a_run_with_bad_checkpoints_only_is_not_started_over(run, stopped):
    for i, path in enumerate(checkpoints(stopped)):
        (truncate, flip_bit)[i % 2](path / FILES[i])
    before = contents(stopped)
    require_refused(run(2), 74, "no checkpoint is good", "step-00000005", "step-00000004", "move the directory away")
    assert contents(stopped) == before


# --- the disk is full, or read only ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_a_disk_that_fails_in_a_save_ends_the_run_and_loses_nothing(run, golden, error):
    job = run(4, inject={0: ["in_save", 4, "write", r"optimizer\..*", 1, error]})
    require_refused(job, 74, "cannot save step 4", "earlier checkpoints are kept")
    assert job.seconds_between_ends() < END_SECONDS
    status = job.status()
    assert (status["status"], status["rank"]) == ("failed", 0) and "cannot save step 4" in status["reason"]
    assert [path.name for path in checkpoints(job.run_dir)] == ["step-00000002", "step-00000003"]
    assert temporaries(job.run_dir) == []
    require_done(run(2), golden, from_step=3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one, in the place of the run directory, and somebody else's file on it: it leaves room for two
    checkpoints, and for no third while it is written."""
    with small_disk(tmp_path / "disk", "24m") as path:
        (path / "others").write_bytes(bytes(24 * 2**20 - 5 * CHECKPOINT_BYTES // 2))
        yield path


def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_space(run, golden, disk):
    job = run(2, directory=disk / "run")
    require_refused(job, 74, "cannot save step 3 (3.3 MB needed, ", "No space left on device", "free space")
    assert job.seconds_between_ends() < END_SECONDS
    assert (job.status()["status"], job.status()["rank"]) == ("failed", 0)
    assert "No space left on device" in job.status()["reason"]
    assert [path.name for path in checkpoints(job.run_dir)] == ["step-00000001", "step-00000002"]
    assert temporaries(job.run_dir) == []
    (disk / "others").unlink()
    require_done(run(4, directory=disk / "run"), golden, from_step=2)


def test_a_full_disk_can_be_a_warning(run, golden, disk):
    job = run(
        2,
        "checkpoint.on_write_error=warn",
        directory=disk / "run",
        inject={0: ["free_disk", 6, str(disk / "others")]},
    )
    require_done(job, golden, from_step=None)
    warnings = re.findall(r"^checkpoint.on_write_error=warn: .*cannot save step (\d)", job.stdout(0), re.M)
    assert warnings[:2] == ["3", "4"] and set(warnings) <= set("3456")


def test_on_a_disk_without_a_free_byte_the_run_ends_and_leaves_no_litter(run, golden, disk):
    """Not even `status.json` can be written."""
    job = run(2, directory=disk / "run", inject={0: ["in_save", 2, "mkdir", r"\.tmp-step.*", 1, str(disk / "more")]})
    codes = job.wait(START_SECONDS)
    assert codes[0] == 74 and codes[1] in (70, 74), job
    assert "No space left on device" in job.errors(0)[0] and len(job.errors(0)) == 1
    assert job.status()["status"] == "running" and temporaries(job.run_dir) == []
    assert len(checkpoints(job.run_dir)) == 1
    for name in ("more", "others"):
        (disk / name).unlink()
    require_done(run(1, directory=disk / "run"), golden, from_step=1)


def test_a_read_only_directory_is_refused_and_left_as_it_is(run, golden, stopped, tmp_path):
    with small_disk(tmp_path / "disk", "32m") as path:
        shutil.copytree(stopped, path / "run")
        before = contents(path)
        remount(path, "ro")
        require_refused(run(2, directory=path / "run"), 74, f"run.dir={path}/run: cannot be written (Read-only")
        assert contents(path) == before
        remount(path, "rw")
        require_done(run(1, directory=path / "run"), golden, from_step=5)


# --- ranks see different directories -----------------------------------------------------------------------------


def check_directories(run: Run, golden: dict[str, Any], tmp_path: Path, inject: dict[int, list[Any]]) -> None:
    """Each rank is started in another directory and `run.dir` is relative: that of rank 0 is meant."""
    places = [tmp_path / name for name in "abcd"]
    for place in places:
        place.mkdir()
    job = run(2, directory=Path("run"), cwd=places[:2], inject={0: ["signal_at", 3, "SIGTERM"]})
    assert job.wait(START_SECONDS) == [75, 75] and job.run_dir == places[0] / "run", job
    job = run(4, directory=Path("run"), cwd=places, inject=inject)
    require_done(job, golden, from_step=4)
    assert all(os.listdir(place) == [] for place in places[1:])


def test_the_directory_of_rank_0_counts(run, golden, tmp_path):
    check_directories(run, golden, tmp_path, {})


def test_ranks_that_load_what_they_see_themselves_are_caught(run, golden, tmp_path):
    with pytest.raises(AssertionError, match="error: the order of the collectives"):
        check_directories(run, golden, tmp_path, {rank: ["restore_locally"] for rank in range(4)})


# --- numbers that are not finite ---------------------------------------------------------------------------------


def test_a_nan_on_one_rank_ends_the_run_and_is_never_saved(run, golden):
    job = run(4, inject={2: ["poison", 5]})
    require_refused(job, 70, "the loss of rank 2 was not finite")
    assert job.seconds_between_ends() < END_SECONDS
    assert (job.status()["status"], job.status()["rank"]) == ("failed", 2)
    from_step = last_written(job, 4)
    require_done(run(2), golden, from_step=from_step)


def test_a_step_that_was_left_out_stays_left_out_through_a_resume(run, tmp_path):
    skip, poisoned = "optimizer.non_finite=skip", ["poison", 3]
    straight = run(2, skip, directory=tmp_path / "straight", inject={1: poisoned})
    assert straight.wait(START_SECONDS) == [0, 0], straight
    killed = run(2, skip, inject={1: ["several", poisoned, ["signal_at", 6, "SIGKILL"]]})
    require_killed(killed, 1)
    from_step = last_written(killed, 5)
    job = run(4, skip)
    require_done(job, result(straight), from_step=from_step)
    assert [row["skipped_steps"] for row in result(job)["rows"] if row["kind"] == "train"] == [1, 1, 1]


# --- what a run remembers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_around_a_reduction_of_the_learning_rate(run, golden, when):
    """The result holds the learning rates."""
    job = run(2, inject={0: ["die_at_lr_reduction", when]})
    require_killed(job)
    assert ("plateau: no better loss" in job.stdout(0)) == (when == "after")
    from_step = last_written(job, REDUCTION_AT_STEP - 1)
    require_done(run(4), golden, from_step=from_step)


def test_a_death_at_the_very_end(run, golden):
    """All is trained, evaluated and saved; only the summary is missing. The other rank waits for it, and says so."""
    job = run(2, inject={0: ["die_before_summary"]})
    job.wait(START_SECONDS)
    require_killed(job)
    assert not (job.run_dir / "summary.json").exists()
    require_done(run(4), golden, from_step=STEPS)


def test_a_stop_in_the_final_test(run, golden, stopped):
    """What is saved is the end of the training, and the status says so: not the step from which the job went on."""
    job = run(2, inject={rank: ["signal_in_the_final_test", "SIGTERM"] for rank in range(2)})
    assert job.wait(START_SECONDS) == [75, 75], job
    assert resumed_from(job) == 5
    assert (job.status()["status"], job.status()["step"]) == ("saved", STEPS)
    event = json.loads((job.run_dir / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["step"]) == ("saved", STEPS)
    require_done(run(4), golden, from_step=STEPS)


def test_a_clock_that_is_set_back_changes_nothing(run, golden, stopped):
    for age, path in enumerate(checkpoints(stopped)):
        for file in (path, *path.iterdir()):
            os.utime(file, (1e9 - age, 1e9 - age))  # the newest looks the oldest
    day = 24 * 3600.0
    job = run(2, inject={rank: ["several", ["clock_back", day], ["clock_back", day, 7]] for rank in range(2)})
    require_done(job, golden, from_step=5)
    assert job.status()["time"] < time.time() - 1.9 * day
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


# --- another config ----------------------------------------------------------------------------------------------

CHANGES = [
    ("run.seed=1", None, "run.seed: 0 -> 1"),
    ("batch.global_size=8", None, "batch.global_size: 16 -> 8"),
    ("data.synthetic_train_size=80", None, "data.synthetic_train_size: 72 -> 80"),
    (None, ["change_data"], "-> 000000000000"),
    ("run.threads_per_rank=2", None, "threads: 1 -> 2"),
]


def test_what_would_change_the_result_is_refused_and_nothing_is_written(run, golden, stopped):
    before = contents(stopped)
    for override, inject, message in CHANGES:
        job = run(1, *[override] if override else [], inject={0: inject} if inject else None)
        require_refused(job, 2, "holds a run whose result would change", message, "--resume-anyway")
        assert contents(stopped) == before
    require_refused(run(2, "run.seed=1", "batch.global_size=8"), 2, "batch.global_size: 16 -> 8", "run.seed: 0 -> 1")
    assert contents(stopped) == before
    require_done(run(2), golden, from_step=5)


def test_resume_anyway_says_where_exactness_ends(run, stopped):
    job = run(2, "--resume-anyway", "run.seed=1")
    assert job.wait(START_SECONDS) == [0, 0], job
    assert "exactness  ends at step 5; changed: run.seed: 0 -> 1" in job.stdout(0)
    assert resumed_from(job) == job.summary()["inexact_since_step"] == 5


# --- secrets -----------------------------------------------------------------------------------------------------


def test_the_api_key_is_nowhere(run, golden, jobs, tmp_path):
    """Not in a file, on a stream or on a command line of any process, in a run that fails and one that does not."""
    pytest.importorskip("wandb")
    key = secrets.token_hex(20)
    environment = {"WANDB_API_KEY": key, "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path / "home")}
    seen: set[str] = set()
    for inject, code in ((["raise_at", 6], 70), ([], 0)):
        job = run(2, "tracking.wandb=offline", env=environment, inject={0: inject})
        while job.left_over():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_text(errors="replace"))
            time.sleep(0.02)
        assert job.wait(END_SECONDS)[0] == code, job
        assert all(key not in job.stdout(rank) + job.stderr(rank) for rank in range(2))
    assert result(job) == golden
    assert any("wandb" in line for line in seen) and not any(key in line for line in seen)
    assert files_with(tmp_path, key) == []
    assert {".yaml", ".json", ".wandb"} <= {path.suffix for path in files_with(job.run_dir, "synthetic_train_size")}
    deadline = time.monotonic() + 5
    while with_key(key) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert with_key(key) == []


def files_with(directory: Path, text: str) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def with_key(key: str) -> list[str]:
    """Processes that were started with the key in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if key in path.read_text(errors="replace"):
                found.append(path.parent.name)
    return found
