"""Notifications that are handled together: by mail, and what has become of each so far. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from relay.bus.client import Publication
from relay.bus.kv import Entry
from relay.tracking.events import Event
from relay.tracking.facts import COUNTED, Fact
from relay.tracking.groups import mail_token
from relay.tracking.log import fact_publication
from relay.tracking.record import parse_time


class Notification(NamedTuple):
    """What stood in the queue."""

    body: str
    sqs_message_id: str
    received_count: int
    """How often it was received, this time included."""
    sent_at: float
    """When it came into the queue, epoch seconds."""


class Verdict(NamedTuple):
    """What becomes of a notification."""

    is_done: bool
    """It may be deleted; else it stays in the queue."""
    retry_seconds: int = 0
    """When it is to be seen again; 0: when its visibility timeout ends."""
    why: str = ""


DONE = Verdict(True)


class MailEvents:
    """A mail that a batch has events of."""

    def __init__(self, email_id: str) -> None:
        self.email_id = email_id
        self.events: list[tuple[int, Event]] = []
        """With the place of the notification in the batch."""
        self.facts: dict[tuple[Fact, str], Publication] = {}
        """To be stated once the record is written."""
        self.entry: Entry | None = None
        """Its record as it was read."""
        self.before: dict[str, Any] | None = None
        """Its record before these events."""
        self.is_changed = False
        self.is_rebuilt = False
        self.is_refused = False
        """Its record could not be made although there is none."""

    @property
    def places(self) -> list[int]:
        """Of its notifications."""
        return [place for place, _ in self.events]

    @property
    def token(self) -> str:
        """Of its group."""
        return mail_token(self.email_id, self.before.get("group_id")) if self.before is not None else ""

    def read(self, entry: Entry | None) -> None:
        """Its record is this, as far as is known now."""
        self.entry = entry
        self.before = None

    def sent_at(self, now: float) -> float:
        """When it was handed over, as the record or Amazon says: epoch seconds; ``now`` where nobody does."""
        told = [event.mail.sent_at for _, event in self.events]
        if self.before is not None:
            told.append(self.before.get("sent_at", ""))
        times = [at.timestamp() for each in told if (at := parse_time(each)) is not None]
        return min(times, default=now)

    def age_seconds(self, now: float) -> float:
        """Since it was handed over."""
        return now - self.sent_at(now)

    def state(self, record: Mapping[str, Any], fact: Fact, event: Event) -> None:
        """Makes a fact ready, once."""
        event_id = logged_id(fact, event)
        sent_at = record.get("sent_at")
        at = str(sent_at) if fact is Fact.SENT and parse_time(sent_at) is not None else event.at
        self.facts[fact, event_id] = fact_publication(self.token, fact, self.email_id, at, event_id)


class Batch:
    """Notifications that are handled together, and what has become of each so far."""

    def __init__(self, notifications: Sequence[Notification]) -> None:
        self.notifications = notifications
        self.verdicts: list[Verdict | None] = [None] * len(notifications)
        self.mails: dict[str, MailEvents] = {}
        self.to_park: dict[int, str] = {}
        self.is_lacking: dict[tuple[str, Fact, str], bool] = {}
        """By mail, fact and the event id that it is logged with: whether the log lacks it."""
        self.counts: Counter[str] = Counter()

    def add(self, place: int, event: Event) -> None:
        """An event that is to be folded."""
        self.counts[event.kind.value] += 1
        self.mails.setdefault(event.email_id, MailEvents(event.email_id)).events.append((place, event))

    def settle(self, places: Iterable[int], verdict: Verdict, what: str) -> None:
        """What becomes of them, where that is not settled yet; ``what`` is counted."""
        for place in places:
            if self.verdicts[place] is None:
                self.verdicts[place] = verdict
                self.counts[what] += 1

    def park(self, places: Iterable[int], why: str) -> None:
        """They are to be kept for an operator."""
        self.to_park |= dict.fromkeys(places, why)

    def age_seconds(self, place: int, event: Event, now: float) -> float:
        """Of the mail, or of its notification in the queue, whichever is older."""
        sent_at = parse_time(event.mail.sent_at)
        sent = sent_at.timestamp() if sent_at is not None else now
        return now - min(sent, self.notifications[place].sent_at)

    def received_count(self, places: Iterable[int]) -> int:
        """Of the one that was received most often."""
        return max(self.notifications[place].received_count for place in places)


def logged_id(fact: Fact, event: Event) -> str:
    """The event id that a fact is logged with: facts that are stated once have none."""
    return event.event_id if fact in COUNTED else ""
