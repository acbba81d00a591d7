"""The network interfaces over which ranks talk.

Contract: ranks of one node talk over loopback, whatever is set: nothing of their job listens beyond it. Ranks of
several nodes talk over the interface that is set, which must exist, or for gloo over the one that leads to the other
nodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Mapping, MutableMapping

from dist_cifar.errors import LaunchError

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""From Linux's <linux/sockios.h>."""


def stay_on_node(environ: MutableMapping[str, str]) -> None:
    """Has gloo and NCCL, which has shared memory and NVLink for all but its start, use loopback."""
    loopback = interface_of("127.0.0.1")
    if loopback is not None:
        environ.update({_GLOO: loopback, _NCCL: loopback})


def require_existing(environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for a variable that names an interface which this host does not have."""
    names = [name for _, name in socket.if_nameindex()]
    for variable, starts_suffice in ((_GLOO, False), (_NCCL, True)):
        asked = environ.get(variable, "")
        if not names or not asked or asked.startswith("^"):  # NCCL's sign for all but these
            continue
        exact, found = asked.removeprefix("="), False
        for one in exact.split(","):
            found |= one in names or (starts_suffice and exact == asked and any(name.startswith(one) for name in names))
        if not found:
            raise LaunchError(
                f"launch: {variable}={asked}: {socket.gethostname()} has no such network interface; unset it, or name"
                f" one of {', '.join(names)}"
            )


def lead_to_other_nodes(address: str, environ: MutableMapping[str, str]) -> None:
    """Has gloo use the interface of `address`, at which the other nodes reach this one, unless one is set.

    Raises `LaunchError` if loopback is set.
    """
    loopback = interface_of("127.0.0.1")
    if loopback is not None and environ.get(_GLOO) == loopback:
        raise LaunchError(f"launch: {_GLOO}={loopback}: loopback leads to no other node; unset it")
    interface = interface_of(address)
    if interface is not None:
        environ.setdefault(_GLOO, interface)


def interface_towards(host: str) -> str | None:
    """The network interface of this host that leads to `host`; None if it cannot be found out. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 9))
        return interface_of(probe.getsockname()[0])
    return None


def interface_of(address: str) -> str | None:
    """The network interface of this host that has this IPv4 address; None if there is none or it is unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None
