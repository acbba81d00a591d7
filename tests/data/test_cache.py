"""The cache: built once, by one process, read by all; whatever happens to it, it is whole or rebuilt."""

import errno
import json
import logging
import multiprocessing
import os
import stat

import numpy as np
import pytest

from dist_cifar.data import arrays as arrays_module
from dist_cifar.data import cache
from dist_cifar.data.arrays import Arrays, channel_statistics, content_sha256
from dist_cifar.data.cache import cache_directory, load_or_build, memoized
from dist_cifar.errors import DataError
from dist_cifar.run import atomic_io
from dist_cifar.tracking.console import LineHandler
from tests import PATIENCE_SECONDS

KEY = "ab" * 32


def some_arrays(seed=0, n=30):
    generator = np.random.default_rng(seed)
    return Arrays(
        train_images=generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        train_labels=generator.integers(0, 3, n),
        test_images=generator.integers(0, 256, (n // 3, 32, 32, 3), dtype=np.uint8),
        test_labels=generator.integers(0, 3, n // 3),
        classes=("cat", "dog", "frog"),
    )


class Builder:
    def __init__(self, arrays=None):
        self.arrays, self.calls = arrays or some_arrays(), 0

    def __call__(self):
        self.calls += 1
        return self.arrays


def fail():
    pytest.fail("built although it is there")


def assert_same(found, expected):
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(found, name)
        assert np.array_equal(array, getattr(expected, name))
        assert array.dtype == getattr(expected, name).dtype
    assert found.classes == expected.classes


def entry_directory(root):
    (directory,) = (path for path in root.iterdir() if path.is_dir() and path.name.startswith("set-"))
    return directory


# --- what is kept -------------------------------------------------------------------------------------------------


def test_an_entry_is_built_once_and_memory_mapped(tmp_path):
    build = Builder()
    first = load_or_build(tmp_path, "set", KEY, build)
    second = load_or_build(tmp_path, "set", KEY, fail)
    assert build.calls == 1
    for entry in (first, second):
        assert_same(entry.arrays, build.arrays)
        assert isinstance(entry.arrays.train_images, np.memmap)
        assert entry.arrays.train_images.flags.c_contiguous
        assert not entry.arrays.train_images.flags.writeable
    assert (first.stats, first.content_sha256) == (second.stats, second.content_sha256)
    assert first.content_sha256 == content_sha256(build.arrays)
    assert not list(tmp_path.glob("*.tmp"))


def test_keys_and_formats_do_not_mix(tmp_path, monkeypatch):
    load_or_build(tmp_path, "set", KEY, Builder(some_arrays(0)))
    other = load_or_build(tmp_path, "set", "cd" * 32, Builder(some_arrays(1)))
    assert_same(other.arrays, some_arrays(1))
    same_start = load_or_build(tmp_path, "set", KEY[:40] + "0" * 24, Builder(some_arrays(2)))
    assert_same(same_start.arrays, some_arrays(2))
    monkeypatch.setattr(cache, "FORMAT_VERSION", 999)
    newer = Builder(some_arrays(3))
    load_or_build(tmp_path, "set", KEY, newer)
    assert newer.calls == 1


def test_statistics_are_exact(monkeypatch):
    monkeypatch.setattr(arrays_module, "_CHUNK", 7)
    images = some_arrays().train_images
    images[..., 2] = 255  # a channel that does not vary
    stats = channel_statistics(images)
    mean, std = stats.mean, stats.std
    scaled = images.reshape(-1, 3).astype(np.float64) / 255
    assert np.allclose(mean, scaled.mean(axis=0), rtol=1e-14, atol=0)
    assert np.allclose(std[:2], scaled.std(axis=0)[:2], rtol=1e-12, atol=1e-15)
    assert (mean[2], std[2]) == (1.0, 1.0)
    assert channel_statistics(images[::-1]) == stats


def test_the_content_hash_sees_everything():
    def changed(**changes):
        fields = {name: getattr(some_arrays(), name) for name in Arrays.__dataclass_fields__}
        return content_sha256(Arrays(**(fields | changes)))

    flipped = some_arrays().test_images.copy()
    flipped[-1, -1, -1, -1] ^= 1
    relabelled = (some_arrays().train_labels + 1) % 3
    found = [
        changed(),
        changed(test_images=flipped),
        changed(train_labels=relabelled),
        changed(classes=("cat", "dog", "fox")),
    ]
    assert len(set(found)) == 4
    assert changed() == found[0]


# --- damage -------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def edit_meta(**changes):
    def edit(directory):
        path = directory / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: truncate(entry / "train_images.npy"),
        lambda entry: truncate(entry / "test_labels.npy"),
        lambda entry: (entry / "train_images.npy").unlink(),
        lambda entry: (entry / "train_images.npy").write_bytes(b""),
        lambda entry: (entry / "train_images.npy").write_bytes(b"x" * (entry / "train_images.npy").stat().st_size),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "meta.json").write_text(""),
        lambda entry: (entry / "meta.json").write_text("[]"),
        lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe"),
        lambda entry: (entry / "meta.json").write_text("{}"),
        edit_meta(key="cd" * 32),
        edit_meta(classes=["cat"]),
        edit_meta(bytes=None),
        lambda entry: np.save(entry / "test_labels.npy", np.full(10, 3)),
        lambda entry: np.save(entry / "test_labels.npy", np.full(10, -1)),
        lambda entry: np.save(entry / "test_labels.npy", np.zeros(10)),
    ],
)
def test_a_damaged_entry_is_rebuilt(tmp_path, damage):
    load_or_build(tmp_path, "set", KEY, Builder())
    damage(entry_directory(tmp_path))
    build = Builder()
    entry = load_or_build(tmp_path, "set", KEY, build)
    assert build.calls == 1
    assert_same(entry.arrays, build.arrays)
    load_or_build(tmp_path, "set", KEY, fail)


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    load_or_build(tmp_path, "set", KEY, Builder())
    directory = entry_directory(tmp_path)
    directory.rename(directory.with_suffix(".tmp"))
    truncate(directory.with_suffix(".tmp") / "train_images.npy")
    entry = load_or_build(tmp_path, "set", KEY, Builder())
    assert_same(entry.arrays, some_arrays())
    assert not list(tmp_path.glob("*.tmp"))


