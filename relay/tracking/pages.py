"""A group's mails with their records, piece by piece, from any place on.

A group's mails are those of lfx's array, if it has one, then those of the log that the array lacks: each once. Both
only grow at their ends, so a place is an index into the array and a sequence of the log, and stays what it is while
mails are sent. Nothing is kept between two pages.

Everything comes over one connection to NATS, and what a small question waits for is the records of a large one that
are ahead of it. So pieces are small, each gives way to the small questions in hand, and large questions take turns
(``Traffic``).

The server hangs up on a client that has more to read than ``max_pending`` (64 MiB), and everything in hand is lost. So
what may be under way at a time is bounded in bytes, whatever the records are: ``ARRAYS_AT_ONCE``, ``PIECES_AT_ONCE`` of
``PIECE_BYTES``, ``RECORDS_AT_ONCE``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore

from relay import contract
from relay.bus.client import seconds_left
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket, Entry
from relay.errors import BusRefused, BusUnavailable
from relay.tracking.cursors import Place, decode_cursor, encode_cursor
from relay.tracking.facts import Fact
from relay.tracking.groups import group_token
from relay.tracking.legacy import GroupIndex
from relay.tracking.log import Log
from relay.tracking.record import is_email_id, parse_record

__all__ = ["Glance", "Group", "GroupReader", "Mail", "Piece", "Place", "Traffic", "decode_cursor", "encode_cursor"]

T = TypeVar("T")

PIECE_MAILS = 100
"""Mails read at a time: ≈ 2 ms, where the bus is busy with nothing else."""

LARGE_AT_ONCE = 1
"""Large questions a worker works on at a time: a second one would make small ones wait twice as long."""

GIVE_WAY_SECONDS = 0.02
"""How long a piece waits for small questions at most: with a stream of them large ones shall get on all the same."""

LARGE_WAITING = 30
"""Large questions that may wait for their turn."""

ARRAYS_AT_ONCE = 4
"""Arrays of lfx's that are asked for at a time: up to 1.4 MB each under way."""

PIECE_BYTES = 4 * 1024 * 1024
"""Of the records that are asked for in one request, unless the first alone is larger."""

PIECES_AT_ONCE = 6
"""Such requests at a time."""

