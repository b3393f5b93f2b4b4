"""The job: one batch of notifications → events folded into records → facts → what may be deleted from the queue.

``Engagement.handle`` is the whole way of a notification. It owns the order of the steps, which is what makes every
event count once although each step may be the last (design: "Counting exactly"):

1. read the records; fold (idempotent); an event that was folded longer ago than the log remembers what it was told is
   looked up there, and only what the log lacks is stated again;
2. compare-and-set the records, all of a batch in one write; a conflict means to read that one again;
3. state the facts, all of a batch in one write: the log drops those that it was told a moment ago;
4. only then is a notification done, and may be deleted.

A crash before 2 leaves nothing; after 2 the notification comes again and states the same facts, since the record says
which and since when; after 3 it comes again and changes nothing. A process that stood still for so long between 2 and
3 that the log may have forgotten states nothing and has the notification come again.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import gevent

from relay import contract
from relay.bus.client import Publication, seconds_left
from relay.bus.jetstream import TOO_LARGE_FOR_STREAM, JetStream
from relay.bus.kv import Bucket, Entry
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.tracking import folding
from relay.tracking.events import Broken, Dropped, Event, read_notification
from relay.tracking.facts import COUNTED, Fact
from relay.tracking.groups import mail_token
from relay.tracking.log import Log, fact_publication
from relay.tracking.parked import ensure_parked_stream, parked_publication
from relay.tracking.record import parse_record, parse_time, rfc3339
from relay.tracking.storage import DUPLICATE_WINDOW_SECONDS, NANOSECONDS, StorageConfig

log = logging.getLogger("relay.engagement")

TRIES = 8
"""At one record that others write to at the same time."""
FIRST_PAUSE_SECONDS = 0.01
CONFLICT_RETRY_SECONDS = 5
REFUSED_RETRY_SECONDS = 60
LONGEST_EARLY_PAUSE_SECONDS = 32
CLOCK_SKEW_SECONDS = 60.0
"""Between this machine's clock and the NATS server's, when a fact is looked up by its time."""
LEAST_FRESH_SECONDS = 0.5
"""Whatever the log remembers: a batch takes some time."""
ONE_RECORDS_OWN = frozenset({413, TOO_LARGE_FOR_STREAM})
"""Refusals that say nothing about the next record: this one is too large for the server or the bucket."""
ROOM_BYTES = 1024
"""In a message of the bucket, for its subject and header fields."""


class EngagementConfig(NamedTuple):
    """How events are handled; settings ENGAGEMENT_* and TRACKING_*."""

    early_seconds: float = 60.0
    """How old a mail must be before an event without a record is no longer just early."""
    storage: StorageConfig = StorageConfig()


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


class Engagement:
    """Handles notifications. Any number of greenlets, processes and machines may do so at the same time."""

    def __init__(self, jetstream: JetStream, config: EngagementConfig, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives epoch seconds."""
        self._jetstream = jetstream
        self._config = config
        self._clock = clock
        self._bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._log = Log(jetstream)
        self._fresh_seconds = DUPLICATE_WINDOW_SECONDS / 2
        """For so long after it was folded the facts of an event may be stated again: the log drops repeats."""
        self._max_record_bytes = folding.MAX_RECORD_BYTES
        self._max_payload_bytes = 1024 * 1024
        self.counts: Counter[str] = Counter()
        """Events by kind, and what became of notifications."""

    def prepare(self) -> None:
        """Reads what bucket and log allow, and makes the stream of parked notifications when it is missing.

        Before the first ``handle``. Raises ``BusUnavailable`` and ``BusRefused``.
        """
        logged = self._jetstream.stream_info(contract.LOG_STREAM)
        window_seconds = int(logged.config.get("duplicate_window") or 0) / NANOSECONDS
        self._fresh_seconds = max(LEAST_FRESH_SECONDS, window_seconds / 2)
        bucket = self._jetstream.stream_info(self._bucket.stream)
        self._max_payload_bytes = self._jetstream.max_payload_bytes
        limits = [folding.MAX_RECORD_BYTES, self._max_payload_bytes - ROOM_BYTES]
        if (most := int(bucket.config.get("max_msg_size") or -1)) > 0:
            limits.append(most - ROOM_BYTES)
        self._max_record_bytes = max(ROOM_BYTES, min(limits))
        ensure_parked_stream(self._jetstream, self._config.storage)

    def handle(self, notifications: Sequence[Notification], timeout_seconds: float) -> list[Verdict]:
        """What becomes of each, in the same order. Done means: acknowledged by JetStream, or nothing to keep.

        Blocks for ``timeout_seconds`` at most. Raises ``BusUnavailable`` when JetStream did not answer: then nothing
        is done, and the same batch may be handled again.
        """
        begun_at = time.monotonic()
        deadline = begun_at + timeout_seconds
        now = self._clock()
        batch = _Batch(notifications)
        for place, notification in enumerate(notifications):
            match read_notification(notification.body, now):
                case Event() as event:
                    batch.add(place, event)
                case Dropped(why, what):
                    batch.settle([place], DONE, f"dropped: {why}")
                    log.debug("a notification is dropped: %s %s", why, what)
                case Broken(why):
                    batch.to_park[place] = why
        self._fold(batch, now, deadline)
        self._state(batch, begun_at, deadline)
        self.counts.update(batch.counts)
        return [verdict if verdict is not None else DONE for verdict in batch.verdicts]

    def park(self, notification: Notification, why: str) -> Verdict:
        """Keeps a notification that cannot be handled where an operator finds it. Raises ``BusUnavailable``."""
        batch = _Batch([notification])
        batch.to_park[0] = why
        self._state(batch, time.monotonic(), self._jetstream.deadline(None))
        self.counts.update(batch.counts)
        return batch.verdicts[0] or DONE

    # -- records ---------------------------------------------------------------------------
    def _fold(self, batch: _Batch, now: float, deadline: float) -> None:
        """Every mail's events into its record; what cannot be done now is settled, the rest is ready to be stated."""
        mails = list(batch.mails.values())
        found = self._bucket.get_many([mail.email_id for mail in mails], seconds_left(deadline)) if mails else {}
        pause_seconds = FIRST_PAUSE_SECONDS
        for number in range(TRIES):
            if number:
                gevent.sleep(min(random.uniform(0, pause_seconds), seconds_left(deadline)))
                pause_seconds *= 2
                found = self._read_again(mails, deadline)
            changes = []
            for mail in mails:
                change = self._fold_mail(batch, mail, found.get(mail.email_id), now, deadline)
                if change is not None:
                    changes.append((mail, change))
            mails = self._write(batch, changes, deadline)
            if not mails:
                return
        for mail in mails:
            batch.settle(mail.places, Verdict(False, CONFLICT_RETRY_SECONDS, "others were faster"), "conflict")

    def _read_again(self, mails: Iterable[_Mail], deadline: float) -> dict[str, Entry]:
        found = {}
        for mail in mails:
            entry = self._bucket.get_from_leader(mail.email_id, seconds_left(deadline))
            if entry is not None:
                found[mail.email_id] = entry
        return found

    def _fold_mail(
        self, batch: _Batch, mail: _Mail, entry: Entry | None, now: float, deadline: float
    ) -> Publication | None:
        """What is to be written of a mail's record, None when nothing is. Its facts are made ready."""
        mail.facts.clear()
        mail.is_rebuilt = False
        before = self._made_again(batch, mail, now) if entry is None else parse_record(entry.value)
        if before is None:
            if entry is not None:
                batch.park(mail.places, "the record of its mail is broken")
            return None
        folded_at = rfc3339(now)
        record = before
        for _, event in mail.events:
            stated = set(folding.facts(before, event))
            record = folding.fold(record, event, folded_at)
            for fact in folding.facts(record, event):
                if fact not in stated or self._is_fresh(before, fact, event, now):
                    mail.state(record, fact, event)
                elif self._is_lacking(mail.email_id, before, fact, event, deadline):
                    record = folding.with_stated_at(record, event.event_id, fact, folded_at)
                    mail.state(record, fact, event)
        mail.is_changed = record != before
        value = folding.stored_value(record, self._max_record_bytes)
        if entry is None:
            return self._bucket.creation(mail.email_id, value)
        return self._bucket.replacement(mail.email_id, value, entry.revision) if value != entry.value else None

    def _made_again(self, batch: _Batch, mail: _Mail, now: float) -> dict[str, Any] | None:
        """The record of a mail that has none: made from an event, unless the mail is so young that it may yet come."""
        left_seconds = self._config.early_seconds - max(
            batch.age_seconds(place, event, now) for place, event in mail.events
        )
        if left_seconds > 0:
            pause_seconds = min(
                2 ** batch.received_count(mail.places), LONGEST_EARLY_PAUSE_SECONDS, math.ceil(left_seconds)
            )
            batch.settle(mail.places, Verdict(False, pause_seconds, "its mail has no record yet"), "early")
            return None
        rebuilt = next(filter(None, (folding.rebuilt_record(event) for _, event in mail.events)), None)
        if rebuilt is None or mail.is_refused:
            # Another application's mail, or one whose record was deleted on purpose.
            log.info("events of a mail that is not known are dropped", extra={"email_id": mail.email_id})
            batch.settle(mail.places, DONE, "unknown")
            return None
        mail.is_rebuilt = True
        return rebuilt

    def _is_fresh(self, record: Mapping[str, Any], fact: Fact, event: Event, now: float) -> bool:
        """Whether a fact was stated, or was about to be, so short a time ago that the log would drop it again."""
        at = folding.stated_at(record, event.event_id, fact)
        return at is not None and now - at < self._fresh_seconds

    def _is_lacking(self, email_id: str, record: Mapping[str, Any], fact: Fact, event: Event, deadline: float) -> bool:
        """Whether the log lacks a fact that it should have, as long as anybody can know."""
        at = folding.stated_at(record, event.event_id, fact)
        if at is None:  # so long ago that the record does not remember when, or not by us
            return False
        between = (at - CLOCK_SKEW_SECONDS, at + 2 * self._fresh_seconds + CLOCK_SKEW_SECONDS)
        event_id = event.event_id if fact in COUNTED else ""
        token = mail_token(email_id, record.get("group_id"))
        return not self._log.has(token, fact, email_id, event_id, between, seconds_left(deadline))

    def _write(self, batch: _Batch, changes: Sequence[tuple[_Mail, Publication]], deadline: float) -> list[_Mail]:
        """Writes the records; those that somebody else has written meanwhile come back."""
        beaten = []
        answers = self._jetstream.store([change for _, change in changes], seconds_left(deadline))
        for (mail, _), answer in zip(changes, answers, strict=True):
            if isinstance(answer, RevisionConflict):
                # A record that is to be made and is there: it came meanwhile, or was deleted and may not come back.
                mail.is_refused = mail.is_rebuilt
                beaten.append(mail)
            elif isinstance(answer, BusUnavailable):
                raise answer
            elif isinstance(answer, BusRefused):
                mail.facts.clear()
                if answer.code in ONE_RECORDS_OWN:
                    batch.park(mail.places, f"the record of its mail is refused: {answer}")
                else:
                    batch.settle(mail.places, Verdict(False, REFUSED_RETRY_SECONDS, str(answer)), "refused")
        return beaten

    # -- facts -----------------------------------------------------------------------------
    def _state(self, batch: _Batch, begun_at: float, deadline: float) -> None:
        """States the facts of every record that was written, parks what is to be parked, and settles the rest."""
        if time.monotonic() - begun_at >= self._fresh_seconds:
            for mail in batch.mails.values():
                if mail.facts:
                    batch.settle(mail.places, Verdict(False, 1, "NATS was too slow"), "late")
                    mail.facts.clear()
        parked = [
            (place, self._parked(batch.notifications[place], why)) for place, why in sorted(batch.to_park.items())
        ]
        stated = [(mail, fact) for mail in batch.mails.values() for fact in mail.facts.values()]
        answers = self._jetstream.store(
            [*(each for _, each in stated), *(each for _, each in parked)], seconds_left(deadline)
        )
        for places, answer in zip(
            [*(mail.places for mail, _ in stated), *([place] for place, _ in parked)], answers, strict=True
        ):
            if isinstance(answer, BusUnavailable):
                raise answer
            if isinstance(answer, BusRefused):
                batch.settle(places, Verdict(False, REFUSED_RETRY_SECONDS, str(answer)), "refused")
        for place, _ in parked:
            if batch.verdicts[place] is not None:  # it was refused
                continue
            why = batch.to_park[place]
            log.warning(
                "a notification is parked: %s", why, extra={"sqs_message_id": batch.notifications[place].sqs_message_id}
            )
            batch.settle([place], DONE, "parked")
        for mail in batch.mails.values():
            batch.settle(
                mail.places, DONE, "rebuilt" if mail.is_rebuilt else "folded" if mail.is_changed else "repeated"
            )

    def _parked(self, notification: Notification, why: str) -> Publication:
        return parked_publication(
            notification.body,
            why,
            notification.received_count,
            notification.sqs_message_id,
            rfc3339(self._clock()),
            self._max_payload_bytes,
        )


