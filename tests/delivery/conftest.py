"""What several tests of delivery need."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from relay.delivery.config import Host, SmarthostConfig, Timeouts
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
    """A configuration for ``server`` in clear, with the time limits that tests can afford.

    ``changes`` are fields of ``SmarthostConfig`` or, as ``<phase>_seconds``, of its ``Timeouts``.
    """
    limits = {field.name: changes.pop(field.name, 2.0) for field in dataclasses.fields(Timeouts)}
    values: dict[str, Any] = {
        "hosts": (Host(changes.pop("host", "127.0.0.1"), server.port),),
        "helo_name": "relay.example.org",
        "tls": "off",
        "timeouts": Timeouts(**limits),
    }
    return SmarthostConfig(**(values | changes))


def soon(seconds: float = 5.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds
