"""Serving one NATS subject: every request gets exactly one reply, whatever it holds.

Owns the per-request boundary: where replies may go, how many requests are in hand, one greenlet per
request, and the one broad ``except`` of a worker. Leaves what a request means to the handler.

A reply goes only to a subject under the allowed prefixes, and never to our own inbox: a caller who may
publish only requests could otherwise have us overwrite a record, forge a fact, or acknowledge our own
writes, by naming that subject as the reply subject.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gevent
from gevent import get_hub, getcurrent
from gevent.event import Event

from relay.bus.client import Bus, Msg, Publication
from relay.bus.messages import ReplyRule
from relay.redaction import without_addresses

log = logging.getLogger("relay.bus")

MAX_RESTING = 100
LARGE_BYTES = 65_536
"""Before a request of this size is begun, NATS is read: one of 1 MB takes 10 ms to decode and to compose, and dozens of
them in a row would keep the bus from reading for so long that NATS cuts it off, and loses what it had for it."""
LET_READ_SECONDS = 0.2
"""Should NATS send without a pause."""


class Gate(Protocol):
    """Decides whether a request is taken, and counts what is in hand."""

    backlog: int

    def take(self, now: float, size_bytes: int, patience_seconds: float) -> bool:
        """Whether the request is taken. If so, ``finish`` must follow."""

    def finish(self, now: float, size_bytes: int) -> None:
        """A request that was taken is answered."""

    def leave(self, now: float, size_bytes: int) -> None:
        """A request that was taken gives up its place unanswered; ``finish`` does not follow."""


class Handler(NamedTuple):
    """What answers the requests of one subject. The functions return the reply as JSON bytes."""

    answer: Callable[[Msg, float, Callable[[Msg], None]], bytes]
    """``answer(msg, deadline, step_aside)``: ``deadline`` on ``time.monotonic()``. It may block its greenlet.

    ``step_aside(msg)`` says that from now on the request only waits for another: it gives up its place in the gate.
    """
    overloaded: bytes
    """The reply to a request that is not taken."""
    broken: bytes
    """The reply when ``answer`` raised: a bug of ours."""
    too_large: bytes
    """The reply when the answer exceeds the server's max_payload."""


