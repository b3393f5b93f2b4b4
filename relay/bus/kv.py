"""A KV bucket (ADR-8): create, get, get many. A bucket is the stream ``KV_<bucket>``.

Keys come checked: whoever builds a key from what a caller sent checks it first
(``tracking.record.is_email_id``), because the server takes ``*`` and ``>`` as keys and later reads them
as wildcards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from relay.bus.client import Publication
from relay.bus.jetstream import EXPECTED_LAST_SUBJECT_SEQUENCE, MULTI_GET_LIMIT, JetStream


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

    def creation(self, key: str, value: bytes) -> Publication:
        """The publication that stores ``value`` if, and only if, the key does not exist."""
        return Publication(self._prefix + key, value, _MUST_NOT_EXIST)

    def get(self, key: str) -> Entry | None:
        """The key's value, None when it has none. A miss is asked again of the leader: replicas lag.

        Raises ``BusUnavailable``, ``BusRefused``.
        """
        nats_subject = self._prefix + key
        found = self._jetstream.get_last(self._stream, nats_subject)
        if found is None:
            found = self._jetstream.get_last_from_leader(self._stream, nats_subject)
        if found is None or found.is_deleted:
            return None
        return Entry(key, found.payload, found.sequence)

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """The values of those of ``keys`` that have one; any number of keys, 1,000 a request.

        Raises ``BusUnavailable``, ``BusRefused``.
        """
        entries: dict[str, Entry] = {}
        for start in range(0, len(keys), MULTI_GET_LIMIT):
            nats_subjects = [self._prefix + key for key in keys[start : start + MULTI_GET_LIMIT]]
            for found in self._jetstream.get_many(self._stream, {"multi_last": nats_subjects}):
                if not found.is_deleted:
                    key = found.nats_subject.removeprefix(self._prefix)
                    entries[key] = Entry(key, found.payload, found.sequence)
        return entries


_MUST_NOT_EXIST = {EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
