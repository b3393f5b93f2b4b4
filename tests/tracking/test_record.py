"""The record: lfx's fields, names and omissions, then our own."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from relay.tracking.record import MAX_TEXT_BYTES, is_email_id, new_record, parse_record, rfc3339


def record(**changed: Any) -> dict[str, Any]:
    """A new record, parsed."""
    given: dict[str, Any] = {
        "email_id": "id-1",
        "group_id": "g",
        "to": "user@example.com",
        "subject_header": "Hello",
        "sent_at": "2025-01-15T10:30:00.000Z",
    }
    parsed = parse_record(new_record(**(given | changed)))
    assert parsed is not None
    return parsed


def test_a_new_record_has_what_lfx_writes_and_nothing_else() -> None:
    assert record() == {
        "email_id": "id-1",
        "group_id": "g",
        "to": "user@example.com",
        "subject": "Hello",
        "sent_at": "2025-01-15T10:30:00.000Z",
        "delivered": False,
        "opened": False,
        "open_count": 0,
        "failed": False,
    }


def test_our_own_fields_are_there_when_set() -> None:
    own = record(outcome="in_doubt", remote_id="0100-ses")
    assert own["outcome"] == "in_doubt"
    assert own["remote_id"] == "0100-ses"


@pytest.mark.parametrize("text", ["x" * 1_000_000, "ü" * 500_000, "🚀" * 300_000])
def test_long_texts_are_cut_at_a_character(text: str) -> None:
    subject = record(subject_header=text)["subject"]
    assert text.startswith(subject)
    assert MAX_TEXT_BYTES - 4 < len(subject.encode()) <= MAX_TEXT_BYTES


def test_a_text_within_the_bound_is_kept() -> None:
    assert record(subject_header="ü" * 2048)["subject"] == "ü" * 2048


@pytest.mark.parametrize(
    ("epoch_seconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1736937000.5, "2025-01-15T10:30:00.500Z"),
        (1736937000, "2025-01-15T10:30:00.000Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(epoch_seconds: float, text: str) -> None:
    assert rfc3339(epoch_seconds) == text


@pytest.mark.parametrize("text", ["a", "550e8400-e29b-41d4-a716-446655440000", "_", "x" * 64])
def test_what_is_an_email_id(text: str) -> None:
    assert is_email_id(text)


@pytest.mark.parametrize("text", ["", ">", "*", "a.b", "x" * 65, "a\n", "ü", "a b", "x" * 5000])
def test_what_is_none(text: str) -> None:
    assert not is_email_id(text)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"1", b"null", b"\xff"])
def test_what_is_no_record(value: bytes) -> None:
    assert parse_record(value) is None


def test_a_record_as_lfx_writes_it_is_read() -> None:
    value = (
        b'{"email_id":"e","group_id":"g","to":"u@example.com","subject":"s","sent_at":"2025-01-15T10:30:00.123456789Z",'
        b'"delivered":true,"delivered_at":"2025-01-15T10:30:02Z","opened":true,"opened_at_list":[{"event_id":"m",'
        b'"opened_at":"2025-01-15T11:05:33Z"}],"last_opened_at":"2025-01-15T11:05:33Z","open_count":1,"failed":false}'
    )
    assert parse_record(value) == orjson.loads(value)
