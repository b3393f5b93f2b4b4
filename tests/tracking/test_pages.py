"""Groups read piece by piece, cursors, and who goes first."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable

import gevent
import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.errors import BusUnavailable
from relay.tracking import pages
from relay.tracking.facts import Fact
from relay.tracking.log import fact_publication
from relay.tracking.pages import (
    GIVE_WAY_SECONDS,
    LARGE_WAITING,
    PIECE_MAILS,
    GroupReader,
    Place,
    Traffic,
)
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import SENT_AT, put_array, put_records, record_of, send_mails, store
from tests.support.lfx import written_record
from tests.support.nats_server import NatsServer
from tests.support.scripted_jetstream import LaggingStream, Message


@pytest.fixture
def reader(jetstream: JetStream) -> GroupReader:
    """A reader on the shared server."""
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return GroupReader(jetstream)


def listed(reader: GroupReader, group_id: str, place: Place | None = None, mails: int | None = None) -> list[str]:
    """The email_ids that the pieces give."""
    group = reader.group(group_id, reader.look(group_id).array)
    pieces = group.pieces(time.monotonic() + 20, place or Place(), mails)
    return [mail.email_id for piece in pieces for mail in piece.mails]


@pytest.mark.parametrize("count", [1, PIECE_MAILS - 1, PIECE_MAILS, PIECE_MAILS + 1, 3 * PIECE_MAILS])
def test_pieces_give_every_mail_once_in_order(jetstream: JetStream, reader: GroupReader, count: int) -> None:
    group_id = f"pieces-{count}"
    sent = send_mails(jetstream, group_id, count)
    assert listed(reader, group_id) == sent
    assert listed(reader, group_id, mails=1) == sent[:1]
    assert listed(reader, group_id, mails=PIECE_MAILS + 1) == sent[: PIECE_MAILS + 1]


@pytest.mark.usefixtures("index_bucket")
def test_a_group_with_both_gives_each_mail_once(jetstream: JetStream, reader: GroupReader) -> None:
    # Given lfx's array with ids that are ours too, ids of its own, broken ones and repeated ones
    ours = send_mails(jetstream, "both", 150)
    theirs = [str(uuid.uuid4()) for _ in range(120)]
    put_records(jetstream, {email_id: written_record(email_id, "both") for email_id in theirs})
    array = [*theirs[:60], *ours[:30], ">", "x" * 5000, theirs[0], *theirs[60:], "no-record"]
    put_array(jetstream, "both", json.dumps(array).encode())
    # When it is listed, from the beginning or from any place that was given
    expected = [*theirs[:60], *ours[:30], *theirs[60:], *ours[30:]]
    assert listed(reader, "both") == expected
    group = reader.group("both", reader.look("both").array)
    places = [mail.place for piece in group.pieces(time.monotonic() + 20) for mail in piece.mails]
    for number in (0, 1, 59, 60, 89, 149, 150, 151, 269):
        assert listed(reader, "both", places[number]) == expected[number:]


@pytest.mark.usefixtures("index_bucket")
def test_an_array_that_grows_meanwhile_is_read_to_its_new_end(jetstream: JetStream, reader: GroupReader) -> None:
    theirs = [str(uuid.uuid4()) for _ in range(4)]
    put_records(jetstream, {email_id: written_record(email_id, "grows") for email_id in theirs})
    ours = send_mails(jetstream, "grows", 3)
    put_array(jetstream, "grows", json.dumps(theirs[:3]).encode())
    begun = reader.group("grows", theirs[:3]).read(Place(), set())
    assert begun.next_place is not None
    put_array(jetstream, "grows", json.dumps(theirs).encode())
    assert [mail.email_id for mail in begun.mails] + listed(reader, "grows", begun.next_place) == [*theirs, *ours]


def test_a_mail_logged_twice_is_listed_once(jetstream: JetStream, reader: GroupReader) -> None:
    (email_id,) = send_mails(jetstream, "twice-logged", 1)
    again = fact_publication("twice-logged", Fact.SENT, email_id, SENT_AT)
    store(jetstream, [again._replace(headers=None)])
    assert reader.look("twice-logged").counts == {"sent": 2}
    assert listed(reader, "twice-logged") == [email_id]


def test_records_gone_or_broken_are_left_out(jetstream: JetStream, reader: GroupReader) -> None:
    email_ids = send_mails(jetstream, "broken-records", 4)
    put_records(jetstream, {email_ids[1]: b"{", email_ids[2]: b"[]"})
    store(jetstream, [fact_publication("broken-records", Fact.SENT, f"gone-{uuid.uuid4()}", SENT_AT)])
    assert listed(reader, "broken-records") == [email_ids[0], email_ids[3]]


def test_a_deadline_ends_the_reading(jetstream: JetStream, reader: GroupReader) -> None:
    send_mails(jetstream, "deadline", 1)
    with pytest.raises(BusUnavailable):
        list(reader.group("deadline", None).pieces(time.monotonic() - 1))


def test_a_record_that_the_answering_replica_lacks_comes_from_the_leader(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    bus = new_bus(new_nats_server(jetstream=False).url)
    email_ids = [f"id-{number}" for number in range(5)]
    facts = [fact_publication("g", Fact.SENT, email_id, SENT_AT) for email_id in email_ids]
    LaggingStream(bus, contract.LOG_STREAM, [Message(fact.nats_subject, fact.payload) for fact in facts], 2)
    bucket = contract.RECIPIENTS_BUCKET
    records = [Message(f"$KV.{bucket}.{email_id}", record_of(email_id, "g")) for email_id in email_ids]
    LaggingStream(bus, f"KV_{bucket}", records, 3)
    reader = GroupReader(JetStream(bus))
    pieces = reader.group("g", None).pieces(time.monotonic() + 10)
    assert [mail.email_id for piece in pieces for mail in piece.mails] == email_ids
    entry = reader.record("id-4")
    assert entry is not None, "and so does one that is asked for by itself"


@pytest.mark.parametrize("piece_bytes", [1, 1000, 5000])
def test_records_of_any_size_are_asked_for_some_bytes_at_a_time(
    jetstream: JetStream, reader: GroupReader, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    group_id = f"bytes-{piece_bytes}"
    email_ids = send_mails(jetstream, group_id, 30, subject_header="x" * 800)
    Bucket(jetstream, contract.RECIPIENTS_BUCKET).delete(email_ids[3])
    store(jetstream, [fact_publication(group_id, Fact.SENT, f"gone-{uuid.uuid4()}", SENT_AT)])
    monkeypatch.setattr(pages, "PIECE_BYTES", piece_bytes)
    assert listed(reader, group_id) == [each for each in email_ids if each != email_ids[3]]


@pytest.mark.parametrize("at_once", ["ARRAYS_AT_ONCE", "PIECES_AT_ONCE", "RECORDS_AT_ONCE"])
def test_with_one_request_at_a_time_everybody_is_answered(
    jetstream: JetStream, monkeypatch: pytest.MonkeyPatch, at_once: str
) -> None:
    assert ensure_storage(jetstream, StorageConfig()) == ""
    monkeypatch.setattr(pages, at_once, 1)
    reader = GroupReader(jetstream)
    email_ids = send_mails(jetstream, at_once, 5)
    asked = [gevent.spawn(listed, reader, at_once) for _ in range(20)]
    alone = [gevent.spawn(reader.record, email_id) for email_id in email_ids * 4]
    gevent.joinall([*asked, *alone], timeout=10, raise_error=True)
    assert all(each.value == email_ids for each in asked)
    assert all(each.value is not None for each in alone)


def test_a_question_never_waits_beyond_its_deadline(reader: GroupReader) -> None:
    with contextlib.ExitStack() as others:
        for _ in range(pages.ARRAYS_AT_ONCE):
            others.enter_context(reader.traffic.arrays)
        for _ in range(pages.PIECES_AT_ONCE):
            others.enter_context(reader.traffic.pieces)
        begun = time.monotonic()
        with pytest.raises(BusUnavailable):
            reader.look("waits", begun + 0.05)
        with pytest.raises(BusUnavailable):
            reader.mails([("x", Place())], begun + 0.1)
        assert time.monotonic() - begun < 1


def test_a_look_that_fails_unexpectedly_says_so(reader: GroupReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.log, "figures", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        reader.look("unexpected")


# -- who goes first ----------------------------------------------------------------------------------------------------
def test_large_questions_take_turns_and_too_many_are_turned_away() -> None:
    traffic = Traffic()
    at_work = most = 0

    def ask() -> None:
        nonlocal at_work, most
        with traffic.turn(time.monotonic() + 5):
            at_work += 1
            most = max(most, at_work)
            gevent.sleep(0)
            at_work -= 1

    asked = [gevent.spawn(ask) for _ in range(LARGE_WAITING)]
    gevent.joinall(asked, timeout=5, raise_error=True)
    assert (most, at_work, traffic.waiting) == (1, 0, 0)
    with traffic.turn(time.monotonic() + 5):
        waiting = [gevent.spawn(ask) for _ in range(LARGE_WAITING)]
        gevent.sleep(0)
        assert traffic.waiting == LARGE_WAITING
        with pytest.raises(BusUnavailable, match="too many"), traffic.turn(time.monotonic() + 5):
            pass
    gevent.joinall(waiting, timeout=5, raise_error=True)
    assert traffic.waiting == 0


def test_a_turn_that_does_not_come_in_time_is_given_up() -> None:
    traffic = Traffic()
    with (
        traffic.turn(time.monotonic() + 5),
        pytest.raises(BusUnavailable),
        traffic.turn(time.monotonic() + 0.01),
    ):
        pass
    with traffic.turn(time.monotonic() + 5):
        assert traffic.waiting == 0


def test_a_piece_gives_way_to_small_questions_but_not_for_ever() -> None:
    traffic = Traffic()
    begun = time.monotonic()
    traffic.give_way()
    assert time.monotonic() - begun < GIVE_WAY_SECONDS / 2, "nobody to give way to"
    with traffic.hurried():
        with traffic.hurried():
            pass
        begun = time.monotonic()
        traffic.give_way()
        assert time.monotonic() - begun >= GIVE_WAY_SECONDS * 0.9
        waiting = gevent.spawn(traffic.give_way)
        gevent.sleep(0)
        assert not waiting.dead
    waiting.join(GIVE_WAY_SECONDS / 2)
    assert waiting.dead, "at once when the small question is answered"
