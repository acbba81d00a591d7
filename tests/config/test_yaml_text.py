"""YAML as people, editors and attackers write it."""

from __future__ import annotations

import os
import random
import threading

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.config import flatten, load_config, to_yaml
from dist_cifar.config.schema import HINTS, SECTIONS
from dist_cifar.config.yaml_text import MAX_BYTES, brief, parse_yaml, show
from dist_cifar.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("0100", 100),
        ("-010", -10),
        ("+5", 5),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("1E-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("007.5", 7.5),
        ("1e400", float("inf")),
        (".inf", float("inf")),
        # what YAML 1.1 takes for numbers of another base, for times and dates
        ("0x40", "0x40"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2024-01-01", "2024-01-01"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("1,5", "1,5"),
        ("=", "="),
        ("!!str 3", "3"),
        ("'3'", "3"),
        ("", None),
        ("~", None),
        ("off", False),
        ("[1, [a]]", [1, ["a"]]),
        ("&a 1", 1),
    ],
)
def test_what_is_typed_is_what_is_meant(text, value):
    assert parse_yaml(text, "c.yaml") == value and type(parse_yaml(text, "c.yaml")) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {x: 1}\nb: *a", "line 2: .*a stands for a value elsewhere"),
        ("a: &a [*a]", "line 1: .*a stands for a value elsewhere"),
        ("a: 1\nb:\n  <<: {c: 1}", "line 3: << is not read"),
        ("a: !!int 3", "line 1: the tag .*int is not read"),
        ("a: ! 3", "line 1: the tag ! is not read"),
        ("a: !x 3", "line 1: the tag !x is not read"),
        ("\na: !!timestamp x", "line 2: the tag "),
        ("a: !!python/name:os.system x", "line 1: the tag "),
        ("a: !!binary aGk=", "line 1: the tag "),
        ("!!set {a}", "line 1: the tag "),
        ("!!str [a]", "line 1: text is no list"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 1: a config is not nested so deeply"),
        ("{a: " * 500, "line 1: a config is not nested so deeply"),
        ("\n".join(" " * n + "a:" for n in range(400)), "line 20: a config is not nested so deeply"),
        ("- " * 1000, "line 1: a config is not nested so deeply"),
        ("a: " + "9" * 5000, "line 1: a number of 5000 digits"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: 1\n? [b]\n: 2", r"line 2: key \['b'\] is not a string"),
        ("on: 1", "line 1: key True is not a string"),
        ("a:\n\tb: 1", "line 2: not YAML"),
        ("a: 1\n---\nb: 2", "line 2: not YAML"),
        ("a: 1\nb: \0", r"line 2: holds the character U\+0000"),
        ("\x1b[31m", r"line 1: holds the character U\+001B"),
        ('a: "\\U00110000"', "not YAML"),
        ("a: @b", "line 1: not YAML"),
        ("%YAML 9.9\n---\na: 1", "line 1: not YAML"),
    ],
)
def test_what_is_not_read_is_refused_by_line(text, message):
    with pytest.raises(ConfigError, match=rf"^c\.yaml: {message}") as caught:
        parse_yaml(text, "c.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_billion_laughs_are_refused_at_once(tmp_path):
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="line 2: "):
        load_config(tmp_path / "c.yaml")


@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_what_is_shown_reads_back(value):
    if isinstance(value, int) and abs(value) > 10**900:
        return
    assert parse_yaml(show(value), "shown") == value


@pytest.mark.parametrize(
    "text", ["1e3", "010", "0o17", "1:30", "off", "null", "~", "2024-01-01", "<<", "=", "a: b", "*a"]
)
def test_text_that_looks_like_something_else_reads_back_as_text(text):
    assert parse_yaml(show(text), "shown") == text and yaml.safe_load(show(text)) == text


