"""Back-pressure: whether a request is taken, or answered ``overloaded`` at once. Pure; time is passed in.

A request is refused when the backlog is full, or when it would wait longer than its deadline allows:
backlog ÷ recent rate. The rate is what was served while there was a backlog to work on (a rate
measured in quiet times says how much was asked, not how much can be done), so in the first second of a
busy spell nothing is known and everything that fits the backlog is taken: a burst that can be served in
time is served.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 5.0
LEARN_SECONDS = 1.0
TICK_SECONDS = 0.25


class Admission:
    """Counts what is in hand. ``busy_above`` is how many can be worked on at once (the pool's size)."""

    def __init__(self, limit: int, limit_bytes: int, busy_above: int) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._busy_above = busy_above
        self._busy_since: float | None = None
        self._finished = 0
        self._ticks: deque[tuple[float, int]] = deque()
        self._next_tick_at = 0.0
        self.backlog = 0
        self.backlog_bytes = 0

    def take(self, now: float, size_bytes: int, patience_seconds: float) -> bool:
        """Whether the request is taken. If so, ``finish`` must follow."""
        backlog = self.backlog
        backlog_bytes = self.backlog_bytes + size_bytes
        if backlog >= self._limit or backlog_bytes > self._limit_bytes:
            return False
        if self._busy_since is None:
            if backlog >= self._busy_above:  # the one too many
                self._busy_since = now
                self._ticks.clear()
                self._tick(now)
        elif self.predicted_wait_seconds(now) > patience_seconds:
            return False
        self.backlog = backlog + 1
        self.backlog_bytes = backlog_bytes
        return True

    def waited_in_vain(self) -> None:
        """One that was taken never had its turn; ``finish`` follows.

        It says nothing about what can be done. Counted as served, those who give up would make room for as many more
        who wait in vain, until all that is asked for is taken and half of it, or more, is too late.
        """
        self._finished -= 1

    def finish(self, now: float, size_bytes: int) -> None:
        """A request that was taken is answered."""
        self.backlog -= 1
        self.backlog_bytes -= size_bytes
        self._finished += 1
        if self._busy_since is None:
            return
        if self.backlog <= self._busy_above:
            self._busy_since = None
        elif now >= self._next_tick_at and self._finished > self._ticks[-1][1]:
            self._tick(now)

    def leave(self, now: float, size_bytes: int) -> None:
        """One that was taken is no work any more; ``finish`` does not follow."""
        self.waited_in_vain()
        self.finish(now, size_bytes)

    def _tick(self, now: float) -> None:
        self._ticks.append((now, self._finished))
        self._next_tick_at = now + TICK_SECONDS
        while now - self._ticks[0][0] > WINDOW_SECONDS:
            self._ticks.popleft()

    def predicted_wait_seconds(self, now: float) -> float:
        """How long a request that came now would wait; 0 while nothing is known."""
        if self._busy_since is None or now - self._busy_since < LEARN_SECONDS:
            return 0.0
        since, finished_then = self._ticks[0]
        done = self._finished - finished_then
        if done <= 0:  # a slow smarthost, or one that hangs: as long again as it has taken, and as long again
            return 2 * (now - since)
        return self.backlog * (now - since) / done
