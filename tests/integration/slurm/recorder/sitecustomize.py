"""Python loads this module at its start where its folder is on PYTHONPATH: it makes ranks slow, watched or broken.

RECORDER_FOLDER   each rank adds a line to ledger-<rank>.jsonl for each batch that it trains on: step, time and a hash
                  of each sample (pixels after the augmentation, and label)
RECORDER_SECONDS  how long it sleeps before it trains on a batch; `3 0.1`: 3 s in the job's first attempt, 0.1 s later
RECORDER_CRASH    `STEP ATTEMPTS`: rank 0 fails at that step in as many attempts
"""

import importlib.abc
import importlib.util
import os
import sys


def _record(loader):
    import hashlib
    import json
    import time
    from pathlib import Path

    prefetch = loader.prefetch
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    seconds = [float(text) for text in os.environ.get("RECORDER_SECONDS", "0").split()]
    crash_step, crash_attempts = map(int, os.environ.get("RECORDER_CRASH", "0 0").split())

    def recorded(make, steps, *arguments):
        ledger = Path(os.environ["RECORDER_FOLDER"]) / f"ledger-{rank}.jsonl"
        for step, batch in zip(steps, prefetch(make, steps, *arguments), strict=True):
            time.sleep(seconds[min(attempt, len(seconds) - 1)])
            if step == crash_step and rank == "0" and attempt < crash_attempts:
                raise RuntimeError("the recorder breaks this attempt")
            hashes = [
                hashlib.sha256(pixels.numpy().tobytes() + bytes([label])).hexdigest()[:16]
                for pixels, label in zip(batch.inputs, batch.labels.tolist(), strict=True)
            ]
            with ledger.open("a") as file:
                file.write(json.dumps({"step": step, "time": time.time(), "samples": hashes}) + "\n")
            yield batch

    loader.prefetch = recorded


class _Finder(importlib.abc.MetaPathFinder):
    """Patches the loader of batches once it has been imported, and costs nothing before."""

    def find_spec(self, name, path, target=None):
        if name != "dist_cifar.data.prefetch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            _record(module)

        spec.loader.exec_module = patched
        return spec


if "RECORDER_FOLDER" in os.environ:
    sys.meta_path.insert(0, _Finder())
