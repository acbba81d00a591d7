"""Writes the figures of README.md and docs/*.md from benchmarks/results/*.json.

    python benchmarks/publish/tables.py

Each block of a page between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by what the function of that name makes of
`results/NAME.json`, or of the results that `SOURCES` names. A test runs it and finds nothing to change.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks/results"


def headline(
    exactness: dict[str, Any],
    world_sizes: dict[str, Any],
    schedules: dict[str, Any],
    checkpoint_damage: dict[str, Any],
    peers: dict[str, Any],
    augment: dict[str, Any],
    real_job: dict[str, Any],
) -> str:
    """The few figures of the README."""
    (measured_on,) = {part["hardware"] for part in (exactness, checkpoint_damage, peers, augment, real_job)}
    (proved_on,) = {part["hardware"] for part in (world_sizes, schedules)}
    compared = exactness["results"] + world_sizes["results"]
    models = [f"{MODELS[model]} on {_world_sizes(rows)} ranks" for (model,), rows in grouped(compared, "model").items()]
    ours, pil = (
        next(row for row in augment["results"] if row["name"] == name) for name in ("dist_cifar", "torchvision PIL")
    )
    speeds = [
        f"`{row['strategy']}` {_ratio(row, 'ratio')}"
        for row in peers["comparisons"]
        if (row["model"], row["shape"], row["precision"], row["against"]) == ("resnet20", "2x1", "bf16", "best tuned")
    ]
    accuracy, wall = real_job["spread"]["test_accuracy"], real_job["spread"]["wall_seconds"]
    rows = [
        (
            "same bits on every number of ranks, and killed and resumed on others",
            f"{sum(row['equal'] for row in compared)} of {len(compared)} comparisons ({'; '.join(models)}; fp32 and"
            " bf16)",
        ),
        (
            "runs killed at random moments that end with the weights of an undisturbed run",
            f"{schedules['equal']} of {schedules['n']}",
        ),
        ("damaged checkpoints that are found", f"{checkpoint_damage['detected']:,} of {checkpoint_damage['n']:,}"),
        (
            "training speed over the fastest other program, tuned by hand (ResNet-20, bf16, 2 ranks)",
            f"{', '.join(speeds)}; n = {rounds(peers)}",
        ),
        (
            "augmentation on one core, with the pixels of torchvision's PIL transforms",
            f"{ours['images_per_second_median']:,} images/s ({ours['images_per_second_min']:,} to"
            f" {ours['images_per_second_max']:,}), {pil['ours_over_this_median']:.0f}x; n = {augment['rounds']}",
        ),
        (
            "test accuracy of a ResNet-20 after three epochs on two CPU ranks",
            f"{accuracy['median']:.1%} ({accuracy['min']:.1%} to {accuracy['max']:.1%}) in {wall['median']:.0f} s;"
            f" n = {real_job['n']} seeds",
        ),
    ]
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            *(f"| {what} | {measured} |" for what, measured in rows),
            "",
            f"Median (minimum to maximum) of n on an {measured_on}; kills and every number of ranks on an"
            f" {proved_on}. No GPU has been measured yet.",
        ]
    )


def _world_sizes(rows: list[dict[str, Any]]) -> str:
    """The numbers of ranks of some comparisons, as `1 to 8` or `1, 2, 4`."""
    sizes = sorted({size for row in rows for trial in row["trials"] for size in trial["world_sizes"]})
    is_whole = sizes == list(range(sizes[0], sizes[-1] + 1))
    return f"{sizes[0]} to {sizes[-1]}" if is_whole else ", ".join(map(str, sizes))


def accuracy(result: dict[str, Any]) -> str:
    """What the recipes reach: the mean over seeds, and how far they lie apart."""
    shown = [row for row in result["runs"] if row["change"] is None]
    lines = ["| recipe | epochs | test accuracy | with TTA | seconds | n | ranks, hardware |", "|---" * 7 + "|"]
    several = len({row["data"] for row in shown}) > 1
    kinds = grouped(shown, "recipe", "epochs", "hardware", "ranks", "data")
    for (recipe, epochs, hardware, ranks, data), rows in sorted(kinds.items()):
        accuracies = f"{_mean(rows, 'test_accuracy')} | {_mean(rows, 'test_accuracy_tta')}"
        alone = [row["wall_seconds"] for row in rows if row["alone"]]
        seconds = f"{statistics.median(alone):,.0f}" if alone else ""
        where = f"{ranks}, {hardware}" + (f", {data}" if several else "")
        lines.append(f"| `{recipe}` | {epochs:g} | {accuracies} | {seconds} | {len(rows)} | {where} |")
    note = (
        f"Mean and standard deviation over n seeds, images of {' or '.join(sorted({row['data'] for row in shown}))};"
        " seconds: the median of runs that had the machine for themselves."
    )
    for row in shown:
        if row["lr_reductions"]:
            cuts = ", ".join(f"to {lr:.1e} after epoch {epoch:g}" for epoch, lr in row["lr_reductions"])
            note += f" The plateau of `{row['recipe']}` (seed {row['seed']}) cut the learning rate {cuts}."
    return "\n".join([*lines, "", note])


def adam(result: dict[str, Any]) -> str:
    """What each change to Adam's recipe gains on the recipe above it, within a seed."""
    runs = sorted((row for row in result["runs"] if row["change"] is not None), key=lambda row: row["change"])
    lines = ["| recipe | test accuracy | gain, points | n |", "|---" * 4 + "|"]
    before: dict[tuple[int, str], float] = {}
    for (name,), rows in grouped(runs, "recipe").items():
        reached = {(row["seed"], row["hardware"]): row["test_accuracy"] for row in rows}
        gains = [f"{100 * (share - before[run]):+.2f}" for run, share in sorted(reached.items()) if run in before]
        lines.append(f"| {name} | {_mean(rows, 'test_accuracy')} | {', '.join(gains)} | {len(rows)} |")
        before = reached
    machines = " and ".join(f"an {name}" for name in sorted({row["hardware"] for row in runs}))
    data, epochs = (_one({"runs": runs}, name) for name in ("data", "epochs"))
    note = f"Images of {data}, {epochs:g} epochs, on {machines}; the gain of each seed on the line above."
    return "\n".join([*lines, "", note])


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The values that rows have."""
    return [row[name] for row in rows if row.get(name) is not None]


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    """The mean of a share over rows, and its standard deviation, in percent."""
    values = _column(rows, name)
    spread = f" +- {statistics.stdev(values):.2%}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2%}{spread}" if values else ""


PEER = "airbench94"
"""The program that `time_to_accuracy.py` compares with."""


def time_to_accuracy(result: dict[str, Any]) -> str:
    """Accuracy and seconds of a recipe, and of the peer in turns with it, on each machine."""
    lines = ["| program | test accuracy | with TTA | seconds | over airbench94 | n | hardware |", "|---" * 7 + "|"]
    compared = {(row["hardware"], row["program"], row["against"]): row for row in result["comparisons"]}
    for (hardware, program), rows in grouped(result["runs"], "hardware", "program").items():
        seconds = [row["seconds"] for row in rows]
        spread = f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(rows) > 1 else ""
        found = compared.get((hardware, program, PEER))
        ratio = _ratio(found, "seconds_ratio") if found else "1" if program == PEER else ""
        if found and found["n"] < len(rows):
            ratio += f", n = {found['n']}"
        lines.append(
            f"| {program} | {_mean(rows, 'test_accuracy')} | {_mean(rows, 'test_accuracy_tta')} |"
            f" {statistics.median(seconds):.0f}{spread} | {ratio} | {len(rows)} | {hardware} |"
        )
    between = []
    ours = [row for row in result["comparisons"] if row["against"] != PEER]
    for (program, against), rows in grouped(ours, "program", "against").items():
        ratios = [f"{_ratio(row, 'seconds_ratio')} (n = {row['n']}, {row['hardware']})" for row in rows]
        between.append(f"Seconds of {program} over {against}, on the same cores: {', '.join(ratios)}.")
    return "\n".join(
        [
            *lines,
            "",
            " ".join(
                [
                    "Accuracy: mean and standard deviation over n seeds. Seconds of initialisation, training and test:"
                    " median (and range), in turns on one machine; the ratio within a seed. Images of"
                    f" {_one(result, 'data')}.",
                    *between,
                ]
            ),
        ]
    )


def recipes(accuracy: dict[str, Any], time_to_accuracy: dict[str, Any]) -> str:
    """What each recipe reaches as it stands in configs/, in how much time, beside the peer: the most accurate first,
    and each on the machine that ran most of its seeds. All that is timed against the peer is of one machine, that of
    most comparisons."""
    compared = [row for row in time_to_accuracy["comparisons"] if row["against"] == PEER]
    machine = max(compared, key=lambda row: row["n"])["hardware"]
    timed = [
        row | {"recipe": row["program"].partition(", ")[0], "where": row["program"].partition(", ")[2]}
        for row in time_to_accuracy["runs"]
        if row["hardware"] == machine
    ]
    run_of = itemgetter("recipe", "where", "hardware", "seed")
    is_timed = set(map(run_of, timed))
    others = [
        row | {"where": f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}", "seconds": row["wall_seconds"]}
        for row in accuracy["runs"]
        if row["change"] is None and _epochs(row["recipe"]) in (None, row["epochs"])
    ]
    others = [row for row in others if run_of(row) not in is_timed]
    table: dict[str, list[dict[str, Any]]] = {}
    for (recipe, _, _), rows in grouped(timed + others, "recipe", "where", "hardware").items():
        if len(rows) > len(table.get(recipe, [])):
            table[recipe] = rows
    lines = ["| recipe | test accuracy | with TTA | minutes | n | hardware |", "|---" * 6 + "|"]
    for recipe, rows in sorted(table.items(), key=lambda item: -statistics.fmean(_column(item[1], "test_accuracy"))):
        alone = [row["seconds"] for row in rows if row.get("alone", True)]
        minutes = f"{statistics.median(alone) / 60:.1f}" if alone else ""
        cells = [f"`{recipe}`" if rows[0]["where"] else recipe, _mean(rows, "test_accuracy")]
        cells += [_mean(rows, "test_accuracy_tta"), minutes, str(len(rows))]
        lines.append(f"| {' | '.join([*cells, rows[0]['hardware']])}, {rows[0]['where'] or 'plain PyTorch'} |")
    return "\n".join(
        [
            *lines,
            "",
            "Mean and standard deviation over n seeds; median minutes of training and test, if nothing else ran."
            f" {_one(accuracy, 'data')} has CIFAR-10's images, re-encoded as JPEG, which are harder to tell apart.",
        ]
    )


def grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by these of their values, in the order in which they come."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _one(result: dict[str, Any], name: str) -> Any:
    """The value that all runs have."""
    (value,) = {run[name] for run in result["runs"]}
    return value


def _epochs(recipe: str) -> float | None:
    """The epochs of a recipe of configs/; None of one that is not there."""
    path = REPOSITORY / f"configs/{recipe}.yaml"
    if not path.exists():
        return None
    found = re.search(r"(?m)^  epochs: (\S+)$", path.read_text(encoding="utf-8").partition("\ntrain:")[2])
    return float(found[1]) if found else None


def real_job(result: dict[str, Any]) -> str:
    """Accuracy and speed of the real job."""
    accuracy, speed, wall = (result["spread"][name] for name in ("test_accuracy", "images_per_second", "wall_seconds"))
    same = "ends with the same weights" if result["same_weights_through_torchrun"] else "ENDS WITH OTHER WEIGHTS"
    return (
        f"On an {result['hardware']}, with {result['data']} as the images: test accuracy"
        f" {accuracy['median']:.1%} ({accuracy['min']:.1%} to {accuracy['max']:.1%}),"
        f" {speed['median']:,.0f} images/s ({speed['min']:,.0f} to {speed['max']:,.0f}), {wall['median']:.0f} s a run;"
        f" median and range of n = {result['n']} seeds. The same run through torchrun {same}."
    )


def augment(result: dict[str, Any]) -> str:
    """The table of the augmentation benchmark."""
    lines = ["| augmentation | images/s, one core | range | dist_cifar is |", "|---|---|---|---|"]
    for row in sorted(result["results"], key=lambda row: -row["images_per_second_median"]):
        low, high = row["images_per_second_min"], row["images_per_second_max"]
        ratio = "" if row["name"] == "dist_cifar" else f"{row['ours_over_this_median']:.0f}x"
        lines.append(f"| {row['name']} | {row['images_per_second_median']:,} | {low:,} to {high:,} | {ratio} |")
    return "\n".join(
        [*lines, "", f"Median and range of n = {result['rounds']} interleaved rounds, float32, {result['hardware']}."]
    )


def epoch(result: dict[str, Any]) -> str:
    """How much of a step the loop waits for data."""
    parts = [
        f"{row['precision']}: {row['ratio_median']:.1%} ({row['ratio_min']:.1%} to {row['ratio_max']:.1%}) of the"
        f" images/s of the same loop with one constant batch, data wait {row['data_wait_share_median']:.2%} of a step"
        for row in result["results"]
    ]
    return (
        "ResNet-20 on two ranks with one core each, real batches against a constant one. "
        + "; ".join(parts)
        + f". Median and range of n = {result['pairs']} pairs, {result['hardware']}."
    )


MODELS = {"resnet20": "ResNet-20", "resnet18": "ResNet-18"}
PEERS = {
    "accelerate": "Accelerate's example",
    "ddp_tutorial": "PyTorch's DDP tutorial",
    "pytorch_cifar": "pytorch-cifar",
    "timm": "timm",
    "lightning": "Lightning",
}
"""By their names in the results."""


def peers(result: dict[str, Any]) -> str:
    """Rates of all programs, and the ratios of ours to the best of the others."""
    cells = list(dict.fromkeys((row["model"], row["ranks"], row["threads_per_rank"]) for row in result["results"]))
    heads = [f"{MODELS[model]}, {ranks} x {threads}" for model, ranks, threads in cells]
    detail = cells[0]
    lines = [
        f"| images/s (ranks x threads) | {' | '.join(heads)} | first step after | data wait | memory | lines of code |",
        "|---" * (len(cells) + 5) + "|",
    ]
    programs: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in result["results"]:
        name = _program(row)
        if name is not None:
            programs.setdefault(name, {})[row["model"], row["ranks"], row["threads_per_rank"]] = row
    for name, rows in programs.items():
        rates = [f"{rows[cell]['images_per_second_median']:,.0f}" if cell in rows else "" for cell in cells]
        row = rows[detail]
        rates += [f"{row['startup_seconds_median']:.1f} s", f"{row['data_wait_share_median']:.1%}"]
        rates += [f"{row['peak_pss_bytes_median'] / 2**20:,.0f} MiB", str(row["lines_of_code"])]
        lines.append(f"| {name} | {' | '.join(rates)} |")
    lines += ["", f"| over the best of the others | {' | '.join(heads)} |", "|---" * (len(cells) + 1) + "|"]
    for strategy, precision, against in (
        ("ddp", "fp32", "best documented"),
        ("ddp", "bf16", "best documented"),
        ("exact", "bf16", "best documented"),
        ("ddp", "bf16", "best tuned"),
        ("exact", "bf16", "best tuned"),
    ):
        found = {
            (row["model"], row["shape"]): row
            for row in result["comparisons"]
            if (row["strategy"], row["precision"], row["against"]) == (strategy, precision, against)
        }
        ratios = [found[model, f"{ranks}x{threads}"] for model, ranks, threads in cells]
        texts = " | ".join(f"{_ratio(row, 'ratio')}, {PEERS[row['peer']]}" for row in ratios)
        lines.append(f"| `{strategy}` {precision} over the {against} | {texts} |")
    packages = ("torch", "accelerate", "timm", "lightning")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])
    return "\n".join(
        [
            *lines,
            "",
            f"Median (and range) of n = {rounds(result)} interleaved rounds, ratios within a round; each model"
            " and number of ranks in its own rounds. The same model,"
            f" images ({result['data']}), augmentation and global batch ({result['global_batch']}); all on"
            f" {result['hardware']}; {versions}. *Documented*: as the program's documentation has it, in fp32. *Tuned*:"
            " bf16, channels-last and fused Adam added by hand, and the better number of workers. The last four columns"
            f" are of {heads[0]}; lines are those of a user's program.",
        ]
    )


def rounds(result: dict[str, Any]) -> str:
    """Of `peers.json`, whose models and shapes may have been run on their own: a number, or two with `to`."""
    counts = sorted({row["n"] for row in result["results"] if row["name"] == "dist_cifar"})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _program(row: dict[str, Any]) -> str | None:
    """The name of a row of the table; none for what is no program."""
    if row["name"] == "dist_cifar":
        return f"**dist_cifar**, `{row['variant']}` {row['precision']}"
    return f"{PEERS[row['name']]}, {row['variant']}" if row["name"] in PEERS else None


def _ratio(row: dict[str, Any], name: str) -> str:
    median, low, high = (row[f"{name}_{kind}"] for kind in ("median", "min", "max"))
    return f"{median:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def constant(result: dict[str, Any]) -> str:
    """How near ours is to the same loop without data to prepare, for each model and shape of `peers.json`."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in result["results"]:
        if row["name"] in ("dist_cifar", "constant") and row["variant"] == "ddp":
            key = row["model"], row["ranks"], row["threads_per_rank"], row["precision"]
            found.setdefault(key, {})[row["name"]] = row["images_per_second_median"]
    texts = [
        f"{MODELS[model]} {precision}, {ranks} x {threads}: {rates['dist_cifar'] / rates['constant']:.3f}"
        for (model, ranks, threads, precision), rates in found.items()
    ]
    return (
        f"Images/s of `ddp` over those of the same command with one constant batch: {'; '.join(texts)} (ratios of"
        f" medians, n = {rounds(result)})."
    )


