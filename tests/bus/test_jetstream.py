"""JetStream and KV against a real nats-server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from relay.bus.client import Bus, Publication
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream, Stored
from relay.bus.kv import Bucket
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from tests.support.nats_server import NatsServer


def new_bucket(jetstream: JetStream, *, allow_direct: bool = True) -> Bucket:
    """A bucket of the test's own."""
    name = uuid.uuid4().hex
    jetstream.api(
        f"STREAM.CREATE.KV_{name}",
        {
            "name": f"KV_{name}",
            "subjects": [f"$KV.{name}.>"],
            "max_msgs_per_subject": 1,
            "allow_direct": allow_direct,
            "allow_rollup_hdrs": True,
            "discard": "new",
            "storage": "memory",
        },
    )
    return Bucket(jetstream, name)


def delete(jetstream: JetStream, bucket: Bucket, key: str) -> None:
    """Deletes a key as KV clients do: with a marker."""
    nats_subject = bucket.creation(key, b"").nats_subject
    (answer,) = jetstream.store([Publication(nats_subject, b"", {"KV-Operation": "DEL"})], 2)
    assert isinstance(answer, Stored)


@pytest.mark.parametrize("allow_direct", [True, False], ids=["direct get", "leader only"])
def test_create_and_get(jetstream: JetStream, allow_direct: bool) -> None:
    bucket = new_bucket(jetstream, allow_direct=allow_direct)
    (answer,) = jetstream.store([bucket.creation("key", b"value")], 2)
    assert isinstance(answer, Stored)
    entry = bucket.get("key")
    assert entry is not None
    assert (entry.key, entry.value, entry.revision) == ("key", b"value", answer.sequence)
    assert bucket.get("no-such-key") is None


def test_a_second_create_conflicts(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    first, second = jetstream.store([bucket.creation("key", b"1"), bucket.creation("key", b"2")], 2)
    assert isinstance(first, Stored)
    assert isinstance(second, RevisionConflict)
    entry = bucket.get("key")
    assert entry is not None
    assert entry.value == b"1"


def test_a_deleted_key_is_not_there(jetstream: JetStream) -> None:
    bucket = new_bucket(jetstream)
    jetstream.store([bucket.creation("gone", b"1"), bucket.creation("there", b"2")], 2)
    delete(jetstream, bucket, "gone")
    assert bucket.get("gone") is None
    assert list(bucket.get_many(["gone", "there"])) == ["there"]


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_get_many(jetstream: JetStream, count: int) -> None:
    bucket = new_bucket(jetstream)
    keys = [f"key-{number}" for number in range(count)]
    jetstream.store([bucket.creation(key, key.encode()) for key in keys], 10)
    entries = bucket.get_many([*keys, "missing"])
    assert {key: entry.value for key, entry in entries.items()} == {key: key.encode() for key in keys}


def test_publishing_to_no_stream_is_refused(jetstream: JetStream) -> None:
    (answer,) = jetstream.store([Publication("no.such.stream", b"")], 2)
    assert isinstance(answer, BusRefused)
    assert answer.code == 503


def test_an_api_error_has_its_code(jetstream: JetStream) -> None:
    with pytest.raises(BusRefused, match="stream not found") as refusal:
        jetstream.api("STREAM.INFO.NO_SUCH")
    assert refusal.value.code == STREAM_NOT_FOUND


def test_without_jetstream(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> None:
    jetstream = JetStream(new_bus(new_nats_server(jetstream=False).url))
    with pytest.raises(BusRefused) as refusal:
        jetstream.api("STREAM.INFO.X")
    assert refusal.value.code == 503


def test_a_frozen_server_costs_the_deadline_and_no_more(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    import os
    import signal

    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.3)
    bucket = new_bucket(jetstream)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        (answer,) = jetstream.store([bucket.creation("key", b"1")], 0.3)
        assert isinstance(answer, BusUnavailable)
        with pytest.raises(BusUnavailable):
            bucket.get("key")
        with pytest.raises(BusUnavailable):
            bucket.get_many(["key"])
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert bucket.get("no-such-key") is None
