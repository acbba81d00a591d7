"""Names of files and folders in data sets, as people and systems make them.

Contract: pure functions. A name is compared in one normal form, Unicode's NFC: macOS writes an accented letter as two
characters (NFD) and other systems as one.
"""

from __future__ import annotations

import re
import unicodedata

from dist_cifar.errors import printable

_SYSTEM_FILES = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",
    "#recycle",
}
"""What Windows, macOS, Linux and network disks leave in folders, in lower case."""


def is_ignored(name: str) -> bool:
    """Whether nobody means this file: it is hidden, or a system's own, or below such a folder."""
    return any(part.startswith(".") or part.lower() in _SYSTEM_FILES for part in name.split("/"))


def normal_form(name: str) -> str:
    """The name as it is compared, stored and shown."""
    return unicodedata.normalize("NFC", name)


def shown(text: str) -> str:
    """Text with names of files in it, as one line that moves no terminal's cursor."""
    return printable(text).replace("\n", "\\n")


def why_unusable(class_name: str) -> str | None:
    """Why a folder's name cannot be the name of a class; None if it can."""
    if re.search(r"[\ud800-\udfff]", class_name):
        return "its name is not UTF-8; rename it"
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in class_name):
        return "its name has a control character or the end of a line; rename it"
    return None
