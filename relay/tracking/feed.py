"""The log as it is read by people and programs: its facts as values, from a moment or a place on.

What stands in the log may have been published by anyone who may publish there, so every field is only what it
seems to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import orjson

from relay import contract
from relay.bus.jetstream import NO_MESSAGE_FOUND, JetStream
from relay.bus.stored import StoredMsg
from relay.errors import BusRefused
from relay.tracking.groups import SHARED_TOKEN, group_of
from relay.tracking.record import parse_time
from relay.tracking.storage import patiently


class LoggedFact(NamedTuple):
    """One message of the log. A field that is missing, or no text, is ''."""

    sequence: int
    token: str
    fact: str
    email_id: str
    at: str
    event_id: str

    @property
    def group_id(self) -> str | None:
        """The group as given; '' for mails without a group, None where the token does not tell."""
        if self.token == SHARED_TOKEN:
            return ""
        return group_of(self.token)


def logged_fact(msg: StoredMsg) -> LoggedFact:
    """The fact in a message of the log."""
    token, _, fact = msg.nats_subject.removeprefix(f"{contract.LOG_PREFIX}.").rpartition(".")
    try:
        stated = orjson.loads(msg.payload)
    except orjson.JSONDecodeError:
        stated = None
    stated = stated if isinstance(stated, dict) else {}
    fields = [value if isinstance(value := stated.get(name), str) else "" for name in ("email_id", "at", "event_id")]
    return LoggedFact(msg.sequence, token, fact, *fields)


def subject_filter(token: str = "") -> str:
    """The subjects of a group's facts, or of everybody's."""
    return f"{contract.LOG_PREFIX}.{token}.*" if token else f"{contract.LOG_PREFIX}.>"


def facts(
    jetstream: JetStream, nats_subject_filter: str, from_sequence: int, to_sequence: int
) -> Iterator[list[LoggedFact]]:
    """The facts between two places of the log, both included; page by page, in order. Waits for a NATS that is away."""
    sequence: int | None = from_sequence
    while sequence is not None and sequence <= to_sequence:
        page = patiently(partial(jetstream.page, contract.LOG_STREAM, nats_subject_filter, sequence))
        found = [logged_fact(msg) for msg in page.msgs if msg.sequence <= to_sequence]
        if found:
            yield found
        sequence = page.next_sequence


def sequence_at(jetstream: JetStream, at: float) -> int:
    """Where what was logged at ``at`` (epoch seconds) or later begins: nothing from there on is older, all before is.

    Some 30 small questions to the log's leader, however long it is.
    """
    info = patiently(partial(jetstream.stream_info, contract.LOG_STREAM))
    low, high = max(1, info.first_sequence), info.last_sequence + 1
    while low < high:
        middle = (low + high) // 2
        found = patiently(partial(_next, jetstream, middle))
        if found is None:
            high = middle
            continue
        sequence, stored_at = found
        if stored_at < at:
            low = sequence + 1
        else:
            high = middle
    return low


def _next(jetstream: JetStream, sequence: int) -> tuple[int, float] | None:
    """The first message at ``sequence`` or behind it: its own sequence, and when it was logged."""
    try:
        answer = jetstream.api(f"STREAM.MSG.GET.{contract.LOG_STREAM}", {"seq": sequence, "next_by_subj": ">"})
    except BusRefused as error:
        if error.code == NO_MESSAGE_FOUND:
            return None
        raise
    stored_at = parse_time(answer["message"]["time"])
    return int(answer["message"]["seq"]), stored_at.timestamp() if stored_at else 0.0
