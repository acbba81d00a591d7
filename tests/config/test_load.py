"""Reading, checking and printing the configuration."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_cifar.config import Config, config_from_values, describe, flatten, load_config, schema, to_yaml
from dist_cifar.config.load import MOVED
from dist_cifar.config.marks import Range
from dist_cifar.config.schema import HINTS, SECTIONS
from dist_cifar.config.values import convert, unmarked
from dist_cifar.errors import ConfigError
from tests import REPOSITORY


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_default_is_the_shipped_recipe():
    shipped = load_config(REPOSITORY / "configs/cifar10_resnet18.yaml")
    assert shipped == load_config()


def test_file_then_overrides(tmp_path):
    path = write(tmp_path / "mine.yaml", "optimizer:\n  lr: 3e-4\ntrain:\n  epochs: 7\nmodel:\n")
    config = load_config(path, ["train.epochs=9", "data.validation_size=0", "optimizer.max_grad_norm=null"])
    assert (config.optimizer.lr, config.train.epochs, config.data.validation_size) == (3e-4, 9, 0)
    assert config.optimizer.max_grad_norm is None
    assert (config.run.name, config.run.dir) == ("mine", "runs/mine")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", "+1e-3", "1.0e-3", ".1e-2"])
def test_numbers_are_numbers_in_files_and_overrides(tmp_path, number):
    path = write(tmp_path / "c.yaml", f"optimizer: {{lr: {number}}}")
    assert load_config(path).optimizer.lr == load_config(None, [f"optimizer.lr={number}"]).optimizer.lr == 1e-3


def test_text_stays_text():
    config = load_config(None, ["run.name=007", "data.root=null", "run.dir=1e3", "tracking.wandb_group=no"])
    assert (config.run.name, config.data.root, config.run.dir) == ("007", "null", "1e3")
    assert config.tracking.wandb_group == "no"
    assert load_config(None, ["tracking.wandb_group=null"]).tracking.wandb_group is None
    assert load_config(None, ["tracking.wandb_tags=[a, b]"]).tracking.wandb_tags == ("a", "b")


def test_one_batch_size_replaces_the_other(tmp_path):
    path = write(tmp_path / "c.yaml", "batch: {per_rank_size: 64}\nstrategy: {name: ddp}")
    assert load_config(path).batch.global_size is None
    assert load_config(path, ["batch.global_size=96"]).batch.per_rank_size is None
    with pytest.raises(ConfigError, match="both of global_size and per_rank_size"):
        load_config(None, ["batch.global_size=96", "batch.per_rank_size=64"])
    with pytest.raises(ConfigError, match="neither of global_size and per_rank_size"):
        load_config(None, ["batch.global_size=null"])


def test_what_strategy_exact_cannot_keep_is_refused():
    exact = "strategy.name=exact"
    for overrides, message in (
        (["batch.per_rank_size=16"], "batch.per_rank_size: in strategy.name=exact nothing depends on the world size"),
        (
            ["strategy.virtual_ranks=6"],
            "batch.global_size: 1024 samples cannot be shared equally by strategy.virtual_ranks=6",
        ),
        (
            ["batch.global_size=36"],
            "batch.global_size: 36 samples cannot be shared equally by strategy.virtual_ranks=8",
        ),
    ):
        load_config(None, [*overrides, "strategy.name=ddp"])
        with pytest.raises(ConfigError, match=message):
            load_config(None, [*overrides, exact])
    load_config(None, ["batch.global_size=36", "strategy.virtual_ranks=4", exact])


TEXTS = [
    "lr: 3, as before: no",
    "@home, 2nd try",
    "%50",
    "it's \"quoted",
    "see [1",
    "*starred*",
    "`x`",
    "a # b",
    "- a",
    "{a",
    "!!int 3",
    " padded ",
    "~",
    "a\nb",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["tracking.wandb_notes", "tracking.wandb_project", "tracking.wandb_group", "data.url"])
def test_behind_the_equals_sign_a_text_is_what_it_is(tmp_path, key, text):
    config = load_config(None, [f"{key}={text}"])
    assert flatten(config)[key] == text
    assert load_config(write(tmp_path / "c.yaml", to_yaml(config)), ["run.name=cifar10_resnet18"]) == config


# --- numbers -----------------------------------------------------------------------------------------------------


def numbers() -> Iterator[tuple[str, type, Range | None, str]]:
    """(key, int or float, bounds, how a value of the field is written around a number) of every number in a config."""
    for section, hints in HINTS.items():
        for name, hint in hints.items():
            plain, around = unmarked(hint), "{}"
            if get_origin(plain) is tuple:
                hint, size = get_args(plain)[0], len(get_args(plain))
                plain, around = unmarked(hint), f"[{', '.join(['{0}'] * size)}]"
            if plain in (int, float):
                while get_origin(hint) is not Annotated or not any(isinstance(m, Range) for m in get_args(hint)):
                    hint = get_args(hint)[0] if get_args(hint) else None
                    if hint is None:
                        break
                bounds = next((mark for mark in get_args(hint) if isinstance(mark, Range)), None)
                yield f"{section}.{name}", plain, bounds, around


NUMBERS = list(numbers())


def test_every_number_has_bounds():
    assert len(NUMBERS) > 40 and [key for key, _, bounds, _ in NUMBERS if bounds is None] == []


@pytest.mark.parametrize("key, kind, bounds, around", NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_a_number_beyond_its_bounds_is_refused_with_its_range(key, kind, bounds, around):
    beyond = ["1" + "0" * 30, "1" + "0" * 400, "-1" if -1 not in bounds else "-1000", "9" * 999]
    beyond += ["1e308", "1e400", "-.inf", ".nan", "1e300"] if kind is float else ["1e3", "3.5"]
    for text in beyond:
        with pytest.raises(ConfigError, match=rf"{key}: must be .*{re.escape(str(bounds))}, found ") as caught:
            load_config(None, [f"{key}={around.format(text)}"])
        assert len(str(caught.value)) < 250
    section, _, name = key.partition(".")
    for text in (bounds.maximum, bounds.minimum):
        if text is not None:
            assert (
                convert(HINTS[section][name], [text] * around.count("{0}") if "[" in around else text, key, "")
                is not None
            )


BAD_OVERRIDES = [
    ("run.log_digests=1", r"run\.log_digests: must be true or false, found 1"),
    ("optimzer.lr=1", r"optimzer\.lr: unknown key; did you mean optimizer\.lr\?"),
    ("lr=1", r"lr: unknown key; did you mean optimizer\.lr\?"),
    ("optimizer=1", r"optimizer: unknown key"),
    ("train.max_steps=3.0", r"train\.max_steps: must be a whole number .*, found 3\.0"),
    ("train.epochs=three", r"train\.epochs: must be a number > 0 and <= 1000000000, found three"),
    ("train.epochs=true", r"train\.epochs: must be a number .*, found true"),
    ("train.epochs=0", r"train\.epochs: must be > 0 and <= 1000000000, found 0"),
    ("train.epochs=", r"train\.epochs: must be a number .*, found null"),
    ("optimizer.lr=-1", r"optimizer\.lr: must be >= 1e-30 and <= 10000, found -1"),
    ("optimizer.lr=.inf", r"optimizer\.lr: must be a number >= 1e-30 and <= 10000, found \.inf"),
    ("augment.flip_probability=1.5", r"augment\.flip_probability: must be >= 0 and <= 1, found 1\.5"),
    ("optimizer.betas=[0.9]", r"optimizer\.betas: must be a list of 2, found \[0\.9\]"),
    ("optimizer.betas=[0.9, 1]", r"optimizer\.betas: must be >= 0 and <= 0\.999999, found 1"),
    ("augment.erasing_area=[0.3, 0.1]", r"augment\.erasing_area: must rise"),
    ("augment.crop_padding=9", r"augment\.crop_padding: must be >= 0 and <= 8, found 9"),
    ("augment.flip=never", r"augment\.flip: must be one of random, alternating, found never"),
    ("augment.cutout_size=33", r"augment\.cutout_size: must be >= 0 and <= 32, found 33"),
    ("augment.resolution=24", r"augment\.resolution: must be a list, found 24"),
    ("augment.resolution=[{until: 0.5}]", r"augment\.resolution: size is missing"),
    ("augment.resolution=[{until: 0.5, size: 3}]", r"augment\.resolution\.size: must be >= 4 and <= 32, found 3"),
    ("augment.resolution=[{until: 2, size: 9}]", r"augment\.resolution\.until: must be > 0 and <= 1, found 2"),
    (
        "augment.resolution=[{until: 0.5, size: 24}, {until: 0.5, size: 28}]",
        r"augment\.resolution: until must rise from phase to phase, found \[0\.5, 0\.5\]",
    ),
    ("model.name=resnet19", r"model\.name: must be one of resnet18, .*, found resnet19; did you mean resnet18\?"),
    ("run.name=a/b", r"run\.name: must be a name without '/'"),
    ("data.validation_size=[1", r"data\.validation_size: line 1: not YAML"),
    ("epochs", r"argument epochs: not an option and not key=value"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES)
def test_a_bad_override_is_named_on_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("optimiser:\n  lr: 1\n", r"optimiser: unknown key; did you mean optimizer\?"),
    ("optimizer:\n  lr: 1\n  lr: 2\n", r"line 3: key 'lr' is given twice"),
    ("optimizer: 3\n", r"optimizer: found 3; write its keys below it"),
    ("- a\n", r"not sections"),
    ("1: 2\n", r"line 1: key 1 is not a string"),
    ("a: [1\n", r"line 2: not YAML"),
    (
        "a: !!python/object/apply:os.system ['true']\n",
        r"line 1: the tag .*python/object/apply:os.system is not read; write the value alone",
    ),
    ("train:\n  epochs: '3'\n", r"train\.epochs: must be a number .*, found '3'"),
    ("run:\n  name: 7\n", r"run\.name: must be text, found 7"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_named_on_one_line(tmp_path, text, message):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    write(tmp_path / "resnet.yaml", "")
    with pytest.raises(ConfigError, match=r"resnett\.yaml: no such file; did you mean .*resnet\.yaml\?"):
        load_config(tmp_path / "resnett.yaml")
    with pytest.raises(ConfigError, match="no such file; give a YAML file"):
        load_config(tmp_path / "nowhere" / "other.txt")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


# --- keys that have moved ----------------------------------------------------------------------------------------


def a_value_for(key: str) -> str:
    """One that is not the default, as a user types it."""
    values = {
        "strategy.virtual_ranks": "16",
        "augment.backend": "cpu",
        "optimizer.max_grad_norm": "0.5",
        "compute.compile": "on",
        "strategy.grad_compression": "bf16",
        "optimizer.max_skipped_steps": "3",
        "optimizer.non_finite": "skip",
        "compute.precision": "fp32",
        "strategy.name": "ddp",
        "strategy.zero_stage": "2",
    }
    return values[key]


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_key_is_read_as_the_new_one_with_a_warning(tmp_path, said, old, new):
    expected = load_config(None, [f"{new}={a_value_for(new)}", "run.name=c"])
    assert expected != load_config(None, ["run.name=c"]) and not said
    assert load_config(None, [f"{old}={a_value_for(new)}", "run.name=c"]) == expected
    assert said.pop() == f"warning: command line: keys have new names: {old} is now {new}" and not said
    section, _, name = old.partition(".")
    path = write(tmp_path / "c.yaml", f"{section}: {{{name}: {a_value_for(new)}}}")
    assert load_config(path) == expected
    assert said == [f"warning: {path}: keys have new names: {old} is now {new}"]


def test_many_old_keys_are_one_warning(said):
    load_config(None, [f"{old}={a_value_for(new)}" for old, new in MOVED.items()])
    assert len(said) == 1 and all(f"{old} is now {new}" in said[0] for old, new in MOVED.items())


def test_a_key_under_both_its_names_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.precision is the old name of compute\.precision, which is given too"
    ):
        load_config(None, ["compute.precision=fp32", "train.precision=fp32"])
    path = write(tmp_path / "c.yaml", "train: {precision: fp32}")
    assert load_config(path, ["compute.precision=bf16"]).compute.precision == "bf16"


def test_a_config_of_an_old_checkpoint_is_read_without_a_word(said):
    names = {new: old for old, new in MOVED.items()}
    old = {names.get(key, key): value for key, value in flatten(Config()).items()}
    assert flatten(config_from_values(old)) == flatten(load_config()) and not said


def test_no_old_key_is_also_a_current_one():
    current = flatten(Config()).keys()
    assert not MOVED.keys() & current and set(MOVED.values()) <= current


def test_arguments_by_name_are_replaced_as_a_whole_or_one_by_one(tmp_path):
    path = write(tmp_path / "c.yaml", "model: {name: 'my:Net', options: {width: 64, depth: 3}}")
    for overrides, expected in (
        ((), {"width": 64, "depth": 3}),
        (("model.options.width=8",), {"width": 8, "depth": 3}),
        (("model.options={width: 8}",), {"width": 8}),
        (("model.options={width: 8}", "model.options.heads=2"), {"width": 8, "heads": 2}),
        (("model.options={}",), {}),
        (("model.options=null", "model.name=resnet18"), {}),
    ):
        assert load_config(path, overrides).model.options == expected


# --- printing and describing -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/$"), min_size=1, max_size=20
    ),
    lr=st.floats(1e-30, 1e4),
    tags=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], include_characters="\n\t"), max_size=5),
        max_size=3,
    ),
    size=st.integers(1, 10**8).map(lambda n: 8 * n),
)
def test_the_printed_config_reads_back_equal(tmp_path_factory, name, lr, tags, size):
    sections = {
        "run": {"name": name},
        "optimizer": {"lr": lr},
        "batch": {"global_size": size},
        "tracking": {"wandb_tags": tags},
    }
    directory = tmp_path_factory.mktemp("config")
    config = load_config(write(directory / "a.yaml", yaml.safe_dump(sections, allow_unicode=True)))
    assert config.optimizer.lr == lr and config.tracking.wandb_tags == tuple(tags)
    assert load_config(write(directory / "b.yaml", to_yaml(config))) == config


def test_every_field_has_a_docstring_and_is_described():
    described = {key: (kind, text) for key, kind, _, text in describe()}
    assert described.keys() == flatten(Config()).keys()
    assert all(kind and text for kind, text in described.values())


def test_without_sources_only_the_descriptions_are_missing(monkeypatch):
    def unavailable(module):
        raise OSError("source code not available")

    with_sources = describe()
    monkeypatch.setattr("inspect.getsource", unavailable)
    assert describe() == [(key, kind, default, "") for key, kind, default, _ in with_sources]


def test_the_descriptions_are_read_from_a_zip(tmp_path):
    package = Path(schema.__file__).parents[1]
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in [
            package / "__init__.py",
            package / "errors.py",
            package / "plugins.py",
            *(package / "config").glob("*.py"),
        ]:
            archive.write(path, path.relative_to(package.parent))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from dist_cifar.config import describe, schema;"
    code += "print(schema.__file__); print(describe())"
    command = [sys.executable, "-c", code, str(tmp_path / "package.zip")]
    file, described = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert file.startswith(str(tmp_path)) and described == str(describe())


def test_configs_are_frozen_and_keyword_only():
    for section in [Config, *SECTIONS.values()]:
        with pytest.raises(TypeError):
            section(1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section(), dataclasses.fields(section)[0].name, 1)


def test_the_config_imports_no_torch():
    code = "import sys, dist_cifar.config, dist_cifar.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LISTS = {
    "augment.erasing_area": "[0.1, 0.2]",
    "augment.erasing_aspect": "[0.5, 2.0]",
    "augment.resolution": "[{until: 0.4, size: 24}]",
    "model.widths": "[8, 16, 8]",
    "muon.newton_schulz": "[3.0, -4.0, 2.0]",
    "optimizer.betas": "[0.8, 0.9]",
    "optimizer.groups": "[{match: fc.*, lr_scale: 2.0}]",
    "schedule.milestone_epochs": "[1.5, 2.0]",
    "tracking.also": "[tensorboard]",
    "tracking.wandb_tags": "[one]",
}


def test_flattened_values_are_the_config_again():
    """As a checkpoint has them: JSON knows neither tuples nor what is in them."""
    assert {key for key, value in flatten(load_config()).items() if isinstance(value, list)} == LISTS.keys()
    config = load_config(None, [f"{key}={value}" for key, value in LISTS.items()])
    assert config_from_values(json.loads(json.dumps(flatten(config)))) == config
