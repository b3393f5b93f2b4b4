"""Header fields: text that callers wrote becomes lines that cannot be anything but one field.

Owns what may stand in a field: no control character gets in, whatever is not plain ASCII becomes encoded words
(RFC 2047), and no line exceeds the 998 octets of RFC 5322 §2.1.1. Which fields a mail has is left to
``compose``.

Control characters: a tab becomes a space, the others (C0, DEL, C1) are dropped. The service that Relay replaces
drops CR and LF only, but nothing that people read needs the rest, and some filters refuse a mail for them.
"""

from __future__ import annotations

import binascii
import re
from typing import Final

from relay.submission.address import Address

LINE_LIMIT_BYTES: Final = 998
FOLDED_LINE_BYTES: Final = 76  # RFC 2047 §2: the longest line that has an encoded word
ENCODED_WORD_BYTES: Final = 75
TOKEN_LIMIT_BYTES: Final = 900
"""Longest value of a field that cannot be folded, with room for its name."""

# What any field takes as it is: printable ASCII, short enough for a line, no space at either end, and nothing that
# could begin an encoded word, so no "=" at all.
_PLAIN: Final = re.compile(r"[!-<>-~](?:[ -<>-~]{0,898}[!-<>-~])?")
_CONTROL: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_NOT_PRINTABLE_ASCII: Final = re.compile("[^ -~]")
# A name of nothing but encoded words (RFC 2047 §2), and a mailbox in angle brackets.
_ENCODED_NAME: Final = re.compile(r"(?:=\?[!->@-~]+\?[BbQq]\?[!->@-~]*\?= *)+<[^<>?]+>")

# RFC 2047 §5 (3): what may stand for itself in any encoded word, also in a display name.
_Q_SAFE: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/"
_Q_TABLE: Final = [chr(byte) if byte in _Q_SAFE else "_" if byte == 0x20 else f"={byte:02X}" for byte in range(256)]
_WORD_FRAME_BYTES: Final = len("=?utf-8?q??=")


def unstructured(name: str, value: str) -> str:
    """The line or lines ``name: value`` without the last CRLF; ``value`` is free text, as in Subject.

    Printable ASCII stays as it is if it survives: not when it is longer than a line, has what looks like an encoded
    word, or starts or ends with a space.
    """
    if _PLAIN.fullmatch(value):
        return f"{name}: {value}"
    if not (value.isascii() and value.isprintable()):
        value = _cleaned(value)
    if _survives_as_is(value) and len(name) + 2 + len(value) <= LINE_LIMIT_BYTES:
        return f"{name}: {value}"
    return f"{name}: {encoded_words(value, len(name) + 2)}"


def mailbox_as_given(name: str, text: str, address: Address) -> str:
    """The line or lines of an address field that holds what the caller wrote, where that can stand in a header.

    ``address`` is ``text`` parsed; it is written anew when ``text`` is not printable ASCII, is too long for a line, or
    has what somebody may take for an encoded word and we did not.
    """
    if _PLAIN.fullmatch(text):  # then so is the name in it
        return f"{name}: {text}"
    # The name is looked at too, for an encoded word may hold a line end.
    is_clean = text.isascii() and text.isprintable() and address.display_name.isprintable()
    if "=?" in text:
        # Some decode them in comments, in quoted strings, with spaces inside: a line end could hide in any of these.
        is_clean = is_clean and "=?" not in address.display_name and _ENCODED_NAME.fullmatch(text) is not None
    if is_clean and len(name) + 2 + len(text) <= LINE_LIMIT_BYTES:
        return f"{name}: {text}"
    return mailbox(name, address.display_name, address)


def mailbox(name: str, display_name: str, address: Address) -> str:
    """The line or lines ``name: "Display Name" <mailbox>`` without the last CRLF; no quotes when there is no name."""
    if not (display_name.isascii() and display_name.isprintable()):
        display_name = _cleaned(display_name)
    angle_addr = f"<{address.local_part}@{address.domain}>"
    if not display_name:
        return f"{name}: {angle_addr}"
    if _survives_as_is(display_name):
        if '"' in display_name or "\\" in display_name:
            display_name = display_name.replace("\\", "\\\\").replace('"', '\\"')
        line = f'{name}: "{display_name}" {angle_addr}'
        # Of the at most 64 octets of a local part in UTF-8, at least a quarter were counted.
        if len(line) + 48 <= LINE_LIMIT_BYTES:
            return line
    phrase = encoded_words(display_name, len(name) + 2)
    last_line_bytes = len(phrase) - phrase.rfind("\n") - 1 + (0 if "\n" in phrase else len(name) + 2)
    separator = " " if last_line_bytes + 1 + len(angle_addr) <= FOLDED_LINE_BYTES else "\r\n "
    return f"{name}: {phrase}{separator}{angle_addr}"


def token(value: str) -> str:
    """``value`` for a field that machines read: printable ASCII only, and short enough for one line.

    Of an overlong value the end is kept: the tracking header's email_id stands there.
    """
    if not (value.isascii() and value.isprintable()):
        value = _NOT_PRINTABLE_ASCII.sub("", value)
    return value if len(value) <= TOKEN_LIMIT_BYTES else value[-TOKEN_LIMIT_BYTES:]


def tokens(*values: str) -> tuple[str, ...]:
    """``token`` of each. What is clean and short when taken together, as ours always are, is so one by one."""
    together = "".join(values)
    if together.isascii() and together.isprintable() and len(together) <= TOKEN_LIMIT_BYTES:
        return values
    return tuple(map(token, values))


def encoded_words(value: str, column: int) -> str:
    """``value`` as encoded words in UTF-8, Q or B, whichever is shorter, folded so that no line exceeds 76 octets.

    ``column`` is how many octets stand on the line already. Words never split a character.
    """
    data = value.encode("utf-8", "replace")
    q_bytes = len(data) + 2 * len(data.translate(None, _Q_SAFE + b" "))
    b_bytes = (len(data) + 2) // 3 * 4
    words: list[str] = []
    # Room for one character, 12 octets at the worst, whatever the column: every word must get further.
    room = max(12, min(ENCODED_WORD_BYTES, FOLDED_LINE_BYTES - column) - _WORD_FRAME_BYTES)
    start = 0
    while start < len(data):
        end = start + room // 4 * 3 if b_bytes < q_bytes else _q_end(data, start, room)
        while end < len(data) and data[end] & 0xC0 == 0x80:  # the middle of a character
            end -= 1
        piece = data[start:end]
        if b_bytes < q_bytes:
            words.append(f"=?utf-8?b?{binascii.b2a_base64(piece, newline=False).decode()}?=")
        else:
            words.append(f"=?utf-8?q?{''.join([_Q_TABLE[byte] for byte in piece])}?=")
        start = end
        room = ENCODED_WORD_BYTES - _WORD_FRAME_BYTES
    return "\r\n ".join(words)


def _q_end(data: bytes, start: int, room: int) -> int:
    """Up to where ``data`` fits into ``room`` octets of Q encoding."""
    end = start
    while end < len(data):
        room -= len(_Q_TABLE[data[end]])
        if room < 0:
            break
        end += 1
    return end


def _cleaned(value: str) -> str:
    return _CONTROL.sub("", value.replace("\t", " "))


def _survives_as_is(value: str) -> bool:
    return value.isascii() and "=?" not in value and (not value or (value[0] != " " and value[-1] != " "))
