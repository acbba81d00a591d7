"""`launch`: a training on local ranks that any Python process starts.

Contract: this process imports no torch and touches no GPU. The ranks have its environment, its folder and its module
path, and are handed the config by a file that only this user can read; through files beside it they tell how they
failed. No rank outlives the call.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from dist_cifar import errors, plugins, stopping
from dist_cifar.api.run_result import RunResult, read_result, result_of_stop
from dist_cifar.config import Config, checked
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.errors import (
    EXIT_DONE,
    EXIT_SAVED,
    ConfigError,
    LaunchError,
    RankError,
    StoppedError,
    TrainingError,
    UserError,
)
from dist_cifar.job.local_ranks import exit_codes, outcome
from dist_cifar.strategy import slice_count

PAYLOAD, ENDED, FAILURE = "payload", "ended", "failure-"
"""Files: what the ranks are to do, which rank 0 writes when the run is done or saved, and which a rank writes when it
fails, with its number at the end."""
_PROGRAM = """
import sys
sys.path[:] = sys.argv[2:]
from dist_cifar import stopping

def run():
    from dist_cifar.api import launched_rank
    return launched_rank.run()

sys.exit(stopping.run_stoppable(run))
"""
"""What a rank runs; its arguments are the folder of the files and this process's module path."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What the ranks are to do."""

    config: Config
    must_resume: bool
    resume_anyway: bool
    registrations: list[plugins.Registration]
    """What `dist_cifar.plugins.registrations` returns here."""


def launch(config: Config, *, ranks: int, must_resume: bool = False, resume_anyway: bool = False) -> RunResult:
    """Trains on `ranks` processes of this machine, one for each GPU or on the CPU, and returns the result.

    It works from any Python process, a notebook included. What rank 0 prints and the standard error of all ranks is
    printed here as it comes. `must_resume` and `resume_anyway` are those of `train`.

    Ctrl-C, a notebook's interrupt and SIGTERM stop the run after its step: it is saved, and the result has status
    `saved`. Raises the `UserError` of a rank; `RankError`, with the rank and its traceback, if one fails otherwise or
    is killed; and `KeyboardInterrupt` or `StoppedError` if the run was stopped before its first step.

    Example:

        import dist_cifar

        config = dist_cifar.load_config("configs/quickstart.yaml", ["run.dir=runs/launched"])
        result = dist_cifar.launch(config, ranks=2)
        print(result, result.summary["world_size"])
    """
    config = checked(config)
    if type(ranks) is not int or ranks < 1:
        raise ConfigError(f"launch: ranks={ranks!r}; give a whole number, 1 or more")
    env = read_env(os.environ)
    if env.world_size > 1:
        raise LaunchError(
            f"launch: this process is rank {env.rank} of {env.world_size} (launcher: {env.launcher}), which are not to"
            " start ranks of their own; call train, or leave the launcher out"
        )
    slice_count(config.batch, config.strategy, world_size=ranks)
    payload = Payload(
        config=config,
        must_resume=must_resume,
        resume_anyway=resume_anyway,
        registrations=plugins.registrations(),
    )
    with stopping.heeded(), tempfile.TemporaryDirectory(prefix="dist_cifar-") as name:
        folder = Path(name)
        (folder / PAYLOAD).write_bytes(cloudpickle.dumps(payload))
        command = [sys.executable, "-u", "-c", _PROGRAM, name, *sys.path]
        environ = dict(os.environ) | {"PYTHONIOENCODING": "utf-8:backslashreplace"}
        codes = exit_codes(ranks, command, environ, show=_print)
        if outcome(codes) in (EXIT_DONE, EXIT_SAVED) and (folder / ENDED).exists():
            return read_result(config, is_done=outcome(codes) == EXIT_DONE)
        error = _failure([_report(path) for path in sorted(folder.glob(f"{FAILURE}*"))], codes)
        if isinstance(error, StoppedError):
            return result_of_stop(config, stopping.first_received() if stopping.stop_requested() else "a signal")
    raise error


def _print(text: str, is_error: bool) -> None:
    stream = sys.stderr if is_error else sys.stdout
    stream.write(text)
    stream.flush()


def _report(path: Path) -> dict[str, Any]:
    """What a rank has written about its failure."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _failure(reports: Sequence[dict[str, Any]], codes: Sequence[int]) -> Exception:
    """The error of ranks that have ended with `codes`, and have written `reports`: that of the rank which failed first.

    A rank that another one has lost has written a `RankError`, and one with a note knows of another that was earlier.
    """
    own = [report for report in reports if report["type"] != RankError.__name__]
    if own:
        return _exception(min(own, key=lambda report: (bool(report["notes"]), report["rank"])))
    if reports:
        return RankError(reports[0]["message"], rank=reports[0]["failed_rank"])
    if stopping.stop_requested():
        return StoppedError("stopped before the ranks had begun")
    rank, code = min(enumerate(codes), key=lambda item: (item[1] >= 0, item[1] == EXIT_DONE, item[0]))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RankError(f"rank {rank} of {len(codes)} {how}", rank=rank)


def _exception(report: dict[str, Any]) -> Exception:
    """The exception that a rank has raised, where it is one for users; else a `RankError` about it."""
    rank, message = report["rank"], report["message"]
    if not report["is_for_users"]:
        return RankError(f"rank {rank} failed: {report['type']}: {message}", rank=rank, traceback=report["traceback"])
    kind = getattr(errors, report["type"], UserError)  # a plug-in may have a class of its own
    error: UserError = kind(message, rank=report["failed_rank"]) if kind is TrainingError else kind(message)
    for note in report["notes"]:
        error.add_note(note)
    return error
