"""Where the ranks of a job meet: a store that rank 0 keeps, and that only ranks of this job and this start find.

Contract: rank 0 keeps a TCPStore on a free port, and says which to those that greet it at the door: the first free one
of a few ports that follow from the job (`env.candidate_ports`). A greeting is a line with the job's key and the rank.
One with another key gets no answer; others are held until every rank is at the door, and then all are answered at
once. So a taken port costs nothing, jobs do not mix whatever ports they share, and a rank 0 of an earlier start lets
nobody in: it has closed its door, or its ranks are gone from there. Who has not come is known at the end of the wait.
The launcher's own store is never used: it outlives a start of the job, with all that is in it.

A line of the dialogue is JSON. From a client: `[_MAGIC, job, world_size, rank]`, and `_GONE` when its wait ends. From
rank 0: `_HOLD` at once and then every second, at last `[_MAGIC, port of the store, address]`, where the address is that
of rank 0's node as ranks on other nodes see it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import DistEnv, candidate_ports
from dist_cifar.errors import EXIT_SAVED, LaunchError

_MAGIC = "dist_cifar 1"
_HOLD = b"[]\n"
"""Rank 0 is here and waits for others."""
_GONE = b"[0]\n"
"""A rank leaves the door because its own wait is over."""
_HOLD_SECONDS = 1.0
_CONNECT_SECONDS = 1.0
_SILENCE_SECONDS = 3.0
"""Who is silent for longer, on either side, is not of this job, or stopped."""
_RETRY_SECONDS = 0.1
_LONGEST_LINE_BYTES = 1024
_SIOCGIFADDR = 0x8915
"""From Linux's <linux/sockios.h>."""


