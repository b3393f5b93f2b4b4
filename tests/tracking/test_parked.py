"""Notifications that could not be handled: kept as they came, listed and dropped, whatever stands there."""

from __future__ import annotations

import json
from collections.abc import Callable

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.errors import BusUnavailable
from relay.tracking.parked import (
    KEPT_DAYS,
    MAX_BYTES,
    MAX_ID_LENGTH,
    MAX_REASON_LENGTH,
    Parked,
    Parking,
    ensure_parked_stream,
    parked_publication,
)
from relay.tracking.storage import StorageConfig
from tests.support.groups import store
from tests.support.nats_server import NatsServer

NewServer = Callable[..., NatsServer]
NewBus = Callable[[str], Bus]

AT = "2026-11-22T05:17:09.123Z"
MAX_PAYLOAD = 1024 * 1024


@pytest.fixture
def own(new_nats_server: NewServer, new_bus: NewBus) -> JetStream:
    """JetStream of a server of the test's own, with the stream."""
    jetstream = JetStream(new_bus(new_nats_server().url))
    ensure_parked_stream(jetstream, StorageConfig())
    return jetstream


def publication(body: str = "{", reason: str = "no JSON", number: int = 1) -> Publication:
    """What parks a body."""
    return parked_publication(body, reason, 3, f"sqs-{number}", AT, MAX_PAYLOAD)


def park(jetstream: JetStream, count: int, body: str = "{") -> None:
    """Parks so many."""
    store(jetstream, [publication(f"{body}{number}", number=number) for number in range(1, count + 1)])


# -- the stream -------------------------------------------------------------------------------------------------------
def test_the_stream_is_made_once_and_bounded(new_nats_server: NewServer, new_bus: NewBus) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    ensure_parked_stream(jetstream, StorageConfig(storage="memory"))
    ensure_parked_stream(jetstream, StorageConfig())
    config = jetstream.stream_info(contract.PARKED_STREAM).config
    assert config["subjects"] == [contract.PARKED_SUBJECT]
    assert (config["storage"], config["discard"], config["max_bytes"]) == ("memory", "old", MAX_BYTES)
    assert config["max_age"] == KEPT_DAYS * 86_400 * 10**9
    assert not config["deny_delete"]
    assert not config["deny_purge"]
    assert config["metadata"]["made_by"].startswith("Relay ")


def test_parked_twice_is_parked_once(own: JetStream) -> None:
    first, again, other = own.store([publication(), publication(), publication(number=2)])
    assert isinstance(first, Stored)
    assert isinstance(again, Stored)
    assert isinstance(other, Stored)
    assert (again.is_duplicate, again.sequence) == (True, first.sequence)
    assert not other.is_duplicate
    assert Parking(own).count() == 2


# -- what is published ------------------------------------------------------------------------------------------------
def test_a_notification_as_it_is_parked() -> None:
    made = parked_publication('{"a":"ü"', "no JSON", 3, "sqs-1", AT, MAX_PAYLOAD)
    assert made.nats_subject == contract.PARKED_SUBJECT
    assert made.headers == {"Nats-Msg-Id": "sqs-1"}
    assert json.loads(made.payload) == {
        "body": '{"a":"ü"',
        "reason": "no JSON",
        "received_count": 3,
        "sqs_message_id": "sqs-1",
        "parked_at": AT,
    }


@pytest.mark.parametrize("sqs_message_id", ["", "a\r\nStatus: 503", "x" * (MAX_ID_LENGTH + 1), "ü"])
def test_an_id_that_is_no_header_field(own: JetStream, sqs_message_id: str) -> None:
    made = parked_publication("{", "no JSON", 1, sqs_message_id, AT, MAX_PAYLOAD)
    assert made.headers is None
    store(own, [made])
    found = Parking(own).get(1)
    assert found is not None
    assert found.sqs_message_id == sqs_message_id[:MAX_ID_LENGTH]


@given(
    st.text(st.characters(), max_size=4000) | st.sampled_from(["\x00" * 3000, '"' * 3000, "🚀" * 3000]),
    st.integers(4096, 9000),
    st.text(st.characters(), max_size=600),
)
def test_whatever_the_body_is_it_fits(body: str, max_bytes: int, reason: str) -> None:
    made = parked_publication(body, reason, 10**9, "i" * MAX_ID_LENGTH, AT, max_bytes)
    told = json.loads(made.payload)
    header_bytes = sum(len(name) + len(value) + 4 for name, value in (made.headers or {}).items()) + 14
    assert len(made.payload) + header_bytes <= max_bytes
    sound = body.encode("utf-8", "replace").decode()
    assert sound.startswith(told["body"])
    assert told["reason"] == reason.encode("utf-8", "replace").decode()[:MAX_REASON_LENGTH]
    if told["body"] != sound:
        assert told["is_cut"]
        assert told["body_bytes"] == len(sound.encode())
        assert len(made.payload) + 256 + 6 > max_bytes, "no shorter than it has to be"
    else:
        assert "is_cut" not in told


