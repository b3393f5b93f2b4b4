"""The bucket of claims as it is written and read: when it is there, what it holds, what could not be stored at once.

A write whose acknowledgement did not come is settled by reading from the stream's leader: each attempt has a token of
its own. A late write cannot undo a later one, since every write names the revision that it replaces: 0 for a key that
was never used or that the bucket's TTL has removed, the marker's for one that was deleted.

Whether a lease has expired is judged by the NATS server's clock alone: the time stamp of the claim's last change
against the time that the server gives when it is asked. So no two machines' clocks are compared.

Sources: the JetStream wire API reference; ADR-8 (KV).
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import gevent

from relay import contract
from relay.bus.client import Publication, seconds_left
from relay.bus.jetstream import NO_MESSAGE_FOUND, JetStream, Stored
from relay.bus.kv import Bucket, Entry
from relay.bus.stored import leader_msg
from relay.errors import BusRefused, BusUnavailable, RevisionConflict
from relay.idempotency.claim import Refusal, Value, read_value
from relay.tracking.record import parse_time
from relay.tracking.storage import (
    DUPLICATE_WINDOW_SECONDS,
    NANOSECONDS,
    NO_JETSTREAM,
    NO_JETSTREAM_CODES,
    NO_JETSTREAM_SECONDS,
    RETRY_SECONDS,
    StorageConfig,
    ensure_stream,
    stream_config,
)

log = logging.getLogger("relay.idempotency")

ASK_SECONDS = 1.0
"""One write or read: what is lost must not take the time to ask again."""
FIRST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.25
LONGEST_UNSETTLED_PAUSE_SECONDS = 1.0
"""Between two tries: about that, doubled from the first to the longest."""
UNSETTLED_AT_ONCE = 500
MAX_UNSETTLED = 20_000
"""Changes that wait for JetStream to come back, about 2 KB each; what is more is left to the lease."""
MAX_WITHDRAWN = 2_000
"""Of those: claims that nobody needs any more. Unless they are withdrawn, they last as long as their lease."""

Change = Callable[[Value], Value | Refusal]
"""What is to become of a claim: called once a try, with the value as it was read then."""


class Written(NamedTuple):
    """A claim as it is now."""

    value: Value
    revision: int


class Found(NamedTuple):
    """A claim as the leader has it."""

    value: Value | None
    """None: there is none, or it is none that we can read."""
    revision: int
    """What the next write must name: 0 when the bucket holds nothing for the key, not even a marker."""
    stored_at: str
    """By the server's clock: RFC 3339."""
    is_there: bool


class Unsettled(NamedTuple):
    """A change that is to be stored when JetStream is back."""

    key: str
    before: Written
    after: Value
    change: Change
    """Gives ``after`` for ``before``, and may give another value if the claim was changed meanwhile."""
    until: float
    is_withdrawal: bool
    """Nobody was answered: it is no loss if it is not stored."""


