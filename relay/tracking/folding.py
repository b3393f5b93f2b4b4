"""An event folded into the record of its mail, and the facts that it states. Pure.

====================== ================================================== ==============================================
event                  the record                                         facts
====================== ================================================== ==============================================
Send                   nothing beyond what every event does               nothing
Delivery               ``delivered``, ``delivered_at``                    ``delivered``
Open                   ``opened``, ``opened_at_list``, ``open_count``,    ``open`` each time, ``opened`` the first
                       ``last_opened_at``
Click                  ``clicked``, ``clicks``, ``click_count``,          ``click`` each time, ``clicked`` the first
                       ``last_clicked_at``
Bounce                 ``bounce``, ``bounced_at``; ``failed``,            ``bounced``, ``failed``
                       ``failed_at``
Complaint              ``complaint``, ``complained_at``; ``failed``,      ``complained``, ``failed``
                       ``failed_at``
DeliveryDelay          ``delayed``, ``delayed_at``                        ``delayed``
Reject, Rendering      ``rejected``, ``rejected_at``                      ``rejected``
Failure
Subscription           ``unsubscribed``, ``unsubscribed_at``, where it    ``unsubscribed``
                       took consent away
every one              ``remote_id`` where it was not known; a mail in    ``sent``, where it was in doubt
                       doubt is in doubt no longer
====================== ================================================== ==============================================

Of a time that has one place the earliest wins, and with it what is told of it; of ``last_…`` the latest. ``first``
names, for every fact that is stated once, the event that states it; ``folded_at`` says when each event was folded that
states anything (and under ``<event_id>--<fact>`` when one of its facts was stated again). With both, an event that
comes again states what it stated, and nothing else. So folding is idempotent, and but for ``first`` and ``folded_at``
the order of events does not matter.

A record stays under a size: the oldest links go first, then the ids that were folded longest ago, and with them their
places in ``opened_at_list`` and ``clicks``; the counts stay. An open or click that was dropped so would count again:
one of some 250 and more of one mail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from relay.tracking.erasure import ERASED_AT, without_personal_data
from relay.tracking.events import Event, Kind
from relay.tracking.facts import MOST_COUNTED, Fact, facts_of
from relay.tracking.record import earliest, latest, new_record, parse_time

MAX_RECORD_BYTES = 60 * 1024
"""A bucket made by lfx's chart takes 64 KiB, with the subject and the header fields of the message."""

MOST_BYTES_OF_AN_EVENT = 512
"""In a record, without its link: two ids and two times."""


class _Once(NamedTuple):
    """What happens to a mail once, however often it is told."""

    fact: Fact
    at_field: str
    detail_field: str


class _Counted(NamedTuple):
    """What happens to a mail any number of times."""

    fact: Fact
    first: Fact
    list_field: str
    at_field: str
    count_field: str
    last_field: str


_ONCE = {
    Kind.DELIVERY: _Once(Fact.DELIVERED, "delivered_at", ""),
    Kind.BOUNCE: _Once(Fact.BOUNCED, "bounced_at", "bounce"),
    Kind.COMPLAINT: _Once(Fact.COMPLAINED, "complained_at", "complaint"),
    Kind.DELIVERY_DELAY: _Once(Fact.DELAYED, "delayed_at", "delayed"),
    Kind.REJECT: _Once(Fact.REJECTED, "rejected_at", "rejected"),
    Kind.RENDERING_FAILURE: _Once(Fact.REJECTED, "rejected_at", "rejected"),
    Kind.SUBSCRIPTION: _Once(Fact.UNSUBSCRIBED, "unsubscribed_at", "unsubscribed"),
}
_COUNTED = {
    Kind.OPEN: _Counted(Fact.OPEN, Fact.OPENED, "opened_at_list", "opened_at", "open_count", "last_opened_at"),
    Kind.CLICK: _Counted(Fact.CLICK, Fact.CLICKED, "clicks", "clicked_at", "click_count", "last_clicked_at"),
}
_FAILURES = frozenset({Kind.BOUNCE, Kind.COMPLAINT})
"""Of lfx's ``failed``."""
_FLAGS = frozenset({Fact.DELIVERED, Fact.FAILED, Fact.OPENED, Fact.CLICKED})
"""Facts of whose name a record has a field that is true or false."""

