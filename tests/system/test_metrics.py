"""``/metrics`` of a real relay: exact counts of real mails, over kill -9, restarts and without NATS."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import require
from tests.ops.test_metrics import Numbers, numbers
from tests.support.caller import GET_ANALYTICS, GET_EMAIL_STATUS, ask, send
from tests.support.moto_server import IS_THERE, MotoServer
from tests.support.nats_server import NatsServer
from tests.support.promtool import promtool
from tests.support.relay_process import RelayProcess
from tests.system.test_engagement import event, eventing

NewRelay = Callable[..., RelayProcess]
NewServer = Callable[..., NatsServer]

REQUESTS = "relay_requests_total"
HISTOGRAMS = (
    "relay_send_duration_seconds",
    "relay_smtp_pool_wait_seconds",
    "relay_smtp_transaction_duration_seconds",
    "relay_tracking_write_duration_seconds",
)


def page_of(relay: RelayProcess) -> bytes:
    """The page as Prometheus gets it."""
    connection = http.client.HTTPConnection("127.0.0.1", relay.http_port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read()
    finally:
        connection.close()


def wait_until(relay: RelayProcess, is_so: Callable[[dict[str, Numbers]], Any]) -> dict[str, Numbers]:
    """The figures as soon as they are as expected."""
    deadline = time.monotonic() + 15
    while not is_so(found := numbers(page_of(relay))):
        assert time.monotonic() < deadline, {name: told for name, told in found.items() if "bucket" not in name}
        time.sleep(0.1)
    return found


def relayed(found: dict[str, Numbers]) -> float:
    return found[REQUESTS]["relayed",]


def test_exact_counts_that_never_fall(new_relay: NewRelay) -> None:
    # Given mails that were relayed and requests that were refused, and questions
    relay = new_relay()
    relay.start()
    mails = [send(relay.nats_url) for _ in range(7)]
    for _ in range(2):
        assert send(relay.nats_url, to="")["outcome"] == "refused"
    for mail in mails[:3]:
        assert ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": mail["email_id"]})["delivered"] is False
    assert ask(relay.nats_url, GET_ANALYTICS, {"group_id": mails[0]["group_id"]})["total_sent"] == 1
    # Then each is counted once, whichever worker had it
    # (each worker tells it within a second of its own)
    found = wait_until(
        relay,
        lambda found: sum(found[REQUESTS].values()) >= 9 and sum(found["relay_questions_total"].values()) >= 4,
    )
    assert {series: count for series, count in found[REQUESTS].items() if count} == {("relayed",): 7, ("refused",): 2}
    assert {series: count for series, count in found["relay_smtp_replies_total"].items() if count} == {("2xx",): 7}
    assert found["relay_tracking_records_total"] == {("written",): 7, ("lost",): 0}
    for name in HISTOGRAMS:
        assert found[f"{name}_count"][()] == found[f"{name}_bucket"]["+Inf",] == 7, name
        assert 0 < found[f"{name}_sum"][()] < 7, name
    questions = {series: count for series, count in found["relay_questions_total"].items() if count}
    assert questions == {
        ("get_email_status", "answered"): 3,
        ("get_email_engagement_analytics", "answered"): 1,
    }
    assert found["relay_requests_in_flight"][()] == found["relay_backlog_requests"][()] == 0
    assert found["relay_backlog_limit_requests"][()] == 2 * 5000
    assert found["relay_smtp_connections_max"][()] == 2 * 20
    assert found["relay_nats_connected_workers"] == {("send",): 2, ("status",): 1, ("engagement",): 0}
    assert found["relay_workers_expected"] == {("send",): 2, ("status",): 1, ("engagement",): 0}
    assert found["relay_workers"]["send", "ready"] == 2
    assert found["relay_smtp_circuit_open_workers"][()] == 0
    assert found["relay_tracking_off_workers"] == {("send",): 0, ("status",): 0}
    for name in ("relay_process_resident_memory_bytes", "relay_process_open_fds", "relay_process_start_time_seconds"):
        assert {program for (program,) in found[name]} == {"send-1", "send-2", "status"}
        assert min(found[name].values()) > 0
    done = promtool("check", "metrics", stdin=page_of(relay).decode())
    assert (done.returncode, done.stderr) == (0, "")

    # When all that have counted are killed
    pids = {program: relay.program(program).pid for program in ("send-1", "send-2")}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(relay.program(each).pid == pids[each] or not relay.program(each).is_ready for each in pids):
        assert relayed(numbers(page_of(relay))) == 7, "a sum that falls is counted again from 0"
        assert time.monotonic() < deadline
    # Then it counts on
    assert send(relay.nats_url)["email_id"]
    found = wait_until(relay, lambda found: relayed(found) == 8)
    assert found["relay_worker_starts_total"] == {("send-1",): 2, ("send-2",): 2, ("status",): 1}
    assert found["relay_send_duration_seconds_count"][()] == 8
    # And so it does when the status worker is killed, which has nothing of its own
    pid = relay.program("status").pid
    os.kill(pid, signal.SIGKILL)
    relay.wait_until_ready("status", other_pid_than=pid, timeout_seconds=20)
    found = wait_until(relay, lambda found: found["relay_workers"]["status", "ready"] == 1)
    assert relayed(found) == 8
    assert sum(found["relay_questions_total"].values()) == 4

    # When a worker is taken away, then what it had counted is still counted
    assert relay.relayctl("scale", "1").returncode == 0
    assert send(relay.nats_url)["email_id"]
    found = wait_until(relay, lambda found: relayed(found) == 9)
    assert found["relay_workers"]["send", "ready"] == found["relay_workers_expected"]["send",] == 1
    # And so it is when the relay is started anew, and while it does not run
    relay.stop()
    assert relayed(numbers(relay.relayctl("metrics").stdout.encode())) == 9
    relay.settings["RELAY_SEND_WORKERS"] = "1"
    relay.start()
    assert send(relay.nats_url)["email_id"]
    found = wait_until(relay, lambda found: relayed(found) == 10)
    assert found["relay_backlog_limit_requests"][()] == 5000


def test_without_nats_and_with_a_worker_that_hangs(new_relay: NewRelay, new_nats_server: NewServer) -> None:
    server = new_nats_server()
    relay = new_relay(nats_url=server.url)
    relay.start()
    assert send(relay.nats_url)["email_id"]
    wait_until(relay, lambda found: relayed(found) == 1)
    # When NATS goes away
    server.stop()
    # Then the page says so, and still what was counted
    found = wait_until(relay, lambda found: not sum(found["relay_nats_connected_workers"].values()))
    assert relayed(found) == 1
    assert found["relay_workers"]["send", "waiting"] == 2
    # When a worker hangs
    pid = relay.program("send-1").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        found = wait_until(relay, lambda found: found["relay_workers"]["send", "silent"] == 1)
        # Then its counts stay, and what the system says of it; how it stands is not known any more
        assert relayed(found) == 1
        assert found["relay_workers"]["send", "waiting"] == 1
        assert found["relay_process_resident_memory_bytes"]["send-1",] > 0
        assert found["relay_backlog_limit_requests"][()] == 5000
    finally:
        os.kill(pid, signal.SIGCONT)
    server.start()
    wait_until(relay, lambda found: found["relay_workers"]["send", "ready"] == 2)


@pytest.fixture
def slow_scrapers() -> Iterator[list[socket.socket]]:
    """Connections to be closed at the end."""
    made: list[socket.socket] = []
    yield made
    for each in made:
        each.close()


def test_slow_scrapers_keep_nobody_out(new_relay: NewRelay, slow_scrapers: list[socket.socket]) -> None:
    relay = new_relay(RELAY_SEND_WORKERS="1")
    relay.start()
    mail = send(relay.nats_url)
    for number in range(200):
        scraper = socket.socket()
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # not even the page fits
        scraper.connect(("127.0.0.1", relay.http_port))
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n" + (b"Host: localhost\r\n\r\n" if number % 2 else b""))
        slow_scrapers.append(scraper)
    begun = time.monotonic()
    assert relayed(numbers(page_of(relay))) in {0, 1}
    assert ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": mail["email_id"]})["delivered"] is False
    assert time.monotonic() - begun < 5


def test_events(new_relay: NewRelay, tmp_path_factory: pytest.TempPathFactory) -> None:
    require(IS_THERE, "moto's server")
    moto = MotoServer(tmp_path_factory.mktemp("moto"))
    try:
        queue_url = moto.new_queue("figures")
        topic = moto.new_topic("figures", queue_url, is_raw=True)
        relay = new_relay(RELAY_SEND_WORKERS="1", **eventing(moto.url, queue_url))
        relay.start()
        mail = send(relay.nats_url, group_id="figures")
        moto.publish(topic, [event(mail["email_id"], "figures", kind) for kind in ("Delivery", "Open")])
        moto.publish(topic, ['{"eventType": "Open", "mail": 7}'])
        found = wait_until(relay, lambda found: found["relay_sqs_messages_total"]["deleted",] == 3)
        events = {kind: count for (kind,), count in found["relay_events_total"].items() if count}
        assert events == {"Delivery": 1, "Open": 1}
        results = {result: count for (result,), count in found["relay_notifications_total"].items() if count}
        assert results == {"folded": 2, "parked": 1}
        assert found["relay_sqs_messages_total"]["received",] == 3
        wait_until(relay, lambda found: found["relay_sqs_pollers"] == {("idle",): 4, ("busy",): 0})
        found = wait_until(relay, lambda found: "relay_sqs_queue_messages" in found)
        assert found["relay_events_stopped_workers"][()] == 0
        assert found["relay_workers_expected"]["engagement",] == 1
        assert found["relay_sqs_queue_messages"]["waiting",] >= 0
        # When the queue cannot be asked any more
        moto.stop()
        found = wait_until(relay, lambda found: found["relay_events_stopped_workers"][()] == 1)
        assert found["relay_sqs_receive_failures_total"][()] >= 1
        assert found["relay_notifications_total"]["folded",] == 2
    finally:
        moto.stop()
