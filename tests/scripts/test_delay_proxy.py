"""The proxy over real TCP: what it delays, and what it must leave alone.

Clients and servers share one plain event loop, so that what is measured is the proxy and not them.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import statistics
import struct
import time
from collections.abc import Iterator

import pytest

from scripts.delay_proxy import running
from tests.support.nats_server import free_port

RTT_MS = 20.0
WAIT_SECONDS = 20.0
Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def pairs(count: int, rtt_ms: float = RTT_MS) -> Iterator[list[Pair]]:
    """Connections through a proxy, each as the client's and the server's socket."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1000))
        listener.settimeout(WAIT_SECONDS)
        proxy = stack.enter_context(running(int(listener.getsockname()[1]), rtt_ms))
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), WAIT_SECONDS)) for _ in range(count)
        ]
        # The proxy connects in the order in which it was connected to.
        servers = [stack.enter_context(listener.accept()[0]) for _ in range(count)]
        for sock in (*clients, *servers):
            sock.settimeout(WAIT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield list(zip(clients, servers, strict=True))


def round_trips_ms(made: list[Pair], each: int) -> list[float]:
    """Every client sends a byte and waits for its echo, ``each`` times, all at once."""
    taken: list[float] = []
    begun: dict[socket.socket, float] = {}
    left = {client: each for client, _ in made}
    until = time.monotonic() + WAIT_SECONDS
    with selectors.DefaultSelector() as selector:
        for client, server in made:
            selector.register(client, selectors.EVENT_READ, data=None)
            selector.register(server, selectors.EVENT_READ, data=server)
            begun[client] = time.perf_counter()
            client.send(b"x")
        while left and time.monotonic() < until:
            for key, _ in selector.select(1.0):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                byte = sock.recv(1)
                if key.data is not None:
                    sock.send(byte)
                    continue
                now = time.perf_counter()
                taken.append((now - begun[sock]) * 1000)
                left[sock] -= 1
                if left[sock]:
                    begun[sock] = now
                    sock.send(b"x")
                else:
                    del left[sock]
    assert not left
    return taken


def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while chunk := sock.recv(1 << 20):
        received += chunk
    return bytes(received)


@pytest.mark.parametrize(("count", "rtt_ms"), [(1, 20.0), (120, 20.0), (5, 3.0)])
def test_a_round_trip_takes_as_long_as_asked_for(count: int, rtt_ms: float) -> None:
    with pairs(count, rtt_ms) as made:
        taken = round_trips_ms(made, 25)
    assert len(taken) == count * 25
    assert min(taken) >= rtt_ms
    # Half a millisecond late on a quiet machine, which a test cannot ask for.
    assert statistics.median(taken) <= rtt_ms + 10.0


def test_the_rate_is_not_limited_and_the_bytes_arrive_as_sent() -> None:
    sent = random.Random(1).randbytes(1 << 20) * 64
    with pairs(1) as made:
        [(client, server)] = made
        begun = time.perf_counter()
        received = bytearray()
        position = 0
        client.settimeout(0)
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_WRITE)
            selector.register(server, selectors.EVENT_READ)
            while len(received) < len(sent):
                ready = selector.select(WAIT_SECONDS)
                assert ready
                for key, _ in ready:
                    if key.fileobj is server:
                        received += server.recv(1 << 20)
                    else:
                        position += client.send(memoryview(sent)[position : position + (1 << 20)])
                        if position == len(sent):
                            selector.unregister(client)
        seconds = time.perf_counter() - begun
    assert received == sent
    # One socket buffer of 256 KB for each round trip would take 5 s.
    assert seconds < 2.5


def test_one_end_that_does_not_read_holds_nobody_else_up() -> None:
    with pairs(11) as made:
        (stuck, _), *others = made
        stuck.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                stuck.send(bytes(1 << 20))
        taken = round_trips_ms(others, 10)
    # If they waited for it they would wait for ever.
    assert statistics.median(taken) <= RTT_MS + 10.0


def test_each_side_may_end_before_the_other() -> None:
    with pairs(1) as made:
        [(client, server)] = made
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"question"
        begun = time.perf_counter()
        server.sendall(b"answer")
        server.close()
        assert read_all(client) == b"answer"
        assert time.perf_counter() - begun >= RTT_MS / 2000


def test_a_reset_travels_behind_what_was_said_before() -> None:
    with pairs(1) as made:
        [(client, server)] = made
        server.sendall(b"421 bye")
        assert client.recv(100) == b"421 bye"
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        begun = time.perf_counter()
        server.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert time.perf_counter() - begun >= RTT_MS / 2000


def test_the_servers_first_word_comes_two_round_trips_after_the_client_began() -> None:
    taken_ms: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, running(int(listener.getsockname()[1]), RTT_MS) as proxy:
        listener.settimeout(WAIT_SECONDS)
        for _ in range(10):
            begun = time.perf_counter()
            with socket.create_connection(("127.0.0.1", proxy.port), WAIT_SECONDS) as client:
                server, _ = listener.accept()
                with server:
                    server.sendall(b"220")
                    assert client.recv(3) == b"220"
            taken_ms.append((time.perf_counter() - begun) * 1000)
    # The fastest of ten: a crowded machine delays some, three round trips would delay all.
    assert 2 * RTT_MS <= min(taken_ms) <= 2 * RTT_MS + 10.0


def test_a_server_that_is_not_there_resets_the_client() -> None:
    with (
        running(free_port(), RTT_MS) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), WAIT_SECONDS) as client,
        pytest.raises(ConnectionResetError),
    ):
        client.recv(1)
