"""How long the client keeps at it, and how it spaces its tries. Pure: no clock and no sleep here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

ANSWER_SECONDS = 2.0
"""What the relay is given less than the client waits: it writes the record, and its answer travels."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The bounds of one call.

    A try is repeated after ``deferred``, when nobody serves the subject, when there is no connection, and, where that
    is safe, when no answer comes: for a question, and for a mail with a request_id.
    """

    total_timeout_seconds: float = 90.0
    """From the call to its end, whatever happens."""
    try_timeout_seconds: float = 35.0
    """For one answer: the relay's SEND_TIMEOUT_SECONDS (30) and the time for the record and the way."""
    first_pause_seconds: float = 0.1
    """The bound of the first pause; it doubles with each."""
    longest_pause_seconds: float = 5.0

    def __post_init__(self) -> None:
        if min(self.total_timeout_seconds, self.try_timeout_seconds) <= 0:
            raise ValueError("total_timeout_seconds and try_timeout_seconds must be greater than 0")
        if min(self.first_pause_seconds, self.longest_pause_seconds) < 0:
            raise ValueError("a pause cannot be shorter than 0 seconds")

    @property
    def least_seconds(self) -> float:
        """No try begins with less time left: it would end without an answer, and leave in doubt what was certain."""
        return min(1.0, self.try_timeout_seconds / 2, self.total_timeout_seconds / 4)

    def pause_seconds(self, tries: int, draw: Callable[[], float] = random.random) -> float:
        """The pause after so many tries (1 = the first): full jitter, so that callers who failed together part ways."""
        bound = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** min(tries - 1, 62))
        return bound * draw()


def told_seconds(wait_seconds: float) -> float:
    """How long the relay may try when its answer is awaited for ``wait_seconds``."""
    return wait_seconds - min(ANSWER_SECONDS, wait_seconds / 4)
