"""The log as it is read: whose a fact is, and where in the log a moment is."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import gevent
import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.tracking.facts import Fact
from relay.tracking.feed import LoggedFact, facts, logged_fact, sequence_at, subject_filter
from relay.tracking.groups import SHARED_TOKEN
from relay.tracking.log import fact_publication
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import SENT_AT, store
from tests.support.nats_server import NatsServer


@pytest.fixture
def own(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> JetStream:
    """A log of the test's own."""
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return jetstream


def test_facts_of_mails_without_a_group() -> None:
    assert LoggedFact(1, SHARED_TOKEN, "sent", "id", "", "").group_id == ""


@pytest.mark.parametrize("payload", [b"", b"null", b"[]", b"{", b'{"email_id":7,"at":null}', b"\xff"])
def test_what_anyone_may_have_published(own: JetStream, payload: bytes) -> None:
    store(own, [Publication(f"{contract.LOG_PREFIX}.g.strange", payload)])
    ((found,),) = list(facts(own, subject_filter(), 1, 10))
    assert found == LoggedFact(1, "g", "strange", "", "", "")


def test_facts_between_two_places(own: JetStream) -> None:
    email_ids = [str(uuid.uuid4()) for _ in range(2500)]
    store(own, [fact_publication("g", Fact.SENT, email_id, SENT_AT) for email_id in email_ids])
    found = [each for page in facts(own, subject_filter("g"), 100, 2100) for each in page]
    assert [each.email_id for each in found] == email_ids[99:2100]
    assert [each.sequence for each in found] == list(range(100, 2101))
    assert list(facts(own, subject_filter("other"), 1, 2500)) == []


@pytest.mark.parametrize("allow_direct", [True, False])
def test_a_moment_has_a_place_also_among_holes(own: JetStream, allow_direct: bool) -> None:
    config = dict(own.stream_info(contract.LOG_STREAM).config) | {"allow_direct": allow_direct}
    own.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    assert sequence_at(own, time.time()) == 1, "nothing yet: behind the end"
    moments = []
    for number in range(4):
        moments.append(time.time())
        store(own, [fact_publication("g", Fact.SENT, f"{number}-{each}", SENT_AT) for each in range(5)])
        gevent.sleep(0.01)  # the server's clock and ours are the same one
    holes = {1, 2, 6, 7, 8, 13, 20}
    for sequence in holes:
        own.delete_msg(contract.LOG_STREAM, sequence)
    left = sorted(set(range(1, 21)) - holes)
    for moment, first in [(0.0, 1), *zip(moments, (1, 6, 11, 16), strict=True), (time.time(), 21)]:
        place = sequence_at(own, moment)
        assert [each for each in left if each >= place] == [each for each in left if each >= first]


def test_a_message_that_came_by_following(own: JetStream) -> None:
    with own.follow(contract.LOG_STREAM, subject_filter("g"), from_sequence=1) as follower:
        store(own, [fact_publication("g", Fact.OPEN, "id-1", SENT_AT, "event-1")])
        assert logged_fact(next(follower)) == LoggedFact(1, "g", "open", "id-1", SENT_AT, "event-1")
