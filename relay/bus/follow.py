"""Following a stream: every message of it from a sequence on, then live, each once and in order.

An ephemeral consumer without acknowledgements, from which a batch is pulled whenever the one before has been
read: that bounds the memory of a slow reader. Where we are, we know ourselves. Whenever anything is doubtful
(a reconnect, a restarted server, a consumer that is gone, a hole in the consumer's own numbers, silence where
heartbeats were due) a new consumer starts behind the last message that came, so nothing is lost or repeated.

A server that lost its newest messages, or got an older store back, gives their sequences to others. So each new
consumer is followed by a look at the last message that came: when another stands in its place now, it is told as
a gap, and following goes on behind the last message of those it remembers that is still the same.

Sources: the JetStream wire API reference; ADR-17 (ordered consumer); ADR-37 (pulling with heartbeats).
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, NamedTuple, Protocol

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
REFUSED_SECONDS = 3.0
"""For so long a refusal may pass by itself: a server that has just started may not have its streams yet."""
UNSUBSCRIBE_SECONDS = 2.0
REMEMBERED = 1024
"""Messages that came last, to find out how far back another store differs."""

NO_MESSAGE_FOUND = 10037

_numbers = itertools.count(1)


class Api(Protocol):
    """``JetStream.api``."""

    def __call__(self, call: str, body: Mapping[str, Any] | None, timeout_seconds: float) -> dict[str, Any]: ...


class _Came(NamedTuple):
    """A message that came. No two of a stream were stored at the same sequence and time."""

    sequence: int
    nanoseconds: int


class Follower:
    """An iterator of a stream's messages that ends with ``close``, from whichever greenlet that is called.

    Waiting for the next message blocks for as long as it takes. NATS may go away and come back meanwhile;
    ``BusRefused`` is raised when it comes back without the stream, and that stays so for some seconds. Use it as a
    context manager, so that nothing is left behind whatever ends the loop.

    ``on_gap(expected, found)`` is called, by the greenlet that iterates, when the stream no longer has what comes
    next: limits, a purge, or a stream made anew or put back to an earlier state (``found`` is then not above
    ``expected``, and following goes on at ``found``). It is noticed whenever a batch is asked for. Which subjects the
    lost messages had, nobody knows any more: behind a filter it says only that some may have been meant.
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
        self._came: deque[_Came] = deque(maxlen=REMEMBERED)
        self._refused_since: float | None = None
        self._last_at_pull = 0
        """The stream's last sequence when the present pull began."""
        self._passed = 0
        """Up to here everything that the filter matches has come."""
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
                    self._ask()
                self._refused_since = None
            except (BusUnavailable, BusRefused) as error:
                if isinstance(error, BusRefused) and error.code != 503 and self._is_final(time.monotonic()):
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

    def _is_final(self, now: float) -> bool:
        """Whether NATS has refused for so long that it will not pass."""
        if self._refused_since is None:
            self._refused_since = now
        return now - self._refused_since >= REFUSED_SECONDS

    def _ask(self) -> None:
        """Asks for the next batch; after each step that blocks it may have been closed."""
        deadline = time.monotonic() + RETRY_SECONDS
        self._find_place(deadline)
        if not self._consumer and not self._closed.is_set():
            self._begin(deadline)
            self._check_last(deadline)
        if self._consumer and not self._closed.is_set():
            self._pull()
        else:
            self._news.set()  # nothing will come

    def _pause(self) -> None:
        self._closed.wait(random.uniform(0.1, 0.3))

    def _find_place(self, deadline: float) -> None:
        """Tells of a gap, when the stream no longer has the next message, and steps over it."""
        info = stream_info(self._api(f"STREAM.INFO.{self._stream}", None, seconds_left(deadline)))
        expected = self._next
        self._last_at_pull = info.last_sequence
        if info.created != self._created:
            self._created = info.created
            self._doubt()
            self._came.clear()
            self._go_on_at(info.first_sequence)
        elif info.last_sequence + 1 < expected:  # the server lost its newest messages in a crash
            self._doubt()
            self._go_on_at(min(self._behind_the_same(deadline), info.last_sequence + 1))
        elif info.first_sequence > max(expected, self._passed + 1):
            self._go_on_at(info.first_sequence)

    def _check_last(self, deadline: float) -> None:
        """Tells of a gap, when another message has the place of the last that came, and steps back.

        The consumer is there already: it lives in the server's memory and does not outlive the change of a store.
        """
        if self._came and self._time_of(self._came[-1].sequence, deadline) not in {None, self._came[-1].nanoseconds}:
            found = self._behind_the_same(deadline)
            self._doubt()
            self._go_on_at(found)

    def _go_on_at(self, found: int) -> None:
        expected, self._next = self._next, found
        self._passed = min(self._passed, found - 1)
        while self._came and self._came[-1].sequence >= found:
            self._came.pop()
        if self._on_gap is not None and not self._closed.is_set():
            self._on_gap(expected, found)

    def _behind_the_same(self, deadline: float) -> int:
        """The place behind the newest message that came and is still there, or of the oldest that is remembered."""
        came = list(self._came)
        same, other = 0, len(came)  # all before ``same`` are the same; two histories part once
        while same < other:
            middle = (same + other) // 2
            if self._time_of(came[middle].sequence, deadline) == came[middle].nanoseconds:
                same = middle + 1
            else:
                other = middle
        if same:
            return came[same - 1].sequence + 1
        return came[0].sequence if came else self._next

    def _time_of(self, sequence: int, deadline: float) -> int | None:
        """When the message was stored, in nanoseconds; None when the stream has none (any more)."""
        try:
            answer = self._api(f"STREAM.MSG.GET.{self._stream}", {"seq": sequence}, seconds_left(deadline))
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return None
            raise
        return _nanoseconds(str(answer["message"]["time"]))

    def _begin(self, deadline: float) -> None:
        # We name it, so that it can be dropped also when its making was not answered.
        name = self._consumer = secrets.token_hex(8)
        self._delivered = 0
        config = {
            "name": name,
            "filter_subject": self._filter,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._next,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": INACTIVE_SECONDS * NANOSECONDS,
        }
        body = {"stream_name": self._stream, "config": config}
        try:
            self._api(f"CONSUMER.CREATE.{self._stream}.{name}", body, seconds_left(deadline))
        finally:
            if self._consumer != name:  # dropped meanwhile, perhaps before the server had made it
                self._drop(name)

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
        name, self._consumer = self._consumer, ""
        if name:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if self._bus.is_connected:
            self._bus.publish(Publication(f"$JS.API.CONSUMER.DELETE.{self._stream}.{name}", b""))

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
                if msg.status == "408" and self._room:  # there was nothing more to send
                    self._passed = self._last_at_pull
                if msg.status == "503":
                    self._doubt()
                self._room = 0
        self._news.set()

    def _take(self, msg: Msg) -> None:
        consumer, sequence, number, nanoseconds, pending = _delivery(msg.reply_subject)
        if consumer != self._consumer or self._closed.is_set():
            return
        if number != self._delivered + 1:
            self._doubt()
            return
        self._delivered = number
        self._room -= 1
        self._next = sequence + 1
        self._came.append(_Came(sequence, nanoseconds))
        self._received.append(StoredMsg(msg.nats_subject, sequence, msg.payload, msg.headers, pending))


def _delivery(ack_subject: str) -> tuple[str, int, int, int, int]:
    """Consumer, stream sequence, the consumer's own number, when it was stored (in nanoseconds), how many follow.

    ``$JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>.<consumer sequence>.<time>.<pending>``, or with two
    more tokens (domain, account) after ``ACK`` and perhaps one at the end.
    """
    tokens = ack_subject.split(".")
    first = 2 if len(tokens) <= 9 else 4
    _, consumer, _, sequence, number, nanoseconds, pending = tokens[first : first + 7]
    return consumer, int(sequence), int(number), int(nanoseconds), int(pending)


def _nanoseconds(time_text: str) -> int:
    """Since 1970, of ``2026-11-22T05:17:09.123456789Z``; the server leaves zeros at the end out."""
    seconds, _, fraction = time_text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * NANOSECONDS + int(fraction.ljust(9, "0"))
