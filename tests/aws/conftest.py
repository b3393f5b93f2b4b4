"""A queue that fails as it is told to, and moto's, which behaves as Amazon's does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import require
from tests.support.moto_server import IS_THERE, MotoServer, aws_environment
from tests.support.sqs_double import SqsDouble


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """moto's server."""
    require(IS_THERE, "moto's server")
    server = MotoServer(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[SqsDouble]:
    """The stand-in for SQS, to which boto3 turns in this test."""
    server = SqsDouble().start()
    for name, value in aws_environment(server.url).items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()
