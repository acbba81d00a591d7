"""The command line: `dist-cifar`, `python -m dist_cifar`, and what the front doors of `train.py` call.

Contract: every error ends as one line on standard error from one rank and as an exit code of `errors.py`. When one of
several ranks fails, each of the others says in one line which one and why, and no process stays. What needs torch is
imported only when a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import gc
import logging
import os
import re
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dist_cifar import __version__, stopping
from dist_cifar.config import Config, describe, load_config, to_yaml
from dist_cifar.distributed.failure_detector import Failure, FailureDetector, describe_error, is_lost_peer, own_failure
from dist_cifar.distributed.launch_env import DistEnv, available_cores, check_local_rank, read_env, refuse_lone_task
from dist_cifar.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_SAVED,
    ConfigError,
    DataError,
    LaunchError,
    UserError,
    nearest,
    nearest_path,
)
from dist_cifar.ops.malloc import keep_freed_memory
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.run_dir import RunDir, require_run
from dist_cifar.strategy import properties
from dist_cifar.tracking.console import log_to_stream

if TYPE_CHECKING:
    from dist_cifar.distributed.collectives import Communicator

logger = logging.getLogger(__name__)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_PATIENCE_SECONDS = 3.0
"""How long other ranks leave it to rank 0 to report an error that all ranks have."""
_MEETING_GRACE_SECONDS = 1.0
"""How much earlier than the clock of `_join` the meeting gives up by itself, which knows who has not come."""
_LAST_WORDS_SECONDS = 10.0
"""How long a rank of several, which ends because of a failure, may take to say so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    logging.getLogger("dist_cifar").setLevel(logging.WARNING if _rank_of_launcher() == "0" else logging.ERROR)
    try:
        options = _parse(arguments)
        return options.command(options)
    except UserError as error:
        _report(str(error))
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _report(f"{error}; free space or mend it, and run again")
        return DataError.exit_code


def _report(message: str) -> None:
    """One line, from rank 0; from another rank only if rank 0 has not ended the job by then."""
    rank = _rank_of_launcher()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while rank != "0" and time.monotonic() < deadline:
        time.sleep(0.05)
        if stopping.stop_requested():
            return
    _print_error(message, rank)


def _print_error(message: str, rank: str) -> None:
    speaker = "" if rank == "0" else f"rank {rank}: "
    print(f"dist_cifar: error: {speaker}{' '.join(message.split())}", file=sys.stderr, flush=True)


def _rank_of_launcher() -> str:
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0")


