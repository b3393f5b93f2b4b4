"""The client's line to NATS: one question, one answer, or an error that says whether the question may have arrived.

Owns the connection, or borrows one. What nats-py's own ``request`` leaves out, and why it is not used: an answer that
cannot come any more, because the connection was lost or NATS refuses the subject, ends the wait at once; nothing is
put into the buffer that nats-py sends after it has reconnected; a client that it closed for good is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.client import JetStreamContext

from relay.client.errors import NoAnswer, NoResponders, NotConnected, NotPermitted, RelayClientError, RequestTooLarge

log = logging.getLogger("relay.client")

OUR_DEFAULTS: Final[Mapping[str, Any]] = {
    "name": "relay client",
    "connect_timeout": 5,
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.5,
    "ping_interval": 20,
}
"""Where they differ from nats-py's: it gives up after 60 attempts, and notices a dead peer after 4 minutes or more."""

CALLBACKS: Final = ("error_cb", "closed_cb", "disconnected_cb")
"""Options of ``nats.connect`` that the link needs for itself; the caller's are called as well."""

CLOSE_SECONDS: Final = 2.0

_VIOLATION: Final = re.compile(r'permissions violation for (subscription|publish) to "([^"]*)"', re.IGNORECASE)


class _Asked(NamedTuple):
    """A question without an answer so far."""

    answer: asyncio.Future[Msg]
    nats_subject: str
    may_repeat: bool
    """Whether nothing is lost when it is given up early."""


