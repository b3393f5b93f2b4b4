"""Waiting at start: a worker joins no queue group before it can serve, and says meanwhile what it lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import gevent
from gevent.event import Event

from relay.bus.jetstream import JetStream
from relay.bus.service import Service
from relay.delivery.config import SmarthostConfig
from relay.delivery.readiness import wait_for_smtp
from relay.errors import EgressUnavailable
from relay.ops.parts import storage_config
from relay.ops.process import Context
from relay.tracking.storage import wait_for_storage, why_unusable

log = logging.getLogger("relay.process")

FIRST_TRY_SECONDS = 10.0
WATCH_SECONDS = 10.0
"""Between two looks at a storage that was there: four small questions."""


def wait_for_smarthost(context: Context, config: SmarthostConfig) -> None:
    """Blocks until the smarthost answers or the process is asked to stop.

    After 11 tries whoever started the worker is told that it failed, and the tries go on; with
    SMTP_WAIT_EXIT raises ``EgressUnavailable`` instead.
    """
    presence = context.presence

    def on_failure(_number: int, error: EgressUnavailable) -> None:
        log.warning("waiting for the smarthost: %s", error)
        presence.lacks("smtp", str(error))

    while not context.stop.is_set():
        try:
            wait_for_smtp(config, on_failure, context.stop)
            break
        except EgressUnavailable as error:
            if context.settings.smtp_wait_exit:
                raise
            presence.lacks("smtp", str(error), has_given_up=True)
    presence.lacks("smtp", "")


def serve_when_tracked(
    context: Context, services: Sequence[Service], jetstream: JetStream, say: Callable[[str], None]
) -> gevent.Greenlet:
    """Starts ``services`` as soon as records and facts can be read; ``say`` is told why not yet, then ''.

    Goes on looking: ``say`` is told when they cannot be read any more, and when they can again; the services stay.
    Blocks for the first try and goes on in the greenlet that it returns; should that die, the process is stopped.
    """
    first_try = Event()

    def tell(why_not: str) -> None:
        say(why_not)
        if why_not:
            first_try.set()

    def serve() -> None:
        if problem := jetstream.server_problem:
            log.warning("%s", problem)
        wait_for_storage(jetstream, storage_config(context.settings), tell)
        if jetstream.server_problem:
            log.warning("%s", jetstream.server_problem)
        for service in services:
            service.start()
        first_try.set()
        while True:
            gevent.sleep(WATCH_SECONDS)
            say(why_unusable(jetstream, storage_config(context.settings)))

    serving = gevent.spawn(serve)
    serving.link_exception(lambda _: context.stop.set())
    first_try.wait(FIRST_TRY_SECONDS)
    return serving
