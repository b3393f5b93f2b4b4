"""The log and the storage against a real nats-server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.tracking.facts import Fact, facts_of
from relay.tracking.groups import group_token
from relay.tracking.log import Log, fact_publication
from relay.tracking.storage import NO_JETSTREAM, StorageConfig, ensure_storage
from tests.support.nats_server import NatsServer
from tests.support.scripted_jetstream import LaggingStream, Message

AT = "2025-01-15T10:30:00.000Z"


@pytest.fixture
def log(jetstream: JetStream) -> Log:
    """The log on the shared server."""
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return Log(jetstream)


def state(jetstream: JetStream, token: str, facts: list[tuple[Fact, str, str]]) -> None:
    """Publishes facts: (fact, email_id, event_id)."""
    publications = [fact_publication(token, fact, email_id, AT, event_id) for fact, email_id, event_id in facts]
    assert all(isinstance(answer, Stored) for answer in jetstream.store(publications, 10))


def test_counts_are_per_fact_and_group(jetstream: JetStream, log: Log) -> None:
    state(
        jetstream,
        "counts-1",
        [(Fact.SENT, "a", ""), (Fact.SENT, "b", ""), (Fact.OPEN, "a", "e1"), (Fact.OPEN, "a", "e2")],
    )
    state(jetstream, "counts-2", [(Fact.SENT, "c", "")])
    assert log.counts("counts-1") == {"sent": 2, "open": 2}
    assert log.counts("counts-2") == {"sent": 1}
    assert log.counts("counts-3") == {}


def test_a_fact_stated_twice_counts_once(jetstream: JetStream, log: Log) -> None:
    for _ in range(2):
        state(jetstream, "twice", [(Fact.SENT, "twice-a", ""), (Fact.OPEN, "twice-a", "e1")])
    assert log.counts("twice") == {"sent": 1, "open": 1}


@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 2300])
def test_paging_gives_every_mail_once_in_order(jetstream: JetStream, log: Log, count: int) -> None:
    token = f"page-{count}"
    sent = [f"{token}-{number}" for number in range(count)]
    state(jetstream, token, [(Fact.SENT, email_id, "") for email_id in sent])
    state(jetstream, f"{token}-other", [(Fact.SENT, f"{token}-other", "")])
    pages = list(log.email_ids(token))
    assert [email_id for page in pages for email_id in page] == sent
    assert max(len(page) for page in pages) <= 1000


@pytest.mark.parametrize("group_id", ["*", ">", "a.*", "*.sent", "a b", "", "🚀", "-", "=", "x" * 10_000])
def test_any_group_id_is_found_again_and_no_other(jetstream: JetStream, log: Log, group_id: str) -> None:
    token = group_token(group_id)
    before = log.counts(token).get("sent", 0)
    state(jetstream, token, [(Fact.SENT, f"any-{uuid.uuid4()}", "")])
    state(jetstream, "any-other-group", [(Fact.SENT, f"other-{uuid.uuid4()}", "")])
    assert log.counts(token) == {"sent": before + 1}


NASTY = ["🚀🚀", "a.b.c", "a.b", "a.>", "a*", "=a", "==a", "-a", " ", "  ", "\t", "x", "x" * 129, "x" * 9_999, "\ufffd"]


def test_many_nasty_ids_are_kept_apart(jetstream: JetStream, log: Log) -> None:
    """Each group is counted and paged by itself, however its id looks beside the others'."""
    mails = {group_id: [f"nasty-{uuid.uuid4()}" for _ in range(1 + place)] for place, group_id in enumerate(NASTY)}
    before = {group_id: log.counts(group_token(group_id)).get("sent", 0) for group_id in NASTY}
    for group_id, email_ids in mails.items():
        state(jetstream, group_token(group_id), [(Fact.SENT, email_id, "") for email_id in email_ids])
    for group_id, email_ids in mails.items():
        token = group_token(group_id)
        assert log.counts(token) == {"sent": before[group_id] + len(email_ids)}
        assert [each for page in log.email_ids(token) for each in page][before[group_id] :] == email_ids


