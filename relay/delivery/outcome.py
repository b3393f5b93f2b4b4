"""What became of a mail: one ``Outcome`` per forward-path, always a value, never a bare exception.

The table of states is the design's: RELAYED and FAILED are final, DEFERRED may be tried again by
the caller, IN_DOUBT must not be tried again blindly (RFC 1047): the final dot was sent and no reply came.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class State(enum.StrEnum):
    """How an attempt to hand a mail over ended. ``relayed`` is RFC 3464's word for a 250 after the final dot."""

    RELAYED = "relayed"
    FAILED = "failed"
    DEFERRED = "deferred"
    IN_DOUBT = "in_doubt"


SENT_STATES = frozenset({State.RELAYED, State.IN_DOUBT})
"""States in which the smarthost has, or may have, the mail: these have a record."""


class SaidBy(enum.StrEnum):
    """Who ended the attempt: our own timeouts never pose as a peer's reply."""

    PEER = "peer"
    LOCAL = "local"


class Phase(enum.StrEnum):
    """Where in a session an attempt was."""

    POOL = "pool"
    CONNECT = "connect"
    BANNER = "banner"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    RSET = "rset"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"
    DOT = "dot"
    """The final dot was sent: from here on a lost connection leaves the mail in doubt."""
    NOOP = "noop"


class Outcome(NamedTuple):
    """How the attempt ended for one forward-path."""

    state: State
    detail: str = ""
    """One line without secrets: the peer's reply text, or what happened here."""
    reply_code: int | None = None
    """Three digits (RFC 5321 §4.2), only when the peer said them."""
    enhanced_code: str = ""
    """``class.subject.detail`` (RFC 3463), '' when absent."""
    said_by: SaidBy = SaidBy.LOCAL
    phase: Phase = Phase.POOL
    """How far the attempt got."""
    attempt: int = 1
    remote_id: str = ""
    """The id in ``250 Ok <id>`` (Amazon SES: the message id of its events), '' when there is none."""
    is_late: bool = False
    """DEFERRED because the caller's deadline came, or would have before there was a turn: with more time there would
    have been an attempt, or another one. ``detail`` says where it was waiting, or what was said before."""

    @property
    def retryable(self) -> bool:
        """Whether the same request may be sent again without the risk of a second copy."""
        return self.state is State.DEFERRED
