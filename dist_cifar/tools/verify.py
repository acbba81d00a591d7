"""The acceptance test of a cluster: do all world sizes, and a run that is killed and resumed, give the same bits?

Contract: `verify` trains the first steps of a config in strategy `exact`, once at each world size, and once more as a
chain of world sizes: after each of its parts every rank is killed by SIGKILL, and others go on from the last
checkpoint. Every rank is a fresh process of the front door `train`. What each step of each run writes to
`digests.jsonl` is compared with the first run. It returns 0 if every bit is equal, and raises `TrainingError` with
the first step and the tensors that differ; no rank outlives it. It imports torch only where it must: under a launcher,
and to count GPUs.

A *phase* is one run; its *parts* are what one set of ranks does of it. A *slot* is a process of `verify`: the one that
a person has started, or the N that a launcher has. Slots start the ranks as their children. Slot 0 decides and the
others follow, over a `KeyValueStore`; all know the same phases, so that they only have to be told when.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dist_cifar
from dist_cifar import stopping
from dist_cifar.config import Config, config_from_values, flatten, to_yaml
from dist_cifar.distributed.device import sees_only_its_own, visible_gpus
from dist_cifar.distributed.kv_store import KeyValueStore
from dist_cifar.distributed.launch_env import DistEnv, rank_environ
from dist_cifar.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_SAVED,
    EXIT_USAGE,
    ConfigError,
    DataError,
    LaunchError,
    TrainingError,
    UserError,
)
from dist_cifar.run.atomic_io import write_atomic

_EXIT_SIGINT = 130
"""What shells say of a command that Ctrl-C has ended."""
_POLL_SECONDS = 0.02
_ANSWER_SECONDS = 120.0
"""How long slot 0 waits for another slot to have ended its ranks."""
_LAST_WORDS_SECONDS = 10.0
"""How long rank 0 may take to say why it fails after another rank has ended."""
_NAMES_SHOWN = 5
"""Tensors that an error names."""
_SUMS = ("loss", "correct predictions", "samples", "gradient norms", "steps", "skipped steps")
"""What `sums` of a line of digests holds, in its order."""

T = TypeVar("T")


# --- what is run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one set of ranks does of a phase."""

    world_size: int
    until_step: int
    """The ranks are killed when this step is done."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One run."""

    name: str
    parts: tuple[Part, ...]

    @property
    def directory(self) -> str:
        """Name of its run directory."""
        return f"world-size-{self.parts[0].world_size}" if len(self.parts) == 1 else "chain"


