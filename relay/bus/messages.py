"""What travels over the bus, and which subjects may be published to. Plain values; no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

MAX_SUBJECT_BYTES = 4000
"""Subject and reply subject together; the server's control line holds 4,096 bytes."""

NO_HEADERS: Mapping[str, str] = {}

_TOKENS = r"[^\x00-\x20\x7f.*>]+(?:\.[^\x00-\x20\x7f.*>]+)*"
_PLAIN = re.compile(_TOKENS)


def is_plain_subject(nats_subject: str) -> bool:
    """Whether one may publish there: no wildcard token, no empty token, no white space, not too long."""
    return len(nats_subject.encode("utf-8", "replace")) <= MAX_SUBJECT_BYTES and bool(_PLAIN.fullmatch(nats_subject))


class ReplyRule:
    """Where replies may go: plain subjects under one of ``prefixes``, and never our own inbox."""

    def __init__(self, prefixes: tuple[str, ...], own_inbox: str) -> None:
        under = "|".join(re.escape(prefix) for prefix in prefixes if is_plain_subject(prefix))
        self._allowed = re.compile(rf"(?!{re.escape(own_inbox)})(?:{under})\.{_TOKENS}" if under else r"(?!)")

    def allows(self, nats_subject: str) -> bool:
        """Whether a reply may go to ``nats_subject``."""
        return (
            self._allowed.fullmatch(nats_subject) is not None
            and len(nats_subject.encode("utf-8", "replace")) <= MAX_SUBJECT_BYTES
        )


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


class FixedHeaders(dict[str, str]):
    """Header fields that many publications share: checked and written out once. Not to be changed."""

    __slots__ = ("block",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        """Raises ``ValueError`` like ``header_block``."""
        super().__init__(fields)
        self.block = header_block(fields)


def header_block(headers: Mapping[str, str]) -> bytes:
    """Header fields as they travel. Raises ``ValueError`` when one holds a line end or is no text."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\r") + lines.count("\n") != 2 * len(headers):
        raise ValueError("a header field holds a line end")
    return f"NATS/1.0\r\n{lines}\r\n".encode()
