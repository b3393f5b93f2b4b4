"""Fields that callers may add to a mail: threads, header fields of their own, and tags for Amazon SES.

Owns which of them are taken and how they stand in the header section: message ids (RFC 5322 §3.6.4), folding
(§2.2.3), the tags' syntax (SES "MessageTag"). What is wrong is refused and said, never mended: a caller who
thinks that a field went out must be right. How free text becomes a field is ``header``'s, which drops control
characters once more.

Every function that judges raises ``SubmissionRejected`` with the contract's ``INVALID_REQUEST_PAYLOAD``; its
detail begins with the name of the field, and repeats no value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NoReturn

from relay import contract
from relay.errors import SubmissionRejected
from relay.submission import header

MESSAGE_ID_LIMIT: Final = header.TOKEN_LIMIT_BYTES
"""Characters of one message id, its angle brackets included: what fits on a line, whatever the field."""
MESSAGE_IDS_LIMIT: Final = 16_000
"""Characters of all message ids in one field."""
HEADERS_LIMIT: Final = 100
"""Header fields of a caller's own in one mail."""
HEADER_VALUE_LIMIT: Final = 4_000
"""Characters in the value of one."""
TAGS_LIMIT: Final = 49
"""SES takes 50 tags a mail; one is ours."""

DEFAULT_ALLOWED_HEADERS: Final = ("list-*", "x-*", "auto-submitted", "precedence")

# What the relay, a smarthost or a mailbox provider writes, or what decides who gets the mail and how it is read.
_NEVER_ALLOWED: Final = frozenset(
    (
        *(
            "from",
            "sender",
            "reply-to",
            "to",
            "cc",
            "bcc",
            "subject",
            "date",
            "message-id",
            "in-reply-to",
            "references",
        ),
        *("mime-version", "return-path", "received", "received-spf", "dkim-signature", "domainkey-signature"),
        *("authentication-results", "delivered-to", "apparently-to", "original-recipient", "envelope-to"),
        *("x-original-to", "x-envelope-to", "x-envelope-from", "x-bcc"),
    )
)
_NEVER_ALLOWED_PREFIXES: Final = ("content-", "resent-", "arc-", "x-ses-", "x-lfx-")
# Programs read these: an encoded word has no meaning in them, and SES refuses a mail that has one of them twice.
_MACHINE_READ: Final = ("list-", "auto-submitted", "precedence", "archived-at", "importance", "priority", "sensitivity")

_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,74}[A-Za-z0-9])?")
_PATTERN: Final = re.compile(r"[a-z0-9_-]*\*?")
# Controls, the separators that some software takes for a line end, and halves of surrogate pairs.
_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FOLD: Final = re.compile("(?<=[^ ]) (?=[^ ])")
_FOLDED_LINE: Final = 78  # RFC 5322 §2.1.1

_DOT_ATOM_TEXT: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
_MESSAGE_ID: Final = re.compile(rf"<{_DOT_ATOM_TEXT}@(?:{_DOT_ATOM_TEXT}|\[[!-Z^-~]*\])>")
# The ids of other people's mails, which often keep to less: visible ASCII in angle brackets.
_FOREIGN_ID: Final = re.compile(r"<[!-;=?-~]+>")
_FOREIGN_IDS: Final = re.compile(r"(?:[ \t\r\n]*<[!-;=?-~]+>)+[ \t\r\n]*")
_TAG: Final = re.compile(r"[A-Za-z0-9_-]{1,256}")


def reject(field: str, detail: str) -> NoReturn:
    """Refuses the request for the sake of ``field``; ``detail`` begins with its name."""
    raise SubmissionRejected(contract.INVALID_REQUEST_PAYLOAD, field, detail)


# -- threads ----------------------------------------------------------------------------------------------------------


def check_message_id(field: str, text: str) -> str:
    """``text``, when it is one message id as RFC 5322 §3.6.4 has it today, without comments and spaces."""
    # An encoded word in it would be decoded by some who read it, to a line end for instance.
    if len(text) > MESSAGE_ID_LIMIT or "=?" in text or not _MESSAGE_ID.fullmatch(text):
        reject(field, f"{field} must be '<local@domain>', in ASCII, with at most {MESSAGE_ID_LIMIT} characters")
    return text


def check_message_ids(field: str, text: str) -> tuple[str, ...]:
    """The message ids in ``text``: one or several, with or without white space between them.

    They are those of other mails, so any visible ASCII is taken between the angle brackets.
    """
    if len(text) > MESSAGE_IDS_LIMIT:
        reject(field, f"{field} is longer than {MESSAGE_IDS_LIMIT} characters; leave out ids from its middle")
    if "=?" in text or not _FOREIGN_IDS.fullmatch(text):
        reject(field, f"{field} must be message ids in angle brackets, '<…> <…>', in visible ASCII")
    found = tuple(_FOREIGN_ID.findall(text))
    if max(map(len, found)) > MESSAGE_ID_LIMIT:
        reject(field, f"{field} has a message id of more than {MESSAGE_ID_LIMIT} characters")
    return found


def message_ids_field(name: str, message_ids: Iterable[str]) -> str:
    """The line or lines ``name: <…> <…>`` without the last CRLF."""
    return _packed(name, message_ids, _FOLDED_LINE)


# -- header fields ----------------------------------------------------------------------------------------------------


