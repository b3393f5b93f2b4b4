"""When to stop asking a smarthost that serves nobody, and when to ask again. Pure: ``now`` is passed in.

========== =================================================== ==========================================
state      who may pass                                        left by
========== =================================================== ==========================================
closed     everyone                                            ``open``
open       nobody: everyone is deferred at once                ``begin_probe`` when its time has come
half-open  the one probe under way                             ``close``, ``probe_failed``, ``probe_void``
========== =================================================== ==========================================

Invariant: at most one probe is under way. ``guard`` makes the probes; ``trouble`` and ``silence`` say what opens it.
"""

from __future__ import annotations

import enum
from typing import Final

from relay.delivery.trouble import Probe

FIRST_DELAY_SECONDS: Final = 0.25


class CircuitState(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Circuit:
    """The circuit of one smarthost; all times are points on one monotonic clock."""

    def __init__(self) -> None:
        self.state = CircuitState.CLOSED
        self.is_closed = True
        """The same as ``state``, for the hot path."""
        self.reason = ""
        """Why it is open, one line."""
        self.since: float | None = None
        self.probe = Probe.NOOP
        """What closes it."""
        self._delay_seconds = FIRST_DELAY_SECONDS
        self._cap_seconds = FIRST_DELAY_SECONDS
        self._probe_at = 0.0

    def open(self, reason: str, probe: Probe, now: float, cap_seconds: float) -> None:
        """Let nobody pass. ``cap_seconds`` bounds the time between probes. Does nothing when it is not closed."""
        if not self.is_closed:
            return
        self.is_closed = False
        self.state = CircuitState.OPEN
        self.reason = reason
        self.since = now
        self.probe = probe
        self._cap_seconds = cap_seconds
        self._delay_seconds = min(FIRST_DELAY_SECONDS, cap_seconds)
        self._probe_at = now + self._delay_seconds

    def seconds_to_probe(self, now: float) -> float:
        """How long until a probe may begin."""
        return max(0.0, self._probe_at - now)

    def begin_probe(self, now: float) -> bool:
        """Let the caller probe, when it is time and nobody else does."""
        if self.state is not CircuitState.OPEN or now < self._probe_at:
            return False
        self.state = CircuitState.HALF_OPEN
        return True

    def probe_failed(self, reason: str, now: float, probe: Probe | None = None) -> None:
        """The smarthost still refuses: wait twice as long for the next probe, up to the cap.

        ``probe``: what closes it from now on, where that is another reason than before.
        """
        if self.state is not CircuitState.HALF_OPEN:
            return  # A straggler that began before the circuit opened.
        self._delay_seconds = min(self._delay_seconds * 2, self._cap_seconds)
        self.reason = reason
        self.probe = probe or self.probe
        self.probe_void(now)

    def probe_void(self, now: float) -> None:
        """The probe showed nothing either way: wait as long again."""
        if self.state is CircuitState.HALF_OPEN:
            self.state = CircuitState.OPEN
            self._probe_at = now + self._delay_seconds

    def close(self) -> None:
        """Let everyone pass again."""
        self.state = CircuitState.CLOSED
        self.is_closed = True
        self.reason = ""
        self.since = None

    def __repr__(self) -> str:
        return self.state.value if self.is_closed else f"{self.state.value} ({self.probe.value}): {self.reason}"
