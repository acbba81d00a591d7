"""What the parser takes, and what it suggests for a typo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_cifar.cli import main, parser
from dist_cifar.cli.parser import COMMANDS, parse
from dist_cifar.config import describe
from dist_cifar.errors import ConfigError

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def test_every_file_of_a_command_is_in_the_parser():
    files = Path(parser.__file__).parent.glob("*.py")
    assert sorted(NAMES) == sorted(path.stem for path in files if "\ndef add(" in path.read_text())


def test_fields_may_stand_around_options():
    options = parse(["train", "run.seed=3", "--resume", "run.name=x"])
    assert options.overrides == ["run.seed=3", "run.name=x"] and options.resume
    with pytest.raises(ConfigError, match=r"unrecognized arguments: run\.name=x --odd"):
        parse(["train", "run.seed=3", "--resume", "run.name=x", "--odd"])
    with pytest.raises(ConfigError, match=r"unrecognized arguments: run\.seed=3"):
        parse(["report", "x", "--out", "y", "run.seed=3"])


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--epochs", "did you mean train.epochs?"),
        ("--batch-size=64", "did you mean batch.global_size?"),
        ("--lr", "did you mean optimizer.lr?"),
        ("--train.epochs=3", "did you mean train.epochs?"),
        ("--xyzzy", "without dashes"),
    ],
)
def test_a_field_that_is_given_as_an_option_is_told_so(option, hint):
    with pytest.raises(ConfigError) as caught:
        parse(["train", option])
    assert f"unrecognized arguments: {option}; config fields are given as key=value, without dashes" in str(
        caught.value
    )
    assert f"{hint}; see `dist-cifar train --help`" in str(caught.value)


def test_the_local_rank_may_stand_before_and_behind_the_command():
    assert parse(["train"]).local_rank is None
    assert parse(["--local_rank=1", "train"]).local_rank == parse(["train", "--local-rank", "1"]).local_rank == 1


# --- typos --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("command", NAMES)
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
        ("model.name=renset18", "resnet18"),
        ("data.source=synth", "synthetic"),
    ],
)
def test_a_word_of_other_programs_gets_ours(capsys, word, right):
    assert meant(capsys, ["train", word]) == right