class Service:
    """One subscription of a queue group and the requests in hand."""

    def __init__(
        self,
        bus: Bus,
        *,
        nats_subject: str,
        queue_group: str,
        handler: Handler,
        gate: Gate,
        patience_seconds: float,
        reply_prefixes: tuple[str, ...],
    ) -> None:
        self._bus = bus
        self._nats_subject = nats_subject
        self._queue_group = queue_group
        self._handler = handler
        self._gate = gate
        self._patience_seconds = patience_seconds
        self._reply_rule = ReplyRule(reply_prefixes, bus.inbox_prefix)
        self._todo: deque[tuple[Msg, float]] = deque()
        self._large: deque[tuple[Msg, float]] = deque()
        """Large requests that are not begun."""
        self._is_feeding = False
        self._aside: set[int] = set()
        """The identities of those in hand that gave up their places: they live as long as they are served."""
        self._resting: list[Any] = []
        """Greenlets that wait for the next request."""
        self._token: int | None = None
        self._is_serving = False
        self._nothing_in_hand: Event | None = None
        """Of who waits for that."""
        self._busy_seconds = 0.0
        self.in_hand = 0
        self.answered = 0
        self.broken = 0
        """Answered with the handler's ``broken``: a bug of ours."""
        self.last_error = ""
        self.refused = 0
        """Answered ``overloaded``."""
        self.dropped = 0
        """Dropped because the reply subject is not an allowed one."""

    @property
    def nats_subject(self) -> str:
        """What it serves."""
        return self._nats_subject

    @property
    def queue_group(self) -> str:
        """In which queue group."""
        return self._queue_group

    def stats(self) -> dict[str, Any]:
        """The numbers of an endpoint in ADR-32's stats; times in nanoseconds."""
        nanoseconds = int(self._busy_seconds * 1e9)
        return {
            "num_requests": self.answered,
            "num_errors": self.broken,
            "last_error": self.last_error,
            "processing_time": nanoseconds,
            "average_processing_time": nanoseconds // self.answered if self.answered else 0,
        }

    def start(self) -> None:
        """Joins the queue group."""
        self._is_serving = True
        self._token = self._bus.subscribe(self._nats_subject, self._queue_group, self._on_msg)

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Leaves the queue group; what the server had already sent is still answered."""
        if self._token is not None:
            self._bus.unsubscribe(self._token, timeout_seconds)
            self._token = None
        self._is_serving = False

    def wait_answered(self, timeout_seconds: float) -> int:
        """Blocks until every request in hand is answered; returns how many are left at the deadline."""
        if self.in_hand:
            if self._nothing_in_hand is None:
                self._nothing_in_hand = Event()
            self._nothing_in_hand.wait(timeout_seconds)
        return self.in_hand

    def _on_msg(self, msg: Msg) -> None:
        """Runs in the bus's greenlet: decides and hands over, nothing more."""
        if msg.reply_subject and not self._reply_rule.allows(msg.reply_subject):
            self.dropped += 1
            log.warning(
                "dropped a request on %s: its reply subject %.100r is not under RELAY_REPLY_PREFIXES",
                msg.nats_subject,
                msg.reply_subject,
            )
            return
        now = time.monotonic()
        if not self._is_serving or not self._gate.take(now, len(msg.payload), self._patience_seconds):
            self.refused += 1
            self._reply(msg.reply_subject, self._handler.overloaded)
            return
        self.in_hand += 1
        if len(msg.payload) < LARGE_BYTES:
            self._begin(msg, now + self._patience_seconds)
            return
        self._large.append((msg, now + self._patience_seconds))
        if not self._is_feeding:
            self._is_feeding = True
            gevent.spawn(self._feed)

    def _begin(self, msg: Msg, deadline: float) -> None:
        self._todo.append((msg, deadline))
        if self._resting:
            get_hub().loop.run_callback(self._resting.pop().switch)
        else:
            gevent.spawn(self._work)

    def _feed(self) -> None:
        """Begins the large requests one by one, and has the bus read before each."""
        while self._large:
            self._bus.let_read(LET_READ_SECONDS)
            self._begin(*self._large.popleft())
        self._is_feeding = False

    def _work(self) -> None:
        """One greenlet's life: request after request. A new greenlet for each would cost 16 KB of fresh memory each."""
        while True:
            while self._todo:
                self._serve(*self._todo.popleft())
            if len(self._resting) >= MAX_RESTING:
                return
            self._resting.append(getcurrent())
            get_hub().switch()

    def _serve(self, msg: Msg, deadline: float) -> None:
        reply = self._handler.broken
        try:
            reply = self._handler.answer(msg, deadline, self._step_aside)
        except Exception as error:
            self.broken += 1
            self.last_error = without_addresses(f"{type(error).__name__}: {error}")
            log.exception("a request on %s could not be answered", msg.nats_subject)
        finally:
            now = time.monotonic()
            self._busy_seconds += now - (deadline - self._patience_seconds)
            if self._aside and id(msg) in self._aside:
                self._aside.discard(id(msg))
            else:
                self._gate.finish(now, len(msg.payload))
            self._reply(msg.reply_subject, reply)
            self.answered += 1
            self.in_hand -= 1
            if self._nothing_in_hand is not None and not self.in_hand:
                self._nothing_in_hand.set()
                self._nothing_in_hand = None

    def _step_aside(self, msg: Msg) -> None:
        """Once or more often while ``msg`` is served."""
        if id(msg) not in self._aside:
            self._aside.add(id(msg))
            self._gate.leave(time.monotonic(), len(msg.payload))

    def _reply(self, reply_subject: str, reply: bytes) -> None:
        if not reply_subject:
            return
        if len(reply) > self._bus.max_payload_bytes:
            reply = self._handler.too_large
        self._bus.publish(Publication(reply_subject, reply))
