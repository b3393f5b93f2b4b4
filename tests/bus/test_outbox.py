"""Who waits for an answer: nobody is forgotten, and nobody who has gone is remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent.event import AsyncResult, Event

from relay.bus.client import Bus, Msg, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.bus.outbox import DENIED
from relay.errors import BusRefused, BusUnavailable
from tests.bus.freezing import frozen
from tests.support.nats_server import NatsServer

MANY = [f"key-{number}" for number in range(500)]
CALLS: dict[str, Callable[[JetStream, Bucket], object]] = {
    "store": lambda jetstream, bucket: jetstream.store([bucket.creation(key, b"x") for key in MANY], 30),
    "api": lambda jetstream, _: jetstream.api("STREAM.INFO.X"),
    "get": lambda _, bucket: bucket.get("key"),
    "get many": lambda _, bucket: bucket.get_many(MANY),
    "scan": lambda _, bucket: list(bucket.scan()),
}


@pytest.fixture
def frozen_bus(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> Iterator[Bus]:
    """A bus whose server no longer answers."""
    server = new_nats_server()
    bus = new_bus(server.url)
    with frozen(server):
        yield bus


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_killed_greenlet_leaves_no_inbox_behind(frozen_bus: Bus, call: Callable[[JetStream, Bucket], object]) -> None:
    jetstream = JetStream(frozen_bus, timeout_seconds=30)
    asking = gevent.spawn(call, jetstream, Bucket(jetstream, "frozen"))
    with gevent.Timeout(5):
        while not frozen_bus.waiting:
            gevent.sleep(0)
    asking.kill(timeout=1)
    assert asking.dead
    assert frozen_bus.waiting == 0


def test_a_callers_own_timeout_leaves_no_inbox_behind(frozen_bus: Bus) -> None:
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
        frozen_bus.request_all([Publication("outbox.silent", b"")] * 100, 30)
    assert frozen_bus.waiting == 0


def test_closing_tells_everyone_who_waits(bus: Bus) -> None:
    asked = Event()
    bus.subscribe("outbox.silent", "", lambda _: asked.set())
    waiting = gevent.spawn(bus.request_all, [Publication("outbox.silent", b"")], 60)
    assert asked.wait(5)
    bus.close()
    (answer,) = waiting.get(timeout=5)
    assert isinstance(answer, BusUnavailable)
    assert "closed" in str(answer)


def test_after_closing_the_answer_comes_at_once(bus: Bus) -> None:
    bus.close()
    dropped = bus.dropped
    with gevent.Timeout(1), pytest.raises(BusUnavailable, match="closed"):
        bus.request(Publication("outbox.closed", b""), 60)
    bus.publish(Publication("outbox.closed", b""))
    bus.unsubscribe(bus.subscribe("outbox.closed", "", lambda _: None))
    assert bus.dropped == dropped + 2
    assert bus.waiting == 0


def test_what_is_published_before_there_is_a_connection_is_dropped_and_stops_nothing(nats_server: NatsServer) -> None:
    bus = Bus(nats_server.url, "test")
    bus.publish(Publication("outbox.early", b"too early"))
    bus.start()
    try:
        assert bus.wait_connected(5)
        assert bus.dropped == 1
        came = AsyncResult()
        bus.subscribe("outbox.early", "", came.set)
        bus.publish(Publication("outbox.early", b"in time"))
        assert came.get(timeout=5).payload == b"in time"
    finally:
        bus.close()


def test_answers_are_told_apart(bus: Bus) -> None:
    """One is answered, one has no listener, one is too large, one is never answered; each in its place."""

    def echo(msg: Msg) -> None:
        bus.publish(Publication(msg.reply_subject, msg.payload))

    bus.subscribe("outbox.echo", "", echo)
    bus.subscribe("outbox.silent", "", lambda _: None)
    asked = [
        Publication("outbox.silent", b""),
        Publication("outbox.echo", b"1"),
        Publication("outbox.nobody", b""),
        Publication("outbox.echo", b"x" * 1_100_000),
        Publication("outbox.echo", b"2"),
    ]
    late, first, nobody, large, second = bus.request_all(asked, 0.5)
    assert isinstance(late, BusUnavailable)
    assert isinstance(first, Msg)
    assert first.payload == b"1"
    assert isinstance(nobody, Msg)
    assert nobody.status == "503"
    assert isinstance(large, BusRefused)
    assert large.code == 413
    assert isinstance(second, Msg)
    assert second.payload == b"2"
    assert bus.waiting == 0


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_lost_connection_is_told_at_once_to_everyone_who_waits(
    new_nats_server: Callable[..., NatsServer],
    new_bus: Callable[[str], Bus],
    call: Callable[[JetStream, Bucket], object],
) -> None:
    server = new_nats_server()
    bus = new_bus(server.url)
    jetstream = JetStream(bus, timeout_seconds=30)
    with frozen(server):
        asking = gevent.spawn(call, jetstream, Bucket(jetstream, "lost"))
        with gevent.Timeout(5):
            while not bus.waiting:
                gevent.sleep(0)
        assert server.process is not None
        server.process.kill()
    asking.join(timeout=5)
    assert asking.ready(), "it waits for what nobody will answer any more"
    refusals = asking.value if asking.successful() else [asking.exception]
    assert {type(each) for each in refusals} == {BusUnavailable}
    assert bus.waiting == 0
    server.process.wait(10)
    server.start()
    assert bus.wait_connected(5)


def test_a_refused_subject_is_told_at_once_and_to_nobody_else(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    users = '{user: "w", password: "w", permissions: {publish: {deny: "outbox.Denied.>"}}}'
    server = new_nats_server(config=f"authorization {{ users: [{users}] }}")
    bus = new_bus(server.url.replace("//", "//w:w@"))
    bus.subscribe("outbox.>", "", lambda msg: bus.publish(Publication(msg.reply_subject, msg.payload)))
    begun = time.monotonic()
    denied, allowed = bus.request_all([Publication("outbox.Denied.A", b""), Publication("outbox.allowed", b"here")], 10)
    assert time.monotonic() - begun < 5
    assert isinstance(denied, BusRefused)
    assert denied.code == DENIED
    assert "may not publish to outbox.Denied.A" in str(denied)
    assert isinstance(allowed, Msg)
    assert allowed.payload == b"here"
    assert bus.is_connected
    assert bus.waiting == 0


def test_every_wait_ends_at_its_own_time(frozen_bus: Bus) -> None:
    """One alarm serves them all, whichever begins first and whichever ends first."""
    waits_seconds = [0.5, 0.2, 0.35, 0.0, 0.2]

    def ask(seconds: float) -> tuple[float, list[Msg | BusUnavailable | BusRefused]]:
        begun = time.monotonic()
        answers = frozen_bus.request_all([Publication("outbox.silent", b"")] * 3, seconds)
        return time.monotonic() - begun, answers

    asking = [gevent.spawn(ask, seconds) for seconds in waits_seconds]
    gevent.joinall(asking, timeout=5, raise_error=True)
    for seconds, greenlet in zip(waits_seconds, asking, strict=True):
        took_seconds, answers = greenlet.value
        assert seconds <= took_seconds < seconds + 0.4
        assert [str(answer) for answer in answers] == [f"NATS did not answer within {seconds:.3g} s"] * 3
    assert frozen_bus.waiting == 0
    took_seconds, _ = ask(0.1)  # the alarm has rung for the last of them, and rings again
    assert 0.1 <= took_seconds < 0.5


def test_who_asks_in_vain_again_and_again_keeps_nobody_from_running(nats_server: NatsServer) -> None:
    bus = Bus(nats_server.url, "test")  # never started, so never connected
    ran = gevent.spawn(lambda: None)
    (answer,) = bus.request_all([Publication("outbox.in_vain", b"")], 1)
    assert isinstance(answer, BusUnavailable)
    assert ran.dead
    ran = gevent.spawn(lambda: None)
    with pytest.raises(BusUnavailable, match="not connected"):
        JetStream(bus).get_many("stream", {"multi_last": ["a"]}, 1)
    assert ran.dead
    assert bus.request_all([], 1) == []
    bus.close()
