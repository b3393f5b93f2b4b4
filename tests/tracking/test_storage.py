"""How bucket and log are made, on real servers; and waiting for a NATS that is away."""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest

from relay import __version__, contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.errors import BusRefused, BusUnavailable
from relay.tracking.storage import NO_JETSTREAM, StorageConfig, ensure_storage, patiently, why_unusable
from tests.support.nats_server import NatsServer

DAY = 86_400 * 10**9
STREAMS = (f"KV_{contract.RECIPIENTS_BUCKET}", contract.LOG_STREAM)

NewServer = Callable[..., NatsServer]
NewBus = Callable[[str], Bus]


def test_what_is_missing_is_made_without_the_limits_that_break(new_nats_server: NewServer, new_bus: NewBus) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig(ttl_days=30, storage="memory")) == ""
    records, facts = (jetstream.stream_info(name).config for name in STREAMS)
    assert (records["max_msg_size"], records["max_bytes"], records["max_msgs"]) == (-1, -1, -1)
    assert (records["max_msgs_per_subject"], records["discard"]) == (1, "new")
    assert (records["max_age"], facts["max_age"]) == (31 * DAY, 30 * DAY), "records outlive facts"
    for config in (records, facts):
        assert config["allow_direct"]
        assert config["storage"] == "memory"
        assert config["num_replicas"] == 1
        assert config["metadata"]["made_by"] == f"Relay {__version__}"


def test_what_is_there_stays_as_it_is(new_nats_server: NewServer, new_bus: NewBus) -> None:
    # Given a bucket as lfx's chart makes it
    jetstream = JetStream(new_bus(new_nats_server().url))
    chart = {"subjects": [f"$KV.{contract.RECIPIENTS_BUCKET}.>"], "max_msgs_per_subject": 1, "max_msg_size": 65_536}
    jetstream.api(f"STREAM.CREATE.{STREAMS[0]}", {"name": STREAMS[0], **chart})
    before = jetstream.stream_info(STREAMS[0]).config
    # When the relay needs it
    assert ensure_storage(jetstream, StorageConfig(ttl_days=7)) == ""
    # Then nothing about it has changed, and only the log was made
    assert jetstream.stream_info(STREAMS[0]).config == before
    assert jetstream.stream_info(STREAMS[1]).config["max_age"] == 7 * DAY


def test_replicas_that_cannot_be_had_are_one_sentence(new_nats_server: NewServer, new_bus: NewBus) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    why = why_unusable(jetstream, StorageConfig(replicas=3))
    assert why.startswith("the tracking storage could not be made: ")
    assert "replicas > 1" in why


def test_without_jetstream(new_nats_server: NewServer, new_bus: NewBus) -> None:
    jetstream = JetStream(new_bus(new_nats_server(jetstream=False).url))
    assert why_unusable(jetstream, StorageConfig()) == NO_JETSTREAM


def test_patience_outlasts_a_restart(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.3)
    assert ensure_storage(jetstream, StorageConfig()) == ""
    server.stop()
    asked = gevent.spawn(patiently, lambda: jetstream.last_sequence(contract.LOG_STREAM))
    with pytest.raises(BusUnavailable):
        jetstream.last_sequence(contract.LOG_STREAM)
    server.start()
    assert asked.get(timeout=10) == 0


def test_patience_ends(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.1)
    server.stop()
    with pytest.raises(BusUnavailable), gevent.Timeout(5):
        patiently(lambda: jetstream.last_sequence(contract.LOG_STREAM), 0.5)


def test_patience_is_for_absence_only(jetstream: JetStream) -> None:
    with pytest.raises(BusRefused), gevent.Timeout(1):
        patiently(lambda: jetstream.last_sequence("no-such-stream"))
