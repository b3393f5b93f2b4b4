"""Waiting for a turn at the sending rate: in order, within deadlines, and nobody for ever."""

from __future__ import annotations

import time

import gevent
import pytest

from relay.delivery.pacer import Pacer
from relay.delivery.rate import FORGET_SECONDS, Rate
from relay.errors import EgressUnavailable, PoolClosed, RateTimeout
from tests.delivery.conftest import soon


def test_turns_come_in_order_and_on_time() -> None:
    pacer = Pacer(Rate(100.0))
    order: list[int] = []

    def caller(number: int) -> None:
        pacer.wait(1, soon())
        order.append(number)

    started_at = time.monotonic()
    gevent.joinall([gevent.spawn(caller, number) for number in range(60)], timeout=5.0, raise_error=True)
    # A tenth of a second's worth passes at once.
    assert 0.45 <= time.monotonic() - started_at < 2.0
    assert order == list(range(60))
    assert pacer.waiting == 0


def test_who_would_be_late_is_refused_without_waiting() -> None:
    pacer = Pacer(Rate(10.0))
    pacer.wait(20, soon())
    started_at = time.monotonic()
    with pytest.raises(RateTimeout, match="10 of 10 recipients/s"):
        pacer.wait(1, soon(1.0))
    assert time.monotonic() - started_at < 0.5
    assert pacer.waiting == 0


def test_a_rate_that_falls_leaves_nobody_waiting_beyond_the_deadline() -> None:
    pacer = Pacer(Rate(20.0))
    pacer.wait(2, soon())
    callers = [gevent.spawn(pacer.wait, 1, soon(0.5)) for _ in range(9)]
    gevent.sleep(0)
    pacer.rate.throttled(time.monotonic())
    started_at = time.monotonic()
    gevent.joinall(callers, timeout=5.0)
    assert time.monotonic() - started_at < 1.5
    errors = [caller.exception for caller in callers if caller.exception is not None]
    assert errors
    assert all(isinstance(error, RateTimeout) for error in errors)
    assert pacer.waiting == 0


def test_a_deadline_that_comes_before_ones_turn_is_kept_wherever_one_stands() -> None:
    pacer = Pacer(Rate(10.0))
    pacer.wait(1, soon())
    callers = [gevent.spawn(pacer.wait, 1, soon(9.0)) for _ in range(9)]
    gevent.sleep(0)
    last = gevent.spawn(pacer.wait, 1, soon(1.2))
    gevent.sleep(0)
    pacer.rate.throttled(time.monotonic())
    pacer.rate_changed()
    started_at = time.monotonic()
    with pytest.raises(RateTimeout):
        last.get(timeout=5.0)
    assert time.monotonic() - started_at < 1.7
    gevent.killall(callers)


def test_a_rate_that_rises_is_used_at_once() -> None:
    pacer = Pacer(Rate())
    pacer.rate.throttled(time.monotonic() - FORGET_SECONDS)
    pacer.wait(1, soon())
    callers = [gevent.spawn(pacer.wait, 1, soon(9.0)) for _ in range(5)]
    gevent.sleep(0)
    assert pacer.waiting == 5
    assert pacer.rate.accepted(1, time.monotonic())
    pacer.rate_changed()
    gevent.joinall(callers, timeout=0.3)
    assert pacer.waiting == 0


@pytest.mark.parametrize("recipients", [1, 50])
def test_who_will_have_its_turn_in_time_is_let_in(recipients: int) -> None:
    pacer = Pacer(Rate(5.0))
    pacer.wait(1, soon())
    waiting = gevent.spawn(pacer.wait, recipients, soon(1.0))
    started_at = time.monotonic()
    waiting.get(timeout=2.0)
    assert time.monotonic() - started_at < 1.0
    assert pacer.waiting == 0


def test_a_killed_caller_holds_nobody_up() -> None:
    pacer = Pacer(Rate(20.0))
    pacer.wait(2, soon())
    callers = [gevent.spawn(pacer.wait, 1, soon()) for _ in range(4)]
    gevent.sleep(0)
    gevent.killall(callers[:3])
    assert pacer.waiting == 1
    callers[3].get(timeout=1.0)


@pytest.mark.parametrize("error", [EgressUnavailable("the quota is spent"), None])
def test_everyone_can_be_turned_away(error: EgressUnavailable | None) -> None:
    pacer = Pacer(Rate(1.0))
    pacer.wait(1, soon())
    callers = [gevent.spawn(pacer.wait, 1, soon(10.0)) for _ in range(5)]
    gevent.sleep(0)
    if error is None:
        pacer.close()
        with pytest.raises(PoolClosed):
            pacer.wait(1, soon())
    else:
        pacer.refuse(error)
    gevent.joinall(callers, timeout=1.0)
    assert all(isinstance(caller.exception, EgressUnavailable) for caller in callers)
    assert pacer.waiting == 0
    assert repr(pacer) == "1 of 1 recipients/s, 0 mails wait"


def test_who_was_refused_for_being_too_fast_goes_first() -> None:
    pacer = Pacer(Rate(20.0))
    pacer.wait(2, soon())
    order: list[str] = []

    def caller(name: str, is_retry: bool) -> None:
        pacer.wait(1, soon(), is_retry=is_retry)
        order.append(name)

    callers = [gevent.spawn(caller, "new", False) for _ in range(5)]
    gevent.sleep(0)
    callers.append(gevent.spawn(caller, "again", True))
    gevent.joinall(callers, timeout=5.0, raise_error=True)
    assert order == ["again"] + ["new"] * 5
    assert pacer.waiting == 0


def test_a_guess_at_the_rate_refuses_nobody_whom_the_truth_may_serve() -> None:
    pacer = Pacer(Rate())
    pacer.rate.throttled(time.monotonic())
    # One recipient a second, which may be four.
    pacer.wait(1, soon())
    deadline = soon(1.5)
    callers = [gevent.spawn(pacer.wait, 1, deadline) for _ in range(20)]
    gevent.sleep(0)
    assert 4 <= pacer.waiting <= 7
    gevent.joinall(callers, timeout=5.0)
    assert time.monotonic() < deadline + 1.0
    assert pacer.waiting == 0
