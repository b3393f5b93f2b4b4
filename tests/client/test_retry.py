"""Bounds and pauses."""

from __future__ import annotations

import pytest

from relay.client import Retry
from relay.client.retry import told_seconds


def test_the_bound_of_a_pause_doubles_up_to_the_longest() -> None:
    retry = Retry(first_pause_seconds=0.1, longest_pause_seconds=1.0)
    assert [retry.pause_seconds(tries, lambda: 1.0) for tries in (1, 2, 3, 4, 5, 6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert retry.pause_seconds(10_000, lambda: 1.0) == 1.0


def test_jitter_is_full() -> None:
    retry = Retry(first_pause_seconds=1.0, longest_pause_seconds=1.0)
    drawn = [retry.pause_seconds(1) for _ in range(2000)]
    assert 0 <= min(drawn) < 0.05
    assert 0.95 < max(drawn) <= 1
    assert 0.45 < sum(drawn) / len(drawn) < 0.55


def test_no_try_begins_without_a_chance() -> None:
    assert Retry().least_seconds == 1
    assert Retry(total_timeout_seconds=2).least_seconds == 0.5
    assert Retry(try_timeout_seconds=0.5).least_seconds == 0.25


def test_the_relay_is_told_a_little_less_than_the_client_waits() -> None:
    assert told_seconds(35) == 33
    assert told_seconds(8) == 6
    assert told_seconds(1) == 0.75


@pytest.mark.parametrize(
    "wrong", [{"total_timeout_seconds": 0}, {"try_timeout_seconds": -1}, {"first_pause_seconds": -0.1}]
)
def test_bounds_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Retry(**wrong)
