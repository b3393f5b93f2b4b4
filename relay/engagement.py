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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import gevent

from relay import contract
from relay.bus.client import Publication, seconds_left
from relay.bus.jetstream import ONE_MESSAGES_OWN, JetStream
from relay.bus.kv import Bucket, Entry
from relay.bus.stored import StreamInfo
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.journey import Follower
from relay.tracking import folding
from relay.tracking.batch import DONE, Batch, MailEvents, Notification, Verdict, logged_id
from relay.tracking.events import Broken, Dropped, Event, read_notification
from relay.tracking.facts import Fact
from relay.tracking.log import Log
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
LOOKUP_RETRY_SECONDS = 60
MOST_LOOKUPS = 10
"""Receipts of a notification whose fact cannot be looked up in time; then it is taken for stated."""
CLOCK_SKEW_SECONDS = 5.0
"""What is left between clocks when each worker has set its own by the NATS server's."""
SENT_SKEW_SECONDS = 60.0
"""Between the NATS server's clock and Amazon's."""
LOOK_SECONDS = 60.0
"""Between two looks at what bucket and log allow, and at the server's clock."""
LEAST_FRESH_SECONDS = 0.05
"""Half of the shortest time that a log can remember."""
ROOM_BYTES = 1024
"""In a message of the bucket, for its subject and header fields."""


class EngagementConfig(NamedTuple):
    """How events are handled; settings ENGAGEMENT_* and TRACKING_*."""

    early_seconds: float = 60.0
    """How old a mail must be before an event without a record is no longer just early."""
    storage: StorageConfig = StorageConfig()


class _Limits(NamedTuple):
    """What bucket, log and server allow, as they were seen last."""

    fresh_seconds: float = DUPLICATE_WINDOW_SECONDS / 2
    """For so long after it was folded the facts of an event may be stated again: the log drops repeats."""
    ahead_seconds: float = 0.0
    """Of the server's clock before this machine's."""
    max_record_bytes: int = folding.MAX_RECORD_BYTES
    record_seconds: float = 0.0
    """How long a record is kept; 0: for ever."""
    fact_seconds: float = 0.0


class _Doubtful(NamedTuple):
    """A fact that was stated, or was about to be, and whether it was only the log can say."""

    mail: MailEvents
    fact: Fact
    event_id: str
    """With which it is logged."""
    since: float
    """Between which moments it was stated, if it was; epoch seconds by the server's clock."""
    until: float

    @property
    def key(self) -> tuple[str, Fact, str]:
        """As a batch remembers what was found."""
        return self.mail.email_id, self.fact, self.event_id


