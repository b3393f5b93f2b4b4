"""What may be stated of a mail: the kinds of facts, and how many of each a record speaks for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Fact(StrEnum):
    """What is logged of a mail. ``opened`` and ``clicked`` are first times, ``open`` and ``click`` every time."""

    SENT = "sent"
    DELIVERED = "delivered"
    OPENED = "opened"
    OPEN = "open"
    CLICKED = "clicked"
    CLICK = "click"
    FAILED = "failed"
    BOUNCED = "bounced"
    COMPLAINED = "complained"
    DELAYED = "delayed"
    REJECTED = "rejected"
    UNSUBSCRIBED = "unsubscribed"


MOST_COUNTED = 2**32
"""Of one mail, by a record that others may have written: a sum over a group shall still be a number in JSON."""

COUNTED = frozenset({Fact.OPEN, Fact.CLICK})
"""Facts that a mail may have any number of, told apart by ``event_id``; of the others one."""

EVENTS = tuple(fact for fact in Fact if fact is not Fact.SENT)


def facts_of(record: Mapping[str, Any]) -> dict[str, int]:
    """How many facts of each kind the log would hold of a mail, read from its record: where there is no log of them.

    As in lfx, a mail was opened when its record says so or counts an open. What is no number counts nothing.
    """
    opens = _count(record.get("open_count"), record.get("opened_at_list"))
    clicks = _count(record.get("click_count"))
    is_stated: dict[str, object] = {
        Fact.DELIVERED: record.get("delivered"),
        Fact.OPENED: record.get("opened") or opens,
        Fact.CLICKED: clicks,
        Fact.FAILED: record.get("failed"),
        Fact.BOUNCED: record.get("bounced_at"),
        Fact.COMPLAINED: record.get("complained_at"),
        Fact.DELAYED: record.get("delayed_at"),
        Fact.REJECTED: record.get("rejected_at"),
        Fact.UNSUBSCRIBED: record.get("unsubscribed_at"),
    }
    return {Fact.OPEN: opens, Fact.CLICK: clicks} | {fact: 1 for fact, value in is_stated.items() if value}


def _count(number: object, otherwise: object = None) -> int:
    if isinstance(number, int):
        return min(max(0, number), MOST_COUNTED)
    return len(otherwise) if number is None and isinstance(otherwise, list) else 0
