"""The program of a rank that `launch` has started.

Contract: it prints nothing about its end. Its exit code is that of the command; a failure is in a file for the process
that has started it.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from pathlib import Path

from dist_cifar import plugins, stopping
from dist_cifar.api.launching import ENDED, FAILURE, PAYLOAD, Payload
from dist_cifar.distributed.launch_env import launcher_rank
from dist_cifar.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_SAVED, RankError, StoppedError, TrainingError, UserError
from dist_cifar.job.enter import connect
from dist_cifar.job.failure_exit import FailureExit, leave
from dist_cifar.job.rank import enter_training, import_torch, run_rank
from dist_cifar.job.rank_logging import logging_by_rank


def run() -> int:
    """Trains as the payload in the folder `sys.argv[1]` says. Returns the exit code."""
    folder = Path(sys.argv[1])
    stopping.be_quiet()
    with logging_by_rank():
        try:
            return _train(folder)
        except stopping.Stopped as stop:
            error: Exception = StoppedError(str(stop))
        except Exception as raised:
            error = raised
    _write_failure(folder, error)
    leave(error.exit_code if isinstance(error, UserError) else EXIT_INTERNAL)


def _train(folder: Path) -> int:
    payload: Payload = pickle.loads((folder / PAYLOAD).read_bytes())
    plugins.restore(payload.registrations)
    env = enter_training(payload.config)
    import_torch(payload.config, env)
    is_done = run_rank(
        payload.config,
        env,
        must_resume=payload.must_resume,
        resume_anyway=payload.resume_anyway,
        connect=connect,
        ended=lambda _, is_done: is_done,
        failed=FailureExit.reraise,
    )
    if env.rank == 0:
        (folder / ENDED).touch()
    return EXIT_DONE if is_done else EXIT_SAVED


def _write_failure(folder: Path, error: Exception) -> None:
    rank = int(launcher_rank(os.environ))
    facts = {
        "rank": rank,
        "failed_rank": error.rank if isinstance(error, RankError | TrainingError) else rank,
        "type": type(error).__name__,
        "is_for_users": isinstance(error, UserError),
        "message": str(error),
        "notes": getattr(error, "__notes__", []),
        "traceback": "".join(traceback.format_exception(error)),
    }
    (folder / f"{FAILURE}{rank}").write_text(json.dumps(facts), encoding="utf-8")
