"""A server of each file's own, since the bucket of claims has one name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from relay.bus.jetstream import JetStream
from relay.idempotency.claims import Claims, ClaimsConfig
from tests.conftest import require
from tests.support.nats_server import BINARY, NatsServer

NewClaims = Callable[..., Claims]


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server with JetStream for the tests of one file."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def new_claims(jetstream: JetStream) -> Iterator[NewClaims]:
    """Makes the claims of further workers. They share a connection: there is one event loop to a thread."""
    made: list[Claims] = []

    def make(*, is_usable: bool = True, **options: object) -> Claims:
        claims = Claims(jetstream, ClaimsConfig(**options), f"worker-{len(made)}")  # type: ignore[arg-type]
        made.append(claims)
        claims.start()
        assert bool(claims.off_reason) != is_usable, claims.off_reason
        return claims

    yield make
    for claims in made:
        claims.close(5)


@pytest.fixture
def claims(new_claims: NewClaims) -> Claims:
    """The claims of one worker."""
    return new_claims()
