"""The log: the stream ``EMAIL_LOG``, one small message per fact, append-only.

Subjects are ``lfx.email-service.log.<group token>.<fact>``. The server counts the messages of a subject
anyway, so a group's figures are one request however large the group, and a page of its mails is a
direct get from a stream sequence on (which is the cursor).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import orjson

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import DEDUPLICATION_ID, JetStream
from relay.tracking.record import is_email_id

PAGE_LIMIT = 1000


class Fact(StrEnum):
    """What is logged of a mail. ``opened`` and ``clicked`` are first times, ``open`` and ``click`` every time."""

    SENT = "sent"
    DELIVERED = "delivered"
    OPENED = "opened"
    OPEN = "open"
    CLICKED = "clicked"
    CLICK = "click"
    FAILED = "failed"
    BOUNCED = "bounced"
    COMPLAINED = "complained"
    DELAYED = "delayed"
    REJECTED = "rejected"
    UNSUBSCRIBED = "unsubscribed"


class Page(NamedTuple):
    """Some mails of a group, in the order in which they were sent."""

    email_ids: list[str]
    next_sequence: int | None
    """Where the next page starts, None after the last."""


def fact_publication(token: str, fact: Fact, email_id: str, at: str, event_id: str = "") -> Publication:
    """The message that states a fact. Publishing it again within the duplicate window changes nothing."""
    stated = {"email_id": email_id, "at": at}
    deduplication_id = f"{email_id}.{fact.value}"
    if event_id:
        stated["event_id"] = event_id
        deduplication_id = f"{deduplication_id}.{event_id}"
    nats_subject = f"{contract.LOG_PREFIX}.{token}.{fact.value}"
    return Publication(nats_subject, orjson.dumps(stated), {DEDUPLICATION_ID: deduplication_id})


class Log:
    """Questions to the log. Raises ``BusUnavailable`` and ``BusRefused``."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def counts(self, token: str) -> dict[str, int]:
        """How many facts of each kind the group has; kinds it has none of are left out. One request."""
        prefix = f"{contract.LOG_PREFIX}.{token}."
        info = self._jetstream.api(f"STREAM.INFO.{contract.LOG_STREAM}", {"subjects_filter": f"{prefix}*"})
        counts = info["state"].get("subjects") or {}
        return {nats_subject.removeprefix(prefix): int(count) for nats_subject, count in counts.items()}

    def page(self, token: str, from_sequence: int, limit: int = PAGE_LIMIT) -> Page:
        """The mails whose ``sent`` facts stand at ``from_sequence`` or after it, at most ``limit``."""
        nats_subject = f"{contract.LOG_PREFIX}.{token}.{Fact.SENT.value}"
        found = self._jetstream.get_many(
            contract.LOG_STREAM, {"seq": max(1, from_sequence), "next_by_subj": nats_subject, "batch": limit}
        )
        email_ids = [email_id for stored in found if (email_id := _email_id(stored.payload))]
        is_last = not found or found[-1].pending == 0
        return Page(email_ids, None if is_last else found[-1].sequence + 1)

    def email_ids(self, token: str) -> Iterator[list[str]]:
        """All mails of the group, page by page."""
        sequence: int | None = 1
        while sequence is not None:
            page = self.page(token, sequence)
            yield page.email_ids
            sequence = page.next_sequence


def _email_id(payload: bytes) -> str:
    """The mail a fact is about; '' when that could not be a key, whoever published it."""
    try:
        email_id = str(orjson.loads(payload)["email_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return email_id if is_email_id(email_id) else ""
