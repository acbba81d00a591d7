"""Compares two commits of the trainer: whether they give the same bits, train as fast and start as fast.

    python benchmarks/suite/compare_commits.py bits BEFORE AFTER --images ZIP
    python benchmarks/suite/compare_commits.py speed BEFORE AFTER --images ZIP --rounds 3
    python benchmarks/suite/compare_commits.py startup BEFORE AFTER --images ZIP --rounds 7

Contract: the two commits may share no module, so this script imports nothing of the package. It checks each commit out
below `--work-dir`, runs it by its command line and reads what its run directories hold. Every run has the packages of
this interpreter, no other checkout's modules and a compiler cache of its own commit. A summary that names another
commit is an error.

`bits` trains every cell on both commits. A cell is equal if the weights are the same to the last bit, and so is every
number that the run reports but its times: losses, accuracies, learning rates, gradient norms. Its images are a fixed
part of the zip, small enough that 40 steps are two epochs and cross an evaluation. It exits with 1 if anything differs.
A cell that is done is not run again.

`speed` and `startup` let the commits take turns, in an order that is swapped from round to round, and give the ratio
of AFTER to BEFORE within a round. Run them on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 1800.0
POLL_SECONDS = 0.2
RENAMED: dict[str, str] = {}
"""Keys of the config, as they are called here, that a later commit refuses, and what they are called there: for example
`{"train.strategy": "strategy.name"}`. The new name is used on a commit whose resolved config has it."""
IMAGES_PER_CLASS = {"train": 280, "test": 20}
VALIDATION_SIZE = 240
SKIPPED_ROWS = 3
"""Rows of `metrics.jsonl` at the start of a run that `speed` leaves out."""
NO_EDITABLE_INSTALL = """\
import sys
sys.meta_path = [finder for finder in sys.meta_path if "_EditableFinder" not in repr(finder)]
"""
"""A sitecustomize.py. An editable install of another checkout would supply the modules that a commit lacks."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training that both commits run."""

    name: str
    config: str = "cpu_resnet20"
    launcher: str = "torchrun"
    """`python`, `torchrun` or `accelerate`."""
    ranks: tuple[int, ...]
    """Numbers of ranks; the job is killed and resumed with the next one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    same_weights_as: str | None = None
    """Another cell that must end with the same weights."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two commits."""

    commit: str
    tree: Path
    """Its checkout."""
    home: Path
    """What its runs write."""
    names: dict[str, str]
    """The part of `RENAMED` that it needs."""
    overrides: tuple[str, ...]


def trained(model: str, strategy: str, precision: str, ranks: tuple[int, ...], **overrides: Any) -> Cell:
    """A cell of one model and strategy on the real images."""
    return Cell(
        name=f"{model}-{strategy}-{precision}-{'-'.join(map(str, ranks))}",
        config={"resnet20": "cpu_resnet20", "resnet18": "cifar10_resnet18"}[model],
        launcher="python" if ranks == (1,) else "torchrun",
        ranks=ranks,
        overrides={"train.strategy": strategy, "train.precision": precision, "batch.global_size": 128} | overrides,
    )


def bits_cells() -> list[Cell]:
    """What `bits` runs."""
    end = "train.max_steps"
    chain = trained("resnet20", "exact", "fp32", (4, 2, 1), **{end: 40, "checkpoint.every_steps": 5})
    return [
        Cell(name="quickstart", config="quickstart", launcher="accelerate", ranks=(2,)),
        *(trained("resnet20", "exact", kind, (ranks,), **{end: 40}) for kind in ("fp32", "bf16") for ranks in (1, 2)),
        *(trained("resnet20", "ddp", kind, (2,), **{end: 40}) for kind in ("fp32", "bf16")),
        trained("resnet18", "exact", "bf16", (1,), **{end: 6, "batch.global_size": 64}),
        Cell(**vars(chain) | {"same_weights_as": "resnet20-exact-fp32-1"}),
        trained("resnet20", "deepspeed", "fp32", (2,), **{end: 20, "train.zero_stage": 1}),
        trained("resnet20", "fsdp", "fp32", (2,), **{end: 20}),
    ]


def speed_cells() -> list[Cell]:
    """What `speed` runs; a row of the log is a second or two on two cores."""
    return [
        trained(model, strategy, precision, (ranks,), **{"run.log_every_steps": steps})
        for precision in ("bf16", "fp32")
        for ranks in (2, 1)
        for model, steps in (("resnet20", 5), ("resnet18", 1))
        for strategy in ("exact", "ddp")
    ]


