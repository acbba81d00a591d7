"""Starts ranks on this machine, without a launcher: those of `train --ranks N` and of the Python API's `launch`.

Contract: each rank is the same command, with torchrun's variables. What the ranks print is what is printed, so the last
line is that of the training, and the exit code is theirs. A signal that stops this process is handed on to all of them,
and none outlives it.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeAlias

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import DistEnv, port_of, rank_environ
from dist_cifar.errors import EXIT_INTERNAL

_POLL_SECONDS = 0.05
_READ_BYTES = 65536
_GRACE_SECONDS = 30.0
"""How long the other ranks may take to end when one has failed: connected ranks need a few seconds."""

Show: TypeAlias = Callable[[str, bool], None]
"""Takes some text that a rank has printed, and whether it was on standard error."""


def run_ranks(count: int, command: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> int:
    """Starts `count` ranks of `command`, by default this process's own, and returns their exit code."""
    return outcome(exit_codes(count, command or [sys.executable, *sys.orig_argv[1:]], environ or os.environ))


def exit_codes(
    count: int, command: Sequence[str], environ: Mapping[str, str], *, show: Show | None = None
) -> list[int]:
    """Starts `count` ranks of `command` and returns the exit code of each, negative for a signal that killed it.

    With `show`, what rank 0 prints and the standard error of all go there, on this thread, and the standard output of
    the other ranks nowhere.
    """
    stopping.defer()  # the ranks answer a signal, in their own time
    job = f"local {uuid.uuid4()}"
    places = [
        DistEnv(
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_world_size=count,
            master_port=port_of(job),
            job=job,
        )
        for rank in range(count)
    ]
    ranks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: object) -> None:
        stopping.receive(number, frame)
        for rank in ranks:
            rank.send_signal(number)

    def kill() -> None:
        for rank in ranks:
            rank.kill()

    with contextlib.ExitStack() as held:
        output = None if show is None else held.enter_context(RankOutput(show))
        if threading.current_thread() is threading.main_thread():
            held.enter_context(_handled(hand_on))
        held.callback(kill)  # the last to be entered is the first to be left
        for place in places:  # in sessions of their own: a terminal's Ctrl-C reaches them once, through this process
            if stopping.stop_requested():
                break
            streams: dict[str, Any] = {} if output is None else output.streams(place.rank)
            ranks.append(subprocess.Popen(command, env=rank_environ(environ, place), start_new_session=True, **streams))
            if stopping.stop_requested():  # while there was not yet this rank to hand it on to
                ranks[-1].send_signal(signal.Signals[stopping.first_received()])
            if output is not None:
                output.read(ranks[-1])
        _wait(ranks, time.sleep if output is None else output.forward)
    codes = [rank.wait() for rank in ranks]
    if len(codes) < count:  # a signal came before the others were started
        codes += [stopping.Stopped(stopping.first_received()).exit_code] * (count - len(codes))
    return codes


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles the signals that would stop this process within a `with` block, but for those that are ignored."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    own = {number: was for number, was in before.items() if was not in (signal.SIG_IGN, None)}
    for number in own:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in own.items():
            signal.signal(number, was)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], sleep: Callable[[float], None]) -> None:
    """Returns when all ranks have ended, or some time after one has failed."""
    failed_at: float | None = None
    while None in (codes := [rank.poll() for rank in ranks]):
        now = time.monotonic()
        if failed_at is None and any(codes):
            failed_at = now
        if failed_at is not None and now - failed_at > _GRACE_SECONDS:
            return
        sleep(_POLL_SECONDS)


class RankOutput:
    """Shows what ranks print as it comes, by pipes: a notebook's standard output is no file that a rank could have."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._selector = selectors.DefaultSelector()
        self._to_be_closed = contextlib.ExitStack()

    def streams(self, rank: int) -> dict[str, Any]:
        """The streams of a rank that is to be started."""
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        return {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.PIPE}

    def read(self, rank: subprocess.Popen[bytes]) -> None:
        """Shows from now on what a rank that has been started prints."""
        for pipe, is_error in ((rank.stdout, False), (rank.stderr, True)):
            if pipe is not None:
                self._to_be_closed.enter_context(pipe)
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                self._selector.register(pipe, selectors.EVENT_READ, (decoder, is_error))

    def forward(self, seconds: float) -> None:
        """Shows what is printed within so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._show_ready(left)

    def _show_ready(self, timeout_seconds: float) -> bool:
        """Shows what can be read now, or waits for something; returns whether there was anything."""
        ready = self._selector.select(timeout_seconds)
        for key, _ in ready:
            decoder, is_error = key.data
            data = os.read(key.fd, _READ_BYTES)
            if not data:
                self._selector.unregister(key.fileobj)
            if text := decoder.decode(data, final=not data):
                self._show(text, is_error)
        return bool(ready)

    def __enter__(self) -> RankOutput:
        return self

    def __exit__(self, *_: object) -> None:
        with self._to_be_closed, self._selector:
            while self._selector.get_map() and self._show_ready(0):  # what ranks that have ended have left
                pass


def outcome(codes: Sequence[int]) -> int:
    """The exit code of a job whose ranks ended with `codes`, negative ones being signals.

    Ranks that were left behind by one that failed end with `EXIT_INTERNAL`: the code of that one says more.
    """
    reasons = [code for code in codes if code > 0 and code != EXIT_INTERNAL]
    if reasons:
        return reasons[0]
    if EXIT_INTERNAL in codes:
        return EXIT_INTERNAL
    return next((128 - code for code in codes if code < 0), 0)
