"""The pool's bookkeeping, driven by events: no sockets, no clock, no greenlets."""

from __future__ import annotations

import dataclasses
import random

import pytest

from relay.delivery.pool_state import GROW_SECONDS, SHRUNK_SECONDS, PoolState

IDLE_SECONDS, AGE_SECONDS, MESSAGES = 5.0, 50.0, 10


@dataclasses.dataclass(eq=False)
class Link:
    opened_at: float = 0.0
    idle_since: float = 0.0
    transactions: int = 0


def state_of(size: int = 3) -> PoolState[Link, str]:
    return PoolState(size, IDLE_SECONDS, AGE_SECONDS, MESSAGES)


def with_idle(count: int, size: int = 3) -> PoolState[Link, str]:
    state = state_of(size)
    for _ in range(count):
        assert state.begin_spare_dial()
        assert state.dialled(Link(), 0.0) is None
    return state


def test_repr_says_it_all() -> None:
    assert repr(with_idle(2)) == "idle 2, reserved 0, busy 0, dialling 0, waiting 0 of 3"


def test_the_connection_used_last_goes_first() -> None:
    state = with_idle(2)
    first, second = state.acquire(0.0), state.acquire(0.0)
    assert first is not None
    assert second is not None
    state.release(second, 1.0, is_reusable=True)
    state.release(first, 2.0, is_reusable=True)
    assert state.acquire(2.0) is first


def test_nothing_is_dialled_when_nobody_waits_and_never_more_than_needed() -> None:
    state = state_of()
    assert state.begin_dials(0.0) == 0
    state.wait("a", 9.0)
    assert state.begin_dials(0.0) == 1
    assert state.begin_dials(0.0) == 0
    for name in "bcde":
        state.wait(name, 9.0)
    assert state.begin_dials(0.0) == 2
    assert repr(state) == "idle 0, reserved 0, busy 0, dialling 3, waiting 5 of 3"
    assert not state.begin_spare_dial()


def test_whatever_comes_first_serves_the_first_waiter() -> None:
    state = with_idle(1)
    busy = state.acquire(0.0)
    assert busy is not None
    state.wait("a", 9.0)
    state.wait("b", 9.0)
    assert state.begin_dials(0.0) == 2
    assert state.release(busy, 1.0, is_reusable=True) == "a"
    assert state.dialled(Link(), 1.0) == "b"
    assert repr(state) == "idle 0, reserved 2, busy 0, dialling 1, waiting 0 of 3"
    assert state.take("a") is busy
    # The dial that nobody needs any more leaves an idle connection.
    assert state.dialled(Link(), 1.0) is None
    assert repr(state) == "idle 1, reserved 1, busy 1, dialling 0, waiting 0 of 3"


def test_a_promised_connection_goes_on_to_the_next_when_its_waiter_gives_up() -> None:
    state = with_idle(1)
    busy = state.acquire(0.0)
    assert busy is not None
    state.wait("a", 9.0)
    state.wait("b", 9.0)
    assert state.release(busy, 1.0, is_reusable=True) == "a"
    assert state.forsake("a", 1.0) == "b"
    assert state.take("b") is busy
    assert state.forsake("never queued", 1.0) is None


def test_who_waited_too_long_is_dropped() -> None:
    state = state_of()
    state.wait("late", 9.0)
    state.wait("early", 3.0)
    assert state.expire(2.9) == []
    assert state.expire(3.0) == ["early"]
    assert list(state.waiters) == ["late"]


@pytest.mark.parametrize(("now", "transactions"), [(IDLE_SECONDS, 0), (1.0, MESSAGES)])
def test_a_worn_out_idle_connection_is_retired(now: float, transactions: int) -> None:
    state = with_idle(2)
    for link in state.idle:
        link.transactions = transactions
    state.reap(now)
    assert (len(state.retired), len(state.idle)) == (2, 0)


def test_an_old_connection_is_not_given_away() -> None:
    state = with_idle(1)
    state.idle[0].idle_since = AGE_SECONDS
    assert state.acquire(AGE_SECONDS) is None
    assert len(state.retired) == 1


def test_a_connection_retires_after_its_last_message_even_when_someone_waits() -> None:
    state = with_idle(1, size=1)
    busy = state.acquire(0.0)
    assert busy is not None
    state.wait("a", 9.0)
    busy.transactions = MESSAGES
    assert state.release(busy, 1.0, is_reusable=True) is None
    assert state.retired == [busy]
    assert state.begin_dials(1.0) == 1


