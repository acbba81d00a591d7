"""Which checkpoints are kept, and which is the newest and the best of them."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.run.checkpoint import CheckpointStore, read_checkpoint
from tests.run.checkpoint_harness import (
    REAL,
    RULES,
    Code,
    assert_caught,
    check_state,
    mark_of,
    names,
    save,
    steps_kept,
    steps_present,
)


def check_retention(code: Code, root: Path) -> None:
    store, said = code.store(root / "checkpoints", keep_last=2)
    for mark, best in enumerate([False, True, False, False, False, True, False]):
        path = save(store, mark, mark, best=best)
        newest = {f"step-{step:08d}" for step in range(max(0, mark - 1), mark + 1)}
        kept_best = {"step-00000005"} if mark >= 5 else {"step-00000001"} if mark >= 1 else set()
        assert {name for name in names(store.directory) if name.startswith("step-")} == newest | kept_best
        assert (store.directory / "latest").read_text().strip() == path.name
        check_state(code, store.directory, newest={mark}, best={5 if mark >= 5 else 1 if mark >= 1 else None})
    assert said == []


def check_fallback_is_not_pushed_out(code: Code, root: Path) -> None:
    """A damaged checkpoint of a later step takes no place of the good ones that are saved after the fallback."""
    store, _ = code.store(root / "checkpoints", keep_last=2)
    for mark, step in enumerate((10, 20, 30)):
        save(store, step, mark)
    (store.directory / "step-00000030" / "state.json").unlink()
    assert mark_of(store.load_newest()) == 1
    save(store, 25, 3)
    assert {"step-00000020", "step-00000025", "step-00000030"} <= names(store.directory)
    assert mark_of(code.store(store.directory)[0].load_newest()) == 3
    save(store, 35, 4)
    assert names(store.directory) == {"step-00000025", "step-00000035", "latest"}
    check_state(code, store.directory, newest={4}, best={None})


def check_damaged_step_saved_again(code: Code, root: Path) -> None:
    store, _ = code.store(root / "checkpoints", keep_last=2)
    for mark, step in enumerate((10, 20)):
        save(store, step, mark)
    (store.directory / "step-00000020" / "state.json").unlink()
    assert mark_of(store.load_newest()) == 0
    save(store, 20, 2)
    assert names(store.directory) == {"step-00000010", "step-00000020-2", "latest"}
    check_state(code, store.directory, newest={2}, best={None})


def check_name_of_a_damaged_one(code: Code, root: Path) -> None:
    """A checkpoint that takes the name of a damaged one, which somebody has removed, is not taken for it."""
    store, _ = code.store(root / "checkpoints")
    damaged = save(store, 10, 0)
    (damaged / "state.json").unlink()
    with pytest.raises(CheckpointError):
        store.load_newest()
    shutil.rmtree(damaged)
    assert save(store, 10, 1) == damaged
    check_state(code, store.directory, newest={1}, best={None})


def test_the_newest_and_the_best_are_kept(tmp_path):
    check_retention(REAL, tmp_path)


def test_a_fallback_is_not_pushed_out(tmp_path):
    check_fallback_is_not_pushed_out(REAL, tmp_path)


def test_a_damaged_step_is_saved_again(tmp_path):
    check_damaged_step_saved_again(REAL, tmp_path)


def test_the_name_of_a_damaged_checkpoint_is_free_again(tmp_path):
    check_name_of_a_damaged_one(REAL, tmp_path)


def test_the_best_of_a_step_outlives_a_second_save_of_the_step(tmp_path):
    store, said = REAL.store(tmp_path)
    save(store, 10, 0, best=True)
    save(store, 10, 1)
    save(store, 10, 2)
    assert names(tmp_path) == {"step-00000010", "step-00000010-3", "latest", "best"}
    assert mark_of(store.load_newest()) == 2 and mark_of(store.load_best()) == 0 and said == []


def test_of_a_linked_checkpoint_only_the_link_is_deleted(tmp_path):
    store, _ = REAL.store(tmp_path / "checkpoints")
    path = save(store, 10, 0)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert mark_of(store.load_newest()) == 0
    save(store, 20, 1)
    assert names(store.directory) == {"step-00000020", "latest"}
    assert mark_of(read_checkpoint(tmp_path / "elsewhere")) == 0


def check_rules(code: Code, root: Path) -> None:
    """Many saves, each rule in the way of the others, against the oracle."""
    dice = random.Random(4)
    saved: dict[int, bool] = {}
    store, said = code.store(root / "rules", **RULES)
    for step in range(0, 300, 5):
        saved[step] = dice.random() < 0.4
        save(store, step, step, best=saved[step])
        assert steps_present(store.directory) == steps_kept(saved)
    assert said == []


def check_kept_best_are_steps(code: Code, root: Path) -> None:
    """The best of a step that was saved twice is one of the best that are kept, not two."""
    store, _ = code.store(root / "checkpoints", keep_best=2)
    for mark, (step, best) in enumerate([(10, True), (20, True), (20, True), (30, False)]):
        save(store, step, mark, best=best)
    assert names(store.directory) == {"step-00000010", "step-00000020-2", "step-00000030", "latest", "best"}


def check_clock(code: Code, root: Path) -> None:
    """The clock was set back between saves, or forward: what is newer is told by the step."""
    store, said = code.store(root / "checkpoints", keep_last=3)
    for mark in range(5):
        path = save(store, 10 * mark, mark, best=mark in (1, 3))
        for file in (path, *path.iterdir(), store.directory / "latest"):
            os.utime(file, (10**9 - 10**6 * mark,) * 2)
        check_state(code, store.directory, newest={mark}, best={3 if mark >= 3 else 1 if mark else None})
    assert steps_present(store.directory) == {20, 30, 40} and said == []


def test_every_rule_keeps_its_own(tmp_path):
    check_rules(REAL, tmp_path)


def test_the_best_are_counted_by_steps(tmp_path):
    check_kept_best_are_steps(REAL, tmp_path)


def test_no_clock_decides(tmp_path):
    check_clock(REAL, tmp_path)


# --- mutants ----------------------------------------------------------------------------------------------------

MUTANTS = {
    "oldest loaded first": (check_retention, "checkpoint", "key=_position, reverse=True)", "key=_position)"),
    "best not kept": (check_retention, "checkpoint", "[: self._keep_best]", "[:0]"),
    "every best kept": (check_retention, "checkpoint", "[: self._keep_best]", ""),
    "one kept too few": (check_retention, "checkpoint", "[: self._keep_last]", "[: self._keep_last - 1]"),
    "later steps count as kept": (
        check_fallback_is_not_pushed_out,
        "checkpoint",
        "if _position(path.name) <= _position(saved.name)]",
        "]",
    ),
    "order from the clock": (
        check_clock,
        "checkpoint",
        "sorted(names, key=_position, reverse=True)",
        "sorted(names, key=lambda name: os.stat(self.directory / name).st_mtime, reverse=True)",
    ),
    "the oldest best kept": (
        check_rules,
        "checkpoint",
        "list(best.values())[: self._keep_best]",
        "list(best.values())[-self._keep_best :]",
    ),
    "multiples deleted": (check_rules, "checkpoint", "if step % self._keep_every_steps == 0", "if False"),
    "the best counted by directories": (
        check_kept_best_are_steps,
        "checkpoint",
        "best = _by_step(good), _by_step(path for path in good if _says_best(path))",
        "best = _by_step(good), {path: path for path in good if _says_best(path)}",
    ),
    "a name used twice": (
        check_damaged_step_saved_again,
        "checkpoint",
        "max(revisions, default=0) + 1",
        "max(revisions, default=1)",
    ),
    "a name damaged for ever": (
        check_name_of_a_damaged_one,
        "checkpoint",
        "        self._bad.discard(path.name)\n        return path\n",
        "        return path\n",
    ),
    "damaged ones count as kept": (
        check_fallback_is_not_pushed_out,
        "checkpoint",
        "if path.name not in self._bad]",
        "]",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])


def test_the_directories_of_the_best_and_the_last(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.best_and_last() == {}
    for step, best in ((1, True), (2, False), (3, False)):
        store.begin_save(step, {"model": {"w": torch.zeros(1)}}, {}, best=best)
    assert {name: path.name for name, path in store.best_and_last().items()} == {
        "best": "step-00000001",
        "last": "step-00000003",
    }
