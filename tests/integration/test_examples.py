"""The examples that are programs: the sweep, and the notebook in a kernel of its own."""

from __future__ import annotations

import ast
import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_cifar.config import load_config
from dist_cifar.run.run_dir import RunDir
from examples import sweep
from tests import PATIENCE_SECONDS, REPOSITORY
from tests.small_runs import VALUES

NOTEBOOK = REPOSITORY / "examples/tour.ipynb"
SHORTER = ("data.synthetic_train_size=1140", "data.synthetic_test_size=200", "train.epochs=2")
"""What takes the place of the notebook's epochs."""


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def result(**summary: float) -> Any:
    return SimpleNamespace(summary=summary)


def test_the_best_learning_rate_of_a_sweep_is_that_of_the_validation_split():
    table = sweep.table(
        {
            (1e-5, 0): result(best_val_accuracy=0.5, test_accuracy=0.9, images_per_second=1000),
            (0.02, 0): result(best_val_accuracy=0.5, test_accuracy=0.5, images_per_second=1000),
            (0.02, 1): result(best_val_accuracy=0.75, test_accuracy=0.75, images_per_second=3000),
        }
    )
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["0.02", "2", "62.50%", "62.50%", "2,000"],
        ["1e-05", "1", "50.00%", "90.00%", "1,000"],
    ]


@pytest.mark.slow
def test_a_sweep_trains_each_run_once(tmp_path, capsys):
    fields = [f"{key}={value}" for key, value in (VALUES | {"train.max_steps": "2"}).items()]
    common = ["--config", str(REPOSITORY / "configs/quickstart.yaml"), "--ranks", "1", "--dir", str(tmp_path)]
    sweep.main([*common, "--lr", "1e-5", *fields])
    first = capsys.readouterr().out
    assert first.splitlines()[-1].split()[:2] == ["1e-05", "1"]
    sweep.main([*common, "--lr", "1e-5,0.01", *fields])
    second = capsys.readouterr().out
    assert "lr-1e-05-seed-0: this run is done" in second
    assert {line.split()[0] for line in second.splitlines()[-2:]} == {"1e-05", "0.01"}
    for name, lr in (("lr-1e-05-seed-0", 1e-5), ("lr-0.01-seed-0", 0.01)):
        run_dir = RunDir(tmp_path / name)
        assert run_dir.summary()["steps"] == 2
        assert load_config(run_dir.path / "config.yaml").optimizer.lr == lr


def test_an_error_of_a_sweep_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--dir", str(tmp_path), "train.epoch=1"])
    assert str(caught.value).startswith("sweep: ") and "train.epochs" in str(caught.value)


def test_the_notebook_is_committed_without_outputs():
    """Times, speeds and pictures differ from machine to machine: they would change with each execution."""
    assert [cell["id"] for cell in cells() if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> tuple[Path, Any]:
    """The notebook, executed with fewer steps in a copy of its place, and the folder above it."""
    import nbformat
    from nbclient import NotebookClient

    root = tmp_path_factory.mktemp("notebook")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    (root / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = (cell for cell in notebook.cells if cell.id == "train")
    assert training.source.count('"train.epochs=4"') == 1
    training.source = training.source.replace('"train.epochs=4"', ", ".join(f'"{field}"' for field in SHORTER))
    place = {"metadata": {"path": str(root / "examples")}}
    with pytest.MonkeyPatch.context() as patch:  # what a kernel writes for itself
        for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(root / name.lower()))
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        NotebookClient(notebook, kernel_name="python3", timeout=PATIENCE_SECONDS, resources=place).execute()
    return root, notebook


def outputs(notebook: Any, name: str) -> list[Any]:
    return next(cell.outputs for cell in notebook.cells if cell.id == name)


@pytest.mark.slow
def test_the_notebook_trains_on_two_ranks_and_draws(executed):
    root, notebook = executed
    printed = "".join(output.get("text", "") for output in outputs(notebook, "train"))
    assert "ranks      2 x cpu, 1 thread each, strategy exact" in printed and "own files  __main__:Tour" in printed
    assert "<RunResult: done," in outputs(notebook, "train")[-1].data["text/plain"]
    for name, least in (("curves", 600), ("confusion", 400), ("predict", 600)):
        shown = [output.get("data", {}) for output in outputs(notebook, name)]
        (drawn,) = (data["image/png"] for data in shown if "image/png" in data)
        picture = Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGB")
        assert picture.width > least and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50
    assert "predicts the same classes" in outputs(notebook, "export")[-1].text
    assert (root / "runs/tour/export/model.pt2").is_file()


@pytest.mark.slow
def test_the_command_line_gives_the_notebooks_weights(executed):
    root, notebook = executed
    sources = {cell.id: cell.source for cell in notebook.cells}
    (root / "from_notebook.py").write_text(f"{sources['imports']}\n{sources['network']}\n")
    (fields,) = (node for node in ast.walk(ast.parse(sources["train"])) if isinstance(node, ast.List))
    names = {
        "model.name=tour": "model.name=from_notebook:Tour",
        "schedule.name=ramps": "schedule.name=from_notebook:ramps",
        "run.dir=../runs/tour": "run.dir=runs/command",
    }
    words = [names.get(field, field) for field in ast.literal_eval(fields)]
    command = [sys.executable, "-m", "dist_cifar", "train", "--config", "configs/quickstart.yaml", *words]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (RunDir(root / "runs" / name).summary() for name in ("tour", "command"))
    assert (first["world_size"], second["world_size"]) == (2, 1)
    assert first["weights_sha256"] == second["weights_sha256"]