def test_files_are_on_disk_before_the_entry_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace, renamed = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: (renamed.append(list(synced)), replace(*paths))[1])
    load_or_build(tmp_path, "set", KEY, Builder())
    temporary = f"{entry_directory(tmp_path)}.tmp"
    names = [*(f"{name}.npy" for name in ("train_images", "train_labels", "test_images", "test_labels")), "meta.json"]
    assert renamed == [[*(f"{temporary}/{name}" for name in names), temporary]]
    assert synced[-1] == str(tmp_path)


class NoDirectorySync:
    """Stands in for `os`, on a file system whose directories cannot be synced."""

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(self.number, os.strerror(self.number))
        os.fsync(descriptor)


def test_a_file_system_without_directory_syncs_can_hold_a_cache(tmp_path, monkeypatch):
    """As it can hold checkpoints: EINVAL means that the call does not exist, any other error is one."""
    fake = NoDirectorySync()
    monkeypatch.setattr(atomic_io, "os", fake)
    fake.number = errno.EINVAL
    assert_same(load_or_build(tmp_path, "set", KEY, Builder()).arrays, some_arrays())
    load_or_build(tmp_path, "set", KEY, fail)
    fake.number = errno.EIO
    with pytest.raises(DataError, match=r"Input/output error.*data\.cache_dir"):
        load_or_build(tmp_path, "set", "cd" * 32, Builder())


