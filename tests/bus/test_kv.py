"""A bucket against a real nats-server."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable

import gevent
import pytest

from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.bus.kv import Bucket, Entry
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from tests.bus.freezing import freeze, frozen
from tests.bus.streams import new_bucket
from tests.support.nats_server import NatsServer

EITHER_WAY = pytest.mark.parametrize("allow_direct", [True, False], ids=["direct get", "leader only"])


def add_one(value: bytes | None) -> bytes:
    return str(int(value or b"0") + 1).encode()


def append(item: str) -> Callable[[bytes | None], bytes | None]:
    """An idempotent change: the item is appended to a JSON list unless it is there."""

    def change(value: bytes | None) -> bytes | None:
        items = json.loads(value) if value else []
        return None if item in items else json.dumps([*items, item]).encode()

    return change


def in_a_moment(seconds: float = 10) -> float:
    return time.monotonic() + seconds


# -- read and write --------------------------------------------------------------------------


@EITHER_WAY
def test_create_and_get(jetstream: JetStream, allow_direct: bool) -> None:
    bucket = new_bucket(jetstream, allow_direct=allow_direct)
    entry = bucket.create("key", b"value")
    assert bucket.get("key") == bucket.get_from_leader("key") == entry == Entry("key", b"value", entry.revision)
    assert bucket.get("no-such-key") is None
    assert bucket.get_from_leader("no-such-key") is None


def test_a_second_create_conflicts(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    first, second = jetstream.store([bucket.creation("key", b"1"), bucket.creation("key", b"2")], 2)
    assert isinstance(first, Stored)
    assert isinstance(second, RevisionConflict)
    with pytest.raises(RevisionConflict):
        bucket.create("key", b"3")
    entry = bucket.get("key")
    assert entry is not None
    assert entry.value == b"1"


@EITHER_WAY
@pytest.mark.parametrize("remove", [Bucket.delete, Bucket.purge])
def test_a_removed_key_is_not_there_and_may_be_created_again(
    jetstream: JetStream, allow_direct: bool, remove: Callable[[Bucket, str], None]
) -> None:
    bucket = new_bucket(jetstream, allow_direct=allow_direct)
    bucket.put("gone", b"1")
    there = bucket.put("there", b"2")
    remove(bucket, "gone")
    remove(bucket, "gone")
    assert bucket.get("gone") is None
    assert bucket.get_many(["gone", "there"]) == {"there": there}
    assert list(bucket.scan()) == [[there]]
    created = bucket.create("gone", b"3")
    assert bucket.get("gone") == created


def test_put_overwrites(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    first = bucket.put("key", b"1")
    second = bucket.put("key", b"2")
    assert second.revision > first.revision
    assert bucket.get("key") == second


def test_a_purge_forgets_the_history(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream, max_msgs_per_subject=10)
    for number in range(5):
        bucket.put("key", str(number).encode())
    bucket.purge("key")
    assert jetstream.stream_info(bucket.stream).messages == 1, "the marker alone"


@EITHER_WAY
@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_get_many(jetstream: JetStream, count: int, allow_direct: bool) -> None:
    bucket = new_bucket(jetstream, allow_direct=allow_direct)
    keys = [f"key-{number}" for number in range(count)]
    jetstream.store([bucket.creation(key, key.encode()) for key in keys], 10)
    entries = bucket.get_many([*keys, "missing"])
    assert {key: entry.value for key, entry in entries.items()} == {key: key.encode() for key in keys}


def test_a_value_may_carry_a_header_called_status(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    nats_subject = bucket.creation("key", b"").nats_subject
    jetstream.store([Publication(nats_subject, b"value", {"Status": "404"})], 2)
    entry = bucket.get("key")
    assert entry is not None
    assert bucket.get_many(["key"]) == {"key": entry}
    assert list(bucket.scan()) == [[entry]]


def test_a_bucket_that_is_not_there(jetstream: JetStream) -> None:
    bucket = Bucket(jetstream, "no-such-bucket")
    calls: list[Callable[[], object]] = [
        lambda: bucket.get("key"),
        lambda: bucket.get_many(["key"]),
        lambda: list(bucket.scan()),
        lambda: bucket.put("key", b""),
        lambda: bucket.create("key", b""),
        lambda: bucket.update("key", add_one, deadline=in_a_moment()),
    ]
    for call in calls:
        with pytest.raises(BusRefused):
            call()


# -- scan ------------------------------------------------------------------------------------


@EITHER_WAY
def test_scan(jetstream: JetStream, allow_direct: bool) -> None:
    bucket = new_bucket(jetstream, allow_direct=allow_direct)
    keys = [f"{kind}.{number}" for number in range(250) for kind in ("a", "b")]
    jetstream.store([bucket.creation(key, key.encode()) for key in keys], 10)
    pages = list(bucket.scan(page_limit=100))
    assert [len(page) for page in pages] == [100] * 5
    assert [entry.key for page in pages for entry in page] == keys
    assert [entry.key for page in bucket.scan("b.*") for entry in page] == [f"b.{number}" for number in range(250)]
    assert list(bucket.scan("c.*")) == []


def test_a_scan_holds_a_page_of_bounded_size(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    keys = [f"key-{number}" for number in range(40)]
    jetstream.store([bucket.creation(key, b"x" * 500_000) for key in keys], 20)
    pages = list(bucket.scan())
    assert [entry.key for page in pages for entry in page] == keys
    assert max(sum(len(entry.value) for entry in page) for page in pages) < 6_000_000


def test_a_scan_misses_nothing_that_changes_meanwhile(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    keys = [f"key-{number}" for number in range(100)]
    jetstream.store([bucket.creation(key, b"old") for key in keys], 10)
    seen: dict[str, bytes] = {}
    for page in bucket.scan(page_limit=10):
        if not seen:
            for key in keys[5::10]:
                bucket.put(key, b"new")
        seen |= {entry.key: entry.value for entry in page}
    assert seen == {key: b"new" if number % 10 == 5 else b"old" for number, key in enumerate(keys)}


# -- update ----------------------------------------------------------------------------------


def test_update_creates_replaces_and_leaves_alone(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    assert bucket.update("key", lambda value: None, deadline=in_a_moment()) is None
    first = bucket.update("key", add_one, deadline=in_a_moment())
    second = bucket.update("key", add_one, deadline=in_a_moment())
    assert first is not None
    assert second is not None
    assert (first.value, second.value) == (b"1", b"2")
    assert bucket.get("key") == second
    assert bucket.update("key", lambda value: None, deadline=in_a_moment()) == second
    assert bucket.update("key", lambda value: value, deadline=in_a_moment()) == second
    assert bucket.get("key") == second, "nothing was written"
    bucket.delete("key")
    again = bucket.update("key", add_one, deadline=in_a_moment())
    assert again is not None
    assert again.value == b"1"


def test_eight_at_once_all_count_within_the_tries_there_are(jetstream: JetStream) -> None:
    """Who is beaten to it was beaten by one who is then done, so eight need eight tries at most."""
    bucket = new_bucket(jetstream)
    changing = [gevent.spawn(bucket.update, "key", add_one, deadline=in_a_moment(), tries=8) for _ in range(8)]
    gevent.joinall(changing, raise_error=True)
    entry = bucket.get("key")
    assert entry is not None
    assert entry.value == b"8"


def test_eight_that_go_on_for_long_lose_nothing(jetstream: JetStream, new_bus: Callable[[str], Bus]) -> None:
    bucket = new_bucket(jetstream)
    calls = itertools.count()

    def change(value: bytes | None) -> bytes:
        next(calls)
        return add_one(value)

    def work() -> None:
        for _ in range(25):
            bucket.update("key", change, deadline=in_a_moment(60), tries=10_000)

    gevent.joinall([gevent.spawn(work) for _ in range(8)], raise_error=True)
    entry = bucket.get("key")
    assert entry is not None
    assert entry.value == b"200"
    assert next(calls) > 200, "there were conflicts"


def test_update_gives_up_after_its_tries(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    calls = itertools.count()

    def beaten(value: bytes | None) -> bytes:
        bucket.put("key", str(next(calls)).encode())
        return b"mine"

    with pytest.raises(RevisionConflict):
        bucket.update("key", beaten, deadline=in_a_moment(), tries=3)
    assert next(calls) == 3
    entry = bucket.get("key")
    assert entry is not None
    assert entry.value == b"2"


def test_update_ends_at_its_deadline(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    begun = time.monotonic()

    def beaten(value: bytes | None) -> bytes:
        bucket.put("key", b"theirs")
        return b"mine"

    with pytest.raises((RevisionConflict, BusUnavailable)):
        bucket.update("key", beaten, deadline=begun + 0.5, tries=1_000_000)
    assert 0.4 < time.monotonic() - begun < 2
    with pytest.raises(BusUnavailable, match="no time left"):
        bucket.update("key", add_one, deadline=begun)


def test_a_lost_acknowledgement_is_applied_once(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    """The server freezes between read and write and thaws when the acknowledgement has been given up."""
    server = new_nats_server()
    bus = new_bus(server.url)
    jetstream = JetStream(bus)
    bucket = new_bucket(jetstream, storage="file")
    before = bucket.put("key", b'["first"]')
    calls = itertools.count()
    thaws = []
    appended = append("second")

    def change(value: bytes | None) -> bytes | None:
        if next(calls) == 0:
            thaws.append(gevent.spawn_later(1.3, os.kill, freeze(server), signal.SIGCONT))
        return appended(value)

    entry = bucket.update("key", change, deadline=in_a_moment())
    gevent.joinall(thaws, raise_error=True)
    assert entry is not None
    assert json.loads(entry.value) == ["first", "second"]
    assert next(calls) > 1, "it was read again"
    assert entry.revision == before.revision + 1, "one write"
    assert bucket.get("key") == entry
    assert bus.waiting == 0


def test_a_frozen_server_costs_the_deadline_and_no_more(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.3)
    bucket = new_bucket(jetstream)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: bucket.put("key", b"1"),
        "create": lambda: bucket.create("key", b"1"),
        "delete": lambda: bucket.delete("key"),
        "get": lambda: bucket.get("key"),
        "get many": lambda: bucket.get_many([str(number) for number in range(2500)]),
        "scan": lambda: list(bucket.scan()),
        "update": lambda: bucket.update("key", add_one, deadline=in_a_moment(0.3)),
        "own deadline": lambda: bucket.get("key", timeout_seconds=0.1),
    }
    with frozen(server):
        for what, call in calls.items():
            begun = time.monotonic()
            with pytest.raises(BusUnavailable):
                call()
            assert time.monotonic() - begun < 0.8, what
    assert bucket.get("no-such-key", timeout_seconds=5) is None
