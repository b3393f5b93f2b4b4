"""The job: one question → one answer. Serves ``get_email_status`` and ``get_email_engagement_analytics``.

Owns the order of the checks and the shapes of the answers; records and counts come from ``tracking``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import orjson

from relay import contract
from relay.bus.kv import Bucket
from relay.bus.service import Handler
from relay.errors import BusRefused, BusUnavailable, SubmissionRejected
from relay.submission.request import decode_fields
from relay.tracking.groups import group_token
from relay.tracking.log import Fact, Log
from relay.tracking.record import is_email_id, parse_record

log = logging.getLogger("relay.reporting")


class Reporting:
    """Answers questions about mails and groups. ``max_reply_bytes`` gives what the server takes now."""

    def __init__(self, records: Bucket, facts: Log, max_reply_bytes: Callable[[], int]) -> None:
        self._records = records
        self._log = facts
        self._max_reply_bytes = max_reply_bytes

    def status(self, payload: bytes, _deadline: float) -> bytes:
        """``get_email_status``: a record by email_id, an array of records by group_id."""
        try:
            asked = decode_fields(payload, contract.STATUS_FIELDS)
        except SubmissionRejected as refusal:
            return _error(refusal.error)
        email_id, group_id = asked["email_id"], asked["group_id"]
        if email_id and group_id:
            return _error(contract.ONLY_ONE_OF_EMAIL_ID_OR_GROUP_ID)
        if not email_id and not group_id:
            return _error(contract.EMAIL_ID_OR_GROUP_ID_REQUIRED)
        try:
            return self._one(email_id) if email_id else self._group(group_id)
        except (BusUnavailable, BusRefused) as error:
            return _internal(error)

    def analytics(self, payload: bytes, _deadline: float) -> bytes:
        """``get_email_engagement_analytics``: a group's counts, from one request whatever its size."""
        try:
            group_id = decode_fields(payload, contract.ANALYTICS_FIELDS)["group_id"]
        except SubmissionRejected as refusal:
            return _error(refusal.error)
        if not group_id:
            return _error(contract.GROUP_ID_REQUIRED)
        try:
            counts = self._log.counts(group_token(group_id))
            if counts.get(Fact.SENT):
                return orjson.dumps(_analytics(group_id, counts))
            record = self._mail_without_group(group_id)
        except (BusUnavailable, BusRefused) as error:
            return _internal(error)
        return _error(contract.NOT_FOUND) if record is None else orjson.dumps(_analytics_of_one(record))

    def _one(self, email_id: str) -> bytes:
        entry = self._records.get(email_id) if is_email_id(email_id) else None
        if entry is None:
            return _error(contract.NOT_FOUND)
        return entry.value if parse_record(entry.value) is not None else _error(contract.INTERNAL_ERROR)

    def _group(self, group_id: str) -> bytes:
        """The array of the group's records; those that are gone or broken are left out, never an error."""
        values: list[bytes] = []
        size_bytes = 2
        is_known = False
        for email_ids in self._log.email_ids(group_token(group_id)):
            is_known = is_known or bool(email_ids)
            entries = self._records.get_many(email_ids)
            for email_id in email_ids:
                entry = entries.get(email_id)
                if entry is not None and parse_record(entry.value) is not None:
                    values.append(entry.value)
                    size_bytes += len(entry.value) + 1
            if size_bytes > self._max_reply_bytes():
                return _error(contract.RESPONSE_TOO_LARGE)
        if not is_known:
            record = self._mail_without_group(group_id)
            return _error(contract.NOT_FOUND) if record is None else orjson.dumps([record])
        return b"[" + b",".join(values) + b"]"

    def _mail_without_group(self, group_id: str) -> dict[str, Any] | None:
        """A mail sent without a group has its own id as group id: the group is that record."""
        entry = self._records.get(group_id) if is_email_id(group_id) else None
        record = parse_record(entry.value) if entry is not None else None
        return record if record is not None and record.get("group_id") == group_id else None


def status_handler(answer: Callable[[bytes, float], bytes]) -> Handler:
    """A question as the bus serves it, with the answers to what never reaches ``answer``."""
    return Handler(
        answer=answer,
        overloaded=_error(contract.INTERNAL_ERROR),
        broken=_error(contract.INTERNAL_ERROR),
        too_large=_error(contract.RESPONSE_TOO_LARGE),
    )


def _analytics(group_id: str, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "group_id": group_id,
        "total_sent": counts.get(Fact.SENT, 0),
        "delivered": counts.get(Fact.DELIVERED, 0),
        "opened": counts.get(Fact.OPEN, 0),
        "unique_opened": counts.get(Fact.OPENED, 0),
        "failed": counts.get(Fact.FAILED, 0),
    }


def _analytics_of_one(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "group_id": record["group_id"],
        "total_sent": 1,
        "delivered": int(bool(record.get("delivered"))),
        "opened": int(record.get("open_count") or 0),
        "unique_opened": int(bool(record.get("opened"))),
        "failed": int(bool(record.get("failed"))),
    }


def _internal(error: Exception) -> bytes:
    log.warning("a question could not be answered: %s", error)
    return _error(contract.INTERNAL_ERROR)


def _error(text: str) -> bytes:
    return orjson.dumps({"error": text})
