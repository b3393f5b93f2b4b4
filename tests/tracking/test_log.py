"""The log and the storage against a real nats-server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream, Stored
from relay.tracking.groups import group_token
from relay.tracking.log import Fact, Log, fact_publication
from relay.tracking.storage import NO_JETSTREAM, StorageConfig, ensure_storage
from tests.support.nats_server import NatsServer

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
