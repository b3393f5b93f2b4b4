"""One mail's facts held against its record: which of them are missing, and which are too many. Pure.

The record is right, as far as it speaks. Opens and clicks: so many as it counts. Those whose event ids it lists are
told apart; those that it only counts (its lists are bounded) get ids of our own, ``unlisted-<n>``, when the log lacks
them. A mail whose record says ``in_doubt`` may have a ``sent`` fact or not: nobody knows.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from relay.tracking.facts import COUNTED, Fact, facts_of
from relay.tracking.feed import LoggedFact
from relay.tracking.record import earliest

MOST_UNLISTED = 10_000
"""Opens or clicks of one mail that only its record's number speaks for: more is a broken number, and left as it is."""

LISTS = {Fact.OPEN: ("opened_at_list", "opened_at"), Fact.CLICK: ("clicks", "clicked_at")}
"""Of the facts that a mail may have any number of: the list in the record, and a time in it."""
FIRST_OF = {Fact.OPENED: Fact.OPEN, Fact.CLICKED: Fact.CLICK}
TIME_FIELDS = {
    Fact.SENT: "sent_at",
    Fact.DELIVERED: "delivered_at",
    Fact.OPENED: "last_opened_at",
    Fact.OPEN: "last_opened_at",
    Fact.CLICKED: "last_clicked_at",
    Fact.CLICK: "last_clicked_at",
    Fact.FAILED: "failed_at",
    Fact.BOUNCED: "bounced_at",
    Fact.COMPLAINED: "complained_at",
    Fact.DELAYED: "delayed_at",
    Fact.REJECTED: "rejected_at",
    Fact.UNSUBSCRIBED: "unsubscribed_at",
}
_EVENT_ID = re.compile(r"[\x21-\x7e]{1,256}")

COMPARED = frozenset({
    "group_id", "outcome", "delivered", "opened", "open_count", "click_count", "failed", *TIME_FIELDS.values(),
})  # fmt: skip
"""The fields of a record that are looked at here, beside the ``LISTS``."""


class Missing(NamedTuple):
    """A fact that the log lacks."""

    fact: Fact
    at: str
    event_id: str


class Difference(NamedTuple):
    """What is wrong with the facts of one mail."""

    missing: list[Missing]
    surplus: list[LoggedFact]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)


def compare(record: Mapping[str, Any], logged: list[LoggedFact]) -> Difference:
    """What the log lacks of a mail and what it has too much. ``logged``: its facts under its group's token."""
    counts = facts_of(record)
    difference = Difference([], [])
    by_fact: dict[str, list[LoggedFact]] = defaultdict(list)
    for each in sorted(logged):
        by_fact[each.fact].append(each)
    for fact in Fact:
        have = by_fact[fact.value]
        stated = int(counts.get(fact, 0))
        least, most = _sent(record) if fact is Fact.SENT else (stated, stated)
        if fact in COUNTED:
            # A record that says nothing of them, as after lfx's poller rewrote it, is no reason to delete any.
            count = stated if _speaks_of(record, fact) else max(stated, len(have))
            _compare_counted(record, fact, count, have, difference)
        else:
            if not stated and fact is not Fact.SENT and not _speaks_of(record, fact):
                most = 1
            difference.surplus.extend(have[most:])
            if len(have) < least:
                difference.missing.append(Missing(fact, _time_of(record, fact), ""))
    return difference


def _speaks_of(record: Mapping[str, Any], fact: Fact) -> bool:
    """Whether the record itself says that there was none, or how many. A field that is missing, or of another type,
    says nothing: the log may be the only one that knows."""
    match fact:
        case Fact.DELIVERED | Fact.FAILED | Fact.OPENED:
            return isinstance(record.get(fact.value), bool)
        case Fact.OPEN:
            number = record.get("open_count")
            return (isinstance(number, int) and not isinstance(number, bool)) or (
                number is None and isinstance(record.get("opened_at_list"), list)
            )
        case Fact.CLICK | Fact.CLICKED:
            number = record.get("click_count")
            return isinstance(number, int) and not isinstance(number, bool)
        case _:
            return False


def _sent(record: Mapping[str, Any]) -> tuple[int, int]:
    """How many ``sent`` facts there must and may be."""
    outcome = record.get("outcome")
    if outcome and not isinstance(outcome, str):
        return 0, 1
    if not outcome:
        return 1, 1
    return 0, int(outcome not in {"failed", "deferred"})


def _compare_counted(
    record: Mapping[str, Any], fact: Fact, count: int, have: list[LoggedFact], difference: Difference
) -> None:
    seen: set[str] = set()
    single: list[LoggedFact] = []
    for each in have:
        if each.event_id and each.event_id in seen:
            difference.surplus.append(each)
        else:
            seen.add(each.event_id)
            single.append(each)
    listed = dict(list(_listed(record, fact))[:count])
    if len(single) > count:
        unlisted = [each for each in single if each.event_id not in listed]
        difference.surplus.extend(unlisted[len(unlisted) - (len(single) - count) :])
    room = max(0, count - len(single))
    lacking = [Missing(fact, at, event_id) for event_id, at in listed.items() if event_id not in seen][:room]
    if 0 < room - len(lacking) <= MOST_UNLISTED:
        own_ids = islice(_own_ids(seen), room - len(lacking))
        lacking += [Missing(fact, _time_of(record, fact), own_id) for own_id in own_ids]
    difference.missing.extend(lacking)


def _listed(record: Mapping[str, Any], fact: Fact) -> Iterator[tuple[str, str]]:
    """The events of a kind that the record tells apart: id and time."""
    list_field, at_field = LISTS[fact]
    listed = record.get(list_field)
    for each in listed if isinstance(listed, list) else ():
        event_id = each.get("event_id") if isinstance(each, dict) else None
        if isinstance(event_id, str) and _EVENT_ID.fullmatch(event_id):
            yield event_id, earliest(each.get(at_field)) or _time_of(record, fact)


def _own_ids(taken: set[str]) -> Iterator[str]:
    """Ids for events that the record only counts, none of them taken."""
    for number in itertools.count(1):
        if (own_id := f"unlisted-{number}") not in taken:
            yield own_id


def _time_of(record: Mapping[str, Any], fact: Fact) -> str:
    """When it happened, as far as the record says; else when the mail was sent."""
    if (counted := FIRST_OF.get(fact)) is not None:
        list_field, at_field = LISTS[counted]
        listed = record.get(list_field)
        times = [each.get(at_field) for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        if first := earliest(*times):
            return first
    return earliest(record.get(TIME_FIELDS[fact])) or earliest(record.get("sent_at"))


def compared_part(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as far as it is compared: the same facts are missing and surplus. Holds no address, no user agent."""
    part = {name: value for name, value in record.items() if name in COMPARED}
    for list_field, at_field in LISTS.values():
        listed = record.get(list_field)
        if isinstance(listed, list):
            part[list_field] = [_event(each, at_field) for each in listed]
    return part


def _event(listed: object, at_field: str) -> dict[str, Any]:
    given = listed if isinstance(listed, dict) else {}
    return {name: given[name] for name in ("event_id", at_field) if name in given}