def check_header(name: str, value: str) -> None:
    """Whether ``name: value`` can be a header field at all; whether it is welcome is left to ``judge_headers``."""
    if not _FIELD_NAME.fullmatch(name):
        # The name itself may be anything, so it is not repeated.
        reject("headers", "headers: a name must be 1 to 76 letters, digits, '-' and '_', such as 'X-Campaign'")
    if not value:
        reject("headers", f"headers.{name} is empty; leave it out")
    if len(value) > HEADER_VALUE_LIMIT:
        reject("headers", f"headers.{name} is longer than {HEADER_VALUE_LIMIT} characters")
    if _FORBIDDEN.search(value):
        reject("headers", f"headers.{name} has a line end or another control character; give the value on one line")
    if not _is_machine_read(name):
        return
    if not value.isascii() or "=?" in value or value[0] == " " or value[-1] == " ":
        reject("headers", f"headers.{name} must be ASCII, without encoded words and without a space at either end")
    if _has_overlong_line(_folded(name, value)):
        reject("headers", f"headers.{name} has no space to fold it at in {header.LINE_LIMIT_BYTES} characters")


def judge_headers(headers: Iterable[tuple[str, str]], allowed: tuple[str, ...]) -> None:
    """Whether callers may set these fields. ``allowed`` is what ``header_patterns`` gives."""
    seen: set[str] = set()
    for name, _ in headers:
        lower = name.lower()
        if _is_never_allowed(lower):
            reject("headers", f"headers.{name} is never taken from callers; see the fields of send_email")
        if not any(lower.startswith(p[:-1]) if p.endswith("*") else lower == p for p in allowed):
            reject("headers", f"headers.{name} is not allowed; SMTP_ALLOWED_HEADERS of the relay names those that are")
        if lower in seen and _is_machine_read(lower):
            reject("headers", f"headers.{name} stands twice; a mail may have it once")
        seen.add(lower)


def header_patterns(texts: Iterable[str]) -> tuple[str, ...]:
    """The names of SMTP_ALLOWED_HEADERS in the form that ``judge_headers`` needs; blank entries are dropped.

    A ``*`` at the end of a name stands for whatever follows. Raises ``ValueError`` that names the first bad one.
    """
    patterns = tuple(filter(None, (text.strip().lower() for text in texts)))
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern[:60]!r} is no name of a header field, nor the beginning of one followed by '*'")
        if _is_never_allowed(pattern.removesuffix("*")):
            raise ValueError(f"{pattern[:60]!r} is never taken from callers")
    return patterns


def header_field(name: str, value: str) -> str:
    """The line or lines ``name: value`` without the last CRLF, for what ``check_header`` has seen.

    Folded at spaces where that is enough; else encoded words.
    """
    if value.isascii() and "=?" not in value and value[:1] != " " and value[-1:] != " " and value.isprintable():
        folded = _folded(name, value)
        if not _has_overlong_line(folded):
            return folded
    return header.unstructured(name, value)


def _folded(name: str, value: str) -> str:
    """Only between two words with one space: others would lose a space, or leave an empty line, with some readers."""
    return _packed(name, _FOLD.split(value), _FOLDED_LINE)


def _packed(name: str, words: Iterable[str], limit: int) -> str:
    """``name: word word …``, folded where a line would exceed ``limit``.

    Never before the first word: a first line with nothing but the name is an empty field to some.
    """
    first, *others = words
    line = f"{name}: {first}"
    lines = []
    for word in others:
        if len(line) + 1 + len(word) > limit:
            lines.append(line)
            line = f" {word}"
        else:
            line = f"{line} {word}"
    lines.append(line)
    return "\r\n".join(lines)


def _has_overlong_line(field: str) -> bool:
    return len(field) > header.LINE_LIMIT_BYTES and max(map(len, field.split("\r\n"))) > header.LINE_LIMIT_BYTES


def _is_never_allowed(lower_name: str) -> bool:
    return lower_name in _NEVER_ALLOWED or lower_name.startswith(_NEVER_ALLOWED_PREFIXES)


def _is_machine_read(name: str) -> bool:
    return name.lower().startswith(_MACHINE_READ)


# -- tags -------------------------------------------------------------------------------------------------------------


def check_tags(tags: tuple[tuple[str, str], ...]) -> None:
    """Whether SES takes these tags."""
    if len(tags) > TAGS_LIMIT:
        reject("tags", f"tags are {len(tags)}; SES takes {TAGS_LIMIT} besides the relay's own")
    for name, value in tags:
        if not _TAG.fullmatch(name):
            reject("tags", "tags: a name must be 1 to 256 letters, digits, '_' and '-'")
        if name.lower() == contract.SES_EMAIL_ID_TAG:
            reject("tags", f"tags.{name} is the relay's own; take another name")
        if not _TAG.fullmatch(value):
            reject("tags", f"tags.{name} must be 1 to 256 letters, digits, '_' and '-'")


def tags_field(tags: Iterable[tuple[str, str]], email_id: str) -> str:
    """The field for SES, without the last CRLF: the relay's own tag and ``tags``. One line as long as one takes it."""
    pairs = [f"{contract.SES_EMAIL_ID_TAG}={header.token(email_id)}", *(f"{name}={value}" for name, value in tags)]
    words = [f"{pair}," for pair in pairs[:-1]] + pairs[-1:]
    return _packed(contract.SES_MESSAGE_TAGS_HEADER, words, header.LINE_LIMIT_BYTES)
