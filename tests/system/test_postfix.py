"""The delivery layer against Postfix's own SMTP sink: another implementation's idea of the protocol."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from relay.delivery.config import SmarthostConfig
from relay.delivery.outcome import State
from relay.delivery.smarthost import Smarthost
from tests.conftest import require
from tests.support.nats_server import free_port, wait_for_port

CONTENT = b"Subject: Hello\r\n\r\n" + b".a line that begins with a dot\r\n" * 200


@pytest.fixture(params=["", "-p"], ids=["pipelining", "no pipelining"])
def sink_port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The port of a running smtp-sink."""
    program = shutil.which("smtp-sink", path=os.environ.get("PATH", "") + ":/usr/sbin")
    require(program is not None, "Postfix's smtp-sink")
    port = free_port()
    options = [request.param] if request.param else []
    if os.geteuid() == 0:
        options += ["-u", "postfix"]
    with (tmp_path / "sink.log").open("wb") as log:
        process = subprocess.Popen([str(program), *options, f"127.0.0.1:{port}", "100"], stdout=log, stderr=log)
    wait_for_port(port)
    yield port
    process.terminate()
    process.wait(10)


def test_500_mails_over_10_connections(sink_port: int) -> None:
    smarthost = Smarthost(SmarthostConfig("127.0.0.1", sink_port, pool_size=10, helo_name="relay.example.org"))
    deadline = time.monotonic() + 20

    def send(number: int) -> State:
        (outcome,) = smarthost.relay("a@example.com", (f"b{number}@example.com",), CONTENT, deadline)
        return outcome.state

    sending = [gevent.spawn(send, number) for number in range(500)]
    gevent.joinall(sending, raise_error=True)
    figures = smarthost.figures()
    smarthost.close(time.monotonic() + 1)
    assert [greenlet.value for greenlet in sending] == [State.RELAYED] * 500
    assert int(figures["connections_opened"]) <= 10
