"""When a rank dies, hangs or fails: the others agree on which one was first, and nothing is left behind.

Contract: every rank of a job runs a `FailureDetector`, a thread that looks at the job's key-value store twice a second
and costs nothing else. A rank that fails by itself records that in the store. A rank whose collective fails, because
another one is gone or stopped, raises the alarm and all ranks answer a roll call: who answers, and where each one's
main thread is. The first to conclude records its conclusion, all adopt it, so that every survivor names the same rank
(`Failure`). A rank whose main thread is stuck, in a collective or elsewhere, is ended by its watch. Ranks that do not
answer are killed by those that share their host. From the first failed collective this takes a few seconds at most,
whatever hangs: the store is used by the watch alone, and one that does not answer is itself a finding.

The decision (`conclude`) is a pure function; nothing here imports torch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_cifar.errors import TrainingError, UserError

_POLL_SECONDS = 0.5
"""How often a healthy rank looks for an alarm."""
_ROLL_CALL_SECONDS = 4.0
"""How long ranks have to answer; rank 0, where the store may live, leaves at most so long after the conclusion."""
_TOGETHER_SECONDS = 3.0
"""How long a rank with a `UserError` leaves it to rank 0 to raise the same: most of them are raised by all together."""
_GRACE_SECONDS = 3.0
"""How long the main thread has, when another rank has raised an error, to raise the same one."""
_STORE_SECONDS = 3.0
"""A store that takes longer for one operation is gone, or its host is stopped."""

_REPORT_SECONDS = 15.0
"""More than all of this together."""

_FAILED = "failed"
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

_ALARM, _CONCLUSION, _LOST, _TOLD = "alarm", "conclusion", "lost", "told"
"""Keys of the store: the roll call is on, its conclusion, how many have lost a peer, how many know the conclusion."""


# --- processes ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """A process, so that it cannot be taken for another one that got its number later."""

    host: str
    pid: int
    boot: str
    """Boot id of the kernel; empty where there is no /proc, and then nobody looks at or kills the process."""
    pid_namespace: int
    start_ticks: int
    """When it started: field 22 of /proc/<pid>/stat."""

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


def own_identity() -> Identity:
    """That of the calling process."""
    boot, namespace, start = "", 0, 0
    with contextlib.suppress(OSError, TypeError):
        start = _stat(os.getpid())[1]  # type: ignore[index]
        namespace = os.stat("/proc/self/ns/pid").st_ino
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Identity(host=socket.gethostname(), pid=os.getpid(), boot=boot, pid_namespace=namespace, start_ticks=start)


def unhealthy_reason(process: Identity, seen_from: Identity) -> str | None:
    """Why `process` cannot answer, as far as that can be seen from here; None if it runs or is out of sight."""
    if not _in_sight(process, seen_from):
        return None
    stat = _stat(process.pid)
    if stat is None or stat[1] != process.start_ticks or stat[0] in "ZX":
        return "its process is gone"
    return "its process is stopped" if stat[0] in "Tt" else None


def kill(process: Identity, seen_from: Identity) -> None:
    """SIGKILL, if it is in sight and still that process."""
    if _in_sight(process, seen_from):
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(process.pid)
            try:
                stat = _stat(process.pid)
                if stat is not None and stat[1] == process.start_ticks:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _in_sight(process: Identity, seen_from: Identity) -> bool:
    return bool(process.boot) and (process.boot, process.pid_namespace) == (seen_from.boot, seen_from.pid_namespace)


def _stat(pid: int) -> tuple[str, int] | None:
    """(state, start in clock ticks) of a process, or None if there is none."""
    try:
        # The command's name, in parentheses, may hold anything, blanks and parentheses too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


# --- the decision ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The last collective of the communicator that a rank has entered."""

    count: int = 0
    name: str = "none"
    step: int | None = None
    """The step it is in; None before the first one."""

    def __str__(self) -> str:
        return f"collective {self.count} ({self.name})" + ("" if self.step is None else f" of step {self.step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One rank's answer to the roll call."""

    position: Position
    lost: str | None
    """The message of its collective that failed; None while its main thread knows of no failure."""
    where: str
    """The line of code in which its main thread is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the job: the same on every rank."""

    rank: int | None
    """The rank that failed first; None if it cannot be told (the network)."""
    what: str
    """`failed`, `was killed or lost`, ...: the verb of `reason`."""
    reason: str
    step: int | None = None
    by: int
    """The rank that found out: `rank` itself if it failed with an error of its own."""
    lost: tuple[int, ...] = ()
    """Ranks that did not answer."""

    def sentence(self, identities: Sequence[Identity]) -> str:
        """`rank 1 (host, pid 123) was killed or lost at step 7: its process is gone`."""
        who = "the job" if self.rank is None else f"rank {self.rank} ({identities[self.rank]})"
        return f"{who} {self.conclusion}"

    @property
    def is_own(self) -> bool:
        """Whether a rank raised an error of its own, which others may raise as well."""
        return self.what == _FAILED

    @property
    def conclusion(self) -> str:
        """The sentence without its subject."""
        return f"{self.what} {'at the start' if self.step is None else f'at step {self.step}'}: {self.reason}"


def conclude(
    answers: Sequence[Answer | None], unhealthy: Mapping[int, str], *, by: int, expired: bool
) -> Failure | None:
    """Which rank failed first, from the answers (None: no answer) of all ranks; None if that is not yet clear.

    `unhealthy` says of ranks in sight why they cannot answer, `expired` that the time to answer is over.
    """
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    present = [answer for answer in answers if answer is not None]
    step = max((answer.position.step for answer in present if answer.position.step is not None), default=None)
    lost = [rank for rank in silent if rank in unhealthy] or (silent if expired else [])
    if lost:
        reason = unhealthy.get(lost[0], "it does not answer")
        if lost[1:]:
            reason += f"; lost as well: {_ranks(lost[1:])}"
        return Failure(rank=lost[0], what="was killed or lost", reason=reason, step=step, by=by, lost=tuple(lost))

    stuck = [rank for rank, answer in enumerate(present) if answer.lost is None]
    if not expired and (silent or stuck):
        return None
    # From here on, all have answered: the index is the rank.
    odd = odd_ranks([answer.position for answer in present])
    if len(odd) in (0, len(present)):  # all are in one place, or none is that of the most: who is stuck decides
        odd = stuck if len(stuck) < len(present) else []
    if odd:
        one, others = present[odd[0]], next(answer for rank, answer in enumerate(present) if rank not in odd)
        if one.lost is None:
            reason = f"its main thread is in {one.where}, after {one.position}; the others wait in {others.position}"
            return Failure(rank=odd[0], what="hung", reason=reason, step=step, by=by)
        reason = f"it is in {one.position}, the others are in {others.position}"
        return Failure(rank=odd[0], what="left the order of the collectives", reason=reason, step=step, by=by)
    if len({answer.position for answer in present}) > 1:
        rank = min(range(len(present)), key=lambda rank: (present[rank].position.count, rank))
        reason = "; ".join(f"rank {rank} is in {answer.position}" for rank, answer in enumerate(present))
        what = "or another one left the order of the collectives"
        return Failure(rank=rank, what=what, reason=reason, step=step, by=by)
    message = next((answer.lost for answer in present if answer.lost), "no rank knows of a failure")
    return Failure(rank=None, what="lost the network between its ranks", reason=message, step=step, by=by)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def odd_ranks(values: Sequence[Any]) -> list[int]:
    """The ranks whose value is not that of the most: none if all are equal, all if no value has more than half."""
    value, count = collections.Counter(values).most_common(1)[0]
    return [rank for rank in range(len(values)) if values[rank] != value or 2 * count <= len(values)]


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, as gloo, NCCL and the store say it."""
    name = type(error).__name__
    if name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("gloo/", "monitoredbarrier", "application timeout caused pair closure", "nccl")
    )


# --- the watch ---------------------------------------------------------------------------------------------------


class Store(Protocol):
    """What is used of torch.distributed's store. Its errors are `RuntimeError`s."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class FailureDetector:
    """One rank's part in finding out which rank failed first."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        identities: Sequence[Identity],
        position: Callable[[], Position],
        broken: Callable[[], str | None],
        end: Callable[[Failure], None],
    ) -> None:
        """Starts the thread.

        `store` is this watch's own connection; `broken` returns the message of a collective in the background that has
        failed. `end` is called on the thread, and must end the process, if the main thread does not `report` in time.
        """
        self._store, self._rank, self._identities = store, rank, identities
        self._position, self._broken, self._end = position, broken, end
        self._main = threading.get_ident()
        self._lost: str | None = None
        self._own: Failure | None = None
        self._own_together = False
        self._asked_at: float | None = None
        """Since when an operation of the store is under way."""
        self._wake, self._settled, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._failure: Failure | None = None
        self._ending = threading.Lock()
        """Held by the thread that ends the process: the main thread, or this one."""
        self._thread = threading.Thread(target=self._run, name="failure watch", daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> Failure:
        """Called by the main thread with the error that ended its work; returns what ended the job.

        If this thread is too late and the watch is ending the process, it does not return.
        """
        self._ending.acquire()  # never released: one of the two ends the process
        if is_lost_peer(error):
            self._lost = one_line(error)
        else:
            self._own_together = isinstance(error, UserError) and self._rank != 0
            self._own = own_failure(error, self._rank, self._position().step)
        self._wake.set()
        deadline = time.monotonic() + _REPORT_SECONDS
        while not self._settled.wait(0.1):
            now, asked_at = time.monotonic(), self._asked_at
            if now > deadline or (asked_at is not None and now - asked_at > _STORE_SECONDS):
                return self._kill_unresponsive(self._store_lost())
        assert self._failure is not None
        return self._failure

    def close(self) -> None:
        """Ends the thread, of a job that has not failed."""
        self._closed.set()
        self._wake.set()
        self._thread.join(_STORE_SECONDS)

    def _run(self) -> None:
        store_answers = True
        while not self._wake.wait(_POLL_SECONDS):
            self._lost = self._lost or self._broken()
            if self._lost:
                break
            if store_answers:
                try:
                    if self._ask(self._store.check, [_ALARM]):
                        break
                except RuntimeError:  # its host may be done: if it is not, our collectives fail
                    store_answers = False
        if self._closed.is_set():
            return
        try:
            failure = self._settle()
        except RuntimeError:
            failure = self._store_lost()
        self._failure = self._kill_unresponsive(failure)
        self._linger(failure)
        self._settled.set()
        if failure.is_own:
            time.sleep(_GRACE_SECONDS)
        if self._ending.acquire(blocking=False):
            self._end(failure)

    def _ask(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """An operation of the store, timed, so that one that hangs is seen."""
        self._asked_at = time.monotonic()
        try:
            return operation(*arguments)
        finally:
            self._asked_at = None

    def _settle(self) -> Failure:
        """Agrees with the others on what has happened."""
        started = time.monotonic()
        answered: Answer | None = None
        while not self._ask(self._store.check, [_CONCLUSION]):
            now = time.monotonic()
            if self._own is not None:
                waits = self._own_together and now - started < _TOGETHER_SECONDS
                if waits and not self._ask(self._store.check, [_ALARM]):
                    time.sleep(0.05)
                else:
                    self._decide(self._own)
                continue
            answer = Answer(position=self._position(), lost=self._lost, where=self._where())
            if answered is None or (answer.lost and not answered.lost):
                answered = answer
                self._ask(self._store.set, f"answer/{self._rank}", json.dumps(dataclasses.asdict(answer)))
                self._ask(self._store.add, _LOST, int(answer.lost is not None))
                self._ask(self._store.set, _ALARM, "1")
            unhealthy, expired = self._unhealthy(), now - started > _ROLL_CALL_SECONDS
            # All answers are read only when they may decide: with a thousand ranks they are many.
            if unhealthy or expired or self._ask(self._store.add, _LOST, 0) == len(self._identities):
                answers = [self._answer(rank) for rank in range(len(self._identities))]
                failure = conclude(answers, unhealthy, by=self._rank, expired=expired)
                if failure is not None:
                    self._decide(failure)
                    continue
            time.sleep(0.1)
        self._ask(self._store.set, _ALARM, "1")
        content = json.loads(self._ask(self._store.get, _CONCLUSION))
        return Failure(**content | {"lost": tuple(content["lost"])})

    def _decide(self, failure: Failure) -> None:
        """Records a conclusion, unless there is one."""
        self._ask(self._store.compare_set, _CONCLUSION, "", json.dumps(dataclasses.asdict(failure)))

    def _answer(self, rank: int) -> Answer | None:
        key = f"answer/{rank}"
        if not self._ask(self._store.check, [key]):
            return None
        content = json.loads(self._ask(self._store.get, key))
        return Answer(**content | {"position": Position(**content["position"])})

    def _unhealthy(self) -> dict[int, str]:
        own = self._identities[self._rank]
        found = {rank: unhealthy_reason(identity, own) for rank, identity in enumerate(self._identities)}
        return {rank: reason for rank, reason in found.items() if reason is not None}

    def _where(self) -> str:
        """The innermost line of this package in which the main thread is."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        return "no code of ours" if frame is None else f"{frame.f_code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno}"

    def _store_lost(self) -> Failure:
        """There is nothing left to agree through, but all survivors see this, and say the same."""
        reason = "it hosts the job's store, which is gone or does not answer"
        step = self._position().step
        return Failure(rank=0, what="was killed or lost", reason=reason, step=step, by=self._rank, lost=(0,))

    def _kill_unresponsive(self, failure: Failure) -> Failure:
        """Kills the ranks that did not answer, where they can be reached."""
        for rank in failure.lost:
            if rank != self._rank:
                kill(self._identities[rank], self._identities[self._rank])
        return failure

    def _linger(self, failure: Failure) -> None:
        """Says that this rank knows; rank 0, whose end may be that of the store, waits until all have said so."""
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        with contextlib.suppress(RuntimeError):
            self._ask(self._store.add, _TOLD, 1)
            while self._rank == 0 and time.monotonic() < deadline:
                if self._ask(self._store.add, _TOLD, 0) >= len(self._identities) - len(failure.lost):
                    break
                time.sleep(0.05)


def own_failure(error: BaseException, rank: int, step: int | None) -> Failure:
    """That of a rank which failed with an error of its own, or of one that all ranks raise about the rank it names."""
    named = error.rank if isinstance(error, TrainingError) else None
    return Failure(rank=rank if named is None else named, what=_FAILED, reason=one_line(error), step=step, by=rank)


def one_line(error: BaseException) -> str:
    """An error's message; with its type, unless it was written for a person."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
