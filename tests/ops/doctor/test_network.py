"""Reaching a host: each way in which it fails, told apart, against real sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from relay.ops.doctor.network import CONNECT_SECONDS, Trouble, reach
from tests.support.nats_server import free_port


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose queue of connections is full: further ones get no answer, as from behind a firewall."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield int(server.getsockname()[1])


def test_a_host_that_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = reach("127.0.0.1", server.getsockname()[1])
    assert (found.trouble, found.reached, found.problem) == (Trouble.NONE, ("127.0.0.1",), "")
    assert found.remedy("SMTP_HOST", "SMTP_PORT") == ""


def test_nothing_listens() -> None:
    found = reach("127.0.0.1", port := free_port())
    assert found.trouble is Trouble.REFUSED
    assert found.problem == f"nothing listens on port {port} of 127.0.0.1 (127.0.0.1: connection refused)"
    assert "in a container localhost is the container itself" in found.remedy("SMTP_HOST", "SMTP_PORT")


def test_no_answer(silent_port: int) -> None:
    found = reach("127.0.0.1", silent_port)
    assert found.trouble is Trouble.SILENT
    assert f"does not answer within {CONNECT_SECONDS:g} s" in found.problem
    assert f"allow port {silent_port}" in found.remedy("SMTP_HOST", "SMTP_PORT")
    assert "most clouds block port 25" in found._replace(port=25).remedy("SMTP_HOST", "SMTP_PORT")


def test_no_such_name() -> None:
    found = reach("no host has a name with spaces", 25)
    assert found.trouble in {Trouble.NO_NAME, Trouble.NO_LOOKUP}
    assert "no host has a name with spaces" in found.problem


def test_a_name_that_cannot_be_one() -> None:
    found = reach(f"{'x' * 64}.example.com", 25)
    assert found.trouble is Trouble.NO_NAME
    assert "check the spelling in SMTP_HOST" in found.remedy("SMTP_HOST", "SMTP_PORT")


def test_no_route() -> None:
    found = reach("224.0.0.1", 25)  # multicast: TCP goes nowhere there
    assert found.trouble is Trouble.NO_ROUTE
    assert "has only IPv4 addresses" in found.problem
    assert "SMTP_HOST" in found.remedy("SMTP_HOST", "SMTP_PORT")
