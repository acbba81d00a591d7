"""The suite. `tests/` mirrors the package; `tests/integration/` holds launchers, SLURM, faults and documents."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 600
"""How long what takes seconds on an idle machine may take on a busy one, where a test only has to end at all."""

# Before torch loads OpenMP, here and in every process that a test starts: threads that wait for each other sleep. By
# default they spin, and on a machine with more processes than cores a run takes two to four times the CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@functools.cache
def may_make_namespaces() -> bool:
    """Whether this process may make namespaces of networks and mounts; root in a container may not."""
    command = ["unshare", "--net", "--mount", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
