"""Tells a smarthost that takes mails and answers none of them from one that is slow.

Pure. Owns what is known of final dots without an answer; leaves acting on it to ``guard``. Two signs, of which either
will do, when it lasts for ``SILENT_SECONDS``:

- ``SILENT_MAILS`` mails, one soon after another, were left in doubt (their callers' time ended, the time limit for the
  dot ended, the connection was lost), and no final dot was answered since the first of theirs was sent;
- every connection that may be open waits for the answer to a final dot, so that nothing can be sent any more.

RFC 5321 §4.5.3.2.6 has a client wait for 10 minutes. Relay goes on waiting for what it has sent, up to its own limit;
this is about what it sends meanwhile. A smarthost that takes longer than this over every mail looks the same until it
answers, which is noticed at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

SILENT_SECONDS: Final = 20.0
"""Without an answer to any final dot."""
SILENT_MAILS: Final = 3
"""One or two may be mails that take long to look at."""
FORGOTTEN_SECONDS: Final = 60.0
"""After so long without another mail in doubt those before it prove nothing: more than SEND_TIMEOUT_SECONDS usually is,
after which the next ones are in doubt."""


class Silence:
    """The final dots of one smarthost; all times are points on one monotonic clock."""

    def __init__(self) -> None:
        self.answered_at = 0.0
        """When a final dot was last answered, whatever was said; set by whoever hears it."""
        self._doubts = 0
        self._doubts_since = 0.0
        """When the first of them had its final dot sent."""
        self._doubted_at = 0.0
        self._waiting: dict[Hashable, float] = {}
        """Connections that wait on after their callers' time, with the moment of the final dot."""

    def doubt(self, dot_at: float, now: float) -> None:
        """A mail whose final dot was sent at ``dot_at`` is in doubt; once for each."""
        if dot_at <= self.answered_at:
            return
        is_answered = self._doubts_since <= self.answered_at
        if not self._doubts or is_answered or now - self._doubted_at > FORGOTTEN_SECONDS:
            self._doubts, self._doubts_since = 0, dot_at
        self._doubts += 1
        self._doubts_since = min(self._doubts_since, dot_at)
        self._doubted_at = now

    def waits(self, connection: Hashable, dot_at: float) -> None:
        """The connection goes on waiting for the answer to its final dot."""
        self._waiting[connection] = dot_at

    def waits_no_more(self, connection: Hashable) -> None:
        """It has come, or nothing will."""
        self._waiting.pop(connection, None)

    def forget_doubts(self) -> None:
        """The smarthost has been away or silent and is back: what was before proves nothing."""
        self._doubts = 0

    def seconds(self, connections: int, now: float) -> float:
        """For how long the smarthost has been silent; 0 when it is not. ``connections``: how many may be open."""
        lasted = 0.0
        is_doubted = self._doubts >= SILENT_MAILS and self._doubts_since > self.answered_at
        if is_doubted and now - self._doubted_at <= FORGOTTEN_SECONDS:
            lasted = now - self._doubts_since
        if len(self._waiting) >= connections:
            lasted = max(lasted, now - max(self._waiting.values()))
        return lasted if lasted >= SILENT_SECONDS else 0.0

    def __repr__(self) -> str:
        return f"{self._doubts} in doubt, {len(self._waiting)} waiting"
