"""The connection's whole life: it connects for as long as it takes, and reconnects for ever.

nats-py reconnects by itself after a lost connection. A client that it closed for good (any ``-ERR`` but
stale connection and permissions does that) is replaced here by a new one with the same subscriptions, and
one whose reader has ended without a word is reconnected. Nothing is buffered while disconnected.

Owns who is told: ``on_change`` when it comes and goes, and when NATS refuses what serving needs; ``on_lost`` and
``on_denied`` for the sake of those who wait for an answer. Everything here runs in the loop, in the bus's greenlet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Callable

import nats.errors
from gevent.event import Event

from relay import contract
from relay.bus.access import Access
from relay.bus.config import BusConfig
from relay.bus.nats_client import (
    CONNECT_TIMEOUT_SECONDS,
    TamedClient,
    in_words,
    is_hangup,
    is_refusal,
)
from relay.bus.subscriptions import Subscriptions

log = logging.getLogger("relay.bus")

PING_INTERVAL_SECONDS = 10
"""A dead peer is noticed after about three of these; nats-py's default needs 4 to 6 minutes."""

WATCH_SECONDS = 1.0

_VIOLATION = re.compile(r'permissions violation for (subscription|publish) to "([^"]*)"', re.IGNORECASE)


_NO_REPLIES = ("$", f"{contract.LOG_PREFIX}.", contract.PARKED_SUBJECT)
"""Where it is refused to write, mail still goes out, untracked: who wrote there is told, and goes on without."""