def test_times_of_a_group(jetstream: JetStream, log: Log) -> None:
    assert (log.first_sent_at("times"), log.last_event_at("times")) == ("", "")
    stated = [
        (Fact.SENT, "times-a", "2025-01-15T10:30:00.000Z"),
        (Fact.SENT, "times-b", "2025-01-15T10:31:00.000Z"),
        (Fact.OPEN, "times-a", "2025-01-15T12:00:00Z"),
        (Fact.DELIVERED, "times-b", "2025-01-15T10:31:02.123456789Z"),
    ]
    publications = [fact_publication("times", fact, email_id, at) for fact, email_id, at in stated]
    assert all(isinstance(answer, Stored) for answer in jetstream.store(publications[:2], 10))
    assert (log.first_sent_at("times"), log.last_event_at("times")) == ("2025-01-15T10:30:00.000Z", "")
    assert all(isinstance(answer, Stored) for answer in jetstream.store(publications[2:], 10))
    assert log.last_event_at("times") == "2025-01-15T12:00:00Z", "the latest, not the one logged last"


@pytest.mark.parametrize("limit", [2, 3, 5, 100])
@pytest.mark.parametrize("follower_has", [0, 3, 7])
def test_a_page_from_a_replica_that_lags_is_complete(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], follower_has: int, limit: int
) -> None:
    # Given seven mails, of which the follower that answers knows only some
    bus = new_bus(new_nats_server(jetstream=False).url)
    facts = [fact_publication("g", Fact.SENT, f"id-{number}", AT) for number in range(7)]
    messages = [Message(fact.nats_subject, fact.payload) for fact in facts]
    stream = LaggingStream(bus, contract.LOG_STREAM, messages, follower_has)
    log = Log(JetStream(bus))
    # When the group is paged through
    found: list[str] = []
    sequence: int | None = 1
    while sequence is not None:
        page = log.page("g", sequence, limit)
        assert 0 < len(page.sent) <= limit
        found += page.email_ids
        sequence = page.next_sequence
    # Then each mail is there once, and the leader was asked
    assert found == [f"id-{number}" for number in range(7)]
    assert stream.asked_leader


@pytest.mark.parametrize(
    ("record", "counts"),
    [
        ({}, {}),
        ({"delivered": True, "failed": False, "opened": False, "open_count": 0}, {"delivered": 1}),
        ({"opened": True, "open_count": 3}, {"opened": 1, "open": 3}),
        ({"open_count": 2}, {"opened": 1, "open": 2}),
        ({"opened": True, "opened_at_list": [{}, {}]}, {"opened": 1, "open": 2}),
        ({"opened": True}, {"opened": 1}),
        ({"failed": True, "bounced_at": AT}, {"failed": 1, "bounced": 1}),
        ({"click_count": 2, "last_clicked_at": AT}, {"click": 2, "clicked": 1}),
        ({"open_count": "many", "click_count": -1}, {}),
        ({"click_count": 2**64 - 1}, {"clicked": 1, "click": 2**32}),
    ],
    ids=str,
)
def test_what_a_record_says_in_facts(record: dict[str, object], counts: dict[str, int]) -> None:
    assert {fact: count for fact, count in facts_of(record).items() if count} == counts


def test_storage_is_made_once_and_used_as_it_is(jetstream: JetStream, log: Log) -> None:
    del log
    assert ensure_storage(jetstream, StorageConfig(ttl_days=7)) == ""
    config = jetstream.api(f"STREAM.INFO.{contract.LOG_STREAM}")["config"]
    assert config["max_age"] == 0, "what exists keeps its limits"
    assert config["allow_direct"]
    assert config["storage"] == "file"


def test_records_outlive_facts(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig(ttl_days=7, storage="memory")) == ""
    log_age = jetstream.api(f"STREAM.INFO.{contract.LOG_STREAM}")["config"]["max_age"]
    record_age = jetstream.api(f"STREAM.INFO.KV_{contract.RECIPIENTS_BUCKET}")["config"]["max_age"]
    assert log_age == 7 * 86_400 * 10**9
    assert record_age > log_age


def test_without_jetstream_it_says_what_to_do(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    jetstream = JetStream(new_bus(new_nats_server(jetstream=False).url))
    assert ensure_storage(jetstream, StorageConfig()) == NO_JETSTREAM


def test_facts_are_published_where_the_contract_says() -> None:
    publication = fact_publication("group", Fact.OPEN, "id-1", AT, "event-1")
    assert publication == Publication(
        "lfx.email-service.log.group.open",
        b'{"email_id":"id-1","at":"2025-01-15T10:30:00.000Z","event_id":"event-1"}',
        {"Nats-Msg-Id": "id-1.open.event-1"},
    )
