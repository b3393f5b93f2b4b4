"""A channel: waits that end, and writes larger than what the network takes at once."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket

from relay.delivery.channel import Channel, ChannelTimeout
from tests.delivery.conftest import soon


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Any]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "127.0.0.1")
    yield channel, theirs
    channel.close()
    theirs.close()


def test_a_read_ends_in_time_again_and_again(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    for seconds in (0.05, 0.1, 0.02):
        started_at = time.monotonic()
        with pytest.raises(ChannelTimeout):
            channel.read(soon(seconds))
        assert seconds <= time.monotonic() - started_at < seconds + 0.5
    theirs.sendall(b"late")
    assert channel.read(soon()) == b"late"


def test_an_alarm_of_an_earlier_wait_does_not_end_a_later_one(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    theirs.sendall(b"1")
    assert channel.read(soon(0.05)) == b"1"
    gevent.spawn_later(0.15, theirs.sendall, b"2")
    assert channel.read(soon(5.0)) == b"2"


def test_a_later_wait_with_an_earlier_end_ends_then(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    theirs.sendall(b"1")
    assert channel.read(soon(5.0)) == b"1"
    with pytest.raises(ChannelTimeout):
        channel.read(soon(0.05))


def test_a_large_write_goes_out_in_pieces(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    data = bytes(range(256)) * 20_000
    received = gevent.spawn(lambda: b"".join(iter(lambda: theirs.recv(65536), b"")))
    channel.write(data, soon())
    channel.close()
    assert received.get(timeout=5.0) == data


def test_a_write_that_nobody_reads_ends_in_time(pair: tuple[Channel, Any]) -> None:
    channel, _ = pair
    with pytest.raises(ChannelTimeout):
        channel.write(b"x" * 50_000_000, soon(0.1))


def test_what_comes_while_writing_is_there_afterwards(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    theirs.sendall(b"1")
    assert channel.read(soon()) == b"1"

    def talk_and_read() -> int:
        theirs.sendall(b"2")
        gevent.sleep(0)
        theirs.sendall(b"2")
        received = 0
        while received < 20_000_000:
            received += len(theirs.recv(65536))
        return received

    reading = gevent.spawn(talk_and_read)
    channel.write(b"x" * 20_000_000, soon())
    assert reading.get(timeout=5.0) == 20_000_000
    assert channel.read(soon()) == b"22"
    theirs.sendall(b"3")
    assert channel.read(soon()) == b"3"


def test_what_comes_while_writing_does_not_keep_the_writer_busy(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    theirs.sendall(b"1")
    assert channel.read(soon()) == b"1"
    theirs.sendall(b"2")
    switches: list[str] = []
    greenlet: Any = importlib.import_module("greenlet")
    greenlet.settrace(lambda event, _: switches.append(event))
    try:
        with pytest.raises(ChannelTimeout):
            channel.write(b"x" * 50_000_000, soon(0.2))
    finally:
        greenlet.settrace(None)
    assert len(switches) < 20


def test_a_closed_channel_takes_nothing(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    channel.close()
    with pytest.raises(OSError, match="closed here"):
        channel.write(b"x", soon())
    assert channel.read_available() == b""
    # Nor does anything keep the descriptor: the peer sees the end.
    assert theirs.recv(1) == b""


def test_the_end_of_the_stream_is_empty(pair: tuple[Channel, Any]) -> None:
    channel, theirs = pair
    assert channel.read_available() is None
    theirs.close()
    assert channel.read(soon()) == b""
    assert channel.read_available() == b""


@pytest.mark.parametrize("is_writing", [False, True])
def test_close_ends_the_wait_of_another_greenlet(pair: tuple[Channel, Any], is_writing: bool) -> None:
    channel, _ = pair

    def wait() -> OSError | None:
        try:
            if is_writing:
                channel.write(b"x" * 50_000_000, soon(10.0))
            else:
                channel.read(soon(10.0))
        except OSError as error:
            return error
        return None

    waiting = gevent.spawn(wait)
    gevent.sleep(0.02)
    channel.close()
    assert isinstance(waiting.get(timeout=1.0), OSError)
    channel.close()
    with pytest.raises(OSError, match="closed here"):
        channel.read(soon())


@pytest.mark.parametrize(
    ("peer", "is_loopback"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False), ("fe80::1%eth0", False)]
)
def test_loopback(peer: str, is_loopback: bool) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, peer)
    assert channel.is_loopback is is_loopback
    channel.close()
    theirs.close()
