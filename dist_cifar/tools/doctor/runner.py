"""Makes all checks on one process or on every rank of a job, and prints what they have found."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch

from dist_cifar.config import Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.failure_detector import Failure
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import EXIT_DONE, LaunchError
from dist_cifar.run.atomic_io import write_output
from dist_cifar.run.run_dir import RunDir
from dist_cifar.strategy import slice_count, waiting
from dist_cifar.tools.doctor import data, disk, exactness, machine, network
from dist_cifar.tools.doctor.findings import Finding, attempt, failed, ok, table, warning, worst

EXIT_FAILED = 1


def doctor(config: Config, env: DistEnv, device: torch.device, *, json_file: Path | None) -> int:
    """Makes all checks, prints the table on rank 0 and returns the exit code. On every rank of a job."""
    examination = _Examination(config, env, json_file)
    own = [
        attempt("versions", lambda: machine.check_versions(machine.needed_extras(config))),
        attempt("GPUs", lambda: machine.check_gpus(device)),
        attempt("cores", lambda: machine.check_cores(device, env)),
        attempt("shared memory", machine.check_shared_memory),
        attempt("open files", machine.check_open_files),
        attempt("signals", machine.check_signals),
    ]
    try:
        communicator = Communicator(env, device=device, timeout_seconds=config.run.timeout_seconds)
    except LaunchError as error:
        examination.findings += own
        hint = "see why that rank did not start; the other checks need it"
        examination.findings.append(failed("ranks", str(error), hint))
        return examination.end()
    return examination.with_ranks(communicator, own)


def check_ranks(config: Config, env: DistEnv) -> Finding:
    """How many ranks there are, and whether they can share a global batch without much waiting."""
    found = f"{env.world_size} answer (launcher: {env.launcher})"
    slice_count(config.batch, config.strategy, world_size=env.world_size)
    waits = waiting(config.batch, config.strategy, world_size=env.world_size)
    if waits is None:
        return ok("ranks", found)
    how_long, hint = waits
    return warning("ranks", f"{found}; {how_long}", hint) if hint else ok("ranks", f"{found}; {how_long}")


class _Examination:
    """The findings of a job so far, which can end at any time."""

    def __init__(self, config: Config, env: DistEnv, json_file: Path | None) -> None:
        assert config.run.dir is not None  # the config resolved it
        self._config, self._env, self._json_file = config, env, json_file
        self._path = Path(config.run.dir)
        self._is_main_process = env.rank == 0
        directories = (RunDir(self._path).checkpoints, self._path, *self._path.parents)
        self._made = [path for path in directories if not os.path.lexists(path)] if self._is_main_process else []
        """Directories that the checks make, the innermost one first."""
        self.findings: list[Finding] = []

    def with_ranks(self, communicator: Communicator, own: list[Finding]) -> int:
        """Makes the checks that need other ranks, and those that only rank 0 makes; returns the exit code.

        `own` are the findings of each rank about itself.
        """
        findings, env, config = self.findings, self._env, self._config

        def end_without(failure: Failure) -> NoReturn:
            self._end_without(failure, communicator)

        watch = communicator.watch(end_without)
        try:
            findings += [worst(each) for each in zip(*communicator.all_gather_object(own), strict=True)]
            findings.append(attempt("ranks", lambda: check_ranks(config, env)))
            findings.append(network.check_backend(communicator, env))
            findings.append(network.check_all_reduce(communicator, env))
            findings.append(network.check_clocks(communicator))
            for check, function in (
                ("run directory", lambda: disk.check_run_directory(self._path)),
                ("checkpoint", lambda: disk.check_checkpoint(self._path)),
                ("data", lambda: data.check_data(config)),
                ("W&B", lambda: data.check_tracking(config, os.environ)),
            ):
                findings.append(communicator.broadcast(attempt(check, function) if self._is_main_process else None))
            findings.append(disk.check_shared(communicator, self._path))
        except (RuntimeError, OSError) as error:
            if watch is None:
                raise
            end_without(watch.report(error))
        if watch is not None:
            watch.close()
        communicator.close()
        if self._is_main_process:
            findings.append(attempt("exactness", lambda: exactness.check_exactness(config)))
        return self.end()

    def end(self) -> int:
        """Removes what the checks have made, prints the table and writes the JSON; returns the exit code."""
        code = EXIT_FAILED if any(finding.state == "failed" for finding in self.findings) else EXIT_DONE
        for path in self._made:  # else an empty run directory would be taken for a run
            with contextlib.suppress(OSError):
                path.rmdir()
        if self._is_main_process:
            print(table(self.findings), flush=True)
            if self._json_file is not None:
                listed = [asdict(finding) for finding in self.findings]
                facts = {"ok": code == EXIT_DONE, "world_size": self._env.world_size, "findings": listed}
                write_output(self._json_file, json.dumps(facts, indent=2) + "\n")
        return code

    def _end_without(self, failure: Failure, communicator: Communicator) -> NoReturn:
        """Ends the process when another rank is lost: no collective can follow."""
        hint = "see the log of that rank and its node; the other checks need it"
        # All ranks had answered at first.
        self.findings[:] = [finding for finding in self.findings if finding.check != "ranks"]
        self.findings.append(failed("ranks", failure.sentence(communicator.identities), hint))
        code = self.end()
        sys.stdout.flush()
        os._exit(code)