class Link:
    """One connection to NATS. All of it runs in one asyncio loop, the one it is first used in."""

    def __init__(
        self,
        servers: str | Sequence[str],
        connection: Client | None,
        connect_timeout_seconds: float,
        options: Mapping[str, Any],
    ) -> None:
        parts = servers.split(",") if isinstance(servers, str) else servers
        self._servers = [part.strip() for part in parts if part.strip()]
        self._is_ours = connection is None
        self._nc = connection
        self._connect_timeout_seconds = connect_timeout_seconds
        self._options = {**OUR_DEFAULTS, **options}
        self._theirs = {name: self._options.pop(name, None) for name in CALLBACKS}
        self._inbox: Subscription | None = None
        self._inbox_prefix = ""
        self._numbers = count(1)
        self._asked: dict[str, _Asked] = {}
        self._making = asyncio.Lock()
        self._last_error = ""
        self.is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "connected" if self._nc and self._nc.is_connected else "not connected"
        return f"<Link: {state}, {len(self._asked)} unanswered>"

    async def ask(self, nats_subject: str, request: bytes, wait_seconds: float, *, may_repeat: bool) -> bytes:
        """The answer, within ``wait_seconds``.

        ``may_repeat``: whether to end the wait when the connection is lost; the answer may still come over the next.
        Raises ``NotConnected``, ``NoResponders``, ``RequestTooLarge`` (nothing has left), ``NotPermitted`` and
        ``NoAnswer``.
        """
        nc = self._at_hand()
        if nc is None:
            try:
                async with asyncio.timeout(wait_seconds):
                    nc = await self._ready()
            except TimeoutError as error:
                raise self._not_connected() from error
        if len(request) > nc.max_payload:
            raise RequestTooLarge(
                "request too large",
                detail=f"{len(request)} bytes, and NATS takes {nc.max_payload} in one message; "
                "put attachments into a bucket with put_object, or the whole mail with put_mail",
            )
        token = str(next(self._numbers))
        asked = _Asked(asyncio.get_running_loop().create_future(), nats_subject, may_repeat)
        self._asked[token] = asked
        try:
            async with asyncio.timeout(wait_seconds):
                await self._publish(nc, nats_subject, request, f"{self._inbox_prefix}.{token}")
                msg = await asked.answer
        except TimeoutError as error:
            detail = f"none within {wait_seconds:.3g} s"
            raise NoAnswer("no answer", detail=detail, retryable=may_repeat) from error
        finally:
            del self._asked[token]
        if not msg.data and msg.headers and msg.headers.get("Status") == "503":
            raise NoResponders("no responders", detail=f"nobody serves {nats_subject} at the moment")
        return msg.data

    async def connect(self) -> None:
        """Connects, unless it is connected. Raises ``NotConnected``."""
        await self._ready()

    async def jetstream(self, prefix: str) -> JetStreamContext:
        """JetStream over this connection, its API under ``prefix``. Raises ``NotConnected``."""
        return (await self._ready()).jetstream(prefix=prefix)

    async def close(self) -> None:
        """Closes for good. Who still waits for an answer is told that none will come. A borrowed connection stays."""
        self.is_closed = True
        self._give_up("the client was closed", only_repeatable=False)
        nc, inbox = self._nc, self._inbox
        if nc is None:
            return
        if self._is_ours:
            await _close(nc)
        elif inbox is not None:
            with contextlib.suppress(nats.errors.Error):
                await inbox.unsubscribe()

    async def _publish(self, nc: Client, nats_subject: str, request: bytes, inbox: str) -> None:
        try:
            await nc.publish(nats_subject, request, reply=inbox)
        except nats.errors.Error as error:  # raised before anything is queued
            raise NotConnected("not connected", detail=_in_words(error)) from error

    def _at_hand(self) -> Client | None:
        """The client, if it may be used as it is."""
        nc = self._nc
        is_fit = nc is not None and nc.is_connected and self._inbox is not None and not self.is_closed
        return nc if is_fit else None

    async def _ready(self) -> Client:
        """A connected client with our inbox."""
        if (nc := self._at_hand()) is not None:
            return nc
        async with self._making:
            if self.is_closed:
                raise NotConnected("the client is closed", retryable=False)
            nc = self._nc
            if self._is_ours and (nc is None or nc.is_closed):
                nc = await self._new()
            if nc is None or not nc.is_connected:
                raise self._not_connected()
            if self._inbox is None:
                prefix = nc.new_inbox()
                self._inbox = await nc.subscribe(f"{prefix}.*", cb=self._take)
                self._inbox_prefix = prefix
            return nc

    def _not_connected(self) -> NotConnected:
        return NotConnected("not connected", detail=self._last_error or "no connection to NATS")

    async def _new(self) -> Client:
        """A connected client of our own."""
        nc = Client()
        self._inbox = None
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                await nc.connect(
                    servers=list(self._servers),
                    error_cb=self._on_error,
                    disconnected_cb=self._on_lost,
                    closed_cb=self._on_closed,
                    **self._options,
                )
        except (OSError, nats.errors.Error, asyncio.CancelledError) as error:  # a TimeoutError is an OSError
            await _close(nc)
            if isinstance(error, asyncio.CancelledError):
                raise
            self._last_error = self._last_error or _in_words(error)
            raise self._not_connected() from error
        self._last_error = ""
        self._nc = nc
        return nc

    async def _take(self, msg: Msg) -> None:
        asked = self._asked.get(msg.subject.rpartition(".")[2])
        if asked is not None and not asked.answer.done():
            asked.answer.set_result(msg)

    def _give_up(self, why: str, *, only_repeatable: bool) -> None:
        for asked in list(self._asked.values()):
            if asked.may_repeat or not only_repeatable:
                self._fail(asked, NoAnswer("no answer", detail=why, retryable=asked.may_repeat))

    @staticmethod
    def _fail(asked: _Asked, error: RelayClientError) -> None:
        if not asked.answer.done():
            asked.answer.set_exception(error)

    # -- what nats-py tells ---------------------------------------------------------------------------------------

    async def _on_lost(self) -> None:
        self._give_up("the connection to NATS was lost", only_repeatable=True)
        await self._pass_on("disconnected_cb")

    async def _on_closed(self) -> None:
        self._give_up("NATS closed the connection", only_repeatable=True)
        await self._pass_on("closed_cb")

    async def _on_error(self, error: Exception) -> None:
        self._last_error = _in_words(error)
        refused = _VIOLATION.search(self._last_error)
        if refused is not None:
            # nats-py writes errors of the server in lower case.
            verb, nats_subject = refused[1].lower(), refused[2].lower()
            is_inbox = verb == "subscription" and nats_subject == f"{self._inbox_prefix}.*".lower()
            if is_inbox:
                self._inbox = None  # subscribed anew, the next question learns it at once
            for asked in list(self._asked.values()):
                if is_inbox or (verb == "publish" and nats_subject == asked.nats_subject.lower()):
                    self._fail(asked, NotPermitted("not permitted", detail=self._last_error))
        if self._theirs["error_cb"] is None:
            log.warning("NATS: %s", self._last_error)
        await self._pass_on("error_cb", error)

    async def _pass_on(self, name: str, *arguments: Any) -> None:
        callback: Callable[..., Awaitable[None]] | None = self._theirs[name]
        if callback is not None:
            await callback(*arguments)


async def _close(nc: Client) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await nc.close()
    except (OSError, nats.errors.Error) as error:
        log.debug("closing a NATS client: %s", _in_words(error))


def _in_words(error: BaseException) -> str:
    """One line; several errors have an empty ``str``."""
    return str(error).removeprefix("nats: ").strip().strip("'") or type(error).__name__
