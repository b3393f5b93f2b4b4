"""A group's mails with their records, piece by piece, from any place on; and the cursor that names a place.

A group's mails are those of lfx's array, if it has one, then those of the log that the array lacks: each once. Both
only grow at their ends, so a place is an index into the array and a sequence of the log, and stays what it is while
mails are sent. Nothing is kept between two pages.

Everything comes over one connection to NATS, and what a small question waits for is the records of a large one that
are ahead of it. So pieces are small, each gives way to the small questions in hand, and large questions take turns
(``Traffic``).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore

from relay import contract
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket, Entry
from relay.errors import BusRefused, BusUnavailable, SubmissionRejected
from relay.tracking.groups import group_token
from relay.tracking.legacy import GroupIndex
from relay.tracking.log import Fact, Log
from relay.tracking.record import is_email_id, parse_record

T = TypeVar("T")

PIECE_MAILS = 100
"""Mails read at a time: ≈ 2 ms, where the bus is busy with nothing else."""

LARGE_AT_ONCE = 1
"""Large questions a worker works on at a time: a second one would make small ones wait twice as long."""

GIVE_WAY_SECONDS = 0.02
"""How long a piece waits for small questions at most: with a stream of them large ones shall get on all the same."""

LARGE_WAITING = 100
"""Large questions that may wait for their turn."""


class Place(NamedTuple):
    """Where in a group a mail stands: an index into lfx's array, or, behind its end, a sequence of the log."""

    array_index: int = 0
    sequence: int = 1


_START = Place()


class Mail(NamedTuple):
    """A mail of a group and its record."""

    email_id: str
    place: Place
    value: bytes
    record: dict[str, Any]


class Piece(NamedTuple):
    """Some mails of a group, in their order; those without a record, or with a broken one, are left out."""

    mails: list[Mail]
    covered: int
    """How many mails it is about, with and without a record."""
    next_place: Place | None
    """Where it goes on, None behind the last."""


class Glance(NamedTuple):
    """A group's figures. The times are '' when there is none, or when they were not asked for."""

    counts: dict[str, int]
    """Facts of each kind in the log, from one moment."""
    array: list[str] | None
    """lfx's array, None when the group has none."""
    first_sent_at: str = ""
    last_event_at: str = ""

    @property
    def mails(self) -> int:
        """At least so many mails are in the group."""
        return max(self.counts.get(Fact.SENT, 0), len(self.array or ()))

    @property
    def is_known(self) -> bool:
        """Whether there is such a group."""
        return self.array is not None or self.mails > 0


class Group:
    """One group as a question finds it. Raises ``BusUnavailable``, ``BusRefused``."""

    def __init__(self, reader: GroupReader, group_id: str, array: list[str]) -> None:
        self._reader = reader
        self._token = group_token(group_id)
        self._array = array
        self._in_array = frozenset(array)

    def read(self, place: Place, seen: set[str], mails: int = PIECE_MAILS) -> Piece:
        """The mails from ``place`` on: at most ``mails``, and at most a piece.

        Those of the log that are in ``seen`` are left out, the others go in there: a mail may have been logged twice.
        """
        mails = min(mails, PIECE_MAILS)
        if place.array_index < len(self._array):
            end = place.array_index + mails
            listed = [
                (email_id, Place(index, place.sequence))
                for index, email_id in enumerate(self._array[place.array_index : end], place.array_index)
                if is_email_id(email_id)
            ]
            next_place: Place | None = Place(min(end, len(self._array)), place.sequence)
        else:
            page = self._reader.log.page(self._token, place.sequence, mails)
            listed = []
            for email_id, sequence in page.sent:
                if email_id not in self._in_array and email_id not in seen:
                    seen.add(email_id)
                    listed.append((email_id, Place(place.array_index, sequence)))
            next_place = None if page.next_sequence is None else Place(place.array_index, page.next_sequence)
        return Piece(self._reader.mails(listed), len(listed), next_place)

    def pieces(self, deadline: float, place: Place = _START, mails: int | None = None) -> Iterator[Piece]:
        """The group's mails from ``place`` on, each once: all, or the next ``mails``.

        Raises ``BusUnavailable`` when ``deadline`` (``time.monotonic()``) is over.
        """
        seen: set[str] = set()
        left = PIECE_MAILS if mails is None else mails
        while left:
            if time.monotonic() > deadline:
                raise BusUnavailable("a group could not be read in time")
            self._reader.traffic.give_way()
            piece = self.read(place, seen, left)
            yield piece
            if piece.next_place is None:
                return
            place = piece.next_place
            if mails is not None:
                left -= piece.covered


