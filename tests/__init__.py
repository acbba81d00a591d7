"""The suite. `tests/` mirrors the package; `tests/integration/` holds launchers, SLURM, faults and documents."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
