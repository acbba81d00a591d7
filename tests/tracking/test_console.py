from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from dist_cifar.tracking.console import Console

ROW = {"kind": "train", "loss": 2.3456, "accuracy": 0.1234, "lr": 1e-3, "images_per_second": 12345.6}


@pytest.fixture
def shown_in_terminal(monkeypatch):
    """A function that returns what a terminal of so many columns is given by a console with one step and one row."""

    def shown(columns: int) -> str:
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(writer, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            with Console(is_main_process=True) as console:
                console.start(1000, 20)
                console.row(ROW)
                console.advance()
        data = b""
        with contextlib.suppress(OSError):  # at the end, when nobody has the terminal open
            while chunk := os.read(reader, 65536):
                data += chunk
        os.close(reader)
        return data.decode()

    return shown


def last_bar(text: str) -> str:
    return text.replace("\r\n", "").split("\r")[-1]


def test_the_bar_shows_the_speed_and_fits_into_80_columns(shown_in_terminal):
    bar = last_bar(shown_in_terminal(80))
    assert len(bar) <= 80
    assert "21/1000 [" in bar and "loss 2.346 acc 0.123 lr 1.0e-03 12,346 images/s]" in bar


@pytest.mark.parametrize("columns", [20, 0])
def test_a_narrow_terminal_is_no_error(shown_in_terminal, columns):
    assert "2%" in shown_in_terminal(columns)
