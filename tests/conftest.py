"""Fixtures that several rooms share: a real nats-server, and a connected bus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from tests.support.nats_server import BINARY, NatsServer

IS_CI = bool(os.environ.get("CI"))

# In CI the same cases each time, so that a failure there is one of the change; new ones are looked for elsewhere.
hypothesis.settings.register_profile("ci", derandomize=True)
if IS_CI:
    hypothesis.settings.load_profile("ci")


def require(is_there: bool, what: str) -> None:
    """A missing service skips the test on a laptop and fails it in CI."""
    if not is_there:
        if IS_CI:
            pytest.fail(f"{what} is missing, and in CI it must not be")
        pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server with JetStream that many tests share."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def new_nats_server(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Makes nats-servers of one's own, which a test may stop and start."""
    require(BINARY.exists(), "nats-server")
    made: list[NatsServer] = []

    def make(**options: object) -> NatsServer:
        server = NatsServer(tmp_path / f"nats{len(made)}", **options)  # type: ignore[arg-type]
        made.append(server)
        return server.start()

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def new_bus() -> Iterator[Callable[[str], Bus]]:
    """Makes connected buses."""
    made: list[Bus] = []

    def make(url: str) -> Bus:
        bus = Bus(url, "test")
        made.append(bus)
        bus.start()
        assert bus.wait_connected(5), bus.last_error
        return bus

    yield make
    for bus in made:
        bus.close()


@pytest.fixture
def bus(nats_server: NatsServer, new_bus: Callable[[str], Bus]) -> Bus:
    """A bus connected to the shared server."""
    return new_bus(nats_server.url)


@pytest.fixture
def jetstream(bus: Bus) -> JetStream:
    """JetStream of the shared server."""
    return JetStream(bus)