class Engagement:
    """Handles notifications. Any number of greenlets, processes and machines may do so at the same time."""

    def __init__(
        self,
        jetstream: JetStream,
        config: EngagementConfig,
        clock: Callable[[], float] = time.time,
        follower: Follower | None = None,
    ) -> None:
        """``clock`` gives epoch seconds; ``follower`` is told of each batch."""
        self._jetstream = jetstream
        self._config = config
        self._clock = clock
        self._follower = follower
        self._bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._log = Log(jetstream)
        self._limits = _Limits()
        self._look_again_at = 0.0
        self.counts: Counter[str] = Counter()
        """Events by kind, and what became of notifications."""

    def prepare(self) -> None:
        """Reads what bucket and log allow, and makes the stream of parked notifications when it is missing.

        Before the first ``handle``. Raises ``BusUnavailable``, and ``BusRefused`` when there is no bucket or no log.
        """
        try:
            ensure_parked_stream(self._jetstream, self._config.storage)
        except BusRefused as error:
            name = contract.PARKED_STREAM
            log.warning("the stream %s could not be made (%s); what cannot be read stays in the queue", name, error)
        asked_at = self._clock()
        logged = self._jetstream.stream_info(contract.LOG_STREAM)
        answered_at = self._clock()
        bucket = self._jetstream.stream_info(self._bucket.stream)
        window_seconds = int(logged.config.get("duplicate_window") or 0) / NANOSECONDS
        largest = [folding.MAX_RECORD_BYTES, self._jetstream.max_payload_bytes - ROOM_BYTES]
        if (most := int(bucket.config.get("max_msg_size") or -1)) > 0:
            largest.append(most - ROOM_BYTES)
        server_at = parse_time(logged.asked_at)
        ahead_seconds = server_at.timestamp() - (asked_at + answered_at) / 2 if server_at is not None else 0.0
        self._limits = _Limits(
            fresh_seconds=max(LEAST_FRESH_SECONDS, window_seconds / 2),
            # An answer that took long says little; a small difference is none.
            ahead_seconds=ahead_seconds if abs(ahead_seconds) > 1.0 + answered_at - asked_at else 0.0,
            max_record_bytes=max(ROOM_BYTES, min(largest)),
            record_seconds=_seconds_kept(bucket),
            fact_seconds=_seconds_kept(logged),
        )
        self._look_again_at = time.monotonic() + LOOK_SECONDS

    def handle(self, notifications: Sequence[Notification], timeout_seconds: float) -> list[Verdict]:
        """What becomes of each, in the same order. Done means: acknowledged by JetStream, or nothing to keep.

        Blocks for ``timeout_seconds`` at most. Raises ``BusUnavailable`` when JetStream did not answer, ``BusRefused``
        when it refuses what it should take: then nothing is done, and the same batch may be handled again.
        """
        begun_at = time.monotonic()
        problem = "error"
        done = 0
        try:
            verdicts = self._handle(notifications, begun_at, begun_at + timeout_seconds)
            done, problem = sum(verdict.is_done for verdict in verdicts), ""
        except (BusUnavailable, BusRefused) as error:
            problem = type(error).__name__
            raise
        finally:
            if self._follower is not None:
                told = {"messages": len(notifications), "done": done}
                self._follower.handled(begun_at, time.monotonic(), problem=problem, **told)
        return verdicts

    def _handle(self, notifications: Sequence[Notification], begun_at: float, deadline: float) -> list[Verdict]:
        if begun_at >= self._look_again_at:
            self.prepare()
        now = self._clock() + self._limits.ahead_seconds
        batch = Batch(notifications)
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
        batch = Batch([notification])
        batch.to_park[0] = why
        self._state(batch, time.monotonic(), self._jetstream.deadline(None))
        self.counts.update(batch.counts)
        return batch.verdicts[0] or DONE

    # -- records ---------------------------------------------------------------------------
    def _fold(self, batch: Batch, now: float, deadline: float) -> None:
        """Every mail's events into its record; what cannot be done now is settled, the rest is ready to be stated."""
        mails = list(batch.mails.values())
        if not mails:
            return
        found = self._bucket.get_many([mail.email_id for mail in mails], seconds_left(deadline))
        pause_seconds = FIRST_PAUSE_SECONDS
        for number in range(TRIES):
            if number:
                gevent.sleep(min(random.uniform(0, pause_seconds), seconds_left(deadline)))
                pause_seconds *= 2
                found = self._read_again(mails, deadline)
            changes = []
            for mail in mails:
                mail.read(found.get(mail.email_id))
                self._know(batch, mail, now, deadline)
            self._look_up(batch, mails, now, deadline)
            for mail in mails:
                change = self._fold_mail(batch, mail, now)
                if change is not None:
                    changes.append((mail, change))
            mails = self._write(batch, changes, deadline)
            if not mails:
                return
        for mail in mails:
            mail.facts.clear()
            batch.settle(mail.places, Verdict(False, CONFLICT_RETRY_SECONDS, "others were faster"), "conflict")

    def _read_again(self, mails: Iterable[MailEvents], deadline: float) -> dict[str, Entry]:
        found = {}
        for mail in mails:
            entry = self._bucket.get_from_leader(mail.email_id, seconds_left(deadline))
            if entry is not None:
                found[mail.email_id] = entry
        return found

    def _know(self, batch: Batch, mail: MailEvents, now: float, deadline: float) -> None:
        """``mail.before``: the record that its events are folded into, None where there is none to be had."""
        mail.is_rebuilt = False
        if mail.entry is None:
            mail.before = self._made_again(batch, mail, now, deadline)
            return
        mail.before = parse_record(mail.entry.value)
        if mail.before is None:
            batch.park(mail.places, "the record of its mail is broken")
        elif not mail.token:
            batch.park(mail.places, "the record of its mail names no group")
            mail.before = None

    def _made_again(self, batch: Batch, mail: MailEvents, now: float, deadline: float) -> dict[str, Any] | None:
        """The record of a mail that has none: made from an event, unless the mail is so young that it may yet come."""
        age_seconds = max(batch.age_seconds(place, event, now) for place, event in mail.events)
        left_seconds = self._config.early_seconds - age_seconds
        if left_seconds > 0:
            longest_seconds = min(LONGEST_EARLY_PAUSE_SECONDS, math.ceil(left_seconds))
            pause_seconds = min(2 ** batch.received_count(mail.places), longest_seconds)
            batch.settle(mail.places, Verdict(False, pause_seconds, "its mail has no record yet"), "early")
            return None
        rebuilt = next(filter(None, (folding.rebuilt_record(event) for _, event in mail.events)), None)
        kept_seconds = self._limits.record_seconds
        if (
            rebuilt is None
            or (kept_seconds and mail.age_seconds(now) >= kept_seconds)
            or (mail.is_refused and self._bucket.is_deleted(mail.email_id, seconds_left(deadline)))
        ):
            # Another application's mail, or one whose record has expired, or was deleted on purpose.
            log.info("events of a mail that is not known are dropped", extra={"email_id": mail.email_id})
            batch.settle(mail.places, DONE, "unknown")
            return None
        mail.is_rebuilt = True
        return rebuilt

    def _look_up(self, batch: Batch, mails: Iterable[MailEvents], now: float, deadline: float) -> None:
        """What the log lacks of the facts that were stated before, or were about to be, longer ago than it remembers.

        One walk for all mails of a group. Where it is too long the notifications come again, and in the end nothing is
        stated: ``relayctl repair`` can tell, and to count one too few for a while is better than one too many for ever.
        """
        wanted: dict[tuple[str, Fact], list[_Doubtful]] = defaultdict(list)
        for mail in mails:
            for doubtful in self._doubtful(mail, now):
                if doubtful.key not in batch.is_lacking:
                    wanted[mail.token, doubtful.fact].append(doubtful)
        for (token, fact), facts in wanted.items():
            between = min(each.since for each in facts), max(each.until for each in facts)
            logged_as = {(each.mail.email_id, each.event_id) for each in facts}
            lacking = self._log.lacking(token, fact, logged_as, between, deadline)
            for each in facts:
                batch.is_lacking[each.key] = lacking is not None and (each.mail.email_id, each.event_id) in lacking
                if lacking is None:
                    self._put_off(batch, each)

    def _put_off(self, batch: Batch, doubtful: _Doubtful) -> None:
        mail = doubtful.mail
        if batch.received_count(mail.places) < MOST_LOOKUPS:
            batch.settle(mail.places, Verdict(False, LOOKUP_RETRY_SECONDS, "the log is too long to look"), "put off")
            mail.before = None
        else:
            told = "the log may lack a fact (%s) of a mail, and is too long to look; relayctl repair can tell"
            log.warning(told, doubtful.fact.value, extra={"email_id": mail.email_id})

    def _doubtful(self, mail: MailEvents, now: float) -> Iterator[_Doubtful]:
        """Facts that have to be looked up."""
        if mail.before is None:
            return
        if mail.is_rebuilt:  # its record was lost, its fact perhaps not
            sent_at = mail.sent_at(now)
            yield _Doubtful(mail, Fact.SENT, "", sent_at - SENT_SKEW_SECONDS, sent_at + 2 * SENT_SKEW_SECONDS)
        kept_seconds = self._limits.fact_seconds or math.inf
        for _, event in mail.events:
            for fact in folding.facts(mail.before, event):
                at = folding.stated_at(mail.before, event.event_id, fact)
                if at is None or not now - kept_seconds < at <= now + CLOCK_SKEW_SECONDS:
                    continue  # so long ago that the record, or the log, does not remember, or not by us
                if not self._is_fresh(at, now):
                    # Nobody states a fact later than that: see ``_state``.
                    until = at + 2 * self._limits.fresh_seconds + CLOCK_SKEW_SECONDS
                    yield _Doubtful(mail, fact, logged_id(fact, event), at - CLOCK_SKEW_SECONDS, until)

    def _is_fresh(self, at: float, now: float) -> bool:
        """Whether a fact was stated, or was about to be, so short a time ago that the log would drop it again."""
        return -CLOCK_SKEW_SECONDS <= now - at < self._limits.fresh_seconds

    def _fold_mail(self, batch: Batch, mail: MailEvents, now: float) -> Publication | None:
        """What is to be written of a mail's record, None when nothing is. Its facts are made ready."""
        mail.facts.clear()
        if mail.before is None:
            return None
        if mail.is_rebuilt and not batch.is_lacking.get((mail.email_id, Fact.SENT, "")):
            mail.before.pop("outcome", None)  # the log has its fact: no event needs to state it
        folded_at = rfc3339(now)
        record = mail.before
        for _, event in mail.events:
            stated = set(folding.facts(mail.before, event))
            record = folding.fold(record, event, folded_at)
            for fact in folding.facts(record, event):
                at = folding.stated_at(mail.before, event.event_id, fact)
                if fact not in stated or (at is not None and self._is_fresh(at, now)):
                    mail.state(record, fact, event)
                elif batch.is_lacking.get((mail.email_id, fact, logged_id(fact, event))):
                    record = folding.with_stated_at(record, event.event_id, fact, folded_at)
                    mail.state(record, fact, event)
        mail.is_changed = record != mail.before
        value = folding.stored_value(record, self._limits.max_record_bytes)
        if mail.entry is None:
            return self._bucket.creation(mail.email_id, value)
        return (
            self._bucket.replacement(mail.email_id, value, mail.entry.revision) if value != mail.entry.value else None
        )

    def _write(
        self, batch: Batch, changes: Sequence[tuple[MailEvents, Publication]], deadline: float
    ) -> list[MailEvents]:
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
                if answer.code not in ONE_MESSAGES_OWN:
                    self._look_again_at = 0.0
                    raise answer
                batch.park(mail.places, f"the record of its mail is refused: {answer}")
        return beaten

    # -- facts -----------------------------------------------------------------------------
    def _state(self, batch: Batch, begun_at: float, deadline: float) -> None:
        """States the facts of every record that was written, parks what is to be parked, and settles the rest."""
        if time.monotonic() - begun_at >= self._limits.fresh_seconds:
            for mail in batch.mails.values():
                if mail.facts:
                    batch.settle(mail.places, Verdict(False, 1, "NATS was too slow"), "late")
                    mail.facts.clear()
        parked = [
            (place, self._parked(batch.notifications[place], why)) for place, why in sorted(batch.to_park.items())
        ]
        stated = [fact for mail in batch.mails.values() for fact in mail.facts.values()]
        answers = self._jetstream.store([*stated, *(each for _, each in parked)], seconds_left(deadline))
        for number, answer in enumerate(answers):
            if isinstance(answer, BusUnavailable):
                raise answer
            if isinstance(answer, BusRefused):
                self._look_again_at = 0.0
                if number < len(stated):
                    raise answer
                place, _ = parked[number - len(stated)]
                log.warning("a notification cannot be parked, and stays in the queue: %s", answer)
                batch.settle([place], Verdict(False, REFUSED_RETRY_SECONDS, str(answer)), "refused")
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
            self._jetstream.max_payload_bytes,
        )


def _seconds_kept(stream: StreamInfo) -> float:
    return int(stream.config.get("max_age") or 0) / NANOSECONDS
