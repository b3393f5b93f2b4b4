"""Body parts: text that callers wrote becomes lines that every SMTP server takes.

Owns the canonical line end and the choice of transfer encoding (RFC 2045 §6): 7bit for ASCII in lines of at
most 998 octets, else quoted-printable or base64, whichever is shorter. So no mail depends on 8BITMIME, and no
server folds a line or breaks a signature. Dot-stuffing is left to delivery. The charset is always declared as
utf-8, of which ASCII is a part: one constant header instead of two.
"""

from __future__ import annotations

import binascii
import re
from typing import Final

LINE_LIMIT_BYTES: Final = 998
_WITH_LINE_END: Final = LINE_LIMIT_BYTES + 1

_BASE64_LINE: Final = 76
# b2a_qp encodes a blank at the end of a line after it has measured the line: up to 77 octets, where RFC 2045 has 76.
_QP_OVERLONG: Final = re.compile(rb"^([^\r\n]{74,})(=20|=09)\r$", re.MULTILINE)


def encode_body(text: str) -> tuple[str, bytes]:
    """The name of the transfer encoding, and ``text`` in it: CRLF line ends, and one more CRLF at the end.

    In multipart the last CRLF belongs to the boundary that follows (RFC 2046 §5.1.1), so it adds nothing to the text.
    CR, LF and CRLF each count as one line end. NUL never goes out bare.
    """
    # First of all: a lone CR or LF that got through could end the DATA phase at a lax server (SMTP smuggling).
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii() and "\x00" not in text and has_short_lines(text):
        # Octets, in which CPython replaces at twice the speed.
        return "7bit", text.encode().replace(b"\n", b"\r\n") + b"\r\n"

    data = text.encode("utf-8", "replace")
    # A character of n octets adds n - 1 here and costs 3n octets in quoted-printable; n is at most 4.
    surplus_bytes = len(data) - len(text)
    data = data.replace(b"\n", b"\r\n")
    base64_bytes = (len(data) + 2) // 3 * 4
    base64_bytes += 2 * ((base64_bytes + _BASE64_LINE - 1) // _BASE64_LINE)
    if len(data) + surplus_bytes * 8 // 3 > base64_bytes:
        return "base64", _base64(data)
    # b2a_qp takes its line end from the first one it meets, so there must be one.
    quoted_printable = binascii.b2a_qp(data + b"\r\n", istext=True)
    if len(quoted_printable) > base64_bytes + 2:
        return "base64", _base64(data)
    # rfind, because it is twice as fast as find here.
    if quoted_printable.rfind(b"=20\r\n") >= 0 or quoted_printable.rfind(b"=09\r\n") >= 0:
        quoted_printable = _QP_OVERLONG.sub(rb"\1=\r\n\2\r", quoted_printable)
    return "quoted-printable", quoted_printable


def has_short_lines(text: str) -> bool:
    """Whether no line of ``text`` (line ends: LF) exceeds 998 characters. Cheap: it looks only near every 998th."""
    start = 0
    last_line = len(text) - LINE_LIMIT_BYTES  # whatever begins here or later is short
    while start < last_line:
        start = text.rfind("\n", start, start + _WITH_LINE_END) + 1
        if not start:  # no line end was found
            return False
    return True


def _base64(data: bytes) -> bytes:
    encoded = binascii.b2a_base64(data, newline=False)
    lines = [encoded[at : at + _BASE64_LINE] for at in range(0, len(encoded), _BASE64_LINE)]
    lines.append(b"")
    return b"\r\n".join(lines)
