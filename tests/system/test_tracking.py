"""Tracking by a whole relay under stress: the drills ``tracking-…`` with less load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.drills.frame import Findings
from scripts.drills.sink import RunningSink
from scripts.drills.tracking import (
    ACK_SECONDS,
    PATIENT_ACK_SECONDS,
    Kept,
    Killing,
    Load,
    analytics,
    judge_counts,
    judge_frozen,
    judge_kills,
    read_kept,
    repair,
    send_and_fold,
)
from tests.conftest import require
from tests.support.nats_cluster import NatsCluster
from tests.support.nats_server import BINARY, NatsServer
from tests.support.relay_process import RelayProcess

MAILS = 600


@pytest.fixture
def sink() -> Iterator[RunningSink]:
    """An SMTP server that takes everything and knows what it took."""
    with RunningSink.started() as running:
        yield running


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    """A cluster of which one server holds the streams."""
    require(BINARY.exists(), "nats-server")
    made = NatsCluster(tmp_path)
    try:
        yield made.start()
    finally:
        made.stop()


def hold(findings: Findings) -> None:
    """Fails with what does not hold."""
    assert findings.is_good, [check for check in findings.checks if not check.holds]


@pytest.mark.parametrize("seed", [1, 2])
def test_everybody_writes_at_once_and_every_count_is_exact(
    new_relay: Callable[..., RelayProcess],
    new_nats_server: Callable[..., NatsServer],
    sink: RunningSink,
    seed: int,
) -> None:
    # Given four send workers, and two processes that fold events into what is being sent
    relay = new_relay(
        nats_url=new_nats_server().url,
        smtp_port=sink.port,
        RELAY_SEND_WORKERS="4",
        TRACKING_ACK_SECONDS=PATIENT_ACK_SECONDS,
    )
    relay.start()
    # When all write to one group
    load, folded = asyncio.run(send_and_fold(relay, "crowd", MAILS, seed))
    # Then nothing is lost and nothing counted twice
    assert [folder.problem for folder in folded] == ["", ""]
    email_ids = [answer.email_id for answer in load.answers if answer.email_id]
    assert len(email_ids) == MAILS
    findings = Findings()
    judge_counts(findings, read_kept(relay.nats_url)["crowd"], analytics(relay, "crowd"), email_ids, seed)
    hold(findings)


def test_killed_workers_cost_no_more_than_what_was_in_flight(
    new_relay: Callable[..., RelayProcess], new_nats_server: Callable[..., NatsServer], sink: RunningSink
) -> None:
    # Given a relay under load
    relay = new_relay(nats_url=new_nats_server().url, smtp_port=sink.port, TRACKING_ACK_SECONDS=PATIENT_ACK_SECONDS)
    relay.start()
    load = Load("killed", reply_seconds=3.0)
    killing = Killing(relay, ("send-1", "send-2"), seed=1)
    # When its workers are killed at moments of chance
    asyncio.run(load.run(relay.nats_url, 20, lambda: killing.for_seconds(4.0)))
    assert killing.kills >= 2
    kept = read_kept(relay.nats_url)["killed"]
    # Then only what was in flight may be missing, and a repair makes whatever left a trace count
    assert repair(relay, "killed") == ""
    traces = kept.facts["sent"].keys() | kept.records.keys()
    assert read_kept(relay.nats_url)["killed"].facts["sent"].keys() == traces
    assert analytics(relay, "killed")["total_sent"] == len(traces)
    findings = Findings()
    judge_kills(findings, load.answers, sink.stop(), kept)
    hold(findings)


def test_mail_goes_on_while_jetstream_hangs(
    new_relay: Callable[..., RelayProcess], cluster: NatsCluster, sink: RunningSink
) -> None:
    relay = new_relay(nats_url=cluster.url, smtp_port=sink.port, TRACKING_ACK_SECONDS=str(ACK_SECONDS))
    relay.start()
    findings = Findings()
    judge_frozen(findings, cluster, relay, quiet_seconds=1.5, frozen_seconds=4.0)
    hold(findings)
    assert set(sink.stop().values()) == {1}


def test_the_judges_see_what_is_wrong() -> None:
    """They would be of no use if they were content with anything."""
    findings = Findings()
    judge_counts(findings, Kept({}, {}), {"total_sent": 1, "opened": 0, "unique_opened": 0}, ["a", "b"], seed=1)
    assert [check.holds for check in findings.checks] == [False] * len(findings.checks)
