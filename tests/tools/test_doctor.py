"""The doctor finds each fault that it is there for, and nothing on a healthy machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cifar.cli import main
from dist_cifar.config import load_config
from dist_cifar.data.sources import SOURCES
from dist_cifar.data.sources.cifar import CifarArchive
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import DataError
from dist_cifar.run.checkpoint import CheckpointStore
from dist_cifar.tools.doctor import data, disk, exactness, machine, network, runner
from dist_cifar.tools.doctor.findings import Finding, attempt, failed, graded, ok, worst
from tests import PATIENCE_SECONDS, REPOSITORY, may_make_namespaces
from tests.data.sources.test_cifar import put

SMALL = ["data.source=synthetic", "data.synthetic_train_size=60", "data.synthetic_test_size=20"]
SMALL += ["data.validation_size=10", "run.device=cpu", "tracking.wandb=disabled"]
namespaces = pytest.mark.skipif(
    not may_make_namespaces() or not all(map(shutil.which, ("ip", "tc"))),
    reason="makes namespaces: needs root and CAP_SYS_ADMIN, and unshare, ip and tc of Debian's util-linux and iproute2",
)


def config_of(*overrides: str):
    given = {word.partition("=")[0] for word in overrides}
    return load_config(None, [word for word in SMALL if word.partition("=")[0] not in given] + list(overrides))


@pytest.fixture
def no_exactness(monkeypatch):
    """Leaves out a check that has tests of its own and takes long, and one that a container's default may fail."""
    monkeypatch.setattr(exactness, "check_exactness", lambda config: ok("exactness", "not asked"))
    monkeypatch.setattr(machine, "check_shared_memory", lambda: ok("shared memory", "not asked"))


