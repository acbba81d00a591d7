"""Each row once, whatever a kill leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.tracking.exactly_once import ExactlyOnce, named
from dist_cifar.tracking.jsonl import JsonlTracker


class Lossy:
    """A tracker whose last rows a kill may lose; `had` are (number, row)."""

    def __init__(self, had: list) -> None:
        self.had, self.row_count = had, len(had)

    def log(self, row, number):
        self.had.append((number, row))

    def finish(self, exit_code, results=None):
        self.had.append("finished")


def row(kind: str, step: int) -> dict:
    return {"kind": kind, "step": step, "loss": 1 / (step + 1)}


RUN = [row(kind, step) for step in range(2, 41, 2) for kind in (("train", "eval") if step % 10 == 0 else ("train",))]


@given(st.data())
def test_a_tracker_gets_each_row_once_wherever_the_run_is_killed(tmp_path_factory, data):
    """Kills after any row, checkpoints anywhere before, and any part of what the tracker has not written lost."""
    path, had, saved = tmp_path_factory.mktemp("run") / "metrics.jsonl", [], None
    kills = data.draw(
        st.lists(st.tuples(st.integers(1, len(RUN)), st.integers(0, len(RUN)), st.integers(0, 4)), max_size=3)
    )
    for rows, lost, checkpoints in [*kills, (len(RUN), 0, 0)]:
        jsonl = JsonlTracker(path, saved)
        tracker = ExactlyOnce(Lossy(had), jsonl.kept)
        begin = 0 if saved is None else RUN.index(row("eval", saved))  # that evaluation is done again
        for one in RUN[begin : begin + rows]:
            jsonl.log(one)
            tracker.log(one)
            if one["kind"] == "eval" and checkpoints:
                saved, checkpoints = one["step"], checkpoints - 1
        jsonl.finish(0)
        del had[len(had) - lost :]
    assert had == list(enumerate(RUN))


def test_rows_read_back_are_the_rows(tmp_path):
    one = {"kind": "train", "step": 1, "loss": float("inf"), "split": "nothing", "shares": [0.5, float("-inf")]}
    nan = {"kind": "train", "step": 2, "loss": float("nan")}
    for row in (one, nan):
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", row["step"] - 1 or None)
        tracker.log(row)
        tracker.finish(0)
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 2)
    tracker.finish(0)
    first, second = tracker.kept
    assert first == one and str(second["loss"]) == "nan"


def test_names():
    one = {"kind": "eval", "step": 3, "epoch": 1.0, "samples": 384, "loss": 0.5, "shares": [0.5, 0.25]}
    shared = {"global_step": 3, "epoch": 1.0, "samples": 384}
    assert named(one) == shared | {"eval/loss": 0.5, "eval/shares/0": 0.5, "eval/shares/1": 0.25}
