"""Random kill schedules: a run that is ended again and again, at random moments, on changing numbers of ranks.

    python -m tests.integration.faults.schedules --schedules 100 --seed 0 --out benchmarks/results/schedules.json

Contract: `draw(seed)` is a schedule: one to five jobs that are ended by a signal, and one that nobody disturbs, all in
one run directory. Each has 1 to 5 ranks; SIGKILL or SIGTERM goes to one rank or to all, at a moment that is drawn
too (`MOMENTS`). What is drawn depends on the seed alone; what is hit depends on the machine too, and is recorded.
`run` plays a schedule and raises AssertionError, with what the ranks said, unless

- every job ends in time, with the exit codes of what was done to it, no survivor with a traceback;
- a job that was stopped has lost no step, one that was killed at most those since the last checkpoint but one;
- the last job ends with the weights and the rows of metrics of a run on one rank that nothing disturbed (`golden`).

Nothing is assumed of the machine's speed but that a rank which is to end is gone in 30 s, or 30 s after its timeout.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.faults.jobs import START_SECONDS, VOLATILE, Job, Jobs

WORLD_SIZES = (1, 2, 3, 4, 5)
STEPS, CHECKPOINT_STEPS, EPOCHS = 24, 4, 4
TIMEOUT_SECONDS, END_SECONDS = 10, 30
CONFIG = (
    "run.name=schedules",
    "run.device=cpu",
    "run.log_every_steps=5",  # not in step with the checkpoints: sums that are not logged yet go through them
    f"run.timeout_seconds={TIMEOUT_SECONDS}",
    "data.source=synthetic",
    "data.synthetic_train_size=136",
    "data.synthetic_test_size=40",
    "data.validation_size=40",
    "model.name=resnet8",
    "batch.global_size=16",
    "strategy.virtual_ranks=8",
    "plateau.patience_evaluations=1",
    "plateau.threshold=0.9",  # nothing is an improvement: the plateau counts over two epochs, and cuts
    f"train.epochs={EPOCHS}",
    "strategy.name=exact",
    "compute.precision=fp32",
    f"checkpoint.every_steps={CHECKPOINT_STEPS}",
    "tracking.wandb=disabled",
)

MOMENTS: Mapping[str, tuple[int, int, float]] = {
    "forked": (4, 0, 1.5),
    "joins": (3, 1, 0.05),
    "joined": (3, 1, 0.2),
    "restores": (2, 1, 0.1),
    "step": (4, 6, 0.1),
    "evaluates": (4, 1, 0.03),
    "writes": (6, 2, 0.03),
}
"""What rank 0 says (see `injections.tell`): how often it is drawn, how many are waited for at most, and how many
seconds at most after that the signal comes. `forked` is the beginning of the job."""
PLACES = {
    "forked": "before the ranks have met",
    "joins": "before the ranks have met",
    "joined": "start-up",
    "restores": "start-up",
    "step": "training",
    "evaluates": "evaluation",
    "advance": "between",
    "evaluated": "between",
}
"""Where a job is after what rank 0 has said last."""
WRITING, DONE = "checkpoint being written", "after its end"

Outcome = tuple[str, list[dict[str, Any]]]
"""SHA-256 of the weights, and the rows of metrics without what is volatile."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A job that is ended by a signal."""

    world_size: int
    agent: bool
    """Where the ranks meet: see `Jobs.start`."""
    signal: signal.Signals
    victims: tuple[int, ...]
    """Ranks that get the signal, in this order."""
    event: str
    """A key of `MOMENTS`."""
    number: int
    """How many of the event are waited for."""
    delay_seconds: float

    @property
    def kind(self) -> str:
        return f"{self.signal.name}, {'all ranks' if len(self.victims) == self.world_size else 'one of several ranks'}"