def startup(result: dict[str, Any]) -> str:
    """Seconds to the first step, of each command."""
    states = list(dict.fromkeys(row["state"] for row in reversed(result["results"])))
    heads = [f"{state}, s | {state}, of Accelerate's" for state in states]
    lines = [f"| model | ranks | command | {' | '.join(heads)} |", "|---" * (3 + 2 * len(states)) + "|"]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["results"]:
        name = "Accelerate's example" if row["name"] == "accelerate" else f"**dist_cifar**, `{row['name']}`"
        key = MODELS[row["model"]], str(row["ranks"]), f"{name}: `{row['launcher']}`"
        median, low, high = (row[f"seconds_{kind}"] for kind in ("median", "min", "max"))
        text = f"{median:.1f} ({low:.1f} to {high:.1f}) | "
        if "over_peer_median" in row:
            text += _ratio(row, "over_peer")
        found.setdefault(key, {})[row["state"]] = text
    lines += [
        f"| {' | '.join(key)} | {' | '.join(values[state] for state in states)} |" for key, values in found.items()
    ]
    cold = " *Cold*: the file caches were dropped before." if "cold" in states else ""
    return "\n".join(
        [
            *lines,
            "",
            "From the command to the end of the first optimizer step: median and range of"
            f" n = {result['rounds']} interleaved rounds, ratios within a round; {result['hardware']}.{cold}",
        ]
    )


