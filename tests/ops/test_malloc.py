"""Memory that is freed and taken again is not cleared by the kernel each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from dist_cifar.ops.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = []
for _ in range(5):
    blocks = [libc.malloc(1 << 24) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 24)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    keep, default = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "default")
    )
    pages = 4 * 4 * (1 << 24) // 4096
    assert keep < pages // 100
    assert default > pages // 10  # what the test looks at is there (huge pages may make it fewer)
