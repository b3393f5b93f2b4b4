"""Addresses as they may be logged: recognisable to who knows them, useless to who does not. As lfx does it."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"""("(?:[^"\\]|\\.)*"|[^\s<>"'(),:;=\[\]]+)@[^\s<>"'(),:;\[\]]+""")


def redacted(address: str) -> str:
    """``user@example.com`` as ``u****@example.com``, ``someone@…`` as ``som****@…``, ``me@…`` as ``**@…``."""
    local_part, _, domain = address.rpartition("@")
    if len(local_part) <= 2:
        shown = "**"
    elif len(local_part) <= 5:
        shown = f"{local_part[0]}****"
    else:
        shown = f"{local_part[:3]}****"
    return f"{shown}@{domain}"


def without_addresses(text: str) -> str:
    """The text with every address in it redacted: a smarthost's reply often names the recipient."""
    return _ADDRESS.sub(lambda found: redacted(found.group()), text) if "@" in text else text
