"""What callers meet: scripted responders, and a relay that is started."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client.responder import Responder
from tests.support.nats_server import NatsServer
from tests.support.relay_process import CatchingServer, RelayProcess


@pytest.fixture
def new_responder(nats_server: NatsServer) -> Iterator[Callable[..., Responder]]:
    """Makes responders on the shared server, or on the one at ``url``."""
    made: list[Responder] = []

    def make(answer: object, nats_subject: str = "lfx.email-service.send_email", **options: object) -> Responder:
        url = str(options.pop("url", nats_server.url))
        made.append(Responder(url, answer, nats_subject, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for responder in made:
        responder.stop()


@pytest.fixture(scope="session")
def smtp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CatchingServer]:
    """An SMTP server that takes everything."""
    server = CatchingServer(tmp_path_factory.mktemp("smtp"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def relay_nats(tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer) -> Iterator[NatsServer]:
    """A nats-server that the started relay has for itself: scripted responders must not answer in its place."""
    del nats_server  # it has seen to it that there is one to be had
    server = NatsServer(tmp_path_factory.mktemp("relay-nats")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def relay(relay_nats: NatsServer, smtp: CatchingServer) -> Iterator[RelayProcess]:
    """One started relay for all tests here."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    made = RelayProcess(
        directory, relay_nats.url, smtp.port, RELAY_SEND_WORKERS="1", OBJECT_STORE_BUCKETS="attachments"
    )
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory, ignore_errors=True)
