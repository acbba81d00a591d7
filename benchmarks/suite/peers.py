"""End to end against named peers: the same model, batch, precision, augmentation and images, in one interleaved run.

    python benchmarks/suite/peers.py ZIP --out benchmarks/results/peers.json

Contract: every program of `peers/` does the job as the documentation it names does it, on our network; ours is the
real command. In a round, every row of one model and one shape (ranks x threads) runs once, each as a fresh command, one
at a time, in an order that rotates from round to round. A rate is taken between marks at the end of steps, the first
few left out; a ratio within a round. The variants of a peer:

- `documented`: fp32, the memory format of torch's default, the number of workers that its documentation has;
- `tuned`: bf16 autocast, channels-last and fused Adam added by hand, and the better of no workers and the documented
  number: both run in the first round, the faster one in all.

Ours is stopped by SIGTERM after its last counted step, since its end would be an evaluation. It logs a row in as many
steps as warm up (2 or 4), and its rate is taken between rows; the end of its first step is that of the first row less
the mean time of the steps between. Images are decoded and our kernels are compiled before anything is timed.

Run it on a machine that does nothing else: about 50 minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from dist_cifar.augment import cpu
from dist_cifar.config import load_config
from dist_cifar.data.dataset import load_dataset
from dist_cifar.ops import fused_batchnorm, numba_jit
from dist_cifar.run.provenance import hardware, versions

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = REPOSITORY / "benchmarks/peers"
BIN = Path(sys.executable).parent
GLOBAL_BATCH = 128
SHAPES = {"1x2": (1, 2), "2x1": (2, 1)}
"""Ranks and threads of each."""
STEPS = {
    "resnet20": {"warm_up": 4, "fp32": 16, "bf16": 32},
    "resnet18": {"warm_up": 2, "fp32": 4, "bf16": 8},
}
"""Steps that warm up, and those that count in each precision: five to ten seconds on two cores. Ours logs once in as
many steps as warm up, so those that count are a multiple of that."""
POLL_SECONDS = 0.05
SAMPLE_SECONDS = 1.0
"""Between two samples of the memory."""
LIMIT_SECONDS = 180.0
COMMENTS = {"measured": "# measured", "tuned": "# tuned"}
"""Comments at the end of lines of a peer's program that belong to the measurement, and to the variant `tuned`."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program of `peers/`, and what its documentation says of it."""

    program: str
    packages: tuple[str, ...]
    workers: int
    """`num_workers` of each rank, as documented."""
    shapes: tuple[str, ...] = tuple(SHAPES)


