"""Facts and records that could not be written when their mails went out, kept until they can be.

NATS restarts, its cluster elects a leader, a disk is full: mail goes on meanwhile, and what is owed to the log and the
bucket is written as soon as they take it. Bounded in bytes: what does not fit is lost, as is what is still owed when
the process ends; the tracker counts and logs that.

Writing again is harmless: a record is only ever created, and a fact is known by its id as long as the server remembers
that (``DUPLICATE_WINDOW_SECONDS``). One that was tried longer ago is looked up in the log first. Where the log is too
long for that, again and again, the record is written without the fact and the mail counts as lost, lest it keep those
behind it waiting for ever; ``relayctl repair`` can tell.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import gevent

from relay.bus.client import Publication
from relay.bus.jetstream import ONE_MESSAGES_OWN, JetStream
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.tracking.facts import Fact
from relay.tracking.log import Log
from relay.tracking.storage import DUPLICATE_WINDOW_SECONDS

LIMIT_BYTES = 16 * 1024 * 1024
"""Of one worker; some 16,000 mails."""
BATCH = 100
"""Mails written together."""
POLL_SECONDS = 0.1
"""Between two looks at whether writing makes sense; there is nothing to look at while nothing is owed."""
PAUSE_SECONDS = 1.0
"""After a batch of which something was not taken."""
SURELY_KNOWN_SECONDS = DUPLICATE_WINDOW_SECONDS / 2
"""So long after it was first tried a fact may be stated again, whatever the server's clock and the network do."""
LOOKUP_SECONDS = 5.0
MOST_LOOKUPS = 3
"""In a row that may come to nothing, before facts are given up."""
TOO_LONG = "the log is too long to look up whether a mail is in it"
SKEW_SECONDS = 60.0
"""By how much the server's clock may differ from ours."""
OVERHEAD_BYTES = 400
"""What a publication holds beside its payload."""


class Owed(NamedTuple):
    """What is to be written of one mail."""

    email_id: str
    token: str
    """Its group's."""
    at: float
    """When it was sent, in epoch seconds."""
    facts: tuple[Publication, ...]
    """Its ``sent`` fact, unless it is in doubt."""
    record: Publication
    """Which creates its record."""
    tried_at: float | None = None
    """When it was first tried, on ``time.monotonic()``: some of it may have been written. None: it never was."""

    @property
    def size_bytes(self) -> int:
        """About what it takes to keep it."""
        return sum(len(each.payload) + OVERHEAD_BYTES for each in (*self.facts, self.record))


