"""Commands that do their work without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.cli import main as cli
from dist_cifar.config import describe
from dist_cifar.data import dataset
from dist_cifar.data.dataset import load_dataset
from dist_cifar.errors import nearest_path
from tests.data.sources.test_cifar import assert_is_the_data, put
from tests.data.test_dataset import as_arrays

SMALL = ["data.source=synthetic", "data.synthetic_train_size=60", "data.synthetic_test_size=20"]
SMALL += ["data.validation_size=10"]


def arguments(root: Path) -> list[str]:
    return ["data.root=" + str(root / "data"), "data.cache_dir=" + str(root / "cache")]


# --- data ---------------------------------------------------------------------------------------------------------


def test_data_is_fetched_once_and_found_without_its_source(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(dataset.ARCHIVES, "cifar10", put(tmp_path / "data"))
    assert main(["data", *arguments(tmp_path)]) == 0
    out = capsys.readouterr().out
    (tmp_path / "data" / "small.tar.gz").unlink()
    config = cli.load_config(None, arguments(tmp_path))
    found = load_dataset(config.data, say=lambda line: pytest.fail(line))
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


# --- train --print-run-dir ----------------------------------------------------------------------------------------


def test_the_run_directory_is_printed_and_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    for words, expected in (
        ([], "runs/cifar10_resnet18"),
        (["--config", "mine.yaml"], "runs/mine"),
        (["--config", "mine.yaml", "run.name=other"], "runs/other"),
        (["run.dir=a b/$c"], "a b/$c"),
    ):
        assert main(["train", "--print-run-dir", *words]) == 0
        assert capsys.readouterr() == (f"{expected}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_one_rank_prints_it(monkeypatch, capsys):
    for name in ("RANK", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert main(["train", "--print-run-dir"]) == 0
            assert capsys.readouterr().out == ""


def test_a_config_that_is_refused_has_no_run_directory(capsys):
    assert main(["train", "--print-run-dir", "run.name=a/b"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "run.name" in err


# --- both ---------------------------------------------------------------------------------------------------------


def test_neither_imports_torch(tmp_path):
    code = "import sys; from dist_cifar.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for words in (["data", *SMALL, *arguments(tmp_path)], ["train", "--print-run-dir"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


TRAIN_AND_LIST = """
import sys
from dist_cifar.cli import main
from dist_cifar.config import describe
code = main(["train", *sys.argv[1:]])
print(code, *{name.partition(".")[0] for name in sys.modules}, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_one_rank_imports_no_slow_package(tmp_path, strategy):
    """Each of them takes longer than all else that happens before the first step."""
    words = [*SMALL, "batch.global_size=16", "run.device=cpu", "tracking.wandb=disabled", f"run.dir={tmp_path}/run"]
    words += ["model.name=resnet20", "train.max_steps=1", f"strategy.name={strategy}"]
    command = [sys.executable, "-c", TRAIN_AND_LIST, *words]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split()
    assert (last[0], last[-1]) == ("0", "False")
    assert not {"torchvision", "wandb", "matplotlib", "deepspeed"} & set(last)


# --- typos --------------------------------------------------------------------------------------------------------

COMMANDS = ["train", "verify", "doctor", "submit", "data", "evaluate", "predict", "export", "report", "watch", "bench"]


def misspelt(word: str) -> list[str]:
    """One letter left out, two swapped, one doubled; in the middle of the word's last part."""
    at = word.rfind(".") + 1 + (len(word) - word.rfind(".")) // 2
    swapped = word[: at - 1] + word[at : at + 1] + word[at - 1] + word[at + 1 :]
    return [word[:at] + word[at + 1 :], swapped, word[:at] + word[at - 1 :]]


def meant(capsys, words: list[str]) -> str:
    """What the one line of error takes the typo for."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(r"did you mean (\S+?)\?", line)
    assert found, line
    return found[1]


@pytest.mark.parametrize("key", [key for key, *_ in describe()])
def test_a_misspelt_key_gets_the_right_one(capsys, key):
    keys = {key for key, *_ in describe()}
    for typo in misspelt(key):
        if typo not in keys:
            assert meant(capsys, ["train", f"{typo}=1"]) == key


@pytest.mark.parametrize("key", [key for key, kind, *_ in describe() if re.fullmatch(r"\w+( \| \w+)+", kind)])
def test_a_misspelt_value_gets_the_right_one(capsys, key):
    (kind,) = (kind for other, kind, *_ in describe() if other == key)
    for value in (value for value in kind.split(" | ") if len(value) > 3):
        assert meant(capsys, ["train", f"{key}={value[:2]}{value[3:]}"]) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_command_gets_the_right_one(capsys, command):
    assert meant(capsys, [command[:-2] + command[-1]]) == command


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["train", "--confg", "x"], "--config"),
        (["train", "--resume-anway"], "--resume-anyway"),
        (["verify", "--step", "3"], "--steps"),
        (["submit", "--node", "2"], "--nodes"),
        (["predict", "a.png", "--chekpoint", "x"], "--checkpoint"),
        (["export", "x", "--to", "onx"], "onnx"),
        (["bench", "augmnt"], "augment"),
    ],
)
def test_a_misspelt_option_gets_the_right_one(capsys, words, right):
    assert meant(capsys, words) == right


def test_a_misspelt_path_gets_the_right_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert meant(capsys, ["train", "--config", "configs/mien.yaml"]) == "configs/mine.yaml"
    assert meant(capsys, ["train", "--config", "mine.yml"]) == "configs/mine.yaml"
    (tmp_path / "images.zip").write_text("")
    assert main(["data", "data.source=folder", "data.root=imges.zip", "data.cache_dir=cache"]) == 74
    assert "did you mean images.zip?" in capsys.readouterr().err
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    for wrong in ("runs/mien", "run/mine", "mine"):
        assert meant(capsys, ["report", wrong]) == "runs/mine"


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("run.device=gpu", "cuda"),
        ("compute.precision=float32", "fp32"),
        ("compute.precision=bfloat16", "bf16"),
        ("plateau.metric=acc", "accuracy"),
        ("model.name=resnet81", "resnet18"),
        ("data.source=synth", "synthetic"),
    ],
)
def test_a_word_of_other_programs_gets_ours(capsys, word, right):
    assert meant(capsys, ["train", word]) == right


def test_names_that_share_an_extension_alone_are_not_alike(tmp_path):
    (tmp_path / "dog.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    assert nearest_path(tmp_path / "nope.jpg") is None
    assert nearest_path(tmp_path / "dgo.jpg") == nearest_path(tmp_path / "dog.jpeg") == tmp_path / "dog.jpg"
    assert nearest_path(tmp_path / "fotos/cat.png") == tmp_path / "photos/cat.png"


# --- places and numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "x", "--json", "reslts/a.json"], r"no folder reslts; did you mean results/a.json\?"),
        (["report", "x", "--out", "nowhere/a.html"], "no folder nowhere; make it first"),
        (["doctor", "--json", "results"], "results is a folder; give a file in it"),
        (["verify", "--json", "file/a.json"], "file is no folder"),
        (["export", "x", "--to", "onnx", "--out", "file/deep/er"], "file is no folder"),
        (["watch", "x", "--port", "99999"], "99999 is not a port"),
        (["watch", "x", "--port", "http"], "http is not a whole number, 0 or more"),
        (["predict", "x", "--top", "three"], "three is not a whole number, 1 or more"),
        (["predict", "x", "--top", "-1"], "expected one argument|-1 is not a whole number"),
    ],
)
def test_a_place_or_number_that_cannot_be_is_said_at_once(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "file").touch()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(options):
        raise OSError(28, "No space left on device", "x/model.onnx")

    monkeypatch.setattr(cli, "_export", full)
    assert main(["export", "x", "--to", "onnx"]) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert "x/model.onnx" in line and "free space" in line
