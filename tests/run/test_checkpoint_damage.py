"""The checkpoint store against damage to what it has written: found always, and skipped for the one before."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dist_cifar.errors import CheckpointError
from dist_cifar.run import checkpoint
from dist_cifar.run.checkpoint import read_checkpoint
from tests import REPOSITORY
from tests.run.checkpoint_harness import (
    REAL,
    Code,
    Disk,
    assert_caught,
    check_state,
    mark_of,
    names,
    save,
    tensors_of,
    using,
)


def saved_twice(code: Code, root: Path) -> tuple[Path, Path]:
    """The directory, and the newest checkpoint in it: mark 1, the best; mark 0 was the best before it."""
    directory = root / "checkpoints"
    store, _ = code.store(directory, keep_last=2)
    with using(code, Disk()):
        save(store, 10, 0, best=True)
        return directory, save(store, 20, 1, best=True)


def check_falls_back(code: Code, directory: Path, damaged: Path) -> None:
    """The damaged newest checkpoint is not loaded, the one before it is, and this is said."""
    with pytest.raises(CheckpointError, match="step-00000020"):
        code.checkpoint.read_checkpoint(damaged)
    for load in ("load_newest", "load_best"):
        store, said = code.store(directory)
        assert mark_of(getattr(store, load)()) == 0
        assert len(said) == 2 and "skipped" in said[0] and damaged.name in said[0] and "10" in said[1]


def check_bit_flips(code: Code, root: Path) -> None:
    """One bit of every byte of every file."""
    directory, newest = saved_twice(code, root)
    for name in os.listdir(newest):
        whole = (newest / name).read_bytes()
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (newest / name).write_bytes(flipped)
            check_falls_back(code, directory, newest)
        (newest / name).write_bytes(whole)
    assert mark_of(code.store(directory)[0].load_newest()) == 1


def check_missing_and_extra_files(code: Code, root: Path) -> None:
    directory, newest = saved_twice(code, root)
    for name in os.listdir(newest):
        (newest / name).rename(root / "aside")
        check_falls_back(code, directory, newest)
        (root / "aside").rename(newest / name)
    for extra in ("model2.safetensors", "pickle.bin", ".hidden"):
        (newest / extra).write_bytes(b"")
        check_falls_back(code, directory, newest)
        (newest / extra).unlink()
    assert mark_of(code.store(directory)[0].load_newest()) == 1


def benchmark(name: str) -> ModuleType:
    """A script of `benchmarks/`, imported."""
    path = REPOSITORY / "benchmarks/suite" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


damage = benchmark("checkpoint_damage")


def check_random_damage(code: Code, root: Path) -> None:
    """Some of each kind; benchmarks/suite/checkpoint_damage.py shoots more, at checkpoints of a real model."""
    dice = random.Random(3)
    targets = damage.Range(code.checkpoint, root, lambda step: (tensors_of(step), {"mark": step}))
    for kind in [*damage.KINDS] * 20:
        assert targets.shoot(kind, dice) == damage.Verdict(detected=True, fell_back=True), kind


def test_a_flipped_bit_in_any_byte_is_found(tmp_path):
    check_bit_flips(REAL, tmp_path)


def test_missing_and_extra_files_are_found(tmp_path):
    check_missing_and_extra_files(REAL, tmp_path)


def test_random_damage_is_found(tmp_path):
    check_random_damage(REAL, tmp_path)


def test_what_parses_by_its_own_hash_is_still_checked(tmp_path):
    _, newest = saved_twice(REAL, tmp_path)
    manifest = checkpoint._read_manifest(newest)
    (newest / "manifest.json").write_bytes(checkpoint._seal({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(newest)
    (newest / "manifest.json").write_bytes(checkpoint._seal({**manifest, "step": 30}))
    with pytest.raises(CheckpointError, match="step 30"):
        read_checkpoint(newest)
    for name in manifest["files"]:
        manifest["files"][name] |= {"bytes": 3, "sha256": checkpoint.hashlib.sha256(b"odd").hexdigest()}
        (newest / name).write_bytes(b"odd")
    (newest / "manifest.json").write_bytes(checkpoint._seal(manifest))
    with pytest.raises(CheckpointError, match="not what it should be"):
        read_checkpoint(newest)


@pytest.mark.parametrize("content", [None, "", "step-00000010\n", "step-99999999\n", "\0\xff ../..\n"])
def test_latest_and_best_are_not_needed(tmp_path, content):
    directory, _ = saved_twice(REAL, tmp_path)
    for name in ("latest", "best"):
        assert (directory / name).read_text() == "step-00000020\n"
        (directory / name).unlink() if content is None else (directory / name).write_text(content)
    check_state(REAL, directory, newest={1}, best={1})
    save(REAL.store(directory)[0], 30, 2, best=True)
    assert {(directory / name).read_text() for name in ("latest", "best")} == {"step-00000030\n"}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_nothing_is_started_over_when_all_are_bad(tmp_path, name, damage):
    directory, newest = saved_twice(REAL, tmp_path)
    for path in (directory / "step-00000010", newest):
        damage(path / name)
    store, said = REAL.store(directory)
    with pytest.raises(CheckpointError, match=r"step-00000020.*step-00000010.*Restore one.*move the directory away"):
        store.load_newest()
    assert len(said) == 2


def test_nothing_saved_is_no_error(tmp_path):
    store, said = REAL.store(tmp_path / "checkpoints")
    assert store.load_newest() is None and store.load_best() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000001-0a1b2c3d").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert store.load_newest() is None and said == []
    save(store, 1, 0)
    assert names(store.directory) == {"latest", "notes.txt", "step-00000001"}


# --- mutants ----------------------------------------------------------------------------------------------------

MUTANTS = {
    "hashes not compared": (
        check_bit_flips,
        "checkpoint",
        'if hashlib.sha256(data).hexdigest() != entry["sha256"]:',
        "if False:",
    ),
    "hashes not compared, random damage": (
        check_random_damage,
        "checkpoint",
        'if hashlib.sha256(data).hexdigest() != entry["sha256"]:',
        "if False:",
    ),
    "no fallback, random damage": (
        check_random_damage,
        "checkpoint",
        "                continue\n",
        "                raise\n",
    ),
    "manifest not sealed": (check_bit_flips, "checkpoint", "if sealed != data:", "if sealed is None:"),
    "extra files let pass": (
        check_missing_and_extra_files,
        "checkpoint",
        "set(entries).symmetric_difference(os.listdir(path))",
        "set(entries).difference(os.listdir(path))",
    ),
    "no fallback": (check_bit_flips, "checkpoint", "                continue\n", "                raise\n"),
    "fallback not said": (
        check_bit_flips,
        "checkpoint",
        '                    logger.info(f"{kind} checkpoint skipped: {error}")\n',
        "",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])