class Arrears:
    """What one worker owes. ``put`` never blocks; a greenlet of its own writes, as long as something is owed."""

    def __init__(
        self,
        jetstream: JetStream,
        ack_seconds: float,
        *,
        is_on: Callable[[], bool],
        written: Callable[[str], None],
        lost: Callable[[str, str], None],
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """``is_on``: whether it makes sense to write. ``written(email_id)`` and ``lost(email_id, why)`` are told once
        of each mail that was put, and must not block.
        """
        self._jetstream = jetstream
        self._log = Log(jetstream)
        self._ack_seconds = ack_seconds
        self._is_on = is_on
        self._written = written
        self._lost = lost
        self._limit_bytes = limit_bytes
        self._owed: deque[Owed] = deque()
        self._in_hand: list[Owed] = []
        self._size_bytes = 0
        self._writer: gevent.Greenlet | None = None
        self._vain_lookups = 0
        """In a row."""
        self._is_closed = False
        self.problem = ""
        """Why the last one that was tried could not be written."""

    def __len__(self) -> int:
        """How many mails are owed."""
        return len(self._owed) + len(self._in_hand)

    def put(self, owed: Owed) -> bool:
        """Keeps it to be written; False when there is no room for it, or no time left."""
        size_bytes = owed.size_bytes
        if self._is_closed or self._size_bytes + size_bytes > self._limit_bytes:
            return False
        self._size_bytes += size_bytes
        self._owed.append(owed)
        if self._writer is None or self._writer.dead:
            self._writer = gevent.spawn(self._write_all)
        return True

    def close(self, timeout_seconds: float) -> None:
        """Writes on, at most so long; what is owed then is lost."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.join(timeout=timeout_seconds)
            self._writer.kill(timeout=1)
        self._put_back(self._in_hand)
        while self._owed:
            self._lost(self._take().email_id, self.problem or "the process ends")

    # -- writing ---------------------------------------------------------------------------
    def _write_all(self) -> None:
        """The greenlet: oldest first, until nothing is owed."""
        self._put_back(self._in_hand)  # of one that has died
        while self._owed:
            if not self._is_on():
                gevent.sleep(POLL_SECONDS)
                continue
            self._in_hand = [self._take() for _ in range(min(BATCH, len(self._owed)))]
            left = self._write(self._in_hand)
            self._put_back(left)
            if left:
                gevent.sleep(PAUSE_SECONDS)

    def _take(self) -> Owed:
        owed = self._owed.popleft()
        self._size_bytes -= owed.size_bytes
        return owed

    def _put_back(self, left: Sequence[Owed]) -> None:
        self._in_hand = []
        for owed in reversed(left):
            self._owed.appendleft(owed)
            self._size_bytes += owed.size_bytes

    def _write(self, batch: Sequence[Owed]) -> list[Owed]:
        """Those that are still owed afterwards, in their order."""
        looked_up = self._look_up(batch)
        if looked_up is None:
            return list(batch)
        known, unclear = looked_up
        begun_at = time.monotonic()
        publications = [_publications(each, known | unclear) for each in batch]
        answers = iter(self._jetstream.store([each for one in publications for each in one], self._ack_seconds))
        left = []
        for owed, own in zip(batch, publications, strict=True):
            # The key is a new UUID of ours: a conflict means that an earlier write of ours had arrived.
            errors = [
                answer
                for answer in [next(answers) for _ in own]
                if isinstance(answer, Exception) and not isinstance(answer, RevisionConflict)
            ]
            if not errors:
                if owed.email_id in unclear:
                    self._lost(owed.email_id, f"its record is written; {TOO_LONG}, relayctl repair can tell")
                else:
                    self._written(owed.email_id)
                continue
            hopeless = next((each for each in errors if _is_its_own(each)), None)
            if hopeless is not None:
                self._lost(owed.email_id, str(hopeless))
                continue
            self.problem = str(errors[0])
            left.append(owed if owed.tried_at is not None else owed._replace(tried_at=begun_at))
        return left

    def _look_up(self, batch: Sequence[Owed]) -> tuple[set[str], set[str]] | None:
        """Of those that were tried long ago: whose fact is in the log, and of whom it will not be told.

        None when it cannot be told now.
        """
        now = time.monotonic()
        known: set[str] = set()
        unclear: set[str] = set()
        try:
            for token, of_group in _doubtful(batch, now):
                ids = {each.email_id for each in of_group}
                moments = [each.at for each in of_group]
                between = (min(moments) - SKEW_SECONDS, max(moments) + now - _first_try(of_group) + SKEW_SECONDS)
                lacking = self._log.lacking(
                    token, Fact.SENT, {(email_id, "") for email_id in ids}, between, now + LOOKUP_SECONDS
                )
                if lacking is not None:
                    self._vain_lookups = 0
                    known |= ids - {email_id for email_id, _ in lacking}
                    continue
                self.problem = TOO_LONG
                self._vain_lookups += 1
                if self._vain_lookups < MOST_LOOKUPS:
                    return None
                unclear |= ids
        except (BusUnavailable, BusRefused) as error:
            self.problem = str(error)
            return None
        return known, unclear


def _publications(owed: Owed, known: set[str]) -> list[Publication]:
    return [*([] if owed.email_id in known else owed.facts), owed.record]


def _doubtful(batch: Sequence[Owed], now: float) -> Iterable[tuple[str, list[Owed]]]:
    """By group: those whose fact may be there without the server remembering its id."""
    by_token: dict[str, list[Owed]] = {}
    for owed in batch:
        if owed.facts and owed.tried_at is not None and now - owed.tried_at > SURELY_KNOWN_SECONDS:
            by_token.setdefault(owed.token, []).append(owed)
    return by_token.items()


def _first_try(batch: Sequence[Owed]) -> float:
    return min(owed.tried_at for owed in batch if owed.tried_at is not None)


def _is_its_own(error: Exception) -> bool:
    """Whether it is refused for what it is, now and ever."""
    return isinstance(error, BusRefused) and error.code in ONE_MESSAGES_OWN
