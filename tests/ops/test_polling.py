"""The pollers, between a queue that fails as it is told to and a real nats-server.

This process is not patched by gevent: a call to SQS stops everything else for the milliseconds that it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import gevent
import pytest
from gevent.event import Event

from relay.aws.sqs import Queue, QueueConfig
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.engagement import Engagement, EngagementConfig
from relay.errors import ConfigError
from relay.ops import polling
from relay.ops.polling import PARK_AFTER_RECEIVES, Polling, PollingConfig, prepare
from relay.tracking.batch import Notification, Verdict
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.moto_server import REGION, aws_environment
from tests.support.nats_server import NatsServer
from tests.support.sqs_double import HANG_UP, Held, SqsDouble

FOREIGN = json.dumps({"eventType": "Open", "mail": {"messageId": "0100"}, "open": {}})
"""An event of a mail that is not ours: done at once, without NATS."""
GARBAGE = "no event at all"
"""Parked: NATS has to take it before it is done."""
POISON = "what no version of ours can handle"


def early() -> str:
    """An event of a mail, sent just now, whose record has yet to come."""
    now = datetime.now(UTC).isoformat()
    header = {"name": "X-LFX-TRACKING-ID", "value": "g/early-mail"}
    mail = {"messageId": "0101", "timestamp": now, "headers": [header]}
    return json.dumps({"eventType": "Open", "mail": mail, "open": {"timestamp": now}})


class Poisonable(Engagement):
    """The real one, but for a bug: whatever holds poison raises. May be made to wait, too."""

    def __init__(self, jetstream: JetStream) -> None:
        super().__init__(jetstream, EngagementConfig())
        self.handling = Event()
        self.may_go_on = Event()
        self.may_go_on.set()
        self.bodies: list[str] = []

    def handle(self, notifications: Sequence[Notification], timeout_seconds: float) -> list[Verdict]:
        self.handling.set()
        self.may_go_on.wait(10)
        if any(each.body.startswith(POISON) for each in notifications):
            raise KeyError("a bug of user@example.com")
        self.bodies += [each.body for each in notifications]
        return super().handle(notifications, timeout_seconds)


class Bench:
    """Pollers at work, and what they told."""

    def __init__(self, double: SqsDouble, engagement: Poisonable, config: PollingConfig) -> None:
        self.engagement = engagement
        self.said: list[tuple[str, str]] = []
        self.failed: list[str] = []
        queue = Queue(QueueConfig(double.queue_url, REGION, config.pollers, wait_seconds=0))
        self.polling = Polling(
            queue, engagement, config, lambda what, why: self.said.append((what, why)), self.failed.append
        )

    def start(self) -> None:
        """Looks, and polls."""
        self.polling.look()
        self.polling.start()


Make = Callable[..., Bench]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[SqsDouble]:
    """The queue."""
    server = SqsDouble().start()
    for name, value in aws_environment(server.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is tested for its end, not for its length."""
    monkeypatch.setattr(polling, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(polling, "LONGEST_PAUSE_SECONDS", 0.1)


@pytest.fixture
def new_bench(double: SqsDouble, new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> Make:
    """Makes pollers that work on the double, with storage that is ready."""
    made: list[Bench] = []

    def make(*, server: NatsServer | None = None, pollers: int = 1, receive_failures: int = 3) -> Bench:
        jetstream = JetStream(new_bus((server or new_nats_server()).url))
        assert ensure_storage(jetstream, StorageConfig()) == ""
        engagement = Poisonable(jetstream)
        engagement.prepare()
        bench = Bench(double, engagement, PollingConfig(pollers, receive_failures))
        made.append(bench)
        return bench

    yield make  # type: ignore[misc]
    for bench in made:
        bench.polling.stop_taking(1)
        bench.polling.finish(1)


def until(is_so: Callable[[], object], timeout_seconds: float = 10.0) -> None:
    """Lets the greenlets work until it is so."""
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline, "in vain"
        gevent.sleep(0.005)


def parked(bench: Bench) -> int:
    """How many notifications are parked."""
    return bench.engagement.counts["parked"]


def test_what_is_done_is_deleted_and_the_rest_comes_again_when_it_says(double: SqsDouble, new_bench: Make) -> None:
    event = early()
    double.add(*[FOREIGN] * 14, event, GARBAGE)
    bench = new_bench(pollers=2)
    bench.start()
    until(lambda: [each.body for each in double.left] == [event])
    hidden = [
        entry["VisibilityTimeout"]
        for each in double.calls_of("ChangeMessageVisibilityBatch")
        for entry in each["Entries"]
    ]
    assert hidden == [2]
    assert bench.polling.counts["deleted"] == 15
    assert (bench.polling.counts["left"], parked(bench)) == (1, 1)
    assert (bench.failed, bench.polling.problem, bench.polling.in_hand) == ([], "", 0)


def test_a_batch_waits_for_nats_hidden_from_others(
    double: SqsDouble, new_bench: Make, new_nats_server: Callable[..., NatsServer]
) -> None:
    # Given NATS that goes away
    double.visibility_seconds = 2
    server = new_nats_server()
    bench = new_bench(server=server)
    bench.start()
    server.stop()
    # When there is something to store
    double.add(GARBAGE)
    until(lambda: bench.polling.in_hand == 1)
    receives = double.counts["ReceiveMessage"]
    held_at = time.monotonic()
    until(lambda: double.counts["ChangeMessageVisibilityBatch"] >= 1)
    # Then it is extended well before anybody else could have it
    assert time.monotonic() - held_at < 1.5
    until(lambda: double.counts["ChangeMessageVisibilityBatch"] >= 4)
    assert double.counts["ReceiveMessage"] == receives, "nothing else is received meanwhile"
    assert bench.said[-1][0] == "storage"
    assert bench.polling.problem.startswith("events wait for JetStream: ")
    # And handled once NATS is back
    server.start()
    until(lambda: not double.left)
    assert (bench.polling.problem, bench.said[-1], parked(bench)) == ("", ("storage", ""), 1)
    assert bench.engagement.bodies[-1] == GARBAGE
    assert double.counts["received"] == 1, "it was never seen by another"


def test_sqs_lets_nobody_keep_a_message_for_ever(
    double: SqsDouble, new_bench: Make, new_nats_server: Callable[..., NatsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "LONGEST_VISIBILITY_SECONDS", 3)
    double.visibility_seconds = 2
    server = new_nats_server()
    bench = new_bench(server=server)
    bench.start()
    server.stop()
    double.add(GARBAGE)
    until(lambda: double.counts["received"] == 2)
    server.start()
    until(lambda: not double.left)
    assert parked(bench) == 1


def test_nats_away_at_the_end_gives_the_batch_back(
    double: SqsDouble, new_bench: Make, new_nats_server: Callable[..., NatsServer]
) -> None:
    server = new_nats_server()
    bench = new_bench(server=server)
    bench.start()
    server.stop()
    double.add(GARBAGE)
    until(lambda: bench.polling.problem)
    bench.polling.stop_taking(1)
    begun = time.monotonic()
    bench.polling.finish(10)
    assert time.monotonic() - begun < 5
    (held,) = double.left
    assert held.visible_at <= time.monotonic(), "another may have it at once"


def test_what_is_being_handled_is_finished_at_the_end(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench(pollers=2)
    bench.engagement.may_go_on.clear()
    bench.start()
    double.add(FOREIGN)
    assert bench.engagement.handling.wait(10)
    bench.polling.stop_taking(1)
    assert bench.polling.in_hand == 1
    bench.engagement.may_go_on.set()
    bench.polling.finish(10)
    assert double.left == []
    receives = double.counts["ReceiveMessage"]
    gevent.sleep(0.05)
    assert double.counts["ReceiveMessage"] == receives


def test_what_hangs_at_the_end_is_cut(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    bench.engagement.may_go_on.clear()
    bench.start()
    double.add(FOREIGN)
    assert bench.engagement.handling.wait(10)
    bench.polling.stop_taking(1)
    begun = time.monotonic()
    bench.polling.finish(0.2)
    assert time.monotonic() - begun < 2
    assert len(double.left) == 1, "it comes again"
    assert bench.failed == []


# -- receiving fails ------------------------------------------------------------------------
def test_failures_in_a_row_end_the_process(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    double.failures = [("ReceiveMessage", 500, "InternalError")] * 10
    bench.start()
    until(lambda: bench.failed)
    assert len(bench.failed) == 1
    assert bench.failed[0].startswith("events could not be received 3 times in a row; the last time: SQS: Receive")
    assert len(double.failures) == 7
    assert bench.said[-1] == ("sqs", bench.polling.problem)


def test_a_success_between_failures_starts_the_count_again(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    bench.start()
    for _ in range(3):
        double.failures = [("ReceiveMessage", HANG_UP, "")] * 2
        until(lambda: not double.failures)
        until(lambda: not bench.polling.problem)
    assert bench.failed == []
    assert bench.polling.counts["receive_failures"] == 6
    assert "sqs" in dict(bench.said)


def test_an_outage_that_several_pollers_see_is_one(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench(pollers=4, receive_failures=4)
    bench.start()
    until(lambda: double.counts["ReceiveMessage"] > 8)
    double.stop()
    until(lambda: bench.failed)
    assert bench.polling.counts["receive_failures"] == 4
    assert len(bench.failed) == 1


def test_it_may_go_on_for_ever(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench(receive_failures=0)
    double.failures = [("ReceiveMessage", 503, "ServiceUnavailable")] * 8
    bench.start()
    double.add(FOREIGN)
    until(lambda: not double.left)
    assert (bench.failed, bench.polling.problem) == ([], "")


def test_the_first_look_is_tried_again_too(double: SqsDouble, new_bench: Make) -> None:
    double.visibility_seconds = 40
    double.failures = [("GetQueueAttributes", 500, "InternalError")] * 2
    bench = new_bench()
    bench.polling.look()
    assert (bench.failed, bench.polling.problem) == ([], "")
    double.failures = [("GetQueueAttributes", 500, "InternalError")] * 3
    bench.polling.look()
    assert len(bench.failed) == 1


def test_a_queue_that_may_not_be_used_is_told_at_once(double: SqsDouble, new_bench: Make) -> None:
    double.denied = {"GetQueueAttributes"}
    with pytest.raises(ConfigError, match="may not be used"):
        new_bench().polling.look()


# -- deleting fails -------------------------------------------------------------------------
def test_what_could_not_be_deleted_is_received_again(double: SqsDouble, new_bench: Make) -> None:
    double.visibility_seconds = 1
    double.failures = [("DeleteMessageBatch", 500, "InternalError")]
    bench = new_bench()
    bench.start()
    double.add(GARBAGE)
    until(lambda: not double.left)
    assert bench.polling.counts["undeleted"] == 1
    assert bench.polling.counts["deleted"] == 1
    assert bench.polling.last_error.endswith("DeleteMessageBatch: InternalError: as the test wants it")


# -- a bug of ours --------------------------------------------------------------------------
def bodies(held: Sequence[Held]) -> list[str]:
    """What the messages say."""
    return [each.body for each in held]


def test_a_message_that_raises_costs_the_others_nothing(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    double.add(*[FOREIGN] * 4, POISON, *[FOREIGN] * 5)
    bench.start()
    until(lambda: bodies(double.left) == [POISON])
    assert bench.polling.counts["broken"] == 1
    assert double.left[0].visible_at > time.monotonic() + 5, "left for the queue's own visibility timeout"
    assert bench.failed == []
    assert "user@" not in bench.polling.last_error
    double.add(FOREIGN)
    until(lambda: bodies(double.left) == [POISON])


def test_what_raises_again_and_again_is_parked(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    double.add(POISON, received_count=PARK_AFTER_RECEIVES - 1)
    bench.start()
    until(lambda: not double.left)
    assert parked(bench) == 1


def test_what_raises_is_not_parked_before_its_time(double: SqsDouble, new_bench: Make) -> None:
    bench = new_bench()
    double.add(POISON, received_count=PARK_AFTER_RECEIVES - 2)
    bench.start()
    until(lambda: bench.polling.counts["broken"])
    until(lambda: not bench.polling.in_hand)
    assert (bodies(double.left), parked(bench)) == ([POISON], 0)


def test_when_everything_raises_the_pollers_take_their_time(
    double: SqsDouble, new_bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "FIRST_PAUSE_SECONDS", 30.0)
    monkeypatch.setattr(polling, "LONGEST_PAUSE_SECONDS", 30.0)
    bench = new_bench()
    double.add(*[POISON] * 30)
    bench.start()
    until(lambda: bench.polling.counts["broken"] == 10)
    gevent.sleep(0.1)
    assert double.counts["ReceiveMessage"] == 1


def test_no_poller_ends_unseen(double: SqsDouble, new_bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    del double
    bench = new_bench()
    monkeypatch.setattr(Queue, "receive", lambda _: 1 / 0)
    bench.start()
    until(lambda: bench.failed)
    assert bench.failed == ["polling ended by an error of ours: ZeroDivisionError('division by zero')"]


# -- the storage ----------------------------------------------------------------------------
def test_what_jetstream_refuses_for_good_is_an_error_of_the_settings(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "REFUSED_PAUSE_SECONDS", 0.01)
    jetstream = JetStream(new_bus(new_nats_server(jetstream=False).url))
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"events cannot be recorded: JetStream is not enabled .*start it with -js"):
        prepare(
            "events cannot be recorded",
            lambda: ensure_storage(jetstream, StorageConfig()),
            Event(),
            lambda _, why: said.append(why),
        )
    assert len(said) == polling.REFUSALS - 1


def test_jetstream_that_is_away_is_waited_for(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.2)
    server.stop()
    said: list[str] = []

    def say(_what: str, why: str) -> None:
        said.append(why)
        if len(said) == 2:
            server.start()

    prepare("", lambda: ensure_storage(jetstream, StorageConfig()), Event(), say)
    assert all(why.startswith("waiting for JetStream: ") for why in said[:2])
    assert said[-1] == ""
