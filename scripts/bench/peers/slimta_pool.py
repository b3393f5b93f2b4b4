"""python-slimta's relay: its own pool of pipelining clients, connections kept between mails.

slimta 5.0.5 (2022) asks ``pkg_resources`` for its own version, which setuptools no longer has since 82; that one
question is answered here, and nothing else of slimta is changed.
"""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import importlib.metadata
import itertools
import sys
import types

import gevent
from contest import FORWARD_PATH, MAIL_SECONDS, REVERSE_PATH, Task, run

pkg_resources = types.ModuleType("pkg_resources")
pkg_resources.require = lambda name: [importlib.metadata.distribution(name)]  # type: ignore[attr-defined]
sys.modules["pkg_resources"] = pkg_resources

from slimta.envelope import Envelope
from slimta.relay.smtp.static import StaticSmtpRelay


def send(task: Task) -> int:
    """Hand over ``task.mails`` mails; return how many were taken."""
    relay = StaticSmtpRelay(
        "127.0.0.1",
        task.port,
        pool_size=task.connections,
        ehlo_as="localhost",
        idle_timeout=5.0,
        command_timeout=MAIL_SECONDS,
    )
    envelope = Envelope(REVERSE_PATH, [FORWARD_PATH])
    envelope.parse(task.content)
    left = itertools.repeat(None, task.mails)

    def call() -> int:
        relayed = 0
        for number, _ in enumerate(left):
            replies = relay.attempt(envelope, number)
            relayed += all(reply is None or reply.code == "250" for reply in replies.values())
        return relayed

    callers = [gevent.spawn(call) for _ in range(task.connections)]
    gevent.joinall(callers, raise_error=True)
    # Not relay.kill(): it goes through the set from which each client that ends removes itself.
    gevent.killall(list(relay.pool), timeout=MAIL_SECONDS)
    return sum(caller.value for caller in callers)


if __name__ == "__main__":
    run("python-slimta", send)