def scaling(result: dict[str, Any]) -> str:
    """What a second rank gains on this machine."""

    def ratio(values: dict[str, float]) -> str:
        return f"{values['median']:.2f}x ({values['min']:.2f} to {values['max']:.2f})"

    columns = {
        "ddp_two_ranks_over_two_threads": "2 ranks x 1 thread over 1 rank x 2 threads",
        "ddp_over_plain_two_ranks": "over a hand-written DDP loop, 2 ranks",
        "ddp_over_plain_one_rank": "over a hand-written loop, 1 rank",
        "exact_over_ddp_two_ranks": "`exact` over `ddp`, 2 ranks",
    }
    lines = [f"| images/s of `ddp` | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for row in result["results"]:
        cells = " | ".join(ratio(row[name]) for name in columns)
        lines.append(f"| {MODELS[row['model']]} {row['precision']} | {cells} |")
    lines += [
        "",
        f"Median and range of n = {result['rounds']} interleaved rounds, ratios within a round; global batch"
        f" {result['global_batch']}, constant data, {result['hardware']}. The hand-written loops have the same model,"
        " precision, channels-last and fused Adam.",
    ]
    return "\n".join(lines)


def overhead(result: dict[str, Any]) -> str:
    """What stands beside the training, as shares of a step."""
    names = {"progress": "bar", "vote": "stop check", "log": "log", "checkpoint": "checkpoint", "writing": "writing it"}
    lines = [f"| share of a step | {' | '.join(names.values())} | together |", "|---" * (len(names) + 2) + "|"]
    for row in result["results"]:
        cells = [f"{row[name]['share_of_a_step']:.2%}" for name in names] + [f"{row['share_of_a_step']:.2%}"]
        step = row["step"]["milliseconds_median"]
        lines.append(f"| {MODELS[row['model']]} {row['precision']}, {step:.0f} ms | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"On {result['ranks']} ranks with a core each, global batch {result['global_batch']}, W&B offline:"
            f" {result['hardware']}. n is in `benchmarks/results/overhead.json`.",
        ]
    )