class Ledger:
    """The claims' bucket. Its methods block the calling greenlet, never beyond the time they are given."""

    def __init__(self, jetstream: JetStream, storage: StorageConfig, ttl_seconds: float) -> None:
        self._jetstream = jetstream
        self._storage = storage
        self._ttl_seconds = ttl_seconds
        self._bucket = Bucket(jetstream, contract.REQUESTS_BUCKET)
        self._starter: gevent.Greenlet | None = None
        self._unsettled: dict[tuple[str, str], Unsettled] = {}
        self._settler: gevent.Greenlet | None = None
        self._is_closed = False
        self.off_reason = "not started yet"
        """Why no claim can be kept, '' while they can."""
        self.counts: Counter[str] = Counter()
        """Outcomes that are not stored: ``lost``, somebody else had the claim; ``unsettled``, there was no time."""

    # -- life ----------------------------------------------------------------------------------
    def start(self) -> None:
        """Makes the bucket when it is missing. Blocks for the first try; goes on in the background."""
        self._say(self._why_unusable())
        if self.off_reason:
            self._start_again()

    def refuse(self, error: BusRefused) -> None:
        """JetStream refuses what it should take: nothing is kept until the bucket has been looked for again."""
        self._say(str(error))
        self._start_again()

    def close(self, timeout_seconds: float) -> None:
        """Blocks until every outcome is stored, ``timeout_seconds`` at most."""
        self._is_closed = True
        if self._settler is not None:
            self._settler.join(timeout_seconds)
        gevent.killall([each for each in (self._settler, self._starter) if each is not None])
        if self.unsettled:
            log.warning("the outcomes of %d requests are not stored; a repetition finds them in doubt", self.unsettled)

    @property
    def unsettled(self) -> int:
        """How many outcomes wait for JetStream."""
        return sum(not each.is_withdrawal for each in self._unsettled.values())

    def _start_again(self) -> None:
        if self._starter is None and not self._is_closed:
            self._starter = gevent.spawn(self._wait_for_bucket)

    def _wait_for_bucket(self) -> None:
        while self.off_reason:
            gevent.sleep(NO_JETSTREAM_SECONDS if self.off_reason == NO_JETSTREAM else RETRY_SECONDS)
            self._say(self._why_unusable())
        self._starter = None

    def _why_unusable(self) -> str:
        try:
            ensure_stream(self._jetstream, self._config())
            info = self._jetstream.stream_info(self._bucket.stream)
        except BusUnavailable as error:
            return str(error)
        except BusRefused as error:
            if error.code in NO_JETSTREAM_CODES:
                return NO_JETSTREAM
            return f"the bucket {contract.REQUESTS_BUCKET} could not be made: {error}"
        kept_seconds = int(info.config.get("max_age") or 0) / NANOSECONDS
        if kept_seconds != self._ttl_seconds:
            log.warning(
                "the bucket %s was made to keep request_ids for %g s, and does", contract.REQUESTS_BUCKET, kept_seconds
            )
        return ""

    def _config(self) -> dict[str, object]:
        ttl_nanoseconds = int(self._ttl_seconds * NANOSECONDS)
        return stream_config(
            self._storage,
            name=self._bucket.stream,
            subjects=[f"$KV.{contract.REQUESTS_BUCKET}.>"],
            max_msgs_per_subject=1,
            discard="new",
            deny_delete=True,
            allow_rollup_hdrs=True,
            max_age=ttl_nanoseconds,
            duplicate_window=min(DUPLICATE_WINDOW_SECONDS * NANOSECONDS, ttl_nanoseconds),
        )

    def _say(self, off_reason: str) -> None:
        if off_reason != self.off_reason:
            if off_reason:
                log.warning("no request_id can be taken: %s", off_reason)
            else:
                log.info("request_ids can be taken")
        self.off_reason = off_reason

    # -- read ------------------------------------------------------------------------------------
    def peek(self, key: str) -> Entry | None:
        """The claim as some replica has it, which may be late. Raises ``BusUnavailable`` and ``BusRefused``."""
        return self._bucket.get(key, ASK_SECONDS)

    def read(self, key: str, until: float) -> Found | BusRefused | None:
        """The claim as the leader has it, asked for again as long as it does not answer; None: it never did."""
        while time.monotonic() < until:
            asked = time.monotonic()
            try:
                return self._read(key, _patience(until))
            except BusUnavailable:
                if time.monotonic() < asked + FIRST_PAUSE_SECONDS:  # not connected: it is said at once
                    gevent.sleep(min(FIRST_PAUSE_SECONDS, seconds_left(until)))
            except BusRefused as error:
                return error
        return None

    def _read(self, key: str, timeout_seconds: float) -> Found:
        question = {"last_by_subj": f"$KV.{contract.REQUESTS_BUCKET}.{key}"}
        try:
            answer = self._jetstream.api(f"STREAM.MSG.GET.{self._bucket.stream}", question, timeout_seconds)
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return Found(None, 0, "", False)
            raise
        msg = leader_msg(answer)
        value = None if msg.is_deleted else read_value(msg.payload)
        return Found(value, msg.sequence, str(answer["message"].get("time", "")), not msg.is_deleted)

    def age_seconds(self, found: Found, until: float) -> float | None:
        """How long ago a claim was changed last, by the server's clock; None when it does not say."""
        try:
            info = self._jetstream.stream_info(self._bucket.stream, _patience(until))
        except (BusUnavailable, BusRefused):
            return None
        asked_at, stored_at = parse_time(info.asked_at), parse_time(found.stored_at)
        if asked_at is None or stored_at is None:
            return None
        return (asked_at - stored_at).total_seconds()

    # -- write -----------------------------------------------------------------------------------
    def store(self, key: str, value: Value, revision: int, until: float) -> Stored | BusUnavailable | BusRefused:
        """One try to store ``value`` if the claim is still at ``revision``; ``RevisionConflict`` when it is not."""
        (answer,) = self._jetstream.store([self._publication(key, value, revision)], _patience(until))
        return answer

    def change(self, key: str, before: Written, change: Change, until: float) -> Written | Refusal | None:
        """Changes a claim of ours; None: it is not known whether it is stored."""
        pause = Pause(LONGEST_PAUSE_SECONDS)
        while True:
            after = change(before.value)
            if isinstance(after, Refusal):
                return after
            answer = self.store(key, after, before.revision, until)
            if isinstance(answer, Stored):
                return Written(after, answer.sequence)
            if isinstance(answer, BusRefused) and not isinstance(answer, RevisionConflict):
                log.warning("a claim cannot be written: %s", answer)
                return None
            found = self.read(key, until)
            if found is None or isinstance(found, BusRefused):
                return None
            if found.value is None or found.value.owner.token != after.owner.token:
                return Refusal.NOT_OURS
            if found.value == after:
                return Written(after, found.revision)
            if found.revision == before.revision:  # our own write is still under way, or was lost
                pause.take(until)
            if time.monotonic() >= until:
                return None
            before = Written(found.value, found.revision)

    def _publication(self, key: str, value: Value, revision: int) -> Publication:
        return self._bucket.replacement(key, value.as_json(), revision)

    # -- what could not be stored at once ----------------------------------------------------------
    def change_later(self, unsettled: Unsettled) -> None:
        """Goes on trying in the background until its time is over."""
        limit = MAX_WITHDRAWN if unsettled.is_withdrawal else MAX_UNSETTLED
        if len(self._unsettled) >= limit or self._is_closed:
            self.counts["unsettled"] += not unsettled.is_withdrawal
            return
        self._unsettled[unsettled.key, unsettled.before.value.owner.token] = unsettled
        if self._settler is None or self._settler.dead:
            self._settler = gevent.spawn(self._settle)

    def lose(self, key: str, why: Refusal) -> None:
        """The outcome of a request is not stored, since its claim is not ours any more."""
        self.counts["lost"] += 1
        log.warning("the outcome of a request is not stored: %s", why, extra={"claim": key})

    def _settle(self) -> None:
        pause = Pause(LONGEST_UNSETTLED_PAUSE_SECONDS)
        while self._unsettled:
            pause.take(float("inf"))
            for name, each in list(self._unsettled.items()):
                if time.monotonic() >= each.until:
                    self._give_up(name, each)
            batch = list(self._unsettled.items())[:UNSETTLED_AT_ONCE]
            for name, _ in batch:  # the next time it is the others' turn
                self._unsettled[name] = self._unsettled.pop(name)
            self._settle_batch(batch)

    def _give_up(self, name: tuple[str, str], each: Unsettled) -> None:
        del self._unsettled[name]
        if not each.is_withdrawal:
            self.counts["unsettled"] += 1
            log.warning(
                "the outcome of a request is not stored; a repetition finds it in doubt", extra={"claim": each.key}
            )

    def _settle_batch(self, batch: list[tuple[tuple[str, str], Unsettled]]) -> None:
        publications = [self._publication(each.key, each.after, each.before.revision) for _, each in batch]
        for (name, each), answer in zip(batch, self._jetstream.store(publications, ASK_SECONDS), strict=True):
            if isinstance(answer, Stored):
                del self._unsettled[name]
            elif isinstance(answer, RevisionConflict):
                result = self.change(each.key, each.before, each.change, time.monotonic() + ASK_SECONDS)
                if result is None:
                    continue
                del self._unsettled[name]
                if isinstance(result, Refusal) and not each.is_withdrawal:
                    self.lose(each.key, result)


class Pause:
    """A random pause that grows."""

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self._seconds = FIRST_PAUSE_SECONDS

    def take(self, until: float) -> None:
        """Blocks for it, and not longer than until then."""
        gevent.sleep(min(random.uniform(self._seconds / 2, self._seconds), seconds_left(until)))
        self._seconds = min(2 * self._seconds, self._longest_seconds)


def _patience(until: float) -> float:
    return min(ASK_SECONDS, seconds_left(until))
