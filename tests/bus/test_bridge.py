"""The crossing between greenlets and the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from relay.bus.bridge import Bridge
from relay.errors import BusUnavailable


class Endless:
    """A coroutine that ends only when it is cancelled, and tells when it began and ended."""

    def __init__(self) -> None:
        self.begun = Event()
        self.cancelled = Event()

    async def run(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    bridge = Bridge()
    bridge.start()
    yield bridge
    bridge.stop()


async def answer() -> int:
    return 42


def test_a_result_crosses(bridge: Bridge) -> None:
    assert bridge.call(answer(), 1) == 42


def test_an_error_crosses(bridge: Bridge) -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        bridge.call(fail(), 1)


def test_what_takes_too_long_is_cancelled(bridge: Bridge) -> None:
    endless = Endless()
    with pytest.raises(BusUnavailable, match=r"0\.1 s"):
        bridge.call(endless.run(), 0.1)
    assert endless.cancelled.wait(1)


def test_what_a_killed_greenlet_asked_for_is_cancelled(bridge: Bridge) -> None:
    endless = Endless()
    asking = gevent.spawn(bridge.call, endless.run(), 10)
    assert endless.begun.wait(1)
    asking.kill(timeout=1)
    assert endless.cancelled.wait(1)


def test_a_callers_own_timeout_stays_what_it_is(bridge: Bridge) -> None:
    endless = Endless()
    with pytest.raises(gevent.Timeout) as raised, gevent.Timeout(0.1) as own:
        bridge.call(endless.run(), 10)
    assert raised.value is own
    assert endless.cancelled.wait(1)


def test_after_the_end_it_says_so_at_once() -> None:
    bridge = Bridge()
    bridge.start()
    assert bridge.call(answer(), 1) == 42
    bridge.stop()
    with pytest.raises(BusUnavailable, match="was closed"):
        bridge.call(answer(), 10)
    bridge.post(lambda: pytest.fail("nobody runs this any more"))
