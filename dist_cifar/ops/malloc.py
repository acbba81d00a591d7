"""Tunes glibc malloc to retain freed blocks: the next step of a training takes the same amount of memory again.

Contract: after `keep_freed_memory`, blocks that are freed stay with the process. By default the larger of them go back
to the kernel, which clears each page anew when it is touched again. Without glibc nothing happens.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""The numbers of two parameters in glibc's <malloc.h>."""
_NEVER = -1


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed, for the whole process, from now on."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _NEVER)
