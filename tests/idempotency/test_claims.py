"""Claims of several workers, against a real nats-server."""

from __future__ import annotations

import time

import gevent
import orjson
import pytest

from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.contract import REQUESTS_BUCKET
from relay.idempotency.claim import COMMITTING, Phase, Reason, Refused, Settled
from relay.idempotency.claims import Claim, Claims
from tests.idempotency.conftest import NewClaims
from tests.idempotency.sending import (
    DEFERRED,
    FAILED,
    IN_DOUBT,
    RELAYED,
    REPLY,
    Smarthost,
    ask,
    claimed,
    last_sequence,
    new_key,
    stored,
)

DUPLICATE = Settled(orjson.dumps({**orjson.loads(REPLY), "duplicate": True}))


def outcomes(claim: Claim) -> list[str]:
    """Of each recipient."""
    return [each.outcome for each in claim.recipients]


# -- one after the other ------------------------------------------------------------------------
def test_a_request_costs_three_writes_and_its_repetition_none(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    before = last_sequence(claims)
    with claimed(claims, key) as claim:
        assert stored(claims, key).phase is Phase.CLAIMED
        assert claim.attempt == 1
        assert claim.unsent == (0,)
        assert claim.commit([0])
        assert stored(claims, key).phase is Phase.COMMITTING
        assert claim.commit([0]), "again, for another attempt of the same mail"
        claim.settle({0: RELAYED}, REPLY)
    assert stored(claims, key).phase is Phase.DONE
    assert last_sequence(claims) == before + 3
    assert ask(claims, key) == ask(new_claims(), key) == DUPLICATE
    assert last_sequence(claims) == before + 3
    assert claims.figures() | {"claimed": 1, "repeated": 1, "waiting": 0, "to_store": 0} == claims.figures()


@pytest.mark.parametrize("outcome", [RELAYED, FAILED])
def test_what_is_final_is_said_again(claims: Claims, outcome: object) -> None:
    key = new_key()
    claim = claimed(claims, key)
    assert claim.commit([0])
    claim.settle({0: outcome}, REPLY)  # type: ignore[dict-item]
    assert ask(claims, key) == DUPLICATE


def test_deferred_releases_the_claim_and_keeps_what_was_sent(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    first = claimed(claims, key, recipients=3)
    assert first.commit(first.unsent)
    first.settle({0: RELAYED, 1: DEFERRED, 2: FAILED}, REPLY)
    second = claimed(new_claims(), key, recipients=3)
    assert second.attempt == 2
    assert outcomes(second) == ["relayed", "deferred", "failed"]
    assert second.unsent == (1,)
    assert [each.email_id for each in second.recipients] == [each.email_id for each in first.recipients]
    assert not second.commit([0]), "nobody is sent to twice"
    assert second.commit([1])
    second.settle({1: RELAYED}, REPLY)
    assert ask(claims, key) == DUPLICATE


def test_the_same_id_for_another_mail_is_refused(claims: Claims, new_claims: NewClaims) -> None:
    refused = Refused(Reason.PAYLOAD_DIFFERS)
    key, others = new_key(), new_claims()
    with claimed(claims, key) as claim:
        for each in (claims, others):
            assert ask(each, key, fingerprint="another") == refused, "while it is in progress"
        claim.settle({0: DEFERRED}, REPLY)
    assert ask(others, key, fingerprint="another") == refused, "when it is open"
    with claimed(claims, key) as claim:
        claim.settle({0: RELAYED}, REPLY)
    assert ask(others, key, fingerprint="another") == refused, "when it is done"
    assert ask(others, key) == DUPLICATE


def test_a_claim_that_is_left_without_an_answer_is_released(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    with claimed(claims, key, recipients=2) as claim:
        assert claim.commit([0])
    again = claimed(new_claims(), key, recipients=2)
    assert outcomes(again) == ["in_doubt", ""]
    assert not claim.commit([1]), "its owner has it no more"


def test_a_claim_that_cannot_be_read_stops_its_request(claims: Claims, jetstream: JetStream) -> None:
    key = new_key()
    Bucket(jetstream, REQUESTS_BUCKET).put(key, b'{"state": "of a later version"}')
    assert ask(claims, key) == Refused(Reason.UNAVAILABLE)


# -- leases ---------------------------------------------------------------------------------------
def test_a_dead_workers_claim_is_taken_over_when_its_lease_is_over(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    dead = claimed(new_claims(settling_seconds=0.2), key, seconds=0.8)
    begun = time.monotonic()
    claim = claimed(claims, key)
    assert 0.8 < time.monotonic() - begun < 5
    assert claim.attempt == 2
    assert claim.found_in_doubt == ()
    assert claim.unsent == (0,)
    assert not dead.commit([0]), "should it go on after all"
    dead.settle({0: RELAYED}, REPLY)
    assert stored(claims, key).attempt == 2
    assert claim.commit([0])


def test_what_a_dead_worker_committed_is_in_doubt(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    dead = claimed(new_claims(settling_seconds=0.1), key, recipients=4, seconds=0.5)
    assert dead.commit([0])
    dead.note(0, RELAYED)
    assert dead.commit([1])
    claim = claimed(claims, key, recipients=4)
    assert outcomes(claim) == ["relayed", "in_doubt", "", ""]
    assert claim.found_in_doubt == (1,)
    assert claim.unsent == (2, 3)
    assert claim.commit([2, 3])
    claim.settle({2: RELAYED, 3: RELAYED}, REPLY)
    assert ask(claims, key) == DUPLICATE


def test_who_was_left_in_doubt_is_found_until_somebody_has_said_so(new_claims: NewClaims) -> None:
    """Else a worker that dies as it takes over leaves a mail without a record, and its reply names it."""
    key = new_key()
    dead = claimed(new_claims(settling_seconds=0.1), key, recipients=3, seconds=0.4)
    assert dead.commit([0, 1])
    dead.note(1, IN_DOUBT)
    assert dead.commit([2])
    dead_too = claimed(new_claims(settling_seconds=0.1), key, recipients=3, seconds=1.0)
    assert dead_too.found_in_doubt == (0, 2)
    claim = claimed(new_claims(), key, recipients=3)
    assert claim.attempt == 3
    assert outcomes(claim) == ["in_doubt"] * 3
    assert claim.found_in_doubt == (0, 2)


def test_when_nobody_is_unsent_only_the_answer_is_missing(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    dead = claimed(new_claims(settling_seconds=0.1), key, seconds=0.5)
    assert dead.commit([0])
    claim = claimed(claims, key)
    assert claim.unsent == ()
    assert claim.found_in_doubt == (0,)
    claim.settle({}, REPLY)
    assert ask(claims, key) == DUPLICATE
    dead.settle({0: RELAYED}, b'{"email_id": "too late"}')
    assert ask(claims, key) == DUPLICATE, "what is done does not change"


def test_a_live_workers_claim_is_not_taken_over(claims: Claims, new_claims: NewClaims) -> None:
    key = new_key()
    alive = claimed(claims, key, seconds=3)
    assert ask(new_claims(), key, seconds=1) == Refused(Reason.IN_PROGRESS)
    assert alive.commit([0])
    alive.settle({0: RELAYED}, REPLY)
    assert ask(claims, key) == DUPLICATE


def test_two_machines_clocks_do_not_matter(
    claims: Claims, new_claims: NewClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key()
    claimed(claims, key, seconds=5)
    monkeypatch.setattr(time, "time", lambda: 4_000_000_000.0)
    assert ask(new_claims(), key, seconds=0.5) == Refused(Reason.IN_PROGRESS)


def test_nothing_is_committed_beyond_the_deadline_nor_sent_again_beyond_the_lease(new_claims: NewClaims) -> None:
    claims = new_claims(settling_seconds=0.2)
    late, early = (claimed(claims, new_key(), seconds=0.4) for _ in range(2))
    assert early.commit([0])
    gevent.sleep(0.45)
    assert not late.commit([0])
    assert early.commit([0])
    gevent.sleep(0.2)
    assert not early.commit([0])


# -- individual mails -----------------------------------------------------------------------------
def test_commits_that_wait_for_each_other_are_written_together(claims: Claims) -> None:
    key = new_key()
    before = last_sequence(claims)
    claim = claimed(claims, key, recipients=50)
    committing = [gevent.spawn(claim.commit, [index]) for index in range(50)]
    gevent.joinall(committing, raise_error=True)
    assert all(each.value for each in committing)
    assert last_sequence(claims) == before + 3, "the claim, the first, and all the others"
    assert [each.outcome for each in stored(claims, key).recipients] == [COMMITTING] * 50


def test_outcomes_are_written_with_the_next_commit(claims: Claims) -> None:
    key = new_key()
    before = last_sequence(claims)
    smarthost = Smarthost()
    assert isinstance(smarthost.send(claims, key, recipients=10), Claim)
    assert last_sequence(claims) == before + 12
    assert {each.outcome for each in stored(claims, key).recipients} == {"relayed"}
    assert set(smarthost.dots.values()) == {1}


# -- keys that are gone -----------------------------------------------------------------------------
def test_a_key_that_was_deleted_or_purged_may_be_claimed_again(claims: Claims, jetstream: JetStream) -> None:
    bucket = Bucket(jetstream, REQUESTS_BUCKET)
    for remove in (bucket.delete, bucket.purge):
        key = new_key()
        smarthost = Smarthost()
        smarthost.send(claims, key)
        remove(key)
        assert isinstance(smarthost.send(claims, key), Claim)
        assert smarthost.dots == {0: 2}


def test_a_claim_whose_key_was_deleted_is_lost(claims: Claims, jetstream: JetStream) -> None:
    key = new_key()
    claim = claimed(claims, key)
    Bucket(jetstream, REQUESTS_BUCKET).delete(key)
    assert not claim.commit([0])
    claim.settle({0: RELAYED}, REPLY)
    assert claims.figures()["lost"] == 1
