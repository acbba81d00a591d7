"""When a rank dies, hangs or fails: the others agree on which one was first, and nothing is left behind.

Contract: every rank of a job runs a `FailureDetector`, a thread that looks at the job's store twice a second and costs
nothing else. A rank that fails by itself records that in the store. A rank whose collective fails, because another
rank is gone or stopped, raises the alarm, and all ranks answer a roll call: who answers, and where each one's main
thread is. The first to reach a conclusion records it and all adopt it, so that every survivor names the same rank
(`Failure`). A rank whose main thread is stuck, in a collective or elsewhere, is ended by its detector. Ranks that do
not answer are killed by those that share their host. From the first failed collective this takes a few seconds at
most, whatever hangs: the store's connection is used by the detector alone, on threads that may hang with it, and a
store that does not answer is itself a finding. How long each wait takes is in `Timeouts`.

The decision (`conclude`) is a pure function; nothing here imports torch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from dist_cifar.distributed.processes import Identity, RankProcess
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.errors import StoppedError, TrainingError, UserError

_FAILED, _STOPPED = "failed", "was stopped"
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

_ALARM, _CONCLUSION, _LOST, _TOLD = "alarm", "conclusion", "lost", "told"
"""Keys of the store: the roll call is on, its conclusion, how many have lost a peer, how many know the conclusion."""
_ROLL_CALL_POLL_SECONDS, _AGREE_POLL_SECONDS = 0.1, 0.05


# --- the decision ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The last collective that a rank has entered."""

    count: int = 0
    name: str = "none"
    step: int | None = None
    """The training step that the rank is in; None before the first one."""

    def __str__(self) -> str:
        return f"collective {self.count} ({self.name})" + ("" if self.step is None else f" of step {self.step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One rank's answer to the roll call."""

    position: Position
    lost: str | None
    """The message of the rank's collective that failed; None while its main thread knows of no failure."""
    where: str
    """The line of code in which the rank's main thread is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the job; it is the same on every rank."""

    rank: int | None
    """The rank that failed first; None if it cannot be told (the network)."""
    what: str
    """What happened to the rank: `failed`, `was killed or lost`, ..."""
    reason: str
    step: int | None = None
    by: int
    """The rank that reached the conclusion: `rank` itself if it failed with an error of its own."""
    lost: tuple[int, ...] = ()
    """Ranks that did not answer."""

    def sentence(self, identities: Sequence[Identity]) -> str:
        """`rank 1 (host, pid 123) was killed or lost at step 7: its process is gone`."""
        who = "the job" if self.rank is None else f"rank {self.rank} ({identities[self.rank]})"
        return f"{who} {self.conclusion}"

    @property
    def is_own(self) -> bool:
        """Whether a rank raised an error of its own, which others may raise as well."""
        return self.what in (_FAILED, _STOPPED)

    @property
    def is_stop(self) -> bool:
        """Whether a signal ended the job where it had nothing to save: before its first step, or in the final test."""
        return self.what == _STOPPED

    @property
    def conclusion(self) -> str:
        """The sentence without its subject: `was killed or lost at step 7: its process is gone`."""
        return f"{self.what} {'at the start' if self.step is None else f'at step {self.step}'}: {self.reason}"


def conclude(
    answers: Sequence[Answer | None], unhealthy: Mapping[int, str], *, by: int, expired: bool
) -> Failure | None:
    """The failure, judged from the answers (None: no answer) of all ranks; None if it is not yet clear which it was.

    `unhealthy` maps ranks whose processes are visible to the reason why they cannot answer. `expired` says that the
    time to answer is over.
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
    if len(odd) in (0, len(present)):  # all are in one collective, or there is no majority: who is stuck decides
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
    """The ranks that differ from the majority: none if all values are equal, all ranks if there is no majority."""
    value, count = collections.Counter(values).most_common(1)[0]
    return [rank for rank in range(len(values)) if values[rank] != value or 2 * count <= len(values)]


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is what gloo, NCCL or the store raise in a collective that failed because of another rank."""
    name = type(error).__name__
    if name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("gloo/", "monitoredbarrier", "application timeout caused pair closure", "nccl")
    )


