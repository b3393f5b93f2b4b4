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
from relay.bus.jetstream import MESSAGE_ID, JetStream

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
    message = {"email_id": email_id, "at": at}
    msg_id = f"{email_id}.{fact.value}"
    if event_id:
        message["event_id"] = event_id
        msg_id = f"{msg_id}.{event_id}"
    nats_subject = f"{contract.LOG_PREFIX}.{token}.{fact.value}"
    return Publication(nats_subject, orjson.dumps(message), {MESSAGE_ID: msg_id})


class Log:
    """Questions to the log. Raises ``BusUnavailable`` and ``BusRefused``."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def counts(self, token: str) -> dict[str, int]:
        """How many facts of each kind the group has; kinds it has none of are left out. One request."""
        prefix = f"{contract.LOG_PREFIX}.{token}."
        info = self._jetstream.api(f"STREAM.INFO.{contract.LOG_STREAM}", {"subjects_filter": f"{prefix}*"})
        subjects = info["state"].get("subjects") or {}
        return {nats_subject.removeprefix(prefix): int(count) for nats_subject, count in subjects.items()}

    def page(self, token: str, from_sequence: int, limit: int = PAGE_LIMIT) -> Page:
        """The mails whose ``sent`` facts stand at ``from_sequence`` or after it, at most ``limit``."""
        nats_subject = f"{contract.LOG_PREFIX}.{token}.{Fact.SENT.value}"
        found = self._jetstream.get_many(
            contract.LOG_STREAM, {"seq": max(1, from_sequence), "next_by_subj": nats_subject, "batch": limit}
        )
        email_ids = [str(orjson.loads(stored.payload)["email_id"]) for stored in found]
        is_last = not found or found[-1].pending == 0
        return Page(email_ids, None if is_last else found[-1].sequence + 1)

    def email_ids(self, token: str) -> Iterator[list[str]]:
        """All mails of the group, page by page."""
        sequence: int | None = 1
        while sequence is not None:
            page = self.page(token, sequence)
            yield page.email_ids
            sequence = page.next_sequence