# --- the commands ------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    if options.print_config:
        if _rank_of_launcher() == "0":
            print(to_yaml(config), end="")
        return EXIT_DONE
    if options.print_run_dir:
        if _rank_of_launcher() == "0":
            print(config.run.dir)
        return EXIT_DONE
    env = _take_part(config, options)

    # Accelerate and DDP warn about OMP_NUM_THREADS when it is missing; the number is set below.
    # Strategy `exact` has one thread on every machine: their number changes how sums are rounded.
    share = 1 if properties(config.strategy).single_threaded else max(1, available_cores() // env.local_world_size)
    threads = config.run.threads_per_rank or share
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # A store whose host dies is worth one line of ours, not a hundred of a stack trace.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    gc.disable()  # imports make a million objects that stay: looking for garbage among them takes a tenth of the time
    import torch

    from dist_cifar.tools.report import ReportTracker
    from dist_cifar.trainer import train

    gc.freeze()
    gc.enable()
    torch.set_num_threads(threads)  # torchrun has put OMP_NUM_THREADS=1 before this process began
    device = _device(config, env)
    keep_freed_memory()
    communicator = _join(env, device, config.run.timeout_seconds)
    report = _FailureReport(RunDir(config.run.dir or "."), communicator)
    watch = communicator.watch(report.end_as_survivor)
    try:
        done = train(
            config,
            communicator,
            must_resume=options.resume,
            resume_anyway=options.resume_anyway,
            trackers=[ReportTracker],
        )
    except Exception as error:
        return report.fail(error, watch)
    if watch is not None:
        watch.close()
    communicator.close()
    return EXIT_DONE if done else EXIT_SAVED


def _join(env: DistEnv, device: Any, timeout_seconds: float) -> Communicator:
    """All of the job's ranks together. Ends the process if they have not come together within the timeout.

    On a clock of its own: gloo waits five times its timeout for each rank that is killed while it connects to it.
    """
    from dist_cifar.distributed.collectives import Communicator

    def end(message: str, code: int) -> NoReturn:
        _report(message)
        _leave(code)

    message = (
        f"launch: rank {env.rank} of {env.world_size} on {socket.gethostname()} waited {timeout_seconds:g} s"
        f" (run.timeout_seconds) for all ranks to connect at {env.master_addr}; look for one that failed, or set more"
        " if they start slowly"
    )
    clock = threading.Timer(timeout_seconds + _MEETING_GRACE_SECONDS, end, [message, LaunchError.exit_code])
    clock.daemon = True
    clock.start()
    try:
        try:
            return Communicator(env, device=device, timeout_seconds=timeout_seconds)
        finally:
            clock.cancel()  # before the report, which leaves rank 0 some seconds to say it
    except LaunchError as error:
        end(str(error), error.exit_code)


class _FailureReport:
    """Says what ended the training: a line or a traceback on standard error, `status.json` and the exit code."""

    def __init__(self, run_dir: RunDir, communicator: Communicator) -> None:
        self._run_dir, self._communicator, self._rank = run_dir, communicator, communicator.rank

    def fail(self, error: Exception, watch: FailureDetector | None) -> int:
        """Ends a rank whose training raised `error`; returns only if it is the job's only one."""
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            where = f"run.dir={self._run_dir.path}"
            error = DataError(f"{where}: {error}; free space or mend it, and run again").with_traceback(None)
        failure = own_failure(error, self._rank, self._communicator.step) if watch is None else watch.report(error)
        if watch is not None and is_lost_peer(error):
            self.end_as_survivor(failure)
        if watch is not None:
            _leave_in_time()
        is_first = failure.by == self._rank
        if not isinstance(error, UserError):
            print(f"dist_cifar: rank {self._rank} failed:", file=sys.stderr)
            traceback.print_exception(error)
        elif is_first or failure.reason != describe_error(error):  # else rank 0 says it: all have raised it together
            _print_error(str(error), str(self._rank))
        if not is_first and failure.reason != describe_error(error):
            self._name_first(failure)
        code = error.exit_code if isinstance(error, UserError) else EXIT_INTERNAL
        self._write_status(failure)
        return code if watch is None else _leave(code)

    def end_as_survivor(self, failure: Failure) -> NoReturn:
        """Ends a rank that has failed because of another one."""
        _leave_in_time()
        self._name_first(failure)
        self._write_status(failure)
        _leave(EXIT_INTERNAL)

    def _name_first(self, failure: Failure) -> None:
        line = f"rank {self._rank}: {failure.sentence(self._communicator.identities)}"
        print(f"dist_cifar: error: {line}", file=sys.stderr, flush=True)

    def _write_status(self, failure: Failure) -> None:
        first = self._communicator.identities[0]
        with contextlib.suppress(OSError, ValueError):  # the disk may be what has failed; it is reported anyway
            self._run_dir.write_failure((first.host, first.pid), failure.rank, failure.conclusion)


def _leave_in_time() -> None:
    """Ends the process even if what it still has to say cannot be written, on a disk or a pipe that hangs."""
    guard = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (EXIT_INTERNAL,))
    guard.daemon = True
    guard.start()