_FACTS = {fact.value: fact for fact in Fact}
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


# -- one event --------------------------------------------------------------------------------------------------------
def fold(record: Mapping[str, Any], event: Event, folded_at: str) -> dict[str, Any]:
    """The record with the event in it; equal to ``record`` when that has it already.

    ``folded_at`` is now, RFC 3339.
    """
    folded = dict(record)
    stated = facts_of(record)
    once_facts: list[Fact] = []
    if folded.pop("outcome", None):
        # In doubt no longer, or the smarthost took what it said it would not: SES has the mail.
        once_facts.append(Fact.SENT)
    if not folded.get("remote_id") and event.mail.ses_message_id:
        folded["remote_id"] = event.mail.ses_message_id
    is_counted = False
    if (counted := _COUNTED.get(event.kind)) is not None:
        if is_counted := not is_folded(record, event):
            _fold_counted(folded, event, counted)
            once_facts.append(counted.first)
    elif (once := _ONCE.get(event.kind)) is not None and event.detail.get("is_unsubscribed", True):
        _fold_once(folded, event, once)
        once_facts.append(once.fact)
        if event.kind in _FAILURES:
            folded["failed_at"] = earliest(folded.get("failed_at"), event.at)
            once_facts.append(Fact.FAILED)
    folded |= {fact.value: True for fact in once_facts if fact in _FLAGS}
    # ``stated`` is what the record said before: an event that only repeats it is the first of nothing.
    firsts = {fact.value: event.event_id for fact in once_facts if not stated.get(fact)}
    if firsts:
        folded["first"] = {**firsts, **_object(record, "first")}
    if firsts or is_counted:
        folded["folded_at"] = {**_object(record, "folded_at"), event.event_id: folded_at}
    return folded


def _fold_once(folded: dict[str, Any], event: Event, once: _Once) -> None:
    before = folded.get(once.at_field)
    folded[once.at_field] = earliest(before, event.at)
    if not once.detail_field:
        return
    detail = {name: value for name, value in event.detail.items() if name != "is_unsubscribed"}
    known = _object(folded, once.detail_field)
    if parse_time(before) is None or _place(event.at, detail) < _place(str(before), known):
        folded[once.detail_field] = detail


def _place(at: str, detail: Mapping[str, Any]) -> tuple[datetime, bytes]:
    """Which of several is told: the earliest; of those of one moment always the same."""
    return parse_time(at) or _LONG_AGO, orjson.dumps(detail, option=orjson.OPT_SORT_KEYS)


def _fold_counted(folded: dict[str, Any], event: Event, counted: _Counted) -> None:
    found = folded.get(counted.list_field)
    listed = list(found) if isinstance(found, list) else []
    known = folded.get(counted.count_field)
    is_number = isinstance(known, int) and not isinstance(known, bool)
    before = max(known if is_number and known is not None else 0, len(listed))
    folded[counted.count_field] = min(1 + before, MOST_COUNTED)
    listed.append({"event_id": event.event_id, counted.at_field: event.at, **event.detail})
    listed.sort(key=lambda each: _order(each, counted.at_field))
    folded[counted.list_field] = listed
    folded[counted.last_field] = latest(folded.get(counted.last_field), event.at)


def _order(listed: object, at_field: str) -> tuple[datetime, str]:
    if not isinstance(listed, dict):
        return _LONG_AGO, ""
    return parse_time(listed.get(at_field)) or _LONG_AGO, str(listed.get("event_id"))


# -- what a record knows of an event ----------------------------------------------------------------------------------
def is_folded(record: Mapping[str, Any], event: Event) -> bool:
    """Whether the record has the event already, as far as it remembers; lfx's records do not say when."""
    if event.event_id in _object(record, "folded_at"):
        return True
    counted = _COUNTED.get(event.kind)
    listed = record.get(counted.list_field) if counted is not None else None
    if not isinstance(listed, list):
        return False
    return any(isinstance(each, dict) and each.get("event_id") == event.event_id for each in listed)


