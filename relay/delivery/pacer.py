"""Makes mails wait for their turn at the sending rate: a queue, first come, first served, with two alarms.

The shell around ``rate``. Nobody waits in vain: who could not be served before its deadline is refused at once. Where
the rate was learned from a refusal it may be as little as ``LEAST_KEEP`` of the truth, and who would be served in time
at the truth may stay: what was a guess must not cost a mail that there is time for.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from typing import Any

import gevent
from gevent.hub import Waiter

from relay.delivery.rate import LEAST_KEEP, Rate
from relay.errors import EgressUnavailable, PoolClosed, RateTimeout


class Pacer:
    """Lets recipients pass at ``rate.current`` a second. Any number of greenlets of one thread may wait."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._queue: OrderedDict[Waiter, tuple[int, float]] = OrderedDict()
        """Who waits: recipients and deadline."""
        self._recipients = 0
        """Of all who wait."""
        self._loop = gevent.get_hub().loop
        self._turn_alarm: Any = None
        """Rings when the first in the queue has its turn."""
        self._deadline_alarm: Any = None
        """Rings at the earliest deadline in the queue, or before."""
        self._deadline_alarm_at = math.inf
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """Mails that wait."""
        return len(self._queue)

    def wait(self, recipients: int, deadline: float, *, is_retry: bool = False) -> None:
        """Return when it is this mail's turn; blocks until ``deadline`` (``time.monotonic()``) at most.

        ``is_retry``: it has had a turn, and was refused for being too fast: it came first, and goes first.

        Raises ``RateTimeout``, at once when the turn would come too late; ``PoolClosed``; what ``refuse`` was given.
        """
        if self._is_closed:
            raise PoolClosed("shutting down")
        now = time.monotonic()
        rate = self.rate
        if (is_retry or not self._queue) and rate.take(recipients, now):
            return
        before = 0 if is_retry else self._recipients
        seconds = rate.seconds_until(recipients, now) + before / rate.current
        if now + seconds * (LEAST_KEEP if rate.is_lowered else 1.0) > deadline:
            raise RateTimeout(repr(self))
        waiter = Waiter()
        self._queue[waiter] = (recipients, deadline)
        self._recipients += recipients
        if is_retry:
            self._queue.move_to_end(waiter, last=False)
            self._stop_turn_alarm()
        if self._turn_alarm is None:
            self._set_turn_alarm(now)
        if deadline < self._deadline_alarm_at:
            self._set_deadline_alarm(deadline)
        try:
            error: EgressUnavailable | None = waiter.get()
        finally:
            self._forget(waiter)
        if error is not None:
            # One error ends many waits; without this each would add its frames to the same traceback.
            raise error.with_traceback(None)

    def rate_changed(self) -> None:
        """Have the next turn at the new rate. Never blocks."""
        if self._turn_alarm is not None:
            self._stop_turn_alarm()
            self._set_turn_alarm(time.monotonic())

    def refuse(self, error: EgressUnavailable) -> None:
        """End every wait with ``error``."""
        for waiter in list(self._queue):
            self._end(waiter, error)

    def close(self) -> None:
        """Refuse everyone, now and from here on."""
        self._is_closed = True
        self.refuse(PoolClosed("shutting down"))
        self._stop_turn_alarm()
        self._set_deadline_alarm(math.inf)

    def _end(self, waiter: Waiter, error: EgressUnavailable | None) -> None:
        """Wake the waiter: ``None`` when it is its turn."""
        self._forget(waiter)
        self._loop.run_callback(waiter.switch, error)

    def _forget(self, waiter: Waiter) -> None:
        recipients, _ = self._queue.pop(waiter, (0, 0.0))
        self._recipients -= recipients

    def _stop_turn_alarm(self) -> None:
        if self._turn_alarm is not None:
            self._turn_alarm.close()
            self._turn_alarm = None

    def _set_turn_alarm(self, now: float) -> None:
        if not self._queue:
            return
        recipients, _ = next(iter(self._queue.values()))
        # A little late rather than early: rounded down it would ring for nothing.
        self._turn_alarm = self._loop.timer(self.rate.seconds_until(recipients, now) + 0.0005)
        self._turn_alarm.start(self._next_turns, update=True)

    def _next_turns(self) -> None:
        """Let those pass whose turn it is. Runs in the hub, so it must not wait."""
        self._stop_turn_alarm()
        now = time.monotonic()
        while self._queue:
            waiter, (recipients, _) = next(iter(self._queue.items()))
            if not self.rate.take(recipients, now):
                break
            self._end(waiter, None)
        self._set_turn_alarm(now)

    def _set_deadline_alarm(self, at: float) -> None:
        if self._deadline_alarm is not None:
            self._deadline_alarm.close()
            self._deadline_alarm = None
        self._deadline_alarm_at = at
        if at < math.inf:
            self._deadline_alarm = self._loop.timer(max(0.0, at - time.monotonic()))
            self._deadline_alarm.start(self._expire, update=True)

    def _expire(self) -> None:
        """End the waits whose deadline is over: the rate has fallen since they began. Runs in the hub."""
        now = time.monotonic()
        for waiter in [waiter for waiter, (_, deadline) in self._queue.items() if deadline <= now]:
            self._end(waiter, RateTimeout(repr(self)))
        self._set_deadline_alarm(min((deadline for _, deadline in self._queue.values()), default=math.inf))

    def __repr__(self) -> str:
        limit = repr(self.rate) if self.rate.is_limited else "no limit"
        return f"{limit}, {self.waiting} mails wait"
