"""Claim a request_id, commit before the final dot, settle at the end; twins wait for the first one's answer.

What a claim is and how it changes is ``claim``'s; how it is written and read ``ledger``'s; who waits for whom
``twins``'. A plain request costs three writes: claimed, committing, done. What cannot be decided because JetStream
does not answer is refused with ``UNAVAILABLE``: nothing is sent unprotected.

    verdict = claims.claim(key, fingerprint, group_id, recipients, deadline, on_wait=...)
    if isinstance(verdict, Claim):
        with verdict as claim:
            ... for the recipients at claim.unsent: if claim.commit(indexes), send the final dot ...
            claim.settle(results, reply)

How long a lease is: what the request's deadline leaves, and ``settling_seconds``. So a live worker never loses its
claim, and needs no renewals; one that died is waited for that long.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson
from gevent.lock import BoundedSemaphore

from relay.bus.client import seconds_left
from relay.bus.jetstream import ONE_MESSAGES_OWN, JetStream, Stored
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.idempotency.claim import (
    COMMITTING,
    OWNED,
    Owner,
    Phase,
    Progress,
    Reason,
    Refusal,
    Refused,
    Settled,
    Value,
    answer_from,
    claimed,
    committing,
    settled,
    taken_over,
)
from relay.idempotency.ledger import LONGEST_PAUSE_SECONDS, Change, Found, Ledger, Pause, Unsettled, Written
from relay.idempotency.twins import MAX_WAITING, MAX_WAITING_BYTES, Busy, Twins, Watch
from relay.tracking.storage import StorageConfig

__all__ = ["Claim", "Claims", "ClaimsConfig", "Progress", "Reason", "Refused", "Settled"]

log = logging.getLogger("relay.idempotency")

HOUR_SECONDS = 3600.0
CLAIM_SECONDS = 2.0
COMMIT_SECONDS = 3.0
SETTLE_SECONDS = 1.0
"""For so long a caller waits until its answer is stored; then it goes on being stored in the background."""
LEAST_LEASE_SECONDS = 0.05
"""What is left of a lease that the server says has not expired, at least."""


class ClaimsConfig(NamedTuple):
    """How claims are kept; settings REQUEST_ID_TTL_HOURS and TRACKING_*."""

    ttl_hours: float = 24.0
    storage: StorageConfig = StorageConfig()
    settling_seconds: float = 15.0
    """What a lease lasts beyond the request's deadline: for so long its outcome can still be stored."""
    max_waiting: int = MAX_WAITING
    max_waiting_bytes: int = MAX_WAITING_BYTES


