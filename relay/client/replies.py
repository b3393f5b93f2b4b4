"""Replies of the relay as typed values, and its errors as exceptions.

Owns how replies are read: unknown fields are kept in ``raw`` and otherwise ignored, a known one of another type counts
as absent, so that a newer relay never breaks an older caller. A reply that is no JSON object is ``NoAnswer``: whatever
sent it was no relay, and what became of the mail is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from relay import contract
from relay.client.errors import (
    DEFERRED,
    FAILED,
    IN_DOUBT,
    REFUSED,
    Deferred,
    Failed,
    InDoubt,
    NoAnswer,
    NotFound,
    QuestionFailed,
    Refused,
    RelayClientError,
)


@dataclass(frozen=True, slots=True)
class RecipientResult:
    """What became of one recipient of a mail that has several."""

    address: str = field(repr=False)
    outcome: str
    reply_code: int | None
    enhanced_code: str
    email_id: str
    """Its own, of a mail sent to each of them individually."""

    @property
    def is_relayed(self) -> bool:
        """Whether the smarthost took it."""
        return self.outcome == "relayed"


@dataclass(frozen=True, slots=True)
class Sent:
    """The smarthost has taken the mail, for one recipient at least."""

    email_id: str
    group_id: str
    message_id_header: str
    remote_id: str
    """The smarthost's own id: for Amazon SES the message id."""
    recipients: tuple[RecipientResult, ...]
    """Of a mail with several recipients what became of each; empty when the relay does not say."""
    duplicate: bool
    """It had been sent under this request_id before; nothing was sent now."""
    request_id: str
    """Under which it was sent; '' when it had none."""
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    """The reply as it came."""

    @property
    def is_skipped(self) -> bool:
        """Whether the relay answered as if all were well and sent nothing: mail is switched off there, or its
        operator lets none out to this recipient. Such a mail has no ids."""
        return not self.email_id and not any(each.email_id for each in self.recipients)


@dataclass(frozen=True, slots=True)
class MailRecord:
    """The record of a mail. Times are aware, in UTC; ``raw`` has every field, newer ones too."""

    email_id: str
    group_id: str
    to: str = field(repr=False)
    subject: str = field(repr=False)
    sent_at: datetime | None
    delivered: bool
    delivered_at: datetime | None
    opened: bool
    open_count: int
    last_opened_at: datetime | None
    failed: bool
    failed_at: datetime | None
    outcome: str
    """'' for a mail that was relayed; else ``in_doubt``, ``failed``, ``deferred``."""
    remote_id: str
    raw: Mapping[str, Any] = field(repr=False, compare=False)


class Page(NamedTuple):
    """Some mails of a group, in the order in which they were sent."""

    records: list[MailRecord]
    cursor: str | None
    """For the next page; None = this was the last."""


@dataclass(frozen=True, slots=True)
class Analytics:
    """The figures of a group; those that the service does not give are 0."""

    group_id: str
    total_sent: int
    delivered: int
    opened: int
    unique_opened: int
    failed: int
    clicked: int
    unique_clicked: int
    bounced: int
    complained: int
    delayed: int
    rejected: int
    first_sent_at: datetime | None
    last_event_at: datetime | None
    raw: Mapping[str, Any] = field(repr=False, compare=False)


_BY_OUTCOME: dict[str, type[RelayClientError]] = {
    REFUSED: Refused,
    FAILED: Failed,
    DEFERRED: Deferred,
    IN_DOUBT: InDoubt,
}


def decode_sent(payload: bytes, request_id: str) -> Sent:
    """What a reply to ``send_email`` says. Raises what it says otherwise: see ``errors``."""
    reply = _object(payload, may_repeat=bool(request_id))
    if reply.get("error"):
        raise _send_error(reply)
    if not isinstance(reply.get("email_id"), str):
        raise _unreadable(bool(request_id))
    return Sent(
        email_id=_text(reply, "email_id"),
        group_id=_text(reply, "group_id"),
        message_id_header=_text(reply, "message_id_header"),
        remote_id=_text(reply, "remote_id"),
        recipients=_recipients(reply),
        duplicate=reply.get("duplicate") is True,
        request_id=request_id,
        raw=reply,
    )


def decode_record(payload: bytes) -> MailRecord:
    """The record in a reply to ``get_email_status`` by email_id."""
    return _record(_answer(payload))


