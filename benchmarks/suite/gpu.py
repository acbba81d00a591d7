"""What only a GPU can tell: the tests that need one, the promise, speeds, the default recipe, the sanitizers, parity.

    benchmarks/gpu.sh --out FOLDER

Contract: each part is a process of its own with a limit, in order of worth, so that what is slow or broken costs the
others nothing; a part that fails is in the result. Writes `gpu.json` and `gpu.md`, a page of the same for people, after
every part. Without a GPU the same parts run on the CPU, small: what that shows is that they run. Exits with 1 if a part
has failed.

Several ranks share one GPU in `worlds`, which NCCL refuses: there the bytes travel through gloo and the host, and all
else is what a GPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from dist_cifar.config import Config, load_config
from dist_cifar.data.batching import plan_batches
from dist_cifar.distributed.collectives import Communicator, Group
from dist_cifar.distributed.launch_env import DistEnv, read_env
from dist_cifar.models import build_model
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.run.provenance import hardware, make_deterministic, versions
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.strategy import build_strategy
from dist_cifar.strategy.compute import kept_casts

REPOSITORY = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
MODEL, BATCH = ("resnet18", 1024) if ON_GPU else ("resnet8", 16)
WORLD_SIZES = (1, 1, 2, 4, 8) if ON_GPU else (1, 2)
STEPS = 8 if ON_GPU else 2
IMAGES = (20_000, 2_000) if ON_GPU else (400, 80)
SPEEDS = {
    "exact, 8 x 128": {},
    "exact, 8 x 1: the host's time": {"batch.global_size": 8},
    "exact, 8 x 256": {"batch.global_size": 2048},
    "exact, 1 x 128: a rank of eight": {"batch.global_size": 128, "strategy.virtual_ranks": 1},
    "exact, compiled": {"compute.compile": "on"},
    "ddp, 1 x 1024": {"strategy.name": "ddp"},
    "ddp, compiled": {"strategy.name": "ddp", "compute.compile": "on"},
}


class ThroughTheHost(Communicator):
    """Ranks that share a GPU: their exchange goes over gloo."""

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, counts: list[int], group: Group) -> None:
        on_host = torch.empty(received.shape)
        own = [counts[group.place]] * len(group.ranks)
        dist.all_to_all_single(on_host, sent.cpu(), counts, own, group=group.handle)
        received.copy_(on_host)

    def all_gather(self, gathered: torch.Tensor, part: torch.Tensor, group: Group) -> None:
        on_host = torch.empty(gathered.shape)
        super().all_gather(on_host, part.cpu(), group)
        gathered.copy_(on_host)


class Job:
    """Steps of a config on images that stay on the device."""

    def __init__(self, config: Config, communicator: Communicator) -> None:
        self._config, is_exact = config, config.strategy.name == "exact"
        if is_exact:
            make_deterministic(communicator.device)
        elif ON_GPU:
            torch.use_deterministic_algorithms(False)
        rank, world_size = communicator.rank, communicator.world_size
        slices = config.strategy.virtual_ranks if is_exact else world_size
        batch = config.batch.global_size
        assert batch is not None
        self.plan = plan_batches(
            config.batch, config.train, slices=slices, rank=rank, world_size=world_size, train_size=batch
        )
        model = build_model(config.model, num_classes=10, seed=0)
        self.strategy = build_strategy(model, config, communicator=communicator, plan=self.plan)
        self.sums, self._device = TrainingSums(communicator.device, may_skip=False), communicator.device
        self.draw(0)

    def draw(self, seed: int) -> None:
        """This rank's share of a batch of random images."""
        generator, plan = torch.Generator().manual_seed(seed), self.plan
        images = torch.randn(plan.global_size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (plan.global_size,), generator=generator)
        own = slice(plan.start, plan.start + plan.per_rank_size)
        self._images = images[own].to(self._device).contiguous(memory_format=torch.channels_last)
        self._labels = labels[own].to(self._device)

    def step(self) -> torch.Tensor:
        sizes = self.plan.micro_sizes
        with kept_casts(self._config, self._device):
            for images, labels in zip(self._images.split(sizes), self._labels.split(sizes), strict=True):
                logits = self.strategy.forward(images)
                loss = cross_entropy(logits, labels)
                self.strategy.backward(loss)
                self.sums.add(loss, logits, labels)
        return self.strategy.step(1e-3)


def config_of(precision: str = "bf16", **values: Any) -> Config:
    """The config of a job; keys may have dots."""
    given = {"model.name": MODEL, "batch.global_size": BATCH, "strategy.virtual_ranks": 8, "compute.compile": "off"}
    given |= {"compute.precision": precision} | values
    return load_config(None, [f"{key}={value}" for key, value in given.items()])


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# --- what parts run in processes of their own -----------------------------------------------------------------------


