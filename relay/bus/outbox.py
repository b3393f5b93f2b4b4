"""What goes out, and the answers that are awaited: one queue, one writer, one inbox.

Owns the sizes: they are checked before anything is handed to nats-py. Headers count towards
``max_payload`` and a control line holds 4,096 bytes; the server answers a longer one by closing the
connection. Nothing is kept for a later connection: a reply or a record that goes out minutes late
does more harm than one that is known to be lost.

Requests never use ``nats.request``, which costs a future and a timer each: a request is a publication
whose reply subject is ``<inbox>.<number>``, and one table says who waits for which number, and what was asked.
Whoever stops waiting, for whatever reason, takes its numbers out of the table. Who waits for what can no longer
be answered, because the connection is lost or NATS refused the subject, is told at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

import nats.errors
from gevent.event import Event

from relay.bus.bridge import Bridge
from relay.bus.connection import Connection
from relay.bus.messages import Msg, Publication
from relay.bus.nats_client import in_words
from relay.errors import BusRefused, BusUnavailable

log = logging.getLogger("relay.bus")

DENIED = 403
"""Of a ``BusRefused``: this user may not publish there."""


class Collector(Protocol):
    """Takes the answers that arrive for one request."""

    def take(self, msg: Msg) -> bool:
        """Takes one answer; True when it was the last."""

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        """The request could not be published, or is not going to be answered."""


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


class Outbox:
    """Greenlets put publications in; ``write``, a task of the loop, sends them batch by batch."""

    def __init__(self, bridge: Bridge, connection: Connection, inbox: str) -> None:
        self._bridge = bridge
        self._connection = connection
        self._inbox = inbox
        self._queue: deque[tuple[Publication, str, Collector | None]] = deque()
        self._filled = asyncio.Event()
        self._is_flagged = False
        self._next_number = 0
        self._pending: dict[str, tuple[str, Collector]] = {}
        self._is_closed = False
        self.dropped = 0
        """Publications that could not be handed to NATS since the process started."""
        connection.on_lost = self._on_lost
        connection.on_denied = self._on_denied

    @property
    def is_empty(self) -> bool:
        """Whether everything was handed to the client."""
        return not self._queue

    @property
    def waiting(self) -> int:
        """How many requests wait for an answer."""
        return len(self._pending)

    def post(self, publication: Publication, reply_subject: str = "", collector: Collector | None = None) -> None:
        """Queues a publication. Never blocks, never raises: ``collector`` is told what cannot be sent, else the log."""
        if self._is_closed:
            self._not_sent(publication, collector, BusUnavailable("the connection to NATS was closed"))
            return
        self._queue.append((publication, reply_subject, collector))
        if not self._is_flagged:
            self._is_flagged = True
            self._bridge.post(self._flag)

    def request_all(
        self, publications: list[Publication], timeout_seconds: float
    ) -> list[Msg | BusUnavailable | BusRefused]:
        """Publishes all in one write and blocks for an answer to each; same order, errors as values."""
        if not publications:
            return []
        answers = _Answers(len(publications))
        inboxes = []
        try:
            for index, publication in enumerate(publications):
                collector = _One(answers, index)
                inbox = self._expect(publication, collector)
                inboxes.append(inbox)
                self.post(publication, inbox, collector)
            answers.done.wait(timeout_seconds)
        finally:
            for inbox in inboxes:
                self._pending.pop(inbox, None)
        late = BusUnavailable(f"NATS did not answer within {timeout_seconds:.3g} s")
        return [late if answer is None else answer for answer in answers.answers]

    def request_stream(self, publication: Publication, collector: Collector) -> str:
        """One request whose several answers go to ``collector`` until it has the last; a token for ``forget``."""
        inbox = self._expect(publication, collector)
        self.post(publication, inbox, collector)
        return inbox

    def forget(self, inbox: str) -> None:
        """Drops a collector, whether or not its answers came."""
        self._pending.pop(inbox, None)

    def _expect(self, publication: Publication, collector: Collector) -> str:
        self._next_number += 1
        inbox = f"{self._inbox}.{self._next_number}"
        self._pending[inbox] = (publication.nats_subject, collector)
        return inbox

    def close(self) -> None:
        """Takes no more, and tells everyone who still waits."""
        self._is_closed = True
        self._fail_all(BusUnavailable("the connection to NATS was closed"))

    def _fail_all(self, error: BusUnavailable) -> None:
        waiting, self._pending = self._pending, {}
        for _, collector in waiting.values():
            collector.fail(error)

    # -- in the loop -----------------------------------------------------------------------
    def on_answer(self, msg: Msg) -> None:
        """An answer has come to our inbox."""
        _, collector = self._pending.get(msg.nats_subject, ("", None))
        if collector is not None and collector.take(msg):
            self._pending.pop(msg.nats_subject, None)

    def _on_lost(self) -> None:
        self._fail_all(BusUnavailable("the connection to NATS was lost"))

    def _on_denied(self, nats_subject: str) -> None:
        for inbox, (asked, collector) in list(self._pending.items()):
            if asked.lower() == nats_subject.lower():
                del self._pending[inbox]
                collector.fail(BusRefused(f"this user may not publish to {asked}; grant it in NATS", DENIED))

    def _flag(self) -> None:
        self._is_flagged = False
        self._filled.set()

    async def write(self) -> None:
        """The one writer; never returns."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            nc = self._connection.nc
            while self._queue:
                publication, reply_subject, collector = self._queue.popleft()
                try:
                    nc.put(publication, reply_subject)
                except (BusRefused, BusUnavailable) as error:
                    self._not_sent(publication, collector, error)
            try:
                await nc.send()
            except (OSError, nats.errors.Error) as error:
                log.warning("writing to NATS: %s", in_words(error))

    def _not_sent(
        self, publication: Publication, collector: Collector | None, error: BusUnavailable | BusRefused
    ) -> None:
        self.dropped += 1
        if collector is not None:
            collector.fail(error)
        else:
            log.warning("not published to %s: %s", publication.nats_subject, error)
