"""Guards against other users where a folder is shared, such as /tmp, /dev/shm or a cache of several.

Contract: only this user can write in an `own_folder`. `private_in` is the folder that the config names, unless all can
write to it. `require_trusted` refuses what another user or all could have changed. A disk that keeps no rights is used
as it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from dist_cifar.errors import DataError

FOLDER_MODE = 0o775
"""The mode of folders that several users may read; the umask takes away from it, and all may never write."""


def own_folder(shared: Path, key: str) -> Path:
    """The folder of this user alone in `shared`, made if it is missing. Raises `DataError`, which names `key`.

    Raises `OSError` where it cannot be made.
    """
    folder = shared / f"dist_cifar-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DataError(
            f"{folder}: belongs to another user, who could change what is read from it; set {key} to another directory,"
            " or have that one removed"
        )
    if status.st_mode & 0o022:
        with contextlib.suppress(OSError):  # a disk without rights
            folder.chmod(0o700)
    return folder


def private_in(configured: Path, key: str) -> Path:
    """`configured`, or where all may write to it `own_folder` in it. Raises `DataError`.

    Raises `DataError` too for another user's folder in one that all may write to, who may have been the first to use
    its name.
    """
    try:
        status, parent = os.stat(configured), os.stat(configured.absolute().parent)
        owners = {status.st_uid, os.lstat(configured).st_uid}
        if status.st_mode & stat.S_IWOTH:
            return own_folder(configured, key)
    except (FileNotFoundError, NotADirectoryError):
        return configured  # it is made, or refused, when it is written to
    except OSError as error:
        raise DataError(f"{key}={configured}: cannot be used ({error.strerror}); set another directory") from None
    if parent.st_mode & stat.S_ISVTX and owners - {os.getuid(), 0, parent.st_uid}:
        raise DataError(
            f"{key}={configured}: belongs to another user in a folder that is everybody's; set another directory"
        )
    return configured


def require_trusted(directory: Path, key: str) -> None:
    """Raises `DataError` if the files in `directory` could be those of others than whoever owns its folder.

    Files that are missing or cannot be listed are not used, and no problem here.
    """
    with contextlib.suppress(OSError):
        base = os.stat(directory.parent)
        shared_bits = 0 if base.st_mode & stat.S_IWOTH else stat.S_IWOTH  # the disk keeps no rights
        for path in (directory, *directory.iterdir()):
            status = os.lstat(path)
            is_foreign = status.st_uid not in (os.getuid(), 0, base.st_uid) and not base.st_mode & stat.S_IWGRP
            if is_foreign or (status.st_mode & shared_bits and not stat.S_ISLNK(status.st_mode)):
                raise DataError(
                    f"{path}: {'belongs to another user' if is_foreign else 'all users may write to it'}, who could"
                    f" change the images; remove {directory}, or set {key} to another directory"
                )


def close_to_all(folder: Path) -> None:
    """Takes from all users the right to write to the files in `folder`, which a umask of 0 has given to them."""
    for path in folder.iterdir():
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        if mode & stat.S_IWOTH:
            with contextlib.suppress(OSError):  # a disk without rights
                path.chmod(mode & ~stat.S_IWOTH)
