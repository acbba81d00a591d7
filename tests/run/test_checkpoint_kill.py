"""The checkpoint store against death and power loss, before each call that changes the disk."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.checkpoint_harness import (
    REAL,
    RULES,
    Code,
    Death,
    Disk,
    assert_caught,
    check_state,
    mark_of,
    names,
    run_script,
    save,
    steps_kept,
    steps_present,
    using,
)

SCENARIOS: dict[str, tuple[list[tuple[int, bool]], tuple[int, bool]]] = {
    "first": ([], (10, True)),
    "next": ([(10, True), (20, False)], (30, False)),
    "new best": ([(10, True), (20, False)], (30, True)),
    "same step": ([(10, True), (20, False)], (20, False)),
    "same step, nothing else": ([(20, True)], (20, True)),
}
"""(step, best) of the saves before, and of the save that is interrupted."""

COIN = random.Random(0)
LOSSES: dict[str, Callable[[], bool] | None] = {
    "none": None,
    "all": lambda: True,
    "some": lambda: COIN.random() < 0.5,
}
"""What is lost with the process: nothing (a kill), or what was not synced (a power cut)."""


def check_death(code: Code, root: Path) -> int:
    """Dies before each call of each scenario; returns how many calls that were."""
    deaths = 0
    for (scenario, (before, (step, best))), loss in itertools.product(SCENARIOS.items(), LOSSES):
        prepared, mark = root / f"{scenario} {loss}", len(before)
        with using(code, Disk()):
            for number, (earlier, was_best) in enumerate(before):
                save(code.store(prepared)[0], earlier, number, best=was_best)
        for die_at in itertools.count():
            directory = root / scenario / loss / str(die_at)
            if before:
                shutil.copytree(prepared, directory)
            with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
                save(code.store(directory)[0], step, mark, best=best)
            if disk.died and LOSSES[loss]:
                disk.lose_power(root, is_lost=LOSSES[loss])

            old_best = max((m for m, (_, was_best) in enumerate(before) if was_best), default=None)
            check_state(
                code,
                directory,
                newest={mark, mark - 1 if before else None} if disk.died else {mark},
                best={mark, old_best} if disk.died and best else {mark if best else old_best},
            )
            with using(code, Disk()):
                path = save(code.store(directory)[0], 40, mark + 1, best=True)
            check_state(code, directory, newest={mark + 1}, best={mark + 1})
            assert names(directory) == {path.name, "latest", "best"}
            shutil.rmtree(root / scenario)
            if not disk.died:
                deaths += die_at
                break
    return deaths


def check_deaths_in_a_row(code: Code, root: Path) -> None:
    """Each save dies at a random call, over the remains of the ones before; what was loaded last is never lost."""
    dice = random.Random(1)
    for run in range(40):
        directory = root / str(run)
        loaded, step = None, 0
        for mark in range(6):
            step += dice.choice([0, 10])
            with using(code, Disk(die_at=dice.randrange(60))) as disk, contextlib.suppress(Death):
                save(code.store(directory)[0], step, mark, best=dice.random() < 0.5)
            if disk.died:
                disk.lose_power(root, is_lost=lambda: dice.random() < 0.5)
            store, said = code.store(directory)
            newest = mark_of(store.load_newest())
            assert newest in ({loaded, mark} if disk.died else {mark})
            assert said == []
            loaded = newest
        shutil.rmtree(directory)


EARLIER = {10: False, 20: False, 30: True, 40: False, 50: True}
"""Step to whether it was the best. By `RULES` the save of 60, the best, lets go of 30; 10 went before."""


def check_death_under_rules(code: Code, root: Path) -> int:
    """Dies before each call of a save that deletes by every rule; returns how many calls that were."""
    assert steps_kept(EARLIER) == {20, 30, 40, 50} and steps_kept(EARLIER | {60: True}) == {20, 40, 50, 60}
    prepared = root / "prepared"
    with using(code, Disk()):
        for step, best in EARLIER.items():
            save(code.store(prepared, **RULES)[0], step, step, best=best)
    assert steps_present(prepared) == steps_kept(EARLIER)
    for die_at, loss in ((die_at, loss) for die_at in itertools.count() for loss in LOSSES):
        directory = shutil.copytree(prepared, root / f"{die_at} {loss}")
        with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
            save(code.store(directory, **RULES)[0], 60, 60, best=True)
        if disk.died and LOSSES[loss]:
            disk.lose_power(root, is_lost=LOSSES[loss])
        check_state(code, directory, newest={50, 60} if disk.died else {60}, best={50, 60} if disk.died else {60})
        present = steps_present(directory)
        assert {20, 40, 50} <= present <= {20, 30, 40, 50, 60} and (30 in present or 60 in present)
        with using(code, Disk()):
            save(code.store(directory, **RULES)[0], 70, 70)
        assert steps_present(directory) == steps_kept(EARLIER | ({60: True} if 60 in present else {}) | {70: False})
        assert not list(directory.glob(".tmp-*"))
        shutil.rmtree(directory)
        if not disk.died:
            return die_at


def test_a_death_while_deleting_by_any_rule_loses_nothing_that_is_kept(tmp_path):
    assert check_death_under_rules(REAL, tmp_path) > 30


def test_a_death_at_any_call_leaves_a_good_checkpoint(tmp_path):
    assert check_death(REAL, tmp_path) > len(LOSSES) * len(SCENARIOS) * 25


def test_deaths_in_a_row_leave_a_good_checkpoint(tmp_path):
    check_deaths_in_a_row(REAL, tmp_path)


KILLED = """
import logging, mmap, os, random, signal, sys, time
from pathlib import Path
import torch
from dist_cifar.run.checkpoint import CheckpointStore
from dist_cifar.tracking.console import LineHandler

