"""`watch`: who may read its page."""

from __future__ import annotations

import pytest

from dist_cifar.tools.watch import is_own_host


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8642", "localhost", "LocalHost:9000", "[::1]:8642", "a.localhost:1", "localhost:"]
)
def test_names_of_this_machine_are_answered(host):
    assert is_own_host(host)


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("evillocalhost", "0.0.0.0", "127.0.0.1@evil.example", "::1", "192.168.0.1:8642", "localhost:80:evil"),
    ],
)
def test_other_names_are_refused(host):
    assert not is_own_host(host)