def _leave(code: int) -> NoReturn:
    """Ends the process at once: the destructors of a broken process group may wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _verify(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    env = _take_part(config, options)
    from dist_cifar.tools.verify import verify

    try:
        return verify(
            config,
            env,
            world_sizes=options.world_sizes,
            steps=options.steps,
            directory=options.dir,
            json_file=options.json,
        )
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno not in _DISK_ERRORS:
            raise
        raise DataError(f"verify: {error}; free space, or give a directory that can be written with --dir") from error


def _doctor(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    env = _take_part(config, options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dist_cifar.tools.doctor import doctor

    return doctor(config, env, _device(config, env), json_file=options.json)


def _submit(options: argparse.Namespace) -> int:
    from dist_cifar.strategy import slice_count
    from dist_cifar.tools.slurm import REPOSITORY, Request, render, submit, template

    config = load_config(options.config, options.overrides)
    if Path.cwd() != REPOSITORY:
        raise ConfigError(f"submit: jobs run in the repository, where their paths begin: cd {REPOSITORY}")
    ranks = options.ranks_per_node or max(options.gpus_per_node, 1)
    slice_count(config.batch, config.strategy, world_size=options.nodes * ranks)
    arguments = ["--config", str(options.config)] if options.config else []
    arguments += options.overrides
    script = "train_srun" if options.no_torchrun else "train"
    array = None
    if options.sweep:
        if options.no_torchrun:
            raise ConfigError("submit: --sweep has a script of its own, with torchrun; leave --no-torchrun out")
        lines = _lines_of_sweep(options)
        array = f"1-{lines}" + (f"%{options.at_once}" if options.at_once else "")
        script, arguments = "sweep", [str(options.sweep), *arguments]
    names = "nodes gpus_per_node time job_name partition account qos constraint cpus_per_task container max_restarts"
    request = Request(
        arguments=tuple(arguments),
        directory=REPOSITORY,
        ranks_per_node=ranks,
        array=array,
        **{name: getattr(options, name) for name in names.split()},
    )
    text = render(template(script), request)
    if options.dry_run:
        print(text, end="", flush=True)
    print(submit(text, dry_run=options.dry_run), file=sys.stderr if options.dry_run else sys.stdout)
    return EXIT_DONE


def _lines_of_sweep(options: argparse.Namespace) -> int:
    """The number of lines of the file, each of which must be a config."""
    try:
        lines = options.sweep.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"submit: --sweep {options.sweep}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            if not line.split():
                raise ConfigError("it is empty")
            of_the_script = ["run.dir=", "tracking.wandb_group="]
            load_config(options.config, [*options.overrides, *line.split(), *of_the_script])
        except ConfigError as error:
            raise ConfigError(f"submit: --sweep {options.sweep}, line {number}: {error}") from None
    if not lines:
        raise ConfigError(f"submit: --sweep {options.sweep} is empty; give it a line of overrides for each run")
    return len(lines)


def _data(options: argparse.Namespace) -> int:
    from dist_cifar.data.dataset import load_dataset

    config = load_config(options.config, options.overrides)
    log_to_stream(sys.stdout)
    found = load_dataset(dataclasses.replace(config.data, stage_dir=None))  # the nodes that train have that directory
    print(
        f"data     {config.data.source}: {len(found.train.labels):,} images to train on, those held out for validation"
        f" among them, {len(found.test.labels):,} to test on, {len(found.classes)} classes"
    )
    print(f"cache    {found.directory.absolute()}")
    print(f"sha256   {found.content_sha256}")
    return EXIT_DONE


def _predict(options: argparse.Namespace) -> int:
    """Each picture's classes on standard output; what cannot be read on standard error, and then exit code 74."""
    import json

    import numpy as np

    from dist_cifar.inference import batched, load_classifier, load_images, top_k

    log_to_stream(sys.stderr, "dist_cifar: ")
    classifier = load_classifier(options.checkpoint, _own_device())
    if options.checkpoint is None:
        logger.info(f"with {classifier.checkpoint}")
    top = min(options.top, len(classifier.classes))
    failed = 0
    for batch in batched(load_images(options.images, sys.stdin.buffer.read)):
        for name, problem in batch:
            if isinstance(problem, str):
                failed += 1
                _print_error(f"{'standard input' if name == '-' else name}: {problem}", "0")
        good = [(name, pixels) for name, pixels in batch if not isinstance(pixels, str)]
        if not good:
            continue
        found = classifier.probabilities(np.stack([pixels for _, pixels in good]), tta=options.tta)
        width = max(len(name) for name, _ in good)
        for (name, _), probabilities in zip(good, found, strict=True):
            best = top_k(probabilities, classifier.classes, top)
            if options.json:
                listed = [{"class": label, "probability": share} for label, share in best]
                print(json.dumps({"image": name, "predictions": listed}))
            else:
                print(f"{name:<{width}}  " + "  ".join(f"{label} {share:.1%}" for label, share in best))
    return DataError.exit_code if failed else EXIT_DONE


