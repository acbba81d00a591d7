"""How a rank ends when a training fails: who prints or raises what, `status.json`, and the exit code.

Contract: the rank that failed prints its error. Each of the others prints in one line which rank failed first and why.
`status.json` names that rank, and no process stays, whatever hangs. A process that is more than a rank is told by
exceptions instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, NoReturn

from dist_cifar.distributed.failure_detector import Failure, FailureDetector, describe_error, is_lost_peer, own_failure
from dist_cifar.errors import (
    EXIT_INTERNAL,
    EXIT_SAVED,
    DataError,
    RankError,
    StoppedError,
    UserError,
    out_of_memory,
    system_error,
)
from dist_cifar.job.error_line import print_error
from dist_cifar.run.run_dir import RunDir

if TYPE_CHECKING:
    from dist_cifar.distributed.collectives import Communicator

_LAST_WORDS_SECONDS = 10.0
"""How long a rank of several, which ends because of a failure, may take to report it."""


class FailureExit:
    """Ends the ranks of one training that failed."""

    def __init__(self, run_dir: RunDir, communicator: Communicator) -> None:
        self._run_dir, self._communicator, self._rank = run_dir, communicator, communicator.rank

    def fail(self, error: Exception, detector: FailureDetector | None) -> int:
        """Ends a rank whose training raised `error`. Returns the exit code only if it is the job's only rank."""
        error = self._explained(error)
        failure = self._agree(error, detector)
        if detector is not None:
            if is_lost_peer(error):
                self.end_as_survivor(failure)
            _limit_last_words()
        is_first = failure.by == self._rank
        is_shared = self._is_shared(error, failure)
        if not isinstance(error, UserError):
            print(f"dist_cifar: rank {self._rank} failed:", file=sys.stderr)
            traceback.print_exception(error)
        elif not is_shared and not isinstance(error, StoppedError):
            print_error(str(error), str(self._rank))
        if not is_first and not is_shared:
            self._print_first(failure)
        code = error.exit_code if isinstance(error, UserError) else EXIT_INTERNAL
        self._write_status(failure)
        return code if detector is None else leave(code)

    def reraise(self, error: Exception, detector: FailureDetector | None) -> NoReturn:
        """Raises what ended the training of this rank, whose process stays.

        That is `error`, or the `UserError` that explains it, or `RankError` if another rank failed first.
        """
        explained = self._explained(error)
        failure = self._agree(explained, detector)
        self._write_status(failure)
        if detector is None:  # with others, what is left of the process group may wait for ever
            self._communicator.close()
        if detector is not None and is_lost_peer(explained):
            raise RankError(failure.sentence(self._communicator.identities), rank=failure.rank) from error
        if failure.by != self._rank and not self._is_shared(explained, failure):
            explained.add_note(failure.sentence(self._communicator.identities))
        if explained is error:
            raise error
        raise explained from error

    def _explained(self, error: Exception) -> Exception:
        """`error`, or the line for users that takes its place."""
        message = system_error(error)
        if message is not None:
            return DataError(f"run.dir={self._run_dir.path}: {message}")
        return out_of_memory(error) or error

    def _agree(self, error: Exception, detector: FailureDetector | None) -> Failure:
        """What ended the job, as all its ranks see it."""
        if detector is None:
            return own_failure(error, self._rank, self._communicator.step)
        return detector.report(error)

    def _is_shared(self, error: Exception, failure: Failure) -> bool:
        """Whether all ranks have raised the error together, of which rank 0 is the one to tell."""
        return failure.by != self._rank and failure.reason == describe_error(error)

    def end_as_survivor(self, failure: Failure) -> NoReturn:
        """Ends a rank that cannot continue because another one has failed."""
        _limit_last_words()
        self._print_first(failure)
        self._write_status(failure)
        leave(EXIT_SAVED if failure.is_stop else EXIT_INTERNAL)

    def _print_first(self, failure: Failure) -> None:
        print_error(f"rank {self._rank}: {failure.sentence(self._communicator.identities)}")

    def _write_status(self, failure: Failure) -> None:
        first = self._communicator.identities[0]
        with contextlib.suppress(OSError, ValueError):  # the disk may be what has failed; it is reported anyway
            job = (first.host, first.pid)
            if failure.is_stop:
                self._run_dir.write_stop(job, failure.step)
            else:
                self._run_dir.write_failure(job, failure.rank, failure.conclusion)


def _limit_last_words() -> None:
    """Ends the process after a while even if what it reports cannot be written, on a disk or a pipe that hangs."""
    guard = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (EXIT_INTERNAL,))
    guard.daemon = True
    guard.start()


def leave(code: int) -> NoReturn:
    """Ends the process at once: the destructors of a broken process group may wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
