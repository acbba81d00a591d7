"""A sweep from Python: a run for each learning rate and seed, and a table of the results.

    python examples/sweep.py --ranks 2 --lr 1e-3,4e-3 --seeds 0,1 --dir runs/sweep train.epochs=2

Every run has a directory of its own: a sweep that was stopped continues where it was when it is started again, and what
is done is not trained again. The learning rate is chosen on the validation split, so that the test set stays unseen.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence

import dist_cifar

Results = dict[tuple[float, int], dist_cifar.RunResult]
"""By learning rate and seed."""


def sweep(
    config: str, overrides: Sequence[str], *, rates: Sequence[float], seeds: Sequence[int], ranks: int, folder: str
) -> Results:
    """Trains with each learning rate and seed on `ranks` local ranks. Returns the runs that are done."""
    results: Results = {}
    for lr, seed in itertools.product(rates, seeds):
        run = [f"optimizer.lr={lr}", f"run.seed={seed}", f"run.dir={folder}/lr-{lr:g}-seed-{seed}"]
        result = dist_cifar.launch(dist_cifar.load_config(config, [*run, *overrides]), ranks=ranks)
        if result.status == "saved":  # by Ctrl-C, or by the end of a job's time
            break
        results[lr, seed] = result
    return results


def table(results: Results) -> str:
    """A line for each learning rate, with means over its seeds, the best on the validation split first."""
    rows = []
    for lr in {lr for lr, _ in results}:
        summaries = [result.summary for (other, _), result in results.items() if other == lr]
        keys = ("best_val_accuracy", "test_accuracy", "images_per_second")
        means = [statistics.fmean(summary[key] for summary in summaries) for key in keys]
        rows.append((*means, lr, len(summaries)))
    lines = ["learning rate  runs  validation    test  images/s"]
    for validation, test, speed, lr, count in sorted(rows, reverse=True):
        lines.append(f"{lr:13g}  {count:4}  {validation:10.2%}  {test:6.2%}  {speed:8,.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, and prints the table."""
    parser = argparse.ArgumentParser(description="Train with several learning rates and seeds.")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--lr", default="1e-3,2e-3,4e-3", help="learning rates (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default: %(default)s)")
    parser.add_argument("--dir", default="runs/sweep", help="where the runs are written (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    known = parser.parse_intermixed_args(arguments)
    rates, seeds = [float(lr) for lr in known.lr.split(",")], [int(seed) for seed in known.seeds.split(",")]
    try:
        results = sweep(known.config, known.overrides, rates=rates, seeds=seeds, ranks=known.ranks, folder=known.dir)
    except dist_cifar.UserError as error:
        sys.exit(f"sweep: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
