"""Looks for what would waste GPU hours, before they are spent: on one process, or on every rank of a job.

Contract: `doctor` makes every check that it can, whatever another one has found, and writes nothing that stays but the
data set's cache. A finding is `ok`, `warning` (slower, or less safe) or `failed` (the run would fail), and says what to
do about the latter two. It returns 1 if anything has failed. Every rank looks at its own process and host; rank 0 says
what they have found.

Each check is a function that returns a `Finding`; an exception of one is a failed finding too. Those that need other
ranks are called on all of them, in the same order, and exchange their findings before the next begins.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from dist_cifar.config import Config
from dist_cifar.data.arrays import Arrays, content_sha256
from dist_cifar.data.dataset import load_dataset, missing_download
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.failure_detector import Failure
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.distributed.rendezvous import interface_towards
from dist_cifar.errors import EXIT_DONE, LaunchError, UserError
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.checkpoint import CheckpointStore, weights_sha256
from dist_cifar.run.run_dir import RunDir

EXIT_FAILED = 1
OLDEST = {"torch": (2, 11), "torchvision": (0, 26), "accelerate": (1, 10), "numpy": (2, 0), "safetensors": (0, 5)}
"""Versions that are supported."""
_OPTIONAL = ("deepspeed", "wandb", "onnxruntime")
_GIB = 2**30
_FREE_BYTES = 5 * _GIB, _GIB // 2
"""Of the run directory's disk: less is a warning, less still a failure."""
_SHM_BYTES = _GIB // 2, 64 * 2**20 + 1
"""Of /dev/shm, likewise: NCCL needs some for each pair of GPUs, and 64 MiB is what a container gets unasked."""
_FSYNC_SECONDS = 0.1, 5.0
_SKEW_SECONDS = 1.0
_OPEN_FILES = 1024
_ONE_NODE_BYTES_PER_SECOND = 0.2e9
"""What ranks of one host exchange at least: through its memory, even with gloo on a small machine."""
_SHARE_OF_LINK = 0.5, 0.1
_LATENCY_SECONDS = 0.01, 0.2
"""Of a sum of four bytes: a step makes tens of sums, and none of a cluster's networks takes a tenth of this."""
_MESSAGE_BYTES = 2**20
_BUSY_SECONDS = 1.0
"""How long the sums of one size may take."""
_REACH_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found."""

    check: str
    state: str
    """`ok`, `warning` or `failed`."""
    found: str
    hint: str = ""
    """What to do, unless it is ok."""


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, state="ok", found=found)


def warning(check: str, found: str, hint: str) -> Finding:
    """The run works, but not as well as it could."""
    return Finding(check=check, state="warning", found=found, hint=hint)


def failed(check: str, found: str, hint: str) -> Finding:
    """The run would not work."""
    return Finding(check=check, state="failed", found=found, hint=hint)


def graded(check: str, found: str, hint: str, value: float, warns_below: float, fails_below: float) -> Finding:
    """By a value that should be large."""
    if value < fails_below:
        return failed(check, found, hint)
    return warning(check, found, hint) if value < warns_below else ok(check, found)


def attempt(check: str, function: Callable[[], Finding]) -> Finding:
    """The finding of `function`; what it raises is a failure, and its message says what to do."""
    try:
        return function()
    except UserError as error:  # "what was found; what to do"
        found, _, hint = " ".join(str(error).split()).rpartition("; ")
        return failed(check, found, hint) if found else failed(check, hint, "mend what it names")
    except Exception as error:
        return failed(check, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], "mend what it names")


# --- this process and this host ----------------------------------------------------------------------------------


def needed_extras(config: Config) -> list[str]:
    """Optional packages that the config asks for."""
    found = ["deepspeed"] if config.strategy.name == "deepspeed" else []
    return found + (["wandb"] if config.tracking.wandb in ("online", "offline") else [])


def check_versions(extras: Sequence[str] = ()) -> Finding:
    """Packages that are missing or older than supported; `extras` are optional ones that are needed all the same."""
    found, old, absent = {"python": platform.python_version()}, [], []
    for name in (*OLDEST, *_OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in OLDEST or name in extras:
                old.append(f"{name} is missing")
            else:
                absent.append(name)
            continue
        oldest = OLDEST.get(name, (0,))
        if tuple(int(part) for part in found[name].split("+")[0].split(".")[:2]) < oldest:
            old.append(f"{name} {found[name]} is older than {'.'.join(map(str, oldest))}")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    text += f"; not installed, and not needed: {', '.join(absent)}" if absent else ""
    packages = f"'.[{','.join(extras)}]'" if extras else "."
    hint = f"pip install -U -e {packages}"
    return failed("versions", f"{'; '.join(old)} ({text})", hint) if old else ok("versions", text)


def check_gpus(device: torch.device) -> Finding:
    """The GPUs that this process sees, and whether they reach each other's memory."""
    count = torch.cuda.device_count()
    if count == 0:
        if device.type == "cpu" and shutil.which("nvidia-smi") is None:
            return ok("GPUs", "none; ranks compute on the CPU")
        return warning("GPUs", "nvidia-smi is here and torch finds none", "mend the driver, or set run.device=cpu")
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(count)))
    lonely = [f"{i}-{j}" for i in range(count) for j in range(i) if not torch.cuda.can_device_access_peer(i, j)]
    text = f"{count} x {names}"
    if lonely:
        return warning("GPUs", f"{text}; no peer access between {', '.join(lonely)}", "see nvidia-smi topo -m")
    return ok("GPUs", f"{text}, each reaches the memory of the others" if count > 1 else text)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """The size of the file system in memory."""
    if not path.is_dir():
        return warning("shared memory", f"{path} is missing", "mount a tmpfs there")
    total = shutil.disk_usage(path).total
    hint = "give the container more, e.g. docker run --shm-size=8g"
    return graded("shared memory", f"{path}: {_size(total)}, {_size(_SHM_BYTES[0])} wanted", hint, total, *_SHM_BYTES)