def parse_world_sizes(text: str, virtual_ranks: int) -> list[int]:
    """`1,2,4` as numbers. Raises `ConfigError` for anything that is not a list of divisors of `virtual_ranks`."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--world-sizes: {text!r} is not a list of whole numbers; write e.g. 1,2,4") from None
    for size in sizes:
        if size < 1 or virtual_ranks % size:
            allowed = ", ".join(str(size) for size in range(1, virtual_ranks + 1) if virtual_ranks % size == 0)
            raise ConfigError(
                f"--world-sizes: {size} does not divide strategy.virtual_ranks={virtual_ranks}; allowed: {allowed}"
            )
        if sizes.count(size) > 1:
            raise ConfigError(f"--world-sizes: {size} is given twice; give it once")
    return sizes


def plan_phases(world_sizes: Sequence[int], steps: int) -> list[Phase]:
    """A phase for each world size, in their order, and the chain: largest to smallest, and back to the largest.

    The chain's parts have about equal shares of the steps and end between two checkpoints. Raises `ConfigError` if
    there are too few steps for every part to leave a checkpoint and to do steps that the others do not.
    """
    chain = [*sorted(world_sizes, reverse=True), max(world_sizes)]
    arrows = " -> ".join(map(str, chain))
    if steps < 2 * len(chain):
        raise ConfigError(f"--steps: {steps} steps are too few for the chain {arrows}; write at least {2 * len(chain)}")
    every = checkpoint_every_steps(len(world_sizes), steps)
    stops = [steps * (i + 1) // len(chain) for i in range(len(chain))]
    stops = [stop + 1 if every > 1 and stop % every == 0 and stop < steps else stop for stop in stops]
    parts = tuple(Part(world_size=size, until_step=stop) for size, stop in zip(chain, stops, strict=True))
    single = [
        Phase(name=f"world size {size}", parts=(Part(world_size=size, until_step=steps),)) for size in world_sizes
    ]
    return [*single, Phase(name=f"chain {arrows}", parts=parts)]


def checkpoint_every_steps(world_sizes: int, steps: int) -> int:
    """Steps between two checkpoints: fewer than a part of the chain has, so that each part leaves one.

    `world_sizes` is their number; the chain has a part more.
    """
    return max(1, steps // (world_sizes + 2))


def verified_config(config: Config) -> Config:
    """`config` as it is trained here: in strategy `exact`, without an end, with digests, tracked by nobody.

    Raises `ConfigError` if it cannot be trained in strategy `exact`.
    """
    return config_from_values(
        flatten(config)
        | {
            "strategy.name": "exact",
            "train.epochs": 10**6,  # it is killed: an end would evaluate the test set
            "train.max_steps": None,
            "run.log_digests": True,
            "run.time_limit_seconds": None,
            "checkpoint.keep_last": 1,
            "tracking.wandb": "disabled",
        }
    )


# --- where it is run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What a process of `verify` offers to its ranks."""

    pool: str
    """Names the GPUs that it sees: those of its host, or its own one where SLURM shows each task only that."""
    gpus: int
    """How many it sees; 0 when ranks compute on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    slot: int
    local_rank: int
    """Rank among those of the same pool."""
    local_world_size: int


def place_ranks(world_size: int, slots: Sequence[Slot]) -> list[Place]:
    """The place of each rank: a slot of its own while there are enough, else slots take several ranks each.

    Raises `LaunchError` where GPUs are missing.
    """
    taken = [rank if world_size <= len(slots) else rank * len(slots) // world_size for rank in range(world_size)]
    pools = [slots[slot].pool for slot in taken]
    sizes = Counter(pools)
    for slot in taken:
        pool, gpus = slots[slot].pool, slots[slot].gpus
        if 0 < gpus < sizes[pool]:
            raise LaunchError(
                f"launch: world size {world_size} has {sizes[pool]} ranks on {pool}, which has {gpus} GPUs; start"
                " verify through a launcher on more nodes (torchrun, srun), leave the world size out of --world-sizes,"
                " or set run.device=cpu"
            )
    return [
        Place(slot=slot, local_rank=pools[:rank].count(pools[rank]), local_world_size=sizes[pools[rank]])
        for rank, slot in enumerate(taken)
    ]


def default_world_sizes(virtual_ranks: int, slots: Sequence[Slot]) -> list[int]:
    """Powers of two up to the number of slots, or 4 if that is more: those that the config and the GPUs allow."""
    sizes = []
    size = 1
    while size <= max(len(slots), 4) and virtual_ranks % size == 0:
        with suppress(LaunchError):
            place_ranks(size, slots)
            sizes.append(size)
        size *= 2
    return sizes


def _this_slot(config: Config, env: DistEnv) -> Slot:
    gpus, host = visible_gpus(config.run.device), socket.gethostname()
    has_its_own = sees_only_its_own(env, gpus)
    return Slot(pool=f"{host} (task {env.rank})" if has_its_own else host, gpus=gpus)


# --- what came out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """The state after one step."""

    step: int
    values: Mapping[str, str]
    """Name of a tensor, or `sum of ...`, to what stands for its bits."""


def parse_row(line: bytes | str) -> Row:
    """A line of `digests.jsonl`. Sums become text: a NaN equals itself."""
    fields = json.loads(line)
    sums = {f"sum of {name}": repr(value) for name, value in zip(_SUMS, fields["sums"], strict=True)}
    return Row(step=fields["step"], values=fields["digests"] | sums)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first step that is not the same in all phases."""

    step: int
    names: dict[str, list[str]]
    """Name of each phase that differs from the first one there, to what differs; nothing where it lacks the step."""


