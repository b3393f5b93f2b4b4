"""The engagement worker as a process: SNS and SQS by moto's server, NATS by nats-server, and their failures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from relay.ops.presence import Report, read_presence
from relay.ops.process import REST_SECONDS
from tests.conftest import require
from tests.support.caller import GET_ANALYTICS, GET_EMAIL_STATUS, ask, send
from tests.support.moto_server import IS_THERE, MotoServer, aws_environment
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RelayProcess, Worker
from tests.support.sqs_double import SqsDouble
from tests.system.test_relayctl import ENGAGEMENT_FIGURES, check_schema

NewRelay = Callable[..., RelayProcess]
NewServer = Callable[..., NatsServer]
NewWorker = Callable[..., Worker]

AT_ONCE_SECONDS = 4.0
"""Much less than a long poll's 20."""


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """moto's server."""
    require(IS_THERE, "moto's server")
    server = MotoServer(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture
def double() -> Iterator[SqsDouble]:
    """A queue that fails as it is told to."""
    server = SqsDouble().start()
    yield server
    server.stop()


def eventing(endpoint_url: str, queue_url: str, **settings: str) -> dict[str, str]:
    """Settings of a relay that reads events."""
    return {
        **aws_environment(endpoint_url),
        "SES_EVENTING_ENABLED": "true",
        "SES_ENGAGEMENT_SQS_QUEUE_URL": queue_url,
        **settings,
    }


@pytest.fixture
def new_worker(new_relay: NewRelay) -> Iterator[NewWorker]:
    """Starts engagement workers without a supervisor."""
    made: list[Worker] = []

    def start(**settings: str) -> Worker:
        made.append(Worker("engagement", new_relay(**settings).settings))
        return made[-1]

    yield start
    for worker in made:
        worker.end()


def report_of(worker: Worker) -> Report | None:
    """What the worker tells of itself."""
    return read_presence(worker.state_dir, "engagement", worker.process.pid)


def wait_until(is_so: Callable[[], Any], timeout_seconds: float = 20.0) -> Any:
    """What ``is_so`` gives as soon as it is true."""
    deadline = time.monotonic() + timeout_seconds
    while not (given := is_so()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)
    return given


def wait_ready(worker: Worker) -> None:
    """Returns when the worker lacks nothing."""
    wait_until(lambda: (told := report_of(worker)) is not None and told.stage == "ready")


def event(email_id: str, group_id: str, kind: str) -> str:
    """An event of a mail, as SES publishes it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps(
        {
            "eventType": kind,
            "mail": {
                "timestamp": now,
                "messageId": "0100018c",
                "destination": ["user@example.com"],
                "headers": [{"name": "X-LFX-TRACKING-ID", "value": f"{group_id}/{email_id}"}],
            },
            kind.lower(): {"timestamp": now},
        }
    )


def test_events_of_a_topic_are_in_the_record_and_in_the_analytics(new_relay: NewRelay, moto: MotoServer) -> None:
    # Given a relay, a queue that two topics publish to, and a mail
    queue_url = moto.new_queue("whole")
    topics = [moto.new_topic(f"whole-{is_raw}", queue_url, is_raw=is_raw) for is_raw in (False, True)]
    relay = new_relay(**eventing(moto.url, queue_url))
    relay.start()
    mail = send(relay.nats_url, group_id="whole-way")
    # When SES tells that it was delivered and opened twice
    moto.publish(topics[0], [event(mail["email_id"], "whole-way", "Delivery")])
    moto.publish(topics[1], [event(mail["email_id"], "whole-way", "Open")])
    moto.publish(topics[0], [event(mail["email_id"], "whole-way", "Open")])
    # Then callers are told so, and the queue is empty
    asked = {"email_id": mail["email_id"]}

    def answer() -> Any:
        status = ask(relay.nats_url, GET_EMAIL_STATUS, asked)
        return status if status.get("open_count") == 2 and status["delivered"] else None

    assert wait_until(answer)["opened"]
    analytics = ask(relay.nats_url, GET_ANALYTICS, {"group_id": "whole-way"})
    assert {name: analytics[name] for name in ("total_sent", "delivered", "opened", "unique_opened")} == {
        "total_sent": 1,
        "delivered": 1,
        "opened": 2,
        "unique_opened": 1,
    }
    wait_until(lambda: moto.left(queue_url) == (0, 0))
    # And so is whoever asks for the status
    status = json.loads(relay.relayctl("status", "--json").stdout)
    assert status["ready"]
    assert status["events"] == {"on": True, "problem": ""}
    (figures,) = [each["figures"] for each in status["programs"] if each["name"] == "engagement"]
    check_schema(figures, ENGAGEMENT_FIGURES)
    assert (figures["received"], figures["deleted"], figures["left"]) == (3, 3, 0)
    assert (figures["events"]["Open"], figures["events"]["Delivery"], figures["events"]["folded"]) == (2, 1, 3)
    assert figures["pollers"] == {"idle": 4, "max": 4}
    assert "Events   3 folded, 0 repeated, 0 parked, 0 waiting in the queue" in relay.relayctl("status").stdout
    # And it ends although its pollers wait for messages
    begun = time.monotonic()
    relay.stop()
    assert time.monotonic() - begun < AT_ONCE_SECONDS + 2


def test_sigterm_cuts_what_only_waits(new_worker: NewWorker, moto: MotoServer) -> None:
    worker = new_worker(**eventing(moto.url, moto.new_queue("idle")))
    wait_ready(worker)
    time.sleep(0.5)  # so that it is well inside its long poll
    begun = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    output = worker.output()
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    assert worker.process.returncode == 0
    assert "stopped" in output
    assert "Traceback" not in output


def test_killed_with_a_batch_in_hand_it_counts_once(
    new_relay: NewRelay, new_nats_server: NewServer, moto: MotoServer
) -> None:
    # Given a relay whose NATS has just stopped to answer, with events in hand
    server = new_nats_server()
    queue_url = moto.new_queue("killed", VisibilityTimeout="2")
    topic = moto.new_topic("killed", queue_url, is_raw=False)
    relay = new_relay(nats_url=server.url, **eventing(moto.url, queue_url))
    relay.start()
    mail = send(relay.nats_url, group_id="killed")
    victim = relay.program("engagement").pid
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        moto.publish(topic, [event(mail["email_id"], "killed", "Open")] * 2)
        wait_until(lambda: moto.left(queue_url)[1] == 2)
        # When the worker is killed
        os.kill(victim, signal.SIGKILL)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    # Then the next one counts them, once
    relay.wait_until_ready("engagement", other_pid_than=victim, timeout_seconds=20)
    wait_until(lambda: moto.left(queue_url) == (0, 0))
    assert ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": mail["email_id"]})["open_count"] == 2
    analytics = ask(relay.nats_url, GET_ANALYTICS, {"group_id": "killed"})
    assert (analytics["total_sent"], analytics["opened"], analytics["unique_opened"]) == (1, 2, 1)


# -- started wrongly ---------------------------------------------------------------------------


def test_without_a_queue_nothing_starts(new_relay: NewRelay) -> None:
    relay = new_relay(SES_EVENTING_ENABLED="true")
    done = relay.relayctl("start")
    assert done.returncode == 78
    assert "SES_ENGAGEMENT_SQS_QUEUE_URL is not set; set it" in done.stderr
    worker = Worker("engagement", relay.settings)
    assert "SES_ENGAGEMENT_SQS_QUEUE_URL is not set; set it" in worker.output()
    assert worker.process.returncode == 78


def errors_of(output: str) -> list[str]:
    """The error lines of a log."""
    lines = [json.loads(line) for line in output.splitlines()]
    return [line["msg"] for line in lines if line["level"].lower() == "error"]


def test_without_credentials_it_exits_78(new_worker: NewWorker) -> None:
    settings = eventing("http://127.0.0.1:1", "https://sqs.us-east-1.amazonaws.com/123456789012/events")
    del settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"]
    worker = new_worker(**settings)
    (error,) = errors_of(worker.output())
    assert worker.process.returncode == 78
    assert error.startswith("no AWS credentials were found; give this process a role")


def ended(worker: Worker, exit_code: int) -> str:
    """The one error with which the worker ended by its own decision; its rest before that is cut short."""
    told = wait_until(lambda: (report := report_of(worker)) and report.exit_code and report)
    assert told.exit_code == exit_code
    wait_until(lambda: worker.process.poll() is not None or report_of(worker).stage == "draining")
    worker.process.send_signal(signal.SIGTERM)
    output = worker.output()
    assert worker.process.returncode == exit_code, output
    assert "Traceback" not in output
    (error,) = errors_of(output)
    assert error in told.reason
    return error


def test_a_queue_that_does_not_exist_is_fatal(new_worker: NewWorker, moto: MotoServer) -> None:
    worker = new_worker(**eventing(moto.url, f"{moto.url}/123456789012/nowhere"))
    assert "nowhere does not exist in us-east-1; check SES_ENGAGEMENT_SQS_QUEUE_URL" in ended(worker, 78)


def test_relayctl_start_says_what_is_wrong_with_the_queue(new_relay: NewRelay, moto: MotoServer) -> None:
    relay = new_relay(**eventing(moto.url, f"{moto.url}/123456789012/nowhere"))
    done = relay.relayctl("start")
    assert done.returncode == 1
    assert "engagement is not ready" in done.stderr
    assert "nowhere does not exist" in done.stderr
    assert not relay.supervision.is_running()


def test_without_jetstream_it_is_fatal(new_worker: NewWorker, new_nats_server: NewServer, moto: MotoServer) -> None:
    url = new_nats_server(jetstream=False).url
    worker = new_worker(nats_url=url, **eventing(moto.url, moto.new_queue("no-jetstream")))
    assert "events cannot be recorded: JetStream is not enabled on the NATS server; start it with -js" in ended(
        worker, 78
    )


def test_without_permission_for_the_storage_it_is_fatal(
    new_worker: NewWorker, new_nats_server: NewServer, moto: MotoServer
) -> None:
    user = 'user: "w", password: "w", permissions: { publish: { deny: ["$JS.>", "$KV.>"] } }'
    server = new_nats_server(config=f"authorization {{ users: [{{ {user} }}] }}")
    url = server.url.replace("//", "//w:w@")
    worker = new_worker(nats_url=url, **eventing(moto.url, moto.new_queue("no-permission")))
    assert "events cannot be recorded: " in ended(worker, 78)


# -- without what it needs ----------------------------------------------------------------------


def test_without_nats_it_waits_and_comes_up_by_itself(
    new_worker: NewWorker, new_nats_server: NewServer, double: SqsDouble
) -> None:
    server = new_nats_server()
    server.stop()
    worker = new_worker(nats_url=server.url, **eventing(double.url, double.queue_url))
    wait_until(lambda: (told := report_of(worker)) and "connection refused" in told.lacking.get("nats", ""))
    assert double.counts["ReceiveMessage"] == 0
    server.start()
    wait_ready(worker)
    wait_until(lambda: double.counts["ReceiveMessage"])


def test_a_queue_that_cannot_be_asked_ends_it_as_it_ended_lfx(new_worker: NewWorker) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    settings = eventing(endpoint, f"{endpoint}/123456789012/events", AWS_MAX_ATTEMPTS="1")
    worker = new_worker(ENGAGEMENT_RECEIVE_FAILURES="2", **settings)
    assert ended(worker, 1).startswith("events could not be received 2 times in a row; the last time: SQS: ")


def test_a_queue_that_goes_away_ends_it_too(new_worker: NewWorker, double: SqsDouble) -> None:
    settings = eventing(double.url, double.queue_url, AWS_MAX_ATTEMPTS="1", ENGAGEMENT_RECEIVE_FAILURES="2")
    worker = new_worker(**settings)
    wait_ready(worker)
    wait_until(lambda: double.counts["ReceiveMessage"] >= 2)
    double.stop()
    assert "Could not connect" in ended(worker, 1)


def test_an_outage_that_every_poller_sees_is_one_failure(new_worker: NewWorker, double: SqsDouble) -> None:
    # Given four pollers that all wait for messages
    settings = eventing(double.url, double.queue_url, AWS_MAX_ATTEMPTS="1", ENGAGEMENT_POLLERS="4")
    worker = new_worker(ENGAGEMENT_RECEIVE_FAILURES="2", **settings)
    wait_ready(worker)
    wait_until(lambda: double.counts["ReceiveMessage"] == 4)
    # When SQS hangs up on all of them
    double.hang_up()
    # Then they poll again
    wait_until(lambda: double.counts["ReceiveMessage"] == 8)
    assert worker.process.poll() is None
    worker.process.send_signal(signal.SIGTERM)
    assert worker.output().count("events cannot be received (failure 1 in a row)") == 1


def test_an_end_that_may_come_again_takes_its_time(new_worker: NewWorker, double: SqsDouble) -> None:
    """supervisord would start it again at once, and again: it has no back-off for who lived longer than a second."""
    double.denied = {"GetQueueAttributes"}
    worker = new_worker(**eventing(double.url, double.queue_url))
    wait_until(lambda: (told := report_of(worker)) and told.exit_code)
    begun = time.monotonic()
    assert "may not be used" in worker.output()
    assert time.monotonic() - begun > REST_SECONDS - 1
    assert worker.process.returncode == 78


def test_a_queue_that_comes_back_is_waited_for_when_that_is_wanted(new_worker: NewWorker, double: SqsDouble) -> None:
    double.failures = [("GetQueueAttributes", 503, "ServiceUnavailable")] * 4
    settings = eventing(double.url, double.queue_url, AWS_MAX_ATTEMPTS="1", ENGAGEMENT_RECEIVE_FAILURES="0")
    worker = new_worker(**settings)
    wait_until(lambda: (told := report_of(worker)) and "ServiceUnavailable" in told.lacking.get("sqs", ""))
    double.failures.clear()
    wait_ready(worker)
    wait_until(lambda: double.counts["ReceiveMessage"])
    assert report_of(worker).exit_code == 0  # type: ignore[union-attr]
