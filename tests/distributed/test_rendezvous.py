"""The rendezvous: whatever else is at the ports, ranks of one start of one job find one another, and nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil
import pytest

from dist_cifar import stopping
from dist_cifar.distributed import rendezvous
from dist_cifar.distributed.interfaces import interface_of, require_existing
from dist_cifar.distributed.launch_env import DistEnv, candidate_ports, read_env
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.errors import LaunchError

SECONDS = 60.0
"""How long ranks wait that are to connect."""


def job(name: str, world_size: int, port: int) -> list[DistEnv]:
    return [
        DistEnv(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            master_port=port,
            launcher="torchrun",
            job=name,
        )
        for rank in range(world_size)
    ]


@pytest.fixture
def port() -> int:
    """A MASTER_PORT of which all candidates are free."""
    for port in range(20000 + os.getpid() % 10000, 60000):
        with contextlib.ExitStack() as taken, contextlib.suppress(OSError):
            for candidate in candidate_ports(port):
                taken.enter_context(listener(candidate))
            return port
    raise AssertionError("no free ports")


@pytest.fixture
def times() -> dict[str, float]:
    """What `start` changes of the `Timeouts`."""
    return {}


@pytest.fixture
def start(times: dict[str, float]) -> Iterator[Callable[..., Future[Any]]]:
    """`start(env, seconds)`: the future store of a rank that begins to connect to the others now."""
    with ThreadPoolExecutor(16) as pool:
        yield lambda env, seconds=SECONDS: pool.submit(
            rendezvous.open_store, env, Timeouts(run_seconds=seconds, **times)
        )


@pytest.fixture
def quick(times: dict[str, float]) -> None:
    """Silent peers are given up sooner."""
    times.update(hold_seconds=0.1, connect_seconds=0.5, silence_seconds=0.6)


def listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def wait_until_taken(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody listens at {port}")


def require_one_store(ranks: list[Future[Any]]) -> None:
    """What each rank leaves in its store, all find."""
    stores = [rank.result(2 * SECONDS) for rank in ranks]
    mark = str(id(stores))
    for rank, store in enumerate(stores):
        assert not store.check([f"from {rank}"]), "the store is not new"
        store.set(f"from {rank}", mark)
    for store in stores:
        assert [store.get(f"from {rank}").decode() for rank in range(len(stores))] == [mark] * len(stores)


def refused(future: Future[Any]) -> str:
    with pytest.raises(LaunchError) as caught:
        future.result(2 * SECONDS)
    return str(caught.value)


# --- the ports ---------------------------------------------------------------------------------------------------


def test_candidates_are_distinct_below_the_ephemeral_ports_and_never_the_agents_own():
    for port in [*range(10000, 30000, 7), 29500, 45001]:
        ports = candidate_ports(port)
        assert len(set(ports)) == 8 and all(10000 <= candidate < 30000 for candidate in ports) and port not in ports
        assert candidate_ports(port) == ports
    assert len({tuple(candidate_ports(port)) for port in range(29500, 29600)}) == 100


def test_ranks_connect_in_any_order(start, port):
    ranks = job("a", 4, port)
    late = [start(env) for env in ranks[1:]]
    require_one_store([start(ranks[0]), *late])


def test_every_rendezvous_has_a_store_of_its_own(start, port):
    ranks = job("a", 2, port)
    first = [start(env) for env in ranks]
    require_one_store(first)  # it lives on, as that of a rank 0 which is still dying
    require_one_store([start(env) for env in ranks])
    require_one_store([start(env) for env in ranks])


def test_torchruns_own_store_is_left_alone(start, port):
    """The agent holds MASTER_PORT, and its store has the values of the start before."""
    with socket.create_server(("", port)) as agent:
        require_one_store([start(env) for env in job("a", 2, port)])
        agent.settimeout(0)
        with pytest.raises(BlockingIOError):
            agent.accept()


@pytest.mark.parametrize("count", [1, 3])
def test_taken_ports_cost_nothing(start, port, count, quick):
    """Silent ones: they accept and never answer."""
    with contextlib.ExitStack() as taken:
        for candidate in candidate_ports(port)[:count]:
            taken.enter_context(listener(candidate))
        require_one_store([start(env) for env in job("a", 3, port)])


def test_a_client_that_waits_for_a_silent_listener_is_caught(start, port, times):
    times["silence_seconds"] = 1e9
    with listener(candidate_ports(port)[0]):
        zero, one = (start(env, 2) for env in job("a", 2, port))
        assert "ranks that have not connected: 1;" in refused(zero) and "for rank 0 at 127.0.0.1" in refused(one)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 5000,
        b"{}\n",
        b"[" * 900 + b"\n",
        b'["dist_cifar 1", "1", 2]\n',
        b'["dist_cifar 0", 1, "127.0.0.1"]\n',
        b"",
    ],
)
def test_servers_of_others_are_passed_over(start, port, answer, quick):
    stop = threading.Event()

    def serve(server: socket.socket) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(answer)

    with listener(candidate_ports(port)[0]) as server:
        server.settimeout(0.05)
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            require_one_store([start(env) for env in job("a", 3, port)])
        finally:
            stop.set()
            thread.join()


def test_a_server_that_drips_is_passed_over(start, port, quick):
    stop = threading.Event()

    def drip(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                while not stop.wait(0.05):
                    connection.sendall(b"x")

    with listener(candidate_ports(port)[0]) as server:
        server.settimeout(SECONDS)
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        try:
            require_one_store([start(env) for env in job("a", 2, port)])
        finally:
            stop.set()
            thread.join()


def test_no_free_port_is_an_error(start, port):
    with contextlib.ExitStack() as taken:
        for candidate in candidate_ports(port):
            taken.enter_context(listener(candidate))
        assert "rank 0 can listen on none of the ports" in refused(start(job("a", 2, port)[0]))


# --- who can reach the ports -------------------------------------------------------------------------------------


def listening_addresses() -> set[str]:
    return {
        connection.laddr.ip for connection in psutil.Process().net_connections("tcp") if connection.status == "LISTEN"
    }


@pytest.mark.parametrize("is_one_node", [True, False])
def test_only_ranks_on_other_nodes_make_it_listen_beyond_loopback(start, port, is_one_node, no_interface):
    """The rendezvous server while it waits, the store afterwards."""
    before = listening_addresses()
    ranks = job("a", 2, port) if is_one_node else on_nodes(job("a", 2, port), *[own_address()[0]] * 2)
    zero = start(ranks[0])
    wait_until_taken(candidate_ports(port)[0])
    waiting = listening_addresses() - before
    stores = [zero, start(ranks[1])]
    require_one_store(stores)
    beyond = {address for address in waiting | (listening_addresses() - before) if not address.startswith("127.")}
    assert bool(beyond) != is_one_node


def test_a_name_of_the_node_that_does_not_resolve_is_not_looked_up(start, port):
    environ = TORCHRUN | {"MASTER_PORT": str(port), "MASTER_ADDR": "nowhere-x9.invalid", "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    require_one_store([start(read_env(environ | rank)) for rank in ranks])


def test_ranks_with_another_secret_do_not_meet(start, port):
    def env(rank: int, secret: str) -> DistEnv:
        return read_env(
            TORCHRUN
            | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "DIST_CIFAR_SECRET": secret}
            | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        )

    zero, stranger = start(env(0, "a"), 30), start(env(1, "b"), 1)
    assert "nobody who knows this job answers" in refused(stranger)
    require_one_store([zero, start(env(1, "a"))])


# --- jobs do not mix ---------------------------------------------------------------------------------------------


def two_jobs(start: Callable[..., Future[Any]], ones: list[DistEnv], others: list[DistEnv]) -> None:
    """Two jobs with the same ports. The second one's ranks connect first to the first one's rank 0."""
    zero = start(ones[0])
    wait_until_taken(candidate_ports(ones[0].master_port)[0])
    second = [start(env) for env in others]
    time.sleep(0.5)  # for the mutants: a moment in which ranks may connect to the wrong server
    require_one_store([zero, *(start(env) for env in ones[1:])])
    require_one_store(second)


TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "3",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


def attempt(port: int, **change: str) -> list[DistEnv]:
    return [
        read_env(TORCHRUN | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} | change)
        for rank in range(3)
    ]


@pytest.mark.parametrize("change", [{"TORCHELASTIC_RUN_ID": "y"}, {"TORCHELASTIC_RESTART_COUNT": "1"}])
def test_two_jobs_and_two_starts_with_the_same_ports_do_not_mix(start, port, change):
    """The second is the start after one whose rank 0 still waits, for ranks that were killed."""
    two_jobs(start, attempt(port), attempt(port, **change))


def test_a_server_that_does_not_look_at_the_key_is_caught(start, port, monkeypatch):
    monkeypatch.setattr(rendezvous.RendezvousServer, "_rank_of", lambda self, line: json.loads(line)[3])
    with pytest.raises((AssertionError, LaunchError, RuntimeError)):
        two_jobs(lambda env: start(env, 2), attempt(port), attempt(port, TORCHELASTIC_RUN_ID="y"))


def test_a_rank_0_of_the_start_before_that_dies_while_it_waits_admits_nobody(start, port):
    """Not even where the two starts have the same key: its server closes when it dies, and the others keep looking."""
    ranks = job("a", 3, port)
    dying = start(ranks[0], 1)
    wait_until_taken(candidate_ports(port)[0])
    one = start(ranks[1])
    assert "have not connected: 2;" in refused(dying)
    require_one_store([start(ranks[0]), one, start(ranks[2])])


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01" * 800,
        b'["dist_cifar 1", "b", 3, 1]\n',
        b'["dist_cifar 1", "a", 2, 1]\n',
        b'["dist_cifar 0", "a", 3, 1]\n',
        b'["dist_cifar 1", "a", 3, 0]\n',
        b'["dist_cifar 1", "a", 3, 3]\n',
        b'["dist_cifar 1", "a", 3, {}]\n',
        b'["dist_cifar 1", "a", 3]\n',
        b"[" * 900 + b"\n",
    ],
)
def test_strangers_get_no_answer(start, port, greeting, quick):
    ranks = job("a", 3, port)
    zero, (first, *_) = start(ranks[0]), candidate_ports(port)
    wait_until_taken(first)
    with socket.create_connection(("127.0.0.1", first), timeout=SECONDS) as stranger:
        stranger.sendall(greeting)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    require_one_store([zero, *(start(env) for env in ranks[1:])])


def test_a_rank_connects_once(start, port):
    """A second process that takes itself for rank 1 is refused, and the first one stays."""
    ranks = job("a", 3, port)
    zero, one = start(ranks[0]), start(ranks[1])
    assert zero.running() and one.running()
    wait_until_held(ranks[0])
    again = start(ranks[1], 1)
    assert "rank 1 of 3 has waited 1 s for rank 0" in refused(again)
    require_one_store([zero, one, start(ranks[2])])


def wait_until_held(zero: DistEnv) -> None:
    """Returns when rank 1 is connected: another rank 1 is refused then."""
    deadline = time.monotonic() + SECONDS
    greeting = json.dumps(rendezvous._introduction(replace(zero, rank=1, local_rank=1))).encode() + b"\n"
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", candidate_ports(zero.master_port)[0]), timeout=1) as connection,
        ):
            connection.sendall(greeting)
            if connection.recv(100) == b"":
                return
        time.sleep(0.05)
    raise AssertionError("rank 1 has not connected")


# --- which ranks are missing -------------------------------------------------------------------------------------


def test_missing_ranks_are_named(start, port):
    ranks = job("a", 7, port)
    futures = {rank: start(ranks[rank], 2) for rank in (0, 2, 3)}
    message = refused(futures[0])
    assert message.startswith(
        "launch: rank 0 of 7 has waited 2 s for ranks that have not connected: 1, 4-6; it listens on "
    )
    for rank in (2, 3):
        message = refused(futures[rank])
        assert message.startswith(f"launch: rank {rank} of 7 has waited 2 s for rank 0 at 127.0.0.1, ports ")
        assert f"it listens on port {candidate_ports(port)[0]} and waits for other ranks" in message


def test_without_rank_0_the_others_say_where_they_looked(start, port):
    message = refused(start(job("a", 2, port)[1], 0.5))
    assert "nobody who knows this job answers" in message and str(max(candidate_ports(port))) in message


def test_a_rank_that_connected_and_died_is_missing(start, port):
    ranks = job("a", 3, port)
    zero = start(ranks[0], 3)
    wait_until_taken(candidate_ports(port)[0])
    with socket.create_connection(("127.0.0.1", candidate_ports(port)[0]), timeout=SECONDS) as one:
        one.sendall(json.dumps(rendezvous._introduction(ranks[1])).encode() + b"\n")
        assert one.recv(100) == rendezvous._HOLD
    two = start(ranks[2], 3)
    assert "have not connected: 1;" in refused(zero) and "for rank 0 at" in refused(two)


def test_a_signal_ends_the_wait(port, monkeypatch):
    monkeypatch.setattr(stopping, "_received", [signal.SIGTERM])
    for env in job("a", 2, port):
        with pytest.raises(LaunchError, match=rf"rank {env.rank} of 2 was stopped by SIGTERM before") as caught:
            rendezvous.open_store(env, Timeouts(run_seconds=SECONDS))
        assert caught.value.exit_code == 75


# --- the interface -----------------------------------------------------------------------------------------------


def own_address() -> tuple[str, str]:
    """An IPv4 address of this host that is not its loopback's, and its interface."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address, name
    pytest.skip("this host has no address but its loopback's")


