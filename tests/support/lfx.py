"""What lfx-v2-email-service writes and accepts, as its Go types have it: its records written, ours read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
REQUIRED = {
    "email_id": str,
    "group_id": str,
    "to": str,
    "subject": str,
    "sent_at": "time",
    "delivered": bool,
    "opened": bool,
    "open_count": int,
    "failed": bool,
}
OPTIONAL = {"delivered_at": "time", "opened_at_list": "opens", "last_opened_at": "time", "failed_at": "time"}
OUR_OWN = {
    "outcome": str,
    "remote_id": str,
}
"""Optional fields of ours, which Go's decoder ignores."""


def check_record(value: bytes) -> dict[str, Any]:
    """Decodes a record field by field as lfx's struct would, and holds it to lfx's omissions; the record."""
    record: dict[str, Any] = json.loads(value.decode("utf-8"), object_pairs_hook=_no_repeats)
    assert set(REQUIRED) <= set(record), "always present"
    assert set(record) <= set(REQUIRED) | set(OPTIONAL) | set(OUR_OWN), "no unknown names"
    for name, kind in (REQUIRED | OPTIONAL | OUR_OWN).items():
        if name not in record:
            continue
        field = record[name]
        if kind == "time":
            assert isinstance(field, str)
            assert RFC3339.fullmatch(field), name
        elif kind == "opens":
            assert field, "an empty list is omitted"
            for each in field:
                assert set(each) == {"event_id", "opened_at"}
                assert isinstance(each["event_id"], str)
                assert RFC3339.fullmatch(each["opened_at"])
        else:
            assert type(field) is kind, name
            assert name not in OUR_OWN or field, "what is unset is omitted"
    return record


def _no_repeats(members: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name.lower() for name, _ in members}) == len(members), "Go would match either"
    return dict(members)


def written_record(email_id: str, group_id: str, optional: Collection[str] = (), **changed: Any) -> bytes:
    """A record as lfx writes it: its order of fields, the ``optional`` ones that are set, times to the nanosecond."""
    opens = [
        {"event_id": "0f5c-1", "opened_at": "2025-01-15T11:05:33.000000001Z"},
        {"event_id": "0f5c-2", "opened_at": "2025-01-15T14:22:10Z"},
    ]
    record: dict[str, Any] = {
        "email_id": email_id,
        "group_id": group_id,
        "to": "user@example.com",
        "subject": "You <b>&</b> Zoë",
        "sent_at": "2025-01-15T10:30:00.123456789Z",
        "delivered": "delivered_at" in optional,
        "delivered_at": "2025-01-15T10:30:02Z",
        "opened": "opened_at_list" in optional,
        "opened_at_list": opens,
        "last_opened_at": "2025-01-15T14:22:10Z",
        "open_count": len(opens) if "opened_at_list" in optional else 0,
        "failed": "failed_at" in optional,
        "failed_at": "2025-01-15T10:31:00.5Z",
    }
    record |= changed
    left_out = set(OPTIONAL) - set(optional) - set(changed)
    return written({name: value for name, value in record.items() if name not in left_out})


def written(value: Any) -> bytes:
    """JSON as Go's encoding/json writes it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()
