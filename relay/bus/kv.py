"""A KV bucket (ADR-8): get, put, create, compare-and-set, delete, scan. A bucket is the stream ``KV_<bucket>``.

Keys come checked: whoever builds a key from what a caller sent checks it first
(``tracking.record.is_email_id``), because the server takes ``*`` and ``>`` as keys and later reads them
as wildcards.

Deadlines and errors are ``jetstream``'s: every call blocks for ``timeout_seconds`` at most, or for the
``JetStream``'s own, and raises ``BusUnavailable`` and ``BusRefused``. A write that raised ``BusUnavailable``
may or may not have been stored.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import gevent

from relay.bus.client import Publication, seconds_left
from relay.bus.jetstream import EXPECTED_LAST_SUBJECT_SEQUENCE, PAGE_LIMIT, JetStream
from relay.bus.messages import FixedHeaders
from relay.bus.stored import Stored, StoredMsg
from relay.errors import BusUnavailable, RevisionConflict

UPDATE_TRIES = 8
ASK_SECONDS = 1.0
"""One request of an update: what is lost must not take the time to ask again."""
FIRST_PAUSE_SECONDS = 0.005
LONGEST_PAUSE_SECONDS = 0.25
"""Between two tries of an update: a random time up to the first, twice that, and so on up to the longest."""


class Entry(NamedTuple):
    """A key's current value. ``revision`` is what a compare-and-set must name."""

    key: str
    value: bytes
    revision: int


