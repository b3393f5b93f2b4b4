"""The job: one question → one answer. Serves ``get_email_status`` and ``get_email_engagement_analytics``.

Owns the order of the checks and the shapes of the answers; records, counts and pages come from ``tracking``.
A question about a large group waits its turn among its like; small ones never queue behind it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import orjson

from relay import contract
from relay.bus.jetstream import JetStream
from relay.bus.service import Handler
from relay.errors import BusRefused, BusUnavailable, SubmissionRejected
from relay.submission.admission import Admission
from relay.submission.request import decode_fields, decode_status_request
from relay.tracking.cursors import CURSOR_CHARACTERS, Place, decode_cursor, encode_cursor
from relay.tracking.facts import Fact, facts_of
from relay.tracking.pages import PIECE_MAILS, Glance, GroupReader
from relay.tracking.record import abridged_record, earliest, last_event_at, latest, new_record, parse_record

log = logging.getLogger("relay.reporting")

PAGE_ROOM_BYTES = len(b'{"records":[],"cursor":""}') + CURSOR_CHARACTERS
"""What a page holds beside its records."""

QUIET_SECONDS = 60.0
"""Between two warnings that a question could not be answered."""

ANALYTICS_FACTS = {
    "delivered": Fact.DELIVERED,
    "opened": Fact.OPEN,
    "unique_opened": Fact.OPENED,
    "failed": Fact.FAILED,
    "clicked": Fact.CLICK,
    "unique_clicked": Fact.CLICKED,
    "bounced": Fact.BOUNCED,
    "complained": Fact.COMPLAINED,
    "delayed": Fact.DELAYED,
    "rejected": Fact.REJECTED,
}
"""The fields of an analytics answer that count facts, in their order; the first four are lfx's."""


