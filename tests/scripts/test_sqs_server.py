"""The benchmark's stand-in for SQS, as a process, asked by the relay's own client: what is measured must be a queue."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.aws.sqs import Queue, QueueConfig
from tests.support.moto_server import REGION, aws_environment

SERVER = Path(__file__).parents[2] / "scripts" / "bench" / "sqs_server.py"
WAIT_SECONDS = 10


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where it listens; boto3 of this process looks there."""
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = process.stdout.readline().strip()
        for name, value in aws_environment(found).items():
            monkeypatch.setenv(name, value)
        yield found
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_SECONDS)


def put(queue_url: str, *bodies: str) -> None:
    """Puts messages into the queue."""
    lines = "\n".join(json.dumps(body) for body in bodies).encode()
    urllib.request.urlopen(urllib.request.Request(queue_url, lines, method="PUT"), timeout=WAIT_SECONDS).close()


def queue_at(queue_url: str) -> Queue:
    """The relay's client of it."""
    return Queue(QueueConfig(queue_url, REGION, 1, wait_seconds=0))


def test_messages_come_once_and_go_when_they_are_deleted(url: str) -> None:
    queue = queue_at(f"{url}/123456789012/one")
    queue.look()
    bodies = [f"body {number} é" for number in range(25)]
    put(queue.url, *bodies)
    put(f"{url}/123456789012/other", "not ours")
    received = [queue.receive() for _ in range(4)]
    assert [len(batch) for batch in received] == [10, 10, 5, 0]
    assert [each.body for batch in received for each in batch] == bodies
    assert tuple(queue.backlog()) == (0, 25, 0)
    for batch in received:
        assert queue.delete(batch) == []
    assert tuple(queue.backlog()) == (0, 0, 0)
    with urllib.request.urlopen(queue.url, timeout=WAIT_SECONDS) as answer:
        told = json.load(answer)
    assert 0 < told["put_at"] < told["emptied_at"]


def test_what_is_given_back_comes_again(url: str) -> None:
    queue = queue_at(f"{url}/123456789012/one")
    put(queue.url, "again")
    (first,) = queue.receive()
    assert queue.receive() == []
    queue.hide([first], 0)
    (second,) = Queue(QueueConfig(queue.url, REGION, 1, wait_seconds=WAIT_SECONDS)).receive()
    assert second.body == "again"
