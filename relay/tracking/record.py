"""The record of one mail: exactly lfx's fields with lfx's meaning, then our own optional ones.

Pure. Times are RFC 3339 in UTC. ``delivered``, ``opened``, ``open_count`` and ``failed`` are always
present; other optional fields are left out when unset. Our own: ``outcome`` (``in_doubt`` when the final
dot was sent and no reply came; ``failed`` or ``deferred`` when one came after the caller had been answered, and it
was no), ``remote_id`` (the smarthost's id; Amazon SES: the message id of its events), ``recipients`` of a mail to
several (what became of each), ``caller`` where NATS vouches for one, and what events add beside lfx's fields
(``folding`` has the table). ``truncated`` is never stored: it stands in an answer that has no room for the whole
record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from math import floor
from typing import Any, NamedTuple

import orjson

MAX_TEXT_BYTES = 4096
"""Of ``to`` and ``subject`` in a record, at most twice that in JSON: a bucket made by lfx's chart takes 64 KiB."""

LONGEST_CHARACTER_BYTES = 6
"""Of a character in JSON: control characters are escaped."""

ALWAYS_SHORT_CHARACTERS = MAX_TEXT_BYTES // LONGEST_CHARACTER_BYTES
"""A text no longer than this is within the bounds, whatever it is made of."""

DEEPEST = 250
"""Levels of a record that is none: orjson reads 1,024 and writes 254."""

EVENT_TIMES = (
    "delivered_at",
    "failed_at",
    "last_opened_at",
    "last_clicked_at",
    "bounced_at",
    "complained_at",
    "delayed_at",
    "rejected_at",
    "unsubscribed_at",
)
"""Fields that hold the time of an event."""

_EMAIL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_email_id(text: str) -> bool:
    """Whether ``text`` may be used as a key. Anything else is ``not found``, wherever it came from."""
    return _EMAIL_ID.fullmatch(text) is not None


def rfc3339(epoch_seconds: float) -> str:
    """UTC with milliseconds: ``2025-01-15T10:30:00.123Z``."""
    second = floor(epoch_seconds)
    # Microseconds first, as datetime rounds them: 0.123 of a second is 0.12299990654 in a float of today's size.
    milliseconds = round((epoch_seconds - second) * 1_000_000) // 1000
    if milliseconds > 999:
        return f"{_text_of_second(second + 1)}.000Z"
    return f"{_text_of_second(second)}.{milliseconds:03}Z"