def test_a_body_as_large_as_the_server_allows(own: JetStream) -> None:
    body = '"' * MAX_PAYLOAD
    store(own, [parked_publication(body, "no JSON", 1, "sqs-1", AT, own.max_payload_bytes)])
    found = Parking(own).get(1)
    assert found is not None
    assert found.is_cut
    assert found.body_bytes == MAX_PAYLOAD
    assert 500_000 < len(found.body) < MAX_PAYLOAD
    assert body.startswith(found.body)


# -- read back --------------------------------------------------------------------------------------------------------
def test_one_by_its_number(own: JetStream) -> None:
    park(own, 2, "body ")
    parking = Parking(own)
    assert parking.get(2) == Parked(2, AT, "no JSON", 3, "sqs-2", "body 2", 6, False)
    assert parking.get(3) is None
    assert parking.get(2**63 - 1) is None


@pytest.mark.parametrize("payload", [b"", b"null", b"[]", b"{", b"\xff\x00", b'{"body":7,"is_cut":1,"parked_at":[]}'])
def test_what_anyone_may_have_published(own: JetStream, payload: bytes) -> None:
    store(own, [Publication(contract.PARKED_SUBJECT, payload)])
    ((found,),) = Parking(own).pages()
    body = payload.decode("utf-8", "replace")
    assert found == Parked(1, "", "", 0, "", body, len(body.encode()), False)
    assert Parking(own).get(1) == found


def test_numbers_that_are_none(own: JetStream) -> None:
    store(own, [Publication(contract.PARKED_SUBJECT, b'{"body":"x","received_count":true,"body_bytes":-5}')])
    found = Parking(own).get(1)
    assert found is not None
    assert (found.received_count, found.body_bytes) == (0, 1)


def test_all_page_by_page_up_to_the_end_of_then(own: JetStream) -> None:
    park(own, 1200)
    parking = Parking(own)
    assert parking.drop(7)
    pages = parking.pages()
    first = next(pages)
    store(own, [publication("late", number=5000)])  # parked while it is being listed
    rest = [each for page in pages for each in page]
    assert [each.number for each in [*first, *rest]] == [*range(1, 7), *range(8, 1201)]
    assert len(first) <= 1000


def test_a_page_of_large_ones_is_bounded_in_bytes(own: JetStream) -> None:
    park(own, 12, "x" * 900_000)
    pages = list(Parking(own).pages())
    assert [each.number for page in pages for each in page] == list(range(1, 13))
    assert max(len(page) for page in pages) <= 6


# -- drop -------------------------------------------------------------------------------------------------------------
def test_drop(own: JetStream) -> None:
    park(own, 3)
    parking = Parking(own)
    assert parking.drop(2)
    assert not parking.drop(2), "it may be repeated"
    assert not parking.drop(99)
    assert parking.get(2) is None
    assert parking.count() == 2


def test_drop_all_leaves_what_came_later(own: JetStream) -> None:
    park(own, 5)
    parking = Parking(own)
    last_number = parking.last_number()
    store(own, [publication("late", number=5000)])
    assert parking.drop_all(last_number) == 5
    ((left,),) = parking.pages()
    assert left.body == "late"


def test_without_the_stream_nothing_is_parked(new_nats_server: NewServer, new_bus: NewBus) -> None:
    parking = Parking(JetStream(new_bus(new_nats_server().url)))
    assert (parking.count(), parking.last_number(), parking.get(1), parking.drop(1)) == (0, 0, None, False)
    assert list(parking.pages()) == []
    assert parking.drop_all(7) == 0


def test_listing_outlasts_a_restart(new_nats_server: NewServer, new_bus: NewBus) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.5)
    ensure_parked_stream(jetstream, StorageConfig())
    park(jetstream, 3)
    server.stop()
    listed = gevent.spawn(lambda: [each.number for page in Parking(jetstream).pages() for each in page])
    with pytest.raises(BusUnavailable):
        Parking(jetstream).count()
    server.start()
    assert listed.get(timeout=20) == [1, 2, 3]
