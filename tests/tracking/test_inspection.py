"""What an existing bucket or log lacks: provoked on a real server, and gone when it is changed as told."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.idempotency.claims import Claims, ClaimsConfig
from relay.tracking.inspection import FACTS, RECORDS, REQUESTS, Condition, covers, duration, inspect
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.conftest import require
from tests.support.groups import make_index_bucket, send_mails
from tests.support.nats_server import BINARY, NatsServer

SECOND = 10**9
DAY = 86_400 * SECOND


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server whose streams these tests may unmake."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def own(own_server: NatsServer, new_bus: Callable[[str], Bus]) -> Iterator[JetStream]:
    """JetStream with freshly made streams."""
    jetstream = JetStream(new_bus(own_server.url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    claims = Claims(jetstream, ClaimsConfig(), "test")
    claims.start()
    assert claims.off_reason == ""
    yield jetstream
    for name in jetstream.api("STREAM.NAMES").get("streams") or []:
        jetstream.api(f"STREAM.DELETE.{name}")


def remake(jetstream: JetStream, stream: str, changed: dict[str, Any]) -> None:
    """Makes a stream anew with another configuration."""
    config = {**jetstream.stream_info(stream).config, **changed}
    config.pop("metadata")
    jetstream.api(f"STREAM.DELETE.{stream}")
    jetstream.api(f"STREAM.CREATE.{stream}", {name: value for name, value in config.items() if value is not None})


def said(condition: Condition) -> list[tuple[str, bool]]:
    """Which stream is said to lack something, and whether it loses data."""
    return [(remark.store, remark.loses) for remark in condition.remarks]


CASES = [
    (RECORDS, {"allow_direct": False}, False, "read one by one"),
    (FACTS, {"allow_direct": False}, False, "read one by one"),
    (RECORDS, {"max_msg_size": 65_536}, False, "very long group id"),
    (RECORDS, {"max_msg_size": 4096}, True, "takes records of 4,096 bytes"),
    (FACTS, {"max_msg_size": 512}, True, "takes facts of 512 bytes"),
    (RECORDS, {"max_bytes": 10_000_000}, False, "no mail is tracked any more"),
    (RECORDS, {"max_bytes": 3_000}, True, "full"),
    (FACTS, {"max_msgs": 10}, True, "100% full; when it is, the oldest go"),
    (RECORDS, {"max_msgs_per_subject": 5}, False, "keeps old values"),
    (RECORDS, {"max_msgs_per_subject": 5, "discard_new_per_subject": True}, True, "refuses every change of a record"),
    (FACTS, {"max_msgs_per_subject": 100}, True, "counts end there"),
    (FACTS, {"duplicate_window": 60 * SECOND}, True, "knows a repeated fact for 1m only"),
    (RECORDS, {"max_age": 30 * DAY}, True, "drops records after 30d"),
    (FACTS, {"no_ack": True}, True, "nothing is tracked"),
    (FACTS, {"retention": "interest"}, True, "without one"),
    (FACTS, {"retention": "workqueue"}, True, "work queue"),
    (FACTS, {"storage": "memory"}, True, "kept in memory"),
    (FACTS, {"deny_delete": True}, False, "forbids deletion"),
    (FACTS, {"subjects": [f"{contract.LOG_PREFIX}.*.sent"]}, True, "does not take all of"),
    (REQUESTS, {"storage": "memory"}, True, "request ids are forgotten"),
    (REQUESTS, {"max_bytes": 1_000_000, "discard": "old"}, True, "forgets the oldest request ids"),
    (REQUESTS, {"max_msg_size": 1024}, False, "takes claims of 1,024 bytes"),
]


@pytest.mark.parametrize(("stream", "changed", "loses", "text"), CASES, ids=lambda case: str(case)[:60])
def test_what_a_stream_lacks(own: JetStream, stream: str, changed: dict[str, Any], loses: bool, text: str) -> None:
    remake(own, stream, changed)
    if not {"subjects", "no_ack", "retention"} & set(changed):
        wanted = 10 if "max_msgs" in changed or "max_bytes" in changed else 1
        send_some(own, wanted)
    condition = inspect(own, StorageConfig())
    (name,) = {store.name for store in condition.stores if store.stream == stream}
    assert (name, loses) in said(condition), condition.remarks
    (remark,) = [each for each in condition.remarks if text in each.text]
    assert (remark.store, remark.loses) == (name, loses)
    assert condition.loses == any(each.loses for each in condition.remarks)
    assert len(remark.text) < 160
    # And when it is changed as told, it is not said any more
    if remark.command:
        edit(own, remark.command)
        assert not [each for each in inspect(own, StorageConfig()).remarks if text in each.text]


def send_some(jetstream: JetStream, count: int) -> None:
    """Some mails, as many as the limits take."""
    for _ in range(count):
        try:
            send_mails(jetstream, "limits", 1)
        except AssertionError:
            return


FLAGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "--allow-direct": lambda _: {"allow_direct": True},
    "--ack": lambda _: {"no_ack": False},
    "--no-discard-per-subject": lambda _: {"discard_new_per_subject": False},
    "--max-bytes": lambda value: {"max_bytes": int(value)},
    "--max-msgs": lambda value: {"max_msgs": int(value)},
    "--max-msg-size": lambda value: {"max_msg_size": int(value)},
    "--max-msgs-per-subject": lambda value: {"max_msgs_per_subject": int(value)},
    "--dupe-window": lambda value: {"duplicate_window": int(value.removesuffix("m")) * 60 * SECOND},
    "--max-age": lambda value: {"max_age": int(value[:-1]) * (DAY if value.endswith("d") else SECOND)},
    "--retention": lambda value: {"retention": value},
    "--subjects": lambda value: {"subjects": [value]},
    "--discard": lambda value: {"discard": value},
}
"""What ``nats stream edit`` makes of its flags: natscli, ``copyAndEditStream``."""


def edit(jetstream: JetStream, command: str) -> None:
    """Does what the command would do."""
    nats, stream_word, edit_word, stream, *flags, force = shlex.split(command)
    assert (nats, stream_word, edit_word, force) == ("nats", "stream", "edit", "--force")
    config = dict(jetstream.stream_info(stream).config)
    for flag in flags:
        name, _, value = flag.partition("=")
        config |= FLAGS[name](value)
    jetstream.api(f"STREAM.UPDATE.{stream}", config)


def test_what_relay_makes_lacks_nothing(own: JetStream) -> None:
    send_mails(own, "fine", 3)
    condition = inspect(own, StorageConfig())
    assert condition.remarks == []
    records, facts, index, requests, parked = condition.stores
    assert (records.messages, facts.messages) == (3, 3)
    assert records.made_by.startswith("Relay ")
    assert requests.ttl_seconds == 24 * 3600
    assert (index.config, parked.config) == (None, None)


def test_what_is_missing_is_no_loss(own: JetStream) -> None:
    own.api(f"STREAM.DELETE.{RECORDS}")
    condition = inspect(own, StorageConfig())
    assert said(condition) == [(contract.RECIPIENTS_BUCKET, False)]
    assert not condition.loses


def test_lfx_charts_buckets_are_recognised(own: JetStream) -> None:
    make_index_bucket(own)
    remake(own, RECORDS, {"max_msg_size": 65_536, "allow_direct": False})
    condition = inspect(own, StorageConfig())
    assert [store.made_by for store in condition.stores[:3]][::2] == ["lfx's chart, it seems"] * 2
    assert not condition.loses


def test_too_few_replicas_and_memory_that_was_asked_for(own: JetStream) -> None:
    remake(own, FACTS, {"storage": "memory"})
    condition = inspect(own, StorageConfig(replicas=3, storage="memory"))
    assert said(condition) == [
        (contract.RECIPIENTS_BUCKET, False),
        (contract.LOG_STREAM, False),
        (contract.REQUESTS_BUCKET, False),
    ]
    assert condition.remarks[0].command == f"nats stream edit {RECORDS} --replicas=3 --force"


@pytest.mark.parametrize(
    ("log_days", "record_days", "loses"), [(0, 0, False), (7, 8, False), (7, 7, False), (8, 7, True), (0, 7, True)]
)
def test_records_must_outlive_facts(own: JetStream, log_days: int, record_days: int, loses: bool) -> None:
    remake(own, FACTS, {"max_age": log_days * DAY})
    remake(own, RECORDS, {"max_age": record_days * DAY})
    assert inspect(own, StorageConfig()).loses == loses


@pytest.mark.parametrize(
    ("pattern", "wanted", "does"),
    [
        ("a.>", "a.*.*", True),
        (">", "a.*.*", True),
        ("a.*.*", "a.*.*", True),
        ("a.*.b", "a.*.*", False),
        ("a.*", "a.*.*", False),
        ("a.*.*", "a.>", False),
        ("a.b.>", "a.>", False),
        ("a.>", "a.>", True),
        ("b.>", "a.>", False),
        ("a.*.*.*", "a.*.*", False),
        ("a.*.>", "a.*.*", True),
    ],
)
def test_one_pattern_covers_another(pattern: str, wanted: str, does: bool) -> None:
    assert covers(pattern, wanted) == does


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (90, "90s"), (120, "2m"), (7200, "2h"), (86_400, "1d"), (129_600, "36h")]
)
def test_durations(seconds: int, text: str) -> None:
    assert duration(seconds) == text
