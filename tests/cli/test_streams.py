"""Standard output and error that are closed, full, lost or of another encoding."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from dist_cifar import stopping
from dist_cifar.cli import main, streams, status
from dist_cifar.errors import EXIT_DONE
def run(options):
    if options.field == "training": streams.survive_lost_output()
    numbers = os.open(os.devnull, os.O_RDONLY)
    print("\\u732b \\udce9 " + "x" * 100_000, flush=True)
    print(sys.stdin.read(), end="")
    for _ in range(3): print("again", flush=True)
    return EXIT_DONE if numbers > 2 else 1
status.run = run
sys.exit(stopping.run_stoppable(lambda: main(["status", "run", *sys.argv[1:]])))
"""
LOST = "dist_cifar: warning: standard output is lost ({}); the run continues and writes its records\n"


def start(*arguments: str, redirect: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    command = f'exec "$0" -c "$1" {" ".join(arguments)} {redirect}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | environ,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "redirect", "code", "err"),
    [
        ([], ">&-", 0, ""),
        ([], "2>&-", 0, ""),
        ([], "<&-", 0, ""),
        ([], ">&- 2>&- <&-", 0, ""),
        (
            [],
            ">/dev/full",
            74,
            "dist_cifar: error: [Errno 28] standard output: No space left on device; give it another",
        ),
        (["training"], ">/dev/full", 0, LOST.format("No space left on device")),
        (["training"], ">/dev/full 2>/dev/full", 0, ""),
        ([], "2>&1 | head -c 3", 0, ""),
        (["training"], "| true", 0, LOST.format("Broken pipe")),
    ],
)
def test_a_stream_that_is_lost_is_no_traceback(arguments, redirect, code, err):
    for environ in ({}, {"PYTHONUNBUFFERED": "1"}):
        done = start(*arguments, redirect=redirect, **environ)
        assert done.returncode == code and done.stderr.startswith(err), environ
        assert done.stderr.count("\n") == bool(err), environ


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_cannot_be_shown_are_replaced(encoding):
    done = start(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    cat = "\u732b" if encoding == "utf-8" else r"\u732b"
    assert done.returncode == 0 and done.stdout.startswith(rf"{cat} \udce9 x") and done.stderr == ""
