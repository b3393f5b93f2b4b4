"""What several tests of delivery need."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from relay.delivery.config import SmarthostConfig
from tests.support.scripted_smtp import ScriptedSmtp, make_certificate

TEST_SECONDS = 20.0


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test hangs, and none leaves a socket to the garbage collector of the next."""
    with gevent.Timeout(TEST_SECONDS, AssertionError(f"not finished after {TEST_SECONDS} s")):
        yield
    gc.collect()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def config_for(server: ScriptedSmtp, **changes: Any) -> SmarthostConfig:
    """A configuration for ``server`` in clear, with the time limits that tests can afford."""
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": server.port,
        "helo_name": "relay.example.org",
        "tls": "off",
        "connect_timeout_seconds": 2.0,
        "command_timeout_seconds": 2.0,
        "content_timeout_seconds": 2.0,
        "dot_timeout_seconds": 2.0,
    }
    return SmarthostConfig(**(values | changes))


def soon(seconds: float = 5.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds
