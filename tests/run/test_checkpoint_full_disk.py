"""The checkpoint store on disks that are full or cannot be written."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch

from dist_cifar.errors import CheckpointError
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


def check_full_disk(code: Code, root: Path) -> int:
    """The disk is full from each call on; returns the number of calls tried."""
    for full_at in itertools.count():
        directory = root / str(full_at)
        store, said = code.store(directory, keep_last=2)
        with using(code, Disk()):
            save(store, 10, 0, best=True)
            save(store, 20, 1)
        with using(code, Disk(full_at=full_at)):
            try:
                save(store, 30, 2, best=True)
                break
            except CheckpointError as error:
                assert str(directory) in str(error) and "No space left" in str(error) and "free space" in str(error)
                assert "\n" not in str(error) and error.exit_code == 74
        if "step-00000030" not in names(directory):
            assert names(directory) == {"step-00000010", "step-00000020", "latest", "best"}
        else:  # then an interrupted deletion of the old best may have left a part
            assert "step-00000020" in names(directory)
        check_state(code, directory, newest={1, 2}, best={0, 2})
        with using(code, Disk()):
            save(store, 30, 3)
        assert mark_of(store.load_newest()) == 3 and said == []
    return full_at


def check_warning(code: Code, root: Path) -> None:
    """`on_write_error="warn"`: the disk is full from each call on, the training goes on and can save again later."""
    for full_at in itertools.count():
        directory = root / f"warned {full_at}"
        store, said = code.store(directory, keep_last=2, on_write_error="warn")
        with using(code, Disk()):
            save(store, 10, 0, best=True)
            save(store, 20, 1)
        with using(code, Disk(full_at=full_at)):
            store.begin_save(30, tensors_of(2), {"mark": 2}, best=True)
            store.wait()
            if not said:
                store.wait(must_succeed=True)
                break
            assert len(said) == 1 and "\n" not in said[0] and "on_write_error=warn" in said[0]
            assert str(directory) in said[0] and "No space left" in said[0] and "free space" in said[0]
            assert not store.failed
            for _ in range(2):
                with pytest.raises(CheckpointError, match="cannot save step 30") as caught:
                    store.wait(must_succeed=True)
                assert caught.value.exit_code == 74
        if "step-00000030" not in names(directory):
            assert names(directory) == {"step-00000010", "step-00000020", "latest", "best"}
        check_state(code, directory, newest={1, 2}, best={0, 2})
        with using(code, Disk()):
            save(store, 40, 3)
            store.wait(must_succeed=True)
        assert mark_of(store.load_newest()) == 3 and len(said) == 1
    assert full_at > 20 or code is not REAL


def test_a_full_disk_can_be_a_warning(tmp_path):
    check_warning(REAL, tmp_path)


def test_a_disk_full_at_any_call_is_an_error_and_loses_nothing(tmp_path):
    assert check_full_disk(REAL, tmp_path) > 20


def test_a_disk_that_turns_read_only_at_any_call_is_an_error_and_loses_nothing(tmp_path):
    for broken_at in itertools.count():
        directory = tmp_path / str(broken_at)
        store, said = REAL.store(directory)
        with using(REAL, Disk()):
            save(store, 10, 0)
        with using(REAL, Disk(broken_at=broken_at)):
            try:
                save(store, 20, 1)
                break
            except CheckpointError as error:
                assert "Read-only file system" in str(error) and "writable" in str(error)
        check_state(REAL, directory, newest={0, 1}, best={None})
        with using(REAL, Disk()):
            save(store, 20, 2)
        assert names(directory) in ({"latest", "step-00000020"}, {"latest", "step-00000020-2"})
        assert mark_of(store.load_newest()) == 2 and said == []
    assert broken_at > 20


def test_a_full_file_system(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system; the injected errors test the same")
    try:
        store, said = REAL.store(tmp_path / "checkpoints")
        save(store, 10, 0)
        big = {"model": {"weight": torch.zeros(100_000)}}
        store.begin_save(20, big, {})
        with pytest.raises(CheckpointError, match=r"step 20 \(0\.4 MB needed, 0\.\d MB free\): .*No space left"):
            store.wait()
        assert names(store.directory) == {"step-00000010", "latest"}
        assert mark_of(store.load_newest()) == 0 and said == []
        save(store, 20, 1)
        assert mark_of(store.load_newest()) == 1
        remount = ["mount", "-o", "remount,ro", tmp_path]
        subprocess.run(remount, check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            save(store, 30, 2)
        warning, said = REAL.store(store.directory, on_write_error="warn")
        warning.begin_save(30, tensors_of(2), {"mark": 2})
        warning.wait()
        assert len(said) == 1 and "Read-only file system" in said[0]
        assert mark_of(warning.load_newest()) == 1
        subprocess.run([*remount[:2], "remount,rw", tmp_path], check=True)
        save(warning, 30, 2)
        assert names(store.directory) == {"step-00000030", "latest"} and len(said) == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    store, _ = REAL.store(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints"):
        save(store, 1, 0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load_newest()


def test_a_defect_of_the_caller_is_not_taken_for_a_full_disk(tmp_path):
    store, _ = REAL.store(tmp_path)
    with pytest.raises(TypeError):
        store.begin_save(1, tensors_of(0), {"not JSON": object()})
    with pytest.raises(KeyError, match="complex64"):
        store.begin_save(1, {"model": {"weight": torch.zeros(1, dtype=torch.complex64)}}, {})
    assert names(tmp_path) == set()
    assert store.load_newest() is None


# --- mutants ----------------------------------------------------------------------------------------------------

MUTANTS = {
    "temporaries of a failure left": (
        check_full_disk,
        "checkpoint",
        "                atomic_io.remove_tree(temporary)\n",
        "                pass\n",
    ),
    "a full disk not caught": (
        check_full_disk,
        "checkpoint",
        "except (OSError, CheckpointError) as error:",
        "except KeyError as error:",
    ),
    "warned and raised": (check_warning, "checkpoint", 'if self._on_write_error == "raise":', "if True:"),
    "not warned": (
        check_warning,
        "checkpoint",
        '                logger.info(f"checkpoint.on_write_error=warn: {self._failure}")\n',
        "",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])