def settings(result: dict[str, Any]) -> str:
    """What each setting gains."""
    lines = ["| setting | model | threads | images/s | without it | gain |", "|---" * 6 + "|"]
    for row in result["results"]:
        rates = f"{row['images_per_second_median']:,.0f} | {row['images_per_second_without_median']:,.0f}"
        what = f"{row['setting']} | {MODELS[row['model']]} | {row['threads']}"
        lines.append(f"| {what} | {rates} | {_ratio(row, 'gain')} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`ddp`, bf16, one rank, global batch {result['global_batch']}: median and range of n = {result['rounds']}"
            f" interleaved rounds, {result['hardware']}.",
        ]
    )


def exactness(result: dict[str, Any]) -> str:
    """The table of the digests."""
    lines = ["| model | steps | world sizes | digest of the state | seconds, all trials |", "|---|---|---|---|---|"]
    for row in result["results"]:
        trials = ", ".join(" -> ".join(map(str, trial["world_sizes"])) for trial in row["trials"])
        seconds = sum(trial["seconds"] for trial in row["trials"])
        digest = f"`{row['digest']}`, all equal" if row["equal"] else "NOT EQUAL"
        lines.append(f"| {row['model']} {row['precision']} | {row['steps']} | {trials} | {digest} | {seconds:,.0f} |")
    where = f"With {result['data']} as the images, batch 128, on an {result['hardware']}"
    load = f"which did other work as well (load average {result['load_average_before']:g} at the start)"
    return "\n".join([*lines, "", f"{where}, {load}."])


