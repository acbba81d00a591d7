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
faults, size = [], int(sys.argv[2])
for _ in range(5):
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("mib", [16, 64, 600])  # also more in all than an int can count
def test_freed_memory_is_kept(mib):
    keep, default = (
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, mode, str(mib << 20)], capture_output=True, check=True
            ).stdout
        )
        for mode in ("keep", "default")
    )
    pages = 4 * 4 * (mib << 20) // 4096
    assert keep < pages // 100
    assert default > pages // 10  # what the test looks at is there (huge pages may make it fewer)
