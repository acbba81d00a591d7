"""Runs the trials of a verification: the coordinator, which orders and compares, and the agents, which start ranks."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dist_cifar
from dist_cifar import stopping
from dist_cifar.config import Config, config_from_values, flatten, to_yaml
from dist_cifar.distributed.kv_store import KeyValueStore
from dist_cifar.distributed.launch_env import DistEnv, rank_environ
from dist_cifar.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_SAVED,
    ConfigError,
    DataError,
    LaunchError,
    TrainingError,
    UserError,
)
from dist_cifar.run.atomic_io import write_atomic, write_output
from dist_cifar.tools.verify.compare import (
    Outcome,
    Row,
    describe,
    first_difference,
    machine_line,
    outcome,
    own_hint,
    require_resumed,
    table,
)
from dist_cifar.tools.verify.plan import (
    Agent,
    Trial,
    checkpoint_every_steps,
    default_world_sizes,
    parse_world_sizes,
    place_ranks,
    plan_trials,
    this_agent,
    verified_config,
)
from dist_cifar.tools.verify.ranks import Ranks, Tail, free_port, log_path, segment_failure

_EXIT_SIGINT = 130
"""The exit code that shells give to a command that Ctrl-C has ended."""
_POLL_SECONDS = 0.02
_ANSWER_SECONDS = 120.0
"""How long the coordinator waits for an agent to have killed its ranks."""
_LAST_WORDS_SECONDS = 10.0
"""How long rank 0 may take to report an error after another rank has ended."""

T = TypeVar("T")


class _Stopped(Exception):
    """A signal has asked this agent to stop."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all agents know."""

    env: DistEnv
    store: KeyValueStore
    agents: list[Agent]
    trials: list[Trial]
    steps: int
    """How many steps are compared."""

    def segments(self) -> list[tuple[Trial, int]]:
        """Every segment of every trial in the order in which they run: the trial and the segment's index."""
        return [(trial, index) for trial in self.trials for index in range(len(trial.segments))]

    def start(self, ranks: Ranks, trial: Trial, index: int, order: Mapping[str, Any]) -> None:
        """Starts those ranks of a segment that run on this agent."""
        directory, world_size = Path(order["directory"]), trial.segments[index].world_size
        train = Path(dist_cifar.__file__).with_name("train.py")
        for rank, placement in enumerate(place_ranks(world_size, self.agents)):
            if placement.agent != self.env.rank:
                continue
            rank_env = DistEnv(
                rank=rank,
                world_size=world_size,
                local_rank=placement.local_rank,
                local_world_size=placement.local_world_size,
                master_addr=self.env.master_addr,
                master_port=order["port"],
                job=order["job"],
            )
            command = [sys.executable, str(train), "--config", str(directory / "config.yaml")]
            command.append(f"run.dir={directory / trial.directory}")
            command.append(f"checkpoint.every_steps={checkpoint_every_steps(len(self.trials) - 1, self.steps)}")
            ranks.start(rank, command, rank_environ(os.environ, rank_env), log_path(directory, trial, index, rank))


def verify(
    config: Config,
    env: DistEnv,
    *,
    world_sizes: str | None,
    steps: int,
    directory: Path | None = None,
    json_file: Path | None = None,
) -> int:
    """Runs and compares the trials; returns the exit code, the same on every agent, which all call it alike.

    `world_sizes` is a list such as `1,2,4`; None chooses them. `directory`, which all nodes share, must be empty or not
    exist; by default it is a new one below `runs/`. It is removed if all is equal. `json_file` gets the result for
    programs. Raises a `UserError`, on agent 0, for a difference and for problems that the user can fix.
    """
    asked_strategy, config = config.strategy.name, verified_config(config)
    virtual_ranks = config.strategy.virtual_ranks
    if steps < 1:
        raise ConfigError(f"--steps: must be >= 1, found {steps}; write e.g. 20")
    chosen = None if world_sizes is None else parse_world_sizes(world_sizes, virtual_ranks)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist; create it or name another")
    store = KeyValueStore(env)
    try:
        store.set(f"agent/{env.rank}", json.dumps(asdict(this_agent(config, env))))
        agents = [
            Agent(**json.loads(_wait(partial(store.get, f"agent/{i}"), _ANSWER_SECONDS, f"agent {i}")))
            for i in range(env.world_size)
        ]
        sizes = chosen or default_world_sizes(virtual_ranks, agents)
        for size in sizes:
            place_ranks(size, agents)  # or an error, before anything takes long
        job = Job(env=env, store=store, agents=agents, trials=plan_trials(sizes, steps), steps=steps)
        return run_agent(job) if env.rank > 0 else Coordinator(job, config, asked_strategy).run(directory, json_file)
    except _Stopped:
        return _EXIT_SIGINT if stopping.first_received() == "SIGINT" else EXIT_SAVED


