"""The names and the bytes in a folder or a zip of images.

Contract: `opened` lists what may be of a data set, by relative names that are separated by `/`; folders end in one.
Nothing is unpacked to disk, so a name in a zip can lead nowhere; one that tries is refused all the same. Whatever a
hostile or damaged zip makes Python's reader raise is a `DataError` of one line.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dist_cifar.data.decode import MAX_FILE_BYTES, read_file, why_unreadable
from dist_cifar.data.names import is_ignored, shown
from dist_cifar.errors import DataError, nearest_path, one_line

SPLITS = ("train", "test")
LAYOUT = "data.root must hold train/<class>/<image> and test/<class>/<image>"
_SPLIT_FOLDER = re.compile(rf"(?:[^/]+/)?(?:{'|'.join(SPLITS)})/", re.DOTALL)
_MAX_UNPACKED_BYTES = 10_000_000_000
_MAX_RATIO = 100
"""Above `_MAX_UNPACKED_BYTES`, how many times its own size a zip may unpack to."""
_WINDOWS = (0, 10, 11, 14)
"""Systems whose zips may have a backslash between folders, by their numbers in a zip."""
_ENCRYPTED, _UTF8 = 0x1, 0x800
"""Flags of a zip's member."""
_LIMITED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Methods whose reader unpacks no more at a time than it is asked for."""


@dataclass(kw_only=True)
class ImageTree:
    """An open folder or zip."""

    names: list[str]
    read: Callable[[str], bytes]
    """The content of the file of a name. Raises anything for one that cannot be read."""
    faults: list[str] = field(default_factory=list)
    """What cannot be listed or is not unique, each as `<name> <what is wrong with it>`."""


def is_folder(root: Path) -> bool:
    """Whether `root` is a folder, else it is a file. Raises `DataError` if it is neither."""
    try:
        mode = os.stat(root).st_mode
    except (FileNotFoundError, NotADirectoryError):
        near = nearest_path(root)
        hint = LAYOUT if near is None or root.is_symlink() else f"did you mean {near}?"
        raise DataError(f"{root}: there is no such file or folder; {hint}") from None
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); {LAYOUT}") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise DataError(f"{root}: neither a folder nor a zip; {LAYOUT}")
    return stat.S_ISDIR(mode)


@contextmanager
def opened(root: Path) -> Iterator[ImageTree]:
    """Opens the folder or zip `root`. Raises `DataError`."""
    if is_folder(root):
        yield _folder_tree(root)
    else:
        with _opened_zip(root) as archive:
            yield _zip_tree(root, archive)


# --- folders -----------------------------------------------------------------------------------------------------


def _folder_tree(root: Path) -> ImageTree:
    """What lies in class folders, and what lies beside them on the way. Folders of other names are not entered."""
    tree = ImageTree(names=[], read=lambda name: read_file(root / name))
    tops = _listing(tree, root, "")
    if not any(map(_SPLIT_FOLDER.fullmatch, tops)):
        tops += [name for top in _folders(tops) for name in _listing(tree, root, top)]
    tree.names += tops
    for split in filter(_SPLIT_FOLDER.fullmatch, tops):
        classes = _listing(tree, root, split)
        tree.names += classes
        for class_folder in _folders(classes):
            tree.names += _listing(tree, root, class_folder)
    return tree


def _folders(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith("/")]


def _listing(tree: ImageTree, root: Path, folder: str) -> list[str]:
    """The names in a folder. A folder that cannot be listed and a link that may have been one are faults."""
    names = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if is_ignored(name):
                    continue
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                names.append(f"{name}/" if is_folder else name)
                may_be_folder = _SPLIT_FOLDER.fullmatch(folder) or _SPLIT_FOLDER.fullmatch(f"{name}/")
                if may_be_folder and entry.is_symlink() and not os.path.exists(entry.path):
                    tree.faults.append(f"{name} is {why_unreadable(root / name, FileNotFoundError())}")
    except OSError as error:
        if not folder:
            raise DataError(f"{root}: cannot be read ({error.strerror}); {LAYOUT}") from None
        if _SPLIT_FOLDER.match(folder):
            tree.faults.append(f"{folder} cannot be listed ({error.strerror})")
    return sorted(names)


# --- zips --------------------------------------------------------------------------------------------------------


def _opened_zip(root: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(root)
    except Exception as error:  # the reader raises anything for a directory that is damaged or of a later version
        raise DataError(f"{root}: neither a folder nor a zip that can be read ({one_line(error)}); {LAYOUT}") from None


def _zip_tree(root: Path, archive: zipfile.ZipFile) -> ImageTree:
    infos = archive.infolist()
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * root.stat().st_size):
        raise DataError(f"{root}: unpacks to {unpacked:,} bytes, as a decompression bomb does; make a new zip")
    members: dict[str, zipfile.ZipInfo] = {}
    tree = ImageTree(names=[], read=lambda name: _read_member(archive, members[name]))
    has_slashes = any("/" in info.filename for info in infos)
    for info in infos:
        name = _member_name(info, has_slashes)
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match("[A-Za-z]:", name):
            raise DataError(f"{root}: its member {shown(name)} points outside; make a new zip")
        if info.flag_bits & _ENCRYPTED:
            raise DataError(f"{root}: its member {shown(name)} is encrypted; make a zip without a password")
        if name in members and not name.endswith("/") and not is_ignored(name):
            tree.faults.append(f"{name} is in it twice")
        members[name] = info
    tree.names = [name for name in members if not is_ignored(name)]
    return tree


def _member_name(info: zipfile.ZipInfo, has_slashes: bool) -> str:
    """The name of a member. Writers on macOS do not say that theirs are UTF-8; those on Windows may use backslashes."""
    name = info.filename
    if not info.flag_bits & _UTF8:
        with contextlib.suppress(ValueError):  # it is in the code page that the reader has assumed, or an unknown one
            name = name.encode("cp437").decode()
    return name.replace("\\", "/") if info.create_system in _WINDOWS or not has_slashes else name


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of a member, which is not trusted to unpack to as much as it declares."""
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError("a link")
    if info.file_size > MAX_FILE_BYTES:  # the reader returns no more than is declared
        raise ValueError(f"unpacks to more than {MAX_FILE_BYTES:,} bytes")
    chunk = 1 << 20 if info.compress_type in _LIMITED else 1 << 12
    with archive.open(info) as file:
        return b"".join(iter(lambda: file.read(chunk), b""))
