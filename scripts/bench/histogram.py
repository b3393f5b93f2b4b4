"""A histogram of times over many orders of magnitude: buckets that grow by a fixed factor, as HdrHistogram has.

Nothing but a table of counts, so histograms of several runs can be added, and a chart can be drawn from one. The
library ``hdrhistogram`` would do as well; it takes 0.9 µs for each value, the load generator keeps them in an array
for a tenth of that and counts afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

PER_DOUBLING = 32
"""Buckets for each doubling: a bucket is 2.2 % wide."""
LEAST = 1e-6
"""The first bucket, in seconds, holds everything below."""


def bucket_of(seconds: float) -> int:
    """The number of the bucket that holds a value: 0, 1, …"""
    return max(0, math.ceil(PER_DOUBLING * math.log2(seconds / LEAST))) if seconds > LEAST else 0


def upper_bound(bucket: int) -> float:
    """The largest value, in seconds, that a bucket holds."""
    return float(LEAST * 2 ** (bucket / PER_DOUBLING))


def counted(values: Iterable[float]) -> Counter[int]:
    """How many values each bucket has; counters of several runs can be added."""
    return Counter(map(bucket_of, values))


def quantile(buckets: Counter[int], share: float) -> float:
    """The value, in seconds, that so large a share of all does not exceed, rounded up to its bucket's bound.

    ``share`` is from 0 to 1. ``ValueError`` when nothing was counted.
    """
    left = max(1, math.ceil(share * buckets.total()))
    for bucket in sorted(buckets):
        left -= buckets[bucket]
        if left <= 0:
            return upper_bound(bucket)
    raise ValueError("an empty histogram has no quantiles")