RECORDS_AT_ONCE = 40
"""Single records that are asked for at a time: up to 64 KiB each, in a bucket of lfx's."""


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
    log_made_at: str = ""
    """When the log was made: a cursor is of one log."""

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

    @cached_property
    def _in_array(self) -> frozenset[str]:
        """Made when it is needed: most pages of a large array are nowhere near the log."""
        return frozenset(self._array)

    def read(self, place: Place, seen: set[str], mails: int = PIECE_MAILS, deadline: float | None = None) -> Piece:
        """The mails from ``place`` on: at most ``mails``, and at most a piece, by ``deadline`` if one is given.

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
            timeout_seconds = None if deadline is None else seconds_left(deadline)
            page = self._reader.log.page(self._token, place.sequence, mails, timeout_seconds)
            listed = []
            for email_id, sequence in page.sent:
                if email_id not in self._in_array and email_id not in seen:
                    seen.add(email_id)
                    listed.append((email_id, Place(place.array_index, sequence)))
            next_place = None if page.next_sequence is None else Place(place.array_index, page.next_sequence)
        return Piece(self._reader.mails(listed, deadline), len(listed), next_place)

    def pieces(self, deadline: float, place: Place = _START, mails: int | None = None) -> Iterator[Piece]:
        """The group's mails from ``place`` on, each once: all, or the next ``mails``.

        Raises ``BusUnavailable`` when ``deadline`` (``time.monotonic()``) is over.
        """
        seen: set[str] = set()
        left = PIECE_MAILS if mails is None else mails
        while left:
            if time.monotonic() > deadline:
                raise BusUnavailable("a group could not be read in time")
            piece = self.read(place, seen, left, min(deadline, self._reader.deadline()))
            yield piece
            if piece.next_place is None:
                return
            place = piece.next_place
            if mails is not None:
                left -= piece.covered


class GroupReader:
    """Reads groups: the log and lfx's array say who is in one, the bucket holds the records."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._records = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._index = GroupIndex(jetstream)
        self.log = Log(jetstream)
        self.traffic = Traffic()

    def deadline(self) -> float:
        """On ``time.monotonic()``, of what has none of its own and begins now."""
        return self._jetstream.deadline(None)

    def look(self, group_id: str, deadline: float | None = None, *, with_times: bool = False) -> Glance:
        """What can be said of a group without reading its mails: as many requests whatever its size, all at once."""
        token = group_token(group_id)
        deadline = min(deadline or self.deadline(), self.deadline())
        questions: list[Callable[[], Any]] = [
            lambda: self.log.figures(token, seconds_left(deadline)),
            lambda: self._email_ids(group_id, deadline),
        ]
        if with_times:
            questions += [
                lambda: self.log.first_sent_at(token, seconds_left(deadline)),
                lambda: self.log.last_event_at(token, seconds_left(deadline)),
            ]
        with self.traffic.hurried():
            asked = [gevent.spawn(_answer, question) for question in questions]
            gevent.joinall(asked)
        answers = [each.get() for each in asked]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        figures, array, *times = answers
        return Glance(figures.counts, array, *times)._replace(log_made_at=figures.log_made_at)

    def _email_ids(self, group_id: str, deadline: float) -> list[str] | None:
        with _one_of(self.traffic.arrays, deadline):
            return self._index.email_ids(group_id, seconds_left(deadline))

    def group(self, group_id: str, array: list[str] | None) -> Group:
        """The group, with lfx's array when it has one."""
        return Group(self, group_id, array or [])

    def record(self, email_id: str, deadline: float | None = None) -> Entry | None:
        """The mail's entry in the bucket, None when it has none, or when the id could not be a key."""
        if not is_email_id(email_id):
            return None
        deadline = min(deadline or self.deadline(), self.deadline())
        with self.traffic.hurried(), _one_of(self.traffic.records, deadline):
            return self._records.get(email_id, seconds_left(deadline))

    def mails(self, listed: list[tuple[str, Place]], deadline: float | None = None) -> list[Mail]:
        """The listed mails that have a record, in their order."""
        if not listed:
            return []
        deadline = deadline or self.deadline()
        self.traffic.give_way()
        with _one_of(self.traffic.pieces, deadline):
            entries = self._entries([email_id for email_id, _ in listed], deadline)
        found = []
        for email_id, place in listed:
            entry = entries.get(email_id)
            record = parse_record(entry.value) if entry is not None else None
            if entry is not None and record is not None:
                found.append(Mail(email_id, place, entry.value, record))
        return found

    def _entries(self, email_ids: list[str], deadline: float) -> dict[str, Entry]:
        """The entries of those that have one, ``PIECE_BYTES`` at a time, in the order of the stream."""
        keys = {f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}": email_id for email_id in email_ids}
        entries: dict[str, Entry] = {}
        while keys:
            question = {"multi_last": list(keys), "max_bytes": PIECE_BYTES}
            found = self._jetstream.get_many(self._records.stream, question, seconds_left(deadline))
            for each in found:
                email_id = keys.pop(each.nats_subject, "")
                if email_id and not each.is_deleted:
                    entries[email_id] = Entry(email_id, each.payload, each.sequence)
            if not found or not found[-1].pending:
                break
        # A replica may lag: what it lacks is asked again, of the leader in the end.
        return entries | (self._records.get_many(list(keys.values()), seconds_left(deadline)) if keys else {})


def _answer(question: Callable[[], T]) -> T | BusUnavailable | BusRefused:
    """The answer, or the error as a value: a greenlet that raises has its traceback printed."""
    try:
        return question()
    except (BusUnavailable, BusRefused) as error:
        return error


@contextlib.contextmanager
def _one_of(places: BoundedSemaphore, deadline: float) -> Iterator[None]:
    """One of the places. Raises ``BusUnavailable`` when there is none before ``deadline`` (``time.monotonic()``)."""
    if not places.acquire(timeout=seconds_left(deadline)):
        raise BusUnavailable("too much was being asked of NATS all the time")
    try:
        yield
    finally:
        places.release()


class Traffic:
    """Who goes first: small questions at once, large ones in turn, and too many large ones not at all.

    And how much is under way at a time.
    """

    def __init__(self) -> None:
        self._turns = BoundedSemaphore(LARGE_AT_ONCE)
        self.arrays = BoundedSemaphore(ARRAYS_AT_ONCE)
        self.pieces = BoundedSemaphore(PIECES_AT_ONCE)
        self.records = BoundedSemaphore(RECORDS_AT_ONCE)
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
            has_turn = self._turns.acquire(timeout=seconds_left(deadline))
        finally:
            self.waiting -= 1
        if not has_turn:
            raise BusUnavailable("other large groups were being read all the time")
        try:
            yield
        finally:
            self._turns.release()