PEERS = {
    "accelerate": Peer(program="accelerate_cv.py", packages=("accelerate",), workers=4),
    "ddp_tutorial": Peer(program="ddp_tutorial.py", packages=(), workers=0),
    "pytorch_cifar": Peer(program="pytorch_cifar.py", packages=(), workers=2, shapes=("1x2",)),
    "timm": Peer(program="timm_train.py", packages=("timm",), workers=4),
    "lightning": Peer(
        program="lightning_cifar.py",
        packages=("lightning",),
        workers=(os.cpu_count() or 1) // 2,
    ),
}
OURS, CONSTANT = "dist_cifar", "constant"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result: what runs, on which model and shape."""

    model: str
    shape: str
    name: str
    """A peer, `OURS` or `CONSTANT`."""
    variant: str
    """A peer's variant; the strategy of ours."""
    precision: str
    workers: int | None = None
    """Of each rank; none where there is no DataLoader."""

    @property
    def is_ours(self) -> bool:
        return self.name in (OURS, CONSTANT)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one row."""

    images_per_second: float
    data_wait_share: float
    startup_seconds: float
    """From the command to the end of the first step."""
    peak_pss_bytes: int
    """Of the whole process tree, pages that are shared counted once."""
    peak_rss_bytes: int
    """The same, shared pages counted in every process that has them."""


DIGITS = {
    "images_per_second": 1,
    "data_wait_share": 4,
    "startup_seconds": 2,
    "peak_pss_bytes": 0,
    "peak_rss_bytes": 0,
}
"""The figures of a sample and how many digits of them are kept."""
AGAINST = {"documented": ("fp32", "bf16"), "tuned": ("bf16",)}
"""Which precisions of ours are compared with the best peer of each variant."""


# --- arithmetic --------------------------------------------------------------------------------------------------


def rate_and_wait(ranks: Sequence[Sequence[Sequence[float]]], warm_up: int, batch: int) -> tuple[float, float]:
    """Images/s by the first rank's marks after `warm_up` steps, and the mean share of the time that ranks waited.

    A mark is a clock reading at the end of a step and the seconds waited for data until then; `batch` is the global
    batch.
    """
    first, last = ranks[0][warm_up - 1], ranks[0][-1]
    seconds = last[0] - first[0]
    waited = statistics.mean(marks[-1][1] - marks[warm_up - 1][1] for marks in ranks)
    return (len(ranks[0]) - warm_up) * batch / seconds, waited / seconds


def rate_and_wait_of_log(rows: Sequence[dict[str, Any]], batch: int) -> tuple[float, float]:
    """The same from the rows of `metrics.jsonl`; the steps up to the first row warm up."""
    first, last = rows[0], rows[-1]
    seconds = last["seconds"] - first["seconds"]
    waited = sum(
        row["data_wait_share"] * (row["step"] - before["step"]) * batch / row["images_per_second"]
        for before, row in pairwise(rows)
    )
    return (last["step"] - first["step"]) * batch / seconds, waited / seconds


def lines_of_code(source: str, without: Sequence[str]) -> int:
    """Lines that hold code: no blank line, comment or docstring, and none that ends in a comment of `without`."""
    tree = ast.parse(source)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip())
        and not line.lstrip().startswith("#")
        and number not in docstrings
        and not line.rstrip().endswith(tuple(without))
        for number, line in enumerate(source.splitlines(), 1)
    )


def spread(name: str, values: Sequence[float], digits: int | None) -> dict[str, float]:
    """Median, minimum and maximum of `values`."""
    functions = (("median", statistics.median), ("min", min), ("max", max))
    return {f"{name}_{kind}": round(function(values), digits) for kind, function in functions}


def ratios(mine: dict[int, Sample], other: dict[int, Sample]) -> list[float]:
    """Images/s of `mine` over those of `other` in each round."""
    return [mine[number].images_per_second / other[number].images_per_second for number in mine]


def slower_tuned(rates: dict[Row, float]) -> set[Row]:
    """The tuned rows that are not the fastest of their peer, model and shape."""
    fastest: dict[tuple[str, ...], Row] = {}
    tuned = [row for row in rates if row.variant == "tuned"]
    for row in sorted(tuned, key=rates.__getitem__):
        fastest[row.model, row.shape, row.name] = row
    return set(tuned) - set(fastest.values())


Samples = dict[Row, dict[int, Sample]]
"""For each row its samples by the number of the round."""


def result_rows(samples: Samples) -> list[dict[str, Any]]:
    """The rows of the result, those of a peer with the rates of ours over its own."""
    result = []
    for row, rounds in samples.items():
        ranks, threads = SHAPES[row.shape]
        into: dict[str, Any] = {"model": row.model, "ranks": ranks, "threads_per_rank": threads, "name": row.name}
        into |= {"variant": row.variant, "precision": row.precision, "workers": row.workers, "n": len(rounds)}
        for name in DIGITS:
            values = [getattr(sample, name) for sample in rounds.values()]
            into |= spread(name, values, DIGITS[name] or None)
        for mine in () if row.is_ours else ours_beside(samples, row):
            values = ratios(samples[mine], rounds)
            into |= spread(f"{mine.variant}_{mine.precision}_over_this", values, 3)
        result.append(into | code_and_config(row))
    return result


def comparisons(samples: Samples) -> list[dict[str, Any]]:
    """Ours against the best documented and the best tuned peer of each model and shape, best by the median rate.

    Ours in bf16 stands against both, in fp32 against the documented ones.
    """
    result = []
    for model, shape in dict.fromkeys((row.model, row.shape) for row in samples):
        for variant, precisions in AGAINST.items():
            peers = [row for row in samples if (row.model, row.shape, row.variant) == (model, shape, variant)]
            if not peers:
                continue
            best = max(peers, key=lambda row: statistics.median(rates(samples[row])))
            for mine in ours_beside(samples, best):
                if mine.precision in precisions:
                    into = {"model": model, "shape": shape, "strategy": mine.variant, "precision": mine.precision}
                    into |= {"against": f"best {variant}", "peer": best.name, "workers": best.workers}
                    result.append(into | spread("ratio", ratios(samples[mine], samples[best]), 3))
    return result


def ours_beside(samples: Samples, row: Row) -> list[Row]:
    """The rows of ours for the same model and shape."""
    return [mine for mine in samples if mine.name == OURS and (mine.model, mine.shape) == (row.model, row.shape)]


def rates(rounds: dict[int, Sample]) -> list[float]:
    """Images/s of each round."""
    return [sample.images_per_second for sample in rounds.values()]


def code_and_config(row: Row) -> dict[str, int]:
    """What a user writes for this row: lines of code and of configuration."""
    if row.is_ours:
        return {"lines_of_code": 0, "lines_of_config": len(_config(row, Path("ZIP"), Path()).splitlines())}
    without = list(COMMENTS.values()) if row.variant == "documented" else [COMMENTS["measured"]]
    source = (PROGRAMS / PEERS[row.name].program).read_text(encoding="utf-8")
    return {"lines_of_code": lines_of_code(source, without), "lines_of_config": 0}


# --- commands ----------------------------------------------------------------------------------------------------


def all_rows(models: Sequence[str], shapes: Sequence[str], names: Sequence[str]) -> list[Row]:
    """Every row of the named peers, models and shapes, those of one model and shape beside each other."""
    rows = []
    for model in models:
        for shape in shapes:
            for name in names:
                if name in PEERS and shape in PEERS[name].shapes:
                    documented = PEERS[name].workers
                    variants = [("documented", "fp32", documented)]
                    variants += [("tuned", "bf16", workers) for workers in dict.fromkeys((0, documented))]
                elif name == OURS:
                    variants = [(strategy, kind, None) for strategy in ("ddp", "exact") for kind in ("fp32", "bf16")]
                elif name == CONSTANT:
                    variants = [("ddp", kind, None) for kind in ("fp32", "bf16")]
                else:
                    continue
                rows += [
                    Row(model=model, shape=shape, name=name, variant=variant, precision=precision, workers=workers)
                    for variant, precision, workers in variants
                ]
    return rows


def _command(row: Row, config: Path) -> list[str]:
    ranks, _ = SHAPES[row.shape]
    torchrun = [f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    if row.is_ours:
        program = PROGRAMS / "constant.py" if row.name == CONSTANT else REPOSITORY / "dist_cifar/train.py"
        return [*(torchrun if ranks > 1 else [sys.executable]), str(program), "--config", str(config)]
    program = str(PROGRAMS / PEERS[row.name].program)
    if row.name == "accelerate":
        several = ["--config_file", str(REPOSITORY / "launch/accelerate/cpu.yaml"), "--num_processes", str(ranks)]
        single = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
        launch = [f"{BIN}/accelerate", "launch", *(several if ranks > 1 else [*single, "--dynamo_backend", "no"])]
        return [*launch, program, "--cpu", "--mixed_precision", "bf16" if row.variant == "tuned" else "no"]
    if row.name == "ddp_tutorial" or (row.name == "timm" and ranks > 1):
        return [*torchrun, program]
    return [sys.executable, program]  # Lightning starts its other ranks itself


def _config(row: Row, data: Path, scratch: Path) -> str:
    """The config file of a row of ours."""
    config = {
        "run": {
            "dir": str(scratch / "run"),
            "threads_per_rank": SHAPES[row.shape][1],
            "log_every_steps": STEPS[row.model]["warm_up"],
        },
        "data": {"source": "folder", "root": str(data), "cache_dir": str(scratch.parent / "cache")},
        "model": {"name": row.model},
        "batch": {"global_size": GLOBAL_BATCH},
        "train": {"strategy": row.variant, "precision": row.precision},
        "tracking": {"wandb": "disabled"},
    }
    return yaml.safe_dump(config, sort_keys=False)


def run(row: Row, data: Path, scratch: Path) -> Sample:
    """Runs the row's command once, with `scratch` (empty) for everything that it writes. Raises `RuntimeError`."""
    ranks, threads = SHAPES[row.shape]
    warm_up, counted = STEPS[row.model]["warm_up"], STEPS[row.model][row.precision]
    config = scratch / "config.yaml"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    if row.is_ours:
        config.write_text(_config(row, data, scratch), encoding="utf-8")
    else:
        job = {
            "model": row.model,
            "ranks": ranks,
            "batch": GLOBAL_BATCH // ranks,
            "steps": warm_up + counted,
            "tuned": row.variant == "tuned",
            "workers": row.workers,
            "data": str(scratch.parent / "images"),
            "out": str(scratch),
        }
        environment["PEERS_JOB"] = json.dumps(job)
    with open(scratch / "log", "w", encoding="utf-8") as log:
        watched = Watched(_command(row, config), environment, log)
        try:
            if row.is_ours:
                rows = watched.until_logged(scratch / "run/metrics.jsonl", 1 + counted // warm_up)
            else:
                watched.until_ended()
        except RuntimeError as error:
            log.flush()
            tail = Path(log.name).read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{row}: {error}\n{tail}") from None
        finally:
            watched.end()
    if row.is_ours:
        rate, wait = rate_and_wait_of_log(rows, GLOBAL_BATCH)
        first_step_at = watched.first_row_at - (warm_up - 1) * GLOBAL_BATCH / rate
    else:
        written = [json.loads((scratch / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
        if {result["threads"] for result in written} != {threads}:
            raise RuntimeError(f"{row}: did not run with {threads} threads")
        marks = [result["marks"] for result in written]
        first_step_at = marks[0][0][0]
        rate, wait = rate_and_wait(marks, warm_up, GLOBAL_BATCH)
    return Sample(
        images_per_second=rate,
        data_wait_share=wait,
        startup_seconds=first_step_at - watched.started,
        peak_pss_bytes=watched.peak_pss_bytes,
        peak_rss_bytes=watched.peak_rss_bytes,
    )


class Watched:
    """A command that runs, and the memory of its processes so far."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Any) -> None:
        self.started = time.monotonic()
        self.first_row_at = 0.0
        self.peak_pss_bytes = self.peak_rss_bytes = 0
        self._process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._seen: set[psutil.Process] = set()
        self._sample_at = self.started

    def until_ended(self) -> None:
        """Raises `RuntimeError` if the command fails."""
        while self._process.poll() is None:
            self._tick()
        if self._process.returncode:
            raise RuntimeError(f"exit code {self._process.returncode}")

    def until_logged(self, path: Path, count: int) -> list[dict[str, Any]]:
        """The first `count` rows of `metrics.jsonl`; then the command is stopped."""
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            if self._process.poll() is not None:
                raise RuntimeError(f"exit code {self._process.returncode} after {len(rows)} rows")
            self._tick()
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            rows = [json.loads(line) for line in lines][:count]
            if rows and not self.first_row_at:
                self.first_row_at = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        while self._process.poll() is None:
            self._tick()
        return rows

    def _tick(self) -> None:
        now = time.monotonic()
        if now > self.started + LIMIT_SECONDS:
            raise RuntimeError(f"not done after {LIMIT_SECONDS:g} s")
        if now >= self._sample_at:
            self._sample_at = now + SAMPLE_SECONDS
            self._sample_memory()
        time.sleep(POLL_SECONDS)

    def _sample_memory(self) -> None:
        pss_bytes = rss_bytes = 0
        for process in self._tree():
            try:
                memory = process.memory_full_info()
            except psutil.Error:  # it has just ended
                continue
            pss_bytes, rss_bytes = pss_bytes + memory.pss, rss_bytes + memory.rss
        self.peak_pss_bytes = max(self.peak_pss_bytes, pss_bytes)
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)

    def _tree(self) -> set[psutil.Process]:
        try:
            tree = {psutil.Process(self._process.pid)}
            tree.update(self._process.children(recursive=True))
        except psutil.Error:
            return set()
        self._seen |= tree
        return tree

    def end(self) -> None:
        """Leaves no process behind."""
        self._tree()
        for process in self._seen:
            if process.is_running():
                process.kill()
        self._process.wait()


# --- the benchmark -----------------------------------------------------------------------------------------------


def warm_up_kernels() -> None:
    """What numba compiles for any of our rows."""
    cpu.warm_up()
    for dtype in (torch.float32, torch.bfloat16):
        fused_batchnorm.warm_up(dtype)


def prepare(data: Path, scratch: Path) -> None:
    """Decodes the images once, for ours and for the peers, and compiles our kernels."""
    config = load_config(
        None, ["data.source=folder", f"data.root={data}", f"data.cache_dir={scratch / 'cache'}", "run.name=peers"]
    )
    dataset = load_dataset(config.data)
    images = scratch / "images"
    images.mkdir()
    np.save(images / "images.npy", dataset.train.images)
    np.save(images / "labels.npy", dataset.train.labels)
    normalisation = {"mean": list(map(float, dataset.stats.mean)), "std": list(map(float, dataset.stats.std))}
    (images / "statistics.json").write_text(json.dumps(normalisation), encoding="utf-8")
    numba_jit.warm_up(warm_up_kernels)


def run_again(row: Row, data: Path, scratch: Path) -> Sample:
    """`run`, for a peer a second time where the first one fails: a worker that was forked beside threads may hang."""

    def once() -> Sample:
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            return run(row, data, Path(own))

    try:
        return once()
    except RuntimeError as error:
        if row.is_ours:
            raise
        print(f"once more: {error}", file=sys.stderr)
    return once()


def measure(rows: Sequence[Row], data: Path, rounds: int) -> Samples:
    """All rounds of all rows."""
    samples: Samples = {row: {} for row in rows}
    cells = list(dict.fromkeys((row.model, row.shape) for row in rows))
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(data, scratch)
        for number in range(rounds):
            for cell in cells:
                turn = [row for row in samples if (row.model, row.shape) == cell]
                first = number * len(turn) // rounds
                for row in turn[first:] + turn[:first]:
                    sample = run_again(row, data, scratch)
                    samples[row][number] = sample
                    print(f"round {number + 1}: {label(row)} {sample.images_per_second:8.1f} images/s", file=sys.stderr)
            if number == 0:
                for row in slower_tuned({row: sample[0].images_per_second for row, sample in samples.items()}):
                    del samples[row]
    return samples


def label(row: Row) -> str:
    """The row in one line's beginning."""
    workers = "" if row.workers is None else f"{row.workers} workers"
    return f"{row.model:9}{row.shape:4} {row.name:15}{row.variant:11}{row.precision:5}{workers:10}"


def table(samples: Samples, result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [
        f"{result['hardware']}; global batch {GLOBAL_BATCH}, n = {result['rounds']} rounds; shape: ranks x threads",
        f"{'':56}{'images/s (min to max)':28}{'wait':>6}{'start':>8}{'memory':>10}{'code':>6}",
    ]
    for row, figures in zip(samples, result["results"], strict=True):
        rate, low, high = (figures[f"images_per_second_{kind}"] for kind in ("median", "min", "max"))
        speed = f"{rate:8.1f} ({low:.1f} to {high:.1f})"
        lines.append(
            f"{label(row):56}{speed:28}{figures['data_wait_share_median']:6.1%}"
            f"{figures['startup_seconds_median']:6.1f} s{figures['peak_pss_bytes_median'] / 2**20:6.0f} MiB"
            f"{figures['lines_of_code']:6}"
        )
    lines += ["", "ours over the best peer, within a round: median (min to max)"]
    for row in result["comparisons"]:
        ratio, low, high = (row[f"ratio_{kind}"] for kind in ("median", "min", "max"))
        lines.append(
            f"{row['model']:9}{row['shape']:4} {row['strategy']:6}{row['precision']:5} over the {row['against']:16}"
            f" ({row['peer']}, {row['workers']} workers): {ratio:.2f}x ({low:.2f} to {high:.2f})"
        )
    return "\n".join(lines)


def installed(names: Sequence[str]) -> list[str]:
    """The names without the peers whose packages are missing, which are named."""
    kept = []
    for name in names:
        missing = [package for package in (PEERS[name].packages if name in PEERS else ()) if find_spec(package) is None]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not installed", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def merged(earlier: dict[str, Any], result: dict[str, Any], cells: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`result` of `cells`, (model, shape) each, with what `earlier` has of the others."""

    def place(row: dict[str, Any]) -> tuple[str, str]:
        return row["model"], row.get("shape") or f"{row['ranks']}x{row['threads_per_rank']}"

    order = [(model, shape) for model in STEPS for shape in SHAPES]
    rows = {}
    for name in ("results", "comparisons"):
        kept = [row for row in earlier.get(name, []) if place(row) not in cells]
        rows[name] = sorted(kept + result[name], key=lambda row: order.index(place(row)))
    return result | rows


def main() -> None:
    names = [*PEERS, OURS, CONSTANT]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=STEPS,
        default=list(STEPS),
        help="default: both; rows of the others in --out stay",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="ranks x threads; likewise")
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="rows to run (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    load, peers = round(os.getloadavg()[0], 2), installed(options.peers)
    rows = all_rows(options.models, options.shapes, peers)
    samples = measure(rows, options.data.resolve(), options.rounds)
    packages = {package for name in peers if name in PEERS for package in PEERS[name].packages}
    result = {
        "benchmark": "peers",
        "hardware": hardware(),
        "load_average_before": load,
        "data": options.data.name,
        "global_batch": GLOBAL_BATCH,
        "rounds": options.rounds,
        "steps": STEPS,
        "versions": versions() | {package: importlib.metadata.version(package) for package in sorted(packages)},
        "results": result_rows(samples),
        "comparisons": comparisons(samples),
    }
    print(table(samples, result))
    if options.out:
        earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        result = merged(earlier, result, [(model, shape) for model in options.models for shape in options.shapes])
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