class Claim:
    """This process has a request_id until ``settle``, which must follow; as a context manager it is left in any case.

    Several greenlets may ``commit`` and ``note`` at the same time; those that wait for the write of another are written
    together.
    """

    def __init__(self, claims: Claims, watch: Watch, written: Written, deadline: float, held_until: float) -> None:
        self._claims = claims
        self._watch = watch
        self._written = written
        self._deadline = deadline
        self._held_until = held_until
        """Not before that does the lease expire, since the server counts from when it has the write."""
        self._lock = BoundedSemaphore()
        self._wanted: set[int] = set()
        self._noted: dict[int, Progress] = {}
        self._is_over = False
        """Nothing may be sent any more."""
        self._is_ended = False
        self.found_in_doubt = written.value.forsaken
        """Indexes of recipients whom an earlier attempt left in doubt without a word: they may have no record yet."""

    @property
    def key(self) -> str:
        """Of the claim, in the bucket."""
        return self._watch.key

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return self._written.value.attempt

    @property
    def group_id(self) -> str:
        """Of the first attempt."""
        return self._written.value.group_id

    @property
    def recipients(self) -> tuple[Progress, ...]:
        """What is stored of each; the ids are those of the first attempt."""
        return self._written.value.recipients

    @property
    def unsent(self) -> tuple[int, ...]:
        """Indexes of those to send to. There may be none left: then only the answer is missing."""
        return self._written.value.unsent

    # -- before the final dot ----------------------------------------------------------------
    def commit(self, indexes: Iterable[int]) -> bool:
        """Whether the final dot may be sent for the recipients at ``indexes``: certainly we, and only we, may.

        Blocks until JetStream has acknowledged it, or until the deadline, ``COMMIT_SECONDS`` at most. Costs nothing
        when it was done before, and what was sent then was certainly not taken. False: nothing may be sent. Never
        raises.
        """
        wanted = set(indexes)
        if self._is_committing(wanted):
            return not self._is_over and time.monotonic() < self._held_until
        self._wanted |= wanted
        until = min(self._deadline, time.monotonic() + COMMIT_SECONDS)
        if not self._lock.acquire(timeout=seconds_left(until)):
            self._wanted -= wanted
            return False
        try:
            if not self._is_over and not self._is_committing(wanted) and time.monotonic() < until:
                self._write_committing(wanted, until)
            return not self._is_over and self._is_committing(wanted)
        finally:
            self._wanted -= wanted
            self._lock.release()

    def note(self, index: int, result: Progress) -> None:
        """What became of one recipient, while others are still to be sent to; the next change writes it."""
        self._noted[index] = result

    def _is_committing(self, indexes: Iterable[int]) -> bool:
        recipients = self._written.value.recipients
        return all(recipients[index].outcome == COMMITTING and index not in self._noted for index in indexes)

    def _write_committing(self, wanted: set[int], until: float) -> None:
        """Those of ``wanted``, and those that other greenlets wait for."""
        together = wanted | {index for index in self._wanted if self._written.value.recipients[index].is_unsent}
        noted = dict(self._noted)
        owner = self._claims.owner(self._written.value.owner.token, self._deadline)

        def change(value: Value) -> Value | Refusal:
            return committing(value, owner, together, noted)

        result = self._claims.ledger.change(self.key, self._written, change, until)
        if isinstance(result, Written):
            self._written = result
            for index, progress in noted.items():
                if self._noted.get(index) is progress:
                    del self._noted[index]
        elif result is None:
            self._claims.counts["uncommitted"] += 1
        else:
            log.warning("a claim cannot be committed: %s", result)
            self._is_over |= result is not Refusal.IS_SENT

    # -- at the end --------------------------------------------------------------------------
    def settle(self, results: Mapping[int, Progress], reply: bytes) -> None:
        """The attempt is over: ``results`` of those it tried, by index; ``reply`` is what its caller is told.

        When nobody is unsent the answer is final, and every twin gets it. Else the claim is released: only those who
        wait now get the answer, and the next one is sent to the others. Whoever is committed and has no result is in
        doubt.

        Blocks until it is stored, ``SETTLE_SECONDS`` at most; then it goes on in the background until the lease is
        over, and the caller may be answered meanwhile. Never raises. Only the first call counts.
        """
        self._end(self._noted | dict(results), orjson.dumps(orjson.loads(reply)))

    def _end(self, results: Mapping[int, Progress], reply: bytes | None) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        owner = self._written.value.owner

        def change(value: Value) -> Value | Refusal:
            return settled(value, owner, results, reply)

        until = time.monotonic() + SETTLE_SECONDS
        result: Written | Refusal | None = None
        if self._lock.acquire(timeout=SETTLE_SECONDS):
            try:
                self._is_over = True
                result = self._claims.ledger.change(self.key, self._written, change, until)
            finally:
                self._lock.release()
        self._is_over = True
        self._claims.ended(self._watch, self._left(result, change))

    def _left(self, result: Written | Refusal | None, change: Change) -> Value | None:
        """What we leave of the claim, None when it is somebody else's by now."""
        if isinstance(result, Written):
            self._written = result
            return result.value
        ledger = self._claims.ledger
        if result is not None:
            ledger.lose(self.key, result)
            return None
        after = change(self._written.value)
        if isinstance(after, Refusal):
            return None
        ledger.change_later(Unsettled(self.key, self._written, after, change, self._held_until, is_withdrawal=False))
        return after

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Left without an answer: who is committed is in doubt, and the next attempt may send to the others."""
        self._end(self._noted, None)


class Claims:
    """The claims of one process. ``claim`` may be called by any number of greenlets."""

    def __init__(self, jetstream: JetStream, config: ClaimsConfig, worker: str) -> None:
        """``worker`` is a name for operators who read a claim."""
        self._config = config
        self._worker = worker
        self.ledger = Ledger(jetstream, config.storage, config.ttl_hours * HOUR_SECONDS)
        self._twins = Twins(self.ledger, config.max_waiting, config.max_waiting_bytes)
        self.counts: Counter[str] = Counter()
        """How ``claim`` ended: ``claimed``, ``taken_over``, ``repeated``, or the name of the ``Reason``; and
        ``uncommitted``: mails that were deferred for want of an acknowledgement."""

    # -- life ----------------------------------------------------------------------------------
    def start(self) -> None:
        """Makes the bucket when it is missing. Blocks for the first try; goes on in the background."""
        self.ledger.start()

    @property
    def off_reason(self) -> str:
        """Why no request_id can be taken, '' while they can."""
        return self.ledger.off_reason

    def limit_waits(self, until: float) -> None:
        """Nobody waits for a twin beyond ``until`` (``time.monotonic()``) from now on: this worker is to stop."""
        self._twins.limit_waits(until)

    def close(self, timeout_seconds: float) -> None:
        """Answers who still waits, and blocks until every outcome is stored, ``timeout_seconds`` at most."""
        self._twins.close()
        self.ledger.close(timeout_seconds)

    def figures(self) -> dict[str, Any]:
        """Numbers and words for status pages and logs."""
        return {
            **self.counts,
            **self.ledger.counts,
            "waiting": self._twins.waiting,
            "to_store": self.ledger.unsettled,
            "off_reason": self.off_reason,
        }

    # -- claim -----------------------------------------------------------------------------------
    def claim(
        self,
        key: str,
        fingerprint: str,
        group_id: str,
        recipients: Sequence[Progress],
        deadline: float,
        *,
        size_bytes: int = 0,
        on_wait: Callable[[], None] | None = None,
    ) -> Claim | Settled | Refused:
        """Claims ``key`` for a request, or says what became of the request that has it.

        ``recipients`` are the ids under which each is to be sent to; who goes on with another attempt's work gets that
        one's ids. Blocks while a twin works on the request, until ``deadline`` (``time.monotonic()``) at most; before
        it waits ``on_wait`` is called, once. ``size_bytes`` is what the request holds meanwhile. Raises nothing for
        what NATS does.
        """
        verdict = self._claim(key, fingerprint, group_id, recipients, deadline, size_bytes, on_wait)
        if isinstance(verdict, Claim):
            self.counts["taken_over" if verdict.attempt > 1 else "claimed"] += 1
        elif isinstance(verdict, Settled):
            self.counts["repeated"] += 1
        else:
            self.counts[verdict.reason.name.lower()] += 1
        return verdict

    def _claim(
        self,
        key: str,
        fingerprint: str,
        group_id: str,
        recipients: Sequence[Progress],
        deadline: float,
        size_bytes: int,
        on_wait: Callable[[], None] | None,
    ) -> Claim | Settled | Refused:
        if self.ledger.off_reason:
            return Refused(Reason.UNAVAILABLE)
        twins = self._twins
        has_waited = False
        seen: Busy | None = None
        watch = twins.find(key)
        if watch is None:
            watch = twins.reserve(key)
            found = self._look(watch, fingerprint, group_id, recipients, deadline)
            if not isinstance(found, Busy):
                return found
            seen = found
        while True:
            on_wait = None if has_waited else on_wait
            answer = twins.wait(watch, fingerprint, deadline, size_bytes=size_bytes, on_wait=on_wait, seen=seen)
            if answer is not None:
                return answer
            has_waited = True
            if time.monotonic() >= deadline:
                twins.give_up(watch)
                return Refused(Reason.IN_PROGRESS)
            found = self._look(watch, fingerprint, group_id, recipients, deadline)
            if isinstance(found, Refused) and found.reason is Reason.UNAVAILABLE and time.monotonic() >= deadline:
                # It was our time that ended, not JetStream: all that is known is that somebody had the claim.
                return Refused(Reason.UNAVAILABLE if watch.is_unreadable else Reason.IN_PROGRESS)
            if not isinstance(found, Busy):
                return found
            seen = found

    def _look(
        self, watch: Watch, fingerprint: str, group_id: str, recipients: Sequence[Progress], deadline: float
    ) -> Claim | Settled | Refused | Busy:
        """Tries to claim a key that is reserved for us; it stays so with a claim of ours, or ``Busy``."""
        try:
            found = self._try(watch, fingerprint, group_id, recipients, deadline)
        except BaseException:
            self._twins.give_up(watch)
            raise
        if isinstance(found, Refused):
            if time.monotonic() < deadline:
                self._twins.refuse(watch, found.reason)
            else:  # others may have more time
                self._twins.give_up(watch)
            return found
        if isinstance(found, Claim) or (found.value.phase in OWNED and found.value.fingerprint == fingerprint):
            return found
        self._twins.give_up(watch, found.value if found.value.phase is Phase.DONE else None)
        return answer_from(found.value, fingerprint)

    def _try(
        self, watch: Watch, fingerprint: str, group_id: str, recipients: Sequence[Progress], deadline: float
    ) -> Claim | Refused | Busy:
        until = min(deadline, time.monotonic() + CLAIM_SECONDS)
        owner = self.owner(secrets.token_urlsafe(9), deadline)
        held_until = deadline + self._config.settling_seconds
        mine, revision = claimed(fingerprint, group_id, recipients, owner), 0
        is_perhaps_stored = False
        pause = Pause(LONGEST_PAUSE_SECONDS)
        while time.monotonic() < until:
            answer = self.ledger.store(watch.key, mine, revision, until)
            if isinstance(answer, Stored):
                return self._claim_of(watch, Written(mine, answer.sequence), deadline, held_until)
            if isinstance(answer, BusRefused) and not isinstance(answer, RevisionConflict):
                return self._unavailable(answer)
            is_perhaps_stored |= isinstance(answer, BusUnavailable)
            found = self.ledger.read(watch.key, until)
            if found is None:
                break
            if isinstance(found, BusRefused):
                return self._unavailable(found)
            if found.value is not None and found.value.owner.token == owner.token:
                return self._claim_of(watch, Written(found.value, found.revision), deadline, held_until)
            if found.revision == revision:  # a write is still under way, or was lost
                pause.take(until)
                continue
            change = self._next(found, claimed(fingerprint, group_id, recipients, owner), until)
            if not isinstance(change, Value):
                return change
            mine, revision = change, found.revision
        if is_perhaps_stored:  # or will be: nobody should have to wait until its lease is over
            self._withdraw(watch.key, Written(mine, revision), held_until)
        return Refused(Reason.UNAVAILABLE)

    def _next(self, found: Found, new: Value, until: float) -> Value | Refused | Busy:
        """What to store after what was found, or why nothing."""
        value = found.value
        if value is None:
            if found.is_there:
                log.error("a claim cannot be read: nothing is sent for its request_id until its TTL is over")
                return Refused(Reason.UNAVAILABLE)
            return new
        if value.phase is Phase.DONE or value.fingerprint != new.fingerprint:
            return Busy(value, found.revision, time.monotonic())
        left_seconds = 0.0
        if value.phase in OWNED:
            age_seconds = self.ledger.age_seconds(found, until)
            if age_seconds is None:
                return Refused(Reason.UNAVAILABLE)
            left_seconds = value.owner.lease_seconds - age_seconds
        after = taken_over(value, new.owner, is_expired=left_seconds <= 0)
        if isinstance(after, Value):
            return after
        return Busy(value, found.revision, time.monotonic() + max(LEAST_LEASE_SECONDS, left_seconds))

    def _claim_of(self, watch: Watch, written: Written, deadline: float, held_until: float) -> Claim:
        watch.busy = Busy(written.value, written.revision, held_until)
        return Claim(self, watch, written, deadline, held_until)

    def _withdraw(self, key: str, written: Written, until: float) -> None:
        owner = written.value.owner

        def change(value: Value) -> Value | Refusal:
            return settled(value, owner, {}, None)

        after = change(written.value)
        if isinstance(after, Value):
            self.ledger.change_later(Unsettled(key, written, after, change, until, is_withdrawal=True))

    def _unavailable(self, error: BusRefused) -> Refused:
        if error.code not in ONE_MESSAGES_OWN:
            self.ledger.refuse(error)
        return Refused(Reason.UNAVAILABLE)

    def owner(self, token: str, deadline: float) -> Owner:
        """Us, for as long as a request with this deadline may take."""
        lease_seconds = seconds_left(deadline) + self._config.settling_seconds
        return Owner(token, self._worker, math.ceil(1000 * lease_seconds) / 1000)

    def ended(self, watch: Watch, left: Value | None) -> None:
        """A claim of ours is over; ``left`` is what it leaves, None when that is not known."""
        self._twins.give_up(watch, left)
