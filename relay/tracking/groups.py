"""Group ids as NATS subject tokens.

Any text may be a group id; a subject token may not hold dots, wildcards or white space, and no two
group ids may share a token, or one caller would read another's counts.
"""

from __future__ import annotations

import base64
import hashlib
import re

SHARED_TOKEN = "-"
"""Where the facts of mails without a group are logged: no subject per mail."""

MAX_TOKEN_LENGTH = 128

_PLAIN = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_/-]{0,127}")
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,256}")


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


def tracking_id(group_id: str, email_id: str) -> str:
    """The value of the tracking header, ``<group>/<email_id>``: the group as given when it is short printable ASCII."""
    group = group_id if _PRINTABLE.fullmatch(group_id) else group_token(group_id)
    return f"{group}/{email_id}"