def world_sizes(result: dict[str, Any]) -> str:
    """The digests of every number of ranks."""
    lines = ["| model | virtual ranks | steps | ranks, each alone and one after the other | digest |", "|---" * 5 + "|"]
    for row in result["results"]:
        sizes = [trial["world_sizes"][0] for trial in row["trials"] if len(trial["world_sizes"]) == 1]
        digest = f"`{row['digest']}`, all equal" if row["equal"] else "NOT EQUAL"
        name = f"{row['model']} {row['precision']}"
        lines.append(f"| {name} | {row['virtual_ranks']} | {row['steps']} | {min(sizes)} to {max(sizes)} | {digest} |")
    return "\n".join([*lines, "", f"With {result['data']} as the images, on an {result['hardware']}."])


def host_time(result: dict[str, Any]) -> str:
    """What a step costs its host."""
    lines = ["| without what saves operations | operations | time of the host |", "|---|---|---|"]
    for row in result["results"]:
        ratio = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        lines.append(f"| {row['variant']} | {row['operations']:,} | {ratio} |")
    first = result["results"][0]
    note = (
        f"Operations of a step of ResNet-18, bf16, {result['virtual_ranks']} virtual ranks on one rank. Time of a"
        f" ResNet-20 on images of 8x8 pixels over that of the first row, {first['milliseconds_median']:.0f} ms: median"
        f" and range of n = {result['n']} interleaved rounds on one core of an {result['hardware']}, which stands for a"
        " GPU's host."
    )
    return "\n".join([*lines, "", note])