def test_an_array_is_written_as_numpy_writes_it(tmp_path):
    entry = load_or_build(tmp_path, "set", KEY, Builder())
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.save(tmp_path / "expected.npy", getattr(some_arrays(), name))
        assert (entry.directory / f"{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


# --- places that cannot be written --------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_io, "write_file", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.cache_dir") as caught:
        load_or_build(tmp_path, "set", KEY, Builder())
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_built(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir") as caught:
        load_or_build(tmp_path / "file" / "cache", "set", KEY, fail)
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_a_read_only_cache_serves_what_it_has(tmp_path, monkeypatch):
    """The system calls refuse, rather than the permissions: those do not bind root."""
    load_or_build(tmp_path, "set", KEY, Builder())

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    open_file = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest: refuse() if flags & os.O_CREAT else open_file(path, flags, *rest)
    )
    for name in ("mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    load_or_build(tmp_path, "set", KEY, fail)
    assert memoized(tmp_path, tmp_path / "x", "signature", lambda: "answer") == "answer"
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        load_or_build(tmp_path, "set", "cd" * 32, fail)


def test_a_good_entry_is_read_without_writing(tmp_path, monkeypatch):
    load_or_build(tmp_path, "set", KEY, Builder())
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    monkeypatch.setattr(cache, "only_writer", lambda *args, **kwargs: pytest.fail("locked"))
    load_or_build(tmp_path, "set", KEY, fail)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_an_error_of_the_source_passes_and_frees_the_lock(tmp_path):
    def broken():
        raise DataError("the archive is damaged")

    with pytest.raises(DataError, match=r"^the archive is damaged$"):
        load_or_build(tmp_path, "set", KEY, broken)
    load_or_build(tmp_path, "set", KEY, Builder())


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_directory("here")) == "here"
    assert str(cache_directory(None)) == "/xdg/dist_cifar"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert str(cache_directory(None)) == "/home/me/.cache/dist_cifar"


# --- several processes --------------------------------------------------------------------------------------------


def build_together(root, barrier, waiting, results):
    def build():
        with (root / "builds").open("a") as file:
            file.write("built\n")
        assert all(waiting.acquire(timeout=PATIENCE_SECONDS) for _ in range(3)), "not all others wait"
        return some_arrays()

    def log(line):
        lines.append(line)
        waiting.release()

    lines = []
    logger = logging.getLogger("dist_cifar")
    logger.addHandler(LineHandler(log))
    logger.setLevel(logging.INFO)
    barrier.wait(PATIENCE_SECONDS)
    entry = load_or_build(root, "set", KEY, build)
    results.put((int(entry.arrays.train_images.sum()), entry.content_sha256, len(lines)))


def test_of_processes_that_start_at_once_one_builds(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, waiting, results = context.Barrier(4), context.Semaphore(0), context.Queue()
    arguments = (tmp_path, barrier, waiting, results)
    processes = [context.Process(target=build_together, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=PATIENCE_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    assert (tmp_path / "builds").read_text() == "built\n"
    assert {result[:2] for result in found} == {(int(some_arrays().train_images.sum()), content_sha256(some_arrays()))}
    assert sorted(result[2] for result in found) == [0, 1, 1, 1]  # those who wait say so


def die_while_building(root):
    load_or_build(root, "set", KEY, lambda: os._exit(9))


def test_the_lock_of_a_dead_process_is_free(tmp_path, said):
    process = multiprocessing.get_context("spawn").Process(target=die_while_building, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    load_or_build(tmp_path, "set", KEY, Builder())
    assert said == []


# --- notes --------------------------------------------------------------------------------------------------------


def test_an_answer_is_remembered_while_the_signature_stays(tmp_path):
    asked = []

    def ask(path, signature):
        return memoized(tmp_path, path, signature, lambda: asked.append(1) or f"answer {len(asked)}")

    path = tmp_path / "set.zip"
    assert [ask(path, "s"), ask(path, "s"), ask(path, "t"), ask(path, "t")] == [f"answer {i}" for i in (1, 1, 2, 2)]
    assert ask(tmp_path / "other.zip", "t") == "answer 3"
    assert ask(path, "t") == "answer 2"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"signature": "s", "answer": 1}'])
def test_a_damaged_note_is_asked_again(tmp_path, text):
    memoized(tmp_path, tmp_path / "set.zip", "s", lambda: "answer")
    (note,) = (tmp_path / "index").iterdir()
    note.write_text(text)
    assert memoized(tmp_path, tmp_path / "set.zip", "s", lambda: "again") == "again"
    assert memoized(tmp_path, tmp_path / "set.zip", "s", fail) == "again"
