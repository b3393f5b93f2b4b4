"""What the workers tell of themselves over NATS, gathered for ``relayctl status``.

Bounded: with NATS down, or a worker that hangs, the answer comes all the same, without their figures.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any, NamedTuple

import gevent
import orjson
from gevent.event import Event

from relay.bus.client import Bus, BusConfig, Msg, Publication
from relay.bus.micro import NAME
from relay.errors import BusRefused, BusUnavailable

CONNECT_SECONDS = 0.3
ANSWER_SECONDS = 0.3
ELSEWHERE_SECONDS = 0.05
"""For those that nobody waits for."""


class Fleet(NamedTuple):
    """The workers' figures."""

    nats_problem: str
    """Why NATS could not be asked, '' when it could."""
    nats_version: str
    here: dict[str, dict[str, Any]]
    """By program: those of this host, with the pid that supervisord names."""
    elsewhere: int
    """How many workers of other relays, here or on other hosts, answered in time."""


class _Stats:
    """Collects stats replies until every wanted program has answered."""

    def __init__(self, wanted: Iterable[tuple[str, int]]) -> None:
        self._wanted = set(wanted)
        self.here: dict[str, dict[str, Any]] = {}
        self.elsewhere = 0
        self.refusal = ""
        """Why this user gets no answers."""
        self.done = Event()

    def take(self, msg: Msg) -> bool:
        if msg.status:  # 503: no worker listens
            self.done.set()
            return True
        figures = _figures(msg.payload)
        key = (figures.get("program", ""), figures.get("pid", 0))
        if key in self._wanted and figures.get("host") == platform.node():
            self.here[key[0]] = figures
            if len(self.here) == len(self._wanted):
                self.done.set()
        else:
            self.elsewhere += 1
        return False

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        if isinstance(error, BusRefused):
            self.refusal = str(error)
        self.done.set()


def gather(config: BusConfig, workers: Iterable[tuple[str, int]]) -> Fleet:
    """The figures of ``workers`` (program, pid); returns within about 0.7 s, but for slow name resolution."""
    bus = Bus(config, "relayctl")
    bus.start()
    try:
        if not bus.wait_connected(CONNECT_SECONDS):
            return Fleet(bus.last_error or "no answer", "", {}, 0)
        stats = _Stats(workers)
        token = bus.request_stream(Publication(f"$SRV.STATS.{NAME}", b""), stats)
        stats.done.wait(ANSWER_SECONDS)
        gevent.sleep(ELSEWHERE_SECONDS)
        bus.forget(token)
        return Fleet(stats.refusal, bus.server_version, stats.here, stats.elsewhere)
    finally:
        bus.close(0.2)


def _figures(payload: bytes) -> dict[str, Any]:
    try:
        figures = orjson.loads(payload)["endpoints"][0]["data"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
        return {}
    return figures if isinstance(figures, dict) else {}
