"""Parked notifications: those that could not be handled, kept as they came for an operator (``relayctl parked``).

The stream ``EMAIL_PARKED``, one subject, one JSON message each: ``body``, ``reason``, ``received_count``,
``sqs_message_id``, ``parked_at``, and where the body is too large for a message of NATS its beginning, with
``body_bytes`` and ``is_cut``. They hold addresses, as notifications do, so they are not kept for ever: the oldest go
after ``KEPT_DAYS``, or when the stream is full. The stream sequence is a notification's number.

What stands there may have been published by anyone who may publish there: whatever it is can be listed and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import DEDUPLICATION_ID, NO_MESSAGE_FOUND, STREAM_NOT_FOUND, JetStream
from relay.bus.stored import StoredMsg, leader_msg
from relay.errors import BusRefused
from relay.tracking.storage import DAY_SECONDS, NANOSECONDS, StorageConfig, ensure_stream, patiently, stream_config

T = TypeVar("T")

KEPT_DAYS = 30
"""Time to notice, to mend what was wrong, and to retry; not longer, for the sake of the addresses."""
MAX_BYTES = 64 * 1024 * 1024
"""Some 20,000 notifications. NATS sets aside what a stream may hold, so a small server might not allow more."""
DUPLICATE_WINDOW_SECONDS = 3600
"""A worker that dies between parking and deleting parks again when the visibility timeout ends, which may be long."""

HEADERS_BYTES = 256
"""In a message, for the deduplication id."""
MAX_ID_LENGTH = 128
MAX_REASON_LENGTH = 500


class Parked(NamedTuple):
    """One parked notification. A field that is missing, or of another type, is '' or 0."""

    number: int
    parked_at: str
    reason: str
    received_count: int
    """How often it had been received from the queue."""
    sqs_message_id: str
    body: str
    body_bytes: int
    """Of the body as it came."""
    is_cut: bool
    """``body`` is only its beginning."""


def ensure_parked_stream(jetstream: JetStream, config: StorageConfig) -> None:
    """Makes the stream when it is missing. Raises ``BusUnavailable`` and ``BusRefused``."""
    own = {
        "name": contract.PARKED_STREAM,
        "subjects": [contract.PARKED_SUBJECT],
        "discard": "old",
        "max_age": KEPT_DAYS * DAY_SECONDS * NANOSECONDS,
        "max_bytes": MAX_BYTES,
        "duplicate_window": DUPLICATE_WINDOW_SECONDS * NANOSECONDS,
    }
    ensure_stream(jetstream, stream_config(config, **own))


def parked_publication(
    notification_body: str, reason: str, received_count: int, sqs_message_id: str, parked_at: str, max_bytes: int
) -> Publication:
    """The message that parks a notification. Publishing it again within the duplicate window changes nothing.

    ``parked_at`` is RFC 3339; ``max_bytes`` is what a message may hold, header fields included: a body that has no room
    is cut.
    """
    body = _sound(notification_body)
    told: dict[str, Any] = {
        "body": body,
        "reason": _sound(reason[:MAX_REASON_LENGTH]),
        "received_count": received_count,
        "sqs_message_id": _sound(sqs_message_id[:MAX_ID_LENGTH]),
        "parked_at": parked_at,
    }
    room_bytes = max_bytes - HEADERS_BYTES
    payload = orjson.dumps(told)
    if len(payload) > room_bytes:
        told |= {"body": "", "body_bytes": len(body.encode()), "is_cut": True}
        told["body"] = _beginning(body, room_bytes - len(orjson.dumps(told)))
        payload = orjson.dumps(told)
    is_id = sqs_message_id.isascii() and sqs_message_id.isprintable() and 0 < len(sqs_message_id) <= MAX_ID_LENGTH
    return Publication(contract.PARKED_SUBJECT, payload, {DEDUPLICATION_ID: sqs_message_id} if is_id else None)


def _sound(text: str) -> str:
    """Without half surrogate pairs, which no JSON that others read may hold."""
    return text.encode("utf-8", "replace").decode()


def _beginning(text: str, room_bytes: int) -> str:
    """As much of the text's beginning as takes ``room_bytes`` in JSON, its quotes left aside."""
    least, most = 0, min(len(text), max(0, room_bytes))
    while least < most:
        middle = (least + most + 1) // 2
        if len(orjson.dumps(text[:middle])) - 2 <= room_bytes:
            least = middle
        else:
            most = middle - 1
    return text[:least]


class Parking:
    """What is parked. Without the stream nothing is. Raises ``BusUnavailable`` and ``BusRefused``."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def count(self) -> int:
        """How many are parked."""
        try:
            return self._jetstream.stream_info(contract.PARKED_STREAM).messages
        except BusRefused as error:
            return _unless_missing(error, 0)

    def last_number(self) -> int:
        """The highest number that was ever given, 0 when none was."""
        try:
            return self._jetstream.last_sequence(contract.PARKED_STREAM)
        except BusRefused as error:
            return _unless_missing(error, 0)

    def pages(self) -> Iterator[list[Parked]]:
        """All that is parked now, the oldest first. Holds one page in memory. Waits for a NATS that is away."""
        end = patiently(self.last_number)
        number: int | None = 1
        while number is not None and number <= end:
            page = patiently(partial(self._jetstream.page, contract.PARKED_STREAM, contract.PARKED_SUBJECT, number))
            found = [_parked(msg) for msg in page.msgs if msg.sequence <= end]
            if found:
                yield found
            number = page.next_sequence

    def get(self, number: int) -> Parked | None:
        """One notification, None when there is none of this number (any more)."""
        try:
            answer = self._jetstream.api(f"STREAM.MSG.GET.{contract.PARKED_STREAM}", {"seq": number})
        except BusRefused as error:
            return None if error.code == NO_MESSAGE_FOUND else _unless_missing(error, None)
        return _parked(leader_msg(answer))

    def drop(self, number: int) -> bool:
        """Deletes one and overwrites its bytes; False when there is none of this number (any more). May be repeated."""
        try:
            return self._jetstream.delete_msg(contract.PARKED_STREAM, number)
        except BusRefused:
            if self.get(number) is None:  # what it says of a number that was never given is "EOF"
                return False
            raise

    def drop_all(self, last_number: int) -> int:
        """Deletes all up to a number, it included; how many. What was parked later stays."""
        try:
            answer = self._jetstream.api(f"STREAM.PURGE.{contract.PARKED_STREAM}", {"seq": last_number + 1})
        except BusRefused as error:
            return _unless_missing(error, 0)
        return int(answer.get("purged", 0))


def _unless_missing(error: BusRefused, otherwise: T) -> T:
    """``otherwise`` when it was the stream that is missing."""
    if error.code != STREAM_NOT_FOUND:
        raise error
    return otherwise


def _parked(msg: StoredMsg) -> Parked:
    told = _told(msg.payload)
    body = told.get("body")
    if not isinstance(body, str):
        body = msg.payload.decode("utf-8", "replace")
    size = len(body.encode())
    return Parked(
        number=msg.sequence,
        parked_at=_text(told, "parked_at"),
        reason=_text(told, "reason"),
        received_count=_number(told, "received_count"),
        sqs_message_id=_text(told, "sqs_message_id"),
        body=body,
        body_bytes=max(size, _number(told, "body_bytes")),
        is_cut=told.get("is_cut") is True,
    )


def _told(payload: bytes) -> Mapping[str, Any]:
    try:
        told = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _text(told: Mapping[str, Any], name: str) -> str:
    return value if isinstance(value := told.get(name), str) else ""


def _number(told: Mapping[str, Any], name: str) -> int:
    value = told.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
