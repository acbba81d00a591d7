"""The wheel alone: built, installed beside the packages that it needs, and used in an empty folder, without a clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dist_cifar import __version__
from dist_cifar.cli import main
from tests import PATIENCE_SECONDS, REPOSITORY
from tests.small_runs import VALUES

SOURCES = ("dist_cifar", "configs", "launch", "slurm", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SCRIPTS = {
    "torchrun": "#!{python}\nfrom torch.distributed.run import main\nmain()\n",
    "sbatch": '#!/bin/bash\ncat >/dev/null\necho said "$*"\n',
}
"""Commands of the environment: torch's, and an sbatch that accepts all."""
WHICH = "import dist_cifar, importlib.metadata as m; print(dist_cifar.__file__, m.version('dist_cifar'))"


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """What a command prints, started without the paths of this suite; it must end well."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if path is not None:
        environ["PATH"] = f"{path}:/usr/bin:/bin"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, f"exit code {done.returncode} of {command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> Path:
    """A virtual environment with the wheel, in which the packages of this one are found too."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "sources").mkdir()
    run("cp", "-r", *(REPOSITORY / name for name in SOURCES), root / "sources", cwd=root)
    run(sys.executable, "-c", BUILD, root, cwd=root / "sources")
    (wheel,) = root.glob("*.whl")
    assert wheel.name == f"dist_cifar-{__version__}-py3-none-any.whl"
    environment = root / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=root)
    run(environment / "bin/python", "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=root)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    for name, text in SCRIPTS.items():
        (environment / "bin" / name).write_text(text.format(python=environment / "bin/python"))
        (environment / "bin" / name).chmod(0o755)
    return environment


def modes(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_the_wheel_stands_alone(environment, tmp_path):
    project = tmp_path / "mine"

    def typed(line: str, cwd: Path = project) -> str:
        return run(*line.split(), cwd=cwd, path=environment / "bin")

    typed("dist-cifar init mine", tmp_path)
    file, version = run(environment / "bin/python", "-c", WHICH, cwd=project).split()
    assert file.startswith(str(environment)) and version == __version__
    assert main(["init", str(tmp_path / "of the clone")]) == 0
    assert modes(project) == modes(tmp_path / "of the clone")

    own = {"model.name": "my_models:Net", "model.options.width": "8"}
    fields = [f"{key}={value}" for key, value in (VALUES | own | {"train.max_steps": "2"}).items()]
    training = " ".join(["--config configs/quickstart.yaml", *fields])
    typed(f"dist-cifar train {training}")
    typed(f"launch/local.sh --ranks 1 {training} run.dir=runs/torchrun")
    first, second = (
        json.loads((project / "runs" / name / "summary.json").read_text()) for name in ("quickstart", "torchrun")
    )
    assert first["steps"] == second["steps"] == 2 and first["weights_sha256"] == second["weights_sha256"]
    assert first["own_files"].keys() == second["own_files"].keys() == {"my_models.py"}

    typed("dist-cifar report runs/quickstart runs/torchrun --out both.html")
    assert "runs/torchrun" in (project / "both.html").read_text()
    printed = typed("dist-cifar submit --dry-run --gpus-per-node 0 --config configs/quickstart.yaml run.dir=runs/job")
    assert f"#SBATCH --chdir={project}\n" in printed and "said --test-only" in printed