def world(precision: str) -> None:
    """One rank of several on the first GPU: prints the digest of weights and optimizer after some steps."""
    torch.set_num_threads(1)
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    communicator = ThroughTheHost(read_env(os.environ), device=torch.device("cpu"), timeout_seconds=120)
    communicator.device = DEVICE
    job = Job(config_of(precision), communicator)
    for step in range(STEPS):
        job.draw(step)
        norm = job.step()
    digest = weights_sha256(job.strategy.model_state_dict() | job.strategy.optimizer_state_dict())
    assert len(set(communicator.all_gather_object(digest))) == 1
    if communicator.rank == 0:
        found = {"world_size": communicator.world_size, "precision": precision, "sha256": digest, "norm": norm.item()}
        print(json.dumps(found))
    communicator.close()


def speed(name: str) -> None:
    """Prints how fast one GPU takes steps, how long the host is busy with one, and its kernels."""
    torch.set_num_threads(1)
    values = SPEEDS[name] if ON_GPU else {key: value for key, value in SPEEDS[name].items() if "batch" not in key}
    job = Job(config_of(**values), Communicator(DistEnv(), device=DEVICE, timeout_seconds=60))
    for _ in range(5 if ON_GPU else 1):
        job.step()
    synchronize()
    seconds, host = [], []
    for _ in range(30 if ON_GPU else 2):
        begun = time.perf_counter()
        job.step()
        host.append(time.perf_counter() - begun)
        synchronize()
        seconds.append(time.perf_counter() - begun)
    found: dict[str, Any] = {
        "step_milliseconds": round(1e3 * statistics.median(seconds), 3),
        "host_milliseconds": round(1e3 * statistics.median(host), 3),
        "images_per_second": round(job.plan.global_size / statistics.median(seconds)),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if ON_GPU else None,
    }
    print(json.dumps(found | kernels(job)))


def kernels(job: Job) -> dict[str, Any]:
    """What one step starts, and what takes longest."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as profiled:
        job.step()
        synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    longest = sorted(profiled.key_averages(), key=lambda row: -getattr(row, key))[:12]
    return {
        "kernels": len(on_gpu),
        "kernel_milliseconds": round(sum(event.self_device_time_total for event in on_gpu) / 1e3, 3),
        "longest": [[row.key[:60], row.count, round(getattr(row, key) / 1e3, 3)] for row in longest],
    }


# --- the parts ------------------------------------------------------------------------------------------------------


def lines_of_json(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]


def run(command: Sequence[Any], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command; 124 if it took longer."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def train(scratch: Path, name: str, *overrides: str) -> list[Any]:
    """The command of a short training on generated images."""
    small = [] if ON_GPU else ["model.name=resnet8", "batch.global_size=16", "run.threads_per_rank=1"]
    images = [f"data.synthetic_train_size={IMAGES[0]}", f"data.synthetic_test_size={IMAGES[1]}"]
    words = ["data.source=synthetic", *images, f"data.validation_size={IMAGES[1]}", "tracking.wandb=disabled", *small]
    words += [f"run.dir={scratch / name}", "run.device=auto"]
    return [sys.executable, "-m", "dist_cifar", "train", *words, *overrides]


def part_tests(scratch: Path, seconds: float) -> dict[str, Any]:
    """The tests that need a GPU; elsewhere they are skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    code, output = run(command, seconds)
    return {"ok": code == 0, "found": output.strip().splitlines()[-1:], "output": output}


def part_worlds(scratch: Path, seconds: float) -> dict[str, Any]:
    """Whether ranks that share a GPU have the same bits, however many."""
    found, output, deadline = [], "", time.monotonic() + seconds
    for precision in ("bf16", "fp32"):
        for world_size in WORLD_SIZES:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", world_size]
            command = [*launcher, __file__, "--worker", "world", precision]
            code, said = run(command, max(1.0, deadline - time.monotonic()), OMP_NUM_THREADS="1")
            output += said
            found += lines_of_json(said) or [{"world_size": world_size, "precision": precision, "exit": code}]
    digests = {
        precision: {row.get("sha256") for row in found if row["precision"] == precision}
        for precision in ("bf16", "fp32")
    }
    return {
        "ok": all(len(seen) == 1 and None not in seen for seen in digests.values()),
        "found": found,
        "output": output,
    }


def part_speed(scratch: Path, seconds: float) -> dict[str, Any]:
    """Images/s of the strategies on one GPU."""
    found, output, ok, deadline = {}, "", True, time.monotonic() + seconds
    for name in SPEEDS if ON_GPU else list(SPEEDS)[:1]:
        command = [sys.executable, __file__, "--worker", "speed", name]
        code, said = run(command, max(1.0, deadline - time.monotonic()))
        rows = lines_of_json(said)
        found[name], ok = rows[-1] if rows else {"exit": code}, ok and bool(rows)
        output += said
    return {"ok": ok, "found": found, "output": output}


def part_recipe(scratch: Path, seconds: float) -> dict[str, Any]:
    """The default recipe as a user runs it, with the table of a step."""
    steps = ("train.max_steps=90", "run.log_every_steps=14", "run.profile=true")
    code, output = run(train(scratch, "recipe", *(steps if ON_GPU else ("train.max_steps=3",))), seconds)
    return {"ok": code == 0, "found": re.findall(r"(?m)^(?:train|  [a-z ]+ +\d).*$", output), "output": output}