@dataclass(frozen=True, kw_only=True)
class Hit:
    """What a segment was ended in."""

    place: str
    step: int | None
    """Steps done, as rank 0 has said; None if it had not come to the first one of its job."""
    checkpoint: int
    """Step of the newest checkpoint; 0 if there is none."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """A schedule that has ended well or, with a `mutant`, in any way."""

    outcome: Outcome
    hits: list[Hit]
    resumed: list[int]
    """Steps that jobs resumed from, of those that came so far."""
    lost_steps: int
    """Most steps that were done twice because of one signal."""


def draw(seed: int) -> tuple[list[Segment], int]:
    """The jobs that are ended, and the world size of the one that is not."""
    dice = random.Random(seed)
    return [_draw_segment(dice) for _ in range(dice.randint(1, 5))], dice.choice(WORLD_SIZES)


def _draw_segment(dice: random.Random) -> Segment:
    world_size = dice.choice(WORLD_SIZES)
    ranks = dice.sample(range(world_size), world_size)
    event = dice.choices(list(MOMENTS), [weight for weight, _, _ in MOMENTS.values()])[0]
    _, most, longest = MOMENTS[event]
    return Segment(
        world_size=world_size,
        agent=dice.random() < 0.5,
        signal=dice.choice((signal.SIGKILL, signal.SIGTERM)),
        victims=tuple(ranks if dice.random() < 0.5 else ranks[:1]),
        event=event,
        number=dice.randint(min(1, most), most),
        delay_seconds=dice.uniform(0, longest),
    )


def golden(jobs: Jobs, directory: Path) -> Outcome:
    """That of a run on one rank that nothing disturbs. AssertionError if its plateau does not cut."""
    job = jobs.start(1, "train", *CONFIG, f"run.dir={directory / 'golden'}")
    assert job.wait(START_SECONDS) == [0], job
    outcome = _outcome(job)
    rates = [row["lr"] for row in outcome[1] if row["kind"] == "train"]
    assert rates[-1] < max(rates) and job.summary()["steps"] == STEPS, rates
    return outcome


def run(
    jobs: Jobs,
    directory: Path,
    segments: Sequence[Segment],
    world_size: int,
    expected: Outcome | None,
    *,
    mutant: str | None = None,
) -> Played:
    """Plays a schedule in `directory`; with `expected=None` it may end with any weights and rows.

    `mutant` names a function of `injections.py` that every rank calls before it starts.
    """
    hits: list[Hit] = []
    resumed: list[int] = []
    lost_steps = done = allowed = 0  # done: steps, by the jobs so far; allowed: how many of them the next may do again
    for index in range(len(segments) + 1):
        segment = segments[index] if index < len(segments) else None
        ranks = segment.world_size if segment else world_size
        told = [directory / f"told-{index}-{rank}" for rank in range(ranks)]
        for path in told:
            path.touch()
        mutants = [mutant] if mutant else []
        job = jobs.start(
            ranks,
            *("train", *CONFIG, f"run.dir={directory / 'run'}"),
            inject={rank: ["tell", str(path), *mutants] for rank, path in enumerate(told)},
            agent=segment.agent if segment else True,
        )
        try:
            codes, hit = _end(job, segment, told)
        finally:
            for rank, pid in enumerate(job.pids):
                if pid in job.left_over():
                    job.kill(rank)
        lines = told[0].read_text().splitlines()
        begun = next((int(line.split()[1]) - 1 for line in lines if line.startswith("step ")), None)
        if begun is not None:
            # A checkpoint is whole at the latest when the one after it begins.
            assert 0 <= done - begun <= allowed, f"step {done} was done, the job resumes from {begun}\n{job}"
            lost_steps = max(lost_steps, done - begun)
            resumed.append(begun)
            done = _steps_done(lines) or 0
            allowed = 2 * CHECKPOINT_STEPS
        if segment and set(codes) == {75} and begun is not None:  # else the run is as it was
            assert (job.status()["status"], job.status()["step"]) == ("saved", done), job
            allowed = 0
        if hit:
            hits.append(hit)
    assert codes == [0] * ranks, f"{codes}\n{job}"
    assert job.status()["status"] == "done", job
    outcome = _outcome(job)
    if expected is not None:
        assert outcome[0] == expected[0], f"weights {outcome[0]}, golden {expected[0]}"
        assert outcome[1] == expected[1], f"rows {outcome[1]}, golden {expected[1]}"
    return Played(outcome=outcome, hits=hits, resumed=resumed, lost_steps=lost_steps)


def _end(job: Job, segment: Segment | None, told: Sequence[Path]) -> tuple[list[int], Hit | None]:
    """Waits for a job's end, which the segment brings about; returns the exit codes and what was hit.

    `told` are the files into which the ranks tell what they do.
    """
    if segment is None:
        return job.wait(START_SECONDS), None
    _wait_until(job, lambda: _events(told[0]).count(segment.event) >= segment.number)
    time.sleep(segment.delay_seconds)
    alive = job.left_over()
    for rank in segment.victims:
        if job.pids[rank] in alive:
            with suppress(ProcessLookupError):
                os.kill(job.pids[rank], segment.signal)
    lines = told[0].read_text().splitlines()
    saved = [int(path.name.split("-")[1]) for path in job.run_dir.glob("checkpoints/step-*")]
    place = _place(_events(told[0])) if alive else DONE
    hit = Hit(place=place, step=_steps_done(lines), checkpoint=max(saved, default=0))
    if segment.signal == signal.SIGTERM:
        codes = job.wait(START_SECONDS)
    elif len(segment.victims) == segment.world_size:
        codes = job.wait(END_SECONDS)
    else:
        survivors = set(range(segment.world_size)) - set(segment.victims)
        _wait_until(job, lambda: all("joins" in _events(told[rank]) for rank in survivors))  # the timeout begins here
        codes = job.wait(TIMEOUT_SECONDS + END_SECONDS)
    _check_codes(job, segment, codes, _events(told[0]))
    return codes, hit


def _wait_until(job: Job, condition: Callable[[], bool]) -> None:
    """Until it holds, or the job has ended."""
    deadline = time.monotonic() + START_SECONDS
    while job.left_over() and not condition():
        assert time.monotonic() < deadline, f"waited in vain\n{job}"
        time.sleep(0.002)


def _events(told: Path) -> list[str]:
    """What a rank has told, without the steps' numbers."""
    return [line.split()[0] for line in told.read_text().splitlines()]


