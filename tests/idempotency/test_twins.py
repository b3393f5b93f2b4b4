"""Twins: the same request at the same time, in one process and in several, against a real nats-server."""

from __future__ import annotations

import time

import gevent
import pytest
from gevent.event import Event

from relay.idempotency.claim import Phase, Reason, Refused, Settled
from relay.idempotency.claims import Claim, Claims
from relay.idempotency.twins import Busy
from tests.idempotency.conftest import NewClaims
from tests.idempotency.sending import (
    DEFERRED,
    FINGERPRINT,
    RELAYED,
    REPLY,
    Smarthost,
    ask,
    claimed,
    last_sequence,
    new_key,
    stored,
)
from tests.idempotency.test_claims import DUPLICATE

WAIT_SECONDS = 10.0


def waiting(claims: Claims, count: int) -> None:
    """Returns when so many wait."""
    deadline = time.monotonic() + WAIT_SECONDS
    while claims.figures()["waiting"] != count:
        assert time.monotonic() < deadline, claims.figures()
        gevent.sleep(0.001)


def answers(greenlets: list[gevent.Greenlet]) -> list[object]:
    """What each was answered."""
    gevent.joinall(greenlets, timeout=WAIT_SECONDS, raise_error=True)
    return [each.value for each in greenlets]


def no_key_is_left(*all_claims: Claims) -> None:
    """Nothing is remembered of keys that are not in use."""
    for claims in all_claims:
        assert claims._twins._watches == {}
        assert claims._twins._waiting_bytes == 0


def test_two_hundred_twins_of_four_workers_send_one_mail(new_claims: NewClaims) -> None:
    workers = [new_claims() for _ in range(4)]
    key, smarthost = new_key(), Smarthost()
    got = answers([gevent.spawn(smarthost.send, workers[number % 4], key) for number in range(200)])
    assert smarthost.dots == {0: 1}
    assert sum(isinstance(each, Claim) for each in got) == 1
    assert got.count(DUPLICATE) == 199
    no_key_is_left(*workers)


@pytest.mark.parametrize("is_same_worker", [True, False])
def test_a_twin_waits_for_the_first_ones_answer(claims: Claims, new_claims: NewClaims, is_same_worker: bool) -> None:
    key, called = new_key(), []
    others = claims if is_same_worker else new_claims()
    claim = claimed(claims, key)
    twins = [gevent.spawn(ask, others, key, on_wait=lambda: called.append(1)) for _ in range(20)]
    waiting(others, 20)
    assert len(called) == 20, "each was told once that it waits"
    assert claim.commit([0])
    claim.settle({0: RELAYED}, REPLY)
    assert answers(twins) == [DUPLICATE] * 20
    no_key_is_left(claims, others)


def test_who_does_not_wait_is_not_told_so(claims: Claims) -> None:
    key, called = new_key(), []
    claimed(claims, key, on_wait=lambda: called.append(1)).settle({0: RELAYED}, REPLY)
    assert ask(claims, key, on_wait=lambda: called.append(1)) == DUPLICATE
    assert called == []


@pytest.mark.parametrize("is_same_worker", [True, False])
def test_twins_of_a_deferred_mail_are_deferred_too(claims: Claims, new_claims: NewClaims, is_same_worker: bool) -> None:
    """They do not all try one after the other, at a smarthost that is in trouble."""
    key = new_key()
    others = claims if is_same_worker else new_claims()
    claim = claimed(claims, key)
    twins = [gevent.spawn(ask, others, key) for _ in range(20)]
    waiting(others, 20)
    claim.settle({0: DEFERRED}, REPLY)
    assert answers(twins) == [DUPLICATE] * 20
    assert stored(claims, key).phase is Phase.OPEN
    assert claimed(others, key).attempt == 2, "the next one tries again"


@pytest.mark.parametrize("is_same_worker", [True, False])
def test_when_the_first_one_leaves_no_answer_one_twin_goes_on(
    claims: Claims, new_claims: NewClaims, is_same_worker: bool
) -> None:
    key, smarthost = new_key(), Smarthost()
    others = claims if is_same_worker else new_claims()
    claim = claimed(claims, key)
    twins = [gevent.spawn(smarthost.send, others, key) for _ in range(20)]
    waiting(others, 20)
    with claim:
        pass
    got = answers(twins)
    assert smarthost.dots == {0: 1}
    assert got.count(DUPLICATE) == 19
    no_key_is_left(claims, others)


def test_when_the_first_one_dies_one_twin_goes_on(new_claims: NewClaims) -> None:
    key, smarthost = new_key(), Smarthost()
    claimed(new_claims(settling_seconds=0.2), key, seconds=0.5)
    workers = [new_claims() for _ in range(3)]
    got = answers([gevent.spawn(smarthost.send, workers[number % 3], key) for number in range(60)])
    assert smarthost.dots == {0: 1}
    assert got.count(DUPLICATE) == 59
    no_key_is_left(*workers)


@pytest.mark.parametrize("is_same_worker", [True, False])
def test_a_twin_waits_no_longer_than_its_own_deadline(
    claims: Claims, new_claims: NewClaims, is_same_worker: bool
) -> None:
    key = new_key()
    others = claims if is_same_worker else new_claims()
    claim = claimed(claims, key)
    begun = time.monotonic()
    short, long = gevent.spawn(ask, others, key, seconds=0.3), gevent.spawn(ask, others, key)
    assert answers([short]) == [Refused(Reason.IN_PROGRESS)]
    assert 0.25 < time.monotonic() - begun < 2
    claim.settle({0: RELAYED}, REPLY)
    assert answers([long]) == [DUPLICATE]