def first_difference(runs: Mapping[str, Sequence[Row]], steps: int) -> Difference | None:
    """Compares every row of steps 1 to `steps` with the first row of that step in the first of `runs`.

    A run may have several rows of a step, which it did again after a resume: all must be equal.
    """
    found: dict[str, dict[int, list[Mapping[str, str]]]] = {}
    for name, rows in runs.items():
        found[name] = {}
        for row in rows:
            found[name].setdefault(row.step, []).append(row.values)
    first = next(iter(found))
    for step in range(1, steps + 1):
        if step not in found[first]:
            return Difference(step=step, names={first: []})
        expected = found[first][step][0]
        different: dict[str, list[str]] = {}
        for name, by_step in found.items():
            rows_of_step = by_step.get(step, [])
            names = {
                key
                for values in rows_of_step
                for key in expected.keys() | values.keys()
                if expected.get(key) != values.get(key)
            }
            if names or not rows_of_step:
                different[name] = sorted(names)
        if different:
            return Difference(step=step, names=different)
    return None


def describe(difference: Difference, first: str) -> str:
    """The difference in a line; `first` is the phase that the others are compared with."""
    parts = []
    for phase, names in difference.names.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        other = f"from {first}" if phase != first else "from itself"
        listed = ", ".join(names[:_NAMES_SHOWN])
        parts.append(f"{phase} differs {other} in {listed}{more}" if names else f"{phase} has no digests of it")
    return f"step {difference.step}: {'; '.join(parts)}"


def state_digest(rows: Sequence[Row], step: int) -> str:
    """16 hex digits that stand for the whole state after `step`; empty if the rows lack it."""
    values = next((row.values for row in rows if row.step == step), None)
    return "" if values is None else hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def require_resumed(phase: Phase, parts: Sequence[Sequence[Row]], steps: int) -> None:
    """Raises `TrainingError` if a part of `phase` began from nothing, or has no step that is compared."""
    for part, rows in zip(phase.parts, parts, strict=True):
        if rows is not parts[0] and rows[0].step == 1:
            raise TrainingError(f"{phase.name}: {part.world_size} ranks began at step 1 and had a checkpoint to resume")
        if rows[0].step > steps:
            raise TrainingError(
                f"{phase.name}: the {part.world_size} ranks began at step {rows[0].step}, after the {steps} steps that"
                " are compared: steps are too quick to be stopped in time; give more with --steps"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A phase as the table and the JSON show it."""

    name: str
    world_sizes: list[int]
    steps: int
    """Steps of which every row was compared."""
    replayed_steps: int
    """Of those, how many were done again after a resume."""
    seconds: float
    digest: str
    equal: bool


def outcome(phase: Phase, rows: Sequence[Row], first: Sequence[Row], *, steps: int, seconds: float) -> Outcome:
    """Compares the rows of a phase with those of the first."""
    compared = Counter(row.step for row in rows if row.step <= steps)
    return Outcome(
        name=phase.name,
        world_sizes=[part.world_size for part in phase.parts],
        steps=len(compared),
        replayed_steps=sum(count - 1 for count in compared.values()),
        seconds=round(seconds, 1),
        digest=state_digest(rows, steps),
        equal=first_difference({"first": first, phase.name: rows}, steps) is None,
    )


def report(outcomes: Sequence[Outcome]) -> str:
    """The table."""
    width = max(len("phase"), *(len(row.name) for row in outcomes))
    lines = [f"{'phase':<{width}}  {'steps':>6}  {'replayed':>8}  {'seconds':>8}  {'last digest':<16}  equal"]
    for row in outcomes:
        lines.append(
            f"{row.name:<{width}}  {row.steps:>6}  {row.replayed_steps:>8}  {row.seconds:>8.1f}  {row.digest:<16}"
            f"  {'yes' if row.equal else 'NO'}"
        )
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, *lines, rule])


def machine_line(numerics: Mapping[str, Any]) -> str:
    """What to compare when two machines have other digests, but for the long list of vector extensions."""
    return "machine: " + ", ".join(
        f"{name}={value}" for name, value in numerics.items() if value != "" and name != "extensions"
    )


# --- running it --------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """A signal has asked this slot to stop."""


class _Ranks:
    """The ranks of a part that this slot has started. Leaving the `with` ends those that are left."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Starts one in a session of its own, where Ctrl-C does not reach it; it dies with this process."""
        with open(log, "wb") as file:
            self._processes[rank] = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=stopping.die_with_launcher,
            )

    def ended(self) -> dict[int, int]:
        """Rank to exit code of those that have ended by themselves; negative is a signal."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def kill(self) -> None:
        """Kills all at once, and waits until none is left."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Tail:
    """The rows that are added to a file while it grows. A line counts when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.rows: list[Row] = []

    def read(self) -> list[Row]:
        """All rows so far."""
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            self.rows += [parse_row(line) for line in whole.splitlines()]
        return self.rows


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all slots know."""

    env: DistEnv
    board: KeyValueStore
    slots: list[Slot]
    phases: list[Phase]
    steps: int
    """Steps that are compared."""

    def parts(self) -> list[tuple[Phase, int]]:
        """Every part of every phase in the order in which they run: the phase and the part's index."""
        return [(phase, index) for phase in self.phases for index in range(len(phase.parts))]

    def start(self, ranks: _Ranks, phase: Phase, index: int, order: Mapping[str, Any]) -> None:
        """Starts the ranks of the part that are this slot's."""
        directory, world_size = Path(order["directory"]), phase.parts[index].world_size
        train = Path(dist_cifar.__file__).with_name("train.py")
        for rank, place in enumerate(place_ranks(world_size, self.slots)):
            if place.slot != self.env.rank:
                continue
            rank_env = DistEnv(
                rank=rank,
                world_size=world_size,
                local_rank=place.local_rank,
                local_world_size=place.local_world_size,
                master_addr=self.env.master_addr,
                master_port=order["port"],
                job=order["job"],
            )
            command = [sys.executable, str(train), "--config", str(directory / "config.yaml")]
            command.append(f"run.dir={directory / phase.directory}")
            command.append(f"checkpoint.every_steps={checkpoint_every_steps(len(self.phases) - 1, self.steps)}")
            ranks.start(rank, command, rank_environ(os.environ, rank_env), _log(directory, phase, index, rank))