def _check_codes(job: Job, segment: Segment, codes: list[int], events: Sequence[str]) -> None:
    """That the job has ended as it should after the signal."""
    finished = (job.run_dir / f"checkpoints/step-{STEPS:08d}").exists()
    if codes == [0] * len(codes):
        assert finished, f"done, but not all steps\n{job}"
        return
    if segment.signal == signal.SIGKILL:
        fine = {-signal.SIGKILL, 2, 70} | ({0} if finished else set())
        killed = {rank for rank, code in enumerate(codes) if code == -signal.SIGKILL}
        assert set(codes) <= fine and killed <= set(segment.victims), f"{codes}\n{job}"
    elif -signal.SIGTERM in codes:  # it came before all listened
        assert "joined" not in events and set(codes) <= {-signal.SIGTERM, 2, 70, 75}, f"{codes}\n{job}"
    else:  # who waits for a rank that has not come yet is not told why
        assert 75 in codes and set(codes) <= ({75} if "joined" in events else {75, 2}), f"{codes}\n{job}"
    assert not any("Traceback" in job.stderr(rank) for rank in range(len(codes))), job


def _place(events: Sequence[str]) -> str:
    if events.count("writes") > events.count("written"):
        return WRITING
    return PLACES[next((event for event in reversed(events) if event in PLACES), "forked")]


def _steps_done(lines: Sequence[str]) -> int | None:
    """Steps done at the end of what rank 0 has said; None if it has come to none."""
    step = None
    for event, _, number in (line.partition(" ") for line in lines):
        if event in ("step", "advance"):
            step = int(number) - (event == "step")
    return step


def _outcome(job: Job) -> Outcome:
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]
    return job.summary()["weights_sha256"], kept


# --- many schedules ----------------------------------------------------------------------------------------------


def _line(seed: int, segments: Sequence[Segment], world_size: int, hits: Sequence[Hit]) -> str:
    """`seed 3: 2 ranks, SIGKILL rank 1, step 5 (checkpoint 4), training; ...; 4 ranks`."""
    parts = []
    for segment, hit in zip(segments, hits, strict=False):
        whom = "all" if segment.kind.endswith("all ranks") else f"rank {segment.victims[0]}"
        step = "no step yet" if hit.step is None else f"step {hit.step}"
        newest = f"(checkpoint {hit.checkpoint or 'none'})"
        parts.append(f"{segment.world_size} ranks, {segment.signal.name} {whom}, {step} {newest}, {hit.place}")
    return f"seed {seed}: {'; '.join([*parts, f'{world_size} ranks'])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    load, begun = round(os.getloadavg()[0], 2), time.monotonic()
    lines, lost_steps, failed = [], [0], []
    kinds: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    world_sizes: collections.Counter[int] = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        (Path(scratch) / "outputs").mkdir()
        jobs = Jobs(Path(scratch) / "outputs")
        try:
            expected = golden(jobs, Path(scratch))
            for seed in range(options.seed, options.seed + options.schedules):
                segments, world_size = draw(seed)
                directory, started = Path(scratch) / str(seed), time.monotonic()
                directory.mkdir()
                try:
                    played = run(jobs, directory, segments, world_size, expected)
                    hits, problem = played.hits, ""
                    lost_steps.append(played.lost_steps)
                except AssertionError as error:
                    hits, problem = [], f"{segments}\n{error}"
                    failed.append(seed)
                kinds.update(segment.kind for segment, hit in zip(segments, hits, strict=False) if hit.place != DONE)
                places.update(hit.place for hit in hits)
                world_sizes.update([segment.world_size for segment in segments] + [world_size])
                lines.append(_line(seed, segments, world_size, hits) + (": FAILED" if problem else ""))
                took = f"{time.monotonic() - started:.1f} s"
                print(f"{lines[-1]}: {took}{': ok' if not problem else ''}\n{problem}".rstrip(), flush=True)
        finally:
            jobs.close()
    seconds = time.monotonic() - begun
    equal = options.schedules - len(failed)
    print(f"{equal} of {options.schedules} schedules end with the weights and rows of a run that nothing disturbed")
    print(f"{seconds:.0f} s; {dict(kinds)}; {dict(places)}; most steps lost {max(lost_steps)}; failed seeds {failed}")
    if options.out:
        from dist_cifar.run.provenance import hardware, versions

        result = {
            "benchmark": "schedules",
            "hardware": hardware(),
            "load_average_before": load,
            "model": "resnet8",
            "strategy": "exact",
            "steps": STEPS,
            "checkpoint_every_steps": CHECKPOINT_STEPS,
            "seed": options.seed,
            "n": options.schedules,
            "equal": equal,
            "golden_sha256": expected[0],
            "failed_seeds": failed,
            "signals": dict(sorted(kinds.items())),
            "moments": dict(sorted(places.items())),
            "jobs_by_world_size": dict(sorted(world_sizes.items())),
            "lost_steps_max": max(lost_steps),
            "seconds": round(seconds),
            "versions": versions(),
            "schedules": lines,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