def test_held_dials_wait() -> None:
    state = state_of()
    state.wait("a", 9.0)
    state.hold_dials(2.0)
    assert state.begin_dials(1.9) == 0
    assert state.begin_dials(2.0) == 1


def test_it_shrinks_to_what_there_is_and_grows_again_step_by_step() -> None:
    state = with_idle(3, size=20)
    state.dialling += 2
    state.shrink(0.0)
    assert repr(state) == "idle 3, reserved 0, busy 0, dialling 2, waiting 0 of 20, 5 for now"
    state.dial_failed()
    state.shrink(0.0)
    state.dial_failed()
    state.shrink(0.0)
    for name in "abcdef":
        state.wait(name, 99.0)
    assert state.begin_dials(0.0) == 0
    state.grow(SHRUNK_SECONDS - 0.1)
    assert state.limit == 3
    now = SHRUNK_SECONDS
    limits = []
    while state.limit < 20:
        state.grow(now)
        limits.append(state.limit)
        now += GROW_SECONDS
    assert limits == [5, 7, 9, 11, 13, 15, 17, 19, 20]


def test_one_connection_is_allowed_in_any_case() -> None:
    state = state_of()
    state.shrink(0.0)
    state.wait("a", 9.0)
    assert (state.limit, state.begin_dials(0.0)) == (1, 1)


def test_closing_hands_out_every_waiter_and_retires_what_comes_back() -> None:
    state = with_idle(2)
    busy = state.acquire(0.0)
    assert busy is not None
    state.wait("a", 9.0)
    state.dialling += 1
    assert state.close() == ["a"]
    assert len(state.retired) == 1
    assert state.release(busy, 1.0, is_reusable=True) is None
    assert state.dialled(Link(), 1.0) is None
    assert len(state.retired) == 3
    assert repr(state) == "idle 0, reserved 0, busy 0, dialling 0, waiting 0 of 3"
    assert state.begin_dials(1.0) == 0


@pytest.mark.parametrize("seed", range(30))
def test_a_random_walk_keeps_the_bound_and_resolves_every_waiter(seed: int) -> None:
    walk = random.Random(seed)
    size = walk.randint(1, 5)
    state = state_of(size)
    now, names = 0.0, 0
    resolved: set[str] = set()
    busy: set[Link] = set()

    def woken(waiter: str | None) -> None:
        assert waiter is None or waiter in state.reserved

    def step() -> None:
        nonlocal now, names
        now += walk.choice([0.0, 0.1, 1.0, 6.0]) * walk.random()
        event = walk.randrange(11)
        if event <= 1:
            link = state.acquire(now)
            if link is None:
                state.wait(f"w{names}", now + walk.random() * 5)
                names += 1
            else:
                assert link not in busy
                busy.add(link)
        elif event == 2 and busy:
            link = busy.pop()
            link.transactions += 1
            woken(state.release(link, now, is_reusable=walk.random() < 0.8))
        elif event == 3 and state.dialling:
            woken(state.dialled(Link(now, now), now))
        elif event == 4 and state.dialling:
            state.dial_failed()
        elif event == 5 and state.reserved:
            waiter = walk.choice(list(state.reserved))
            link = state.take(waiter)
            assert link not in busy
            busy.add(link)
            resolved.add(waiter)
        elif event == 6 and (state.reserved or state.waiters):
            waiter = walk.choice([*state.reserved, *state.waiters])
            woken(state.forsake(waiter, now))
            resolved.add(waiter)
        elif event == 7:
            state.reap(now)
            resolved.update(state.expire(now))
        elif event == 8:
            state.begin_spare_dial()
        elif event == 9:
            state.shrink(now)
        elif event == 10:
            state.grow(now)
        open_before = state.open
        dials = state.begin_dials(now)
        assert not dials or open_before + dials <= state.limit, repr(state)

    for _ in range(400):
        step()
        assert state.living == len(state.idle) + len(state.reserved) + len(state.busy), repr(state)
        assert 0 <= state.open <= size, repr(state)
        assert 1 <= state.limit <= size, repr(state)
        assert state.busy == busy
        assert not (state.waiters and state.idle), repr(state)
        everywhere = [*state.idle, *state.reserved.values(), *state.busy, *state.retired]
        assert len(everywhere) == len(set(everywhere)), "a connection in two places"
    resolved.update(state.close())
    for waiter in list(state.reserved):
        assert state.forsake(waiter, now) is None
        resolved.add(waiter)
    assert resolved == {f"w{number}" for number in range(names)}
