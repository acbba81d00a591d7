"""The process that ranks are forked from: torch, accelerate and the trainer are imported once, not once a rank.

Contract: reads one JSON object a line on its input, `{"argv", "env", "cwd", "stdout", "stderr", "inject"}`, forks a
rank for it and answers `{"pid": N}`; when a rank ends it says `{"ended": N, "code": C}`, with -9 for one that SIGKILL
ended. Ranks die with this process, and it dies with its parent and with its standard input. It never has a second
thread, so a fork copies no lock that somebody holds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command line sets them

import accelerate  # noqa: F401
import torch
import torch._dynamo  # the first DDP of a process imports it, and the next one
import torch.distributed.tensor

from dist_cifar import stopping, trainer  # noqa: F401
from dist_cifar.augment import cpu
from dist_cifar.cli import main as run_command
from dist_cifar.ops import numba_jit

INJECTIONS = "tests.integration.faults.injections"


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def start(request: dict[str, Any]) -> int:
    """Forks a rank; returns its process id."""
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "the zygote has threads"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stopping.die_with_launcher()
        for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["inject"]:
            name, *arguments = request["inject"]
            getattr(importlib.import_module(INJECTIONS), name)(*arguments)
        code = run_command(request["argv"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    stopping.die_with_launcher()
    torch.set_num_threads(1)
    numba_jit.warm_up(cpu.warm_up)
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    say(ready=True)
    pending = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    say(ended=pid, code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                say(pid=start(json.loads(line)))


if __name__ == "__main__":
    main()