class _Mail:
    """A mail that a batch has events of."""

    def __init__(self, email_id: str) -> None:
        self.email_id = email_id
        self.events: list[tuple[int, Event]] = []
        """With the place of the notification in the batch."""
        self.facts: dict[tuple[Fact, str], Publication] = {}
        """To be stated once the record is written."""
        self.is_changed = False
        self.is_rebuilt = False
        self.is_refused = False
        """Its record could not be made although there is none."""

    @property
    def places(self) -> list[int]:
        """Of its notifications."""
        return [place for place, _ in self.events]

    def state(self, record: Mapping[str, Any], fact: Fact, event: Event) -> None:
        """Makes a fact ready, once."""
        event_id = event.event_id if fact in COUNTED else ""
        at = str(record.get("sent_at", "")) if fact is Fact.SENT else event.at
        token = mail_token(self.email_id, record.get("group_id"))
        self.facts[fact, event_id] = fact_publication(token, fact, self.email_id, at, event_id)


class _Batch:
    """Notifications that are handled together, and what has become of each so far."""

    def __init__(self, notifications: Sequence[Notification]) -> None:
        self.notifications = notifications
        self.verdicts: list[Verdict | None] = [None] * len(notifications)
        self.mails: dict[str, _Mail] = {}
        self.to_park: dict[int, str] = {}
        self.counts: Counter[str] = Counter()

    def add(self, place: int, event: Event) -> None:
        """An event that is to be folded."""
        self.counts[event.kind.value] += 1
        self.mails.setdefault(event.email_id, _Mail(event.email_id)).events.append((place, event))

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
