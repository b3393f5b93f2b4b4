"""What is subscribed to: kept, so that it survives reconnects and moves to a client that replaces another.

A subscription belongs to the client that made it; only that client can end it. Which client is the
present one, ``connection`` says by ``move_to``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

import nats.errors
from nats.aio.msg import Msg as NatsMsg
from nats.aio.subscription import Subscription

from relay.bus.bridge import Bridge
from relay.bus.messages import NO_HEADERS, Msg
from relay.bus.nats_client import CONNECT_TIMEOUT_SECONDS, TamedClient, in_words
from relay.errors import BusUnavailable

log = logging.getLogger("relay.bus")


class Subscribed(NamedTuple):
    """What is wanted. ``handler`` runs in the bus's greenlet: it must hand over, not work."""

    nats_subject: str
    queue_group: str
    handler: Callable[[Msg], None]


class Subscriptions:
    """The table of subscriptions. ``subscribe`` and ``unsubscribe`` are for greenlets."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._nc = TamedClient()
        self._held: dict[int, tuple[Subscribed, Subscription | None]] = {}
        self._next_token = 0
        self._beginning = asyncio.Lock()

    def serves(self, nats_subject: str) -> bool:
        """Whether requests on ``nats_subject`` are served in a queue group."""
        return any(wanted.queue_group and wanted.nats_subject == nats_subject for wanted, _ in self._held.values())

    def hold(self, wanted: Subscribed) -> int:
        """Notes a subscription for the next connection; a token. Does not block."""
        self._next_token += 1
        self._held[self._next_token] = (wanted, None)
        return self._next_token

    async def move_to(self, nc: TamedClient) -> None:
        """Makes every subscription on a client that has just connected."""
        self._nc = nc
        for token in list(self._held):
            await self._begin(token)

    async def _begin(self, token: int) -> None:
        async with self._beginning:  # a new subscription and ``move_to`` must not both make it
            wanted, subscription = self._held.get(token, (None, None))
            if wanted is None or (subscription is not None and subscription._conn is self._nc):
                return
            handler = wanted.handler

            async def deliver(msg: NatsMsg) -> None:
                handler(Msg(msg.subject, msg.reply, msg.data, msg.headers or NO_HEADERS))

            nc = self._nc
            subscription = await nc.subscribe(wanted.nats_subject, queue=wanted.queue_group, cb=deliver)
            nc.hand_over(subscription._id, handler)
            if token in self._held:
                self._held[token] = (wanted, subscription)
            else:
                await subscription.unsubscribe()

    def subscribe(self, wanted: Subscribed) -> int:
        """Subscribes; returns a token when the server knows, or at once while NATS is away. Never raises."""
        token = self.hold(wanted)

        async def begin() -> None:
            if self._nc.is_connected or self._nc.is_reconnecting:
                await self._begin(token)
            if self._nc.is_connected:
                await asyncio.sleep(0)  # flush() writes its PING ahead of the SUB that still waits in the client
                await self._nc.flush(timeout=CONNECT_TIMEOUT_SECONDS)

        try:
            self._bridge.call(begin(), CONNECT_TIMEOUT_SECONDS + 1)
        except (OSError, nats.errors.Error, BusUnavailable, TimeoutError) as error:
            log.warning(
                "subscribing to %s takes effect with the next connection: %s", wanted.nats_subject, in_words(error)
            )
        except BaseException:  # a killed greenlet has no use for the token
            self.unsubscribe(token, CONNECT_TIMEOUT_SECONDS)
            raise
        return token

    def unsubscribe(self, token: int, timeout_seconds: float) -> None:
        """Ends a subscription: when it returns, every message that the server had sent was handed over."""
        _, subscription = self._held.pop(token, (None, None))
        if subscription is None:
            return
        nc = subscription._conn

        async def drain() -> None:
            if not nc.is_connected:
                nc._remove_sub(subscription._id)  # or the client would subscribe again when it reconnects
                return
            # drain() alone writes its PING before the UNSUB that waits in the client's buffer, so the
            # server may send more after the PONG; the UNSUB has to be on the wire first.
            await nc._send_unsubscribe(subscription._id)
            await asyncio.sleep(0)
            await subscription.drain()  # type: ignore[no-untyped-call]

        try:
            self._bridge.call(drain(), timeout_seconds)
        except (OSError, nats.errors.Error, BusUnavailable, TimeoutError) as error:
            log.warning("ending a subscription: %s", in_words(error))
            self._bridge.post(lambda: nc._remove_sub(subscription._id))
