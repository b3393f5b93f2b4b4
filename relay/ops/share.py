"""A send worker's share of the sending rate: SMTP_MAX_RECIPIENTS_PER_SECOND is all send workers' of this host together.

How many there are changes while a worker runs (``relayctl scale``, and the substitute of ``relayctl restart``): it is
told by a file, looked at twice a second, and says in its presence that it knows.
"""

from __future__ import annotations

import logging
from typing import Protocol

import gevent

from relay.ops.orders import send_workers
from relay.ops.process import Context

log = logging.getLogger("relay.process")

LOOK_SECONDS = 0.5


class Limited(Protocol):
    """What has a sending rate."""

    def scale_rate(self, factor: float) -> None:
        """From now on ``factor`` times what it was."""


class Share:
    """One of how many this worker is."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.workers = self._told()
        """How many share the rate."""

    def _told(self) -> int:
        settings = self._context.settings
        return send_workers(settings.relay_state_dir, settings.relay_send_workers)

    def follow(self, limited: Limited) -> None:
        """From now on gives ``limited``, which has its share of ``workers``, what it is told. Returns at once."""
        self._context.presence.shares(self.workers)
        gevent.spawn(self._follow, limited)

    def _follow(self, limited: Limited) -> None:
        while not self._context.stop.is_set():
            gevent.sleep(LOOK_SECONDS)
            told = self._told()
            if told != self.workers:
                limited.scale_rate(self.workers / told)
                log.info("%d send workers share the sending rate now, %d before", told, self.workers)
                self.workers = told
                self._context.presence.shares(told)
