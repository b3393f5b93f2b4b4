"""Folding events into records: what each means, that it counts once, and that the order does not matter."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.tracking.erasure import erased
from relay.tracking.events import Event, Kind, SentMail
from relay.tracking.facts import COUNTED, Fact, facts_of
from relay.tracking.folding import (
    MAX_RECORD_BYTES,
    facts,
    fold,
    is_folded,
    rebuilt_record,
    stated_at,
    stored_value,
    with_stated_at,
)
from relay.tracking.record import new_record, rfc3339, settled_record

EMAIL_ID = "550e8400-e29b-41d4-a716-446655440000"
NOW = "2025-01-15T12:00:00.000Z"
SENT = SentMail("0100018-ses", "spring", "user@example.com", "Hello", "2025-01-15T10:30:00.000Z")


def record_of(**changed: Any) -> dict[str, Any]:
    made = new_record(
        email_id=EMAIL_ID,
        group_id="spring",
        to="user@example.com",
        subject_header="Hello",
        sent_at="2025-01-15T10:30:00.000Z",
        remote_id="0100018-ses",
    )
    return {**orjson.loads(made), **changed}


def event_of(kind: Kind, event_id: str = "e1", at: str = "2025-01-15T10:31:00.000Z", **detail: Any) -> Event:
    return Event(kind, event_id, EMAIL_ID, at, detail, SENT)


ONE_OF_EACH = [
    (Kind.SEND, {}, {}, []),
    (
        Kind.DELIVERY,
        {},
        {"delivered": True, "delivered_at": "2025-01-15T10:31:00.000Z"},
        ["delivered"],
    ),
    (
        Kind.OPEN,
        {},
        {
            "opened": True,
            "opened_at_list": [{"event_id": "e1", "opened_at": "2025-01-15T10:31:00.000Z"}],
            "open_count": 1,
            "last_opened_at": "2025-01-15T10:31:00.000Z",
        },
        ["opened", "open"],
    ),
    (
        Kind.CLICK,
        {"link": "https://example.com/a"},
        {
            "clicked": True,
            "clicks": [{"event_id": "e1", "clicked_at": "2025-01-15T10:31:00.000Z", "link": "https://example.com/a"}],
            "click_count": 1,
            "last_clicked_at": "2025-01-15T10:31:00.000Z",
        },
        ["clicked", "click"],
    ),
    (
        Kind.BOUNCE,
        {"type": "Permanent", "subtype": "General", "diagnostic": "smtp; 550 5.1.1"},
        {
            "bounce": {"type": "Permanent", "subtype": "General", "diagnostic": "smtp; 550 5.1.1"},
            "bounced_at": "2025-01-15T10:31:00.000Z",
            "failed": True,
            "failed_at": "2025-01-15T10:31:00.000Z",
        },
        ["bounced", "failed"],
    ),
    (
        Kind.COMPLAINT,
        {"type": "abuse"},
        {
            "complaint": {"type": "abuse"},
            "complained_at": "2025-01-15T10:31:00.000Z",
            "failed": True,
            "failed_at": "2025-01-15T10:31:00.000Z",
        },
        ["complained", "failed"],
    ),
    (
        Kind.DELIVERY_DELAY,
        {"type": "MailboxFull"},
        {"delayed": {"type": "MailboxFull"}, "delayed_at": "2025-01-15T10:31:00.000Z"},
        ["delayed"],
    ),
    (
        Kind.REJECT,
        {"reason": "Bad content"},
        {"rejected": {"reason": "Bad content"}, "rejected_at": "2025-01-15T10:31:00.000Z"},
        ["rejected"],
    ),
    (
        Kind.RENDERING_FAILURE,
        {"reason": "Attribute missing"},
        {"rejected": {"reason": "Attribute missing"}, "rejected_at": "2025-01-15T10:31:00.000Z"},
        ["rejected"],
    ),
    (
        Kind.SUBSCRIPTION,
        {"is_unsubscribed": True, "source": "UnsubscribeHeader"},
        {"unsubscribed": {"source": "UnsubscribeHeader"}, "unsubscribed_at": "2025-01-15T10:31:00.000Z"},
        ["unsubscribed"],
    ),
]


@pytest.mark.parametrize(("kind", "detail", "fields", "stated"), ONE_OF_EACH, ids=[row[0].value for row in ONE_OF_EACH])
def test_what_each_kind_of_event_writes_and_states(
    kind: Kind, detail: dict[str, Any], fields: dict[str, Any], stated: list[str]
) -> None:
    event = event_of(kind, **detail)
    folded = fold(record_of(), event, NOW)
    ours = {name: value for name, value in folded.items() if name not in {"first", "folded_at"}}
    assert ours == record_of(**fields)
    assert [fact.value for fact in facts(folded, event)] == stated
    assert folded.get("folded_at", {}) == ({"e1": NOW} if stated else {})
    counts = {fact: count for fact, count in facts_of(folded).items() if count}
    assert counts == dict.fromkeys(stated, 1)
    assert fold(folded, event, "2025-01-15T13:00:00.000Z") == folded


def test_consent_that_was_given_is_no_unsubscription() -> None:
    event = event_of(Kind.SUBSCRIPTION, is_unsubscribed=False)
    assert fold(record_of(), event, NOW) == record_of()


def test_only_the_first_event_of_a_kind_states_the_first_time() -> None:
    record = fold(record_of(), event_of(Kind.OPEN, "e2", "2025-01-15T11:00:00.000Z"), NOW)
    earlier = event_of(Kind.OPEN, "e1", "2025-01-15T10:45:00.000Z")
    record = fold(record, earlier, NOW)
    assert [fact.value for fact in facts(record, earlier)] == ["open"]
    assert [each["event_id"] for each in record["opened_at_list"]] == ["e1", "e2"]
    assert (record["open_count"], record["last_opened_at"]) == (2, "2025-01-15T11:00:00.000Z")
    assert record["first"] == {"opened": "e2"}


def test_the_earliest_of_several_bounces_is_told() -> None:
    late = event_of(Kind.BOUNCE, "e1", "2025-01-15T11:00:00.000Z", type="Permanent")
    early = event_of(Kind.BOUNCE, "e2", "2025-01-15T10:40:00.000Z", type="Transient")
    record = fold(fold(record_of(), late, NOW), early, NOW)
    assert (record["bounce"], record["bounced_at"]) == ({"type": "Transient"}, early.at)
    assert record["first"] == {"bounced": "e1", "failed": "e1"}
    assert list(facts(record, early)) == []


@pytest.mark.parametrize("outcome", ["in_doubt", "failed", "deferred"])
def test_any_event_proves_that_the_mail_was_sent(outcome: str) -> None:
    doubted = record_of(outcome=outcome)
    del doubted["remote_id"]
    event = event_of(Kind.SEND)
    record = fold(doubted, event, NOW)
    assert "outcome" not in record
    assert record["remote_id"] == "0100018-ses"
    assert list(facts(record, event)) == [Fact.SENT]
    assert orjson.loads(settled_record(record, outcome="deferred", remote_id="")) == record


def test_a_record_that_lfx_has_written_is_counted_on() -> None:
    opens = [{"event_id": "sns-1", "opened_at": "2025-01-15T11:05:33.123456789Z"}]
    by_lfx = record_of(
        opened=True,
        opened_at_list=opens,
        open_count=1,
        last_opened_at="2025-01-15T11:05:33.123456789Z",
        delivered=True,
        delivered_at="2025-01-15T10:30:02Z",
    )
    again = event_of(Kind.OPEN, "sns-1")
    assert fold(by_lfx, again, NOW) == by_lfx
    assert stated_at(by_lfx, "sns-1", Fact.OPEN) is None
    record = fold(by_lfx, event_of(Kind.OPEN, "sns-2", "2025-01-15T11:00:00.000Z"), NOW)
    assert record["open_count"] == 2
    assert record["last_opened_at"] == by_lfx["last_opened_at"]
    delivered = event_of(Kind.DELIVERY, "sns-3", "2025-01-15T10:30:01.000Z")
    record = fold(record, delivered, NOW)
    assert record["delivered_at"] == delivered.at
    assert list(facts(record, delivered)) == []


@pytest.mark.parametrize(
    "odd",
    [
        {"opened_at_list": "none"},
        {"opened_at_list": [1, None, "x", {"event_id": 7}]},
        {"open_count": "3"},
        {"open_count": True},
        {"open_count": -4},
        {"first": [], "folded_at": 1},
        {"first": {"nothing": "e1"}, "folded_at": {"e1": "yesterday"}},
        {"delivered_at": "soon", "bounced_at": 5, "bounce": "hard"},
        {"outcome": 3},
    ],
)
@pytest.mark.parametrize("kind", list(Kind))
def test_no_record_is_too_odd(kind: Kind, odd: dict[str, Any]) -> None:
    event = event_of(kind, "e9", is_unsubscribed=True)
    record = fold(record_of(**odd), event, NOW)
    assert fold(record, event, NOW) == record
    assert set(facts(record, event)) <= set(Fact)
    assert orjson.loads(stored_value(record))["email_id"] == EMAIL_ID


# -- order ------------------------------------------------------------------------------------------------------------
def seconds(number: int) -> str:
    return rfc3339(1_736_937_000 + number)


EVENTS = st.builds(
    lambda kind, number, at, word: Event(
        kind,
        f"{kind.value.replace(' ', '')}-{number}",
        EMAIL_ID,
        # A notification has one content: its time and words follow from its id.
        seconds((at * 7 + number * 3) % 50),
        {"type": word} if kind in {Kind.BOUNCE, Kind.COMPLAINT, Kind.DELIVERY_DELAY} else {},
        SENT,
    ),
    st.sampled_from(list(Kind)),
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from(["Permanent", "Transient", "abuse"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=12, unique_by=lambda event: event.event_id), st.randoms(), st.booleans())
def test_neither_order_nor_repetition_matters(events: list[Event], chance: random.Random, is_in_doubt: bool) -> None:
    start = record_of(outcome="in_doubt") if is_in_doubt else record_of()

    def folded(order: list[Event]) -> tuple[dict[str, Any], Counter[tuple[Fact, str]]]:
        record = start
        stated: Counter[tuple[Fact, str]] = Counter()
        for number, event in enumerate(order):
            before = set(facts(record, event))
            record = fold(record, event, seconds(1000 + number))
            for fact in set(facts(record, event)) - before:
                stated[fact, event.event_id if fact in COUNTED else ""] += 1
        return record, stated

    once, stated = folded(events)
    shuffled = events + chance.choices(events, k=len(events)) if events else []
    chance.shuffle(shuffled)
    again, stated_again = folded(shuffled)
    indifferent = [
        {name: value for name, value in record.items() if name not in {"first", "folded_at"}}
        for record in (once, again)
    ]
    assert indifferent[0] == indifferent[1]
    assert set(once.get("first", {})) == set(again.get("first", {}))
    assert stated == stated_again
    assert set(stated.values()) <= {1}
    counts = Counter({fact: count for fact, count in facts_of(once).items() if count})
    if is_in_doubt and events:
        counts[Fact.SENT] = 1
    assert Counter(fact for fact, _ in stated) == counts


# -- size -------------------------------------------------------------------------------------------------------------
def test_a_record_never_outgrows_its_limit_and_keeps_the_newest() -> None:
    record = record_of(subject="\x01" * 600)
    for number in range(400):
        record = fold(record, event_of(Kind.OPEN, f"open-{number:04}", seconds(number)), seconds(number))
        link = "https://example.com/" + "é\x01" * 600
        record = fold(record, event_of(Kind.CLICK, f"click-{number:04}", seconds(number), link=link), seconds(number))
        value = stored_value(record)
        assert len(value) <= MAX_RECORD_BYTES
        record = orjson.loads(value)
    assert (record["open_count"], record["click_count"]) == (400, 400)
    assert record["opened_at_list"][-1]["event_id"] == "open-0399"
    assert record["clicks"][-1]["event_id"] == "click-0399"
    assert len(value) > MAX_RECORD_BYTES / 2
    newest = event_of(Kind.CLICK, "click-0399")
    assert is_folded(record, newest)
    assert stated_at(record, "click-0399", Fact.CLICK) == 1_736_937_399
    assert record["first"] == {"opened": "open-0000", "clicked": "click-0000"}
    assert set(record["folded_at"]) == {
        each["event_id"] for name in ("opened_at_list", "clicks") for each in record[name]
    }


def test_links_go_before_what_tells_events_apart() -> None:
    record = record_of()
    clicks = [
        event_of(Kind.CLICK, f"click-{number:04}", seconds(number), link="https://example.com/" + "x" * 2020)
        for number in range(60)
    ]
    for event in clicks * 2:
        record = orjson.loads(stored_value(fold(record, event, NOW)))
    assert record["click_count"] == len(record["clicks"]) == 60
    assert "link" in record["clicks"][-1]
    assert "link" not in record["clicks"][0]


def test_a_record_is_small_where_the_bucket_is() -> None:
    record = record_of()
    for number in range(50):
        record = fold(record, event_of(Kind.OPEN, f"open-{number:04}", seconds(number)), seconds(number))
    value = stored_value(record, 2048)
    assert len(value) <= 2048
    assert orjson.loads(value)["open_count"] == 50


def test_what_cannot_be_made_smaller_stays_as_it_is() -> None:
    record = record_of(other="x" * 5000)
    assert orjson.loads(stored_value(record, 2048)) == record


def test_an_erased_record_stays_erased() -> None:
    value = erased(orjson.dumps(record_of()), NOW)
    assert value is not None
    event = event_of(Kind.CLICK, link="https://example.com/user@example.com")
    record = fold(orjson.loads(value), event, NOW)
    stored = orjson.loads(stored_value(record))
    assert b"user@example.com" not in stored_value(record)
    assert (stored["to"], stored["click_count"], stored["erased_at"]) == ("", 1, NOW)
    assert list(facts(stored, event)) == [Fact.CLICKED, Fact.CLICK]
    assert stated_at(stored, "e1", Fact.CLICK) is not None
    assert fold(stored, event, NOW) == stored


# -- again ------------------------------------------------------------------------------------------------------------
def test_a_fact_that_is_stated_once_more_is_told_in_the_record() -> None:
    event = event_of(Kind.OPEN)
    record = fold(record_of(), event, NOW)
    later = with_stated_at(record, "e1", Fact.OPEN, "2025-01-15T13:00:00.000Z")
    assert stated_at(later, "e1", Fact.OPEN) == 1_736_946_000
    assert stated_at(later, "e1", Fact.OPENED) == stated_at(record, "e1", Fact.OPENED) == 1_736_942_400
    assert list(facts(later, event)) == list(facts(record, event))


def test_a_lost_record_is_made_from_an_event() -> None:
    event = event_of(Kind.DELIVERY)
    made = rebuilt_record(event)
    assert made is not None
    record = fold(made, event, NOW)
    ours = {name: value for name, value in record.items() if name not in {"first", "folded_at"}}
    assert ours == record_of(delivered=True, delivered_at=event.at)
    assert set(facts(record, event)) == {Fact.SENT, Fact.DELIVERED}


def test_an_event_without_our_header_cannot_make_a_record() -> None:
    assert rebuilt_record(event_of(Kind.DELIVERY)._replace(mail=SENT._replace(group_id=""))) is None
