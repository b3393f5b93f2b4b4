"""This host's clock beside another's."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable

from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.tracking.record import parse_time

UNWISE_SECONDS = 2.0
HARMFUL_SECONDS = 60.0
"""Deadlines of callers miss by that much, and Amazon refuses signatures from 300 s on."""

REMEDY = "set this host's clock by NTP: `timedatectl` tells, chrony or systemd-timesyncd does it"


class Watch:
    """Begins when a question is asked; ``compare`` when its answer names the time."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._asked_at = now()

    def compare(self, theirs: float, whose: str) -> Finding:
        """How far this host is off; what the answer may have been under way is in its favour."""
        answered_at = self._now()
        is_before = theirs < self._asked_at
        off_seconds = max(0.0, self._asked_at - theirs, theirs - answered_at)
        if off_seconds < UNWISE_SECONDS:
            return well("clock", f"agrees with {whose}'s")
        way = "ahead of" if is_before else "behind"
        detail = f"this host's clock is {_told(off_seconds)} {way} {whose}'s"
        if off_seconds < HARMFUL_SECONDS:
            return warning("clock", f"{detail}: times in records and deadlines of callers are off by that", REMEDY)
        return failed("clock", f"{detail}: deadlines fail, and Amazon refuses signatures that are 5 min off", REMEDY)


def epoch(text: str) -> float | None:
    """Of RFC 3339, or of HTTP's Date; None when it is neither. HTTP cuts off fractions, so its half second is added."""
    if (at := parse_time(text)) is not None:
        return at.timestamp()
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() + 0.5
    except ValueError:
        return None


def _told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
