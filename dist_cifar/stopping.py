"""What stops a run before it is done: a signal, or the end of the job's time.

Contract: after `install`, every signal by which a person, a shell or a scheduler ends a job raises `Stopped` in the
main thread. A process that has not ended `GRACE_SECONDS` later, because its main thread is in code that is not
Python's, is ended with the line and the exit code that it would have had. After `defer`, signals only make
`stop_requested` true: the training loop asks between steps, and saves. SIGHUP stays ignored where nohup ignores it.
Processes that are forked have none of this. Install the handlers before anything else is imported: a signal may come
early. `heeded` is for a process that is not this program's alone: it ends no process, and puts everything back.

The end of the job's time is fixed when the process starts and measured by the monotonic clock: setting the wall clock
does not move it. When a launcher dies, its ranks are killed; the only rank of one that hands on no signal is stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_cifar.errors import EXIT_INTERNAL, EXIT_SAVED, EXIT_SIGINT

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Every signal by which a person, a shell or a scheduler ends a job."""
GRACE_SECONDS = 3.0
"""How long the main thread may take to end after a signal that is not deferred."""

_received: list[signal.Signals] = []
_deferred = False
_installed = False
_reported = False


class Stopped(BaseException):
    """A signal wants the process to end; nothing is lost that was not saved before."""

    def __init__(self, name: str) -> None:
        """`name` is that of the signal, e.g. `SIGTERM`."""
        super().__init__(f"stopped by {name}")
        self.name = name

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that Ctrl-C has ended, or that it can be started again."""
        return EXIT_SIGINT if self.name == "SIGINT" else EXIT_SAVED


def install() -> None:
    """Installs the signal handlers. Main thread only; further calls do nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _set_handlers()
    watched, woken = map(_off_standard_streams, os.pipe())
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    threading.Thread(target=_end_if_stuck, args=(watched,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_forget)


def _set_handlers() -> dict[signal.Signals, Any]:
    """Has the signals received, and returns the handlers that they had."""
    before = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        is_ignored = number == signal.SIGHUP and handler is signal.SIG_IGN
        if not is_ignored and handler is not None:  # one that is not Python's could not be put back
            before[number] = handler
            signal.signal(number, receive)
    return before


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Heeds signals within a `with` block as `install` does for a whole process, and prints nothing about them.

    In another thread than the main one signals cannot be heeded: they do what they did. Where `install` has been
    called, nothing changes.
    """
    global _installed, _deferred, _reported
    if _installed:
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    hook = sys.unraisablehook
    before = _set_handlers() if is_main else {}
    _installed = _reported = True
    _deferred = False  # a training that was called directly has left it
    try:
        yield
    finally:
        _deferred = True  # from here on a signal interrupts nothing
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _received.clear()
        _installed = _deferred = _reported = False


def _off_standard_streams(descriptor: int) -> int:
    """The same file under a number that no standard stream has, which a closed one leaves free."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


def run_stoppable(program: Callable[[], int]) -> int:
    """Runs a whole program, its imports included; returns its exit code, or that of a signal that stopped it."""
    try:
        install()
        return program()
    except Stopped as stop:
        report(stop)
        return stop.exit_code
    except Exception:  # a defect: Python would exit with 1, which says that `doctor` found a failure
        traceback.print_exc()
        return EXIT_INTERNAL
    finally:
        defer()  # the interpreter is about to end


def defer() -> None:
    """From now on signals only make `stop_requested` true."""
    global _deferred
    _deferred = True


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Lets a signal end the process in a `with` block that may take long and after which there is nothing to save."""
    global _deferred
    before, _deferred = _deferred, False
    try:
        if _received:
            raise Stopped(first_received())
        yield
    finally:
        _deferred = before


def stop_requested() -> bool:
    """Whether one of the signals has been received."""
    return bool(_received)


def first_received() -> str:
    """The name of the signal that was received first, e.g. `SIGTERM`; only after `stop_requested`."""
    return _received[0].name


def report(stop: Stopped) -> None:
    """Prints the line that says what has stopped the process, unless that was printed or is left to another rank."""
    if not _reported:
        be_quiet()
        with contextlib.suppress(OSError):
            os.write(2, f"dist_cifar: {stop}; nothing was lost, run it again\n".encode())


def be_quiet() -> None:
    """Leaves it to another rank to say what has stopped the job."""
    global _reported
    _reported = True


def receive(number: int, frame: object) -> None:
    """Handles a signal."""
    _received.append(signal.Signals(number))
    if len(_received) == 1 and not _deferred:
        sys.unraisablehook = _ignore  # what is half made when the signal comes complains as it goes
        raise Stopped(first_received())


def _ignore(unraisable: object) -> None:
    """Takes the place of Python's report of an exception in a destructor."""


def _end_if_stuck(watched: int) -> None:
    """Ends the process that a signal has not ended; the bytes of the pipe are the numbers of the signals."""
    while True:
        stops = [number for number in os.read(watched, 64) if number in SIGNALS]
        if stops and not _deferred:
            time.sleep(GRACE_SECONDS)
            if not _deferred:
                stop = Stopped(signal.Signals(stops[0]).name)
                report(stop)
                os._exit(stop.exit_code)


def _forget() -> None:
    """Gives a forked process the signals that any other has."""
    global _installed, _deferred
    _installed = _deferred = False
    _received.clear()
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is receive:
            signal.signal(number, signal.SIG_DFL)


def die_with_launcher(number: signal.Signals = signal.SIGKILL) -> None:
    """Has this process sent the signal when its parent dies, from now on. Linux only; elsewhere it does nothing.

    torchrun starts its ranks in sessions of their own: the ranks of an agent that was killed would continue beside
    those of the job that is started in its place.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), number)


# --- the end of the job's time -----------------------------------------------------------------------------------

_RESERVE_SECONDS = 15.0
"""Reserved for the end of the processes, and for the checkpoint of a process that has not written one yet."""
_INTERVALS = 2
"""How many times the longest interval so far is reserved: one until the next time that it is asked, and one for the
step that ranks still take when one of them wants to stop."""
_WRITES = 3
"""How many times a checkpoint's write is reserved: one may be under way when the run stops, and the last one follows it
and may take twice as long, since a shared disk is slow when many jobs end."""


def seconds_left(environ: Mapping[str, str], time_limit_seconds: float | None, *, wall_time: float) -> float | None:
    """Seconds until the job is ended: by the config's limit or by SLURM, whichever is sooner; None without either.

    `wall_time` is the time now in seconds since 1970, in which SLURM gives its SLURM_JOB_END_TIME. An end that is past
    when the job starts cannot be its own.
    """
    ends = [] if time_limit_seconds is None else [time_limit_seconds]
    end_time = environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal() and int(end_time) > wall_time:
        ends.append(int(end_time) - wall_time)
    elif end_time.isdecimal():
        logger.warning(
            "warning: SLURM_JOB_END_TIME=%s is past, as in a shell that has outlived its job: it is ignored", end_time
        )
    return min(ends, default=None)


class Deadline:
    """The end of the job's time; the loop asks it once a step whether another step may still begin."""

    def __init__(self, seconds: float | None) -> None:
        """The job ends `seconds` from now, or never if that is None."""
        self._asked = time.monotonic()
        self._end = None if seconds is None else self._asked + seconds
        self._longest = 0.0

    def begin(self) -> None:
        """The first step begins now: what came before is no step."""
        self._asked = time.monotonic()

    def is_near(self, write_seconds: float, *, delay: int) -> bool:
        """Whether another step, and a checkpoint whose write takes `write_seconds` in the background, may not fit, if
        the ranks hear of it `delay` steps later.

        A step is assumed to take the longest interval between two calls so far, with all that happened in it.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        margin = (_INTERVALS + delay) * self._longest + _WRITES * write_seconds + _RESERVE_SECONDS
        return self._end is not None and now + margin >= self._end