def _evaluate(options: argparse.Namespace) -> int:
    """The accuracy of a run's model, on the ranks of a launcher if there is one."""
    import json

    env = read_env(os.environ)
    check_local_rank(os.environ, options.local_rank)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // env.local_world_size)))
    import numpy as np

    from dist_cifar.data.dataset import load_dataset
    from dist_cifar.data.ood_test_sets import read_test_sets
    from dist_cifar.evaluate import evaluate
    from dist_cifar.inference import HorizontalFlipTTA, load_classifier
    from dist_cifar.run.predictions import wilson_interval
    from dist_cifar.tracking.console import table

    if env.rank == 0:
        log_to_stream(sys.stderr, "dist_cifar: ")
    device = _device(Config(), env)
    classifier = load_classifier(options.run, device)
    config = classifier.config
    if options.data is None:
        name = f"{config.data.source}, test split"
        sets = {name: load_dataset(dataclasses.replace(config.data, stage_dir=None)).test}
    else:
        sets = read_test_sets(options.data, classifier.classes, config.data.cache_dir)
    communicator = _join(env, device, config.run.timeout_seconds)
    found: dict[str, dict[str, Any]] = {}
    for name, split in sets.items():
        result = evaluate(
            HorizontalFlipTTA(classifier.module) if options.tta else classifier.module,
            split,
            np.arange(len(split.labels)),
            mean=classifier.mean,
            std=classifier.std,
            num_classes=len(classifier.classes),
            batch_size=config.eval.batch_size,
            communicator=communicator,
        )
        low, high = wilson_interval(result.correct, result.count)
        found[name] = {
            "accuracy": result.accuracy,
            "accuracy_interval": [low, high],
            "loss": result.loss,
            "count": result.count,
            "class_accuracy": dict(zip(classifier.classes, result.class_accuracy, strict=True)),
        }
    communicator.close()
    if env.rank != 0:
        return EXIT_DONE
    rows = [("model", f"{classifier.checkpoint}" + (", mirror images averaged" if options.tta else ""))]
    for name, one in found.items():
        low, high = one["accuracy_interval"]
        rows.append(
            (
                name,
                f"{one['accuracy']:.2%}, 95% interval {low:.2%} to {high:.2%}, loss {one['loss']:.4f},"
                f" {one['count']:,} images",
            )
        )
    if len(found) > 1:
        rows.append(("mean", f"{sum(one['accuracy'] for one in found.values()) / len(found):.2%}"))
    else:
        rows += [
            (f"  {label}", "-" if share is None else f"{share:.1%}")
            for label, share in next(iter(found.values()))["class_accuracy"].items()
        ]
    print(table(rows))
    if options.json:
        facts = {"checkpoint": str(classifier.checkpoint), "weights_sha256": classifier.sha256, "tta": options.tta}
        write_atomic(options.json, json.dumps(facts | {"results": found}, indent=2) + "\n")
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    import torch

    from dist_cifar.inference import CHECKED_IMAGES, export, load_classifier

    log_to_stream(sys.stderr, "dist_cifar: ")
    classifier = load_classifier(options.run, torch.device("cpu"))
    directory = options.out or classifier.checkpoint.parent.parent / "export"
    path, difference = export(classifier, options.to, directory)
    print(f"model    {path} ({path.stat().st_size / 1e6:.1f} MB), step {classifier.step}")
    print("input    uint8 [batch, 32, 32, 3], RGB; normalised inside the graph")
    print(f"checked  on {CHECKED_IMAGES} images: logits differ from the model's by {difference:.1g} at most")
    print(f"card     {directory / 'README.md'}")
    return EXIT_DONE