class Bucket:
    """One KV bucket with history 1."""

    def __init__(self, jetstream: JetStream, name: str) -> None:
        self._jetstream = jetstream
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    @property
    def stream(self) -> str:
        """The stream behind the bucket."""
        return self._stream

    # -- publications, for who writes several things at once --------------------------------
    def creation(self, key: str, value: bytes) -> Publication:
        """The publication that stores ``value`` if, and only if, the key was never used."""
        return Publication(self._prefix + key, value, _MUST_NOT_EXIST)

    def replacement(self, key: str, value: bytes, revision: int) -> Publication:
        """The publication that stores ``value`` if, and only if, the key is still at ``revision``."""
        return Publication(self._prefix + key, value, {EXPECTED_LAST_SUBJECT_SEQUENCE: str(revision)})

    # -- read ------------------------------------------------------------------------------
    def get(self, key: str, timeout_seconds: float | None = None) -> Entry | None:
        """The key's value, None when it has none. A miss is asked again of the leader: replicas lag."""
        return self._entry(self._jetstream.get_last(self._stream, self._prefix + key, timeout_seconds))

    def get_from_leader(self, key: str, timeout_seconds: float | None = None) -> Entry | None:
        """The same, never stale: for reads that a ``replacement`` follows."""
        return self._entry(self._jetstream.get_last_from_leader(self._stream, self._prefix + key, timeout_seconds))

    def is_deleted(self, key: str, timeout_seconds: float | None = None) -> bool:
        """Whether the key had a value and has none any more, as the leader knows."""
        found = self._jetstream.get_last_from_leader(self._stream, self._prefix + key, timeout_seconds)
        return found is not None and found.is_deleted

    def get_many(self, keys: Sequence[str], timeout_seconds: float | None = None) -> dict[str, Entry]:
        """The values of those of ``keys`` that have one; any number of keys, 1,000 a request.

        Misses are asked again of the leader.
        """
        nats_subjects = [self._prefix + key for key in keys]
        found = self._jetstream.get_last_of_each(self._stream, nats_subjects, timeout_seconds)
        entries = (self._entry(each) for each in found.values())
        return {entry.key: entry for entry in entries if entry is not None}

    def scan(
        self, keys: str = ">", *, page_limit: int = PAGE_LIMIT, timeout_seconds: float | None = None
    ) -> Iterator[list[Entry]]:
        """Every entry whose key matches (``*`` and ``>`` are wildcards), page by page, the longest unchanged first.

        Holds one page in memory: ``page_limit`` entries or about 4 MB. ``timeout_seconds`` is a page's. Every key
        that is there from begin to end comes at least once; one that is changed meanwhile may come again, later,
        with its new value.
        """
        sequence: int | None = 1
        while sequence is not None:
            page = self._jetstream.page(
                self._stream, self._prefix + keys, sequence, page_limit, timeout_seconds=timeout_seconds
            )
            entries = [entry for each in page.msgs if (entry := self._entry(each)) is not None]
            if entries:
                yield entries
            sequence = page.next_sequence

    # -- write -----------------------------------------------------------------------------
    def put(self, key: str, value: bytes, timeout_seconds: float | None = None) -> Entry:
        """Stores ``value``, whatever the key had. May be repeated."""
        return self._store(key, Publication(self._prefix + key, value), timeout_seconds)

    def create(self, key: str, value: bytes, timeout_seconds: float | None = None) -> Entry:
        """Stores ``value`` for a key that has none, or has none any more. Raises ``RevisionConflict`` when it has one.

        On a repetition after ``BusUnavailable`` the value that it has may be the caller's own.
        """
        deadline = self._jetstream.deadline(timeout_seconds)
        try:
            return self._store(key, self.creation(key, value), seconds_left(deadline))
        except RevisionConflict:
            found = self._jetstream.get_last_from_leader(self._stream, self._prefix + key, seconds_left(deadline))
            if found is None or not found.is_deleted:
                raise
        return self._store(key, self.replacement(key, value, found.sequence), seconds_left(deadline))

    def update(
        self, key: str, change: Callable[[bytes | None], bytes | None], *, deadline: float, tries: int = UPDATE_TRIES
    ) -> Entry | None:
        """Replaces the key's value by ``change(value)`` (None: it has none); the entry as it then is, None without one.

        ``change`` gives None, or the value it was given, when there is nothing to do. It is called once a try: the
        value is read from the leader and stored only if it is still the one read, else read again after a short
        random pause. A lost acknowledgement is settled in the same way, so ``change`` is applied exactly once when it
        is idempotent: given its own result, it has nothing to do.

        ``deadline`` is on ``time.monotonic()``. Raises ``RevisionConflict`` after ``tries`` that others were faster
        than, ``BusUnavailable`` when the last try was not answered (it may or may not have been stored) or the
        deadline has passed, ``BusRefused``.
        """
        problem: BusUnavailable | RevisionConflict = BusUnavailable("there was no time left for an update")
        pause_seconds = FIRST_PAUSE_SECONDS
        for number in range(tries):
            if number:
                gevent.sleep(min(random.uniform(0, pause_seconds), seconds_left(deadline)))
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            if time.monotonic() >= deadline:
                break
            try:
                return self._try_to_update(key, change, deadline)
            except (BusUnavailable, RevisionConflict) as error:
                problem = error
        raise problem

    def _try_to_update(self, key: str, change: Callable[[bytes | None], bytes | None], deadline: float) -> Entry | None:
        nats_subject = self._prefix + key
        patience_seconds = min(ASK_SECONDS, seconds_left(deadline))
        found = self._jetstream.get_last_from_leader(self._stream, nats_subject, patience_seconds)
        entry = self._entry(found)
        value = change(entry.value if entry is not None else None)
        if value is None or (entry is not None and value == entry.value):
            return entry
        patience_seconds = min(ASK_SECONDS, seconds_left(deadline))
        revision = found.sequence if found is not None else 0
        return self._store(key, self.replacement(key, value, revision), patience_seconds)

    def delete(self, key: str, timeout_seconds: float | None = None) -> None:
        """Takes the key's value away and leaves a marker. May be repeated."""
        self._store(key, Publication(self._prefix + key, b"", {"KV-Operation": "DEL"}), timeout_seconds)

    def purge(self, key: str, timeout_seconds: float | None = None) -> None:
        """The same, with everything that a bucket with a longer history remembers of the key."""
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        self._store(key, Publication(self._prefix + key, b"", headers), timeout_seconds)

    def _store(self, key: str, publication: Publication, timeout_seconds: float | None) -> Entry:
        (answer,) = self._jetstream.store([publication], timeout_seconds)
        if not isinstance(answer, Stored):
            raise answer
        return Entry(key, publication.payload, answer.sequence)

    def _entry(self, found: StoredMsg | None) -> Entry | None:
        if found is None or found.is_deleted:
            return None
        return Entry(found.nats_subject.removeprefix(self._prefix), found.payload, found.sequence)


_MUST_NOT_EXIST = FixedHeaders({EXPECTED_LAST_SUBJECT_SEQUENCE: "0"})
