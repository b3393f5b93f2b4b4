"""Relay's own ``Smarthost``: as many callers as connections, each hands over one mail after another."""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import itertools
import time
from typing import Any

import gevent
from contest import FORWARD_PATH, MAIL_SECONDS, REVERSE_PATH, Task, run

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import State
from relay.delivery.smarthost import Smarthost


def config_for(port: int, connections: int, **more: Any) -> SmarthostConfig:
    """The defaults, but for where to connect and how often."""
    return SmarthostConfig(hosts=(Host("127.0.0.1", port),), pool_size=connections, **({"tls": "off"} | more))


def send(task: Task) -> int:
    """Relay ``task.mails`` mails; return how many were relayed."""
    smarthost = Smarthost(config_for(task.port, task.connections))
    left = itertools.repeat(None, task.mails)

    def call() -> int:
        relayed = 0
        for _ in left:
            [outcome] = smarthost.relay(REVERSE_PATH, (FORWARD_PATH,), task.content, time.monotonic() + MAIL_SECONDS)
            if outcome.state is not State.RELAYED:
                raise SystemExit(f"a mail was not relayed: {outcome}")
            relayed += 1
        return relayed

    callers = [gevent.spawn(call) for _ in range(task.connections)]
    gevent.joinall(callers, raise_error=True)
    smarthost.close(time.monotonic() + 1.0)
    return sum(caller.value for caller in callers)


if __name__ == "__main__":
    run("Relay's SMTP layer", send)
