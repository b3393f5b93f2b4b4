"""What travels over the bus, and which subjects may be published to. Plain values; no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

MAX_SUBJECT_BYTES = 4000
"""Subject and reply subject together; the server's control line holds 4,096 bytes."""

NO_HEADERS: Mapping[str, str] = {}

_TOKENS = re.compile(r"[^\x00-\x20\x7f.*>]+(?:\.[^\x00-\x20\x7f.*>]+)*")


def is_plain_subject(nats_subject: str) -> bool:
    """Whether one may publish there: no wildcard token, no empty token, no white space, not too long."""
    return len(nats_subject.encode("utf-8", "replace")) <= MAX_SUBJECT_BYTES and bool(_TOKENS.fullmatch(nats_subject))


class Msg(NamedTuple):
    """A message as NATS delivered it."""

    nats_subject: str
    reply_subject: str
    payload: bytes
    headers: Mapping[str, str]

    @property
    def status(self) -> str:
        """The status of a message that the server itself made ('503' = nobody listens), '' otherwise."""
        return self.headers.get("Status", "")


class Publication(NamedTuple):
    """A message to be published."""

    nats_subject: str
    payload: bytes
    headers: dict[str, str] | None = None
