"""NATS as greenlets see it: publish, request, serve. What the rest of Relay imports of the bus.

Puts the parts together and owns none of their work: the loop (``bridge``), the connection's life
(``connection``), what is subscribed to (``subscriptions``), what goes out and what is answered (``outbox``).

Leaves to others: what is served (``bus.service``) and JetStream (``bus.jetstream``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import nats.errors
from nats.aio.client import Client

from relay.bus.bridge import Bridge
from relay.bus.config import BusConfig, without_password
from relay.bus.connection import Connection
from relay.bus.messages import Msg, Publication, is_plain_subject
from relay.bus.nats_client import in_words
from relay.bus.outbox import Collector, Outbox
from relay.bus.subscriptions import Subscribed, Subscriptions
from relay.errors import BusRefused, BusUnavailable

__all__ = [
    "Bus",
    "BusConfig",
    "Collector",
    "Msg",
    "Publication",
    "is_plain_subject",
    "seconds_left",
    "without_password",
]

log = logging.getLogger("relay.bus")


def seconds_left(deadline: float) -> float:
    """Until ``deadline`` on ``time.monotonic()``; 0 when it has passed."""
    return max(0.0, deadline - time.monotonic())


class Bus:
    """One connection to NATS. Its methods are for greenlets; handlers run in the bus's own greenlet.

    A bare URL stands for a ``BusConfig`` that says nothing else. ``on_change(is_connected, why)`` is called
    in the bus's greenlet and must not block; ``on_death()`` when only a new process can help.
    """

    def __init__(
        self,
        config: BusConfig | str,
        name: str,
        on_change: Callable[[bool, str], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._on_death = on_death
        self._is_closing = False
        config = BusConfig(config) if isinstance(config, str) else config
        self._inbox = f"{config.inbox_prefix}.{secrets.token_hex(11)}"
        self._bridge = Bridge()
        self._subscriptions = Subscriptions(self._bridge)
        self._connection = Connection(config, name, self._inbox, self._subscriptions, on_change)
        self._outbox = Outbox(self._bridge, self._connection, self._inbox)
        self._subscriptions.hold(Subscribed(f"{self._inbox}.*", "", self._outbox.on_answer))

    # -- life ------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts connecting in the background, and goes on for ever until ``close``."""
        self._bridge.start()
        self._bridge.post(self._begin)

    def _begin(self) -> None:
        self._staying = asyncio.create_task(self._connection.stay())
        self._staying.add_done_callback(self._stayed)

    def _stayed(self, task: asyncio.Task[None]) -> None:
        """The task does not end by itself: without it a lost connection would stay lost, so the process has to end."""
        if self._is_closing or task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("the bus has died of %r", error, exc_info=error)
        self._connection.connected.clear()
        if self._on_death is not None:
            self._on_death()

    def wait_connected(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until connected; False when ``timeout_seconds`` went by first."""
        return bool(self._connection.connected.wait(timeout=timeout_seconds))

    @property
    def is_connected(self) -> bool:
        """Whether NATS is connected right now."""
        return bool(self._connection.connected.is_set())

    @property
    def last_error(self) -> str:
        """Why it is not connected, or what NATS complained about last."""
        return self._connection.last_error

    @property
    def max_payload_bytes(self) -> int:
        """What the server takes, headers and payload together."""
        return self._connection.nc.max_payload

    @property
    def server_version(self) -> str:
        """The version the connected server gave, '' before the first connection."""
        return str(self._nc._server_info.get("version", "")) if self._nc._server_info else ""

    @property
    def inbox_prefix(self) -> str:
        """Where answers to our own requests arrive; no caller may name it as a reply subject."""
        return self._inbox

    @property
    def dropped(self) -> int:
        """Publications that could not be handed to NATS since the process started."""
        return self._outbox.dropped

    @property
    def waiting(self) -> int:
        """How many requests wait for an answer right now."""
        return self._outbox.waiting

    @property
    def _nc(self) -> Client:
        return self._connection.nc

    def close(self, timeout_seconds: float = 3.0) -> None:
        """Writes out what was published, closes the connection and ends the loop. Safe to call twice.

        Takes ``timeout_seconds`` at most. Whoever still waits for an answer gets ``BusUnavailable``.
        """
        if self._is_closing:
            return
        deadline = time.monotonic() + timeout_seconds
        if self.is_connected:
            try:
                self.flush(timeout_seconds / 2)
            except (BusUnavailable, nats.errors.Error) as error:
                log.warning("closing NATS before everything was written: %s", error)
        self._is_closing = True
        self._outbox.close()
        try:
            self._bridge.call(self._connection.close(), max(0.1, (deadline - time.monotonic()) / 2))
        except BusUnavailable as error:
            log.debug("closing NATS: %s", error)
        self._bridge.stop(max(0.1, deadline - time.monotonic()))

    def flush(self, timeout_seconds: float = 3.0) -> None:
        """A barrier: returns when the server has taken all that was published before.

        Raises ``BusUnavailable`` when it does not confirm in time.
        """

        async def barrier() -> None:
            self._outbox.write()  # the PING goes past what still waits in the client
            await self._nc.flush(timeout=timeout_seconds)  # type: ignore[arg-type]

        try:
            self._bridge.call(barrier(), timeout_seconds)
        except (OSError, nats.errors.Error, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not confirm: {in_words(error)}") from error

    # -- serve -----------------------------------------------------------------------------
    def subscribe(self, nats_subject: str, queue_group: str, handler: Callable[[Msg], None]) -> int:
        """Subscribes; ``handler`` gets every message in the bus's greenlet: it must hand over, not work.

        Survives reconnects; while NATS is away it takes effect with the next connection. Returns a token for
        ``unsubscribe``. Never raises.
        """
        return self._subscriptions.subscribe(Subscribed(nats_subject, queue_group, handler))

    def unsubscribe(self, token: int, timeout_seconds: float = 5.0) -> None:
        """Ends a subscription: when it returns, every message that the server had sent was handed over."""
        self._subscriptions.unsubscribe(token, timeout_seconds)

    def let_read(self, timeout_seconds: float) -> None:
        """Blocks until all that has come from NATS was read, at most so long: for who will keep the processor for long.

        NATS cuts off who leaves more than its ``max_pending`` (64 MB) unread, and what it had for them is lost.
        """
        self._bridge.let_read(timeout_seconds)

    # -- publish ---------------------------------------------------------------------------
    def publish(self, publication: Publication, reply_subject: str = "") -> None:
        """Publishes without waiting. Never blocks, never raises: what cannot be sent is counted and logged.

        The subjects must be plain ones (``is_plain_subject``); check what comes from a caller first.
        """
        self._outbox.post(publication, reply_subject)

    def request_all(
        self, publications: list[Publication], timeout_seconds: float
    ) -> list[Msg | BusUnavailable | BusRefused]:
        """Publishes all in one write and blocks for an answer to each; same order, errors as values."""
        return self._outbox.request_all(publications, timeout_seconds)

    def request(self, publication: Publication, timeout_seconds: float) -> Msg:
        """One request, one answer. Raises ``BusUnavailable``, ``BusRefused`` when nobody listens (code 503)."""
        (answer,) = self._outbox.request_all([publication], timeout_seconds)
        if isinstance(answer, Exception):
            raise answer
        if answer.status == "503":
            raise BusRefused(f"nobody answers on {publication.nats_subject}", 503)
        return answer

    def request_stream(self, publication: Publication, collector: Collector) -> str:
        """One request whose several answers go to ``collector`` in the bus's greenlet until it has the last.

        Returns a token for ``forget``, which must be called when the caller stops waiting.
        """
        return self._outbox.request_stream(publication, collector)

    def forget(self, token: str) -> None:
        """Drops a collector, whether or not its answers came."""
        self._outbox.forget(token)
