"""Fills options and arguments into a batch script of `slurm/`, checks it and submits it: `dist-cifar submit`.

Contract: `render` is a pure function from a template, which is a script of `slurm/` as it stands, and a `Request` to
the text of a script that does the same and needs no argument. Every value is quoted: for sbatch in the header, for the
shell elsewhere. `submit` has sbatch test the script before it is submitted; SLURM itself is not changed by a dry run.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dist_cifar.errors import ConfigError, LaunchError

logger = logging.getLogger(__name__)

CORES_OF_GPU = 8
"""For the threads of a rank: its loop, the backward pass, the batches, the exchange."""

_OF_A_JOB = re.compile(
    r"(?:SLURM|SBATCH|SRUN|SALLOC|SLURMD|PMI|PMIX|OMPI|PRTE|MV2|MVAPICH|FLUX|PALS|HYDRA|TORCHELASTIC|ACCELERATE)_|MPI_LOCAL"
    r"|(?:RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|ROLE_RANK|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE)$"
    r"|MASTER_(?:ADDR|PORT)$|(?:CUDA|ROCR|HIP|ZE_AFFINITY)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$"
    r"|OMP_(?:NUM_THREADS|PROC_BIND|PLACES)$|(?:KMP|GOMP_CPU)_AFFINITY$"
)
_OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
"""How sbatch finds the controller."""
_SBATCH_SECONDS = 60.0
"""How long sbatch may wait for the controller."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a job. None keeps the template's value."""

    arguments: tuple[str, ...]
    """The arguments of `train`: `--config FILE key=value ...`."""
    directory: Path
    """The folder that holds `slurm/`, where the job runs."""
    nodes: int = 1
    gpus_per_node: int = 1
    """GPUs of each node; 0 asks for none."""
    ranks_per_node: int
    time: str | None = None
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    array: str | None = None
    """Tasks of a sweep's array, e.g. `1-4%2`; `arguments` then begins with the file of its lines."""
    container: str | None = None
    """An image for apptainer."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as they stand behind `#SBATCH`: `--mem=64G`, or `mem=64G`."""
    setup: tuple[str, ...] = ()
    """Lines of shell to run in the job before anything else: `module load cuda`."""
    max_restarts: int | None = None


def render(template: str, request: Request) -> str:
    """Returns the script.

    Raises `ConfigError` for a value that no line of a script can hold, and for a template without a line to fill in.
    """
    for field in fields(request):
        for value in _texts(getattr(request, field.name)):
            if any(ord(character) < 32 or ord(character) == 127 for character in value):
                name = "--" + field.name.replace("_", "-")
                raise ConfigError(f"submit: {name} {value!r} holds a line break or another control character")
    with_torchrun = "\ntrain_ranks torchrun " in template
    options = {
        "job-name": request.job_name,
        "nodes": request.nodes,
        "ntasks-per-node": 1 if with_torchrun else request.ranks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "cpus-per-task": _cores(request, with_torchrun),
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "array": request.array,
        "chdir": str(request.directory),
    }
    if request.job_name is not None and not re.fullmatch(r"[\w.@:+-]+", request.job_name):  # %x would be a path
        options["output"] = "slurm/logs/dist_cifar-" + ("%A_%a.log" if request.array else "%j.log")
    text = template
    if not request.gpus_per_node:
        text = re.sub(r"^#SBATCH --gpus-per-node=.*\n", "", text, flags=re.MULTILINE)
    for name, setting in options.items():
        if setting is not None:
            text = _with_option(text, name, str(setting))
    text = _in_header(text, [f"#SBATCH {'' if option.startswith('-') else '--'}{option}" for option in request.sbatch])
    if request.container is not None:
        text = _with_line(text, "container=()", f"container=(apptainer exec --nv {shlex.quote(request.container)})")
    if request.max_restarts is not None:
        text = _with_line(text, "max_restarts=3 ", f"max_restarts={request.max_restarts} ")
    if with_torchrun:
        text = _with_line(text, "ranks_per_node=${SLURM_GPUS_ON_NODE:-1}", f"ranks_per_node={request.ranks_per_node}")
    if request.setup:
        text = _with_line(text, "# module load cuda\n", "\n".join(request.setup) + "\n")
    return _with_line(text, "source slurm/job.sh", f"set -- {shlex.join(request.arguments)}\nsource slurm/job.sh")


