"""The log: the stream ``EMAIL_LOG``, one small message per fact, append-only.

Subjects are ``lfx.email-service.log.<group token>.<fact>``. The server counts the messages of a subject
anyway, so a group's figures are one request however large the group, and a page of its mails is a
direct get from a stream sequence on (which is the cursor).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from relay import contract
from relay.bus.client import Publication, seconds_left
from relay.bus.jetstream import DEDUPLICATION_ID, NO_MESSAGE_FOUND, PAGE_LIMIT, JetStream
from relay.errors import BusRefused
from relay.tracking.facts import EVENTS, Fact
from relay.tracking.record import is_email_id, latest, rfc3339

LOOKUP_PAGES = 300
"""Of 1,000 facts; some four seconds."""


class Sent(NamedTuple):
    """A ``sent`` fact: a mail, and where in the log it stands."""

    email_id: str
    sequence: int


class Figures(NamedTuple):
    """A group's figures, from one moment."""

    counts: dict[str, int]
    """Facts of each kind; kinds it has none of are left out."""
    log_made_at: str
    """When the log was made, as the server writes it: the sequences of one made anew mean something else."""


class Page(NamedTuple):
    """Some mails of a group, in the order in which they were sent."""

    sent: list[Sent]
    next_sequence: int | None
    """Where the next page starts, None after the last."""

    @property
    def email_ids(self) -> list[str]:
        """The mails without their places."""
        return [each.email_id for each in self.sent]


def fact_publication(token: str, fact: Fact, email_id: str, at: str, event_id: str = "") -> Publication:
    """The message that states a fact. Publishing it again within the duplicate window changes nothing."""
    stated = {"email_id": email_id, "at": at}
    deduplication_id = f"{email_id}.{fact}"
    if event_id:
        stated["event_id"] = event_id
        deduplication_id = f"{deduplication_id}.{event_id}"
    return Publication(_subject(token, fact), orjson.dumps(stated), {DEDUPLICATION_ID: deduplication_id})


class Log:
    """Questions to the log. Raises ``BusUnavailable`` and ``BusRefused``.

    Each blocks for ``timeout_seconds`` at most, or for the ``JetStream``'s own.
    """

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream

    def counts(self, token: str, timeout_seconds: float | None = None) -> dict[str, int]:
        """How many facts of each kind the group has; kinds it has none of are left out. One request."""
        return self.figures(token, timeout_seconds).counts

    def figures(self, token: str, timeout_seconds: float | None = None) -> Figures:
        """The counts, and which log they are of. One request."""
        prefix = f"{contract.LOG_PREFIX}.{token}."
        question = {"subjects_filter": f"{prefix}*"}
        info = self._jetstream.api(f"STREAM.INFO.{contract.LOG_STREAM}", question, timeout_seconds)
        subjects = info["state"].get("subjects") or {}
        counts = {nats_subject.removeprefix(prefix): int(count) for nats_subject, count in subjects.items()}
        return Figures(counts, str(info.get("created", "")))

    def first_sent_at(self, token: str, timeout_seconds: float | None = None) -> str:
        """When the first mail of the group was sent; '' when none was. One request."""
        question = {"seq": 1, "next_by_subj": _subject(token, Fact.SENT), "batch": 1}
        found = self._jetstream.get_many(contract.LOG_STREAM, question, timeout_seconds)
        return _at(found[0].payload) if found else ""

    def last_event_at(self, token: str, timeout_seconds: float | None = None) -> str:
        """The latest time among the newest fact of each kind but ``sent``; '' when there is none. One request."""
        nats_subjects = [_subject(token, fact) for fact in EVENTS]
        found = self._jetstream.get_many(contract.LOG_STREAM, {"multi_last": nats_subjects}, timeout_seconds)
        return latest(*(_at(stored.payload) for stored in found))

    def page(
        self, token: str, from_sequence: int, limit: int = PAGE_LIMIT, timeout_seconds: float | None = None
    ) -> Page:
        """The mails whose ``sent`` facts stand at ``from_sequence`` or after it, at most ``limit``.

        The end is the leader's: any replica may answer, and one that lags lacks the newest.
        """
        page = self._jetstream.page(
            contract.LOG_STREAM, _subject(token, Fact.SENT), from_sequence, limit, timeout_seconds=timeout_seconds
        )
        sent = [Sent(email_id, stored.sequence) for stored in page.msgs if (email_id := _email_id(stored.payload))]
        return Page(sent, page.next_sequence)

    def lacking(
        self, token: str, fact: Fact, wanted: set[tuple[str, str]], between: tuple[float, float], deadline: float
    ) -> set[tuple[str, str]] | None:
        """Which facts (``email_id``, ``event_id``) were not logged between two moments, as the log's leader knows.

        The moments are in epoch seconds by the server's clock. Walks until all are found, or to the end; None when
        ``LOOKUP_PAGES`` were not enough, or half of the time until ``deadline`` (``time.monotonic()``).
        """
        left = set(wanted)
        give_up_at = time.monotonic() + seconds_left(deadline) / 2
        nats_subject = _subject(token, fact)
        sequence, end = (self._first_since(nats_subject, moment, seconds_left(deadline)) for moment in between)
        for _ in range(LOOKUP_PAGES):
            if not left or sequence is None or (end is not None and sequence >= end):
                return left
            if time.monotonic() >= give_up_at:
                return None
            page = self._jetstream.page(
                contract.LOG_STREAM, nats_subject, sequence, timeout_seconds=seconds_left(deadline)
            )
            left -= {(_email_id(each.payload), _stated(each.payload, "event_id")) for each in page.msgs}
            sequence = page.next_sequence
        return None

    def _first_since(self, nats_subject: str, moment: float, timeout_seconds: float) -> int | None:
        question = {"next_by_subj": nats_subject, "start_time": rfc3339(moment)}
        try:
            answer = self._jetstream.api(f"STREAM.MSG.GET.{contract.LOG_STREAM}", question, timeout_seconds)
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return None
            raise
        return int(answer["message"]["seq"])

    def email_ids(self, token: str) -> Iterator[list[str]]:
        """All mails of the group, page by page."""
        sequence: int | None = 1
        while sequence is not None:
            page = self.page(token, sequence)
            yield page.email_ids
            sequence = page.next_sequence


def _subject(token: str, fact: Fact) -> str:
    return f"{contract.LOG_PREFIX}.{token}.{fact}"


def _stated(payload: bytes, field: str) -> str:
    try:
        value = orjson.loads(payload)[field]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) else ""


def _at(payload: bytes) -> str:
    return _stated(payload, "at")


def _email_id(payload: bytes) -> str:
    """The mail a fact is about; '' when that could not be a key, whoever published it."""
    email_id = _stated(payload, "email_id")
    return email_id if is_email_id(email_id) else ""