class GroupReader:
    """Reads groups: the log and lfx's array say who is in one, the bucket holds the records."""

    def __init__(self, jetstream: JetStream) -> None:
        self._records = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._index = GroupIndex(jetstream)
        self.log = Log(jetstream)
        self.traffic = Traffic()

    def look(self, group_id: str, *, with_times: bool = False) -> Glance:
        """What can be said of a group without reading its mails: as many requests whatever its size, all at once."""
        token = group_token(group_id)
        questions: list[Callable[[], Any]] = [
            partial(self.log.counts, token),
            partial(self._index.email_ids, group_id),
        ]
        if with_times:
            questions += [partial(self.log.first_sent_at, token), partial(self.log.last_event_at, token)]
        with self.traffic.hurried():
            asked = [gevent.spawn(_answer, question) for question in questions]
            gevent.joinall(asked)
        answers = [each.value for each in asked]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return Glance(*answers)

    def group(self, group_id: str, array: list[str] | None) -> Group:
        """The group, with lfx's array when it has one."""
        return Group(self, group_id, array or [])

    def record(self, email_id: str) -> Entry | None:
        """The mail's entry in the bucket, None when it has none, or when the id could not be a key."""
        if not is_email_id(email_id):
            return None
        with self.traffic.hurried():
            return self._records.get(email_id)

    def mails(self, listed: list[tuple[str, Place]]) -> list[Mail]:
        """The listed mails that have a record, in their order."""
        self.traffic.give_way()
        entries = self._records.get_many([email_id for email_id, _ in listed])
        found = []
        for email_id, place in listed:
            entry = entries.get(email_id)
            record = parse_record(entry.value) if entry is not None else None
            if entry is not None and record is not None:
                found.append(Mail(email_id, place, entry.value, record))
        return found


def _answer(question: Callable[[], T]) -> T | BusUnavailable | BusRefused:
    """The answer, or the error as a value: a greenlet that raises has its traceback printed."""
    try:
        return question()
    except (BusUnavailable, BusRefused) as error:
        return error


class Traffic:
    """Who goes first: small questions at once, large ones in turn, and too many large ones not at all."""

    def __init__(self) -> None:
        self._turns = BoundedSemaphore(LARGE_AT_ONCE)
        self._hurried = 0
        self._nobody_hurries = Event()
        self._nobody_hurries.set()
        self.waiting = 0
        """Large questions that wait for their turn."""

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Around a small question's wait for NATS: pieces begin when it is over."""
        self._hurried += 1
        self._nobody_hurries.clear()
        try:
            yield
        finally:
            self._hurried -= 1
            if not self._hurried:
                self._nobody_hurries.set()

    def give_way(self) -> None:
        """Blocks while small questions are in hand, at most ``GIVE_WAY_SECONDS``."""
        self._nobody_hurries.wait(GIVE_WAY_SECONDS)

    @contextlib.contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """A turn. Raises ``BusUnavailable`` when there is none before ``deadline`` (``time.monotonic()``)."""
        if self.waiting >= LARGE_WAITING:
            raise BusUnavailable("too many large groups are being asked for")
        self.waiting += 1
        try:
            has_turn = self._turns.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            self.waiting -= 1
        if not has_turn:
            raise BusUnavailable("other large groups were being read all the time")
        try:
            yield
        finally:
            self._turns.release()


# -- cursors ----------------------------------------------------------------------------------------------------------
# Version, index, sequence; which group; a checksum over both. Whoever may ask for a group may read all of it, so there
# is nothing to protect: the checksum tells a cursor from anything else, the group from another one's.
_PLACE = struct.Struct(">BIQ")
_VERSION = 1
_GROUP_BYTES = 8
_CHECKSUM_BYTES = 6
_CURSOR_CHARACTERS = (_PLACE.size + _GROUP_BYTES + _CHECKSUM_BYTES) * 4 // 3


def encode_cursor(group_id: str, place: Place) -> str:
    """A place in a group as text for a caller: letters, digits, ``-`` and ``_``."""
    body = _PLACE.pack(_VERSION, *place) + _digest(group_id.encode("utf-8", "surrogatepass"), _GROUP_BYTES)
    return base64.urlsafe_b64encode(body + _digest(body, _CHECKSUM_BYTES)).decode()


def decode_cursor(group_id: str, cursor: str) -> Place:
    """The place that ``encode_cursor`` was given, by whatever worker.

    Raises ``SubmissionRejected`` with ``INVALID_CURSOR`` or ``CURSOR_OF_ANOTHER_GROUP``.
    """
    try:
        octets = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        octets = b""
    body, checksum = octets[:-_CHECKSUM_BYTES], octets[-_CHECKSUM_BYTES:]
    if len(cursor) != _CURSOR_CHARACTERS or checksum != _digest(body, _CHECKSUM_BYTES) or body[0] != _VERSION:
        raise SubmissionRejected(contract.INVALID_CURSOR, "cursor")
    if body[_PLACE.size :] != _digest(group_id.encode("utf-8", "surrogatepass"), _GROUP_BYTES):
        raise SubmissionRejected(contract.CURSOR_OF_ANOTHER_GROUP, "cursor")
    _, index, sequence = _PLACE.unpack(body[: _PLACE.size])
    return Place(index, sequence)


def _digest(octets: bytes, length: int) -> bytes:
    return hashlib.blake2b(octets, digest_size=length, person=b"relay cursor").digest()