def startup_cells() -> list[Cell]:
    """What `startup` runs: the time to the help, and to the first row of the log, which is that of the first step."""
    first = {"run.log_every_steps": 1}
    return [
        Cell(name="help", ranks=()),
        trained("resnet20", "exact", "fp32", (1,), **first),
        trained("resnet20", "exact", "fp32", (2,), **first),
        trained("resnet20", "ddp", "fp32", (2,), **first),
    ]


def check_out(commit: str, work: Path, overrides: Sequence[str], taken: Sequence[Path]) -> Side:
    """The checkout of `commit`, made if it is not there; no home is in `taken`."""

    def git(*arguments: str, cwd: Path = REPOSITORY) -> str:
        return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    tree, home = work / "trees" / commit[:12], work / ",".join([commit[:12], *overrides]).replace("/", "_")
    if not tree.exists():
        git("worktree", "add", "--force", "--detach", str(tree), commit)
    if git("rev-parse", "HEAD", cwd=tree) != commit or git("status", "--porcelain", cwd=tree):
        raise RuntimeError(f"{tree} is not a clean checkout of {commit}; remove it by `git worktree remove --force`")
    while home in taken:
        home = home.with_name(f"{home.name},again")
    (home / "site").mkdir(parents=True, exist_ok=True)
    (home / "site/sitecustomize.py").write_text(NO_EDITABLE_INSTALL, encoding="utf-8")
    side = Side(commit=commit, tree=tree, home=home, names={}, overrides=tuple(overrides))
    if RENAMED:
        show = [sys.executable, "dist_cifar/train.py", "--print-config"]
        shown = subprocess.run(show, cwd=tree, env=environment(side), check=True, capture_output=True, text=True).stdout
        known = {f"{section}.{name}" for section, fields in yaml.safe_load(shown).items() for name in fields}
        side.names.update({old: new for old, new in RENAMED.items() if new in known})
    return side


def environment(side: Side) -> dict[str, str]:
    """What the processes of a side see."""
    ours = ("WANDB_", "ACCELERATE_", "SLURM_", "OMP_", "NUMBA_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "PYTHONPATH": f"{side.home / 'site'}{os.pathsep}{side.tree}",
        "NUMBA_CACHE_DIR": str(side.tree.parents[1] / "numba" / side.tree.name),
        "XDG_CACHE_HOME": str(side.home / "cache"),
    }