def _cores(request: Request, with_torchrun: bool) -> int | None:
    """Cores of each task; None is as the template has it."""
    if request.cpus_per_task is None and with_torchrun and request.gpus_per_node:
        return CORES_OF_GPU * request.ranks_per_node
    return request.cpus_per_task


def _texts(value: object) -> list[str]:
    if isinstance(value, tuple):
        return [str(part) for part in value]
    return [] if value is None else [str(value)]


def _with_option(text: str, name: str, value: str) -> str:
    """Sets `#SBATCH --name=value` in the header: in the place of the template's line, or at its end."""
    value = shlex.quote(value.replace("\\", "\\\\"))  # sbatch takes a backslash for an escape in quotes too
    line = f"#SBATCH --{name}={value}"
    found = re.compile(rf"^#+SBATCH --{name}=.*$", re.MULTILINE)
    if found.search(text):
        return found.sub(lambda _: line, text, count=1)
    return _in_header(text, [line])


def _in_header(text: str, lines: list[str]) -> str:
    """Adds lines behind the last option, where sbatch still reads them: the last of two options counts."""
    last = list(re.finditer(r"^#SBATCH .*\n", text, re.MULTILINE))[-1].end()
    return text[:last] + "".join(f"{line}\n" for line in lines) + text[last:]


def _with_line(text: str, start: str, replacement: str) -> str:
    if f"\n{start}" not in text:
        raise ConfigError(
            f"submit: the script in slurm/ has no line that begins with {start.strip()!r}, in whose place"
            f" {replacement.strip()!r} belongs; put it back, or submit the script with sbatch"
        )
    return text.replace(f"\n{start}", f"\n{replacement}", 1)


def submit(script: str, *, dry_run: bool) -> str:
    """Has sbatch test a script and, unless it is a dry run, submits it. Returns what sbatch prints.

    Raises `LaunchError` with sbatch's own words if it refuses the script, and if there is no sbatch.
    """
    tested = _sbatch(script, "--test-only")
    return tested if dry_run else _sbatch(script)


def _sbatch(script: str, *options: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", *options],
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SBATCH_SECONDS,
            env=job_environment(os.environ),
        )
    except FileNotFoundError:
        raise LaunchError("submit: there is no sbatch on this machine; run it on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"submit: sbatch has not answered in {_SBATCH_SECONDS:g} s; is the controller up?") from None
    printed = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        raise LaunchError(
            f"submit: refused by sbatch ({printed}); see --dry-run for the script, and give --cpus-per-task if no node"
            " has as many cores"
        )
    return printed


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a job is given of this shell's environment: nothing that the shell's own allocation or launcher has set.

    sbatch hands the environment on, and a variable of SLURM that stays in it sets an option of the job's `srun`;
    `SBATCH_` variables would take precedence over the script. A warning names those.
    """
    options = sorted(name for name in environ if name.startswith("SBATCH_"))
    if options:
        logger.warning("warning: submit: not handed on: %s; give such options with --sbatch", ", ".join(options))
    return {name: value for name, value in environ.items() if name in _OF_THE_CLUSTER or not _OF_A_JOB.match(name)}


class JobVariables(dict[str, str]):
    """The environment with which a job's config is checked before it is submitted.

    A variable that this machine lacks may be set in the job, as `SLURM_TMPDIR` is: any path stands for it.
    """

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, f"/{name}")


def sweep_lines(content: bytes) -> list[list[str]]:
    """The overrides in each line of a sweep's file, as `slurm/sweep.sbatch` reads them there.

    A line ends with a line feed, perhaps behind a carriage return; blanks and tabs separate, and quotes do not join.
    Raises `ConfigError`, which begins with the line's number.
    """
    lines = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    sweep = []
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            raise ConfigError(f"line {number}: it is not UTF-8; save it as UTF-8") from None
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line):
            raise ConfigError(f"line {number}: it holds a control character; remove it")
        if re.search(r"""=["']|["'](?:[ \t]|$)""", line):
            raise ConfigError(
                f"line {number}: quotes are not read here; write the value without them and without blanks"
            )
        sweep.append([word for word in re.split("[ \t]+", line) if word])
    return sweep


def template(directory: Path, name: str) -> str:
    """Reads a script of `directory/slurm`. Raises `LaunchError` if it is not there."""
    path = directory / "slurm" / f"{name}.sbatch"
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LaunchError(
            f"submit: {path} cannot be read ({reason}); jobs run in the folder that holds slurm/: cd to your"
            " clone or project, or let `dist-cifar init` write one here"
        ) from None