def test_interfaces_are_found_by_their_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
    address, name = own_address()
    assert interface_of(address) == name


@pytest.fixture
def no_interface(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def on_nodes(ranks: list[DistEnv], *addresses: str) -> list[DistEnv]:
    """The same ranks, each on a node of its own, which knows rank 0's by that address."""
    return [
        replace(env, local_rank=0, local_world_size=1, master_addr=address)
        for env, address in zip(ranks, addresses, strict=True)
    ]


def test_gloo_is_told_the_interface_to_other_nodes(start, port, no_interface):
    address, name = own_address()
    require_one_store([start(env) for env in on_nodes(job("a", 2, port), address, address)])
    assert os.environ["GLOO_SOCKET_IFNAME"] == name and "NCCL_SOCKET_IFNAME" not in os.environ


def test_ranks_of_a_node_that_takes_its_own_name_for_loopback_learn_its_address_from_others(
    start, port, no_interface, monkeypatch
):
    """What Debian writes into /etc/hosts. Here rank 0 and rank 1 are on that node."""
    address, _ = own_address()
    told: list[str] = []
    monkeypatch.setattr(rendezvous, "lead_to_other_nodes", lambda wanted, environ: told.append(wanted))
    require_one_store([start(env) for env in on_nodes(job("a", 3, port), "127.0.0.1", "127.0.0.1", address)])
    assert told == [address] * 3


def test_an_interface_that_is_set_is_kept_between_nodes_and_one_node_has_loopback(start, port, no_interface):
    address, name = own_address()
    os.environ["GLOO_SOCKET_IFNAME"] = f"{name},mine"
    require_one_store([start(env) for env in on_nodes(job("a", 2, port), address, address)])
    assert os.environ["GLOO_SOCKET_IFNAME"] == f"{name},mine"
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    require_one_store([start(env) for env in job("a", 2, port)])
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(
    ("variable", "value", "is_known"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "nix0,lo", True),
        ("GLOO_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "nix0", False),
        ("GLOO_SOCKET_IFNAME", "l", False),
        ("NCCL_SOCKET_IFNAME", "l", True),
        ("NCCL_SOCKET_IFNAME", "=lo", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "nix", False),
    ],
)
def test_an_interface_that_does_not_exist_is_named(variable, value, is_known):
    if is_known:
        require_existing({variable: value})
    else:
        with pytest.raises(LaunchError, match=rf"{variable}={value}: .* has no such network interface; .*lo"):
            require_existing({variable: value})


def test_loopback_leads_to_no_other_node(start, port, no_interface):
    address, _ = own_address()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for rank in [start(env) for env in on_nodes(job("a", 2, port), address, address)]:
        assert "GLOO_SOCKET_IFNAME=lo: loopback leads to no other node; unset it" in refused(rank)
