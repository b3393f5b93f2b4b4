"""A caller inside the test's own process: its reply subjects are its own choice, unlike those of ``Bus.request``."""

from __future__ import annotations

import itertools

import gevent

from relay.bus.client import Bus, Msg

_numbers = itertools.count(1)


def publish_with_reply_to(bus: Bus, nats_subject: str, payload: bytes, reply_subject: str) -> None:
    """Publishes a request whose reply subject the caller chose."""
    bus._bridge.post(lambda: bus._bridge._loop.create_task(bus._nc.publish(nats_subject, payload, reply_subject)))


def replies_to(bus: Bus, nats_subject: str, payload: bytes, timeout_seconds: float = 5.0) -> list[Msg]:
    """One request from an inbox that is not the bus's own; every reply that came once the first is there."""
    inbox = f"_INBOX.caller.{next(_numbers)}"
    replies: list[Msg] = []
    token = bus.subscribe(inbox, "", replies.append)
    publish_with_reply_to(bus, nats_subject, payload, inbox)
    with gevent.Timeout(timeout_seconds):
        while not replies:
            gevent.sleep(0.001)
    bus.flush()
    bus.unsubscribe(token)
    return replies