def check_open_files() -> Finding:
    """How many files a process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    return graded("open files", f"limit {soft:,}, {_OPEN_FILES:,} wanted", "ulimit -n 65536", count, _OPEN_FILES, 256)


def _note_signal(came: list[int], number: int, frame: object) -> None:
    came.append(number)


def check_signals() -> Finding:
    """Whether the signals that stop a run arrive in this process."""
    lost = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        came: list[int] = []
        before = signal.signal(number, partial(_note_signal, came))
        try:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 1
            while not came and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            signal.signal(number, before)
        lost += [] if came else [number.name]
    if lost:
        return failed("signals", f"{', '.join(lost)} blocked", "they are inherited so: see what starts the ranks")
    return ok("signals", "SIGTERM, SIGUSR1 and SIGINT arrive")


# --- the run directory -------------------------------------------------------------------------------------------


def check_run_directory(path: Path) -> Finding:
    """Whether it can be written, has room and keeps what is written fast enough."""
    run_dir = RunDir(path)
    run_dir.open()
    free = shutil.disk_usage(path).free
    seconds = []
    with tempfile.TemporaryDirectory(dir=path, prefix=".doctor-") as folder:
        for i in range(5):
            started = time.perf_counter()
            write_atomic(Path(folder) / str(i), bytes(2**20))
            seconds.append(time.perf_counter() - started)
    sync = statistics.median(seconds)
    text = (
        f"{path}: {_size(free)} free, {_size(_FREE_BYTES[0])} wanted; 1 MiB is on the disk after {1000 * sync:.1f} ms,"
        f" {1000 * _FSYNC_SECONDS[0]:.0f} ms or less wanted"
    )
    by_room = graded("run directory", text, "make room, or give another run.dir", free, *_FREE_BYTES)
    hint = "checkpoints will take long: give a run.dir on a faster disk"
    by_speed = graded("run directory", text, hint, -sync, *(-limit for limit in _FSYNC_SECONDS))
    return max((by_room, by_speed), key=_rank_of_state)


def check_checkpoint(path: Path) -> Finding:
    """Writes a checkpoint and reads it back."""
    if not os.access(path, os.W_OK):
        return failed("checkpoint", f"{path}: there is no directory to write one to", "see the line run directory")
    with tempfile.TemporaryDirectory(dir=path, prefix=".doctor-") as folder:
        store = CheckpointStore(
            Path(folder) / "checkpoints",
            keep_last=1,
            keep_best=1,
            keep_every_steps=None,
            on_write_error="raise",
        )
        tensors = {"weight": torch.randn(2**20)}
        started = time.perf_counter()
        store.begin_save(1, {"model": tensors}, {})
        store.wait(must_succeed=True)
        checkpoint = store.load_newest()
        seconds = time.perf_counter() - started
        if checkpoint is None or weights_sha256(checkpoint.tensors["model"]) != weights_sha256(tensors):
            return failed("checkpoint", f"{path}: does not read back as it was written", "give another run.dir")
    return ok("checkpoint", f"4 MiB written and read back, every byte, in {seconds:.2f} s")


def check_shared(communicator: Communicator, path: Path) -> Finding:
    """Whether all ranks see the same run directory. A collective."""
    token = communicator.broadcast(secrets.token_hex(8))
    name = path / f".doctor-{token}"
    error = ""
    if communicator.rank == 0:
        try:
            write_atomic(name, token)
        except OSError as caught:
            error = caught.strerror or str(caught)
    written = communicator.broadcast(error)
    deadline = time.monotonic() + 5  # a network file system may show a new name late
    while not written and not name.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = communicator.all_gather_object((socket.gethostname(), not written and name.exists()))
    if communicator.rank == 0 and not written:
        name.unlink()
    if written:
        return failed("run directory shared", f"{path}: cannot be written ({written})", "give another run.dir")
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        hint = "give a run.dir on a file system that all nodes share"
        return failed("run directory shared", f"{path}: {', '.join(blind)} do not see what rank 0 writes", hint)
    hosts = len({host for host, _ in seen})
    return ok("run directory shared", f"{len(seen)} rank(s) on {hosts} host(s) see what rank 0 writes")


# --- data and network --------------------------------------------------------------------------------------------


def check_data(config: Config) -> Finding:
    """Whether the data set is here and every byte as it was, or can be fetched."""
    url = missing_download(config.data)
    if url is not None:
        problem = unreachable(url)
        if problem:
            hint = f"fetch it where there is a network (dist-cifar data), or put it into data.root={config.data.root}"
            return failed("data", f"{config.data.source} is not here, and {url} is out of reach ({problem})", hint)
        return warning("data", f"{config.data.source} is not here; {url} answers", "fetch it first: dist-cifar data")
    dataset = load_dataset(config.data)
    arrays = Arrays(
        train_images=dataset.train.images,
        train_labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        classes=dataset.classes,
    )
    if content_sha256(arrays) != dataset.content_sha256:
        text = f"{dataset.directory}: not the bytes that were decoded, by their SHA-256"
        return failed("data", text, "remove that folder: it is made anew; then look at the disk that it is on")
    count = len(dataset.train.labels) + len(dataset.test.labels)
    return ok("data", f"{config.data.source}: {count:,} images, sha256 {dataset.content_sha256[:12]} verified")


def check_tracking(config: Config, environ: Mapping[str, str]) -> Finding:
    """Whether W&B can be reached, if it will be asked for."""
    from dist_cifar.tracking.wandb_tracker import is_wanted_online

    if not is_wanted_online(config, environ):
        return ok("W&B", "not used online: disabled, offline, or no key")
    url = environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    problem = unreachable(url)
    if problem:
        return warning("W&B", f"{url} is out of reach ({problem})", "the run goes on offline; upload it later")
    return ok("W&B", f"{url} answers")


def unreachable(url: str) -> str | None:
    """Why no connection to the server of `url` can be made; None if it can."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return None if Path(parts.path).exists() else "there is no such file"
    try:
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection(address, timeout=_REACH_SECONDS):
            return None
    except OSError as error:
        return str(error)


