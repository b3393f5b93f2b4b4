"""Writing a mail's ``sent`` fact and its record, right after it was handed over.

A tracking failure never turns a relayed mail into an error: it is logged, counted and shown, and what could not be
written is written later (``arrears``). After ``FAILURES_TO_SUSPEND`` in a row nothing is written any more until a probe
finds JetStream well again, so that a hung JetStream costs each mail nothing instead of a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import gevent

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import ONE_MESSAGES_OWN, JetStream
from relay.bus.kv import Bucket, Entry
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.histogram import Histogram
from relay.journey import TRACKING, Follower
from relay.tracking.arrears import LIMIT_BYTES, Arrears, Owed
from relay.tracking.facts import Fact
from relay.tracking.folding import stated_by
from relay.tracking.groups import mail_token
from relay.tracking.log import fact_publication
from relay.tracking.record import RecipientOutcome, new_record, parse_record, rfc3339, settled_record
from relay.tracking.storage import StorageConfig, wait_for_storage, why_unusable

log = logging.getLogger("relay.tracking")

FAILURES_TO_SUSPEND = 3
PROBE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Doubles up to this while probes succeed and records still fail, as with a full disk."""
SETTLE_PAUSES_SECONDS = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before each try to settle a record; the first may come before the record itself is written."""


class HandedOver(NamedTuple):
    """A mail that the smarthost was given, as tracking keeps it: what is noted right after, or what settles a doubt."""

    email_id: str
    group_id: str
    to: str
    subject_header: str
    at: float
    """Epoch time of the smarthost's reply."""
    outcome: str = ""
    """'' when it was relayed, else what became of it instead."""
    remote_id: str = ""
    """The smarthost's id, '' when there is none."""
    recipients: tuple[RecipientOutcome, ...] = ()
    """Of a mail to several: what became of each."""
    caller: str = ""
    """Who asked for it, where NATS vouches for that."""
    unheard: tuple[int, ...] = ()
    """Places in ``recipients`` of whom nothing new is said: only a record that is missing is made of them."""


