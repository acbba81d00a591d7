"""Suggestions for what was mistyped, numbers with their nouns, errors of the system as lines, and what may be shown."""

from __future__ import annotations

import errno

import pytest
import torch

from dist_cifar.errors import counted, nearest_path, out_of_memory, printable, system_error


def test_names_that_share_an_extension_alone_are_not_alike(tmp_path):
    (tmp_path / "dog.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    assert nearest_path(tmp_path / "nope.jpg") is None
    assert nearest_path(tmp_path / "dgo.jpg") == nearest_path(tmp_path / "dog.jpeg") == tmp_path / "dog.jpg"
    assert nearest_path(tmp_path / "fotos/cat.png") == tmp_path / "photos/cat.png"


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "step", "1 step"), (0, "step", "0 steps"), (1200, "step", "1,200 steps"), (0.5, "epoch", "0.5 epochs")],
)
def test_one_is_singular(number, noun, expected):
    assert counted(number, noun) == expected


def test_a_plural_of_its_own():
    assert counted(2, "class", "classes") == "2 classes" and counted(1, "class", "classes") == "1 class"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device; free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "[Errno 122] Disk quota exceeded: 'x'; free space"),
        (OSError(errno.EFBIG, "File too large"), "[Errno 27] File too large; free space, or raise"),
        (OSError(errno.EROFS, "Read-only file system"), "[Errno 30] Read-only file system; give another path"),
        (OSError(errno.ESTALE, "Stale file handle"), "[Errno 116] Stale file handle; look whether the disk"),
        (OSError(errno.ETIMEDOUT, "Timed out"), "[Errno 110] Timed out; look whether"),
        (OSError(errno.EHOSTDOWN, "Host is down"), "[Errno 112] Host is down; look"),
        (OSError(errno.EREMOTEIO, "Remote I/O error"), "[Errno 121] Remote I/O error; look"),
        (OSError(errno.ENOLCK, "No locks available"), "[Errno 37] No locks available; the disk cannot"),
        (OSError(errno.ENOENT, "No such file or directory", "a\x1b[2J"), "[Errno 2] No such file or directory: 'a"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "[Errno 36] File name too long: 'x'; look"),
        (OSError(errno.EBADF, "Bad file descriptor"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), None),
        (ValueError("x"), None),
    ],
)
def test_an_error_of_the_system_is_one_line(error, line):
    found = system_error(error)
    assert found is None if line is None else found is not None and found.startswith(line) and "\x1b" not in found


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError("Unable to allocate 2.79 TiB for an array"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 5 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("x"), False),
    ],
)
def test_a_lack_of_memory_is_one_line(error, is_one):
    found = out_of_memory(error)
    assert (found is not None) == is_one
    if found is not None:
        assert str(found).startswith("out of memory: ") and "batch.max_micro_batch" in str(found)


def test_torch_says_so_on_a_cpu_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value) is not None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("été 猫", "été 猫"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("\udce9", "\\udce9"),
        ("a\rb\x7f\x9b", "a\\rb\\x7f\\x9b"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_what_would_move_a_cursor_is_shown_as_python_writes_it(text, shown):
    assert printable(text) == shown