# --- between ranks -----------------------------------------------------------------------------------------------


def check_backend(communicator: Communicator, env: DistEnv) -> Finding:
    """What the ranks talk through."""
    if communicator.world_size == 1:
        return ok("backend", "one rank: nothing to talk to")
    backend = "nccl" if communicator.device.type == "cuda" else "gloo"
    interface = interface_towards(env.master_addr)
    places = communicator.all_gather_object(f"{socket.gethostname()}: {interface or 'unknown'}")
    return ok("backend", f"{backend}; interfaces towards rank 0: {', '.join(dict.fromkeys(places))}")


def check_clocks(communicator: Communicator) -> Finding:
    """How far the hosts' clocks are apart, at most."""
    communicator.all_gather_object(None)
    started = time.monotonic()
    times = communicator.all_gather_object(time.time())
    blur = time.monotonic() - started
    skew = max(0.0, max(times) - min(times) - blur)
    text = f"at most {max(times) - min(times):.3f} s apart, {_SKEW_SECONDS:g} s or less wanted"
    hint = "let NTP or chrony set the clocks: time limits and logs go by them"
    return warning("clocks", text, hint) if skew > _SKEW_SECONDS else ok("clocks", text)


def expected_bytes_per_second(env: DistEnv) -> tuple[float, str]:
    """What the link between ranks should carry, and where that is known from."""
    if not env.has_several_nodes:
        return _ONE_NODE_BYTES_PER_SECOND, "one host"
    interface = interface_towards(env.master_addr)
    try:
        megabits = int(Path(f"/sys/class/net/{interface}/speed").read_text())
    except (OSError, ValueError):
        megabits = -1
    if megabits <= 0:
        return 125e6, f"{interface}, of unknown speed: 1 Gbit/s"
    return megabits * 1e6 / 8, f"{interface} of {megabits / 1000:g} Gbit/s"


