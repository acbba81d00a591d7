"""The copy of the data set on each node: one per node, whole or not there, equal to the cache or not used."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_cifar.config import DataConfig
from dist_cifar.data import cache, node_staging
from dist_cifar.data.cache import Entry, load_or_build, write_entry
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.node_staging import staged
from dist_cifar.errors import ConfigError, DataError
from dist_cifar.run import atomic_io
from dist_cifar.tracking.console import LineHandler
from tests import PATIENCE_SECONDS
from tests.data.test_cache import KEY, Builder, assert_same, some_arrays
from tests.integration.faults.disk import flip_bit, remount, small_disk, truncate


def cached(root: Path, n: int = 30) -> Entry:
    return load_or_build(root / "cache", "set", KEY, Builder(some_arrays(n=n)))


def files(root: Path) -> dict[str, bytes]:
    """What is staged below `root`, locks left out."""
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_the_copy_is_equal_memory_mapped_and_made_once(tmp_path, said):
    entry = cached(tmp_path)
    place = tmp_path / "node"
    first = staged(entry, place)
    size = sum(path.stat().st_size for path in entry.directory.iterdir())
    second = staged(entry, place)
    assert said == [f"staging {size / 1e6:.0f} MB to {first.directory}"]
    for copy in (first, second):
        assert_same(copy.arrays, some_arrays())
        assert isinstance(copy.arrays.train_images, np.memmap)
        assert Path(copy.arrays.train_images.filename).is_relative_to(place)
        assert not copy.arrays.train_images.flags.writeable
        assert (copy.content_sha256, copy.stats) == (entry.content_sha256, entry.stats)
    assert [path.name for path in first.directory.parent.iterdir() if path.suffix == ".tmp"] == []


def test_the_data_set_of_a_run_is_read_from_the_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    config = DataConfig(
        source="synthetic", cache_dir=str(tmp_path / "c"), synthetic_train_size=60, synthetic_test_size=20
    )
    plain = load_dataset(config)
    here = load_dataset(dataclasses.replace(config, stage_dir="$SLURM_TMPDIR/data"))
    for split, expected in ((here.train, plain.train), (here.test, plain.test)):
        assert Path(split.images.filename).is_relative_to(tmp_path / "node" / "data")
        assert np.array_equal(split.images, expected.images) and np.array_equal(split.labels, expected.labels)
    assert plain.directory.parent == tmp_path / "c" and here.directory.is_relative_to(tmp_path / "node" / "data")
    facts = [(found.content_sha256, found.stats, found.classes) for found in (plain, here)]
    assert facts[0] == facts[1]


def test_an_unset_variable_is_an_error_before_anything_is_decoded(tmp_path):
    config = DataConfig(source="synthetic", cache_dir=str(tmp_path), stage_dir="$NOT_SET_ANYWHERE")
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE"):
        load_dataset(config)
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------------------------


def by_structure(directory: Path, entry: Entry) -> Entry | None:
    """The mutant that looks at sizes and types, as a reader of the cache does, and at no pixel."""
    return cache.read_entry(directory, entry.key)


def check_replaced(root: Path, damage: Callable[[Path], None], said: list[str]) -> None:
    entry = cached(root)
    directory = staged(entry, root / "node").directory
    damage(directory)
    said.clear()
    copy = staged(entry, root / "node")
    assert_same(copy.arrays, some_arrays())
    assert (copy.content_sha256, copy.stats) == (entry.content_sha256, entry.stats)
    staged(entry, root / "node")
    assert len(said) == 1


DAMAGE = {
    "pixel": lambda copy: flip_bit(copy / "train_images.npy"),
    "label": lambda copy: np.save(copy / "test_labels.npy", np.load(copy / "test_labels.npy")[::-1].copy()),
    "truncated": lambda copy: truncate(copy / "test_images.npy"),
    "missing": lambda copy: (copy / "train_labels.npy").unlink(),
    "meta": lambda copy: (copy / "meta.json").write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_copy_is_replaced(tmp_path, name, said):
    check_replaced(tmp_path, DAMAGE[name], said)


@pytest.mark.parametrize("name", ["pixel", "label"])
def test_a_copy_that_is_not_hashed_is_caught(tmp_path, name, monkeypatch, said):
    monkeypatch.setattr(node_staging, "_verified", by_structure)
    with pytest.raises(AssertionError):
        check_replaced(tmp_path, DAMAGE[name], said)


def test_statistics_are_those_of_the_cache(tmp_path, said):
    """They are not hashed, so those of the copy are not used."""
    entry = cached(tmp_path)
    meta = staged(entry, tmp_path / "node").directory / "meta.json"
    meta.write_text(meta.read_text().replace(str(entry.stats.mean[0]), "0.25"))
    said.clear()
    assert staged(entry, tmp_path / "node").stats == entry.stats
    assert said == []  # the copy there is used


def test_a_damaged_cache_is_not_staged(tmp_path):
    """Nobody else hashes it: the data set would be another one."""
    entry = cached(tmp_path)
    flip_bit(entry.directory / "train_images.npy")
    with pytest.raises(DataError, match=rf"SHA-256.*delete {entry.directory}") as caught:
        staged(entry, tmp_path / "node")
    assert "data.stage_dir" in str(caught.value)


# --- several processes, and their death ---------------------------------------------------------------------------


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.01)


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def stage_together(root: Path, mutant: bool, processes: int, results: Any) -> None:
    """A copy continues only when every other process waits for the lock, or copies too."""

    def counted(entry: Entry) -> None:
        note(root / "copies", "copy")
        note(root / "arrived", "copies")
        wait_for_lines(root / "arrived", processes)
        with contextlib.suppress(OSError):  # in the mutant two write to one place
            write_entry(entry)

    node_staging.write_entry = counted
    if mutant:
        node_staging.only_writer = lambda *_, **__: contextlib.nullcontext()
    entry = cached(root)

    def on_line(line: str) -> None:
        if line.startswith("waiting"):
            note(root / "arrived", "waits")

    logger = logging.getLogger("dist_cifar")
    logger.addHandler(LineHandler(on_line))
    logger.setLevel(logging.INFO)
    with contextlib.suppress(DataError):
        copy = staged(entry, root / "node")
        results.put((int(copy.arrays.train_images.sum()), str(copy.directory)))


def check_one_copy(root: Path, mutant: bool) -> None:
    cached(root)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=stage_together, args=(root, mutant, 3, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    assert (root / "copies").read_text() == "copy\n"
    found = {results.get(timeout=PATIENCE_SECONDS) for _ in processes}
    assert len(found) == 1 and found.pop()[0] == int(some_arrays().train_images.sum())


def test_of_processes_that_start_at_once_one_copies(tmp_path):
    check_one_copy(tmp_path, mutant=False)


def test_copies_without_a_lock_are_caught(tmp_path):
    with pytest.raises(AssertionError, match=r"copy\\ncopy"):
        check_one_copy(tmp_path, mutant=True)


def in_place(entry: Entry) -> None:
    """The mutant that copies to where the copy is looked for, `meta.json` first."""
    entry.directory.mkdir(parents=True)
    (entry.directory / "meta.json").write_bytes((cached_directory(entry) / "meta.json").read_bytes())
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        cache._write_array(entry.directory / f"{name}.npy", getattr(entry.arrays, name))


def cached_directory(entry: Entry) -> Path:
    return Path(entry.arrays.train_images.filename).parent


def die_while_copying(root: Path, files_written: int, mutant: bool) -> None:
    """Ends, as by SIGKILL, when so many arrays are written and half of the next one."""
    write, left = atomic_io.write_file, [files_written]

    def dying(path: Path, *parts: Any) -> None:
        if left[0] == 0:
            write(path, *parts[:-1], parts[-1][: len(parts[-1]) // 2])
            os._exit(9)
        left[0] -= 1
        write(path, *parts)

    atomic_io.write_file = dying
    if mutant:
        node_staging.write_entry = in_place
    staged(cached(root), root / "node")


def check_death(root: Path, files_written: int, said: list[str], mutant: bool = False) -> None:
    entry = cached(root)
    arguments = (root, files_written, mutant)
    process = multiprocessing.get_context("spawn").Process(target=die_while_copying, args=arguments)
    process.start()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 9
    names = {path.name for path in (root / "node").rglob("set-*")}
    assert entry.directory.name not in names  # whole or nothing
    assert f"{entry.directory.name}.tmp" in names
    said.clear()
    assert_same(staged(entry, root / "node").arrays, some_arrays())
    assert len(said) == 1  # the lock of the dead process is free
    assert not [path for path in (root / "node").rglob("*.tmp")]


@pytest.mark.parametrize("files_written", range(4))
def test_a_copier_that_is_killed_leaves_nothing_that_is_used(tmp_path, files_written, said):
    check_death(tmp_path, files_written, said)


def test_a_copy_in_place_is_caught(tmp_path, said):
    with pytest.raises(AssertionError):
        check_death(tmp_path, 1, said, mutant=True)


# --- places that cannot be written --------------------------------------------------------------------------------

REFUSED = (
    r"^data\.stage_dir={place}: the data set cannot be copied there \(.*{why}.*; ([\d,]+) bytes needed,"
    r" ([\d,]+) free\); make room, name another directory, or set data\.stage_dir=null"
)


def refused(entry: Entry, place: Path, why: str) -> tuple[int, int]:
    """The bytes needed and free of the error; nothing but a lock is left."""
    with pytest.raises(DataError) as caught:
        staged(entry, place)
    match = re.search(REFUSED.format(place=place, why=why), str(caught.value))
    assert match, str(caught.value)
    assert files(place) == {}
    return int(match[1].replace(",", "")), int(match[2].replace(",", ""))


def test_a_full_place_is_an_error_with_what_is_needed_and_free(tmp_path):
    entry = cached(tmp_path, n=300)
    with small_disk(tmp_path / "disk", "512k") as disk:
        needed, free = refused(entry, disk, "")
        assert needed == sum(path.stat().st_size for path in entry.directory.iterdir())
        assert 0 < free <= 512 * 1024 < needed
    with small_disk(tmp_path / "large", "4m") as disk:  # the same, and it fits
        assert_same(staged(entry, disk).arrays, some_arrays(n=300))


def test_a_damaged_copy_makes_room_for_the_good_one(tmp_path):
    entry = cached(tmp_path, n=300)  # 1.2 MB
    with small_disk(tmp_path / "disk", "2m") as disk:
        flip_bit(staged(entry, disk).directory / "train_images.npy")
        assert_same(staged(entry, disk).arrays, some_arrays(n=300))


def test_a_read_only_place_is_refused_and_serves_what_it_has(tmp_path, said):
    entry = cached(tmp_path)
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        refused(entry, disk, "Read-only file system")
        remount(disk, "rw")
        staged(entry, disk)
        remount(disk, "ro")
        said.clear()
        assert_same(staged(entry, disk).arrays, some_arrays())
        assert said == []


def test_a_disk_that_fills_up_is_an_error_without_a_disk_of_ones_own(tmp_path, monkeypatch):
    """The same where nobody may mount a small one."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    entry = cached(tmp_path)
    monkeypatch.setattr(atomic_io, "write_file", full)
    refused(entry, tmp_path / "node", "No space left on device")


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.stage_dir=.*/file/x: .*Not a directory.* bytes needed"):
        staged(cached(tmp_path), tmp_path / "file" / "x")