class Tracker:
    """Keeps records and facts of what is sent; ``note`` is safe to call whatever state JetStream is in."""

    def __init__(
        self,
        jetstream: JetStream,
        config: StorageConfig,
        ack_seconds: float,
        on_change: Callable[[str], None],
        follower: Follower | None = None,
        arrears_bytes: int = LIMIT_BYTES,
    ) -> None:
        """``on_change`` is told why nothing is tracked, '' when it is; ``follower`` of each mail that is.

        ``arrears_bytes``: of what could not be written when its mail went out, kept to be written later.
        """
        self._jetstream = jetstream
        self._config = config
        self._ack_seconds = ack_seconds
        self._bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._on_change = on_change
        self._follower = follower
        self._failures_in_a_row = 0
        self._pause_seconds = PROBE_SECONDS
        self._probe: gevent.Greenlet | None = None
        self._arrears = Arrears(
            jetstream,
            ack_seconds,
            is_on=lambda: not self.off_reason,
            written=self._written_late,
            lost=self._lose,
            limit_bytes=arrears_bytes,
        )
        self.off_reason = "not connected yet"
        """Why nothing is being tracked, '' while it is."""
        self.tracked = 0
        self.lost = 0
        """Mails that went out and will have no complete record."""
        self.unsettled = 0
        """Mails in doubt whose record does not say what became of them although the smarthost did."""
        self.write_seconds = Histogram()
        """How long mails waited for JetStream to acknowledge fact and record, or until they gave up."""

    def start(self) -> None:
        """Makes bucket and log when they are missing. Blocks for the first try; goes on in the background."""
        if problem := self._jetstream.server_problem:
            log.warning("%s", problem)
        self._say(why_unusable(self._jetstream, self._config))
        if self.off_reason:
            self._start_probe()

    def note(self, mail: HandedOver) -> None:
        """Writes the ``sent`` fact (of a relayed mail) and the record; blocks until both are acknowledged.

        At most ``ack_seconds``. Never raises.
        """
        if self.off_reason:
            self._put_off(mail, self.off_reason, None)
            return
        record, facts = _record_and_facts(mail)
        begun_at = time.monotonic()
        answers = self._jetstream.store([*facts, self._bucket.creation(mail.email_id, record)], self._ack_seconds)
        ended_at = time.monotonic()
        self.write_seconds.observe(ended_at - begun_at)
        problem: Exception | None = None
        for answer in answers:
            # The key is a new UUID of ours: a conflict means that our own write arrived twice.
            if isinstance(answer, Exception) and not isinstance(answer, RevisionConflict):
                problem = answer
                break
        if self._follower is not None:
            self._follower.step(TRACKING, begun_at, ended_at, problem=type(problem).__name__ if problem else "")
        if problem is not None:
            self._fail(mail, problem, begun_at)
            return
        self._failures_in_a_row = 0
        self._pause_seconds = PROBE_SECONDS
        self.tracked += 1

    def settle(self, mail: HandedOver) -> None:
        """Writes into the record what became of a mail noted in doubt, and its ``sent`` fact when it was relayed.

        Or what became of a mail that was noted before it had reached all its recipients. Where the record is missing,
        since tracking was off or is slower than the smarthost, it is made. Never raises, and tries for a minute: nobody
        waits for this.
        """
        record, facts = _record_and_facts(mail)
        has_read = False
        problem = ""
        for pause_seconds in SETTLE_PAUSES_SECONDS:
            gevent.sleep(pause_seconds)
            if self.off_reason:
                problem = self.off_reason
                continue
            try:
                entry = self._bucket.get_from_leader(mail.email_id)
            except (BusUnavailable, BusRefused) as error:
                problem = str(error)
                continue
            problem = self._try_to_settle(mail, entry, record, facts, is_first=not has_read)
            has_read = True
            if not problem:
                return
        self.unsettled += 1
        log.warning("the record of a mail in doubt is not settled: %s", problem, extra={"email_id": mail.email_id})

    def _try_to_settle(
        self, mail: HandedOver, entry: Entry | None, record: bytes, facts: list[Publication], *, is_first: bool
    ) -> str:
        """One compare-and-set; what went wrong, '' when it is done. Again is harmless."""
        if entry is None:
            change = self._bucket.creation(mail.email_id, record)
        elif (noted := parse_record(entry.value)) is None:
            return "its record is broken"
        else:
            # By an event, or with the record itself: perhaps longer ago than the log remembers. What a record says that
            # was read later may be our own, whose fact did not arrive.
            if stated_by(noted, Fact.SENT) or (is_first and not noted.get("outcome")):
                facts.clear()
            news = [
                each._replace(outcome="") if place in mail.unheard else each
                for place, each in enumerate(mail.recipients)
            ]
            value = settled_record(noted, outcome=mail.outcome, remote_id=mail.remote_id, recipients=news)
            change = self._bucket.replacement(mail.email_id, value, entry.revision)
        answers = self._jetstream.store([*facts, change], self._ack_seconds)
        return next((str(answer) for answer in answers if isinstance(answer, Exception)), "")

    @property
    def owed(self) -> int:
        """Mails that went out and whose record is still to be written."""
        return len(self._arrears)

    def stop(self, timeout_seconds: float = 0.0) -> None:
        """Writes what is owed, at most so long; ends what goes on in the background."""
        self._arrears.close(timeout_seconds)
        if self._probe is not None:
            self._probe.kill(timeout=1)

    def _fail(self, mail: HandedOver, error: Exception, tried_at: float) -> None:
        if isinstance(error, BusRefused) and error.code in ONE_MESSAGES_OWN:
            self._lose(mail.email_id, str(error))
            return
        self._put_off(mail, str(error), tried_at)
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_TO_SUSPEND and not self.off_reason:
            self._say(str(error))
            self._start_probe()
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _put_off(self, mail: HandedOver, why: str, tried_at: float | None) -> None:
        """Writes it later; ``tried_at``, on ``time.monotonic()``, when some of it may have been written."""
        record, facts = _record_and_facts(mail)
        token = mail_token(mail.email_id, mail.group_id)
        creation = self._bucket.creation(mail.email_id, record)
        if self._arrears.put(Owed(mail.email_id, token, mail.at, tuple(facts), creation, tried_at)):
            log.warning("mail is not tracked yet: %s", why, extra={"email_id": mail.email_id})
        else:
            self._lose(mail.email_id, why)

    def _written_late(self, email_id: str) -> None:
        self.tracked += 1
        log.info("mail is tracked at last", extra={"email_id": email_id})

    def _lose(self, email_id: str, why: str) -> None:
        self.lost += 1
        log.warning("mail is not tracked: %s", why, extra={"email_id": email_id})

    def _start_probe(self) -> None:
        if self._probe is None or self._probe.dead:
            self._probe = gevent.spawn(wait_for_storage, self._jetstream, self._config, self._say, self._pause_seconds)

    def _say(self, why_off: str) -> None:
        if why_off == self.off_reason:
            return
        self.off_reason = why_off
        self._failures_in_a_row = 0
        self._on_change(why_off)
        if why_off:
            log.warning("tracking is off: %s", why_off)
        else:
            log.info("tracking is on")


def _record_and_facts(mail: HandedOver) -> tuple[bytes, list[Publication]]:
    """The record of ``mail``, and its ``sent`` fact where it was relayed."""
    sent_at = rfc3339(mail.at)
    record = new_record(
        email_id=mail.email_id,
        group_id=mail.group_id,
        to=mail.to,
        subject_header=mail.subject_header,
        sent_at=sent_at,
        outcome=mail.outcome,
        remote_id=mail.remote_id,
        recipients=mail.recipients,
        caller=mail.caller,
    )
    if mail.outcome:
        return record, []
    return record, [fact_publication(mail_token(mail.email_id, mail.group_id), Fact.SENT, mail.email_id, sent_at)]
