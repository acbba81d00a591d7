from __future__ import annotations

import io

import pytest

from dist_cifar.terminal import coloured


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def colour_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_the_word_that_begins_a_problem_stands_out_and_the_text_stays():
    assert coloured("dist_cifar: error: x: error: y", Terminal()) == "dist_cifar: \x1b[1;31merror:\x1b[0m x: error: y"
    assert coloured("warning: x", Terminal()) == "\x1b[33mwarning:\x1b[0m x"


@pytest.mark.parametrize("line", ["W&B: an error: x", "train  step 1", "", "errors: 3"])
def test_other_lines_stay(line):
    assert coloured(line, Terminal()) == line


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")])
def test_colours_are_switched_off(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert coloured("warning: x", Terminal()) == "warning: x"


def test_a_file_has_no_colours():
    assert coloured("warning: x", io.StringIO()) == "warning: x"