def open_store(env: DistEnv, timeout_seconds: float, *, setting: str = "") -> dist.Store:
    """A store of its own for every call, which all ranks of the job make; rank 0's process must outlive its use.

    With ranks on several nodes it also sets GLOO_SOCKET_IFNAME, if it is not set, to the interface through which the
    others are reached: gloo would take the address of the hostname, on many hosts 127.0.1.1.
    Raises `LaunchError` if the ranks have not met within the timeout (`setting` is what it comes from) or a signal asks
    to stop, the latter with exit code 75: nothing was done that could be lost.
    """
    patience = datetime.timedelta(seconds=timeout_seconds)
    if env.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, timeout=patience, wait_for_workers=False)
        # Only now: torch looks up names for its log, which takes 5 s where a name server is lost.
        with RendezvousServer(env) as server:
            address = server.wait_for_ranks(store.port, _Wait(env, timeout_seconds, setting))
    else:
        address, port, own = _connect(env, _Wait(env, timeout_seconds, setting))
        # The answer proves that the address is right and that the store is there.
        store = dist.TCPStore(env.master_addr, port, None, False, timeout=patience, wait_for_workers=False)
        address = address if _is_loopback(own) else own
    if env.has_several_nodes and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = None if _is_loopback(address) else interface_of(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return store


class _Wait:
    """The time that is left to meet, and what to say when it is over."""

    def __init__(self, env: DistEnv, timeout_seconds: float, setting: str) -> None:
        self._who = f"rank {env.rank} of {env.world_size}"
        self._deadline = time.monotonic() + timeout_seconds
        self._waited = f"{timeout_seconds:g} s" + (f" ({setting})" if setting else "")

    def is_over(self) -> bool:
        """Whether to give up. Raises `LaunchError` after a signal to stop."""
        if stopping.stop_requested():
            error = LaunchError(
                f"launch: {self._who} was stopped by {stopping.first_received()} before all ranks had connected; run it"
                " again"
            )
            error.exit_code = EXIT_SAVED
            raise error
        return time.monotonic() > self._deadline

    def error(self, what: str) -> LaunchError:
        return LaunchError(f"launch: {self._who} has waited {self._waited} for {what}")


# --- rank 0 ------------------------------------------------------------------------------------------------------


class _Peer:
    """A connection to the door."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.received, self.since = connection, b"", time.monotonic()
        self.rank: int | None = None
        """None until it has greeted with the right key."""


class RendezvousServer:
    """Where rank 0 is greeted. Leaving the `with` closes it, and all connections to it."""

    def __init__(self, env: DistEnv) -> None:
        """Raises `LaunchError` if all ports are taken."""
        self._env = env
        self._listener = _listen(candidate_ports(env.master_port))
        self._peers: dict[socket.socket, _Peer] = {}
        self._gone: set[int] = set()
        """Ranks that were here until their own wait was over, which may end just before that of rank 0."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> RendezvousServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._listener.close()
        for connection in self._peers:
            connection.close()

    def wait_for_ranks(self, store_port: int, wait: _Wait) -> str:
        """Waits for all ranks and tells them the store's port; returns this node's address, as others see it."""
        held_at = time.monotonic()
        while absent := self._absent():
            if wait.is_over():
                raise wait.error(
                    f"ranks that have not come: {_listed(set(absent) - self._gone or absent)}; it listens on"
                    f" {socket.gethostname()}, port {self._listener.getsockname()[1]}; look at how they ended, and"
                    f" whether they can reach it at {self._env.master_addr}"
                )
            for key, _ in self._selector.select(timeout=0.1):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive(self._peers[key.fileobj])  # type: ignore[index]
            now = time.monotonic()
            if now - held_at > _HOLD_SECONDS:
                held_at = now
                for peer in list(self._peers.values()):
                    if peer.rank is not None:
                        self._say(peer, _HOLD)
                    elif now - peer.since > _SILENCE_SECONDS:
                        self._drop(peer)
        address = self._address()
        for peer in list(self._peers.values()):
            if peer.rank is not None:
                self._say(peer, json.dumps([_MAGIC, store_port, address]).encode() + b"\n")
        return address

    def _absent(self) -> list[int]:
        present = {peer.rank for peer in self._peers.values()}
        return [rank for rank in range(1, self._env.world_size) if rank not in present]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has left before it was let in
            connection, _ = self._listener.accept()
            self._peers[connection] = _Peer(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(_LONGEST_LINE_BYTES)
        except OSError:
            data = b""
        if peer.rank is not None and data == _GONE:
            self._gone.add(peer.rank)
        peer.received += data
        if not data or peer.rank is not None or len(peer.received) > _LONGEST_LINE_BYTES:
            self._drop(peer)  # its process is gone, or it is none of ours
        elif b"\n" in peer.received:
            rank = self._rank_of(peer.received)
            if rank in self._absent():
                peer.rank = rank
                self._say(peer, _HOLD)
            else:
                self._drop(peer)

    def _rank_of(self, line: bytes) -> int | None:
        """The rank that greets; None if it is none of this job and start."""
        greeting = _parse(line)
        is_ours = greeting[:3] == _greeting(self._env)[:3] and len(greeting) == 4
        return greeting[3] if is_ours else None

    def _say(self, peer: _Peer, line: bytes) -> None:
        try:
            peer.connection.sendall(line)
        except OSError:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _address(self) -> str:
        """That at which a rank of another node has found the door; loopback if all are on this node."""
        found = [_address_of(connection) for connection in self._peers]
        return next((address for address in found if not _is_loopback(address)), "127.0.0.1")


def _listen(ports: Sequence[int]) -> socket.socket:
    """A listener on the first free port."""
    dual = socket.has_dualstack_ipv6()
    for port in ports:
        with contextlib.suppress(OSError):
            if dual:
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024)
    raise LaunchError(
        f"launch: rank 0 can listen on none of the ports {_listed(ports)} of {socket.gethostname()}: all are taken; set"
        " another MASTER_PORT, from which they follow"
    )


# --- the other ranks ---------------------------------------------------------------------------------------------


def _connect(env: DistEnv, wait: _Wait) -> tuple[str, int, str]:
    """Rank 0's address and the store's port, as it says, and this rank's own address on the way to it."""
    ports, seen = candidate_ports(env.master_port), "nobody who knows this job answers"
    while True:
        for port in ports:
            if wait.is_over():
                raise wait.error(
                    f"rank 0 at {env.master_addr}, ports {_listed(ports)}: {seen}; look at how rank 0 ended, and"
                    " whether MASTER_ADDR is its node"
                )
            with (
                contextlib.suppress(OSError),
                socket.create_connection((env.master_addr, port), timeout=_CONNECT_SECONDS) as connection,
            ):
                connection.sendall(json.dumps(_greeting(env)).encode() + b"\n")
                for line in _lines(connection, wait):
                    if line + b"\n" == _HOLD:
                        seen = f"it is there, at port {port}, and waits for other ranks"
                        continue
                    match _parse(line):
                        case [str(magic), int(store_port), str(address)] if magic == _MAGIC:
                            return address, store_port, _address_of(connection)
                    break  # somebody else
                if wait.is_over():
                    connection.sendall(_GONE)
        time.sleep(_RETRY_SECONDS)


def _lines(connection: socket.socket, wait: _Wait) -> Iterable[bytes]:
    """Lines as they come, until the other side ends, is silent, or is_main_process as nobody of this job does."""
    rest, heard_at = b"", time.monotonic()
    connection.settimeout(0.2)
    while len(rest) <= _LONGEST_LINE_BYTES and time.monotonic() - heard_at < _SILENCE_SECONDS and not wait.is_over():
        with contextlib.suppress(TimeoutError):
            data = connection.recv(_LONGEST_LINE_BYTES)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                heard_at = time.monotonic()
            yield from lines


# --- the dialogue ------------------------------------------------------------------------------------------------


def _greeting(env: DistEnv) -> list[object]:
    return [_MAGIC, env.job, env.world_size, env.rank]


def _parse(line: bytes) -> list[Any]:
    """A line of JSON that holds a list; an empty one if it is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _listed(numbers: Iterable[int]) -> str:
    """`1, 4-7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# --- addresses ---------------------------------------------------------------------------------------------------


def _address_of(connection: socket.socket) -> str:
    """This side's address; an IPv4 one as such."""
    return connection.getsockname()[0].removeprefix("::ffff:")


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def interface_towards(host: str) -> str | None:
    """The network interface of this host that leads to `host`; None where that is not told. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 9))
        return interface_of(probe.getsockname()[0])
    return None


def interface_of(address: str) -> str | None:
    """The network interface of this host that has this IPv4 address; None if none has, or where that is not told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None