def strategy(result: dict[str, Any]) -> str:
    """The cost of strategy exact, and its bytes."""

    def ratio(row: dict[str, Any], name: str) -> str:
        median, low, high = (row[f"{name}_{kind}"] for kind in ("median", "min", "max"))
        return f"{median:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        "| model | ranks | time, equal passes | processor time, equal passes | time, one pass a rank | bytes"
        " | efficiency |",
        "|---" * 7 + "|",
    ]
    for row in result["results"]:
        names = ("exact_over_ddp_equal", "exact_over_ddp_equal_cpu", "exact_over_ddp_natural")
        sent = [row.get(f"{side}_wire_bytes_per_rank_measured") for side in ("exact", "ddp_equal")]
        wire = f"{sent[0] / sent[1]:.3f}" if all(sent) else ""
        efficiency = f"{row['exact_efficiency_measured']:.2f} ({row['exact_efficiency_predicted']:.2f})"
        ratios = [ratio(row, name) for name in names]
        cells = [f"{row['model']} {row['precision']}", str(row["ranks"]), *ratios, wire, efficiency]
        lines.append(f"| {' | '.join(cells)} |")
    oversubscribed = ", ".join(map(str, result["oversubscribed_ranks"]))
    lines += [
        "",
        f"Strategy `exact` over `ddp`: median and range of n = {result['rounds']} rounds in which both take turns,"
        f" global batch {result['global_batch']}, 8 virtual ranks, {result['hardware']}, one thread a rank (so"
        f" {oversubscribed} ranks share its cores, on both sides). *Equal passes*: `ddp` accumulates passes of as many"
        " samples as a virtual rank has. *One pass a rank* is how `ddp` would be run. *Bytes* are those that a rank"
        " sends in a step, counted by the network interface. *Efficiency*: the processor time of the average rank of"
        " `exact` over that of the busiest, for which the others wait (in brackets what the shares of the virtual ranks"
        " predict); `ddp` shares passes of 16 images as unequally.",
    ]
    return "\n".join(lines)