def verify(
    config: Config,
    env: DistEnv,
    *,
    world_sizes: str | None,
    steps: int,
    directory: Path | None = None,
    json_file: Path | None = None,
) -> int:
    """Runs and compares; returns the exit code, on every slot the same. All slots call it with the same arguments.

    `world_sizes` is text as in `1,2,4`; None chooses. `directory`, which all nodes share, must be empty or not exist;
    by default it is a new one below `runs/`. It is removed if all is equal. `json_file` gets the result for programs.
    Raises a `UserError`, on slot 0, for a difference and for what a person can mend.
    """
    asked_strategy, config = config.strategy.name, verified_config(config)
    virtual_ranks = config.strategy.virtual_ranks
    if steps < 1:
        raise ConfigError(f"--steps: must be >= 1, found {steps}; write e.g. 20")
    chosen = None if world_sizes is None else parse_world_sizes(world_sizes, virtual_ranks)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist; create it or name another")
    board = KeyValueStore(env)
    try:
        board.set(f"slot/{env.rank}", json.dumps(asdict(_this_slot(config, env))))
        slots = [
            Slot(**json.loads(_wait(partial(board.get, f"slot/{i}"), _ANSWER_SECONDS, f"slot {i}")))
            for i in range(env.world_size)
        ]
        sizes = chosen or default_world_sizes(virtual_ranks, slots)
        for size in sizes:
            place_ranks(size, slots)  # or an error, before anything takes long
        job = _Job(env=env, board=board, slots=slots, phases=plan_phases(sizes, steps), steps=steps)
        return _follow(job) if env.rank > 0 else _Leader(job, config, asked_strategy).run(directory, json_file)
    except _Stopped:
        return _EXIT_SIGINT if stopping.first_received() == "SIGINT" else EXIT_SAVED


