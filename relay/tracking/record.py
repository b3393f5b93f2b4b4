"""The record of one mail: exactly lfx's fields with lfx's meaning, then our own optional ones.

Pure. Times are RFC 3339 in UTC. ``delivered``, ``opened``, ``open_count`` and ``failed`` are always
present; other optional fields are left out when unset. Our own: ``outcome`` (``in_doubt`` when the final
dot was sent and no reply came), ``remote_id`` (the smarthost's id; Amazon SES: the message id of its events).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import orjson

MAX_TEXT_BYTES = 4096
"""Of ``to`` and ``subject`` in a record: a bucket made by lfx's chart takes values of 64 KiB."""

_EMAIL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_email_id(text: str) -> bool:
    """Whether ``text`` may be used as a key. Anything else is ``not found``, wherever it came from."""
    return _EMAIL_ID.fullmatch(text) is not None


def rfc3339(epoch_seconds: float) -> str:
    """UTC with milliseconds: ``2025-01-15T10:30:00.123Z``."""
    return datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_record(
    *,
    email_id: str,
    group_id: str,
    to: str,
    subject_header: str,
    sent_at: str,
    outcome: str = "",
    remote_id: str = "",
) -> bytes:
    """The record of a mail that was just handed over, as JSON."""
    record: dict[str, Any] = {
        "email_id": email_id,
        "group_id": group_id,
        "to": _cut(to),
        "subject": _cut(subject_header),
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
    return orjson.dumps(record)


def parse_record(value: bytes) -> dict[str, Any] | None:
    """The record in a bucket's value, None when it is not one: broken records are left out, never an error."""
    try:
        record = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT_BYTES // 4:
        return text
    octets = text.encode("utf-8", "replace")
    return text if len(octets) <= MAX_TEXT_BYTES else octets[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