def command(side: Side, cell: Cell, ranks: int, images: Path, run: Path) -> list[str]:
    """What is typed in the checkout."""
    if not ranks:
        return [sys.executable, "-m", "dist_cifar", "--help"]
    launchers = {
        "python": [sys.executable],
        "torchrun": [f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={ranks}"],
        "accelerate": [f"{BIN}/accelerate", "launch", "--config_file", "launch/accelerate/cpu.yaml"],
    }
    values: dict[str, Any] = {"run.dir": run, "tracking.wandb": "disabled"}
    if cell.config != "quickstart":
        values |= {"run.device": "cpu", "data.source": "folder", "data.root": images}
        values |= {"data.validation_size": VALIDATION_SIZE}
    values |= cell.overrides
    overrides = [f"{side.names.get(key, key)}={value}" for key, value in values.items()]
    program = ["dist_cifar/train.py", "--config", f"configs/{cell.config}.yaml"]
    return [*launchers[cell.launcher], *program, *overrides, *side.overrides]


def run_until(
    typed: Sequence[str],
    side: Side,
    log: Path,
    reached: Callable[[], bool] | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> float:
    """Seconds until `reached`, when every process of the job is killed; without it, until the job has ended well.

    Raises `RuntimeError`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        began = time.monotonic()
        process = psutil.Popen(typed, cwd=side.tree, env=environment(side), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < began + LIMIT_SECONDS:
                if reached and reached():
                    return time.monotonic() - began
                time.sleep(poll_seconds)
            if process.poll() == 0 and not reached:
                return time.monotonic() - began
        finally:  # a launcher's ranks have sessions of their own, so that there is no one process group
            job = [process, *process.children(recursive=True)] if process.poll() is None else []
            for member in job:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(job)
    lines = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
    raise RuntimeError(f"{' '.join(typed)}: ended with {process.poll()} or too late; {log} ends with\n{lines}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def train(side: Side, cell: Cell, images: Path) -> dict[str, Any]:
    """What a cell ends with; trains it unless that was done before."""
    home = side.home / "bits" / cell.name
    run, typed = home / "run", home / "command.json"
    commands = [command(side, cell, ranks, images, run) for ranks in cell.ranks]
    done = (run / "summary.json").exists() and json.loads((run / "status.json").read_text())["status"] == "done"
    if not (done and typed.exists() and json.loads(typed.read_text()) == commands):
        shutil.rmtree(home, ignore_errors=True)
        steps = cell.overrides.get("train.max_steps", 0)
        for number, each in enumerate(commands, 1):

            def saved(least: float = steps * number / len(commands) - 5) -> bool:
                return any(int(path.name.split("-")[1]) >= least for path in run.glob("checkpoints/step-*"))

            run_until(each, side, home / "log", saved if number < len(commands) else None)
        typed.write_text(json.dumps(commands), encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if summary["git_revision"] != side.commit:
        raise RuntimeError(f"{run}: revision {summary['git_revision']} was run, not {side.commit}")
    starts = [row for row in rows_of(run / "events.jsonl") if row["event"] == "started"]
    if tuple(row["world_size"] for row in starts) != cell.ranks or not all(row["step"] for row in starts[1:]):
        raise RuntimeError(f"{run}: was to be resumed with {cell.ranks} ranks, and began so: {starts}")
    fields = ("kind", "step", "loss", "accuracy", "lr", "grad_norm", "count", "class_accuracy", "split", "epoch")
    numbers = [{name: row.get(name) for name in fields} for row in rows_of(run / "metrics.jsonl")]
    numbers += [{name: summary.get(name) for name in ("test_confusion", "best_step", "data_sha256")}]
    return {
        "weights_sha256": summary["weights_sha256"],
        "numbers_sha256": hashlib.sha256(json.dumps(numbers).encode()).hexdigest(),
        "precision": summary["precision"],
        "resumed_at_steps": [row["step"] for row in starts[1:]],
    }


def compare_bits(sides: Sequence[Side], cells: Sequence[Cell], images: Path) -> dict[str, Any]:
    """Runs all cells and prints a table."""
    part = sides[0].home.parent / f"part-{'-'.join(map(str, IMAGES_PER_CLASS.values()))}.zip"
    if not part.exists():
        write_part(images, part)
    found: dict[str, list[dict[str, Any]]] = {}
    rows = []
    print(f"{'cell':28}{'before':14}{'after':14}weights  numbers", flush=True)
    for cell in cells:
        found[cell.name] = [train(side, cell, part) for side in sides]
        before, after = found[cell.name]
        same = {name: before[f"{name}_sha256"] == after[f"{name}_sha256"] for name in ("weights", "numbers")}
        row: dict[str, Any] = {"cell": cell.name, "before": before, "after": after, "equal": all(same.values())}
        line = "  ".join("equal".ljust(7) if is_same else "DIFFER " for is_same in same.values())
        if cell.same_weights_as in found:
            other = [each["weights_sha256"] for each in found[cell.same_weights_as]]
            undisturbed = other == [before["weights_sha256"], after["weights_sha256"]]
            row |= {"same_weights_as": cell.same_weights_as, "equal": row["equal"] and undisturbed}
            line += f"{'equal to' if undisturbed else 'DIFFER from'} {cell.same_weights_as}"
        if before["precision"] != after["precision"]:
            line += f"{before['precision']} became {after['precision']}"
        print(f"{cell.name:28}{before['weights_sha256'][:12]:14}{after['weights_sha256'][:12]:14}{line}", flush=True)
        rows.append(row)
    return {"all_equal": all(row["equal"] for row in rows), "images_per_class": IMAGES_PER_CLASS, "results": rows}


def write_part(images: Path, part: Path) -> None:
    """Writes the first `IMAGES_PER_CLASS` of each class of the zip `images` to another one."""
    seen: Counter[Path] = Counter()
    unfinished = part.with_suffix(".tmp")
    with zipfile.ZipFile(images) as source, zipfile.ZipFile(unfinished, "w") as target:
        for name in sorted(name for name in source.namelist() if not name.endswith("/")):
            folder = Path(name).parent
            if seen[folder] < IMAGES_PER_CLASS[folder.parent.name]:
                seen[folder] += 1
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    unfinished.replace(part)


def rate(side: Side, cell: Cell, images: Path, seconds: float) -> float:
    """Images/s of all rows of the log after the first ones, for so many seconds."""
    run = side.home / "speed" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)

    def steady() -> list[dict[str, Any]]:
        return [row for row in rows_of(run / "metrics.jsonl") if row["kind"] == "train"][SKIPPED_ROWS - 1 :]

    def is_long_enough() -> bool:
        rows = steady()
        return bool(rows) and rows[-1]["seconds"] - rows[0]["seconds"] >= seconds

    run_until(command(side, cell, cell.ranks[0], images, run), side, run.parent / "log", is_long_enough)
    return statistics.harmonic_mean([row["images_per_second"] for row in steady()[1:]])  # rows of as many images each


def start_seconds(side: Side, cell: Cell, images: Path) -> float:
    """Seconds from the command to the help, or to the end of the first step."""
    run = side.home / "startup" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    typed, log, rows = command(side, cell, sum(cell.ranks), images, run), run.parent / "log", run / "metrics.jsonl"
    reached = (lambda: rows.exists() and rows.stat().st_size > 0) if cell.ranks else None
    return run_until(typed, side, log, reached, poll_seconds=0.002)


def take_turns(
    sides: Sequence[Side], cells: Sequence[Cell], rounds: int, measure: Callable[[Side, Cell], float], digits: int
) -> dict[str, Any]:
    """Both commits' samples of every cell and their ratio within each round."""
    samples: dict[str, list[tuple[float, float]]] = {cell.name: [] for cell in cells}
    for number in range(rounds):
        for cell in cells:
            pair = {side.home: measure(side, cell) for side in (sides if number % 2 == 0 else sides[::-1])}
            before, after = (pair[side.home] for side in sides)
            samples[cell.name].append((before, after))
            line = f"round {number + 1} {cell.name:26}{before:10.{digits}f}{after:10.{digits}f}{after / before:8.3f}"
            print(line, file=sys.stderr, flush=True)
    rows = []
    print(f"{'cell':26}{'before':>10}{'after':>10}   after/before (min to max), n = {rounds}")
    for name, pairs in samples.items():
        row: dict[str, Any] = {"cell": name, "n": rounds}
        columns = {"before": [pair[0] for pair in pairs], "after": [pair[1] for pair in pairs]}
        for label, values in (columns | {"ratio": [after / before for before, after in pairs]}).items():
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            row |= {f"{label}_{kind}": round(value, 4) for kind, value in spread.items()}
        rows.append(row)
        line = f"{name:26}{row['before_median']:10.{digits}f}{row['after_median']:10.{digits}f}"
        print(f"{line}   {row['ratio_median']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})")
    return {"rounds": rounds, "results": rows}


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Runs one comparison, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("bits", "speed", "startup"))
    parser.add_argument("before", metavar="BEFORE", help="a commit")
    parser.add_argument("after", metavar="AFTER", help="a commit")
    parser.add_argument("--images", type=Path, required=True, help="zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--cells", nargs="+", metavar="PATTERN", help="cells to run; default: all, speed *-bf16-2")
    parser.add_argument("--rounds", type=int, default=3, help="of speed and startup (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a run of speed (default %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "runs/compare_commits", help="checkouts and runs")
    parser.add_argument(
        "--after-override", action="append", default=[], help="key=value of AFTER alone: bits must differ"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/commits_<mode>.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the running job would stay behind
    load, work, images = os.getloadavg()[0], options.work_dir.resolve(), options.images.resolve()
    before = check_out(options.before, work, (), ())
    sides = [before, check_out(options.after, work, options.after_override, [before.home])]
    everything = {"bits": bits_cells, "speed": speed_cells, "startup": startup_cells}[options.mode]()
    patterns = options.cells or ["*-bf16-2" if options.mode == "speed" else "*"]
    cells = [cell for cell in everything if any(fnmatch(cell.name, pattern) for pattern in patterns)]
    if not cells:
        parser.error(f"--cells: there are only {', '.join(cell.name for cell in everything)}")
    if options.mode == "bits":
        measured = compare_bits(sides, cells, images)
    elif options.mode == "speed":
        measured = take_turns(
            sides, cells, options.rounds, lambda side, cell: rate(side, cell, images, options.seconds), 1
        )
    else:
        for side in sides:  # the caches are filled before anything is timed
            for cell in cells:
                start_seconds(side, cell, images)
        measured = take_turns(sides, cells, options.rounds, lambda side, cell: start_seconds(side, cell, images), 3)
    units = {"bits": {}, "speed": {"unit": "images/s"}, "startup": {"unit": "seconds"}}
    packages = ("torch", "torchvision", "accelerate", "deepspeed", "numpy", "numba", "pillow")
    result = {
        "benchmark": f"commits_{options.mode}",
        "before": sides[0].commit,
        "after": sides[1].commit,
        "after_overrides": options.after_override,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "load_average_before": round(load, 2),
        "data": images.name,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        **units[options.mode],
        **measured,
    }
    out = options.out or REPOSITORY / f"benchmarks/results/commits_{options.mode}.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if result.get("all_equal", True) else 1)


if __name__ == "__main__":
    main()