def decode_page(payload: bytes) -> Page:
    """A page of a group; also the array that ``lfx-v2-email-service``, which knows no pages, answers with."""
    answer = _loaded(payload)
    if isinstance(answer, list):
        return Page(_records(answer), None)
    answer = _answer(payload)
    return Page(_records(answer.get("records")), _text(answer, "cursor") or None)


def decode_analytics(payload: bytes) -> Analytics:
    """A group's figures."""
    answer = _answer(payload)
    return Analytics(
        group_id=_text(answer, "group_id"),
        **{name: _number(answer, name) for name in _FIGURES},
        first_sent_at=_time(answer, "first_sent_at"),
        last_event_at=_time(answer, "last_event_at"),
        raw=answer,
    )


_FIGURES = (
    "total_sent",
    "delivered",
    "opened",
    "unique_opened",
    "failed",
    "clicked",
    "unique_clicked",
    "bounced",
    "complained",
    "delayed",
    "rejected",
)


def _send_error(reply: Mapping[str, Any]) -> RelayClientError:
    error, outcome = _error_text(reply), _text(reply, "outcome")
    kind = _BY_OUTCOME.get(outcome)
    detail = _text(reply, "detail")
    if kind is None:
        # lfx-v2-email-service says no outcome. Its "delivery failed" may also be a mail that went out.
        is_delivery = error == contract.DELIVERY_FAILED or outcome
        kind = NoAnswer if is_delivery else Refused
        detail = detail or ("the service does not say whether the mail went out" if is_delivery else "")
    code = reply.get("reply_code")
    return kind(
        error,
        detail=detail,
        retryable=reply.get("retryable") is True,
        reply_code=code if type(code) is int else None,
        enhanced_code=_text(reply, "enhanced_code"),
        email_id=_text(reply, "email_id"),
        group_id=_text(reply, "group_id"),
        recipients=_recipients(reply),
        duplicate=reply.get("duplicate") is True,
    )


def _answer(payload: bytes) -> Mapping[str, Any]:
    """The object in an answer to a question. Raises ``QuestionFailed`` for an error in it."""
    answer = _object(payload, may_repeat=True)
    if answer.get("error"):
        error = _error_text(answer)
        kind = NotFound if error == contract.NOT_FOUND else QuestionFailed
        raise kind(error, retryable=error == contract.INTERNAL_ERROR, detail=_text(answer, "detail"))
    return answer


def _loaded(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


def _object(payload: bytes, may_repeat: bool) -> Mapping[str, Any]:
    loaded = _loaded(payload)
    if not isinstance(loaded, dict):
        raise _unreadable(may_repeat)
    return loaded


def _unreadable(may_repeat: bool) -> NoAnswer:
    return NoAnswer("unreadable reply", detail="what came is no reply of a relay's", retryable=may_repeat)


def _error_text(reply: Mapping[str, Any]) -> str:
    return _text(reply, "error") or "unreadable error"


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int else 0


def _time(values: Mapping[str, Any], name: str) -> datetime | None:
    """RFC 3339; finer than microseconds is cut off."""
    try:
        at = datetime.fromisoformat(_text(values, name))
    except ValueError:
        return None
    return at if at.tzinfo is not None else None


def _recipients(reply: Mapping[str, Any]) -> tuple[RecipientResult, ...]:
    given = reply.get("recipients")
    return tuple(
        RecipientResult(
            address=_text(each, "address"),
            outcome=_text(each, "outcome"),
            reply_code=_number(each, "reply_code") or None,
            enhanced_code=_text(each, "enhanced_code"),
            email_id=_text(each, "email_id"),
        )
        for each in (given if isinstance(given, list) else [])
        if isinstance(each, dict)
    )


def _records(given: Any) -> list[MailRecord]:
    if not isinstance(given, list):
        raise _unreadable(may_repeat=True)
    return [_record(each) for each in given if isinstance(each, dict)]


def _record(record: Mapping[str, Any]) -> MailRecord:
    return MailRecord(
        email_id=_text(record, "email_id"),
        group_id=_text(record, "group_id"),
        to=_text(record, "to"),
        subject=_text(record, "subject"),
        sent_at=_time(record, "sent_at"),
        delivered=record.get("delivered") is True,
        delivered_at=_time(record, "delivered_at"),
        opened=record.get("opened") is True,
        open_count=_number(record, "open_count"),
        last_opened_at=_time(record, "last_opened_at"),
        failed=record.get("failed") is True,
        failed_at=_time(record, "failed_at"),
        outcome=_text(record, "outcome"),
        remote_id=_text(record, "remote_id"),
        raw=record,
    )