class Reporting:
    """Answers questions about mails and groups. ``max_reply_bytes`` gives what the server takes now."""

    def __init__(self, jetstream: JetStream, max_reply_bytes: Callable[[], int]) -> None:
        self._reader = GroupReader(jetstream)
        self._max_reply_bytes = max_reply_bytes
        self._quiet_until = 0.0
        """No more of the same until then (``time.monotonic()``)."""

    def status(self, payload: bytes, deadline: float) -> bytes:
        """``get_email_status``: a record by email_id, the array of records or a page of them by group_id."""
        try:
            asked = decode_status_request(payload)
            if asked.email_id and asked.group_id:
                return _error(contract.ONLY_ONE_OF_EMAIL_ID_OR_GROUP_ID)
            if asked.email_id:
                return self._one(asked.email_id, deadline)
            if not asked.group_id:
                return _error(contract.EMAIL_ID_OR_GROUP_ID_REQUIRED)
            if asked.limit is None and not asked.cursor:
                return self._all(asked.group_id, deadline)
            return self._page(asked.group_id, asked.cursor, asked.limit or contract.MAX_PAGE_MAILS, deadline)
        except SubmissionRejected as refusal:
            return _error(refusal.error)
        except (BusUnavailable, BusRefused) as error:
            return self._internal(error)

    def analytics(self, payload: bytes, deadline: float) -> bytes:
        """``get_email_engagement_analytics``: a group's figures, from as many requests whatever its size.

        But for a group with an array of lfx's: there is no log of it, so its records are counted.
        """
        try:
            group_id = decode_fields(payload, contract.ANALYTICS_FIELDS)["group_id"]
            if not group_id:
                return _error(contract.GROUP_ID_REQUIRED)
            glance = self._reader.look(group_id, deadline, with_times=True)
            if glance.array is not None:
                if glance.mails <= PIECE_MAILS:
                    return self._count(group_id, deadline, glance)
                del glance
                return self._in_turn(group_id, deadline, partial(self._count, group_id, deadline), with_times=True)
            if glance.is_known:
                total = glance.counts[Fact.SENT]
                return _analytics(group_id, total, glance.counts, glance.first_sent_at, glance.last_event_at)
            value = self._mail_without_group(group_id, deadline)
        except SubmissionRejected as refusal:
            return _error(refusal.error)
        except (BusUnavailable, BusRefused) as error:
            return self._internal(error)
        record = parse_record(value) if value is not None else None
        if record is None:
            return _error(contract.NOT_FOUND)
        # A mail in doubt, or found to have failed later, was not sent as far as is known, unless events came of it.
        facts = facts_of(record)
        total = int(not record.get("outcome") or any(facts.values()))
        sent_at = earliest(record.get("sent_at")) if total else ""
        return _analytics(group_id, total, facts, sent_at, last_event_at(record))

    def _one(self, email_id: str, deadline: float) -> bytes:
        entry = self._reader.record(email_id, deadline)
        if entry is None:
            return _error(contract.NOT_FOUND)
        if parse_record(entry.value) is None:
            return _error(contract.INTERNAL_ERROR)
        room_bytes = self._max_reply_bytes()
        return entry.value if len(entry.value) <= room_bytes else abridged_record(entry.value, room_bytes)

    def _all(self, group_id: str, deadline: float) -> bytes:
        """The array of the group's records; those that are gone or broken are left out, never an error."""
        glance = self._reader.look(group_id, deadline)
        if not glance.is_known:
            value = self._mail_without_group(group_id, deadline)
            return _error(contract.NOT_FOUND) if value is None else b"[" + value + b"]"
        # More mails than there is room for the shortest records: said without reading any.
        if glance.mails * (_shortest_record_bytes(group_id) + 1) > self._max_reply_bytes():
            return _error(contract.RESPONSE_TOO_LARGE)
        if glance.mails <= PIECE_MAILS:
            return self._array(group_id, deadline, glance)
        del glance
        return self._in_turn(group_id, deadline, partial(self._array, group_id, deadline))

    def _in_turn(
        self, group_id: str, deadline: float, answer: Callable[[Glance], bytes], *, with_times: bool = False
    ) -> bytes:
        """The answer for the group as it is when the turn has come: while it waits, a question holds no array."""
        with self._reader.traffic.turn(deadline):
            return answer(self._reader.look(group_id, deadline, with_times=with_times))

    def _array(self, group_id: str, deadline: float, glance: Glance) -> bytes:
        values: list[bytes] = []
        size_bytes = 2
        for piece in self._reader.group(group_id, glance.array).pieces(deadline):
            values += [mail.value for mail in piece.mails]
            size_bytes += sum(len(mail.value) + 1 for mail in piece.mails)
            if size_bytes > self._max_reply_bytes() + 1:
                return _error(contract.RESPONSE_TOO_LARGE)
        return b"[" + b",".join(values) + b"]"

    def _page(self, group_id: str, cursor: str, limit: int, deadline: float) -> bytes:
        if cursor:
            decode_cursor(group_id, cursor)  # anything else is refused before NATS is asked
        glance = self._reader.look(group_id, deadline)
        if not glance.is_known:
            value = self._mail_without_group(group_id, deadline)
            return _error(contract.NOT_FOUND) if value is None else _paged([value], None)
        if min(limit, glance.mails) <= PIECE_MAILS:
            return self._page_from(group_id, cursor, limit, deadline, glance)
        del glance
        return self._in_turn(group_id, deadline, partial(self._page_from, group_id, cursor, limit, deadline))

    def _page_from(self, group_id: str, cursor: str, limit: int, deadline: float, glance: Glance) -> bytes:
        """The records of the next ``limit`` mails, or of as many as there is room for."""
        place = decode_cursor(group_id, cursor, glance.log_made_at) if cursor else Place()
        values: list[bytes] = []
        room_bytes = self._max_reply_bytes() - PAGE_ROOM_BYTES
        next_place: Place | None = place
        for piece in self._reader.group(group_id, glance.array).pieces(deadline, place, limit):
            for mail in piece.mails:
                value = mail.value
                if len(value) + 1 > room_bytes:
                    if values:
                        return _paged(values, encode_cursor(group_id, mail.place, glance.log_made_at))
                    value = abridged_record(value, room_bytes)  # or nobody would ever get beyond this mail
                values.append(value)
                room_bytes -= len(value) + 1
            next_place = piece.next_place
        next_cursor = None if next_place is None else encode_cursor(group_id, next_place, glance.log_made_at)
        return _paged(values, next_cursor)

    def _count(self, group_id: str, deadline: float, glance: Glance) -> bytes:
        """Analytics of a group of lfx's, from its records: all figures are of the same mails."""
        total = 0
        counts: Counter[str] = Counter()
        first, last = glance.first_sent_at, glance.last_event_at
        for piece in self._reader.group(group_id, glance.array).pieces(deadline):
            total += piece.covered
            for mail in piece.mails:
                counts.update(facts_of(mail.record))
            first = earliest(first, *(mail.record.get("sent_at") for mail in piece.mails))
            last = latest(last, *(last_event_at(mail.record) for mail in piece.mails))
        return _analytics(group_id, total, counts, first, last)

    def _mail_without_group(self, group_id: str, deadline: float) -> bytes | None:
        """A mail sent without a group has its own id as group id: the group is that record, given as it is stored."""
        entry = self._reader.record(group_id, deadline)
        record = parse_record(entry.value) if entry is not None else None
        return entry.value if entry is not None and record and record.get("group_id") == group_id else None

    def _internal(self, error: Exception) -> bytes:
        """``internal error``, and why in the journal: when NATS is away every question meets the same."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            log.warning("a question could not be answered: %s", error)
        return _error(contract.INTERNAL_ERROR)


def status_handler(answer: Callable[[bytes, float], bytes]) -> Handler:
    """A question as the bus serves it, with the answers to what never reaches ``answer``."""
    return Handler(
        answer=lambda msg, deadline, _: answer(msg.payload, deadline),
        overloaded=_error(contract.INTERNAL_ERROR),
        broken=_error(contract.INTERNAL_ERROR),
        too_large=_error(contract.RESPONSE_TOO_LARGE),
    )


def status_gate(limit: int, limit_bytes: int) -> Admission:
    """Bounds number and bytes alone: that large questions wait for a turn says nothing about small ones."""
    return Admission(limit, limit_bytes, busy_above=limit)


def _analytics(
    group_id: str, total_sent: int, counts: Mapping[str, int], first_sent_at: str, last_event_at: str
) -> bytes:
    answer: dict[str, Any] = {"group_id": group_id, "total_sent": total_sent}
    answer |= {field: counts.get(fact, 0) for field, fact in ANALYTICS_FACTS.items()}
    if first_sent_at:
        answer["first_sent_at"] = first_sent_at
    if last_event_at:
        answer["last_event_at"] = last_event_at
    return orjson.dumps(answer)


def _paged(values: list[bytes], cursor: str | None) -> bytes:
    return b'{"records":[' + b",".join(values) + b'],"cursor":' + orjson.dumps(cursor) + b"}"


def _shortest_record_bytes(group_id: str) -> int:
    """No record of the group is shorter, whoever wrote it."""
    return len(new_record(email_id="", group_id=group_id, to="", subject_header="", sent_at="2025-01-15T10:30:00Z"))


def _error(text: str) -> bytes:
    return orjson.dumps({"error": text})