def _report_runs(options: argparse.Namespace) -> int:
    from dist_cifar.tools.report import write_report

    path = write_report([require_run(run) for run in options.runs], options.out)
    print(f"report   {path.absolute()}")
    return EXIT_DONE


def _watch(options: argparse.Namespace) -> int:
    from dist_cifar.tools.watch import serve, show

    runs = [require_run(run) for run in options.runs]
    if options.terminal and len(runs) > 1:
        raise ConfigError("watch: --terminal shows one run; leave it out to compare several on one page")
    log_to_stream(sys.stderr, "dist_cifar: ")
    return show(runs[0]) if options.terminal else serve(runs, options.port)


def _own_device() -> Any:
    """The device of a command that runs alone."""
    return _device(Config(), DistEnv())


def _bench_augment(options: argparse.Namespace) -> int:
    from dist_cifar.tools.bench import bench_augment

    log_to_stream(sys.stdout)
    bench_augment()
    return EXIT_DONE


def _take_part(config: Config, options: argparse.Namespace) -> DistEnv:
    """This process's place in its job, whose signals it heeds from now on; before torch is imported, which is slow.

    Raises `LaunchError` for a job that contradicts itself or the config.
    """
    env = read_env(os.environ)
    if env.launcher == "none" and options.command is _train:  # `verify` starts its ranks itself
        refuse_lone_task(os.environ)
    check_local_rank(os.environ, options.local_rank)
    _refuse_what_accelerate_would_do(config)
    stopping.install()
    if env.launcher in ("torchrun", "mpi") or _started_by_accelerate():
        stopping.die_with_launcher()
    return env


def _started_by_accelerate() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ  # it always says one


