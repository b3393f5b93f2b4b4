"""Waiting for the smarthost at start: a worker joins no queue group before mail can be sent."""

from __future__ import annotations

import logging

from relay.delivery.config import SmarthostConfig
from relay.delivery.readiness import wait_for_smtp
from relay.errors import EgressUnavailable
from relay.ops.process import Context

log = logging.getLogger("relay.process")


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