def examine(tmp_path: Path, *overrides: str, code: int) -> dict[str, dict]:
    """The findings of one process, by check."""
    file = tmp_path / "found.json"
    words = [word for word in SMALL if word.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    assert main(["doctor", "--json", str(file), *words, *overrides]) == code
    result = json.loads(file.read_text())
    assert result["ok"] == (code == 0)
    return {finding["check"]: finding for finding in result["findings"]}


@pytest.mark.parametrize(
    ("world_size", "state", "hint"),
    [(4, "ok", ""), (3, "warning", "strategy.virtual_ranks=32"), (9, "failed", "start at most 8 ranks")],
)
def test_ranks_that_wait_for_others_are_a_warning_and_too_many_a_fault(world_size, state, hint):
    config, env = config_of(), DistEnv(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size)
    found = attempt("ranks", lambda: runner.check_ranks(config, env))
    assert found.state == state and hint in found.found + found.hint


@pytest.fixture
def handlers():
    """`main` installs those of a job's process."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


pytestmark = pytest.mark.usefixtures("handlers")


# --- healthy -----------------------------------------------------------------------------------------------------


def test_one_rank_of_a_healthy_machine_has_no_fault(tmp_path, no_exactness, capsys):
    found = examine(tmp_path, f"run.dir={tmp_path / 'run'}", code=0)
    assert {finding["state"] for finding in found.values()} <= {"ok", "warning"}
    assert "verified" in found["data"]["found"]
    assert not (tmp_path / "run").exists(), "nothing of ours is left"
    out = capsys.readouterr().out
    assert f"{len(found)} ok" in out or "warning(s), 0 failed" in out


@pytest.mark.slow
def test_ranks_of_torchrun_are_examined_together_and_their_bits_too(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dist_cifar", "doctor"]
    command += [*SMALL, f"run.dir={tmp_path / 'run'}", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("failed") == 1, "one rank prints"
    found = {one["check"]: one for one in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert "GB/s" in found["all-reduce"]["found"] and "gloo" in found["backend"]["found"]
    assert "2 ranks on 1 host: all see" in found["run directory shared"]["found"]
    assert "all bits equal" in found["exactness"]["found"]
    assert not (tmp_path / "run").exists(), "nothing of ours is left"


# --- the run directory -------------------------------------------------------------------------------------------


def test_an_unwritable_run_directory_fails(tmp_path, no_exactness, capsys):
    (tmp_path / "file").write_text("")
    found = examine(tmp_path, f"run.dir={tmp_path / 'file' / 'run'}", code=1)
    assert found["run directory"]["state"] == "failed" and "cannot be written" in found["run directory"]["found"]
    assert found["run directory"]["hint"] == "give another with run.dir=PATH"
    assert found["checkpoint"]["state"] == "failed" and "Errno" not in found["checkpoint"]["found"]
    assert found["run directory shared"]["state"] == "failed" and found["data"]["state"] == "ok"
    assert "failed   run directory" in capsys.readouterr().out


def test_a_run_directory_that_was_there_stays(tmp_path, no_exactness):
    (tmp_path / "run").mkdir()
    examine(tmp_path, f"run.dir={tmp_path / 'run'}", code=0)
    assert (tmp_path / "run").is_dir() and not any((tmp_path / "run").iterdir())


def test_a_full_disk_fails(tmp_path, monkeypatch):
    for free, state in ((2**33, "ok"), (2**30, "warning"), (2**20, "failed")):
        usage = shutil._ntuple_diskusage(2**40, 2**40 - free, free)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert disk.check_run_directory(tmp_path).state == state


def test_a_checkpoint_that_reads_back_otherwise_fails(tmp_path, monkeypatch):
    assert disk.check_checkpoint(tmp_path).state == "ok"
    read = CheckpointStore.load_newest

    def flipped(store):
        found = read(store)
        found.tensors["model"]["weight"][7] += 1
        return found

    monkeypatch.setattr(CheckpointStore, "load_newest", flipped)
    assert disk.check_checkpoint(tmp_path).state == "failed"


def _shared(communicator, paths):
    return dataclasses.asdict(disk.check_shared(communicator, Path(paths[communicator.rank])))


def test_a_run_directory_that_is_not_shared_fails(ranks, tmp_path):
    """Two ranks whose path leads to other directories, as /tmp does on two nodes."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for found in ranks.run(2, _shared, [str(one), str(two)]):
        assert found["state"] == "failed" and f"rank 1 on {socket.gethostname()} do not see" in found["found"]
    for found in ranks.run(2, _shared, [str(one), str(one)]):
        assert found["state"] == "ok"
    assert list(one.iterdir()) == []


# --- data and network --------------------------------------------------------------------------------------------


def test_corrupt_data_fails(tmp_path, no_exactness):
    """One bit of the decoded images, in the cache."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    run = f"run.dir={tmp_path / 'run'}"
    assert examine(tmp_path, run, cache, code=0)["data"]["state"] == "ok"
    (file,) = (tmp_path / "cache").rglob("test_images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = examine(tmp_path, run, cache, code=1)["data"]
    assert found["state"] == "failed" and "not the bytes that were decoded" in found["found"]
    assert str(file.parent) in found["found"]


def test_a_damaged_archive_fails(tmp_path, monkeypatch, no_exactness):
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(SOURCES, "cifar10", CifarArchive(put(tmp_path / "data")))
    (archive,) = (tmp_path / "data").glob("*.gz")
    places = [f"data.root={tmp_path / 'data'}", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = examine(tmp_path, "data.source=cifar10", *places, code=1)["data"]
    assert found["state"] == "failed" and archive.name in found["found"]
    archive.write_bytes(whole)
    assert examine(tmp_path, "data.source=cifar10", *places, code=0)["data"]["state"] == "ok"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_network_fails_where_the_data_must_be_fetched(tmp_path):
    places = [f"data.root={tmp_path}", f"data.cache_dir={tmp_path}", "data.source=cifar10"]
    config = config_of(*places, f"data.url=http://127.0.0.1:{closed_port()}/x.tar.gz")
    found = data.check_data(config)
    assert found.state == "failed" and "out of reach (" in found.found and "Connection refused" in found.found
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = config_of(*places, f"data.url=http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz")
        found = data.check_data(config)
    assert found.state == "warning" and "dist-cifar data" in found.hint


@namespaces
def test_no_network_at_all(tmp_path):
    """In a network namespace without an interface."""
    places = [f"data.root={tmp_path}", f"data.cache_dir={tmp_path}", "data.source=cifar10"]
    code = "import sys; from dist_cifar.tools.doctor import data; from dist_cifar.config import load_config;"
    code += "print(data.check_data(load_config(None, sys.argv[1:])))"
    command = ["unshare", "--net", sys.executable, "-c", code, *places]
    out = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    ).stdout
    assert "state='failed'" in out and "out of reach" in out


def test_wandb_out_of_reach_is_a_warning():
    environ = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{closed_port()}"}
    found = data.check_tracking(config_of("tracking.wandb=online"), environ)
    assert found.state == "warning" and "continues offline" in found.hint
    assert data.check_tracking(config_of("tracking.wandb=disabled"), environ).state == "ok"
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert data.check_tracking(config_of("tracking.wandb=online"), environ).state == "ok"


# --- limits ------------------------------------------------------------------------------------------------------


@namespaces
def test_a_small_shared_memory_fails(tmp_path):
    code = "from dist_cifar.tools.doctor import machine; print(machine.check_shared_memory())"
    for size, state in (("64m", "failed"), ("200m", "warning"), ("600m", "ok")):
        script = f'mount -t tmpfs -o size={size} none /dev/shm && exec {sys.executable} -c "{code}"'
        command = ["unshare", "--mount", "sh", "-c", script]
        out = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
        ).stdout
        assert f"state='{state}'" in out and "/dev/shm" in out


def test_few_open_files_are_found(monkeypatch):
    for limit, state in ((65536, "ok"), (512, "warning"), (64, "failed")):
        monkeypatch.setattr(machine.resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert machine.check_open_files().state == state


def test_a_blocked_signal_fails():
    """As a process inherits it from one that has blocked it."""
    code = "from dist_cifar.tools.doctor import machine; print(machine.check_signals())"
    for blocked, state in (([signal.SIGUSR1], "failed"), ([], "ok")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            preexec_fn=lambda blocked=blocked: signal.pthread_sigmask(signal.SIG_BLOCK, blocked),
        )
        assert f"state='{state}'" in done.stdout and ("SIGUSR1 blocked" in done.stdout) == bool(blocked), done


def test_old_and_missing_packages_fail(monkeypatch):
    assert machine.check_versions().state == "ok"
    monkeypatch.setitem(machine.OLDEST, "torch", (99, 0))
    monkeypatch.setitem(machine.OLDEST, "no-such-package", (1,))
    found = machine.check_versions()
    assert found.state == "failed" and "older than 99.0" in found.found and "no-such-package is missing" in found.found


def test_an_optional_package_is_missed_where_the_config_needs_it(monkeypatch):
    monkeypatch.setattr(machine, "OPTIONAL", ("no-such-extra",))
    found = machine.check_versions()
    assert found.state == "ok" and "not needed: no-such-extra" in found.found
    found = machine.check_versions(["no-such-extra"])
    assert found.state == "failed" and found.hint == "pip install -U -e '.[no-such-extra]'"
    assert machine.needed_extras(config_of("strategy.name=deepspeed", "tracking.wandb=online")) == [
        "deepspeed",
        "wandb",
    ]
    assert machine.needed_extras(config_of()) == []


# --- between ranks -----------------------------------------------------------------------------------------------


def command_of_rank(
    rank: int, port: int, tmp_path: Path, *, address: str = "127.0.0.1", timeout_seconds: int = 120
) -> tuple[list[str], dict]:
    here = (rank, 2) if address == "127.0.0.1" else (0, 1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(here[0]), "LOCAL_WORLD_SIZE": str(here[1])}
    place |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "dist_cifar", "doctor", *SMALL, f"run.dir={tmp_path / 'run'}"]
    command += [f"run.timeout_seconds={timeout_seconds}", "--json", str(tmp_path / "found.json")]
    return command, dict(os.environ) | place


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named(tmp_path):
    command, environ = command_of_rank(0, closed_port(), tmp_path, timeout_seconds=3)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {one["check"]: one for one in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert found["ranks"]["state"] == "failed" and "ranks that have not connected: 1;" in found["ranks"]["found"]
    assert found["versions"]["state"] == "ok"


@pytest.mark.slow
def test_a_rank_that_stops_in_the_middle_is_named(tmp_path):
    port = closed_port()
    hangs = (
        "import sys, os, signal; from dist_cifar.tools.doctor import network; from dist_cifar.cli import main;"
        "network.check_backend = lambda *_: os.kill(os.getpid(), signal.SIGSTOP); main(sys.argv[1:])"
    )
    command, environ = command_of_rank(1, port, tmp_path, timeout_seconds=30)
    silent = subprocess.Popen([sys.executable, "-c", hangs, *command[3:]], cwd=REPOSITORY, env=environ)
    try:
        command, environ = command_of_rank(0, port, tmp_path, timeout_seconds=30)
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    finally:
        silent.kill()
        silent.wait()
    assert done.returncode == 1, done.stdout + done.stderr
    (found,) = (one for one in json.loads((tmp_path / "found.json").read_text())["findings"] if one["check"] == "ranks")
    assert found["state"] == "failed" and "rank 1" in found["found"]


def test_the_slower_a_link_the_worse(ranks):
    for seconds, state in ((0.001, "ok"), (0.02, "warning"), (2.0, "failed")):
        assert ranks.run(2, _sums_at, seconds) == [state] * 2


def _sums_at(communicator, seconds_of_a_megabyte: float) -> str:
    communicator.time_all_reduces = lambda nbytes, repeats: [seconds_of_a_megabyte * nbytes / 2**20] * repeats
    return network.check_all_reduce(
        communicator, DistEnv(rank=communicator.rank, world_size=2, local_world_size=2)
    ).state


def test_the_later_a_sum_the_worse(ranks):
    for seconds, state in ((0.0005, "ok"), (0.05, "warning"), (0.5, "failed")):
        assert ranks.run(2, _sums_after, seconds) == [state] * 2


def _sums_after(communicator, seconds_of_four_bytes: float) -> str:
    communicator.time_all_reduces = lambda nbytes, repeats: [seconds_of_four_bytes if nbytes == 4 else 0.001] * repeats
    return network.check_all_reduce(
        communicator, DistEnv(rank=communicator.rank, world_size=2, local_world_size=2)
    ).state


@namespaces
@pytest.mark.slow
def test_a_slow_link_fails(tmp_path):
    """Two hosts, each a network namespace, joined by a pair of interfaces; then one of them sends 20 Mbit/s."""
    names = [f"doctor{os.getpid()}{side}" for side in "ab"]
    links = [f"d{os.getpid() % 100000}{side}" for side in "ab"]

    def sh(line: str) -> None:
        subprocess.run(line, shell=True, check=True)

    try:
        for name in names:
            sh(f"ip netns add {name}")
        sh(f"ip link add {links[0]} type veth peer name {links[1]}")
        for name, link, host in zip(names, links, (1, 2), strict=True):
            sh(f"ip link set {link} netns {name}")
            sh(f"ip -n {name} addr add 10.99.7.{host}/24 dev {link}")
            sh(f"ip -n {name} link set {link} up && ip -n {name} link set lo up")
        for limit in ("", "20mbit"):
            if limit:
                for name, link in zip(names, links, strict=True):
                    sh(f"ip netns exec {name} tc qdisc add dev {link} root tbf rate {limit} burst 32kb latency 400ms")
            port, running = closed_port(), []
            for rank, name in enumerate(names):
                command, environ = command_of_rank(rank, port, tmp_path, address="10.99.7.1")
                hook = "from dist_cifar.tools.doctor import exactness, findings;"
                hook += "exactness.check_exactness = lambda config: findings.ok('exactness', '');"
                hook += "import sys; from dist_cifar.cli import main; sys.exit(main(sys.argv[1:]))"
                words = ["ip", "netns", "exec", name, sys.executable, "-c", hook, *command[3:]]
                running.append(subprocess.Popen(words, cwd=REPOSITORY, env=environ, stdout=subprocess.DEVNULL))
            codes = [process.wait(timeout=PATIENCE_SECONDS) for process in running]
            found = {one["check"]: one for one in json.loads((tmp_path / "found.json").read_text())["findings"]}
            assert links[0] in found["backend"]["found"], found
            if limit:
                assert codes[0] == 1 and found["all-reduce"]["state"] == "failed", found
            else:
                assert codes == [0, 0] and found["all-reduce"]["state"] != "failed", found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


# --- findings ----------------------------------------------------------------------------------------------------


def test_an_exception_is_a_finding():
    found = attempt("x", lambda: 1 / 0)
    assert found.state == "failed" and "ZeroDivisionError" in found.found


def test_an_error_for_users_is_cut_into_what_was_found_and_what_to_do():
    def raises():
        raise DataError("x.zip: damaged; fetch it again")

    found = attempt("x", raises)
    assert (found.found, found.hint) == ("x.zip: damaged", "fetch it again")


def test_the_worst_of_the_ranks_counts():
    fine, bad = ok("x", "fine"), failed("x", "bad", "fix")
    assert worst([fine, fine]) == fine
    assert worst([fine, bad, bad]) == Finding(check="x", state="failed", found="rank 1, 2: bad", hint="fix")
    assert [graded("x", "", "", value, 10, 5).state for value in (10, 9, 5, 4)] == [
        "ok",
        "warning",
        "warning",
        "failed",
    ]