def exchange(result: dict[str, Any]) -> str:
    """What hosts send to each other, in one level and in two."""
    lines = [
        "| hosts x ranks of each | virtual ranks | sent to others, flat | in levels | levels over flat | same bits |",
        "|---" * 6 + "|",
    ]
    for row in result["results"]:
        several = row["hosts"] > 1
        sent = [f"{row[kind]['sent_per_rank_bytes'] / result['tensor_bytes']:.3f}" for kind in ("flat", "auto")]
        over = f"{row['auto_over_flat']:.3f} ({row['auto']['levels']})" if several else ""
        cells = [f"{row['hosts']} x {row['ranks_per_host']}", str(row["virtual_ranks"]), *sent, over]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['same_bits'] else 'NO'} |")
    note = (
        f"Bytes that a rank sends to other hosts when {result['tensor_bytes'] / 2**20:g} MiB are reduced, over those"
        " of the tensor, counted by the interfaces of hosts that are network namespaces; in brackets the count"
        f" of levels. Mean of {result['reductions']} reductions."
    )
    return "\n".join([*lines, "", note])


def scale(result: dict[str, Any]) -> str:
    """What a step sends as ranks grow, whether the model holds here, and what it says of machines that are not here."""
    lines = [
        "| ranks | messages: stop check | exchange | log | bytes: stop check | exchange | log | asked of store | step"
        " | model |",
        "|---" * 10 + "|",
    ]
    of_model = {row["world_size"]: row for row in result["checked"]}
    for row in result["counted"]:
        kinds = ("vote", "exchange", "log")
        messages = [f"{row['messages'][kind]:.1f}" for kind in kinds]
        sent = [f"{row['bytes'][kind]:,.0f}" for kind in kinds]
        model = of_model[row["world_size"]]
        times = [f"{1e3 * model['measured_seconds']:.0f} ms", f"{model['model_over_measured']:.2f}x"]
        store = f"{row['store_requests_per_second']:.1f}/s"
        lines.append(f"| {' | '.join([str(row['world_size']), *messages, *sent, store, *times])} |")
    lines += [
        "",
        f"Of each rank and step: {MODELS[result['model']]}, global batch {result['global_batch']}, fp32,"
        f" {result['virtual_ranks']} virtual ranks, one row of the log in {result['log_every_steps']} steps,"
        f" {result['hardware']}, whose cores all ranks share. *Model* is what the model makes of the processor"
        " time of a pass, and of messages on two and four ranks, over what the step took (median of"
        f" {result['steps']}).",
        "",
        f"Predicted, not measured, for ResNet-18 in bf16 with {result['assumptions']['images_per_gpu']} images and one"
        f" virtual rank a GPU, whose host takes {1e3 * result['assumptions']['host_seconds']:g} ms to start a pass."
        " Efficiency is the time of the pass over that of the step:",
        "",
        "| machine | GPUs | stop check: messages a step, steps until it is read | exchange: messages, flat | in levels"
        " | log: messages | step, flat | in levels | efficiency | of `ddp` |",
        "|---" * 10 + "|",
    ]
    for row in result["predicted"]:
        vote = f"{row['vote_messages']}, {row['vote_delay_steps'] + 1}"
        steps = [f"{row[f'{kind}_milliseconds']:.2f} ms" for kind in ("flat", "levels")]
        efficiencies = [f"{row[f'{name}_efficiency']:.0%}" for name in ("exact", "ddp")]
        messages = [f"{row[name]:,}" for name in ("exchange_messages_flat", "exchange_messages", "log_messages")]
        cells = [row["machine"], f"{row['gpus']:,}", vote, *messages, *steps, *efficiencies]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def restart(result: dict[str, Any]) -> str:
    """How long a job takes to resume."""
    lines = ["| launcher | from SIGKILL to the next step | detection | start | first step |", "|---" * 5 + "|"]
    for row in result["results"]:
        spent = row["all_seconds"]
        parts = [f"{row[f'{part}_seconds']['p50']:.2f}" for part in ("detection", "start", "step")]
        total = f"{spent['p50']:.1f} ({spent['min']:.1f} to {spent['max']:.1f})"
        lines.append(f"| `{row['launcher']}` | {' | '.join([total, *parts])} |")
    count = " to ".join(str(n) for n in sorted({row["n"] for row in result["results"]}))
    note = f"Seconds: median (and range) of n = {count} kills, two CPU ranks, ResNet-20, {result['hardware']}."
    return "\n".join([*lines, "", note])


