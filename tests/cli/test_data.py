"""`data`: what it fetches, caches and prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.config import load_config
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.sources import SOURCES, CifarArchive
from tests.cli.small import SMALL, arguments
from tests.data.sources.test_cifar import assert_is_the_data, put
from tests.data.test_dataset import as_arrays


def test_data_is_fetched_once_and_found_without_its_source(tmp_path, monkeypatch, capsys, said):
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(SOURCES, "cifar10", CifarArchive(put(tmp_path / "data")))
    assert main(["data", *arguments(tmp_path)]) == 0
    out = capsys.readouterr().out
    (tmp_path / "data" / "small.tar.gz").unlink()
    config = load_config(None, arguments(tmp_path))
    found = load_dataset(config.data)
    assert not said
    assert_is_the_data(as_arrays(found))
    assert f"\nsha256   {found.content_sha256}\n" in out
    assert re.search(r"cifar10: 14 images to train on, .* 7 to test on, 3 classes", out)
    (cache,) = re.findall(r"(?m)^cache    (.*)$", out)
    assert Path(cache) == found.directory and Path(cache).parent == tmp_path / "cache"


def test_data_does_not_stage(tmp_path, monkeypatch, capsys):
    """A login node may have neither the variable nor the directory."""
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    assert main(["data", *SMALL, *arguments(tmp_path), "data.stage_dir=$SLURM_TMPDIR"]) == 0
    assert f"cache    {tmp_path / 'cache'}/synthetic-" in capsys.readouterr().out


def test_fields_of_data_may_stand_around_its_option(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("data: {source: synthetic, synthetic_test_size: 30, validation_size: 10}")
    config = ["--config", str(tmp_path / "mine.yaml")]
    assert main(["data", "data.synthetic_train_size=60", *config, *arguments(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "60 images to train on" in out and "30 to test on" in out


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["data.rot=x"], 2, r"data\.rot: unknown key; did you mean data\.root\?"),
        (["--steps", "3"], 2, r"unrecognized arguments: --steps"),
        (["data.source=folder"], 74, r"/data: .*data\.root must hold"),
        (["data.cache_dir=/dev/null/x"], 74, r"data\.cache_dir"),
    ],
)
def test_errors_of_data_are_one_line(tmp_path, capsys, extra, code, message):
    keys = {word.partition("=")[0] for word in extra}
    given = [word for word in [*SMALL, *arguments(tmp_path)] if word.partition("=")[0] not in keys]
    assert main(["data", *given, *extra]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and re.search(message, err), err


def test_data_imports_no_torch(tmp_path):
    code = "import sys; from dist_cifar.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "data", *SMALL, *arguments(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