def check_sums(communicator: Communicator, env: DistEnv) -> Finding:
    """Time and bandwidth of an all-reduce, against what the link should carry. A collective."""
    size = communicator.world_size
    if size == 1:
        return ok("all-reduce", "one rank: nothing to reduce")
    latency = max(communicator.all_gather_object(statistics.median(communicator.time_all_reduces(4, 20))))
    nbytes, slowest = _MESSAGE_BYTES, 0.0
    while True:
        slowest = max(communicator.all_gather_object(statistics.median(communicator.time_all_reduces(nbytes, 3))))
        if 3 * 4 * slowest > _BUSY_SECONDS or nbytes >= 64 * _MESSAGE_BYTES:
            break
        nbytes *= 4
    rate = 2 * (size - 1) / size * nbytes / slowest
    expected, source = min(communicator.all_gather_object(expected_bytes_per_second(env)))
    text = (
        f"4 bytes in {1e6 * latency:,.0f} us, {1e6 * _LATENCY_SECONDS[0]:,.0f} us or less wanted; {nbytes // 2**20} MiB"
        f" in {1000 * slowest:.1f} ms, {rate / 1e9:.3g} GB/s on the wire, {_SHARE_OF_LINK[0] * expected / 1e9:.3g} GB/s"
        f" wanted, half of what the link should carry ({source})"
    )
    hint = "see that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the fast network, and what else uses it"
    by_rate = graded("all-reduce", text, hint, rate, *(share * expected for share in _SHARE_OF_LINK))
    by_latency = graded("all-reduce", text, hint, -latency, *(-limit for limit in _LATENCY_SECONDS))
    return max((by_rate, by_latency), key=_rank_of_state)