class _Leader:
    """Slot 0: says when parts begin and end, reads what they write, and reports."""

    def __init__(self, job: _Job, config: Config, asked_strategy: str) -> None:
        self._job, self._config, self._asked_strategy = job, config, asked_strategy
        self._part = 0
        """Number of the part that is next, over all phases."""

    def run(self, directory: Path | None, json_file: Path | None) -> int:
        """Everything, up to the end of the other slots. See `verify`."""
        code, path = EXIT_INTERNAL, None
        try:
            path = _make_directory(directory)
            if self._config.compute.precision == "auto":  # once, and not anew for each of the runs
                self._choose_precision()
            self._say_plan(path)
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
            self._dismiss(code)
        return code

    def _choose_precision(self) -> None:
        import torch

        from dist_cifar.ops.precision import choose_precision

        chosen, line = choose_precision(torch.device("cuda" if self._job.slots[0].gpus else "cpu"))
        print(line)
        self._config = config_from_values(flatten(self._config) | {"compute.precision": chosen})

    def _compare(self, path: Path, json_file: Path | None) -> None:
        """Runs every phase and reports. Raises `TrainingError` if one differs from the first."""
        runs: dict[str, list[Row]] = {}
        outcomes: list[Outcome] = []
        numerics: dict[str, Any] = {}
        for phase in self._job.phases:
            started = time.monotonic()
            parts = [self._run_part(path, phase, index) for index in range(len(phase.parts))]
            seconds = time.monotonic() - started
            require_resumed(phase, parts, self._job.steps)
            runs[phase.name] = [row for rows in parts for row in rows]
            first = next(iter(runs.values()))
            outcomes.append(outcome(phase, runs[phase.name], first, steps=self._job.steps, seconds=seconds))
            numerics = numerics or _numerics(path / phase.directory)
        difference = first_difference(runs, self._job.steps)
        print(report(outcomes))
        print(machine_line(numerics))
        if json_file is not None:
            result = {
                "equal": difference is None,
                "digest": outcomes[0].digest,
                "steps": self._job.steps,
                "phases": [asdict(row) for row in outcomes],
                "difference": None if difference is None else asdict(difference),
                "numerics": numerics,
            }
            write_atomic(json_file, json.dumps(result, indent=2) + "\n")
        if difference is not None:
            raise TrainingError(f"verify: {describe(difference, outcomes[0].name)}")
        print(f"all equal: {outcomes[0].digest}", flush=True)

    def _run_part(self, path: Path, phase: Phase, index: int) -> list[Row]:
        """Runs ranks until the part's last step is done and kills them; returns what they wrote."""
        job, part, number = self._job, phase.parts[index], self._part
        self._part += 1
        started = time.monotonic()
        digests = path / phase.directory / "digests.jsonl"
        tail = _Tail(digests)
        order = {"directory": str(path), "port": _free_port(), "job": uuid.uuid4().hex}
        try:
            with _Ranks() as ranks:
                job.board.set(f"part/{number}", json.dumps(order))
                job.start(ranks, phase, index, order)

                def has_come_to_an_end() -> dict[int, int] | None:
                    if (rows := tail.read()) and rows[-1].step >= part.until_step:
                        return {}
                    note = json.loads(job.board.get(f"ended/{number}") or "{}")
                    return ranks.ended() | {int(rank): code for rank, code in note.items()} or None

                ended = _wait(has_come_to_an_end)
                if ended:
                    deadline = time.monotonic() + _LAST_WORDS_SECONDS
                    _wait(lambda: 0 in (ended | ranks.ended()) or time.monotonic() > deadline or None)
                    ended |= ranks.ended()
        finally:
            job.board.set(f"kill/{number}", "")
            for slot in range(1, job.env.world_size):
                key = f"dead/{number}/{slot}"
                _wait(partial(job.board.get, key), _ANSWER_SECONDS, f"slot {slot}", heed_signals=False)
        if ended:
            raise _failure(path, phase, index, ended)
        rows = tail.read()
        # Another part's rows go to a file of their own: a SIGKILL may have torn this one's last line.
        digests.rename(digests.with_name(f"digests.{index}.jsonl"))
        print(
            f"{phase.name}{'' if len(phase.parts) == 1 else f', world size {part.world_size}'}:"
            f" steps {rows[0].step} to {rows[-1].step}, then killed; {time.monotonic() - started:.1f} s",
            flush=True,
        )
        return rows

    def _say_plan(self, path: Path) -> None:
        config, asked = self._config, self._asked_strategy
        said = "" if asked == "exact" else f" (the config says {asked})"
        print(
            f"verify     {config.model.name}, {config.compute.precision}, batch {config.batch.global_size} ="
            f" {config.strategy.virtual_ranks} virtual ranks, strategy exact{said}"
        )
        print(f"phases     {'; '.join(phase.name for phase in self._job.phases)}; {self._job.steps} steps each")
        print(f"processes  {len(self._job.slots)}, which start the ranks; they write to {path}", flush=True)

    def _dismiss(self, code: int) -> None:
        """Tells the other slots to end with `code`, and lets them hear it: the notes may end with this process."""
        board, others = self._job.board, range(1, self._job.env.world_size)
        with suppress(LaunchError):
            board.set(f"part/{self._part}", json.dumps({"exit": code}))
            for slot in others:
                key = f"left/{slot}"
                _wait(partial(board.get, key), _LAST_WORDS_SECONDS, f"slot {slot}", heed_signals=False)


