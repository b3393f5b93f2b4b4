"""The smarthost's replies: what one says, and where one ends in a stream of bytes (RFC 5321 §4.2).

Owns the syntax of replies, of enhanced status codes (RFC 3463 §2, RFC 2034 §4) and of the EHLO answer
(RFC 5321 §4.1.1.1). Leaves reading from sockets to ``session`` and the meaning of a refusal to ``trouble``.

A reply that breaks the grammar is a ``ProtocolViolation``: guessing where it ends would pair the next
reply with the wrong command. Everything is bounded, since a peer that never ends a reply must not fill memory.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.errors import ProtocolViolation

MAX_LINE_BYTES: Final = 4096
"""RFC 5321 §4.5.3.1.5 allows 512; servers that explain a refusal at length are known to exceed it."""
MAX_REPLY_BYTES: Final = 65536
"""All lines of one reply together, and also what may wait unread in a buffer."""
MAX_TEXT_CHARACTERS: Final = 500
"""Of ``Reply.text``: it ends up in replies to callers and in logs."""

# 1yz does not exist in SMTP (RFC 5321 §4.2.1). A bare code without text must be understood (§4.2).
_LINE: Final = re.compile(rb"([2-5][0-9]{2})(?:([ -])([^\r\n]*))?\r?\n")
_ENHANCED: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?:\s+|$)")
# What usually answers the final dot: one line, all of it printable ASCII with no space at either end of its enhanced
# code but the one, and short enough for ``Reply.text`` to show it whole. What might begin with another enhanced code,
# or with one that stands alone, is not of this kind.
_PLAIN_250: Final = re.compile(r"250 (?:(2\.[0-9]{1,3}\.[0-9]{1,3}) |(?![245]\.[0-9]))([!-~][ -~]{0,499})\r\n")
_REMOTE_ID: Final = re.compile(
    r"ok(?::? queued as |(?: id=| ))(?=\S*[0-9])([A-Za-z0-9][A-Za-z0-9._@=+-]{0,199})$", re.IGNORECASE
)
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e\xa0-\uffff\U00010000-\U0010ffff]+")


class Reply(NamedTuple):
    """One complete reply."""

    code: int
    """200 to 599."""
    lines: tuple[str, ...]
    """The text of each line without its code and without the enhanced code."""
    enhanced_code: str = ""
    """``class.subject.detail``; '' when absent or when its class contradicts ``code``."""

    @property
    def text(self) -> str:
        """All lines as one printable line of at most ``MAX_TEXT_CHARACTERS``."""
        text = self.lines[0] if len(self.lines) == 1 else " ".join(filter(None, self.lines))
        if not text.isprintable():
            text = _UNPRINTABLE.sub(" ", text)
        return text[:MAX_TEXT_CHARACTERS]

    @property
    def is_positive(self) -> bool:
        """2yz: done."""
        return self.code < 300

    @property
    def is_intermediate(self) -> bool:
        """3yz: go on (354 to DATA, 334 to AUTH)."""
        return 300 <= self.code < 400

    @property
    def is_transient(self) -> bool:
        """4yz: not now."""
        return 400 <= self.code < 500

    @property
    def is_permanent(self) -> bool:
        """5yz: never in this form."""
        return self.code >= 500

    @property
    def remote_id(self) -> str:
        """The peer's own id of the mail: ``250 Ok <id>``, ``250 2.0.0 Ok: queued as <id>``; '' when there is none."""
        return remote_id_in(self.lines[0]) if self.is_positive else ""


def plain_250(data: bytes) -> tuple[str, ...] | None:
    """Return enhanced code and text when ``data`` is one whole 250 of the usual form, and nothing else; else ``None``.

    What ``ReplyBuffer`` makes of the same bytes, for a fraction of the work.
    """
    match = _PLAIN_250.fullmatch(data.decode("latin-1"))
    return match and match.groups("")


def remote_id_in(line: str) -> str:
    """Return the id in the text of a positive reply's first line, '' when there is none."""
    match = _REMOTE_ID.match(line) if len(line) > 3 else None
    return match[1] if match else ""


