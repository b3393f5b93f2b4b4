"""A server of each file's own, since group ids of every kind are used, and lfx's bucket beside ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relay.bus.jetstream import JetStream
from tests.conftest import require
from tests.support.groups import make_index_bucket
from tests.support.nats_server import BINARY, NatsServer


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server with JetStream for the tests of one file."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def index_bucket(jetstream: JetStream) -> None:
    """lfx's bucket, on this file's server."""
    make_index_bucket(jetstream)
