"""How many recipients a second the smarthost may be given: a token bucket whose rate learns. Pure; ``now`` is given.

Owns the limit that was set, the one that the smarthost was found to have, and how the second follows the first.
``pacer`` makes mails wait; ``trouble`` knows a refusal for being too fast. Amazon SES counts recipients, not messages
(developer guide, "Managing your sending limits"), and answers ``454 Throttling failure: Maximum sending rate
exceeded``.

========= ======================================== ==========================================================
what      when                                     rate
========= ======================================== ==========================================================
throttled the smarthost refused for being too fast what it took in the last two seconds, but at least a quarter
                                                   and at most 95 % of what it was; once a second at most
accepted  it took something, and mails had to wait a little more, once a second, up to the limit that was set;
                                                   the more the longer it was not throttled
forgotten 10 minutes without a refusal             the limit that was set
========= ======================================== ==========================================================

What was just taken is what the smarthost can take, so one refusal finds the rate that blind halving would look for.
"""

from __future__ import annotations

import math
from typing import Final

BURST_SECONDS: Final = 0.1
"""Of unused rate that may be made up for: enough for a late wake-up, too little to be throttled for."""
ADJUST_SECONDS: Final = 1.0
"""Between changes: the answers to what was under way tell nothing about the new rate."""
KEEP: Final = 0.95
"""Of the rate, at most, after a refusal."""
LEAST_KEEP: Final = 0.25
"""Of the rate, at least, after a refusal: the last second may have been a quiet one."""
RAISE: Final = 0.02
"""Of the rate, each second, right after a refusal."""
RAISE_DOUBLES_SECONDS: Final = 3.0
"""Without a refusal, after which a step is twice as large: far below the limit it is found soon."""
MOST_RAISE: Final = 0.5
"""Of the rate, at most: an overshoot of half is refused once and corrected."""
LEAST_RAISE_PER_SECOND: Final = 0.1
"""So that a rate near nothing gets off the ground."""
LEAST_PER_SECOND: Final = 0.2
"""The lowest that refusals lead to, unless less was set: one mail in five seconds still finds out that it is over."""
UNKNOWN_PER_SECOND: Final = 1.0
"""When the very first mails are refused: what Amazon SES allows an account in its sandbox."""
FORGET_SECONDS: Final = 600.0
BINS: Final = 20
BIN_SECONDS: Final = 0.1
"""What was taken is looked at over two seconds, so that it does not matter where in a second the smarthost counts."""


class Rate:
    """Recipients a second; the caller asks ``take`` before each transaction and reports what came of it."""

    def __init__(self, ceiling: float = 0.0) -> None:
        """``ceiling`` in recipients a second; 0: none."""
        self._ceiling = ceiling or math.inf
        self.current = self._ceiling
        """Recipients a second, infinite when nothing limits them."""
        self.is_limited = self.current < math.inf
        """Whether anybody may have to wait."""
        self.is_lowered = False
        """Whether the smarthost takes less than was set."""
        self.throttled_count = 0
        """Refusals for being too fast."""
        self._tokens = 0.0
        self._tokens_at = -math.inf
        self._lowered_at = -math.inf
        self._raised_at = -math.inf
        self._throttled_at = -math.inf
        self._has_held_back = False
        self._taken = [0] * BINS
        """Recipients taken in each of the last bins of time, but for the present one."""
        self._taken_now = 0
        """Recipients taken in the present one."""
        self._bin = -BINS
        self._bin_ends_at = -math.inf
        self._first_bin = 0
        """Of the busy spell: the first one after a whole window in which nothing was taken."""

    def take(self, recipients: int, now: float) -> bool:
        """Take room for so many when there is some. More than a whole burst is let through and paid for after."""
        if self.current == math.inf:
            return True
        self._fill(now)
        if self._tokens < min(float(recipients), self._capacity):
            self._has_held_back = True
            return False
        self._tokens -= recipients
        return True

    def seconds_until(self, recipients: int, now: float) -> float:
        """How long until ``take`` says yes, when nobody else comes."""
        if self.current == math.inf:
            return 0.0
        self._fill(now)
        return max(0.0, (min(float(recipients), self._capacity) - self._tokens) / self.current)

    def accepted(self, recipients: int, now: float) -> bool:
        """The smarthost took so many; return whether the rate was raised for it."""
        if now >= self._bin_ends_at:
            self._turn_to(int(now / BIN_SECONDS))
        self._taken_now += recipients
        return self.is_lowered and self._raise(now)

    def throttled(self, now: float) -> bool:
        """The smarthost refused for being too fast; return whether the rate was lowered for it."""
        self.throttled_count += 1
        self._throttled_at = now
        if now - self._lowered_at < ADJUST_SECONDS:
            return False
        self._lowered_at = now
        taken = self._taken_per_second(now)
        if self.is_limited:
            taken = min(self.current * KEEP, max(LEAST_PER_SECOND, self.current * LEAST_KEEP, taken))
        self._change(taken or UNKNOWN_PER_SECOND, now)
        return True

    def scale(self, factor: float, now: float) -> None:
        """From now on ``factor`` times the limit that was set, and of what was found out."""
        self._ceiling *= factor
        self._change(self.current * factor, now)

    def _taken_per_second(self, now: float) -> float:
        self._turn_to(int(now / BIN_SECONDS))
        # Smarthosts count by the second: what they took in the first part of one may have been all of it.
        bins = min(BINS, max(self._bin - self._first_bin + 1, BINS // 2))
        return (sum(self._taken) + self._taken_now) / (bins * BIN_SECONDS)

    def _turn_to(self, number: int) -> None:
        if number - self._bin >= BINS:
            self._taken = [0] * BINS
            self._taken_now = 0
            self._first_bin = number
        elif number > self._bin:
            self._taken[self._bin % BINS] = self._taken_now
            self._taken_now = 0
            for passed in range(self._bin + 1, number + 1):
                self._taken[passed % BINS] = 0
        self._bin = number
        self._bin_ends_at = (number + 1) * BIN_SECONDS

    def _raise(self, now: float) -> bool:
        if now - self._throttled_at >= FORGET_SECONDS:
            self._change(self._ceiling, now)
            return True
        if self._has_held_back and now - max(self._raised_at, self._throttled_at) >= ADJUST_SECONDS:
            self._raised_at = now
            share = min(MOST_RAISE, RAISE * 2 ** ((now - self._throttled_at) / RAISE_DOUBLES_SECONDS))
            self._change(min(self._ceiling, self.current + max(LEAST_RAISE_PER_SECOND, self.current * share)), now)
            return True
        return False

    def _change(self, rate: float, now: float) -> None:
        self._fill(now)
        self.current = rate
        self.is_limited = rate < math.inf
        self.is_lowered = rate < self._ceiling
        self._tokens = min(self._tokens, self._capacity)
        self._has_held_back = False

    @property
    def _capacity(self) -> float:
        return max(1.0, self.current * BURST_SECONDS)

    def _fill(self, now: float) -> None:
        if self.current == math.inf:
            self._tokens = 0.0
        else:
            elapsed = max(0.0, now - self._tokens_at)
            self._tokens = min(self._capacity, self._tokens + elapsed * self.current)
        self._tokens_at = now

    def __repr__(self) -> str:
        limit = "" if self._ceiling == math.inf else f" of {self._ceiling:g}"
        return f"{self.current:g}{limit} recipients/s"
