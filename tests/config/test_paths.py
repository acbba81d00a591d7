"""`~` and variables in the paths of a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_cifar.config import expand_path, flatten, load_config, to_yaml
from dist_cifar.config.marks import PathKind
from dist_cifar.config.schema import HINTS
from dist_cifar.config.values import path_kind
from dist_cifar.errors import ConfigError

ENVIRON = {"SCRATCH": "/local/7", "X": "$Y", "EMPTY": "", "HOME": "/home/me", "TILDE": "~/x"}
PATHS = {"run.dir", "data.root", "data.cache_dir", "data.stage_dir"}
SHARED = sorted(PATHS - {"data.stage_dir"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/dev/shm", "/dev/shm"),
        ("$SCRATCH", "/local/7"),
        ("${SCRATCH}/a", "/local/7/a"),
        ("a/$SCRATCH.b", "a//local/7.b"),
        ("a$X", "a$Y"),  # what a variable holds is not expanded again
        ("~", "/home/me"),
        ("~/x y/$SCRATCH", "/home/me/x y//local/7"),
        ("a~/b", "a~/b"),
        ("costs 5$", "costs 5$"),
        ("~root", str(Path("~root").expanduser())),
    ],
)
def test_expansion(text, expected):
    assert expand_path(text, "data.root", ENVIRON) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NONE/x", "the environment has no NONE; set"),
        ("/a/${EMPTY}", "the environment has no EMPTY; set"),
        ("~nobody-at-all", "there is no such home"),
        ("~nobody-at-all/runs", "there is no such home"),
    ],
)
@pytest.mark.parametrize("key", SHARED)
def test_what_has_no_value_is_refused_by_name(key, text, message):
    for refuse in (
        lambda: expand_path(text, key, ENVIRON),
        lambda: load_config(None, [f"{key}={text}"], environ=ENVIRON),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}: .*{message}") as caught:
            refuse()
        assert text in str(caught.value)


@pytest.mark.parametrize("home", ["", "relative", "~"])
def test_a_home_that_is_none_is_refused(home):
    with pytest.raises(ConfigError, match="there is no such home"):
        expand_path("~/x", "run.dir", {"HOME": home})


def test_a_user_without_an_entry_has_no_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_123)
    with pytest.raises(ConfigError, match="there is no such home"):
        expand_path("~/x", "run.dir", {})
    assert expand_path("~/x", "run.dir", {"HOME": "/"}) == "/x"


def test_every_field_that_is_a_path_is_marked():
    marked = {
        f"{section}.{name}" for section, hints in HINTS.items() for name, hint in hints.items() if path_kind(hint)
    }
    assert marked == PATHS
    named = {key for key in flatten(load_config()) if key.endswith(("dir", "root", "_path", "_file"))}
    assert named <= marked


@pytest.mark.parametrize("key", SHARED)
def test_shared_paths_are_expanded_when_the_config_is_read(tmp_path, key):
    section, _, name = key.partition(".")
    (tmp_path / "c.yaml").write_text(f"{section}: {{{name}: $SCRATCH/x}}")
    for config in (
        load_config(None, [f"{key}=${{SCRATCH}}/x"], environ=ENVIRON),
        load_config(tmp_path / "c.yaml", environ=ENVIRON),
    ):
        assert flatten(config)[key] == "/local/7/x"
        (tmp_path / "printed.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "printed.yaml", environ={}) == config


def test_a_path_of_the_node_is_expanded_on_the_node():
    assert path_kind(HINTS["data"]["stage_dir"]) is PathKind.NODE
    assert load_config(None, ["data.stage_dir=$SLURM_TMPDIR"], environ={}).data.stage_dir == "$SLURM_TMPDIR"


@pytest.mark.parametrize("value", ["a$X", "$TILDE"])
def test_a_variable_that_would_be_expanded_again_is_refused(value):
    with pytest.raises(ConfigError, match=r"^run\.dir: .* stands for "):
        load_config(None, [f"run.dir={value}"], environ=ENVIRON)


@pytest.mark.parametrize("text", ["", "a\nb", "a\tb", "a\0b", "a\x1bb", "\udce9"])
def test_what_no_path_can_be_is_refused(text):
    with pytest.raises(ConfigError, match=r"data\.root: ") as caught:
        load_config(None, [f"data.root={text}"])
    assert str(caught.value).isprintable()


def test_a_tilde_alone_is_the_home_on_the_command_line():
    assert load_config(None, ["run.dir=~"], environ=ENVIRON).run.dir == "/home/me"
