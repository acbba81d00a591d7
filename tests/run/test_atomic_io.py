"""The durable writes under the checkpoints, the cache and the small files of a run."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from pathlib import Path

import pytest

from dist_cifar.run import atomic_io
from tests.run.checkpoint_harness import REAL, Code, Death, Disk, assert_caught, names, using


def check_write_atomic(code: Code, root: Path) -> int:
    """The old content or the new, whenever the process dies; the new once it has returned."""
    path = root / "file"
    for die_at in itertools.count():
        with using(code, Disk()):
            code.atomic_io.write_atomic(path, "old")
        with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
            code.atomic_io.write_atomic(path, b"new content")
        disk.lose_power(root, is_lost=lambda: True)
        assert path.read_bytes() in ({b"old", b"new content"} if disk.died else {b"new content"})
        if not disk.died:
            return die_at


def test_write_atomic(tmp_path):
    assert check_write_atomic(REAL, tmp_path) == 5  # open, write, fsync, rename, fsync of the directory
    assert names(tmp_path) == {"file"}
    atomic_io.write_atomic(tmp_path / "file", "ü")
    assert (tmp_path / "file").read_bytes() == "ü".encode()
    with using(REAL, Disk(full_at=1)), pytest.raises(OSError, match="No space"):
        atomic_io.write_atomic(tmp_path / "file", "x")
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "ü"


def test_a_write_may_be_short(tmp_path, monkeypatch):
    disk = Disk()
    disk.write = lambda descriptor, data: os.write(descriptor, data[:7])
    with using(REAL, disk):
        atomic_io.write_file(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_file_system_without_directory_syncs(tmp_path):
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    disk = Disk()
    disk.fsync = fsync
    with using(REAL, disk):
        number = errno.EINVAL
        atomic_io.fsync_dir(tmp_path)
        number = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            atomic_io.fsync_dir(tmp_path)


# --- what a person names as an output ----------------------------------------------------------------------------


def test_a_link_keeps_its_place_and_its_target_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "elsewhere/there", tmp_path / "elsewhere/new"):
        if target.name == "there":
            target.write_text("old")
        link = tmp_path / f"link-{target.name}"
        link.symlink_to(target)
        atomic_io.write_output(link, "new")
        assert link.is_symlink() and target.read_text() == "new"


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(FileExistsError, match="Not a regular file"):
            atomic_io.write_atomic(path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_device_and_a_pipe_are_written_through(tmp_path):
    atomic_io.write_output(Path(os.devnull), "new")
    assert Path(os.devnull).is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_io.write_output(pipe, "new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(OSError, match="No space left"):
        atomic_io.write_output(Path("/dev/full"), "new")


def test_an_open_file_is_written_after_what_it_holds(tmp_path, capfd):
    print("before", flush=True)
    atomic_io.write_output(Path("/dev/stdout"), "out\n")
    atomic_io.write_output(Path("/dev/fd/2"), b"err\n")
    assert capfd.readouterr() == ("before\nout\n", "err\n")
    with open(tmp_path / "log", "w") as log:
        log.write("before ")
        log.flush()
        atomic_io.write_output(Path(f"/proc/self/fd/{log.fileno()}"), "after")
    assert (tmp_path / "log").read_text() == "before after"


def test_a_long_name_has_room_for_its_temporary_file(tmp_path):
    atomic_io.write_atomic(tmp_path / ("x" * 255), "new")
    atomic_io.write_atomic(tmp_path / ("猫" * 85), "new")
    assert len(list(tmp_path.iterdir())) == 2


# --- mutants ----------------------------------------------------------------------------------------------------

MUTANTS = {
    "rename not synced in write_atomic": (check_write_atomic, "atomic_io", "    fsync_dir(new.parent)\n", ""),
    "overwritten in place": (
        check_write_atomic,
        "atomic_io",
        'path.with_name(f".tmp-{path.name[:_NAME_CHARACTERS]}-{secrets.token_hex(4)}")',
        "path",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])