def test_who_comes_when_the_answer_is_there_does_not_wait_for_another(claims: Claims) -> None:
    """The twins before have been told, and are not gone yet."""
    key, twins = new_key(), claims._twins
    with claimed(claims, key) as claim:
        claim.settle({0: RELAYED}, REPLY)
    found = Busy(stored(claims, key), last_sequence(claims), time.monotonic() + 60)
    watch = twins.reserve(key)
    begun = time.monotonic()
    assert twins.wait(watch, FINGERPRINT, begun + 5, seen=found) is None, "it is to look for itself"
    assert time.monotonic() - begun < 1
    twins.give_up(watch)
    no_key_is_left(claims)


def test_another_mail_does_not_wait(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    others = new_claims()
    claim = claimed(claims, key)
    twin = gevent.spawn(ask, others, key)
    waiting(others, 1)
    for each in (claims, others):
        assert ask(each, key, fingerprint="another") == Refused(Reason.PAYLOAD_DIFFERS)
    claim.settle({0: RELAYED}, REPLY)
    assert answers([twin]) == [DUPLICATE]


def test_another_mail_that_comes_at_the_same_time_is_refused_in_the_end(claims: Claims) -> None:
    """Nobody knows yet whose the claim will be."""
    key = new_key()
    both = [gevent.spawn(ask, claims, key, fingerprint=each) for each in ("one", "another")]
    gevent.sleep(0.1)
    (claim,) = [each.value for each in both if each.ready()]
    assert isinstance(claim, Claim)
    claim.settle({0: RELAYED}, REPLY)
    assert Refused(Reason.PAYLOAD_DIFFERS) in answers(both)


def test_the_first_ones_broken_callback_stops_nobody(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    others = new_claims()
    claim = claimed(claims, key)
    with pytest.raises(ZeroDivisionError):
        ask(others, key, on_wait=lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    twin = gevent.spawn(ask, others, key)
    waiting(others, 1)
    killed = gevent.spawn(ask, others, key)
    waiting(others, 2)
    killed.kill()
    claim.settle({0: RELAYED}, REPLY)
    assert answers([twin]) == [DUPLICATE]
    no_key_is_left(claims, others)


def test_not_more_wait_than_there_may(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    few, small = new_claims(max_waiting=2), new_claims(max_waiting_bytes=1000)
    claim = claimed(claims, key)
    twins = [gevent.spawn(ask, few, key) for _ in range(2)]
    twins.append(gevent.spawn(ask, small, key, size_bytes=600))
    waiting(few, 2)
    waiting(small, 1)
    overloaded = Refused(Reason.OVERLOADED)
    assert ask(few, key) == ask(small, key, size_bytes=600) == overloaded
    twins.append(gevent.spawn(ask, small, key, size_bytes=400))
    waiting(small, 2)
    assert ask(few, new_key()).__class__ is Claim, "who need not wait is served"
    claim.settle({0: RELAYED}, REPLY)
    assert answers(twins) == [DUPLICATE] * 4
    no_key_is_left(claims, small)


def test_twins_of_one_worker_look_together(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    others = new_claims()
    claim = claimed(claims, key)
    twins = [gevent.spawn(ask, others, key) for _ in range(50)]
    waiting(others, 50)
    assert len(others._twins._pollers) == 1
    assert others._twins._pollers.isdisjoint(twins)
    before = last_sequence(claims)
    claim.settle({0: RELAYED}, REPLY)
    assert answers(twins) == [DUPLICATE] * 50
    assert last_sequence(claims) == before + 1, "none of them wrote"


def test_a_worker_that_stops_answers_who_waits_at_its_limit(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    others = new_claims()
    claimed(claims, key)
    twins = [gevent.spawn(ask, others, key) for _ in range(3)]
    waiting(others, 3)
    begun = time.monotonic()
    others.limit_waits(begun + 30)
    others.limit_waits(begun + 0.4)
    twins.append(gevent.spawn(ask, others, key))
    assert answers(twins) == [Refused(Reason.IN_PROGRESS)] * 4
    assert 0.35 < time.monotonic() - begun < 3
    assert ask(others, key) == Refused(Reason.IN_PROGRESS), "nobody waits any more"
    others.close(1)


def test_closing_answers_who_waits(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    others = new_claims()
    claimed(claims, key)
    twins = [gevent.spawn(ask, others, key) for _ in range(3)]
    waiting(others, 3)
    others.close(1)
    assert answers(twins) == [Refused(Reason.IN_PROGRESS)] * 3


def test_many_requests_with_twins_each_are_sent_once(new_claims: NewClaims) -> None:
    workers = [new_claims() for _ in range(3)]
    keys = [new_key() for _ in range(40)]
    smarthosts = {key: Smarthost() for key in keys}
    start = Event()

    def send(number: int) -> object:
        start.wait()
        key = keys[number % 40]
        return smarthosts[key].send(workers[number % 3], key)

    sending = [gevent.spawn(send, number) for number in range(480)]
    start.set()
    got = answers(sending)
    assert all(smarthost.dots == {0: 1} for smarthost in smarthosts.values())
    assert sum(isinstance(each, Settled) for each in got) == 440
    no_key_is_left(*workers)