# --- the detector ---------------------------------------------------------------------------------------------------


class Store(Protocol):
    """The methods of torch.distributed's store that are used here. Its errors are `RuntimeError`s."""

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
        broken: Callable[[bool], str | None],
        end: Callable[[Failure], None],
        timeouts: Timeouts,
    ) -> None:
        """Starts the thread.

        `store` is a connection of the detector's own. `position` returns the last collective that this rank has
        entered, and `broken`, which is called at every look, the message of a collective that has failed without an
        error of the main thread; with True, when the roll is called, also of one that merely waits. `end` is called on
        the thread, and must end the process, if the main thread does not `report` in time.
        """
        self._store, self._rank, self._identities = store, rank, identities
        self._position, self._broken, self._end, self._timeouts = position, broken, end, timeouts
        self._processes: Sequence[RankProcess] = ()
        self._main = threading.get_ident()
        self._lost: str | None = None
        self._own: Failure | None = None
        self._own_together = False
        self._wake, self._settled, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._failure: Failure | None = None
        self._ending = threading.Lock()
        """Held by the thread that ends the process: the main thread, or the detector's."""
        self._thread = threading.Thread(target=self._run, name="failure detector", daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> Failure:
        """Called by the main thread with the error that ended its work; returns what ended the job.

        It does not return if the main thread is too late and the detector is ending the process.
        """
        self._ending.acquire()  # never released: one of the two ends the process
        if is_lost_peer(error):
            self._lost = describe_error(error)
        else:
            self._own_together = isinstance(error, UserError) and self._rank != 0
            self._own = own_failure(error, self._rank, self._position().step)
        self._wake.set()
        if not self._settled.wait(self._timeouts.report_seconds):
            return self._kill_unresponsive(self._store_lost())
        assert self._failure is not None
        return self._failure

    def close(self) -> None:
        """Ends the thread. For a job that has not failed."""
        self._closed.set()
        self._wake.set()
        self._thread.join(self._timeouts.store_seconds)

    def _run(self) -> None:
        # All ranks have just answered; and on this thread, the import of psutil delays nothing.
        own = self._identities[self._rank]
        self._processes = [RankProcess(identity, seen_from=own) for identity in self._identities]
        store_answers, alarm = True, None
        while not self._wake.wait(self._timeouts.poll_seconds):
            self._lost = self._lost or self._broken(False)
            if self._lost:
                break
            if store_answers:
                alarm = alarm or _begin(self._store.check, [_ALARM])
                try:
                    if alarm.result(self._timeouts.poll_seconds):
                        break
                    alarm = None
                except TimeoutError:  # its host may be paused, with the whole job: the answer may still come
                    pass
                except RuntimeError:  # its host may have finished: if it has not, our collectives fail
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
            time.sleep(self._timeouts.grace_seconds)
        if self._ending.acquire(blocking=False):
            self._end(failure)

    def _ask(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Runs an operation of the store. Raises `RuntimeError` if the store is gone or does not answer in time."""
        try:
            return _begin(operation, *arguments).result(self._timeouts.store_seconds)
        except TimeoutError as error:
            raise RuntimeError("the job's store does not answer") from error

    def _settle(self) -> Failure:
        """Agrees with the other ranks on what ended the job."""
        started = time.monotonic()
        answered: Answer | None = None
        while not self._ask(self._store.check, [_CONCLUSION]):
            now = time.monotonic()
            if self._own is not None:
                waits = self._own_together and now - started < self._timeouts.together_seconds
                if waits and not self._ask(self._store.check, [_ALARM]):
                    time.sleep(_AGREE_POLL_SECONDS)
                else:
                    self._decide(self._own)
                continue
            self._lost = self._lost or self._broken(True)
            answer = Answer(position=self._position(), lost=self._lost, where=self._where())
            if answered is None or (answer.lost and not answered.lost):
                answered = answer
                self._ask(self._store.set, f"answer/{self._rank}", json.dumps(dataclasses.asdict(answer)))
                self._ask(self._store.add, _LOST, int(answer.lost is not None))
                self._ask(self._store.set, _ALARM, "1")
            unhealthy, expired = self._unhealthy(), now - started > self._timeouts.roll_call_seconds
            # The answers are read only when they may decide: a job of a thousand ranks has many.
            if unhealthy or expired or self._ask(self._store.add, _LOST, 0) == len(self._identities):
                answers = [self._answer(rank) for rank in range(len(self._identities))]
                failure = conclude(answers, unhealthy, by=self._rank, expired=expired)
                if failure is not None:
                    self._decide(failure)
                    continue
            time.sleep(_ROLL_CALL_POLL_SECONDS)
        self._ask(self._store.set, _ALARM, "1")
        content = json.loads(self._ask(self._store.get, _CONCLUSION))
        return Failure(**content | {"lost": tuple(content["lost"])})

    def _decide(self, failure: Failure) -> None:
        """Records a conclusion, unless another rank has recorded one."""
        self._ask(self._store.compare_set, _CONCLUSION, "", json.dumps(dataclasses.asdict(failure)))

    def _answer(self, rank: int) -> Answer | None:
        key = f"answer/{rank}"
        if not self._ask(self._store.check, [key]):
            return None
        content = json.loads(self._ask(self._store.get, key))
        return Answer(**content | {"position": Position(**content["position"])})

    def _unhealthy(self) -> dict[int, str]:
        found = {rank: process.unhealthy_reason() for rank, process in enumerate(self._processes)}
        return {rank: reason for rank, reason in found.items() if reason is not None}

    def _where(self) -> str:
        """The innermost line of this package in which the main thread is."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        return "no code of ours" if frame is None else f"{frame.f_code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno}"

    def _store_lost(self) -> Failure:
        """The failure of rank 0, which hosts the store. All survivors see it and conclude the same without one."""
        reason = "it hosts the job's store, which is gone or does not answer"
        step = self._position().step
        return Failure(rank=0, what="was killed or lost", reason=reason, step=step, by=self._rank, lost=(0,))

    def _kill_unresponsive(self, failure: Failure) -> Failure:
        """Kills the ranks that did not answer, where their processes are visible; returns `failure`."""
        for rank, process in enumerate(self._processes):
            if rank in failure.lost and rank != self._rank:
                process.kill()
        return failure

    def _linger(self, failure: Failure) -> None:
        """Records that this rank knows the conclusion; rank 0, which may host the store, waits until all do."""
        deadline = time.monotonic() + self._timeouts.roll_call_seconds
        with contextlib.suppress(RuntimeError):
            self._ask(self._store.add, _TOLD, 1)
            while self._rank == 0 and time.monotonic() < deadline:
                if self._ask(self._store.add, _TOLD, 0) >= len(self._identities) - len(failure.lost):
                    break
                time.sleep(_AGREE_POLL_SECONDS)


def _begin(operation: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Runs an operation on a thread of its own, which may hang with it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(operation(*arguments))
        except Exception as error:  # for who takes the result
            future.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return future


def own_failure(error: BaseException, rank: int, step: int | None) -> Failure:
    """The failure record for an error this rank raised: against the rank that the error names, or else this one."""
    named = error.rank if isinstance(error, TrainingError) else None
    what = _STOPPED if isinstance(error, StoppedError) else _FAILED
    return Failure(rank=rank if named is None else named, what=what, reason=describe_error(error), step=step, by=rank)


def describe_error(error: BaseException) -> str:
    """An error's message on one line; with its type, unless it was written for a person."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