def stated_at(record: Mapping[str, Any], event_id: str, fact: Fact) -> float | None:
    """When the event's fact was stated last, or was about to be: epoch seconds; None when the record does not say."""
    known = _object(record, "folded_at")
    at = parse_time(known.get(_place_of(event_id, fact), known.get(event_id)))
    return at.timestamp() if at is not None else None


def facts(record: Mapping[str, Any], event: Event) -> Iterator[Fact]:
    """What the event states, by the record that has it: the same each time; of one that it lacks, nothing."""
    for name, event_id in _object(record, "first").items():
        if event_id == event.event_id and (fact := _FACTS.get(name)) is not None:
            yield fact
    if (counted := _COUNTED.get(event.kind)) is not None and is_folded(record, event):
        yield counted.fact


def stated_by(record: Mapping[str, Any], fact: Fact) -> str:
    """The id of the event that states a fact which is stated once, '' where none does."""
    return str(_object(record, "first").get(fact.value, ""))


def with_stated_at(record: Mapping[str, Any], event_id: str, fact: Fact, at: str) -> dict[str, Any]:
    """The record, saying that this one fact of an event is stated again at ``at``: the log lacked it.

    Its others were stated when it was folded, and only that one may be repeated on the strength of this moment.
    """
    return {**record, "folded_at": {**_object(record, "folded_at"), _place_of(event_id, fact): at}}


def _place_of(event_id: str, fact: Fact) -> str:
    return f"{event_id}--{fact.value}"


# -- a record made from an event --------------------------------------------------------------------------------------
def rebuilt_record(event: Event) -> dict[str, Any] | None:
    """The record of a mail whose own was lost, and with it its ``sent`` fact; None when the event knows too little.

    It says that it is in doubt, so that the event which is folded next states the fact.
    """
    mail = event.mail
    if not mail.group_id or not mail.to:
        return None
    made = new_record(
        email_id=event.email_id,
        group_id=mail.group_id,
        to=mail.to,
        subject_header=mail.subject_header,
        sent_at=mail.sent_at or event.at,
        outcome="in_doubt",
        remote_id=mail.ses_message_id,
    )
    return dict(orjson.loads(made))


# -- as a value -------------------------------------------------------------------------------------------------------
def stored_value(record: Mapping[str, Any], max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The record as it is stored: no larger than ``max_bytes``, and of an erased one no personal data."""
    if ERASED_AT in record:
        record = without_personal_data(record)
    value = orjson.dumps(record)
    if len(value) <= max_bytes:
        return value
    return _bounded(dict(record), value, max_bytes)


def _bounded(record: dict[str, Any], value: bytes, max_bytes: int) -> bytes:
    lists = {
        counted.list_field: list(found)
        for counted in _COUNTED.values()
        if isinstance(found := record.get(counted.list_field), list)
    }
    clicks = lists.get("clicks", [])
    excess_bytes = len(value) - max_bytes
    for place, click in enumerate(clicks):  # the oldest first
        if excess_bytes <= 0:
            break
        if isinstance(click, dict) and (link := click.get("link")):
            clicks[place] = {name: told for name, told in click.items() if name != "link"}
            excess_bytes -= len(orjson.dumps(link)) + len(',"link":')
    known = dict(_object(record, "folded_at"))
    if known:
        record["folded_at"] = known
    if len(orjson.dumps({**record, **{name: [] for name in lists}, "folded_at": {}})) > max_bytes:
        return value  # it is not events that make it large
    while len(value := orjson.dumps(record | lists)) > max_bytes:
        by_age = sorted(_ids(known, lists), key=lambda event_id: (str(known.get(event_id, "")), event_id))
        if not by_age:
            break
        # So many have to go at least.
        dropped = set(by_age[: max(1, (len(value) - max_bytes) // MOST_BYTES_OF_AN_EVENT)])
        for event_id in dropped:
            known.pop(event_id, None)
        lists = {name: [each for each in listed if _id(each) not in dropped] for name, listed in lists.items()}
    return value


def _ids(known: Mapping[str, Any], lists: Mapping[str, list[Any]]) -> set[str]:
    return {*known, *(_id(each) for listed in lists.values() for each in listed)}


def _id(listed: object) -> str:
    event_id = listed.get("event_id") if isinstance(listed, dict) else None
    return event_id if isinstance(event_id, str) else ""


def _object(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}
