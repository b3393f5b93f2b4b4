"""Status workers as processes: several of them, one that dies between pages, a large group beside small questions."""

from __future__ import annotations

import asyncio
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nats
import nats.errors
import pytest

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.caller import GET_ANALYTICS, GET_EMAIL_STATUS, ask, with_nats
from tests.support.groups import send_mails
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import clean_environment

ROOT = Path(__file__).parents[2]
LARGE = 10_000
LISTINGS = 4


class StatusWorkers:
    """Status workers of one host: the same settings, each with a name."""

    def __init__(self, nats_url: str, state_dir: Path) -> None:
        self.nats_url = nats_url
        self.http_port = free_port()
        self._settings = {
            "NATS_URL": nats_url,
            "PORT": str(self.http_port),
            "RELAY_HTTP_HOST": "127.0.0.1",
            "RELAY_STATE_DIR": str(state_dir),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Starts a worker; returns when it is ready, as it says itself."""
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.status", name],
            env=clean_environment(self._settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        self.processes[name] = process
        deadline = time.monotonic() + 20
        while name not in self.serving():
            assert process.poll() is None, f"{name} has ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{name} is not ready within 20 s"

    def serving(self) -> dict[str, int]:
        """How many questions each program has answered, as the workers tell over NATS."""

        async def stats(nc: nats.NATS) -> dict[str, int]:
            inbox = await nc.subscribe(nc.new_inbox())
            await nc.publish("$SRV.STATS.email-service", b"", reply=inbox.subject)
            found = {}
            while True:
                try:
                    told = json.loads((await inbox.next_msg(timeout=0.3)).data)
                except nats.errors.TimeoutError:
                    return found
                except json.JSONDecodeError:  # nobody answers
                    await asyncio.sleep(0.05)
                    return found
                if told["endpoints"][0]["data"]["stage"] == "ready":
                    found[told["metadata"]["program"]] = sum(each["num_requests"] for each in told["endpoints"])

        return with_nats(self.nats_url, stats)

    def kill(self, name: str) -> None:
        """Kills a worker at once."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(10)

    def end(self) -> None:
        """Ends all in order."""
        for process in self.processes.values():
            process.terminate()
        for name, process in self.processes.items():
            assert process.wait(20) == 0, name


class Seeded(NamedTuple):
    """A NATS server with a large group."""

    nats_url: str
    email_ids: list[str]


@pytest.fixture(scope="module")
def seeded(nats_server: NatsServer) -> Seeded:
    """A large group on the shared server."""
    bus = Bus(nats_server.url, "seeding")
    bus.start()
    try:
        assert bus.wait_connected(5)
        jetstream = JetStream(bus)
        assert ensure_storage(jetstream, StorageConfig()) == ""
        return Seeded(nats_server.url, send_mails(jetstream, "large-listing", LARGE))
    finally:
        bus.close()


@pytest.fixture
def workers(seeded: Seeded, tmp_path: Path) -> Iterator[StatusWorkers]:
    """Status workers, none started."""
    made = StatusWorkers(seeded.nats_url, tmp_path)
    yield made
    made.end()


def health(port: int) -> int:
    """The status of the health page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    finally:
        connection.close()


def test_several_workers_share_the_questions(seeded: Seeded, workers: StatusWorkers) -> None:
    # Given two workers with the same settings, of which the first owns PORT
    workers.start("status")
    workers.start("status-2")
    # When many questions are asked
    before = workers.serving()

    async def many(nc: nats.NATS) -> None:
        questions = [json.dumps({"email_id": email_id}).encode() for email_id in seeded.email_ids[:200]]
        replies = await asyncio.gather(*(nc.request(GET_EMAIL_STATUS, each, timeout=10) for each in questions))
        found = [json.loads(reply.data)["email_id"] for reply in replies]
        assert found == seeded.email_ids[:200]

    with_nats(seeded.nats_url, many)
    # Then both have answered, and the page is there until the first ends
    answered = {name: count - before[name] for name, count in workers.serving().items()}
    assert sum(answered.values()) == 200
    assert all(answered[name] > 20 for name in ("status", "status-2")), answered
    assert health(workers.http_port) == 200
    workers.kill("status")
    with pytest.raises(OSError):
        health(workers.http_port)
    assert ask(seeded.nats_url, GET_ANALYTICS, {"group_id": "large-listing"})["total_sent"] == LARGE


def test_a_cursor_survives_the_worker_that_gave_it(seeded: Seeded, workers: StatusWorkers) -> None:
    seen: list[str] = []
    cursor: str | None = ""
    for number in range(LARGE // 1000 + 1):
        if number in {0, 3, 7}:
            if number:
                workers.kill("status")
            workers.start("status")
        question = {"group_id": "large-listing", "limit": 1000} | ({"cursor": cursor} if cursor else {})
        page = ask(seeded.nats_url, GET_EMAIL_STATUS, question)
        seen += [record["email_id"] for record in page["records"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert seen == seeded.email_ids


def test_small_questions_do_not_wait_for_large_ones(
    seeded: Seeded, workers: StatusWorkers, record_property: Callable[[str, Any], None]
) -> None:
    # Given one worker, and callers who list a large group all the time
    workers.start("status")
    page_seconds: list[float] = []
    small_seconds: list[float] = []

    async def list_pages(nc: nats.NATS, all_list: asyncio.Event, is_over: asyncio.Event) -> None:
        cursor = ""
        while not is_over.is_set():
            question = {"group_id": "large-listing", "limit": 1000, "cursor": cursor}
            begun = time.perf_counter()
            answer = (await nc.request(GET_EMAIL_STATUS, json.dumps(question).encode(), timeout=30)).data
            page_seconds.append(time.perf_counter() - begun)
            if len(page_seconds) >= LISTINGS:
                all_list.set()
            tail = answer[-60:]
            cursor = "" if tail.endswith(b"null}") else tail.split(b'"')[-2].decode()

    async def run(nc: nats.NATS) -> None:
        all_list, is_over = asyncio.Event(), asyncio.Event()
        listings = [asyncio.create_task(list_pages(nc, all_list, is_over)) for _ in range(LISTINGS)]
        # When one mail after the other is asked for meanwhile
        async with asyncio.timeout(60):
            await all_list.wait()
            for email_id in seeded.email_ids[:300]:
                begun = time.perf_counter()
                reply = await nc.request(GET_EMAIL_STATUS, json.dumps({"email_id": email_id}).encode(), timeout=10)
                small_seconds.append(time.perf_counter() - begun)
                assert json.loads(reply.data)["email_id"] == email_id
            is_over.set()
            await asyncio.gather(*listings)

    with_nats(seeded.nats_url, run)
    # Then each takes a small part of the time that a page takes
    median, slow = statistics.median(small_seconds), statistics.quantiles(small_seconds, n=100)[98]
    page = statistics.median(page_seconds)
    record_property("small_median_ms", median * 1000)
    record_property("small_p99_ms", slow * 1000)
    record_property("page_median_ms", page * 1000)
    assert median < page / 5, (median, page)
    assert slow < page, (slow, page)
