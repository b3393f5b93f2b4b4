"""Group ids as NATS subject tokens and in the tracking header, and back.

Any text may be a group id; a subject token may not hold dots, wildcards or white space, and no two
group ids may share a token, or one caller would read another's counts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

SHARED_TOKEN = "-"
"""Where the facts of mails without a group are logged: no subject per mail."""

MAX_TOKEN_LENGTH = 128

_PLAIN = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_/-]{0,127}")
_AS_GIVEN = re.compile(r"(?![ =])[\x20-\x7e]{1,256}")
"""What the tracking header carries as it is: not what would pass for a token, nor what begins with a space, which a
header's reader strips."""

_LINE_CHARACTERS = 998
"""Of a header field on the wire, RFC 5322 §2.1.1: no group id that came in one is longer."""


def group_token(group_id: str) -> str:
    """The subject token of a group: the id itself when it is plain, else ``=`` and its base64url.

    Where that is longer than 128 characters: ``==`` and the base64url of its SHA-256. Injective,
    because a plain id starts neither with ``-`` nor with ``=``.
    """
    if _PLAIN.fullmatch(group_id):
        return group_id
    octets = group_id.encode("utf-8", "surrogatepass")
    encoded = "=" + base64.urlsafe_b64encode(octets).decode().rstrip("=")
    if len(encoded) <= MAX_TOKEN_LENGTH:
        return encoded
    return "==" + base64.urlsafe_b64encode(hashlib.sha256(octets).digest()).decode().rstrip("=")


def mail_token(email_id: str, group_id: object) -> str:
    """The token under which the facts of a mail are logged; ``group_id`` as its record has it, '' when that is none."""
    if not isinstance(group_id, str):
        return ""
    return SHARED_TOKEN if group_id == email_id else group_token(group_id)


def group_of(token: str) -> str | None:
    """The group id that has this token; None for a hash, for what is no group's token, and for what is no Unicode text.

    Half a surrogate pair is none: it could neither be shown nor be written.
    """
    if not token.startswith("="):
        return token if group_token(token) == token else None
    encoded = token[1:]
    try:
        group_id = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
    return group_id if group_token(group_id) == token else None


def tracking_id(group_id: str, email_id: str) -> str:
    """The value of the tracking header, ``<group>/<email_id>``, which ``read_tracking_id`` reads.

    The group stands there as given when it is short printable ASCII that begins with neither ``=`` nor a space, else
    as its token.
    """
    group = group_id if _AS_GIVEN.fullmatch(group_id) else group_token(group_id)
    return f"{group}/{email_id}"


def read_tracking_id(value: str) -> tuple[str, str]:
    """Group id and email_id in the value of a tracking header; both unchecked, anyone may write headers.

    The email_id is what follows the last ``/``, or the whole value. The group id is '' where the header does not tell:
    it has none, a hash of it, or what is no group's.
    """
    group, _, email_id = value.strip().rpartition("/")
    if group.startswith("="):
        group = group_of(group) or ""
    try:
        group.encode()
    except UnicodeEncodeError:  # no request is taken with half a character in it
        group = ""
    return (group if len(group) <= _LINE_CHARACTERS else ""), email_id
