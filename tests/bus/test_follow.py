"""Following a stream of a real nats-server: everything, once, in order, whatever happens on the way."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest

from relay.bus.client import Bus, Publication
from relay.bus.follow import BATCH, REFUSED_SECONDS, Follower, _delivery, _nanoseconds
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream, Stored
from relay.errors import BusRefused
from tests.bus.freezing import freeze
from tests.bus.streams import Stream, new_stream
from tests.support.nats_server import NatsServer

NewBus = Callable[[str], Bus]
NewServer = Callable[..., NatsServer]

PATIENCE_SECONDS = 30


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Nothing here may hang."""
    with gevent.Timeout(PATIENCE_SECONDS):
        yield


def read(follower: Follower, count: int) -> list[bytes]:
    return [next(follower).payload for _ in range(count)]


def numbers(*of: int) -> list[bytes]:
    return [str(number).encode() for number in range(*of)]


def test_from_the_beginning_and_on(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(*numbers(1000), headers={"X-Own": "yes"})
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        first = next(follower)
        assert (first.nats_subject, first.sequence, first.payload) == (f"{stream.prefix}.a", 1, b"0")
        assert first.headers["X-Own"] == "yes"
        assert first.pending == 999
        assert read(follower, 999) == numbers(1, 1000)
        for number in range(1000, 1010):
            stream.store(str(number).encode())
            assert next(follower).payload == str(number).encode()


def test_from_now_everything_that_is_stored_later(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(b"before")
    with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
        stream.store(b"after")
        assert next(follower).payload == b"after"


def test_from_now_in_an_empty_stream(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
        stream.store(b"first")
        assert next(follower).payload == b"first"


def test_only_what_the_filter_matches_from_a_sequence_on(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    for number in range(10):
        stream.store(b"other", last_token="other")
        stream.store(str(number).encode(), last_token="mine")
    with jetstream.follow(stream.name, f"{stream.prefix}.mine", from_sequence=11) as follower:
        assert read(follower, 5) == numbers(5, 10)


def test_a_header_called_status_is_only_a_header(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(b"1", headers={"Status": "503"})
    stream.store(b"2")
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        assert read(follower, 2) == [b"1", b"2"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_in_the_middle_neither_loses_nor_repeats(
    new_nats_server: NewServer, new_bus: NewBus, end: signal.Signals
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    stream = new_stream(jetstream, storage="file")
    acknowledged: list[bytes] = []

    def store(payload: bytes) -> bool:
        (answer,) = jetstream.store([Publication(f"{stream.prefix}.a", payload)], 1)
        return isinstance(answer, Stored)

    def write() -> None:
        for number in itertools.count():
            if store(payload := str(number).encode()):
                acknowledged.append(payload)
            if len(acknowledged) == 3000:
                break
            gevent.sleep(0)
        while not store(b"end"):
            pass

    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        writing = gevent.spawn(write)
        got = [next(follower) for _ in range(500)]
        assert server.process is not None
        server.process.send_signal(end)
        server.process.wait(10)
        server.start()
        got += [next(follower) for _ in range(500)]
        server.stop()
        server.start()
        while got[-1].payload != b"end":
            got.append(next(follower))
    writing.get()
    sequences = [each.sequence for each in got]
    assert sequences == list(range(1, sequences[-1] + 1)), "each once, in order"
    assert set(acknowledged) <= {each.payload for each in got}


def test_a_frozen_server_is_waited_for(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    stream = new_stream(jetstream)
    stream.store(*numbers(10))
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        assert read(follower, 10) == numbers(10)
        thaw = gevent.spawn_later(4, os.kill, freeze(server), signal.SIGCONT)  # longer than the silence it bears

        def write() -> None:
            thaw.get()
            stream.store(*numbers(10, 20))

        writing = gevent.spawn(write)
        assert read(follower, 10) == numbers(10, 20)
        writing.get()
    assert stream.consumers() == []


def test_a_lost_consumer_is_replaced(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(*numbers(2 * BATCH))
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        assert read(follower, 10) == numbers(10)
        for name in stream.consumers():
            jetstream.api(f"CONSUMER.DELETE.{stream.name}.{name}")
        assert read(follower, 2 * BATCH - 10) == numbers(10, 2 * BATCH)
        for name in stream.consumers():
            jetstream.api(f"CONSUMER.DELETE.{stream.name}.{name}")
        stream.store(b"live")
        assert next(follower).payload == b"live"


def has_sent(stream: Stream, consumer: str, count: int) -> bool:
    """Whether the server has sent so many messages, or the consumer was given up meanwhile."""
    try:
        info = stream.jetstream.api(f"CONSUMER.INFO.{stream.name}.{consumer}")
    except BusRefused:
        return True
    return int(info["delivered"]["consumer_seq"]) >= count


@pytest.mark.parametrize("is_followed", [True, False], ids=["a later one shows it", "a heartbeat shows it"])
def test_what_was_lost_on_the_way_is_fetched_again(jetstream: JetStream, bus: Bus, is_followed: bool) -> None:
    stream = new_stream(jetstream)
    with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
        stream.store(b"first")
        assert next(follower).payload == b"first"
        assert follower._token is not None
        _, subscription = bus._subscriptions._held[follower._token]
        assert subscription is not None
        handlers = bus._connection.nc.handlers
        deliver = handlers[subscription._id]
        handlers[subscription._id] = lambda msg: None
        stream.store(*numbers(25))
        while not has_sent(stream, follower._consumer, 26):
            pass
        bus.flush()  # and what it has sent has come, for nothing
        handlers[subscription._id] = deliver
        assert not follower._received
        if is_followed:
            stream.store(b"25")
        assert read(follower, 25 + is_followed) == numbers(25 + is_followed)


def test_a_slow_reader_holds_a_batch_and_no_more(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    stream.store(*numbers(5 * BATCH))
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        got = []
        for _ in range(5 * BATCH):
            got.append(next(follower).payload)
            if len(got) % 100 == 1:
                stream.store(b"more", last_token="later")
                bus.flush()  # whatever the server would send by itself is here now
                assert len(follower._received) <= BATCH
        assert got == numbers(5 * BATCH)


def test_large_messages_are_held_in_small_numbers(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    sent = [bytes([number]) * 700_000 for number in range(12)]
    stream.store(*sent)
    with jetstream.follow(stream.name, f"{stream.prefix}.>", from_sequence=1) as follower:
        for payload in sent:
            assert next(follower).payload == payload
            bus.flush()
            assert sum(len(each.payload) for each in follower._received) <= 2 * bus.max_payload_bytes


# -- gaps ------------------------------------------------------------------------------------


def test_a_gap_at_the_beginning_is_told(jetstream: JetStream) -> None:
    stream = new_stream(jetstream, max_msgs=5)
    stream.store(*numbers(20))
    gaps: list[tuple[int, int]] = []
    with jetstream.follow(
        stream.name, f"{stream.prefix}.>", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        assert read(follower, 5) == numbers(15, 20)
    assert gaps == [(1, 16)]


def test_a_reader_so_slow_that_the_limits_overtake_it_is_told(jetstream: JetStream) -> None:
    stream = new_stream(jetstream, max_msgs=BATCH)
    stream.store(*numbers(BATCH))
    gaps: list[tuple[int, int]] = []
    with jetstream.follow(
        stream.name, f"{stream.prefix}.>", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        assert read(follower, BATCH) == numbers(BATCH)
        stream.store(*numbers(BATCH, 3 * BATCH))
        assert next(follower).payload == str(2 * BATCH).encode()
    assert gaps == [(BATCH + 1, 2 * BATCH + 1)]


def test_no_gap_is_told_where_there_is_none(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(*numbers(10))
    gaps: list[tuple[int, int]] = []
    with jetstream.follow(
        stream.name, f"{stream.prefix}.>", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        assert read(follower, 10) == numbers(10)
        jetstream.api(f"STREAM.PURGE.{stream.name}")  # all of it was read
        stream.store(b"10")
        assert next(follower).payload == b"10"
    assert gaps == []


def test_a_stream_made_anew_is_told_and_read_from_its_beginning(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    stream.store(*numbers(10))
    gaps: list[tuple[int, int]] = []
    with jetstream.follow(
        stream.name, f"{stream.prefix}.>", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        assert read(follower, 10) == numbers(10)
        config = dict(jetstream.stream_info(stream.name).config)
        jetstream.api(f"STREAM.DELETE.{stream.name}")
        jetstream.api(f"STREAM.CREATE.{stream.name}", config)
        stream.store(*numbers(100, 103))
        assert read(follower, 3) == numbers(100, 103)
    assert gaps == [(11, 1)]


def test_a_stream_that_is_gone_ends_it_with_a_refusal(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
        jetstream.api(f"STREAM.DELETE.{stream.name}")
        with pytest.raises(BusRefused) as refusal:
            next(follower)
    assert refusal.value.code == STREAM_NOT_FOUND


def test_a_stream_that_is_back_within_seconds_is_followed_on(jetstream: JetStream) -> None:
    stream = new_stream(jetstream)
    with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
        config = dict(jetstream.stream_info(stream.name).config)
        jetstream.api(f"STREAM.DELETE.{stream.name}")
        reading = gevent.spawn(next, follower)
        gevent.sleep(REFUSED_SECONDS / 2)
        jetstream.api(f"STREAM.CREATE.{stream.name}", config)
        stream.store(b"again")
        assert reading.get(timeout=5).payload == b"again"


def stop(server: NatsServer, bus: Bus) -> None:
    """Returns when the bus knows."""
    server.stop()
    while bus.is_connected:
        gevent.sleep(0.01)


@pytest.mark.parametrize("written", [0, 2, 3, 6], ids=["none", "fewer", "as many", "more"])
def test_sequences_given_to_other_messages_are_told_and_read(
    new_nats_server: NewServer, new_bus: NewBus, tmp_path: Path, written: int
) -> None:
    """The server gets an older store back, and others write before the follower is there again."""
    server = new_nats_server()
    store = server._store / "jetstream"
    bus = new_bus(server.url)
    jetstream = JetStream(bus)
    stream = new_stream(jetstream, storage="file")
    stream.store(*numbers(10))
    stop(server, bus)
    shutil.copytree(store, tmp_path / "older")
    server.start()
    gaps: list[tuple[int, int]] = []
    assert bus.wait_connected(5)
    with jetstream.follow(
        stream.name, f"{stream.prefix}.a", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        stream.store(b"lost", b"lost", b"lost")
        assert read(follower, 13) == [*numbers(10), b"lost", b"lost", b"lost"]
        stop(server, bus)
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "older", store)
        server.start()
        assert bus.wait_connected(5)
        stream.store(*numbers(10, 10 + written))
        reading = gevent.spawn(read, follower, written + 1)
        if not written:
            while not gaps:
                gevent.sleep(0.01)
        stream.store(b"end")
        assert reading.get() == [*numbers(10, 10 + written), b"end"]
    assert gaps == [(14, 11)]


def test_a_filter_is_told_of_no_gap_where_only_others_have_gone(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.bus.follow.EXPIRES_SECONDS", 2)
    stream = new_stream(jetstream)
    stream.store(b"1", last_token="mine")
    gaps: list[tuple[int, int]] = []
    with jetstream.follow(
        stream.name, f"{stream.prefix}.mine", from_sequence=1, on_gap=lambda *gap: gaps.append(gap)
    ) as follower:
        assert next(follower).payload == b"1"
        stream.store(*numbers(20), last_token="others")
        reading = gevent.spawn(next, follower)
        while follower._passed < 21:  # two pulls end
            gevent.sleep(0.01)
        jetstream.api(f"STREAM.PURGE.{stream.name}", {"seq": 20})
        pulls = follower._pulls
        while follower._pulls < pulls + 2:
            gevent.sleep(0.01)
        for name in stream.consumers():  # nor by a new consumer
            jetstream.api(f"CONSUMER.DELETE.{stream.name}.{name}")
        stream.store(b"2", last_token="mine")
        assert reading.get().payload == b"2"
    assert gaps == []


# -- the end ---------------------------------------------------------------------------------


def leaves_nothing(stream: Stream, bus: Bus, subscriptions: int) -> bool:
    return stream.consumers() == [] and len(bus._subscriptions._held) == subscriptions and bus.waiting == 0


def test_closing_from_another_greenlet_ends_the_iteration(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    subscriptions = len(bus._subscriptions._held)
    follower = jetstream.follow(stream.name, f"{stream.prefix}.>")
    reading = gevent.spawn(list, follower)
    stream.store(b"1")
    with gevent.Timeout(5):
        while follower._next < 2:
            gevent.sleep(0)
    follower.close()
    follower.close()
    assert [each.payload for each in reading.get(timeout=2)] in ([b"1"], [])
    assert list(follower) == []
    assert leaves_nothing(stream, bus, subscriptions)


def test_closing_while_a_consumer_is_made_leaves_none_behind(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    subscriptions = len(bus._subscriptions._held)
    for number in range(60):
        follower = jetstream.follow(stream.name, f"{stream.prefix}.>")
        follower._doubt()
        reading = gevent.spawn(list, follower)
        gevent.sleep(0.0001 * (number % 15))
        follower.close()
        assert reading.get(timeout=5) == []
    bus.flush()
    assert leaves_nothing(stream, bus, subscriptions)


def test_a_killed_reader_leaves_nothing_behind(jetstream: JetStream, bus: Bus) -> None:
    stream = new_stream(jetstream)
    subscriptions = len(bus._subscriptions._held)

    def follow() -> None:
        with jetstream.follow(stream.name, f"{stream.prefix}.>") as follower:
            for _ in follower:
                pass

    reading = gevent.spawn(follow)
    with gevent.Timeout(5):
        while not stream.consumers():
            gevent.sleep(0)
    reading.kill(timeout=5)
    assert reading.dead
    assert leaves_nothing(stream, bus, subscriptions)


def test_closing_while_nats_is_away_does_not_hang(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    stream = new_stream(jetstream)
    follower = jetstream.follow(stream.name, f"{stream.prefix}.>")
    reading = gevent.spawn(list, follower)
    server.stop()
    begun = time.monotonic()
    follower.close()
    assert reading.get(timeout=3) == []
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("ack_subject", "delivery"),
    [
        ("$JS.ACK.EMAIL_LOG.er814rTo.1.10.3.1795321050967693990.7", ("er814rTo", 10, 3, 1795321050967693990, 7)),
        (
            "$JS.ACK.hub.ACC.EMAIL_LOG.er814rTo.1.10.3.1795321050967693990.7",
            ("er814rTo", 10, 3, 1795321050967693990, 7),
        ),
        (
            "$JS.ACK._.ACC.EMAIL_LOG.er814rTo.1.10.3.1795321050967693990.7.rnd",
            ("er814rTo", 10, 3, 1795321050967693990, 7),
        ),
    ],
)
def test_where_a_message_stands(ack_subject: str, delivery: tuple[str, int, int, int, int]) -> None:
    assert _delivery(ack_subject) == delivery


@pytest.mark.parametrize(
    ("time_text", "nanoseconds"),
    [
        ("2026-11-22T05:17:30.967693990Z", 1795324650967693990),
        ("2026-11-22T05:17:30.96769399Z", 1795324650967693990),
        ("2026-11-22T05:17:30Z", 1795324650000000000),
    ],
)
def test_a_stored_time(time_text: str, nanoseconds: int) -> None:
    assert _nanoseconds(time_text) == nanoseconds
