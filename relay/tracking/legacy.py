"""lfx's group index: the bucket ``email-group-index``, one JSON array of email_ids per group. Read, never written.

lfx rewrites a group's array for every mail, so it only ever grows at its end, and holds at most about 26,800 ids. Its
key is the group id as given; ids that its client refuses as a key (nats.go: letters, digits and ``-/_=.``, no dot at
either end) have no array.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict

import orjson

from relay import contract
from relay.bus.jetstream import DENIED, STREAM_NOT_FOUND, JetStream
from relay.errors import BusRefused

log = logging.getLogger("relay.tracking")

MAX_KEY_LENGTH = 4000
"""A longer subject fits into no control line (4,096 bytes): lfx cannot have written it."""

REMEMBERED_ARRAYS = 4
"""Arrays that are not parsed again as long as they stay what they are: each takes some 3 MB at most."""

_KEY = re.compile(r"[-/_=A-Za-z0-9]+(?:\.[-/_=A-Za-z0-9]+)*")


class GroupIndex:
    """Questions to lfx's bucket, which may not exist."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._is_denial_told = False
        self._parsed: OrderedDict[str, tuple[int, list[str] | None]] = OrderedDict()
        """By group id: the revision and what it holds, None where it is broken; the least recently asked for first."""

    def email_ids(self, group_id: str, timeout_seconds: float | None = None) -> list[str] | None:
        """The ids in the group's array, in its order, each once; None when there is no array, or a broken one.

        They are not checked: look at each before it becomes a key. Not the caller's to change: the next one may be
        given the same list. One request, asked of the leader, which answers whether or not the bucket exists. Raises
        ``BusUnavailable``, ``BusRefused``.
        """
        if len(group_id) > MAX_KEY_LENGTH or not _KEY.fullmatch(group_id):
            return None
        nats_subject = f"$KV.{contract.GROUP_INDEX_BUCKET}.{group_id}"
        try:
            stream = f"KV_{contract.GROUP_INDEX_BUCKET}"
            found = self._jetstream.get_last_from_leader(stream, nats_subject, timeout_seconds)
        except BusRefused as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            if error.code == DENIED:
                self._tell_of_denial(error)
                return None
            raise
        if found is None or found.is_deleted:
            return None
        revision, email_ids = self._parsed.get(group_id, (0, None))
        if revision == found.sequence:
            self._parsed.move_to_end(group_id)
            return email_ids
        parsed = parse_index(found.payload)
        if parsed is None:
            log.warning("lfx's array of a group is broken; the group is answered from the log alone")
        self._parsed[group_id] = (found.sequence, parsed)
        self._parsed.move_to_end(group_id)
        if len(self._parsed) > REMEMBERED_ARRAYS:
            self._parsed.popitem(last=False)
        return parsed

    def _tell_of_denial(self, error: BusRefused) -> None:
        if not self._is_denial_told:
            self._is_denial_told = True
            log.warning("lfx's arrays cannot be read, groups are answered from the log alone: %s", error)


def parse_index(value: bytes) -> list[str] | None:
    """The texts in an array as lfx writes it, each once; ``null`` is an empty one. None when it is broken."""
    try:
        array = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    if array is None:
        return []
    if not isinstance(array, list):
        return None
    return list(dict.fromkeys(each for each in array if isinstance(each, str)))
