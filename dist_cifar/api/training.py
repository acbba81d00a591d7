"""`train`: a training in the process of whoever calls it.

Contract: it is the training of `dist-cifar train`, with the same bits, by the same code (`dist_cifar.job.rank`). The
process is not this program's alone: nothing ends it but what no rank of several survives, and what a training sets in
it is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from dist_cifar import stopping
from dist_cifar.api.run_result import RunResult, read_result, result_of_stop
from dist_cifar.config import Config, checked
from dist_cifar.errors import StoppedError
from dist_cifar.job.enter import connect
from dist_cifar.job.failure_exit import FailureExit
from dist_cifar.job.rank import enter_training, run_rank


def train(config: Config, *, must_resume: bool = False, resume_anyway: bool = False) -> RunResult:
    """Trains in this process, or resumes what the run directory holds, and returns the result.

    Under torchrun, accelerate, srun or mpirun this process is the rank that their variables say, and every rank calls
    this; otherwise it trains alone. `must_resume`: fail if there is nothing to resume. `resume_anyway`: resume even if
    that changes the result.

    Ctrl-C and SIGTERM stop the run after its step: it is saved, and the result has status `saved`. Raises `UserError`
    for what its caller can fix, `RankError` if another rank has failed, and `KeyboardInterrupt` or `StoppedError` if it
    was stopped before its first step. Signal handlers, environment variables, loggers, the number of torch's threads
    and its choice of kernels are put back at the end; memory that is freed stays with the process for its next
    training. If another rank fails while this one waits inside a library, the process ends, as it does for the command.

    Example:

        import dist_cifar

        config = dist_cifar.load_config("configs/quickstart.yaml", ["run.dir=runs/from_python"])
        result = dist_cifar.train(config)
        print(result.status, result.summary["test_accuracy"], len(result.metrics), "rows")
    """
    config = checked(config)
    with stopping.heeded(), _environment_put_back():
        try:
            env = enter_training(config)
            with _torch_put_back():
                return run_rank(
                    config,
                    env,
                    must_resume=must_resume,
                    resume_anyway=resume_anyway,
                    connect=connect,
                    ended=lambda communicator, is_done: communicator.run_on_rank0(
                        lambda: read_result(config, is_done=is_done)
                    ),
                    failed=FailureExit.reraise,
                )
        except (stopping.Stopped, StoppedError):
            return result_of_stop(config, stopping.first_received())


@contextlib.contextmanager
def _environment_put_back() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _torch_put_back() -> Iterator[None]:
    import torch

    from dist_cifar.ops.precision import put_compiler_back

    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only, fills = torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic
    fill = fills.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property
    try:
        yield
    finally:
        put_compiler_back()
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