class Coordinator:
    """Agent 0: orders when segments begin and end, reads what they write, and reports."""

    def __init__(self, job: Job, config: Config, asked_strategy: str) -> None:
        self._job, self._config, self._asked_strategy = job, config, asked_strategy
        self._next_segment = 0
        """Number of the segment that runs next, counted over all trials."""

    def run(self, directory: Path | None, json_file: Path | None) -> int:
        """Does everything, up to the end of the other agents. See `verify`."""
        code, path = EXIT_INTERNAL, None
        try:
            path = _make_directory(directory)
            if self._config.compute.precision == "auto":  # once, and not anew for each of the runs
                self._choose_precision()
            self._print_plan(path)
            write_atomic(path / "config.yaml", to_yaml(self._config))
            self._compare(path, json_file)
            shutil.rmtree(path, ignore_errors=True)
            code = EXIT_DONE
        except UserError as error:
            code = error.exit_code
            if path is not None:
                print(f"kept: {path}", flush=True)
            raise
        except _Stopped:
            code = EXIT_SAVED
            print(f"stopped by {stopping.first_received()}; kept: {path}", flush=True)
            raise
        finally:
            self._end_agents(code)
        return code

    def _choose_precision(self) -> None:
        import torch

        from dist_cifar.ops.precision import choose_precision

        chosen, line = choose_precision(torch.device("cuda" if self._job.agents[0].gpus else "cpu"))
        print(line)
        self._config = config_from_values(flatten(self._config) | {"compute.precision": chosen})

    def _compare(self, path: Path, json_file: Path | None) -> None:
        """Runs every trial and reports. Raises `TrainingError` if one differs from the first."""
        runs: dict[str, list[Row]] = {}
        outcomes: list[Outcome] = []
        numerics: dict[str, Any] = {}
        for trial in self._job.trials:
            started = time.monotonic()
            segments = [self._run_segment(path, trial, index) for index in range(len(trial.segments))]
            seconds = time.monotonic() - started
            require_resumed(trial, segments, self._job.steps)
            runs[trial.name] = [row for rows in segments for row in rows]
            first = next(iter(runs.values()))
            outcomes.append(outcome(trial, runs[trial.name], first, steps=self._job.steps, seconds=seconds))
            numerics = numerics or _numerics(path / trial.directory)
        difference = first_difference(runs, self._job.steps)
        print(table(outcomes))
        print(machine_line(numerics))
        if json_file is not None:
            result = {
                "equal": difference is None,
                "digest": outcomes[0].digest,
                "steps": self._job.steps,
                "trials": [asdict(row) for row in outcomes],
                "difference": None if difference is None else asdict(difference),
                "numerics": numerics,
            }
            write_output(json_file, json.dumps(result, indent=2) + "\n")
        if difference is not None:
            raise TrainingError(f"verify: {describe(difference, outcomes[0].name)}{own_hint(self._config)}")
        print(f"all equal: {outcomes[0].digest}", flush=True)

    def _run_segment(self, path: Path, trial: Trial, index: int) -> list[Row]:
        """Runs ranks until the segment's last step is done and kills them; returns what they wrote."""
        job, segment, number = self._job, trial.segments[index], self._next_segment
        self._next_segment += 1
        started = time.monotonic()
        digests = path / trial.directory / "digests.jsonl"
        tail = Tail(digests)
        order = {"directory": str(path), "port": free_port(), "job": uuid.uuid4().hex}
        try:
            with Ranks() as ranks:
                job.store.set(f"segment/{number}", json.dumps(order))
                job.start(ranks, trial, index, order)
                ended = self._wait_for_end(number, ranks, tail, segment.until_step)
        finally:
            job.store.set(f"kill/{number}", "")
            for agent in range(1, job.env.world_size):
                key = f"killed/{number}/{agent}"
                _wait(partial(job.store.get, key), _ANSWER_SECONDS, f"agent {agent}", heed_signals=False)
        if ended:
            raise segment_failure(path, trial, index, ended)
        rows = tail.read()
        # The next segment's rows go to a file of their own: a SIGKILL may have torn this one's last line.
        digests.rename(digests.with_name(f"digests.{index}.jsonl"))
        print(
            f"{trial.name}{'' if len(trial.segments) == 1 else f', world size {segment.world_size}'}:"
            f" steps {rows[0].step} to {rows[-1].step}, then killed; {time.monotonic() - started:.1f} s",
            flush=True,
        )
        return rows

    def _wait_for_end(self, number: int, ranks: Ranks, tail: Tail, until_step: int) -> dict[int, int]:
        """Waits until the segment's last step is done: then returns nothing; or until ranks, on any agent, have ended.

        Returns their exit codes, in the order in which they ended.
        """

        def find_end() -> dict[int, int] | None:
            if (rows := tail.read()) and rows[-1].step >= until_step:
                return {}
            elsewhere = json.loads(self._job.store.get(f"ended/{number}") or "{}")
            return ranks.ended() | {int(rank): code for rank, code in elsewhere.items()} or None

        ended = _wait(find_end)
        if ended:  # rank 0 may be about to say why
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
            _wait(lambda: 0 in (ended | ranks.ended()) or time.monotonic() > deadline or None)
            ended |= ranks.ended()
        return ended

    def _print_plan(self, path: Path) -> None:
        config, asked = self._config, self._asked_strategy
        note = "" if asked == config.strategy.name else f" (the config says {asked})"
        print(
            f"verify     {config.model.name}, {config.compute.precision}, batch {config.batch.global_size} ="
            f" {config.strategy.virtual_ranks} virtual ranks, strategy {config.strategy.name}{note}"
        )
        print(f"trials     {'; '.join(trial.name for trial in self._job.trials)}; {self._job.steps} steps each")
        print(f"processes  {len(self._job.agents)}, which start the ranks; they write to {path}", flush=True)

    def _end_agents(self, code: int) -> None:
        """Tells the other agents to end with `code`, and waits until they know: the store may end with this process."""
        store = self._job.store
        with suppress(LaunchError):
            store.set(f"segment/{self._next_segment}", json.dumps({"exit": code}))
            for agent in range(1, self._job.env.world_size):
                key = f"left/{agent}"
                _wait(partial(store.get, key), _LAST_WORDS_SECONDS, f"agent {agent}", heed_signals=False)


