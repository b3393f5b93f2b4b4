"""Following a stream: every message of it from a sequence on, then live, each once and in order.

An ephemeral consumer without acknowledgements, from which a batch is pulled whenever the one before has been
read: that bounds the memory of a slow reader. Where we are, we know ourselves. Whenever anything is doubtful
(a reconnect, a restarted server, a consumer that is gone, a hole in the consumer's own numbers, silence where
heartbeats were due) a new consumer starts behind the last message that came, so nothing is lost or repeated.

Sources: the JetStream wire API reference; ADR-17 (ordered consumer); ADR-37 (pulling with heartbeats).
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

import orjson
from gevent.event import Event

from relay.bus.client import Bus, Msg, Publication, seconds_left
from relay.bus.stored import StoredMsg, stream_info
from relay.errors import BusRefused, BusUnavailable

NANOSECONDS = 1_000_000_000
BATCH = 256
"""Messages that one pull asks for, so held for a reader that is slow."""
BATCH_MAX_PAYLOADS = 2
"""What they may take together, in messages of the largest size that the server takes."""
EXPIRES_SECONDS = 30
HEARTBEAT_SECONDS = 1
SILENCE_SECONDS = 2.5
"""Two heartbeats were missed."""
INACTIVE_SECONDS = 60
"""After which the server drops a consumer from which nothing is pulled."""
RETRY_SECONDS = 2.0
"""For one attempt to begin anew."""
UNSUBSCRIBE_SECONDS = 2.0

_numbers = itertools.count(1)


class Api(Protocol):
    """``JetStream.api``."""

    def __call__(self, call: str, body: Mapping[str, Any] | None, timeout_seconds: float) -> dict[str, Any]: ...


class Follower:
    """An iterator of a stream's messages that ends with ``close``, from whichever greenlet that is called.

    Waiting for the next message blocks for as long as it takes. NATS may go away and come back meanwhile;
    ``BusRefused`` is raised when it comes back without the stream. Use it as a context manager, so that nothing is
    left behind whatever ends the loop.

    ``on_gap(expected, found)`` is called, by the greenlet that iterates, when the stream no longer has what comes
    next: limits, a purge, or a stream made anew (``found`` is then not above ``expected``, and following goes on at
    ``found``). It is noticed whenever a batch is asked for.
    """

    def __init__(
        self,
        bus: Bus,
        api: Api,
        stream: str,
        nats_subject_filter: str,
        on_gap: Callable[[int, int], None] | None,
    ) -> None:
        self._bus = bus
        self._api = api
        self._stream = stream
        self._filter = nats_subject_filter
        self._on_gap = on_gap
        self._inbox = f"{bus.inbox_prefix}.follow.{next(_numbers)}"
        self._token: int | None = None
        self._received: deque[StoredMsg] = deque()
        self._news = Event()
        """Something came, or it was closed."""
        self._closed = Event()
        self._created = ""
        self._next = 1
        """The sequence after the last message that came."""
        self._consumer = ""
        """'' when a new one has to be made."""
        self._delivered = 0
        """The consumer's own number of the last message that came."""
        self._pulls = 0
        self._room = 0
        """How many messages the present pull may still bring."""
        self._is_refused = False
        """The present pull brought nothing but a refusal: the next one waits a little."""

    def open(self, from_sequence: int | None, timeout_seconds: float) -> None:
        """Begins. Raises ``BusUnavailable`` and ``BusRefused``, and has then left nothing behind."""
        deadline = time.monotonic() + timeout_seconds
        try:
            info = stream_info(self._api(f"STREAM.INFO.{self._stream}", None, timeout_seconds))
            self._created = info.created
            self._next = info.last_sequence + 1 if from_sequence is None else max(1, from_sequence)
            self._token = self._bus.subscribe(f"{self._inbox}.*", "", self._on_msg)
            self._begin(deadline)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[StoredMsg]:
        return self

    def __next__(self) -> StoredMsg:
        while not self._closed.is_set():
            if self._received:
                return self._received.popleft()
            self._news.clear()
            if self._is_refused:
                self._pause()
            try:
                if not self._room:
                    deadline = time.monotonic() + RETRY_SECONDS
                    self._find_place(deadline)
                    if not self._consumer:
                        self._begin(deadline)
                    self._pull()
            except (BusUnavailable, BusRefused) as error:
                if isinstance(error, BusRefused) and error.code != 503:
                    raise
                self._doubt()
                self._pause()
                continue
            if not self._news.wait(SILENCE_SECONDS):
                self._doubt()
        raise StopIteration

    def close(self) -> None:
        """Ends the iteration and leaves nothing behind. Safe to call twice, and from any greenlet."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._news.set()
        self._received.clear()
        self._drop_consumer()
        if self._token is not None:
            self._bus.unsubscribe(self._token, UNSUBSCRIBE_SECONDS)

    def _pause(self) -> None:
        self._closed.wait(random.uniform(0.1, 0.3))

    def _find_place(self, deadline: float) -> None:
        """Tells of a gap, when the stream no longer has the next message, and steps over it."""
        info = stream_info(self._api(f"STREAM.INFO.{self._stream}", None, seconds_left(deadline)))
        expected = self._next
        if info.created != self._created:
            self._created = info.created
            self._doubt()
            found = info.first_sequence
        elif info.last_sequence + 1 < expected:  # the server lost its newest messages in a crash
            self._doubt()
            found = info.last_sequence + 1
        elif info.first_sequence > expected:
            found = info.first_sequence
        else:
            return
        self._next = found
        if self._on_gap is not None:
            self._on_gap(expected, found)

    def _begin(self, deadline: float) -> None:
        # We name it, so that it can be dropped also when its making was not answered.
        self._consumer = secrets.token_hex(8)
        self._delivered = 0
        config = {
            "name": self._consumer,
            "filter_subject": self._filter,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._next,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": INACTIVE_SECONDS * NANOSECONDS,
        }
        body = {"stream_name": self._stream, "config": config}
        self._api(f"CONSUMER.CREATE.{self._stream}.{self._consumer}", body, seconds_left(deadline))

    def _pull(self) -> None:
        self._pulls += 1
        self._room = BATCH
        self._is_refused = False
        request = {
            "batch": BATCH,
            "max_bytes": BATCH_MAX_PAYLOADS * self._bus.max_payload_bytes,
            "expires": EXPIRES_SECONDS * NANOSECONDS,
            "idle_heartbeat": HEARTBEAT_SECONDS * NANOSECONDS,
        }
        nats_subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        self._bus.publish(Publication(nats_subject, orjson.dumps(request)), f"{self._inbox}.{self._pulls}")

    def _doubt(self) -> None:
        """What the present consumer still sends is not taken any more; a new one begins at ``_next``."""
        self._drop_consumer()
        self._room = 0

    def _drop_consumer(self) -> None:
        if self._consumer and self._bus.is_connected:
            self._bus.publish(Publication(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}", b""))
        self._consumer = ""

    def _on_msg(self, msg: Msg) -> None:
        """Runs in the bus's greenlet. Messages of the stream have a reply subject, what the server says has none."""
        if msg.reply_subject:
            self._take(msg)
        elif msg.nats_subject == f"{self._inbox}.{self._pulls}":
            if msg.status == "100":  # heartbeat: nothing new, and so much was sent
                if int(msg.headers.get("Nats-Last-Consumer", 0)) > self._delivered:
                    self._doubt()
            else:  # the pull has ended: its time is over (408), it is full (409), or the consumer is gone (409, 503)
                self._is_refused = self._room == BATCH and msg.status != "408"
                if msg.status == "503":
                    self._doubt()
                self._room = 0
        self._news.set()

    def _take(self, msg: Msg) -> None:
        consumer, sequence, number, pending = _delivery(msg.reply_subject)
        if consumer != self._consumer or self._closed.is_set():
            return
        if number != self._delivered + 1:
            self._doubt()
            return
        self._delivered = number
        self._room -= 1
        self._next = sequence + 1
        self._received.append(StoredMsg(msg.nats_subject, sequence, msg.payload, msg.headers, pending))


def _delivery(ack_subject: str) -> tuple[str, int, int, int]:
    """Consumer, stream sequence, the consumer's own number, how many follow.

    ``$JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>.<consumer sequence>.<time>.<pending>``, or with two
    more tokens (domain, account) after ``ACK`` and perhaps one at the end.
    """
    tokens = ack_subject.split(".")
    first = 2 if len(tokens) <= 9 else 4
    _, consumer, _, sequence, number, _, pending = tokens[first : first + 7]
    return consumer, int(sequence), int(number), int(pending)
