"""A relay in processes of its own, with NATS and SMTP servers that it did not start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.nats_server import NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess


@pytest.fixture(scope="module")
def smtp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CatchingServer]:
    """An SMTP server that takes everything."""
    server = CatchingServer(tmp_path_factory.mktemp("smtp"))
    yield server
    server.stop()


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A short path: a Unix socket's has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def new_relay(state_dir: Path, nats_server: NatsServer, smtp: CatchingServer) -> Iterator[Callable[..., RelayProcess]]:
    """Makes relays (not started) and stops them at the end."""
    made: list[RelayProcess] = []

    def make(*, nats_url: str = nats_server.url, smtp_port: int = smtp.port, **settings: str) -> RelayProcess:
        relay = RelayProcess(state_dir, nats_url, smtp_port, **settings)
        made.append(relay)
        return relay

    yield make
    for relay in made:
        relay.stop()
