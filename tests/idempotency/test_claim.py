"""The states of a claim as a table, and what a claim is known by."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.idempotency.claim import (
    COMMITTING,
    MAX_DETAIL_CHARACTERS,
    Owner,
    Phase,
    Progress,
    Reason,
    Refusal,
    Refused,
    Settled,
    Value,
    answer_from,
    claim_key,
    claimed,
    committing,
    fingerprint_of,
    read_value,
    settled,
    taken_over,
)

FIRST = Owner("first-token", "worker-1", 45.0)
SECOND = Owner("second-token", "worker-2", 40.0)
REPLY = orjson.dumps({"email_id": "id-0", "group_id": "group"})
RELAYED = Progress("", outcome="relayed", reply_code=250, enhanced_code="2.0.0", remote_id="remote")
FAILED = Progress("", outcome="failed", reply_code=550, enhanced_code="5.1.1")
DEFERRED = Progress("", outcome="deferred", reply_code=451, enhanced_code="4.7.0", detail="later")
IN_DOUBT = Progress("", outcome="in_doubt")


def new_claim(recipients: int = 2) -> Value:
    """A claim of the first owner, for some recipients."""
    planned = [Progress(f"id-{number}", f"<{number}@example.com>") for number in range(recipients)]
    return claimed("fingerprint", "group", planned, FIRST)


def changed(value: Value | Refusal) -> Value:
    """The value, of a change that must be possible."""
    assert isinstance(value, Value), value
    return value


def in_phase(phase: Phase) -> Value:
    """A claim of the first owner in each state; of the two recipients of ``open`` one is unsent."""
    value = new_claim()
    if phase is Phase.CLAIMED:
        return value
    value = changed(committing(value, FIRST, [0]))
    if phase is Phase.COMMITTING:
        return value
    results = {0: RELAYED, 1: DEFERRED if phase is Phase.OPEN else FAILED}
    return changed(settled(value, FIRST, results, REPLY))


def outcomes(value: Value) -> list[str]:
    """Of each recipient."""
    return [each.outcome for each in value.recipients]


TABLE = [
    # state, what is done, and by whom → the next state or why not, and the recipients' outcomes
    (Phase.CLAIMED, "commit 0", FIRST, Phase.COMMITTING, [COMMITTING, ""]),
    (Phase.CLAIMED, "commit 0", SECOND, Refusal.NOT_OURS, None),
    (Phase.CLAIMED, "settle", FIRST, Phase.DONE, ["relayed", "failed"]),
    (Phase.CLAIMED, "settle deferred", FIRST, Phase.OPEN, ["deferred", "deferred"]),
    (Phase.CLAIMED, "settle nothing", FIRST, Phase.OPEN, ["", ""]),
    (Phase.CLAIMED, "settle", SECOND, Refusal.NOT_OURS, None),
    (Phase.CLAIMED, "take over", SECOND, Refusal.IN_PROGRESS, None),
    (Phase.CLAIMED, "take over expired", SECOND, Phase.CLAIMED, ["", ""]),
    (Phase.COMMITTING, "commit 0", FIRST, Phase.COMMITTING, [COMMITTING, ""]),
    (Phase.COMMITTING, "commit 1", FIRST, Phase.COMMITTING, [COMMITTING, COMMITTING]),
    (Phase.COMMITTING, "commit 1", SECOND, Refusal.NOT_OURS, None),
    (Phase.COMMITTING, "settle", FIRST, Phase.DONE, ["relayed", "failed"]),
    (Phase.COMMITTING, "settle deferred", FIRST, Phase.OPEN, ["deferred", "deferred"]),
    (Phase.COMMITTING, "settle nothing", FIRST, Phase.OPEN, ["in_doubt", ""]),
    (Phase.COMMITTING, "settle", SECOND, Refusal.NOT_OURS, None),
    (Phase.COMMITTING, "take over", SECOND, Refusal.IN_PROGRESS, None),
    (Phase.COMMITTING, "take over expired", SECOND, Phase.CLAIMED, ["in_doubt", ""]),
    (Phase.OPEN, "commit 1", FIRST, Refusal.IS_DONE, None),
    (Phase.OPEN, "settle", FIRST, Refusal.IS_DONE, None),
    (Phase.OPEN, "take over", SECOND, Phase.CLAIMED, ["relayed", "deferred"]),
    (Phase.OPEN, "take over expired", SECOND, Phase.CLAIMED, ["relayed", "deferred"]),
    (Phase.DONE, "commit 0", FIRST, Refusal.IS_DONE, None),
    (Phase.DONE, "settle", FIRST, Refusal.IS_DONE, None),
    (Phase.DONE, "settle", SECOND, Refusal.NOT_OURS, None),
    (Phase.DONE, "take over", SECOND, Refusal.IS_DONE, None),
    (Phase.DONE, "take over expired", SECOND, Refusal.IS_DONE, None),
]


@pytest.mark.parametrize(
    ("phase", "what", "owner", "then", "recipients"), TABLE, ids=[f"{row[0]}-{row[1]}-{row[2].worker}" for row in TABLE]
)
def test_every_change_of_every_state(
    phase: Phase, what: str, owner: Owner, then: Phase | Refusal, recipients: list[str] | None
) -> None:
    value = in_phase(phase)
    after = {
        "commit 0": lambda: committing(value, owner, [0]),
        "commit 1": lambda: committing(value, owner, [1]),
        "settle": lambda: settled(value, owner, {0: RELAYED, 1: FAILED}, REPLY),
        "settle deferred": lambda: settled(value, owner, {0: DEFERRED, 1: DEFERRED}, REPLY),
        "settle nothing": lambda: settled(value, owner, {}, None),
        "take over": lambda: taken_over(value, owner, is_expired=False),
        "take over expired": lambda: taken_over(value, owner, is_expired=True),
    }[what]()
    if isinstance(after, Refusal):
        assert after is then
        return
    assert after.phase is then
    assert outcomes(after) == recipients
    assert after.owner == owner
    assert [each.email_id for each in after.recipients] == ["id-0", "id-1"]
    assert read_value(after.as_json()) == after


@pytest.mark.parametrize("phase", Phase)
def test_a_value_is_read_as_it_was_stored(phase: Phase) -> None:
    value = in_phase(phase)
    assert read_value(value.as_json()) == value
    assert orjson.loads(value.as_json())["state"] == phase.value


@pytest.mark.parametrize(
    "stored", [b"", b"{", b"[]", b"null", b'"done"', b"{}", b'{"state": "away"}', orjson.dumps({"state": "done"})]
)
def test_what_is_no_claim_is_not_taken_for_one(stored: bytes) -> None:
    assert read_value(stored) is None


def test_a_takeover_keeps_ids_and_what_was_sent_and_counts_attempts() -> None:
    value = changed(committing(new_claim(3), FIRST, [0]))
    value = changed(committing(value, FIRST, [1], {0: RELAYED}))
    after = changed(taken_over(value, SECOND, is_expired=True))
    assert outcomes(after) == ["relayed", "in_doubt", ""]
    assert after.unsent == (2,)
    assert after.attempt == 2
    assert after.recipients[0] == RELAYED._replace(email_id="id-0", message_id_header="<0@example.com>")
    assert after.reply is None


def test_nobody_who_was_sent_to_is_committed_again() -> None:
    value = changed(taken_over(in_phase(Phase.OPEN), SECOND, is_expired=False))
    assert committing(value, SECOND, [0]) is Refusal.IS_SENT
    assert committing(value, SECOND, [1, 0]) is Refusal.IS_SENT
    assert outcomes(changed(committing(value, SECOND, [1]))) == ["relayed", COMMITTING]


def test_whoever_was_certainly_not_sent_to_may_be_committed_again() -> None:
    value = changed(committing(new_claim(), FIRST, [0]))
    again = changed(committing(value, FIRST, [0], {0: DEFERRED}))
    assert outcomes(again) == [COMMITTING, ""]
    assert again.recipients[0].reply_code is None


@pytest.mark.parametrize("first", [RELAYED, FAILED, IN_DOUBT])
@pytest.mark.parametrize("then", [RELAYED, FAILED, IN_DOUBT, DEFERRED, Progress("")])
def test_what_was_settled_by_an_attempt_stays(first: Progress, then: Progress) -> None:
    value = changed(settled(new_claim(), FIRST, {0: first, 1: DEFERRED}, REPLY))
    value = changed(taken_over(value, SECOND, is_expired=False))
    assert outcomes(changed(settled(value, SECOND, {0: then, 1: RELAYED}, REPLY))) == [first.outcome, "relayed"]


def test_without_a_reply_nothing_is_done() -> None:
    value = changed(settled(new_claim(), FIRST, {0: RELAYED, 1: RELAYED}, None))
    assert value.phase is Phase.OPEN
    assert value.unsent == ()


def test_a_detail_is_bounded() -> None:
    value = changed(settled(new_claim(1), FIRST, {0: FAILED._replace(detail="x" * 10_000)}, REPLY))
    assert len(value.recipients[0].detail) == MAX_DETAIL_CHARACTERS


# -- what a request is told ------------------------------------------------------------------
def test_the_same_request_gets_the_same_reply() -> None:
    answer = answer_from(in_phase(Phase.DONE), "fingerprint")
    assert isinstance(answer, Settled)
    assert orjson.loads(answer.reply) == {**orjson.loads(REPLY), "duplicate": True}
    assert answer.reply.startswith(REPLY[:-1]), "and in the same order"


def test_another_request_is_refused() -> None:
    assert answer_from(in_phase(Phase.DONE), "another") == Refused(Reason.PAYLOAD_DIFFERS)
    assert answer_from(in_phase(Phase.CLAIMED), "another") == Refused(Reason.PAYLOAD_DIFFERS)
    assert answer_from(in_phase(Phase.CLAIMED), "fingerprint") == Refused(Reason.IN_PROGRESS)


def test_reasons_are_the_callers_words() -> None:
    assert Reason.PAYLOAD_DIFFERS == "request_id already used with a different payload"
    assert Reason.IN_PROGRESS == "in progress"
    assert Reason.UNAVAILABLE == "deduplication unavailable"
    assert [reason for reason in Reason if not reason.retryable] == [Reason.PAYLOAD_DIFFERS]


# -- what a claim is known by ----------------------------------------------------------------
def test_keys_are_plain_and_tell_scopes_apart() -> None:
    keys = {claim_key(scope, "1") for scope in ("", "a", "b", "1")} | {claim_key("", "a1"), claim_key("a", "")}
    assert len(keys) == 6
    for key in keys:
        assert len(key) == 43
        assert key.replace("-", "").replace("_", "").isalnum()
    assert claim_key("a", "1") == claim_key("a", "1")


class Pair(NamedTuple):
    """As requests are."""

    one: object
    two: object


def test_equal_values_have_one_fingerprint() -> None:
    same: list[tuple[object, object]] = [
        (Pair("a", ("b",)), ("a", ["b"])),
        (b"abc", bytearray(b"abc")),
        (b"abc", memoryview(b"xabc")[1:]),
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
    ]
    for one, other in same:
        assert fingerprint_of(one) == fingerprint_of(other)
    with pytest.raises(TypeError):
        fingerprint_of(object())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_other_values_have_another_fingerprint(one: object, other: object) -> None:
    assert (fingerprint_of(one) == fingerprint_of(other)) == (repr(_sorted(one)) == repr(_sorted(other)))


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return tuple(_sorted(each) for each in value) if isinstance(value, tuple) else value
