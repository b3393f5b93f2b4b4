"""How long something took, many times over: a histogram as Prometheus counts one, at the price of a bisection.

Pure. Its owner observes; whoever shows it reads the fields. See https://prometheus.io/docs/practices/histograms/.
"""

from __future__ import annotations

from bisect import bisect_left

BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""From a mail to a smarthost next door to the longest that SEND_TIMEOUT_SECONDS allows by default."""


class Histogram:
    """Counts by upper bound, inclusive; what is longer than the last bound is counted beyond it."""

    __slots__ = ("bounds_seconds", "counts", "sum_seconds")

    def __init__(self, bounds_seconds: tuple[float, ...] = BOUNDS_SECONDS) -> None:
        self.bounds_seconds = bounds_seconds
        self.counts = [0] * (len(bounds_seconds) + 1)
        """How many fell between a bound and the one before it; the last: beyond all. Not cumulative."""
        self.sum_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(self.bounds_seconds, seconds)] += 1
        self.sum_seconds += seconds
