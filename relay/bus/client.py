"""The connection to NATS as greenlets see it: publish, request, serve; nothing else imports nats.

Owns the connection's whole life: it connects for as long as it takes, reconnects for ever, and a
client that nats-py closed for good (any ``-ERR`` but stale connection and permissions does that) is
replaced by a new one with the same subscriptions. Nothing is buffered while disconnected: a reply
or a record that goes out minutes late does more harm than one that is known to be lost.

Leaves to others: what is served (``bus.service``) and JetStream (``bus.jetstream``).

Sizes are checked before anything is handed to nats-py: headers count towards ``max_payload`` and a
control line holds 4,096 bytes; the server answers a longer one by closing the connection.
Requests never use ``nats.request`` and replies never ``msg.respond``: the first costs a future and
a timer each, the second echoes the caller's headers into the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import nats.errors
import nats.protocol.parser
from gevent.event import Event
from nats.aio.client import Client
from nats.aio.msg import Msg as NatsMsg
from nats.aio.subscription import Subscription

from relay.bus.bridge import Bridge
from relay.bus.nats_client import PASSWORD_REFUSED, TamedClient, in_words, is_hangup
from relay.errors import BusRefused, BusUnavailable

log = logging.getLogger("relay.bus")

MAX_SUBJECT_BYTES = 4000
"""Subject and reply subject together; the server's control line holds 4,096 bytes."""

PING_INTERVAL_SECONDS = 10
"""A dead peer is noticed after about three of these; nats-py's default needs 4 to 6 minutes."""

CONNECT_TIMEOUT_SECONDS = 5
WATCH_SECONDS = 1.0

_VIOLATION = re.compile(r'permissions violation for (subscription|publish) to "([^"]*)"', re.IGNORECASE)
_TOKENS = re.compile(r"[^\x00-\x20\x7f.*>]+(?:\.[^\x00-\x20\x7f.*>]+)*")


def is_plain_subject(nats_subject: str) -> bool:
    """Whether one may publish there: no wildcard token, no empty token, no white space, not too long."""
    return len(nats_subject.encode("utf-8", "replace")) <= MAX_SUBJECT_BYTES and bool(_TOKENS.fullmatch(nats_subject))


class Msg(NamedTuple):
    """A message as NATS delivered it."""

    nats_subject: str
    reply_subject: str
    payload: bytes
    headers: Mapping[str, str]

    @property
    def status(self) -> str:
        """The status of a message that the server itself made ('503' = nobody listens), '' otherwise."""
        return self.headers.get("Status", "")


class Publication(NamedTuple):
    """A message to be published."""

    nats_subject: str
    payload: bytes
    headers: dict[str, str] | None = None


class Collector(Protocol):
    """Takes the answers that arrive for one request."""

    def take(self, msg: Msg) -> bool:
        """Takes one answer; True when it was the last."""

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        """The request could not be published."""


class _Answers:
    """Gathers one answer for each of several publications and wakes one greenlet when all are there."""

    __slots__ = ("_missing", "answers", "done")

    def __init__(self, expected: int) -> None:
        self.answers: list[Msg | BusUnavailable | BusRefused | None] = [None] * expected
        self._missing = expected
        self.done = Event()

    def put(self, index: int, answer: Msg | BusUnavailable | BusRefused) -> None:
        if self.answers[index] is None:
            self.answers[index] = answer
            self._missing -= 1
            if not self._missing:
                self.done.set()


class _One:
    """The collector of one publication among several."""

    __slots__ = ("_answers", "_index")

    def __init__(self, answers: _Answers, index: int) -> None:
        self._answers = answers
        self._index = index

    def take(self, msg: Msg) -> bool:
        self._answers.put(self._index, msg)
        return True

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        self._answers.put(self._index, error)


class Subscribed(NamedTuple):
    """What is subscribed to, kept so that a new client can take over."""

    nats_subject: str
    queue_group: str
    handler: Callable[[Msg], None]


