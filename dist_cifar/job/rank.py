"""One rank of a training, from its place in the job to its end: what the command `train` and the Python API share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import refuse_lone_task
from dist_cifar.distributed.process_env import pin_cublas_workspace
from dist_cifar.errors import StoppedError
from dist_cifar.job.enter import enter_job
from dist_cifar.job.failure_exit import FailureExit

if TYPE_CHECKING:
    from dist_cifar.config import Config
    from dist_cifar.distributed.collectives import Communicator
    from dist_cifar.distributed.failure_detector import FailureDetector
    from dist_cifar.distributed.launch_env import DistEnv

_T = TypeVar("_T")


def enter_training(config: Config, local_rank: int | None = None) -> DistEnv:
    """This process's rank in the training that it was started for; see `enter_job`. Raises `LaunchError`."""
    refuse_lone_task(os.environ)
    env = enter_job(config, local_rank)
    if env.world_size > 1:
        stopping.defer()  # the ranks stop together: where they wait for each other or for data, or after a step
    return env


def import_torch(config: Config, env: DistEnv) -> None:
    """Imports torch into a process that is this rank and nothing else, with its number of threads, and quickly."""
    _prepare_libraries(_threads(config, env))
    gc.disable()  # imports make a million objects that stay: looking for garbage among them takes a tenth of the time
    from dist_cifar import trainer  # noqa: F401
    from dist_cifar.tools import report  # noqa: F401

    gc.freeze()
    gc.enable()


def run_rank(
    config: Config,
    env: DistEnv,
    *,
    must_resume: bool,
    resume_anyway: bool,
    connect: Callable[..., Communicator],
    ended: Callable[[Communicator, bool], _T],
    failed: Callable[[FailureExit, Exception, FailureDetector | None], _T],
) -> _T:
    """Trains as the rank `env`, which `enter_training` has returned.

    Returns what `ended` returns, a collective, which is told whether the run is done or was stopped and saved, or what
    `failed` returns. `connect` is one of those of `enter`.
    """
    threads = _threads(config, env)
    _prepare_libraries(threads)
    import torch

    from dist_cifar.config import load_components
    from dist_cifar.distributed.device import bind_to_cores_near, choose_device
    from dist_cifar.ops.malloc import keep_freed_memory
    from dist_cifar.run.provenance import shared_facts
    from dist_cifar.run.run_dir import RunDir
    from dist_cifar.tools.report import ReportTracker
    from dist_cifar.trainer import train

    load_components(config)
    torch.set_num_threads(threads)  # torchrun has put OMP_NUM_THREADS=1 before this process began
    device = choose_device(config.run.device, env)
    bind_to_cores_near(device)
    keep_freed_memory()
    communicator = connect(env, device, config.run.timeout_seconds, lambda: shared_facts(config))
    failure_exit = FailureExit(RunDir.of(config), communicator)
    detector = communicator.watch(failure_exit.end_as_survivor)
    try:
        is_done = train(
            config,
            communicator,
            must_resume=must_resume,
            resume_anyway=resume_anyway,
            trackers=[ReportTracker],
        )
        outcome = ended(communicator, is_done)
        communicator.barrier()  # watched: rank 0 may take long over what it writes at the end, or fail
    except stopping.Stopped as stop:
        stopping.report(stop)
        return failed(failure_exit, StoppedError(str(stop)), detector)
    except Exception as error:
        return failed(failure_exit, error, detector)
    if detector is not None:
        detector.close()
    communicator.close()
    return outcome


def _threads(config: Config, env: DistEnv) -> int:
    """The number of CPU threads of this rank.

    A strategy that has the same bits on every machine has one, since their number changes how sums are rounded.
    """
    from dist_cifar.distributed.cores import available_cores
    from dist_cifar.strategy import properties

    is_single = properties(config.strategy).single_threaded
    share = 1 if is_single else max(1, available_cores() // env.local_world_size)
    return config.run.threads_per_rank or share


def _prepare_libraries(threads: int) -> None:
    """Sets what libraries read from the environment when they are imported or used."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Accelerate and DDP warn when it is missing
    pin_cublas_workspace(os.environ)  # in every strategy: the process may train in another one later
    # A store whose host dies is worth one line of ours, not a hundred of a stack trace.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
