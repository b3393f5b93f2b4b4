"""Replies as values, and errors as exceptions."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay import contract
from relay.client import (
    Deferred,
    Failed,
    InDoubt,
    NoAnswer,
    NotFound,
    QuestionFailed,
    Refused,
    RelayClientError,
)
from relay.client.replies import decode_analytics, decode_page, decode_record, decode_sent
from tests.client.responder import SENT
from tests.support.lfx import written_record


def sent(reply: Any, request_id: str = "id-1") -> Any:
    return decode_sent(reply if isinstance(reply, bytes) else json.dumps(reply).encode(), request_id)


def test_a_mail_that_was_sent() -> None:
    reply = sent(SENT | {"new_field": 1})
    assert (reply.email_id, reply.group_id, reply.message_id_header, reply.remote_id) == (
        "e-1",
        "g-1",
        "<m@example.org>",
        "r-1",
    )
    assert (reply.recipients, reply.duplicate, reply.request_id, reply.is_skipped) == ((), False, "id-1", False)
    assert reply.raw["new_field"] == 1


def test_a_reply_of_lfx() -> None:
    reply = sent({"email_id": "e", "group_id": "g"})
    assert (reply.message_id_header, reply.remote_id) == ("", "")


def test_a_duplicate_with_recipients() -> None:
    reply = sent(
        SENT
        | {
            "duplicate": True,
            "recipients": [
                {"address": "a@example.com", "outcome": "relayed", "email_id": "e-1"},
                {"address": "b@example.com", "outcome": "failed", "reply_code": 550, "enhanced_code": "5.1.1"},
            ],
        }
    )
    assert reply.duplicate
    first, second = reply.recipients
    assert (first.is_relayed, first.reply_code, first.email_id) == (True, None, "e-1")
    assert (second.address, second.is_relayed, second.reply_code, second.enhanced_code) == (
        "b@example.com",
        False,
        550,
        "5.1.1",
    )
    assert "example.com" not in repr(reply)


def test_nothing_was_sent_on_purpose() -> None:
    assert sent({"email_id": "", "group_id": ""}).is_skipped


ERRORS: list[tuple[dict[str, Any], type[RelayClientError], str, bool]] = [
    ({"error": contract.INVALID_FROM, "outcome": "refused", "retryable": False}, Refused, "refused", False),
    ({"error": contract.DELIVERY_FAILED, "outcome": "failed", "retryable": False}, Failed, "failed", False),
    ({"error": contract.DELIVERY_FAILED, "outcome": "deferred", "retryable": True}, Deferred, "deferred", True),
    ({"error": contract.DELIVERY_FAILED, "outcome": "in_doubt", "retryable": False}, InDoubt, "in_doubt", False),
    ({"error": contract.INVALID_FROM}, Refused, "refused", False),
    ({"error": contract.DELIVERY_FAILED}, NoAnswer, "unknown", False),
    ({"error": contract.DELIVERY_FAILED, "outcome": "of the future", "retryable": True}, NoAnswer, "unknown", True),
    ({"error": 7}, Refused, "refused", False),
]


@pytest.mark.parametrize(("reply", "kind", "outcome", "retryable"), ERRORS, ids=[str(n) for n in range(len(ERRORS))])
def test_errors(reply: dict[str, Any], kind: type[RelayClientError], outcome: str, retryable: bool) -> None:
    with pytest.raises(kind) as raised:
        sent(reply)
    assert type(raised.value) is kind
    assert (raised.value.outcome, raised.value.retryable) == (outcome, retryable)
    assert (raised.value.reply_code, raised.value.recipients, raised.value.email_id) == (None, (), "")


def test_an_error_with_everything() -> None:
    with pytest.raises(InDoubt) as raised:
        sent(
            {
                "error": contract.DELIVERY_FAILED,
                "outcome": "in_doubt",
                "retryable": False,
                "detail": "someone@example.com: no reply",
                "reply_code": 451,
                "enhanced_code": "4.4.2",
                "email_id": "e",
                "group_id": "g",
                "duplicate": True,
                "recipients": [{"address": "someone@example.com", "outcome": "in_doubt"}],
            }
        )
    error = raised.value
    assert (error.error, error.detail) == (contract.DELIVERY_FAILED, "someone@example.com: no reply")
    assert (error.reply_code, error.enhanced_code, error.email_id, error.group_id) == (451, "4.4.2", "e", "g")
    assert error.duplicate
    assert error.recipients[0].outcome == "in_doubt"
    assert str(error) == "email delivery failed: som****@example.com: no reply", "what is logged names nobody"
    assert "someone" not in repr(error)


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"null", b"7", b"\xff", b"{}", b'{"email_id":7}', b"[" * 100_000]
)
@pytest.mark.parametrize("request_id", ["", "id-1"])
def test_garbage_says_nothing_about_the_mail(garbage: bytes, request_id: str) -> None:
    with pytest.raises(NoAnswer) as raised:
        sent(garbage, request_id)
    assert raised.value.outcome == "unknown"
    assert raised.value.retryable is bool(request_id)


def test_fields_of_another_type_count_as_absent() -> None:
    reply = sent(
        SENT | {"group_id": 7, "remote_id": None, "duplicate": "yes", "recipients": [7, {"reply_code": "550"}]}
    )
    assert (reply.group_id, reply.remote_id, reply.duplicate) == ("", "", False)
    assert [each.reply_code for each in reply.recipients] == [None]


def test_a_record() -> None:
    value = written_record(
        "e-1", "g-1", ["delivered_at", "opened_at_list", "last_opened_at", "failed_at"], outcome="failed"
    )
    record = decode_record(value)
    assert (record.email_id, record.group_id, record.to, record.subject) == (
        "e-1",
        "g-1",
        "user@example.com",
        "You <b>&</b> Zoë",
    )
    assert (record.delivered, record.opened, record.open_count, record.failed) == (True, True, 2, True)
    assert record.sent_at == datetime(2025, 1, 15, 10, 30, 0, 123456, UTC)
    assert record.delivered_at == datetime(2025, 1, 15, 10, 30, 2, tzinfo=UTC)
    assert record.outcome == "failed"
    assert len(record.raw["opened_at_list"]) == 2
    assert "example.com" not in repr(record)
    assert "You" not in repr(record)


def test_times_that_are_none() -> None:
    record = decode_record(b'{"email_id":"e","sent_at":"2025-01-15T10:30:00","delivered_at":"soon","failed_at":7}')
    assert (record.sent_at, record.delivered_at, record.failed_at) == (None, None, None)
    zoned = decode_record(b'{"email_id":"e","sent_at":"2025-01-15T10:30:00+02:00"}')
    assert zoned.sent_at is not None
    assert zoned.sent_at.utcoffset() == timedelta(hours=2)


def test_pages() -> None:
    record = json.loads(written_record("e-1", "g-1"))
    page = decode_page(json.dumps({"records": [record, record], "cursor": "c"}).encode())
    assert ([each.email_id for each in page.records], page.cursor) == (["e-1", "e-1"], "c")
    last = decode_page(json.dumps({"records": [], "cursor": None}).encode())
    assert (last.records, last.cursor) == ([], None)
    array = decode_page(json.dumps([record]).encode())
    assert ([each.email_id for each in array.records], array.cursor) == (["e-1"], None)
    with pytest.raises(NoAnswer):
        decode_page(b'{"cursor":"c"}')


def test_figures() -> None:
    figures = decode_analytics(b'{"group_id":"g","total_sent":3,"opened":2,"first_sent_at":"2025-01-15T10:30:00Z"}')
    assert (figures.group_id, figures.total_sent, figures.opened, figures.clicked) == ("g", 3, 2, 0)
    assert figures.first_sent_at == datetime(2025, 1, 15, 10, 30, tzinfo=UTC)
    assert figures.last_event_at is None


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (contract.NOT_FOUND, NotFound, False),
        (contract.INTERNAL_ERROR, QuestionFailed, True),
        (contract.INVALID_CURSOR, QuestionFailed, False),
    ],
)
def test_questions_without_an_answer(error: str, kind: type[QuestionFailed], retryable: bool) -> None:
    for decode in (decode_record, decode_page, decode_analytics):
        with pytest.raises(kind, match=error) as raised:
            decode(json.dumps({"error": error}).encode())  # type: ignore[operator]
        assert type(raised.value) is kind
        assert (raised.value.retryable, raised.value.outcome) == (retryable, "")
