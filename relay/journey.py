"""What a request's journey is made of, for whoever follows it: the names of its steps and how they are told.

Pure. The parts tell; ``ops.tracing`` makes spans of it. Where nobody follows, a part has None instead of a follower.
"""

from __future__ import annotations

from typing import Protocol

WAIT = "smtp wait"
"""For a connection, and for the turn at the sending rate."""
TRANSACTION = "smtp transaction"
TRACKING = "tracking write"


class Follower(Protocol):
    """Is told about the request that the calling greenlet is at. Nothing of this blocks or raises.

    Times are those of ``time.monotonic()``; facts with '' or None say nothing. No addresses and no content.
    """

    def step(self, name: str, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """One step of it; ``problem`` is why it failed."""

    def came_to(self, outcome: str, *, problem: str = "", **facts: str | int | None) -> None:
        """What became of the request, or of one of its mails."""

    def handled(self, begun: float, ended: float, *, problem: str = "", **facts: str | int | None) -> None:
        """A batch of messages was handled, with no request behind it."""