def _refuse_what_accelerate_would_do(config: Config) -> None:
    """Raises `LaunchError` for options of `accelerate launch` that contradict the config."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.compute.precision):
        raise LaunchError(
            f"launch: accelerate was given mixed_precision={precision} and compute.precision is"
            f" {config.compute.precision}; leave the former out and set compute.precision"
        )
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_set(f"ACCELERATE_USE_{name}") and config.strategy.name != name.lower():
            hint = f"set strategy.name={name.lower()}, or leave it out" if name in _ENGINES else "leave it out"
            raise LaunchError(
                f"launch: accelerate was told to use {name} and strategy.name is {config.strategy.name}; {hint}"
            )
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        _refuse_other_plugin_settings(config)


_ENGINES = ("DEEPSPEED", "FSDP")
"""What Accelerate starts and a strategy has the name of."""


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _refuse_other_plugin_settings(config: Config) -> None:
    """Raises `LaunchError` for settings of Accelerate's DeepSpeed plugin that contradict the config."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(config.strategy.zero_stage))
    if stage != str(config.strategy.zero_stage):
        raise LaunchError(
            f"launch: accelerate was given zero_stage={stage} and strategy.zero_stage is {config.strategy.zero_stage}; set"
            f" strategy.zero_stage={stage}, or leave the former out"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise LaunchError(
            "launch: accelerate was given a deepspeed_config_file; the config says everything here: leave it out"
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clip not in ("none", "auto") and float(clip) != (config.optimizer.max_grad_norm or 0.0):
        raise LaunchError(
            f"launch: accelerate was given gradient_clipping={clip} and optimizer.max_grad_norm is"
            f" {config.optimizer.max_grad_norm}; leave the former out and set optimizer.max_grad_norm"
        )


def _device(config: Config, env: DistEnv) -> Any:
    """The device of this rank. Raises `ConfigError` or `LaunchError` if there is none for it."""
    import torch

    wanted = config.run.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU") else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("run.device: cuda was set and torch finds no GPU; set run.device=cpu, or mend the driver")
    # A SLURM step may show each task its own GPU alone; it is then number 0 for every task.
    index = 0 if count == 1 and env.launcher == "slurm" else env.local_rank
    if index >= count:
        raise LaunchError(
            f"launch: {env.local_world_size} ranks on this node and {count} GPUs; start one rank for each GPU, or set"
            " run.device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


# --- the parser --------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with this program's way of reporting errors."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += _hint(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _hint(word: str, known: Iterable[str]) -> str:
    meant = nearest(word, known)
    return f"; did you mean {meant}?" if meant else ""


class _Command(_Parser):
    """The parser of one command, which leaves itself among the options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_defaults(parser=self)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dist-cifar",
        description="Train the same CIFAR-10 model on any number of GPUs, and prove it.",
        epilog="exit codes: 0 done, 2 bad usage or config, 70 internal, 74 disk or data, 75 stopped and saved (run it"
        " again)",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist_cifar {__version__}")
    parser.set_defaults(local_rank=None)
    _add_local_rank(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Command)

    train = commands.add_parser(
        "train",
        help="train a model; all config fields: dist-cifar train --help",
        description="Train a model, or go on with the run that the run directory holds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    train.add_argument("--help", "-h", action=_TrainHelp, nargs=0, help="show this and all config fields, and exit")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    train.add_argument("--resume", action="store_true", help="fail if there is nothing to go on with")
    train.add_argument(
        "--resume-anyway", action="store_true", help="go on even with what changes the result; the log says what does"
    )
    train.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    train.add_argument("--print-run-dir", action="store_true", help="print the run directory and exit")
    _add_local_rank(train)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="config fields, e.g. train.epochs=3")
    train.set_defaults(command=_train)

    verify = commands.add_parser(
        "verify",
        help="show that all world sizes, and a run that is killed and resumed, give the same bits on this machine",
        description="The acceptance test of a machine or cluster: train a few steps of a config in strategy exact at"
        " several world sizes, and once more while ranks are killed and go on at another world size, and compare every"
        " bit of every step. Alone it starts all ranks itself; under torchrun, accelerate, mpirun or srun each"
        " process starts its share of them.",
        epilog="exit codes: 0 all equal, 2 bad usage or config, 70 something differs or failed, 74 disk or data, 75"
        " stopped by a signal, 130 by Ctrl-C",
        allow_abbrev=False,
    )
    verify.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    verify.add_argument(
        "--world-sizes",
        metavar="N,N,...",
        help="divisors of strategy.virtual_ranks; default: powers of two up to the processes of the launcher, at least to"
        " 4 on CPU",
    )
    verify.add_argument("--steps", type=int, default=20, metavar="N", help="steps to compare; default: 20")
    verify.add_argument(
        "--dir",
        type=Path,
        help="where the runs are written, which all nodes must share; default: a new directory below runs/. It is"
        " removed when all is equal",
    )
    verify.add_argument("--json", type=_new_file, metavar="FILE", help="write the result for programs")
    _add_local_rank(verify)
    verify.add_argument("overrides", nargs="*", metavar="key=value", help="config fields, e.g. model.name=resnet20")
    verify.set_defaults(command=_verify)

    doctor = commands.add_parser(
        "doctor",
        help="look for what would waste GPU hours: versions, network, disk, data, limits",
        description="Check this machine, or under a launcher (torchrun, srun, accelerate, mpirun) all ranks of a job,"
        " for what would make a training fail or slow, and say what to do. Takes about half a minute.",
        epilog="exit codes: 0 nothing failed (there may be warnings), 1 something failed, 2 bad usage or config",
        allow_abbrev=False,
    )
    doctor.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    doctor.add_argument("--json", type=_new_file, metavar="FILE", help="write the findings for programs")
    _add_local_rank(doctor)
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="config fields, e.g. run.dir=/shared/run")
    doctor.set_defaults(command=_doctor)

    submit = commands.add_parser(
        "submit",
        help="submit a training to SLURM",
        description="Fill in a batch script of slurm/, have sbatch test it, and submit it. To be run in the repository,"
        " where the job will run. docs/slurm.md says what the job does when it is preempted, out of time or broken.",
        allow_abbrev=False,
    )
    submit.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    submit.add_argument("--nodes", type=_positive, default=1, metavar="N", help="default: 1")
    submit.add_argument("--gpus-per-node", type=_count, default=1, metavar="G", help="default: 1; 0 asks for none")
    submit.add_argument("--ranks-per-node", type=_positive, metavar="R", help="default: one for each GPU, at least one")
    submit.add_argument("--cpus-per-task", type=_positive, metavar="N", help="CPU cores of each task; default: 8")
    submit.add_argument("--time", metavar="T", help="limit, as sbatch reads it: minutes, HH:MM:SS, D-HH; default: 12 h")
    submit.add_argument("--job-name", metavar="NAME")
    submit.add_argument("--partition", metavar="P")
    submit.add_argument("--account", metavar="A")
    submit.add_argument("--qos", metavar="Q")
    submit.add_argument("--constraint", metavar="C", help="features of the nodes")
    submit.add_argument("--container", metavar="IMAGE", help="run the ranks in this image with apptainer")
    submit.add_argument("--max-restarts", type=_count, metavar="N", help="requeues after a crash; default: 3")
    submit.add_argument("--no-torchrun", action="store_true", help="one task of SLURM for each rank")
    submit.add_argument("--sweep", type=Path, metavar="FILE", help="a job array: one run for each line of overrides")
    submit.add_argument(
        "--at-once", type=_positive, metavar="K", help="runs of the sweep at the same time; default: all"
    )
    submit.add_argument(
        "--dry-run", action="store_true", help="print the script and have sbatch test it; submit nothing"
    )
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="config fields, e.g. run.dir=runs/first")
    submit.set_defaults(command=_submit)
    data = commands.add_parser(
        "data",
        help="fetch, check, decode and cache the data set of a config, where there is a network",
        description="Download the data set of a config, or find it, check and decode it, and keep it in the cache,"
        " without training: on a login node, so that nodes without a network find it. They must see the same"
        " data.cache_dir and, for data.source=folder, the same data.root.",
        allow_abbrev=False,
    )
    data.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    data.add_argument("overrides", nargs="*", metavar="key=value", help="config fields, e.g. data.cache_dir=PATH")
    data.set_defaults(command=_data)

    evaluate = commands.add_parser(
        "evaluate",
        help="the accuracy of a run's model, on its test split or on other data",
        description="Evaluate the best model of a run (or one of its checkpoints) on the run's test split or on --data:"
        " a folder or zip as for data.source=folder, or the files of CIFAR-10.1 or CIFAR-10-C as published. Under a"
        " launcher the ranks share the work, with the same result.",
        allow_abbrev=False,
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    evaluate.add_argument("--data", type=Path, metavar="PATH", help="default: the test split that the run names")
    evaluate.add_argument("--tta", action="store_true", help="average each image with its mirror image")
    evaluate.add_argument("--json", type=_new_file, metavar="FILE", help="write the result for programs")
    _add_local_rank(evaluate)
    evaluate.set_defaults(command=_evaluate)

    predict = commands.add_parser(
        "predict",
        help="classify pictures with the model of a run",
        description="Classify pictures of any format and size with the best model of a run.",
        allow_abbrev=False,
    )
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE|FOLDER|-", help="files, folders of files, or - for bytes on standard input"
    )
    predict.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="run directory or checkpoint; default: the latest in runs/"
    )
    predict.add_argument("--top", type=_positive, default=3, metavar="K", help="classes to show; default: 3")
    predict.add_argument("--tta", action="store_true", help="average each image with its mirror image")
    predict.add_argument("--json", action="store_true", help="one JSON object a line")
    predict.set_defaults(command=_predict)

    export = commands.add_parser(
        "export",
        help="write the model of a run for other programs: torch.export or ONNX",
        description="Write the best model of a run as a graph that takes pixels (uint8, any number of images) and has"
        " the normalisation inside, compare it with the model, and write a model card beside it.",
        allow_abbrev=False,
    )
    export.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    export.add_argument("--to", choices=("torch", "onnx"), required=True)
    export.add_argument("--out", type=_new_folder, metavar="DIR", help="default: RUN/export")
    export.set_defaults(command=_export)

    report = commands.add_parser(
        "report",
        help="one HTML page about a run, or about several, compared",
        description="Write one self-contained HTML page: results, curves, mistakes, timeline and settings of a run; of"
        " several, side by side with what differs in their configs.",
        allow_abbrev=False,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    report.add_argument(
        "--out",
        type=_new_file,
        metavar="FILE",
        help="default: report.html in the run directory; of several: in this folder",
    )
    report.set_defaults(command=_report_runs)

    watch = commands.add_parser(
        "watch",
        help="look at a run while it trains: a page on this machine, or in the terminal",
        description="Serve the report of a run on this machine's loopback address, kept up to date, until Ctrl-C.",
        allow_abbrev=False,
    )
    watch.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    watch.add_argument("--port", type=_port, default=8642, metavar="N", help="default: 8642; 0 takes any that is free")
    watch.add_argument("--terminal", action="store_true", help="show it here; ends with the run")
    watch.set_defaults(command=_watch)

    bench = commands.add_parser("bench", help="measure this machine", description="Measure this machine.")
    benchmarks = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    augment = benchmarks.add_parser(
        "augment",
        help="images/s of the training augmentation on one core",
        description="Measure, in less than ten seconds, how many images one core augments, and say how many GPUs that"
        " feeds.",
    )
    augment.set_defaults(command=_bench_augment)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)


def _port(text: str) -> int:
    if _count(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: they end at 65535")
    return int(text)


def _new_file(text: str) -> Path:
    """A file that can be written: known before the work begins whose result it is for."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file in it")
    _require_folder(path.parent, text)
    return path


def _new_folder(text: str) -> Path:
    """A folder that can be made, or is there."""
    path = Path(text)
    place = path
    while not place.exists():
        place = place.parent
    _require_folder(place, text)
    return path


def _require_folder(folder: Path, text: str) -> None:
    if not folder.exists():
        near = nearest_path(folder)
        hint = f"did you mean {near / Path(text).name}?" if near and near.is_dir() else "make it first"
        raise argparse.ArgumentTypeError(f"{text} cannot be written: there is no folder {folder}; {hint}")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is no folder; give another place")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is closed to you; give another place")


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    """DeepSpeed's launcher puts it before all that the user has written, so also before the command."""
    parser.add_argument(
        "--local_rank", "--local-rank", dest="local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """argparse takes the `key=value`s of one place only; a person writes some before an option and some behind it."""
    options, rest = _parser().parse_known_args(arguments)
    flags = [argument for argument in rest if argument.startswith("-")]
    if flags or (rest and "overrides" not in options):
        known = [option for action in options.parser._actions for option in action.option_strings]
        hint = _hint(flags[0].partition("=")[0], known) if flags else ""
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.overrides += rest
    return options


class _TrainHelp(argparse.Action):
    """Help with every config field; the docstrings are read only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        lines = [parser.format_help(), "config fields (type; default):"]
        section = ""
        for key, kind, default, text in describe():
            if key.partition(".")[0] != section:
                section = key.partition(".")[0]
                lines.append("")
            lines.append(f"  {key}  ({kind}; {default})")
            lines += textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
        print("\n".join(lines))
        sys.exit(EXIT_DONE)