@lru_cache(maxsize=8)
def _text_of_second(epoch_second: int) -> str:
    """Of the many times that are written in one second only the milliseconds differ."""
    return datetime.fromtimestamp(epoch_second, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


def parse_time(text: object) -> datetime | None:
    """An RFC 3339 time, which compares where texts do not: lfx's have up to nanoseconds. None when it is none."""
    try:
        at = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return at if at is not None and at.tzinfo is not None else None


def earliest(*texts: object) -> str:
    """The earliest of those that are RFC 3339 times, as it was written; '' when none is."""
    return min(_timed(texts), default=(None, ""))[1]


def latest(*texts: object) -> str:
    """The latest of those that are RFC 3339 times, as it was written; '' when none is."""
    return max(_timed(texts), default=(None, ""))[1]


def _timed(texts: Iterable[object]) -> Iterator[tuple[datetime, str]]:
    for text in texts:
        if (at := parse_time(text)) is not None:
            yield at, str(text)


def last_event_at(record: Mapping[str, Any]) -> str:
    """The time of the latest event in the record, '' when it holds none."""
    return latest(*(record.get(name) for name in EVENT_TIMES))


class RecipientOutcome(NamedTuple):
    """What became of one recipient of a mail to several, as its record keeps it."""

    address: str
    """As the caller wrote it."""
    outcome: str
    reply_code: int | None
    enhanced_code: str


def new_record(
    *,
    email_id: str,
    group_id: str,
    to: str,
    subject_header: str,
    sent_at: str,
    outcome: str = "",
    remote_id: str = "",
    recipients: Sequence[RecipientOutcome] = (),
    caller: str = "",
) -> bytes:
    """The record of a mail that was just handed over, as JSON."""
    record: dict[str, Any] = {
        "email_id": email_id,
        "group_id": group_id,
        "to": to if len(to) <= ALWAYS_SHORT_CHARACTERS else _cut(to),
        "subject": subject_header if len(subject_header) <= ALWAYS_SHORT_CHARACTERS else _cut(subject_header),
        "sent_at": sent_at,
        "delivered": False,
        "opened": False,
        "open_count": 0,
        "failed": False,
    }
    if outcome:
        record["outcome"] = outcome
    if remote_id:
        record["remote_id"] = remote_id
    if recipients:
        record["recipients"] = [each._asdict() for each in recipients]
    if caller:
        record["caller"] = _cut(caller)
    return orjson.dumps(record)


def settled_record(
    record: Mapping[str, Any], *, outcome: str, remote_id: str, recipients: Sequence[RecipientOutcome] = ()
) -> bytes:
    """The record of a mail that was in doubt, now that the smarthost has spoken; the same again changes nothing.

    Or of a mail that another attempt has brought to more of its ``recipients``.

    ``outcome`` is '' when the mail was relayed after all, else ``failed`` or ``deferred``: it was not sent. Where an
    event has told of the mail it was, whatever was said.
    """
    if outcome == IN_DOUBT:  # knows less than whatever is known
        outcome = str(record.get("outcome", ""))
    before = record.get("recipients")
    settled = {name: value for name, value in record.items() if name != "outcome"}
    if recipients and isinstance(before, list) and len(before) == len(recipients):
        merged = [_later(old, new._asdict()) for old, new in zip(before, recipients, strict=True)]
        settled["recipients"] = merged
        outcome = _as_a_whole([str(each["outcome"]) for each in merged])
        recipients = ()
    if outcome and "first" not in record:
        settled["outcome"] = outcome
    if remote_id:
        settled["remote_id"] = remote_id
    if recipients:
        settled["recipients"] = [each._asdict() for each in recipients]
    return orjson.dumps(settled)


IN_DOUBT = "in_doubt"
_FINAL = ("relayed", "failed")
_AS_A_WHOLE = ("relayed", IN_DOUBT, "failed", "deferred")
"""Of several outcomes the first of these is that of the mail."""


def _later(old: object, new: dict[str, Any]) -> dict[str, Any]:
    """What is known of one recipient: what was final stays, and an outcome of '' says nothing new."""
    return old if isinstance(old, dict) and (old.get("outcome") in _FINAL or not new["outcome"]) else new


def _as_a_whole(outcomes: list[str]) -> str:
    found = next((state for state in _AS_A_WHOLE if state in outcomes), "")
    return "" if found == "relayed" else found


def parse_record(value: bytes) -> dict[str, Any] | None:
    """The record in a bucket's value, None when it is not one: broken records are left out, never an error.

    What is given can be written again, also with another object or array around it.
    """
    try:
        record = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict):
        return None
    if value.count(b"[") + value.count(b"{") > DEEPEST and _depth(record) > DEEPEST:
        return None
    return record


def _depth(value: object) -> int:
    """How deeply arrays and objects are nested, without recursion; more than ``DEEPEST`` is not counted out."""
    depth = 0
    level = [value]
    while level and depth <= DEEPEST:
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        depth += bool(inner)
        level = [each for members in inner for each in members]
    return depth


def abridged_record(value: bytes, room_bytes: int) -> bytes:
    """The record without its largest fields, so that it fits into ``room_bytes``, and with ``"truncated":true``.

    Which mail it is, and what became of it, stays to the last; ``value`` is a record that ``parse_record`` takes.
    """
    record: dict[str, Any] = {**orjson.loads(value), "truncated": True}
    by_size = sorted(record, key=lambda name: (len(orjson.dumps(record[name])), name))
    while len(shorter := orjson.dumps(record)) > room_bytes and by_size:
        name = by_size.pop()
        if name not in {"email_id", "truncated"}:
            del record[name]
    return shorter


def _cut(text: str) -> str:
    octets = text.encode("utf-8", "replace")
    cut = text if len(octets) <= MAX_TEXT_BYTES else octets[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
    if len(orjson.dumps(cut.encode("utf-8", "replace").decode())) <= 2 * MAX_TEXT_BYTES:
        return cut
    return cut[:ALWAYS_SHORT_CHARACTERS]