def check_exactness(config: Config) -> Finding:
    """Ten steps at two world sizes and through two kills, bit for bit: `verify` on a small network, on this host."""
    sizes = "1,2" if config.run.device == "cpu" or not torch.cuda.is_available() else "1"
    with tempfile.TemporaryDirectory(prefix="dist_cifar-doctor-") as folder:
        command = [sys.executable, "-m", "dist_cifar", "verify", "--steps", "10", "--world-sizes", sizes]
        command += ["--dir", f"{folder}/runs", "--json", f"{folder}/found.json", f"run.device={config.run.device}"]
        command += ["data.source=synthetic", "data.synthetic_train_size=1200", "data.synthetic_test_size=100"]
        command += ["data.validation_size=100", "model.name=resnet20", "batch.global_size=64", "compute.precision=fp32"]
        done = subprocess.run(
            command, env=_lone(os.environ), capture_output=True, text=True, timeout=300, start_new_session=True
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            return failed("exactness", f"{' '.join(last)}", "run dist-cifar verify, and see docs/exactness.md")
        digest = json.loads(Path(folder, "found.json").read_text())["phases"][0]["digest"]
    return ok("exactness", f"10 steps at world sizes {sizes}, killed and resumed: all bits equal ({digest})")


def _lone(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank of this job."""
    from dist_cifar.tools.verify.plan import rank_environ

    kept = rank_environ(environ, DistEnv())
    return {name: value for name, value in kept.items() if name not in {*DistEnv().variables(), "TORCHELASTIC_RUN_ID"}}


# --- all of them -------------------------------------------------------------------------------------------------


def doctor(config: Config, env: DistEnv, device: torch.device, *, json_file: Path | None) -> int:
    """Makes all checks, prints the table on rank 0 and returns the exit code. On every rank of a job."""
    assert config.run.dir is not None  # the config resolved it
    path = Path(config.run.dir).expanduser()
    is_main_process = env.rank == 0
    findings: list[Finding] = []
    places = (RunDir(path).checkpoints, path, *path.parents)
    made = [place for place in places if not os.path.lexists(place)] if is_main_process else []

    def end() -> int:
        code = EXIT_FAILED if any(finding.state == "failed" for finding in findings) else EXIT_DONE
        for place in made:  # else an empty run directory would be taken for a run
            with contextlib.suppress(OSError):
                place.rmdir()
        if is_main_process:
            print(text(findings), flush=True)
            if json_file is not None:
                listed = [asdict(finding) for finding in findings]
                facts = {"ok": code == EXIT_DONE, "world_size": env.world_size, "findings": listed}
                write_atomic(json_file, json.dumps(facts, indent=2) + "\n")
        return code

    own = [
        attempt("versions", lambda: check_versions(needed_extras(config))),
        attempt("GPUs", lambda: check_gpus(device)),
        attempt("shared memory", check_shared_memory),
        attempt("open files", check_open_files),
        attempt("signals", check_signals),
    ]
    try:
        communicator = Communicator(env, device=device, timeout_seconds=config.run.timeout_seconds)
    except LaunchError as error:
        findings += own
        findings.append(failed("ranks", str(error), "see why that rank did not start; the other checks need it"))
        return end()

    def end_without(failure: Failure) -> None:
        """Another rank is lost: no collective can follow. Ends the process."""
        hint = "see the log of that rank and its node; the other checks need it"
        findings[:] = [finding for finding in findings if finding.check != "ranks"]  # they had answered at first
        findings.append(failed("ranks", failure.sentence(communicator.identities), hint))
        code = end()
        sys.stdout.flush()
        os._exit(code)

    watch = communicator.watch(end_without)

    try:
        findings += [worst(each) for each in zip(*communicator.all_gather_object(own), strict=True)]
        findings.append(ok("ranks", f"{env.world_size} answer (launcher: {env.launcher})"))
        findings.append(check_backend(communicator, env))
        findings.append(check_sums(communicator, env))
        findings.append(check_clocks(communicator))
        for check, function in (
            ("run directory", lambda: check_run_directory(path)),
            ("checkpoint", lambda: check_checkpoint(path)),
            ("data", lambda: check_data(config)),
            ("W&B", lambda: check_tracking(config, os.environ)),
        ):
            findings.append(communicator.broadcast(attempt(check, function) if is_main_process else None))
        findings.append(check_shared(communicator, path))
    except (RuntimeError, OSError) as error:
        if watch is None:
            raise
        end_without(watch.report(error))
    if watch is not None:
        watch.close()
    communicator.close()
    if is_main_process:
        findings.append(attempt("exactness", lambda: check_exactness(config)))
    return end()


_STATES = ("ok", "warning", "failed")


def _rank_of_state(finding: Finding) -> int:
    return _STATES.index(finding.state)


def worst(findings: Sequence[Finding]) -> Finding:
    """The worst of what ranks have found in one check, with the ranks that did; the first one's if all are well."""
    found = max(findings, key=_rank_of_state)
    ranks = [rank for rank, other in enumerate(findings) if other.state == found.state]
    if found.state == "ok" or len(findings) == 1:
        return found
    facts: dict[str, Any] = asdict(found) | {"found": f"rank {', '.join(map(str, ranks))}: {found.found}"}
    return Finding(**facts)


def text(findings: Sequence[Finding]) -> str:
    """The table."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.check:<{width}}  {finding.found}")
        if finding.hint:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.hint}")
    count = {state: sum(finding.state == state for finding in findings) for state in _STATES}
    lines.append(f"{count['ok']} ok, {count['warning']} warning(s), {count['failed']} failed")
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.0f} MiB"
