"""Claims while JetStream is away, slow, restarted, or loses writes and acknowledgements; and what nats-server says."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import gevent
import pytest

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream, Stored
from relay.contract import REQUESTS_BUCKET
from relay.errors import RevisionConflict
from relay.idempotency.claim import Phase, Reason, Refused
from relay.idempotency.claims import CLAIM_SECONDS, COMMIT_SECONDS, SETTLE_SECONDS, Claim, Claims, ClaimsConfig
from relay.tracking.storage import MADE_BY, StorageConfig
from tests.bus.freezing import freeze, frozen
from tests.bus.streams import new_bucket
from tests.idempotency.conftest import NewClaims
from tests.idempotency.sending import (
    DEFERRED,
    RELAYED,
    REPLY,
    Smarthost,
    ask,
    claimed,
    new_key,
    stored,
)
from tests.idempotency.test_claims import DUPLICATE
from tests.support.nats_proxy import Action, NatsProxy
from tests.support.nats_server import NatsServer

UNAVAILABLE = Refused(Reason.UNAVAILABLE)
WAIT_SECONDS = 15.0


def wait_until(is_true: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Returns when it is true."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        gevent.sleep(0.02)


def is_claim(revision: str) -> bool:
    """Whether a publication is a claim."""
    return revision.startswith(f"$KV.{REQUESTS_BUCKET}.")


@pytest.fixture
def server(new_nats_server: Callable[..., NatsServer]) -> NatsServer:
    """A nats-server of the test's own."""
    return new_nats_server()


@pytest.fixture
def jetstream(server: NatsServer, new_bus: Callable[[str], Bus]) -> JetStream:
    """JetStream there."""
    return JetStream(new_bus(server.url), timeout_seconds=1.0)


# -- what nats-server says ------------------------------------------------------------------------
def test_what_must_not_exist_may_not_have_been_deleted(jetstream: JetStream) -> None:
    """The marker counts as the key's last message, and names the revision to replace."""
    bucket = new_bucket(jetstream)
    for remove in (bucket.delete, bucket.purge):
        key = new_key()
        first = bucket.create(key, b"1")
        remove(key)
        answers = jetstream.store([bucket.creation(key, b"2"), bucket.replacement(key, b"2", first.revision)])
        assert [type(answer) for answer in answers] == [RevisionConflict] * 2
        assert isinstance(jetstream.store([bucket.replacement(key, b"2", first.revision + 1)])[0], Stored)


def test_what_must_not_exist_may_have_expired(jetstream: JetStream) -> None:
    """An expired key was never used, and nobody who still knows its revision can write it."""
    bucket = new_bucket(jetstream, max_age=500_000_000)
    first = bucket.create("key", b"1")
    wait_until(lambda: bucket.get("key") is None)
    assert isinstance(jetstream.store([bucket.replacement("key", b"2", first.revision)])[0], RevisionConflict)
    assert isinstance(jetstream.store([bucket.creation("key", b"2")])[0], Stored)


def test_the_bucket_is_made_as_it_is_set(new_claims: NewClaims, jetstream: JetStream) -> None:
    new_claims(ttl_hours=24.0, storage=StorageConfig(storage="memory"))
    config = jetstream.stream_info(f"KV_{REQUESTS_BUCKET}").config
    assert config["max_age"] == 24 * 3600 * 1_000_000_000
    assert config["storage"] == "memory"
    assert config["num_replicas"] == config["max_msgs_per_subject"] == 1
    assert config["allow_direct"] is True
    assert MADE_BY in config["metadata"]


def test_a_request_id_is_forgotten_after_its_time(new_claims: NewClaims, jetstream: JetStream) -> None:
    claims = new_claims(ttl_hours=0.5 / 3600)
    key, smarthost = new_key(), Smarthost()
    assert isinstance(smarthost.send(claims, key), Claim)
    assert ask(claims, key) == DUPLICATE
    wait_until(lambda: claims.ledger.peek(key) is None)
    again = smarthost.send(claims, key)
    assert isinstance(again, Claim)
    assert again.attempt == 1
    assert smarthost.dots == {0: 2}