said = []
logging.getLogger("dist_cifar").addHandler(LineHandler(said.append))
logging.getLogger("dist_cifar").setLevel(logging.INFO)

directory, dice, last = Path(sys.argv[1]), random.Random(2), 0
begun = mmap.mmap(-1, 8)  # shared with the children: the last step whose save began
for kill in range(25):
    begun[:] = last.to_bytes(8, "little")
    child = os.fork()
    if child == 0:
        store = CheckpointStore(directory, keep_last=1)
        for step in range(last + 1, last + 1000):
            tensors = {"model": {"weight": torch.full((50_000,), step)}}
            store.begin_save(step, tensors, {"step": step}, best=step % 2 == 0)
            begun[:] = step.to_bytes(8, "little")
        os._exit(1)
    # However slow the machine is: a save has begun, or one is done and the next has begun.
    while int.from_bytes(begun[:], "little") <= last + kill % 2:
        time.sleep(0.001)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(dice.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said.clear()
    store = CheckpointStore(directory, keep_last=1)
    newest, best = store.load_newest(), store.load_best()
    assert not said, said
    if newest is None:
        assert last == 0
        continue
    assert newest.step >= max(last, int.from_bytes(begun[:], "little") - 1) and newest.state == {"step": newest.step}
    assert (newest.tensors["model"]["weight"] == newest.step).all()
    assert (best.step if best else 0) == newest.step // 2 * 2
    last = newest.step
print(last)
"""


def test_a_process_killed_at_any_time_leaves_a_good_checkpoint(tmp_path):
    result = run_script(KILLED, tmp_path / "checkpoints")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


KILLED_AT_EACH_CALL = """
import itertools, logging, os, shutil, signal, sys, threading
from pathlib import Path
import torch
from dist_cifar.run import atomic_io
from dist_cifar.run.checkpoint import CheckpointStore
from dist_cifar.tracking.console import LineHandler

said = []
logging.getLogger("dist_cifar").addHandler(LineHandler(said.append))
logging.getLogger("dist_cifar").setLevel(logging.INFO)

class Killing:
    def __init__(self, at):
        self.at, self.calls = at, 0
    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in ("open", "write", "fsync", "mkdir", "rmdir", "unlink", "replace"):
            return function
        def call(*arguments):
            assert threading.current_thread().name == "checkpoint"
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return function(*arguments)
        return call

def store():
    return CheckpointStore(Path(sys.argv[1]), keep_last=1, keep_best=2, keep_every_steps=20)

def begin(store, step):
    tensors = {"model": {"weight": torch.full((5000,), step)}}
    store.begin_save(step, tensors, {"step": step}, best=step in (30, 50, 60))

for at in itertools.count():
    earlier = store()
    for step in (10, 20, 30, 40, 50):
        begin(earlier, step)
    earlier.wait()
    kept = {20, 30, 40, 50}
    child = os.fork()
    if child == 0:
        atomic_io.os = Killing(at)
        last = store()
        begin(last, 60)
        last.wait()
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said.clear()
    reader = store()
    newest, best = reader.load_newest(), reader.load_best()
    assert not said, said
    assert newest.step == best.step and newest.step in ((50, 60) if killed else (60,)), newest.step
    assert newest.state == {"step": newest.step} and (newest.tensors["model"]["weight"] == newest.step).all()
    present = {int(path.name.split("-")[1]) for path in reader.directory.glob("step-*")}
    assert present - {30, 60} == {20, 40, 50}, present
    assert 30 in present or newest.step == 60
    begin(reader, 70)
    reader.wait()
    present = {int(path.name.split("-")[1]) for path in reader.directory.glob("step-*")}
    assert present == {20, 40, 50, 60, 70} - ({60} - {newest.step}) | ({30} if newest.step == 50 else set()), present
    assert not list(reader.directory.glob(".tmp-*"))
    shutil.rmtree(reader.directory)
    if not killed:
        break
print(at)
"""


def test_a_process_killed_at_each_call_of_the_background_write_leaves_a_good_checkpoint(tmp_path):
    result = run_script(KILLED_AT_EACH_CALL, tmp_path / "checkpoints")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


EXITING = """
import signal, sys, threading
from pathlib import Path
import torch
from dist_cifar.run import checkpoint, atomic_io
{mutation}
class Gate:
    def __getattr__(self, name):
        blocked.set()
        threading.Event().wait()
atomic_io.os, blocked = Gate(), threading.Event()
store = checkpoint.CheckpointStore(Path(sys.argv[1]), keep_last=1)
store.begin_save(20, {{"model": {{"weight": torch.ones(3)}}}}, {{}})
blocked.wait()
signal.alarm({seconds})
"""


NO_DAEMON = """
thread = checkpoint.threading.Thread
checkpoint.threading.Thread = lambda **options: thread(**options | {"daemon": False})
"""


@pytest.mark.parametrize(("mutation", "seconds", "status"), [("", 60, 0), (NO_DAEMON, 1, -14)])
def test_a_write_under_way_does_not_keep_the_process(tmp_path, mutation, seconds, status):
    """Death between the copy and the first call to the disk; a mutant is ended by the alarm (14)."""
    save(REAL.store(tmp_path)[0], 10, 0)
    result = run_script(EXITING.format(mutation=mutation, seconds=seconds), tmp_path)
    assert result.returncode == status, result.stderr
    check_state(REAL, tmp_path, newest={0}, best={None})


# --- mutants ----------------------------------------------------------------------------------------------------

WRITE_MANIFEST = "            atomic_io.write_file(temporary / MANIFEST, _seal(manifest))\n"
FSYNC_TEMPORARY = "            atomic_io.fsync_dir(temporary)\n"
MOVE = "            atomic_io.move(temporary, path)\n"

MUTANTS = {
    "renamed before the manifest": (
        check_death,
        "checkpoint",
        WRITE_MANIFEST + FSYNC_TEMPORARY + MOVE,
        MOVE
        + "            atomic_io.write_file(path / MANIFEST, _seal(manifest))\n            atomic_io.fsync_dir(path)\n",
    ),
    "written in place": (
        check_death,
        "checkpoint",
        "        temporary = self._temporary(path)\n        try:",
        "        temporary = path\n        try:",
    ),
    "manifest deleted last": (
        check_death,
        "checkpoint",
        "        atomic_io.move(path, temporary)\n        atomic_io.remove_tree(temporary)\n",
        "        for name in sorted(os.listdir(path), key=MANIFEST.__eq__):\n"
        "            atomic_io.remove_tree(path / name)\n        atomic_io.remove_tree(path)\n",
    ),
    "same step deleted before it is saved again": (
        check_death,
        "checkpoint",
        "        path = self._free_path(step)\n",
        '        path = self.directory / f"step-{step:08d}"\n'
        "        if path.exists():\n            self._delete(path)\n",
    ),
    "old ones deleted first": (
        check_death,
        "checkpoint",
        "        path = self._write(step, contents, best)\n",
        "        for path in self._paths():\n            self._delete(path)\n"
        "        path = self._write(step, contents, best)\n",
    ),
    "nothing swept": (check_death, "checkpoint", "        self._sweep()\n", ""),
    "too much swept": (check_deaths_in_a_row, "checkpoint", '.glob(".tmp-*")', '.glob("*")'),
    "content not synced": (check_death, "atomic_io", "        os.fsync(descriptor)\n    finally", "    finally"),
    "names of the files not synced": (check_death, "checkpoint", FSYNC_TEMPORARY, ""),
    "rename not synced": (check_death, "atomic_io", "    fsync_dir(new.parent)\n", ""),
    "multiples deleted while dying": (
        check_death_under_rules,
        "checkpoint",
        "if step % self._keep_every_steps == 0",
        "if step % self._keep_every_steps == 0 and step == _position(saved.name)[0]",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])