class Connection:
    """One connection to NATS, whichever client has it at the moment. ``stay`` is a task of the loop."""

    def __init__(
        self,
        config: BusConfig,
        name: str,
        inbox: str,
        subscriptions: Subscriptions,
        on_change: Callable[[bool, str], None] | None,
    ) -> None:
        self._config = config
        self._access = Access(config)
        self._name = name
        self._inbox = inbox
        self._subscriptions = subscriptions
        self._on_change = on_change
        self._is_closing = False
        self._reconnect_wait_seconds = random.uniform(0.2, 0.5)  # a fleet must not come back in one beat
        self._standing = ""
        """What NATS refuses on this connection although serving needs it."""
        self._is_refused = False
        """By the last try to connect: what follows is the server's hanging up."""
        self.nc = TamedClient(self._access)
        """nats-py's client of now; another one after a connection that was closed for good."""
        self.connected = Event()
        """Set while connected."""
        self.last_error = ""
        """Why it is not connected, or what NATS complained about last."""
        self.on_lost: Callable[[], None] | None = None
        """There is no connection (any more): what was asked over it is not answered."""
        self.inbox_refused = False
        """This user may not listen where answers arrive: none will."""
        self.on_inbox_refused: Callable[[], None] | None = None
        """That has just been said."""
        self.on_denied: Callable[[str], None] | None = None
        """This user may not publish to the subject."""

    def _words(self, error: BaseException) -> str:
        """One line for why there is no connection."""
        self._is_refused = is_refusal(error)
        if not self._is_refused:
            return in_words(error)
        told = in_words(error).lower()
        return self._access.why_refused() + ("" if "violation" in told else f" ({told})")

    async def stay(self) -> None:
        """Connects and stays connected until ``close``."""
        while not self._is_closing:
            closed = asyncio.Event()
            try:
                await self._connect(closed)
            except (OSError, nats.errors.Error) as error:
                self._changed(False, self._words(error))
                await self._abandon()
                await asyncio.sleep(self._reconnect_wait_seconds)
                continue
            await self._watch(closed)
            reason = self.nc.last_error
            why = self._words(reason) if reason is not None else "NATS closed the connection for good"
            self._changed(False, f"{why}; connecting anew")

    async def _connect(self, closed: asyncio.Event) -> None:
        """Connects a new client, for as long as it takes, and gives it all subscriptions."""
        nc = self.nc = TamedClient(self._access)
        self._forget_refusals()

        async def on_closed() -> None:
            closed.set()

        async def on_disconnected() -> None:
            self._forget_refusals()
            self._changed(False, "the connection to NATS was lost; reconnecting")

        async def on_reconnected() -> None:
            self._changed(True, "")

        async def on_error(error: Exception) -> None:
            if nc.is_connected:
                text = in_words(error)
                if text != self.last_error:  # a refused subject may be asked for with every question
                    log.warning("NATS: %s", text)
                self.last_error = text
                self._denied(text)
            elif not (self._is_refused and is_hangup(error)):
                self._changed(False, self._words(error))

        await nc.connect(
            servers=self._config.servers,
            name=self._name,
            error_cb=on_error,
            closed_cb=on_closed,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            max_reconnect_attempts=-1,
            reconnect_time_wait=self._reconnect_wait_seconds,  # type: ignore[arg-type]
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            ping_interval=PING_INTERVAL_SECONDS,
            pending_size=0,
            skip_subject_validation=True,  # is_plain_subject has looked at every subject that is not our own
            **nc.login_options(),
        )
        await self._subscriptions.move_to(nc)
        await asyncio.sleep(0)  # flush() writes its PING ahead of the SUBs that still wait in the client
        await nc.flush(timeout=CONNECT_TIMEOUT_SECONDS)
        self._changed(True, "")

    async def _watch(self, closed: asyncio.Event) -> None:
        """Returns when the client is closed for good; reconnects one whose reader has ended without a word."""
        while not closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), WATCH_SECONDS)
            reader = self.nc._reading_task
            if self.nc.is_connected and reader is not None and reader.done():
                log.error("the NATS client has stopped reading; reconnecting")
                await self.nc.force_reconnect()

    async def _abandon(self) -> None:
        try:
            await asyncio.wait_for(self.nc.close(), 1)
        # TypeError: what the transports of Python 3.12's first releases raise for a write when the connection is lost.
        except (OSError, nats.errors.Error, TimeoutError, TypeError) as error:
            log.debug("closing a failed NATS client: %s", error)

    async def close(self) -> None:
        """Closes for good and tells nobody."""
        self._is_closing = True
        self.connected.clear()
        await self._abandon()

    def _denied(self, text: str) -> None:
        """Tells when NATS refuses what serving needs: connected, and still no request comes or no reply goes out."""
        refused = _VIOLATION.search(text)
        if refused is None:
            return
        verb, nats_subject = refused[1].lower(), refused[2]
        if verb == "publish" and self.on_denied is not None:
            self.on_denied(nats_subject)
        if verb == "subscription":
            if nats_subject.startswith(f"{self._inbox}."):
                self.inbox_refused = True
                if self.on_inbox_refused is not None:
                    self.on_inbox_refused()
                self._cannot_serve(self.inbox_words)
            elif self._subscriptions.serves(nats_subject):
                self._cannot_serve(f"this user may not subscribe to {nats_subject}; grant it in NATS")
        elif not nats_subject.startswith(_NO_REPLIES):
            prefix = nats_subject.partition(".")[0]
            self._cannot_serve(f"this user may not publish to {prefix}.>; grant it in NATS")

    def _cannot_serve(self, why: str) -> None:
        self._standing = why
        if self._on_change is not None:
            self._on_change(False, why)

    def _forget_refusals(self) -> None:
        self._standing = ""
        self.inbox_refused = False

    @property
    def inbox_words(self) -> str:
        """What to do when the inbox is refused."""
        prefix = self._config.inbox_prefix
        return f"this user may not subscribe to {prefix}.>, so no answer arrives; grant it, or set NATS_INBOX_PREFIX"

    def _changed(self, is_connected: bool, why: str) -> None:
        if self._is_closing:
            return
        if is_connected:
            if not self.connected.is_set():
                log.info("NATS connected")
            self._is_refused = False
            self.connected.set()
        else:
            if self.connected.is_set() or why != self.last_error:
                log.warning("NATS at %s: %s", self._config.shown, why)
            self.connected.clear()
            if self.on_lost is not None:
                self.on_lost()
        self.last_error = why
        if self._on_change is not None:
            self._on_change(is_connected, why)
            if is_connected and self._standing:  # the subscriptions were refused before we called it connected
                self._on_change(False, self._standing)
