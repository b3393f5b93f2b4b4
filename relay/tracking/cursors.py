"""A place in a group, and the cursor that names it to a caller. Pure.

Version, index, sequence; which group; which log; a checksum over all. Whoever may ask for a group may read all of it,
so there is nothing to protect: the checksum tells a cursor from anything else, the group from another one's. The log
is in it because the sequences of one made anew mean something else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from typing import NamedTuple

from relay import contract
from relay.errors import SubmissionRejected


class Place(NamedTuple):
    """Where in a group a mail stands: an index into lfx's array, or, behind its end, a sequence of the log."""

    array_index: int = 0
    sequence: int = 1


_PLACE = struct.Struct(">BIQ")
_VERSION = 2
_GROUP_BYTES = 8
_LOG_BYTES = 4
_CHECKSUM_BYTES = 5
_ANY_LOG = bytes(_LOG_BYTES)
CURSOR_CHARACTERS = (_PLACE.size + _GROUP_BYTES + _LOG_BYTES + _CHECKSUM_BYTES) * 4 // 3


def encode_cursor(group_id: str, place: Place, log_made_at: str = "") -> str:
    """A place in a group as text for a caller: letters, digits, ``-`` and ``_``.

    Good for the log that was made then; for any, when that is not said.
    """
    body = _PLACE.pack(_VERSION, *place) + _of_group(group_id) + _of_log(log_made_at)
    return base64.urlsafe_b64encode(body + _digest(body, _CHECKSUM_BYTES)).decode()


def decode_cursor(group_id: str, cursor: str, log_made_at: str = "") -> Place:
    """The place that ``encode_cursor`` was given, by whatever worker.

    Raises ``SubmissionRejected`` with ``CURSOR_OF_ANOTHER_GROUP``, or with ``INVALID_CURSOR``, also when it is of
    another log than the one made then; of any, when that is not said.
    """
    try:
        octets = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        octets = b""
    body, checksum = octets[:-_CHECKSUM_BYTES], octets[-_CHECKSUM_BYTES:]
    if len(cursor) != CURSOR_CHARACTERS or checksum != _digest(body, _CHECKSUM_BYTES) or body[0] != _VERSION:
        raise SubmissionRejected(contract.INVALID_CURSOR, "cursor")
    if body[_PLACE.size : -_LOG_BYTES] != _of_group(group_id):
        raise SubmissionRejected(contract.CURSOR_OF_ANOTHER_GROUP, "cursor")
    if _ANY_LOG != body[-_LOG_BYTES:] != _of_log(log_made_at) != _ANY_LOG:
        raise SubmissionRejected(contract.INVALID_CURSOR, "cursor")
    _, index, sequence = _PLACE.unpack(body[: _PLACE.size])
    return Place(index, sequence)


def _of_group(group_id: str) -> bytes:
    return _digest(group_id.encode("utf-8", "surrogatepass"), _GROUP_BYTES)


def _of_log(log_made_at: str) -> bytes:
    return _digest(log_made_at.encode(), _LOG_BYTES) if log_made_at else _ANY_LOG


def _digest(octets: bytes, length: int) -> bytes:
    return hashlib.blake2b(octets, digest_size=length, person=b"relay cursor").digest()