class Bus:
    """One connection to NATS. Its methods are for greenlets; handlers run in the bus's own greenlet.

    ``url`` may name several servers, separated by commas. ``on_change(is_connected, why)`` is called
    in the bus's greenlet and must not block; ``on_death()`` when only a new process can help.
    """

    def __init__(
        self,
        url: str,
        name: str,
        on_change: Callable[[bool, str], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._servers = [part.strip() for part in url.split(",") if part.strip()]
        self._name = name
        self._on_change = on_change
        self._on_death = on_death
        self._bridge = Bridge()
        self._nc: Client = TamedClient()
        self._outbox: deque[tuple[Publication, str, Collector | None]] = deque()
        self._outbox_filled: asyncio.Event | None = None
        self._is_flagged = False
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self._next_token = 0
        self._pending: dict[str, Collector] = {}
        self._subscribed: dict[int, tuple[Subscribed, Subscription | None]] = {}
        self._is_closing = False
        self._connected = Event()
        self._reconnect_wait_seconds = random.uniform(0.2, 0.5)  # a fleet must not come back in one beat
        self.last_error = ""
        """Why it is not connected, or what NATS complained about last."""
        self.dropped = 0
        """Publications that could not be handed to NATS since the process started."""

    # -- life ------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts connecting in the background, and goes on for ever until ``close``."""
        self._bridge.start()
        self._bridge.post(self._begin)

    def _begin(self) -> None:
        self._outbox_filled = asyncio.Event()
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._write())]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """Neither task ends by itself: without it nothing would be sent any more, so the process has to end."""
        if self._is_closing or task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("the bus has died of %r", error, exc_info=error)
        self._connected.clear()
        if self._on_death is not None:
            self._on_death()

    def wait_connected(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until connected; False when ``timeout_seconds`` went by first."""
        return bool(self._connected.wait(timeout=timeout_seconds))

    @property
    def is_connected(self) -> bool:
        """Whether NATS is connected right now."""
        return bool(self._connected.is_set())

    @property
    def max_payload_bytes(self) -> int:
        """What the server takes, headers and payload together."""
        return int(self._nc.max_payload)

    @property
    def server_version(self) -> str:
        """The version the connected server gave, '' before the first connection."""
        return str(self._nc._server_info.get("version", "")) if self._nc._server_info else ""

    @property
    def inbox_prefix(self) -> str:
        """Where answers to our own requests arrive; no caller may name it as a reply subject."""
        return self._inbox

    async def _stay_connected(self) -> None:
        while not self._is_closing:
            closed = asyncio.Event()
            try:
                await self._connect(closed)
            except (OSError, nats.errors.Error) as error:
                self._changed(False, in_words(error))
                await self._abandon()
                await asyncio.sleep(self._reconnect_wait_seconds)
                continue
            await self._watch(closed)
            self._changed(False, "NATS closed the connection for good; connecting anew")

    async def _watch(self, closed: asyncio.Event) -> None:
        """Returns when the client is closed for good; reconnects one whose reader has ended without a word."""
        while not closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closed.wait(), WATCH_SECONDS)
            reader = self._nc._reading_task
            if self._nc.is_connected and reader is not None and reader.done():
                log.error("the NATS client has stopped reading; reconnecting")
                await self._nc.force_reconnect()

    async def _connect(self, closed: asyncio.Event) -> None:
        """Connects a new client, for as long as it takes, and gives it all subscriptions."""
        nc = self._nc = TamedClient()

        async def on_closed() -> None:
            closed.set()

        async def on_disconnected() -> None:
            self._changed(False, "the connection to NATS was lost; reconnecting")

        async def on_reconnected() -> None:
            self._changed(True, "")

        async def on_error(error: Exception) -> None:
            if nc.is_connected:
                self.last_error = in_words(error)
                log.warning("NATS: %s", self.last_error)
                self._denied(self.last_error)
            elif not (self.last_error == PASSWORD_REFUSED and is_hangup(error)):
                self._changed(False, in_words(error))

        await nc.connect(
            servers=list(self._servers),
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
        )
        await nc.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        for token, (wanted, _) in list(self._subscribed.items()):
            self._subscribed[token] = (wanted, await self._subscribe(wanted))
        await asyncio.sleep(0)  # flush() writes its PING ahead of the SUBs that still wait in the client
        await nc.flush(timeout=CONNECT_TIMEOUT_SECONDS)
        self._changed(True, "")

    def _denied(self, text: str) -> None:
        """Tells when NATS refuses what serving needs: connected, and still no request comes or no reply goes out."""
        refused = _VIOLATION.search(text)
        if refused is None or self._on_change is None:
            return
        verb, nats_subject = refused[1].lower(), refused[2]
        if verb == "subscription":
            if any(
                wanted.queue_group and wanted.nats_subject == nats_subject for wanted, _ in self._subscribed.values()
            ):
                self._on_change(False, f"this user may not subscribe to {nats_subject}; grant it in NATS")
        elif not nats_subject.startswith("$"):  # without $JS and $KV mail still goes out, untracked
            prefix = nats_subject.partition(".")[0]
            self._on_change(False, f"this user may not publish to {prefix}.>; grant it in NATS")

    async def _abandon(self) -> None:
        try:
            await asyncio.wait_for(self._nc.close(), 1)
        except (OSError, nats.errors.Error, TimeoutError) as error:
            log.debug("closing a failed NATS client: %s", error)

    def _changed(self, is_connected: bool, why: str) -> None:
        if self._is_closing:
            return
        if is_connected:
            if not self._connected.is_set():
                log.info("NATS connected")
            self._connected.set()
        else:
            if self._connected.is_set() or why != self.last_error:
                log.warning("NATS at %s: %s", ", ".join(map(without_password, self._servers)), why)
            self._connected.clear()
        self.last_error = why
        if self._on_change is not None:
            self._on_change(is_connected, why)

    def close(self, timeout_seconds: float = 3.0) -> None:
        """Writes out what was published, closes the connection and ends the loop. Safe to call twice.

        Takes ``timeout_seconds`` at most.
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
        try:
            self._bridge.call(self._abandon(), max(0.1, (deadline - time.monotonic()) / 2))
        except BusUnavailable as error:
            log.debug("closing NATS: %s", error)
        self._connected.clear()
        self._bridge.stop(max(0.1, deadline - time.monotonic()))

    def flush(self, timeout_seconds: float = 3.0) -> None:
        """A barrier: returns when the server has taken all that was published before.

        Raises ``BusUnavailable`` when it does not confirm in time.
        """

        async def barrier() -> None:
            while self._outbox:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
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
        self._next_token += 1
        token = self._next_token
        wanted = Subscribed(nats_subject, queue_group, handler)

        async def begin() -> None:
            self._subscribed[token] = (wanted, None)
            if self._nc.is_connected or self._nc.is_reconnecting:
                self._subscribed[token] = (wanted, await self._subscribe(wanted))
            if self._nc.is_connected:
                await asyncio.sleep(0)
                await self._nc.flush(timeout=CONNECT_TIMEOUT_SECONDS)

        try:
            self._bridge.call(begin(), CONNECT_TIMEOUT_SECONDS + 1)
        except (OSError, nats.errors.Error, BusUnavailable, TimeoutError) as error:
            log.warning("subscribing to %s takes effect with the next connection: %s", nats_subject, in_words(error))
        return token

    async def _subscribe(self, wanted: Subscribed) -> Subscription:
        handler = wanted.handler

        async def deliver(msg: NatsMsg) -> None:
            handler(Msg(msg.subject, msg.reply, msg.data, msg.headers or _NO_HEADERS))

        return await self._nc.subscribe(wanted.nats_subject, queue=wanted.queue_group, cb=deliver)

    def unsubscribe(self, token: int, timeout_seconds: float = 5.0) -> None:
        """Ends a subscription: when it returns, every message that the server had sent was handed over."""
        _, subscription = self._subscribed.pop(token, (None, None))
        if subscription is None:
            return

        async def drain() -> None:
            if not self._nc.is_connected:
                self._nc._remove_sub(subscription._id)  # or the client would subscribe again when it reconnects
                return
            # drain() alone writes its PING before the UNSUB that waits in the client's buffer, so the
            # server may send more after the PONG; the UNSUB has to be on the wire first.
            await self._nc._send_unsubscribe(subscription._id)
            await asyncio.sleep(0)
            await subscription.drain()  # type: ignore[no-untyped-call]

        try:
            self._bridge.call(drain(), timeout_seconds)
        except (OSError, nats.errors.Error, BusUnavailable, TimeoutError) as error:
            log.warning("ending a subscription: %s", in_words(error))
            self._bridge.post(lambda: self._nc._remove_sub(subscription._id))

    # -- publish ---------------------------------------------------------------------------
    def publish(self, publication: Publication) -> None:
        """Publishes without waiting. Never blocks, never raises: what cannot be sent is counted and logged.

        The subject must be a plain one (``is_plain_subject``); check what comes from a caller first.
        """
        self._post(publication, "", None)

    def request_all(
        self, publications: list[Publication], timeout_seconds: float
    ) -> list[Msg | BusUnavailable | BusRefused]:
        """Publishes all in one write and blocks for an answer to each; same order, errors as values."""
        if not publications:
            return []
        answers = _Answers(len(publications))
        inboxes = []
        for index, publication in enumerate(publications):
            inbox = self._expect(_One(answers, index))
            inboxes.append(inbox)
            self._post(publication, inbox, self._pending[inbox])
        answers.done.wait(timeout_seconds)
        for inbox in inboxes:
            self._pending.pop(inbox, None)
        late = BusUnavailable(f"NATS did not answer within {timeout_seconds:g} s")
        return [late if answer is None else answer for answer in answers.answers]

    def request(self, publication: Publication, timeout_seconds: float) -> Msg:
        """One request, one answer. Raises ``BusUnavailable``, ``BusRefused`` when nobody listens (code 503)."""
        (answer,) = self.request_all([publication], timeout_seconds)
        if isinstance(answer, Exception):
            raise answer
        if answer.status == "503":
            raise BusRefused(f"nobody answers on {publication.nats_subject}", 503)
        return answer

    def request_stream(self, publication: Publication, collector: Collector) -> str:
        """One request whose several answers go to ``collector`` in the bus's greenlet until it has the last.

        Returns a token for ``forget``, which must be called when the caller stops waiting.
        """
        inbox = self._expect(collector)
        self._post(publication, inbox, collector)
        return inbox

    def forget(self, inbox: str) -> None:
        """Drops a collector, whether or not its answers came."""
        self._pending.pop(inbox, None)

    def _expect(self, collector: Collector) -> str:
        self._next_token += 1
        inbox = f"{self._inbox}.{self._next_token}"
        self._pending[inbox] = collector
        return inbox

    async def _on_answer(self, msg: NatsMsg) -> None:
        collector = self._pending.get(msg.subject)
        if collector is not None and collector.take(Msg(msg.subject, msg.reply, msg.data, msg.headers or _NO_HEADERS)):
            self._pending.pop(msg.subject, None)

    def _post(self, publication: Publication, inbox: str, collector: Collector | None) -> None:
        self._outbox.append((publication, inbox, collector))
        if not self._is_flagged:
            self._is_flagged = True
            self._bridge.post(self._flag_outbox)

    def _flag_outbox(self) -> None:
        self._is_flagged = False
        if self._outbox_filled is not None:
            self._outbox_filled.set()

    async def _write(self) -> None:
        """The one writer: publishes whatever is in the outbox, batch by batch."""
        filled = self._outbox_filled
        assert filled is not None
        while True:
            await filled.wait()
            filled.clear()
            while self._outbox:
                publication, inbox, collector = self._outbox.popleft()
                try:
                    self._check_size(publication)
                    await self._nc.publish(publication.nats_subject, publication.payload, inbox, publication.headers)
                except BusRefused as error:
                    self._not_sent(publication, collector, error)
                except (OSError, nats.errors.Error) as error:
                    self._not_sent(publication, collector, BusUnavailable(f"NATS: {in_words(error)}"))

    def _check_size(self, publication: Publication) -> None:
        size_bytes = len(publication.payload)
        if publication.headers:
            size_bytes += 14 + sum(len(key) + len(value.encode()) + 4 for key, value in publication.headers.items())
        if size_bytes > self._nc.max_payload:
            raise BusRefused(
                f"a message of {size_bytes} bytes exceeds the server's max_payload of {self._nc.max_payload}", 413
            )

    def _not_sent(
        self, publication: Publication, collector: Collector | None, error: BusUnavailable | BusRefused
    ) -> None:
        self.dropped += 1
        if collector is not None:
            collector.fail(error)
        else:
            log.warning("not published to %s: %s", publication.nats_subject, error)


_NO_HEADERS: Mapping[str, str] = {}


def without_password(url: str) -> str:
    """The URL, or several separated by commas, as it may be shown: user and password left out, whatever they hold."""
    return ",".join(re.sub(r"//.*@", "//", part) for part in url.split(","))
