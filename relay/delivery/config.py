"""How to reach the smarthost and how long to wait for it: plain values.

Owns names, units and defaults; ``relay.settings`` reads them from the environment and checks them there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

TlsMode = Literal["auto", "starttls", "implicit", "off"]


@dataclasses.dataclass(frozen=True)
class SmarthostConfig:
    """One smarthost. The time limits suit a caller who waits; RFC 5321 §4.5.3.2 names minutes for a queue's."""

    host: str
    """Name or address; resolved again for every connection, since SES changes its addresses often."""
    port: int
    username: str = ""
    """AUTH happens when both this and ``password`` are set."""
    password: str = dataclasses.field(default="", repr=False)
    helo_name: str = "localhost"
    """Our own name for EHLO (RFC 5321 §4.1.1.1)."""
    tls: TlsMode = "auto"
    """``auto``: implicit on 465 and 2465, elsewhere STARTTLS when offered, and required when there are credentials
    and the peer is not on loopback. ``starttls`` and ``implicit`` require it, ``off`` never uses it."""
    tls_verify: bool = True
    ca_file: str = ""
    """PEM file of the authorities to trust; '' is the system's."""

    pool_size: int = 20
    """The most connections open at once, whatever they do."""
    idle_seconds: float = 5.0
    """A connection unused for so long is closed: SES hangs up at about 10."""
    max_age_seconds: float = 300.0
    """Age at which a connection is replaced: smarthosts behind balancers rotate."""
    max_messages: int = 1000
    """Transactions after which a connection is replaced."""

    connect_timeout_seconds: float = 10.0
    """Name resolution, TCP to all addresses, and a TLS handshake each (no RFC figure)."""
    command_timeout_seconds: float = 30.0
    """The banner and each command's reply up to the 354 (RFC 5321: 5 minutes, DATA 2)."""
    content_timeout_seconds: float = 60.0
    """Handing the content to the network (RFC 5321 §4.5.3.2.5: 3 minutes a block)."""
    dot_timeout_seconds: float = 60.0
    """The final dot's reply (RFC 5321 §4.5.3.2.6: 10 minutes). Shorter means more mails in doubt, not fewer sent."""