def schedules(result: dict[str, Any]) -> str:
    """What became of the random schedules."""
    kinds = "; ".join(f"{kind}: {count}" for kind, count in result["signals"].items())
    moments = ", ".join(f"{moment} {count}" for moment, count in result["moments"].items())
    return (
        f"Of {result['n']} such schedules {result['equal']} ended with the weights and the log of the undisturbed run"
        f" ({kinds}). When the signal came, rank 0 was here: {moments}. After a SIGKILL at most"
        f" {result['lost_steps_max']} steps had to be done again, with a checkpoint every"
        f" {result['checkpoint_every_steps']}."
    )


def checkpoint_damage(result: dict[str, Any]) -> str:
    """What became of damaged checkpoints."""
    return (
        f"Of {result['n']:,} random damages to checkpoints {result['detected']:,} were found, and"
        f" {result['fell_back']:,} times the checkpoint before it was loaded, with every bit."
    )


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['p50']:.1f} ({row['min']:.1f} to {row['max']:.1f})"


def _cluster(result: dict[str, Any]) -> str:
    return (
        f"p50 and range of n = {result['n']} jobs of {result['ranks']} CPU ranks on {result['nodes']} nodes, ResNet-20"
        f" on generated images; {result['slurm']}, a test cluster whose nodes share one {result['hardware']}"
    )


def slurm(result: dict[str, Any]) -> str:
    """How long a job takes to begin, and to save when it is told to stop."""
    start, saved = (_seconds(result[f"{name}_seconds"]) for name in ("sbatch_to_first_step", "signal_to_checkpoint"))
    return (
        f"From `sbatch` to the end of the first step: {start} s. From the signal of a preemption to a checkpoint on the"
        f" disk: {saved} s. ({_cluster(result)}.)"
    )


def preemption(result: dict[str, Any]) -> str:
    """What happens when, in a preemption."""
    saved, ended = (_seconds(result[f"{name}_seconds"]) for name in ("signal_to_checkpoint", "signal_to_requeue"))
    rows = [
        ("0", "SLURM sends SIGTERM to the tasks; torchrun hands it to its ranks, which finish their step"),
        ("after that step", "the ranks agree to stop, their state is copied, and rank 0 writes the checkpoint"),
        (saved, "the checkpoint is on the disk, and `status.json` says `saved`; the ranks end, then torchrun and srun"),
        (ended, "the batch script has read `status.json`, notes why in `requeues.log` and asks SLURM for the requeue"),
        ("`cred_expire` later", "SLURM starts the job again if there is room: by default after 120 seconds"),
    ]
    return (
        "\n".join(
            ["| seconds | what |", "|---|---|", *(f"| {when} | {what} |" for when, what in rows), "", _cluster(result)]
        )
        + "."
    )


BLOCKS: dict[str, dict[str, Callable[..., str]]] = {
    "README.md": {"headline": headline, "recipes": recipes},
    "docs/exactness.md": {
        "exactness": exactness,
        "world_sizes": world_sizes,
        "exchange": exchange,
        "strategy": strategy,
        "schedules": schedules,
        "checkpoint_damage": checkpoint_damage,
    },
    "docs/launching.md": {"real_job": real_job},
    "docs/performance.md": {
        "peers": peers,
        "augment": augment,
        "epoch": epoch,
        "constant": constant,
        "startup": startup,
        "scaling": scaling,
        "overhead": overhead,
        "settings": settings,
        "scale": scale,
        "restart": restart,
        "host_time": host_time,
    },
    "docs/recipes.md": {"accuracy": accuracy, "adam": adam, "time_to_accuracy": time_to_accuracy},
    "docs/slurm.md": {"slurm": slurm, "preemption": preemption},
}


SOURCES = {
    "adam": ("accuracy",),
    "constant": ("peers",),
    "headline": ("exactness", "world_sizes", "schedules", "checkpoint_damage", "peers", "augment", "real_job"),
    "preemption": ("slurm",),
    "recipes": ("accuracy", "time_to_accuracy"),
}
"""Blocks whose figures are in results of other names, in the order of the function's arguments."""


def updated(page: str, text: str) -> str:
    """The text of a page with its figures as the results say."""
    for name, make in BLOCKS[page].items():
        results = SOURCES.get(name, (name,))
        figures = make(*(json.loads((RESULTS / f"{result}.json").read_text()) for result in results))
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text, count = block.subn(lambda match, figures=figures: match[1] + figures + match[2], text)
        assert count == 1, f"{page} has {count} blocks {name}"
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        path = REPOSITORY / page
        path.write_text(updated(page, path.read_text()))