def run_agent(job: Job) -> int:
    """Follows the coordinator's orders until it orders to end; returns the exit code that comes with that."""
    store, agent = job.store, job.env.rank
    try:
        for number, (trial, index) in enumerate(job.segments()):
            order = json.loads(_wait(partial(store.get, f"segment/{number}")))
            if "exit" in order:
                return order["exit"]
            try:
                with Ranks() as ranks:
                    job.start(ranks, trial, index, order)
                    _watch_ranks(store, number, ranks)
            finally:
                store.set(f"killed/{number}/{agent}", "")
        return json.loads(_wait(lambda: store.get(f"segment/{len(job.segments())}")))["exit"]
    finally:
        with suppress(LaunchError):
            store.set(f"left/{agent}", "")


def _watch_ranks(store: KeyValueStore, number: int, ranks: Ranks) -> None:
    """Waits for the order to kill the ranks, and tells the coordinator when one ends before it."""
    reported: dict[int, int] = {}

    def find_order() -> str | None:
        nonlocal reported
        if (ended := ranks.ended()) != reported:
            reported = ended
            store.set(f"ended/{number}", json.dumps(ended))
        return store.get(f"kill/{number}")

    _wait(find_order)


def _wait(
    condition: Callable[[], T | None],
    timeout_seconds: float | None = None,
    whom: str = "",
    *,
    heed_signals: bool = True,
) -> T:
    """Returns the first value of `condition` that is not None.

    Raises `_Stopped` after a signal, and `LaunchError` if `whom` has not answered in time.
    """
    started = time.monotonic()
    while (value := condition()) is None:
        if heed_signals and stopping.stop_requested():
            raise _Stopped
        if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
            raise LaunchError(f"launch: no answer from {whom} in {timeout_seconds:g} s; look at its node and its log")
        time.sleep(_POLL_SECONDS)
    return value


def _make_directory(wanted: Path | None) -> Path:
    """Makes an empty directory; returns its absolute path. Raises `ConfigError` or `DataError`."""
    try:
        if wanted is None:
            Path("runs").mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="verify-", dir="runs")).absolute()
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise ConfigError(f"--dir {wanted}: is not empty; name a directory that does not exist yet")
    except OSError as error:
        where = "runs" if wanted is None else wanted
        raise DataError(f"--dir {where}: cannot be written ({error.strerror}); give another with --dir") from None
    return wanted.absolute()


def _numerics(run_directory: Path) -> dict[str, Any]:
    """What decides the bits on this machine, as recorded in the run's newest checkpoint."""
    newest = max((run_directory / "checkpoints").glob("step-*/state.json"))
    return json.loads(newest.read_text(encoding="utf-8"))["numerics"]