def part_verify(scratch: Path, seconds: float) -> dict[str, Any]:
    """Kill and resume, each step compared."""
    command = train(scratch, "verify")
    command[3:4] = ["verify"]
    command = [word for word in command if not str(word).startswith("run.dir=")]
    count = max(1, torch.cuda.device_count()) if ON_GPU else 2
    sizes = ",".join(str(2**i) for i in range(count.bit_length()))
    code, output = run([*command, "--world-sizes", sizes, "--steps", "8", "--dir", scratch / "verify"], seconds)
    return {"ok": code == 0, "found": output.strip().splitlines()[-6:], "output": output}


def part_sanitizers(scratch: Path, seconds: float) -> dict[str, Any]:
    """Races between streams as torch sees them, and faults of the kernel as the hardware does."""
    command = train(scratch, "sanitizer", "train.max_steps=4", "model.name=resnet20", "batch.global_size=256")
    if ON_GPU:
        code, output = run(command, seconds, TORCH_CUDA_SANITIZER="1")
    else:
        code, output = run(train(scratch, "sanitizer", "train.max_steps=2"), seconds)
    found = [f"TORCH_CUDA_SANITIZER: exit {code}"]
    if ON_GPU and shutil.which("compute-sanitizer"):
        tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        test = "tests/augment/test_triton_gpu.py"
        memory, said = run(
            [*tool, sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", test], seconds
        )
        found, output, code = [*found, f"compute-sanitizer: exit {memory}"], output + said, code or memory
    return {"ok": code == 0, "found": found, "output": output}


def part_strategies(scratch: Path, seconds: float) -> dict[str, Any]:
    """Whether the other strategies train as `exact` does: the loss of the first steps."""
    found: dict[str, Any] = {}
    output, deadline, overrides = "", time.monotonic() + seconds, ("train.max_steps=20", "run.log_every_steps=10")
    for name in ("exact", "ddp", "fsdp", "deepspeed"):
        one = ("strategy.virtual_ranks=1", "compute.compile=off", f"strategy.name={name}")
        code, said = run(train(scratch, name, *overrides, *one), max(1.0, deadline - time.monotonic()))
        losses = re.findall(r"(?m)^train .*?loss ([\d.]+)", said)
        found[name] = {"exit": code, "losses": [float(loss) for loss in losses]}
        output += said
    first = found["exact"]["losses"]
    near = (
        [row["losses"] and abs(row["losses"][0] / first[0] - 1) < 0.05 for row in found.values()] if first else [False]
    )
    return {"ok": all(near), "found": found, "output": output}


PARTS: dict[str, tuple[Callable[[Path, float], dict[str, Any]], float]] = {
    "tests": (part_tests, 150),
    "worlds": (part_worlds, 150),
    "speed": (part_speed, 200),
    "recipe": (part_recipe, 70),
    "verify": (part_verify, 120),
    "sanitizers": (part_sanitizers, 90),
    "strategies": (part_strategies, 120),
}
"""What is done, in order of worth, and how many seconds it may take."""


def facts() -> dict[str, Any]:
    """The machine."""
    found: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "gpus": []}
    for index in range(torch.cuda.device_count() if ON_GPU else 0):
        memory = torch.cuda.get_device_properties(index).total_memory
        found["gpus"].append(f"{torch.cuda.get_device_name(index)}, {memory / 2**30:.0f} GiB")
    if ON_GPU:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    return found


def page(result: dict[str, Any]) -> str:
    """The same for people."""
    machine = ", ".join(result["gpus"]) or "no GPU: the parts ran on the CPU, small"
    lines = ["# What a GPU says of dist_cifar", "", f"{machine}; {result['hardware']}; {result['versions']}", ""]
    lines += ["| part | | seconds |", "|---|---|---|"]
    lines += [
        f"| {name} | {'ok' if row['ok'] else 'FAILED'} | {row['seconds']} |" for name, row in result["parts"].items()
    ]
    for name, row in result["parts"].items():
        found = row["found"]
        rows = found.items() if isinstance(found, dict) else [("", one) for one in found]
        lines += ["", f"## {name}", "", *(f"- {label}{': ' if label else ''}{one}" for label, one in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the parts that are asked for and writes both files after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder of gpu.json and gpu.md; default: the current one"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        {"world": world, "speed": speed}[options.worker[0]](options.worker[1])
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "gpu", **facts(), "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.parts:
            part, seconds = PARTS[name]
            begun = time.monotonic()
            row = part(Path(scratch), seconds)
            (options.out / f"gpu-{name}.log").write_text(row.pop("output"), encoding="utf-8")
            result["parts"][name] = row | {"seconds": round(time.monotonic() - begun)}
            print(f"{name}: {'ok' if row['ok'] else 'FAILED, see gpu-' + name + '.log'}", flush=True)
            (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (options.out / "gpu.md").write_text(page(result), encoding="utf-8")
    sys.exit(0 if all(row["ok"] for row in result["parts"].values()) else 1)


if __name__ == "__main__":
    main()