def test_what_an_error_shows_is_short():
    assert len(brief("x" * 10**6)) <= 80 and len(brief(["x" * 100] * 10**4)) <= 80 and brief("a\nb") == "'a b'"


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbftrain:\r\n  epochs: 7\r\n", b"train:\r  epochs: 7\r", b"train: {epochs: 7}"]
)
def test_files_of_other_editors_are_read(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    assert load_config(tmp_path / "c.yaml").train.epochs == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {epochs: 7}".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"a: 1\nb: \xe9", "line 2: byte 0xe9 is not UTF-8"),
        (b"\xed\xa0\x80", "line 1: byte 0xed is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "more than 131,072 bytes"),
    ],
)
def test_bytes_that_are_no_config_are_refused(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^--config .*c\.yaml: cannot be read \({message}"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["", "loop", "dangling", "x" * 400, "a\0b", "c.yaml/d.yaml"])
def test_what_is_no_file_is_one_line(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "c.yaml").touch()
    with pytest.raises(ConfigError, match="--config ") as caught:
        load_config(tmp_path / name if "\0" not in name else name)
    assert "\n" not in str(caught.value)


def test_a_device_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="/dev/zero: cannot be read"):
        load_config("/dev/zero")
    assert load_config("/dev/null") == load_config()


def test_a_pipe_is_read_and_names_no_run():
    read, write = os.pipe()

    def fill() -> None:
        with open(write, "w") as file:
            file.write("train: {epochs: 7}")

    threading.Thread(target=fill).start()
    config = load_config(f"/dev/fd/{read}")
    os.close(read)
    assert config.train.epochs == 7 and config.run == load_config().run


# --- anything ----------------------------------------------------------------------------------------------------

KEYS = [f"{section}.{name}" for section, hints in HINTS.items() for name in hints]
WORDS = """
0 -1 1 8 1e400 -1e400 .nan .inf 1e-320 1e308 0x40 0b11 0o17 010 1:30 1:30:00 true null ~ off 2024-01-01
2024-99-99 [ ] { [] {} [1] [1,2] [a,b] [1e400,1] [[1],2] *a @x %x `x .. . / ~nobody $HOME $NONE ${ - = a=b |
exact resnet18 bf16 [tensorboard] 0.5 1e3 +5 1_000 << 1. .5 1e 1,5 NaN Infinity 1/2 2**3 é 猫 ' " #
"""
TEXTS = [
    *WORDS.split(),
    *(
        "",
        "{a: 1}",
        "&a 1",
        "!!int 3",
        "!!python/object:os.system x",
        "!!binary aGk=",
        "!!set {a}",
        "!!float x",
        "!x y",
    ),
    *("!!timestamp x", "!!bool x", "!!omap [a: 1]", "!!str 3", "a: b", "- a", "? a", "a #b", "a\nb", "\n", "\t", "\0"),
    *("\x1b[31m", "\ud800", "\udce9", "9" * 30, "1" * 400, "9" * 5000, "x" * 300, "[" * 200, "[" * 3000, "{a: " * 500),
]
KEYS_OF_NOTHING = [
    "",
    ".",
    "x",
    "run",
    "run.",
    ".dir",
    "run.dir.x",
    "RUN.DIR",
    "run..dir",
    "<<",
    "\udce9",
    "train.precision",
]


def random_pair(chance: random.Random) -> tuple[str, str]:
    return chance.choice(KEYS if chance.random() < 0.9 else KEYS_OF_NOTHING), chance.choice(TEXTS)


def random_file(chance: random.Random) -> bytes:
    lines = []
    for section in chance.sample([*SECTIONS, "x", "", "1", "null", "?", "<<"], chance.randint(0, 4)):
        lines.append(f"{section}: " + (chance.choice(TEXTS) if chance.random() < 0.2 else ""))
        for _ in range(chance.randint(0, 3)):
            key, text = random_pair(chance)
            lines.append(f"  {key.rpartition('.')[2]}: {text}")
    content = "\n".join(lines).encode("utf-8", "surrogatepass" if chance.random() < 0.5 else "ignore")
    if chance.random() < 0.2:
        content = (
            chance.choice([b"\xef\xbb\xbf", b"%YAML 1.2\n---\n", b"---\n---\n", b"- ", b"&a ", b"\0", b"\xff"])
            + content
        )
    if content and chance.random() < 0.2:
        at = chance.randrange(len(content))
        content = content[:at] + chance.randbytes(2) + content[at + chance.randint(0, 3) :]
    return content


def require_config_or_one_line(path: str | None, overrides: list[str]) -> bool:
    """Whether there is a config, which then reads back; any error but one line is a failure."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        line = str(error)
        assert line.isprintable() and len(line) < 1000, line
        return False
    assert flatten(config).keys() == set(KEYS)
    to_yaml(config).encode()
    return True


def test_any_bytes_are_a_config_or_one_line(tmp_path):
    chance, path, good = random.Random(1), tmp_path / "c.yaml", 0
    for _ in range(400):
        overrides = ["=".join(random_pair(chance)) for _ in range(chance.randint(0, 3))]
        path.write_bytes(random_file(chance))
        good += require_config_or_one_line(str(path) if chance.random() < 0.5 else None, overrides)
    assert 20 < good < 390


@given(st.sampled_from(KEYS), st.text(st.characters(), max_size=20))
def test_any_text_is_a_value_or_one_line(key, text):
    require_config_or_one_line(None, [f"{key}={text}"])
