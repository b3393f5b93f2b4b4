"""lfx's group index: the bucket ``email-group-index``, one JSON array of email_ids per group. Read, never written.

lfx rewrites a group's array for every mail, so it only ever grows at its end, and holds at most about 26,800 ids. Its
key is the group id as given; ids that its client refuses as a key (nats.go: letters, digits and ``-/_=.``, no dot at
either end) have no array.
"""

from __future__ import annotations

import logging
import re

import orjson

from relay import contract
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream
from relay.errors import BusRefused

log = logging.getLogger("relay.tracking")

_KEY = re.compile(r"[-/_=A-Za-z0-9]+(?:\.[-/_=A-Za-z0-9]+)*")


class GroupIndex:
    """Questions to lfx's bucket, which may not exist."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def email_ids(self, group_id: str) -> list[str] | None:
        """The ids in the group's array, in its order, each once; None when there is no array, or a broken one.

        They are not checked: look at each before it becomes a key. One request, asked of the leader, which takes a key
        of any length and answers whether or not the bucket exists. Raises ``BusUnavailable``, ``BusRefused``.
        """
        if not _KEY.fullmatch(group_id):
            return None
        nats_subject = f"$KV.{contract.GROUP_INDEX_BUCKET}.{group_id}"
        try:
            found = self._jetstream.get_last_from_leader(f"KV_{contract.GROUP_INDEX_BUCKET}", nats_subject)
        except BusRefused as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            raise
        if found is None or found.is_deleted:
            return None
        email_ids = parse_index(found.payload)
        if email_ids is None:
            log.warning("lfx's array of a group is broken; the group is answered from the log alone")
        return email_ids


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
