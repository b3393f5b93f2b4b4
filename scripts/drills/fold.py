"""A process that folds events into the records of a group while the mails are being sent: one of several at work.

    python -m scripts.drills.fold NATS_URL GROUP_ID MAILS SEED NUMBER

It follows the group's ``sent`` facts (on a crowded machine it meets mails whose record is not there yet), folds the
events that the seed has for this process into each record by ``Bucket.update``, and states their facts, as the
engagement worker's own folding has them. Another process has events of the same mails, and some of them are the very
same: every notification may come twice. When all events of ``MAILS`` mails are folded it prints, as one JSON object,
how often it met what, and ends.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import gevent
import orjson
from gevent.pool import Pool

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.bus.kv import Bucket
from relay.tracking import events, folding
from relay.tracking.facts import COUNTED, Fact
from relay.tracking.groups import group_token
from relay.tracking.log import fact_publication
from relay.tracking.record import rfc3339

FOLDERS = 2
AT_ONCE = 20
MOST_EVENTS = 2
FOLD_SECONDS = 60.0
RECORD_POLL_SECONDS = 0.002
EVENTS_BEGIN = 1_736_937_000
"""2025-01-15T10:30:00Z."""


class Event(NamedTuple):
    """A mail was opened."""

    event_id: str
    at: str
    folders: tuple[int, ...]
    """The processes that hear of it."""

    @property
    def told(self) -> events.Event:
        """As SES's event is when it was read."""
        mail = events.SentMail(ses_message_id="", group_id="", to="", subject_header="", sent_at="")
        return events.Event(events.Kind.OPEN, self.event_id, "", self.at, {}, mail)


def events_of(email_id: str, seed: int) -> list[Event]:
    """What happens to a mail: none to ``MOST_EVENTS`` events, each told to one process or to all."""
    chance = random.Random(f"{seed} {email_id}")
    found = []
    for number in range(chance.randint(0, MOST_EVENTS)):
        at = rfc3339(EVENTS_BEGIN + chance.randrange(86_400))
        folders = chance.choice([(0,), (1,), (0, 1)])
        found.append(Event(f"event-{number}", at, folders))
    chance.shuffle(found)
    return found


def folded(value: bytes, event: Event) -> bytes:
    """The record with the event in it; the same again changes nothing."""
    record = orjson.loads(value)
    after = folding.fold(record, event.told, rfc3339(time.time()))
    return value if after == record else folding.stored_value(after)


def stated(token: str, email_id: str, value: bytes, event: Event) -> list[Publication]:
    """The facts that the event states, by the record that has it."""
    return [
        fact_publication(token, fact, email_id, event.at, event.event_id if fact in COUNTED else "")
        for fact in folding.facts(orjson.loads(value), event.told)
    ]


class Folding:
    """One process's share of a group's events."""

    def __init__(self, bus: Bus, group_id: str, seed: int, number: int) -> None:
        self._jetstream = JetStream(bus)
        self._bucket = Bucket(self._jetstream, contract.RECIPIENTS_BUCKET)
        self._token = group_token(group_id)
        self._seed = seed
        self._number = number
        self.counts: Counter[str] = Counter()

    def sent(self, mails: int) -> Iterator[str]:
        """The first ``mails`` mails of the group, as they are logged."""
        nats_subject = f"{contract.LOG_PREFIX}.{self._token}.{Fact.SENT.value}"
        with self._jetstream.follow(contract.LOG_STREAM, nats_subject, from_sequence=1) as follower:
            for number, msg in enumerate(follower, 1):
                yield str(orjson.loads(msg.payload)["email_id"])
                if number == mails:
                    return

    def fold_mail(self, email_id: str) -> None:
        """Folds this process's events of a mail, each by a compare-and-set of its own, and states their facts."""
        for event in events_of(email_id, self._seed):
            if self._number in event.folders:
                self._fold(email_id, event)

    def _fold(self, email_id: str, event: Event) -> None:
        tries = 0

        def change(value: bytes | None) -> bytes | None:
            nonlocal tries
            tries += 1
            return None if value is None else folded(value, event)

        deadline = time.monotonic() + FOLD_SECONDS
        while (entry := self._bucket.update(email_id, change, deadline=deadline)) is None:
            self.counts["record not there yet"] += 1
            tries = 0
            gevent.sleep(RECORD_POLL_SECONDS)
        self.counts["folded"] += 1
        self.counts["tried again"] += tries - 1
        facts = stated(self._token, email_id, entry.value, event)
        for answer in self._jetstream.store(facts, deadline - time.monotonic()):
            if not isinstance(answer, Stored):
                raise answer
            self.counts["stated again"] += answer.is_duplicate


def main() -> int:
    """Folds until all is folded; 1 when it cannot."""
    url, group_id, mails, seed, number = sys.argv[1:]
    bus = Bus(url, f"fold {number}")
    bus.start()
    try:
        if not bus.wait_connected(10):
            raise SystemExit(f"NATS: {bus.last_error}")
        share = Folding(bus, group_id, int(seed), int(number))
        pool = Pool(AT_ONCE)
        greenlets = [pool.spawn(share.fold_mail, email_id) for email_id in share.sent(int(mails))]
        gevent.joinall(greenlets, raise_error=True)
    finally:
        bus.close()
    print(json.dumps(share.counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