class ReplyBuffer:
    """Bytes in, replies out: an incremental parser that keeps what has not been taken yet.

    Lines end in CRLF; a lone LF is understood too, as most clients do. Each line is looked at once, so a peer that
    sends byte by byte costs no more than one that does not.
    """

    __slots__ = ("_code", "_data", "_lines", "_lines_bytes", "is_empty")

    def __init__(self) -> None:
        self.is_empty = True
        """Whether nothing has arrived that was not taken: bytes left over belong to no command."""
        self._data = b""
        self._code = b""
        self._lines: list[bytes] = []
        self._lines_bytes = 0

    def feed(self, data: bytes) -> None:
        """Add what was read. Raises ``ProtocolViolation`` when too much waits."""
        self._data = self._data + data if self._data else data
        self.is_empty = self.is_empty and not data
        if len(self._data) > MAX_REPLY_BYTES:
            raise ProtocolViolation(f"more than {MAX_REPLY_BYTES} bytes of replies wait to be read")

    def take(self) -> Reply | None:
        """Return the next complete reply and forget its bytes, or ``None`` when more must be fed first.

        Raises ``ProtocolViolation`` for what is no reply, a changing code within one reply, or one beyond the bounds.
        """
        while self._data:
            match = _LINE.match(self._data)
            if match is None:
                self._refuse_malformed()
                return None
            line_bytes = match.end()
            if line_bytes > MAX_LINE_BYTES:
                raise ProtocolViolation(f"a reply line of more than {MAX_LINE_BYTES} bytes")
            self._data = self._data[line_bytes:]
            code, separator, text = match.groups(b"")
            if not self._lines and separator != b"-":
                self.is_empty = not self._data
                return _reply(code, (text,))
            self._add_line(code, text, line_bytes)
            if separator != b"-":
                lines = tuple(self._lines)
                self._lines.clear()
                self.is_empty = not self._data
                return _reply(code, lines)
        return None

    def _add_line(self, code: bytes, text: bytes, line_bytes: int) -> None:
        if not self._lines:
            self._code = code
            self._lines_bytes = 0
        elif code != self._code:
            raise ProtocolViolation("the lines of one reply differ in their code")
        self._lines.append(text)
        self._lines_bytes += line_bytes
        if self._lines_bytes > MAX_REPLY_BYTES:
            raise ProtocolViolation(f"a reply of more than {MAX_REPLY_BYTES} bytes")

    def _refuse_malformed(self) -> None:
        """Raise unless the data may still become a line when more of it arrives."""
        if b"\n" in self._data:
            raise ProtocolViolation("a line that is no SMTP reply")
        if len(self._data) > MAX_LINE_BYTES:
            raise ProtocolViolation(f"a reply line of more than {MAX_LINE_BYTES} bytes")


class Extensions(NamedTuple):
    """What the smarthost offers (RFC 5321 §4.1.1.1), as far as Relay uses it."""

    pipelining: bool = False
    """RFC 2920."""
    smtputf8: bool = False
    """RFC 6531."""
    starttls: bool = False
    """RFC 3207."""
    eightbitmime: bool = False
    """RFC 6152."""
    size: bool = False
    """RFC 1870: MAIL may carry ``SIZE=``."""
    size_limit_bytes: int = 0
    """The most that one mail may have; 0 when no limit was named."""
    auth: frozenset[str] = frozenset()
    """Mechanisms in upper case (RFC 4954)."""


def parse_extensions(ehlo: Reply) -> Extensions:
    """Read the 250 to EHLO; unknown keywords and malformed parameters are passed over."""
    keywords: dict[str, list[str]] = {}
    for line in ehlo.lines[1:]:
        # ``AUTH=LOGIN`` is how servers spelt it before RFC 2554, and still do next to the right form.
        words = line.upper().replace("AUTH=", "AUTH ", 1).split()
        if words:
            keywords.setdefault(words[0], []).extend(words[1:])
    limit = keywords.get("SIZE", [])[:1]
    return Extensions(
        pipelining="PIPELINING" in keywords,
        smtputf8="SMTPUTF8" in keywords,
        starttls="STARTTLS" in keywords,
        eightbitmime="8BITMIME" in keywords,
        size="SIZE" in keywords,
        size_limit_bytes=int(limit[0]) if limit and limit[0].isascii() and limit[0].isdigit() else 0,
        auth=frozenset(keywords.get("AUTH", [])),
    )


def _reply(code: bytes, lines: tuple[bytes, ...]) -> Reply:
    texts = [line.decode("utf-8", "replace") for line in lines]
    enhanced_code = ""
    match = _ENHANCED.match(texts[0])
    if match is not None and match[1][0] == chr(code[0]):
        enhanced_code = match[1]
        texts = [text.removeprefix(enhanced_code).lstrip() for text in texts]
    return Reply(int(code), tuple(texts), enhanced_code)
