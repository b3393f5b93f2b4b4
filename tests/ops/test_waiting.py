"""A storage that goes away while a worker serves is told of, and so is its return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
from gevent.event import Event

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.ops import waiting
from relay.ops.measuring import Measuring
from relay.ops.presence import Presence
from relay.ops.process import Context
from relay.settings import load_settings
from tests.support.nats_server import NatsServer


def test_what_goes_away_later_is_told_too(
    new_nats_server: Callable[..., NatsServer],
    new_bus: Callable[[str], Bus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "WATCH_SECONDS", 0.05)
    server = new_nats_server()
    bus = new_bus(server.url)
    context = Context(
        load_settings(),
        "status",
        bus,
        Presence(tmp_path, "status"),
        Event(),
        pytest.fail,
        Measuring(tmp_path, "status"),
    )
    told = [""]
    changed = Event()

    def say(why_not: str) -> None:
        if why_not != told[-1]:
            told.append(why_not)
            changed.set()

    def next_change() -> str:
        with gevent.Timeout(10):
            changed.wait()
        changed.clear()
        return told[-1]

    watching = waiting.serve_when_tracked(context, [], JetStream(bus, timeout_seconds=0.3), say)
    try:
        assert told == [""], "records and facts could be kept at once"
        server.stop()
        assert next_change() != ""
        server.start()
        with gevent.Timeout(10):
            while next_change() != "":
                pass
    finally:
        watching.kill(timeout=2)
    assert not context.stop.is_set()
