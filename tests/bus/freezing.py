"""A nats-server that is there and does not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.nats_server import NatsServer


def freeze(server: NatsServer) -> int:
    """Stops the process and returns its pid when it has stopped: the signal alone leaves it time for an answer."""
    assert server.process is not None
    pid = server.process.pid
    os.kill(pid, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


@contextmanager
def frozen(server: NatsServer) -> Iterator[int]:
    """Frozen for the length of the block, at most."""
    pid = freeze(server)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)