def _follow(job: _Job) -> int:
    """Any other slot: does what slot 0 says until it says to end, and with which exit code."""
    board, slot = job.board, job.env.rank
    try:
        for number, (phase, index) in enumerate(job.parts()):
            order = json.loads(_wait(partial(board.get, f"part/{number}")))
            if "exit" in order:
                return order["exit"]
            try:
                with _Ranks() as ranks:
                    job.start(ranks, phase, index, order)
                    _follow_part(board, number, ranks)
            finally:
                board.set(f"dead/{number}/{slot}", "")
        return json.loads(_wait(lambda: board.get(f"part/{len(job.parts())}")))["exit"]
    finally:
        with suppress(LaunchError):
            board.set(f"left/{slot}", "")


def _follow_part(board: KeyValueStore, number: int, ranks: _Ranks) -> None:
    """Waits for the word to kill, and tells slot 0 when a rank ends before it."""
    told: dict[int, int] = {}

    def is_over() -> str | None:
        nonlocal told
        if (ended := ranks.ended()) != told:
            told = ended
            board.set(f"ended/{number}", json.dumps(ended))
        return board.get(f"kill/{number}")

    _wait(is_over)


def _wait(
    condition: Callable[[], T | None],
    timeout_seconds: float | None = None,
    whom: str = "",
    *,
    heed_signals: bool = True,
) -> T:
    """What `condition` returns once it is not None. Raises `_Stopped` after a signal, `LaunchError` when it is late."""
    started = time.monotonic()
    while (value := condition()) is None:
        if heed_signals and stopping.stop_requested():
            raise _Stopped
        if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
            raise LaunchError(f"launch: no answer from {whom} in {timeout_seconds:g} s; look at its node and its log")
        time.sleep(_POLL_SECONDS)
    return value


# --- files and processes -----------------------------------------------------------------------------------------


def _make_directory(wanted: Path | None) -> Path:
    """The absolute path of an empty directory. Raises `ConfigError` or `DataError`."""
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


def _free_port() -> int:
    """A port that nobody listens on, on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _log(directory: Path, phase: Phase, index: int, rank: int) -> Path:
    """What a rank printed."""
    return directory / f"{phase.directory}.part-{index}.rank-{rank}.log"


def _failure(directory: Path, phase: Phase, index: int, ended: Mapping[int, int]) -> TrainingError:
    """What to say of a part in which ranks ended by themselves: rank 0's error, or another one's if it has none.

    `ended` maps ranks to exit codes, the first one to end first.
    """
    part = phase.parts[index]
    lines = {
        rank: _log(directory, phase, index, rank).read_text(encoding="utf-8", errors="replace").splitlines()
        for rank in range(part.world_size)
    }
    prefix = "dist_cifar: error: "
    errors = [line.removeprefix(prefix) for rank in lines for line in lines[rank] if line.startswith(prefix)]
    rank, code = next(iter(ended.items()))
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    if errors:
        reason = errors[0]
    elif code > 0 and lines[rank]:
        reason = lines[rank][-1]  # of a traceback
    else:
        reason = "no rank says why; their logs are kept"
    error = TrainingError(
        f"verify: {phase.name}: rank {rank} of {part.world_size} {how} before step {part.until_step}: {reason}"
    )
    error.exit_code = code if code in (EXIT_USAGE, EXIT_DATA) else EXIT_INTERNAL
    return error


def _numerics(run_directory: Path) -> dict[str, Any]:
    """What decides the bits on this machine, as the run's newest checkpoint says."""
    newest = max((run_directory / "checkpoints").glob("step-*/state.json"))
    return json.loads(newest.read_text(encoding="utf-8"))["numerics"]