# -- away -----------------------------------------------------------------------------------------
def test_without_jetstream_nothing_is_sent(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    bare = JetStream(new_bus(new_nats_server(jetstream=False).url))
    claims = Claims(bare, ClaimsConfig(), "worker")
    assert ask(claims, new_key()) == UNAVAILABLE, "not started"
    claims.start()
    assert "JetStream is not enabled" in claims.off_reason
    assert ask(claims, new_key()) == UNAVAILABLE
    claims.close(1)


def test_a_bucket_that_is_deleted_is_made_again(new_claims: NewClaims, jetstream: JetStream) -> None:
    claims = new_claims()
    claim = claimed(claims, new_key())
    jetstream.api(f"STREAM.DELETE.KV_{REQUESTS_BUCKET}")
    assert not claim.commit([0])
    claim.settle({0: DEFERRED}, REPLY)
    assert ask(claims, new_key()) == UNAVAILABLE
    assert claims.off_reason
    wait_until(lambda: not claims.off_reason)
    assert isinstance(ask(claims, new_key()), Claim)


def test_a_server_that_is_away_refuses_and_comes_back(server: NatsServer, new_claims: NewClaims) -> None:
    claims, smarthost, key = new_claims(), Smarthost(), new_key()
    server.stop()
    begun = time.monotonic()
    assert smarthost.send(claims, key) == UNAVAILABLE
    assert time.monotonic() - begun < CLAIM_SECONDS + 1
    server.start()
    wait_until(lambda: isinstance(smarthost.send(claims, key), Claim))
    assert smarthost.dots == {0: 1}


def test_a_restart_between_commit_and_outcome_loses_nothing(server: NatsServer, new_claims: NewClaims) -> None:
    claims, others, key = new_claims(), new_claims(), new_key()
    claim = claimed(claims, key)
    twin = gevent.spawn(ask, others, key)
    wait_until(lambda: others.figures()["waiting"])
    assert claim.commit([0])
    server.stop()
    begun = time.monotonic()
    claim.settle({0: RELAYED}, REPLY)
    assert time.monotonic() - begun < SETTLE_SECONDS + 1, "its caller is answered"
    assert claims.figures()["to_store"] == 1
    assert ask(claims, key, seconds=1) == UNAVAILABLE
    server.start()
    twin.join(WAIT_SECONDS)
    assert twin.value == DUPLICATE
    wait_until(lambda: not claims.figures()["to_store"])
    assert stored(claims, key).phase is Phase.DONE


def test_many_outcomes_wait_for_a_server_that_is_away(server: NatsServer, new_claims: NewClaims) -> None:
    claims = new_claims()
    keys = [new_key() for _ in range(1200)]
    claiming = [gevent.spawn(claimed, claims, key) for key in keys]
    gevent.joinall(claiming, raise_error=True)
    held = [each.value for each in claiming]
    gevent.joinall([gevent.spawn(claim.commit, [0]) for claim in held], raise_error=True)
    server.stop()
    gevent.joinall([gevent.spawn(claim.settle, {0: RELAYED}, REPLY) for claim in held], raise_error=True)
    assert claims.figures()["to_store"] == 1200
    server.start()
    wait_until(lambda: not claims.figures()["to_store"])
    assert {stored(claims, key).phase for key in keys} == {Phase.DONE}
    assert claims.figures().get("unsettled", 0) == claims.figures().get("lost", 0) == 0


def test_an_outcome_that_cannot_be_stored_in_time_is_in_doubt(server: NatsServer, new_claims: NewClaims) -> None:
    claims, others, key = new_claims(settling_seconds=0.2), new_claims(), new_key()
    claim = claimed(claims, key, seconds=0.8)
    assert claim.commit([0])
    with frozen(server):
        claim.settle({0: RELAYED}, REPLY)
        wait_until(lambda: not claims.figures()["to_store"])
    assert claims.figures()["unsettled"] == 1
    # What was sent to the frozen server may still be stored, and then it is the answer.
    answer = ask(others, key)
    assert answer == DUPLICATE or (isinstance(answer, Claim) and answer.found_in_doubt == (0,))


def test_closing_waits_for_outcomes(server: NatsServer, new_claims: NewClaims) -> None:
    claims, others, key = new_claims(), new_claims(), new_key()
    claim = claimed(claims, key)
    assert claim.commit([0])
    pid = freeze(server)
    try:
        claim.settle({0: RELAYED}, REPLY)
    finally:
        os.kill(pid, signal.SIGCONT)
    claims.close(WAIT_SECONDS)
    assert stored(others, key).phase is Phase.DONE


# -- slow -----------------------------------------------------------------------------------------
def test_a_server_that_hangs_costs_so_much_time_and_no_more(server: NatsServer, new_claims: NewClaims) -> None:
    claims, others, key = new_claims(), new_claims(), new_key()
    held = claimed(claims, new_key())
    with frozen(server):
        begun = time.monotonic()
        assert ask(claims, key) == UNAVAILABLE
        assert time.monotonic() - begun < CLAIM_SECONDS + 0.5
        begun = time.monotonic()
        assert ask(claims, new_key(), seconds=0.3) == UNAVAILABLE
        assert time.monotonic() - begun < 0.8
        begun = time.monotonic()
        assert not held.commit([0]), "an unknown acknowledgement is none"
        assert time.monotonic() - begun < COMMIT_SECONDS + 0.5
        begun = time.monotonic()
        held.settle({0: DEFERRED}, REPLY)
        assert time.monotonic() - begun < SETTLE_SECONDS + 0.5
    begun = time.monotonic()
    answer = ask(others, key)
    assert isinstance(answer, Claim), "what was refused is withdrawn: nobody waits until its lease is over"
    assert answer.commit([0])
    assert time.monotonic() - begun < 5
    wait_until(lambda: stored(others, held.key).phase is Phase.OPEN)


# -- lost writes and acknowledgements ---------------------------------------------------------------
@pytest.fixture
def proxy(server: NatsServer) -> Iterator[NatsProxy]:
    """A proxy before the server."""
    made = NatsProxy(server.port, is_claim)
    yield made
    made.stop()


@pytest.fixture
def through_proxy(proxy: NatsProxy, new_bus: Callable[[str], Bus]) -> JetStream:
    """JetStream behind the proxy."""
    return JetStream(new_bus(proxy.url), timeout_seconds=1.0)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("action", Action)
def test_every_write_may_be_lost_late_or_unacknowledged(
    proxy: NatsProxy, through_proxy: JetStream, action: Action, at: int
) -> None:
    claims = Claims(through_proxy, ClaimsConfig(settling_seconds=1.0), "worker")
    claims.start()
    key, smarthost = new_key(), Smarthost()
    proxy.begin(at, action, proxy.accept_again)
    sent = smarthost.send(claims, key, seconds=8)
    if isinstance(sent, Claim):
        assert smarthost.dots == {0: 1}
    else:
        assert sent == UNAVAILABLE
        assert not smarthost.dots
    others = Claims(through_proxy, ClaimsConfig(), "another worker")
    others.start()
    wait_until(lambda: not others.off_reason)
    wait_until(lambda: stored_phase(others, key) is Phase.DONE or isinstance(smarthost.send(others, key), Claim))
    assert smarthost.dots == {0: 1}
    assert ask(others, key) == DUPLICATE
    for each in (claims, others):
        each.close(1)


def test_whose_time_ends_while_it_takes_over_is_not_told_that_jetstream_is_away(
    proxy: NatsProxy, through_proxy: JetStream
) -> None:
    key = new_key()
    dead, late = (Claims(through_proxy, ClaimsConfig(settling_seconds=0.1), name) for name in ("dead", "late"))
    for each in (dead, late):
        each.start()
    claimed(dead, key, seconds=0.9)
    proxy.begin(2, Action.DROP)  # the first finds that there is a claim, the second takes it over
    assert ask(late, key, seconds=1.3) == Refused(Reason.IN_PROGRESS)
    assert proxy.is_reached
    for each in (dead, late):
        each.close(1)


def stored_phase(claims: Claims, key: str) -> Phase | None:
    """Of the claim, None when there is none."""
    return stored(claims, key).phase if claims.ledger.peek(key) is not None else None


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_nobody_gets_two_mails(proxy: NatsProxy, through_proxy: JetStream, seed: int) -> None:
    """Three workers at a few requests; writes fail at random, claims are forgotten as by a worker that dies."""
    chance = random.Random(seed)
    workers = [Claims(through_proxy, ClaimsConfig(settling_seconds=0.3), f"worker-{number}") for number in range(3)]
    for claims in workers:
        claims.start()
    keys = [new_key() for _ in range(4)]
    smarthosts = {key: Smarthost() for key in keys}

    def send(key: str) -> None:
        answer = ask(chance.choice(workers), key, recipients=2, seconds=1.0)
        if not isinstance(answer, Claim):
            return
        results = {}
        for index in answer.unsent:
            if chance.random() < 0.1:
                return  # it dies
            if answer.commit([index]):
                if chance.random() < 0.1:
                    return
                smarthosts[key].dots[index] += 1
                results[index] = RELAYED
            else:
                results[index] = DEFERRED
        if chance.random() < 0.9:
            answer.settle(results, REPLY)

    for _ in range(6):
        proxy.begin(chance.randint(1, 12), chance.choice(list(Action)), proxy.accept_again)
        gevent.joinall([gevent.spawn(send, key) for key in keys * 3], raise_error=True)
    proxy.begin(0, Action.DROP)
    proxy.accept_again()
    last = Claims(through_proxy, ClaimsConfig(), "the last worker")
    last.start()
    wait_until(lambda: not last.off_reason)
    for key in keys:
        wait_until(lambda key=key: not isinstance(smarthosts[key].send(last, key, recipients=2), Refused))
        assert max(smarthosts[key].dots.values(), default=0) <= 1
        value = stored(last, key)
        assert value.phase is Phase.DONE
        for index, each in enumerate(value.recipients):
            assert smarthosts[key].dots[index] == 1 or each.outcome == "in_doubt", "nobody is forgotten"
    for each in (*workers, last):
        each.close(1)
