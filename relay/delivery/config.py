"""How to reach the smarthost, how fast, and how long to wait for it: plain values.

Owns names, units and defaults; ``relay.settings`` reads them from the environment and checks them there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

TlsMode = Literal["auto", "starttls", "implicit", "off"]


class Host(NamedTuple):
    """One address of a smarthost: where to connect, and the name that its certificate must have."""

    name: str
    """Name or IP address; resolved again for every connection, since SES changes its addresses often."""
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """How long each phase of a session may take, in seconds.

    RFC 5321 §4.5.3.2 names minutes, for clients that have a queue and nobody who waits. Here a caller waits, who can
    send the request again elsewhere: all limits but the last ones are those of a healthy server with a wide margin.
    """

    connect_seconds: float = 10.0
    """Name resolution, and then TCP to all addresses of a host together (no RFC figure)."""
    banner_seconds: float = 10.0
    """The first 220 (RFC 5321 §4.5.3.2.1: 5 minutes)."""
    ehlo_seconds: float = 10.0
    """The 250 to EHLO (no RFC figure)."""
    starttls_seconds: float = 10.0
    """The 220 to STARTTLS, and then the TLS handshake; the latter for implicit TLS too (no RFC figure)."""
    auth_seconds: float = 10.0
    """Each reply while logging in (no RFC figure)."""
    mail_seconds: float = 10.0
    """The reply to MAIL (RFC 5321 §4.5.3.2.2: 5 minutes)."""
    rcpt_seconds: float = 20.0
    """The reply to each RCPT: servers look things up here (RFC 5321 §4.5.3.2.3: 5 minutes)."""
    data_seconds: float = 20.0
    """The 354 to DATA (RFC 5321 §4.5.3.2.4: 2 minutes)."""
    content_seconds: float = 60.0
    """Handing all of the content to the network (RFC 5321 §4.5.3.2.5: 3 minutes a block)."""
    dot_seconds: float = 120.0
    """The reply to the final dot (RFC 5321 §4.5.3.2.6: 10 minutes, since giving up early and sending again doubles
    mails; Relay never sends again). The caller does not wait so long: at its own deadline it is told that the mail is
    in doubt, and what the smarthost says in the end goes into the record. Until then the connection is taken."""
    rset_seconds: float = 5.0
    """The reply to RSET, and to the NOOP of a probe (no RFC figure)."""
    quit_seconds: float = 1.0
    """The reply to QUIT, where one is waited for at all (no RFC figure)."""


@dataclasses.dataclass(frozen=True)
class SmarthostConfig:
    """A smarthost: one host, or several that serve the same, of which the first that works is used."""

    hosts: tuple[Host, ...]
    """At least one, in order of preference."""
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

    max_recipients_per_second: float = 0.0
    """What this process may hand over; 0: no limit but what the smarthost itself asks for (454)."""
    timeouts: Timeouts = dataclasses.field(default_factory=Timeouts)
