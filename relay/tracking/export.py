"""A group as rows: its records, one a line, as CSV or as JSON lines; of any size, from any place on.

Reads piece by piece and holds one piece. A mail that was logged twice comes once, unless ``REMEMBERED`` others stand
between. Mails without a record (any more), or with a broken one, are counted and left out.

**CSV** (RFC 4180, UTF-8, LF, every cell in quotes) is read by spreadsheets, and what callers wrote must not become
a formula there (OWASP: CSV injection). A text that begins with ``=``, ``+``, ``-``, ``@`` or their like (full-width,
small, raised; the minus sign) gets a ``'`` in front. What cannot be seen, and quotes, do not count as its beginning:
importers drop white space, byte order marks and such. Where a spreadsheet separates cells by ``;`` (most of Europe)
or ``|`` instead of commas, our quotes protect nothing, so behind each of these the same is done. Control characters
become U+FFFD, so a record is always one line. JSON lines are the records as they are stored.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import orjson

from relay.errors import BusRefused
from relay.tracking.groups import group_token
from relay.tracking.pages import PIECE_MAILS, Glance, Group, GroupReader, Piece, Place
from relay.tracking.record import parse_record
from relay.tracking.storage import PATIENCE_SECONDS, patiently

REMEMBERED = 100_000
"""Mails whose doubles are noticed: some 20 MB."""

COLUMNS = (
    "email_id",
    "group_id",
    "to",
    "subject",
    "sent_at",
    "outcome",
    "remote_id",
    "delivered",
    "delivered_at",
    "opened",
    "open_count",
    "last_opened_at",
    "click_count",
    "last_clicked_at",
    "failed",
    "failed_at",
    "bounced_at",
    "complained_at",
    "delayed_at",
    "rejected_at",
    "unsubscribed_at",
    "erased_at",
)
"""The fields of a record that have a column in CSV, in their order. Columns are added at the end, never renamed."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_OTHER_SEPARATORS = re.compile(r"([;|])")
_FORMULA_SIGNS = frozenset("=+-@\N{MINUS SIGN}")
_UNSEEN_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and a symbol by their category, and blank: fillers of Hangul, Braille without a dot."""


class Rows(NamedTuple):
    """Some records of a group, and where it goes on."""

    lines: bytes
    written: int
    covered: int
    """Mails that they are about, with and without a record."""
    next_place: Place | None


class Format(NamedTuple):
    """How a record becomes a line."""

    header: bytes
    line: Callable[[Mapping[str, Any]], bytes]


def rows(reader: GroupReader, group_id: str, format_: Format, place: Place | None = None) -> Iterator[Rows]:
    """The group's records from ``place`` on, piece by piece; nothing at all when there is no such group.

    A mail without a group is found by its own id. Waits for a NATS that is away; raises ``BusUnavailable`` when it
    stays away, ``BusRefused``, also instead of the last piece when the log was made anew on the way: its places are
    other ones then.
    """
    glance = look(reader, group_id)
    if not glance.is_known:
        record = _mail_without_group(reader, group_id)
        if record is not None:
            yield Rows(format_.line(record), 1, 1, None)
        return
    group = reader.group(group_id, glance.array)
    seen = _Recent(REMEMBERED)
    next_place: Place | None = place or Place()
    while next_place is not None:
        piece = _piece(group, next_place, seen)
        lines = b"".join(format_.line(mail.record) for mail in piece.mails)
        if piece.next_place is None:
            _check_log(reader, group_id, glance.log_made_at)
        yield Rows(lines, len(piece.mails), piece.covered, piece.next_place)
        next_place = piece.next_place


def _check_log(reader: GroupReader, group_id: str, made_at: str) -> None:
    if patiently(partial(reader.log.figures, group_token(group_id))).log_made_at != made_at:
        raise BusRefused("the log was made anew meanwhile; begin anew")


def look(reader: GroupReader, group_id: str) -> Glance:
    """What can be said of the group without reading it, also when NATS is away for a moment."""
    return patiently(partial(reader.look, group_id))


def _piece(group: Group, place: Place, seen: _Recent) -> Piece:
    """Asked again when it was not answered; what was read of it by then is not taken for seen."""

    def read() -> Piece:
        new = _Seen(seen)
        piece = group.read(place, new, PIECE_MAILS)
        seen.take(new)
        return piece

    return patiently(read, PATIENCE_SECONDS)


class _Recent:
    """Which mails came lately."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ids: set[str] = set()
        self._order: deque[str] = deque()

    def __contains__(self, email_id: object) -> bool:
        return email_id in self._ids

    def take(self, email_ids: set[str]) -> None:
        """Remembers these, and forgets the oldest where they are too many."""
        self._ids |= email_ids
        self._order.extend(email_ids)
        while len(self._order) > self._size:
            self._ids.discard(self._order.popleft())


class _Seen(set[str]):
    """The mails of one piece, on top of the recent ones."""

    def __init__(self, recent: _Recent) -> None:
        super().__init__()
        self._recent = recent

    def __contains__(self, email_id: object) -> bool:
        return super().__contains__(email_id) or email_id in self._recent


def _mail_without_group(reader: GroupReader, group_id: str) -> dict[str, Any] | None:
    entry = patiently(partial(reader.record, group_id))
    record = parse_record(entry.value) if entry is not None else None
    return record if record is not None and record.get("group_id") == group_id else None


def csv_line(record: Mapping[str, Any]) -> bytes:
    """The record's columns as one line of CSV."""
    return _csv([csv_cell(record.get(name)) for name in COLUMNS])


def csv_cell(value: object) -> str:
    """A value as it stands in its cell, safe to open in a spreadsheet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)  # a number below zero is one, and no formula
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _without_formulas(text))


def _without_formulas(text: str) -> str:
    if text[:1].isascii() and text[:1].isalnum() and ";" not in text and "|" not in text:
        return text
    pieces = _OTHER_SEPARATORS.split(text)
    return "".join(f"'{piece}" if _is_formula(piece) else piece for piece in pieces)


def _is_formula(text: str) -> bool:
    """Whether the first character that can be seen, quotes aside, begins a formula."""
    for character in text:
        is_seen = unicodedata.category(character)[0] not in "CMZ" and character not in _UNSEEN_LETTERS
        if is_seen and character != '"':
            return unicodedata.normalize("NFKC", character)[0] in _FORMULA_SIGNS
    return False


def _csv(cells: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(cells)
    return line.getvalue().encode("utf-8", "replace")


def json_line(record: Mapping[str, Any]) -> bytes:
    """The record as one line of JSON."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


FORMATS = {
    "csv": Format(_csv(list(COLUMNS)), csv_line),
    "jsonl": Format(b"", json_line),
}
"""By the name that ``--format`` takes."""
