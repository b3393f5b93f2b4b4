"""What goes out, and the answers that are awaited: one client, one write for all that came meanwhile, one inbox.

The client checks sizes before anything is written. Headers count towards ``max_payload`` and a control line holds
4,096 bytes; the server answers a longer one by closing the connection. Nothing is kept for a later connection: a reply
or a record that goes out minutes late does more harm than one that is known to be lost.

Requests never use ``nats.request``, which costs a future and a timer each: a request is a publication whose reply
subject is ``<inbox>.<number>``, and one table says what was asked there, and who waits for it. Whoever stops waiting,
for whatever reason, takes its numbers out of the table. Who waits for what can no longer be answered, because the
connection is lost or NATS refused the subject, is told at once.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Protocol

import gevent
from gevent import get_hub
from gevent.hub import Waiter

from relay.bus.bridge import Bridge
from relay.bus.connection import Connection
from relay.bus.messages import Msg, Publication
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


_NOT_YET = BusUnavailable("NATS has not answered yet")
"""In the place of an answer that is missing."""


class _Answers:
    """One answer for each of several publications, and the greenlet that waits for all of them."""

    __slots__ = ("answers", "missing", "until", "waiter")

    def __init__(self, expected: int) -> None:
        self.answers: list[Msg | BusUnavailable | BusRefused] = [_NOT_YET] * expected
        self.missing = expected
        self.until = math.inf
        """On ``time.monotonic()``."""
        self.waiter: Waiter | None = None

    def put(self, place: int, answer: Msg | BusUnavailable | BusRefused) -> None:
        """An answer, once for each place: its number is no longer in the table."""
        self.answers[place] = answer
        self.missing -= 1
        if not self.missing:
            self.wake()

    def wake(self) -> None:
        """Ends the wait soon. Never switches."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.hub.loop.run_callback(waiter.switch, None)


_Asked = tuple[str, _Answers | Collector, int]
"""What was asked, who waits, and the place of the answer among the ``_Answers``; a collector has no use for it."""


def _fail(asked: _Asked, error: BusUnavailable | BusRefused) -> None:
    """There will be no answer."""
    _, asker, place = asked
    if isinstance(asker, _Answers):
        asker.put(place, error)
    else:
        asker.fail(error)


class Outbox:
    """Greenlets put publications in; the loop writes what has come since it last did."""

    def __init__(self, bridge: Bridge, connection: Connection, inbox: str) -> None:
        self._bridge = bridge
        self._connection = connection
        self._inbox = f"{inbox}."
        self._is_flagged = False
        self._next_number = 0
        self._pending: dict[str, _Asked] = {}
        self._is_closed = False
        self._loop = get_hub().loop
        self._alarm: Any = None
        self._alarm_at = math.inf
        self.dropped = 0
        """Publications that could not be handed to NATS since the process started."""
        connection.on_lost = self._on_lost
        connection.on_denied = self._on_denied
        connection.on_inbox_refused = self._on_inbox_refused

    @property
    def waiting(self) -> int:
        """How many requests wait for an answer."""
        return len(self._pending)

    def post(self, publication: Publication, reply_subject: str = "") -> None:
        """Publishes without waiting. Never blocks, never raises: what cannot be sent is logged."""
        error = self._put(publication, reply_subject)
        if error is not None:
            log.warning("not published to %s: %s", publication.nats_subject, error)

    def request_all(
        self, publications: list[Publication], timeout_seconds: float
    ) -> list[Msg | BusUnavailable | BusRefused]:
        """Publishes all in one write and blocks for an answer to each; same order, errors as values."""
        answers = _Answers(len(publications))
        before = self._next_number
        try:
            for place, publication in enumerate(publications):
                self._ask(publication, answers, place)
            if answers.missing:
                self._wait(answers, timeout_seconds)
            elif publications:
                gevent.sleep(0)  # who is refused at once and asks again at once keeps nobody from running
        finally:  # also when the greenlet is killed, or a Timeout of its caller's strikes
            if answers.missing:
                for number in range(before + 1, before + len(publications) + 1):  # asked without a switch in between
                    self._pending.pop(f"{self._inbox}{number}", None)
        if not answers.missing:
            return answers.answers
        late = BusUnavailable(f"NATS did not answer within {timeout_seconds:.3g} s")
        return [late if answer is _NOT_YET else answer for answer in answers.answers]

    def request_stream(self, publication: Publication, collector: Collector) -> str:
        """One request whose several answers go to ``collector`` until it has the last; a token for ``forget``."""
        inbox = self._ask(publication, collector, 0)
        if inbox not in self._pending:
            gevent.sleep(0)  # refused at once: as in ``request_all``
        return inbox

    def forget(self, inbox: str) -> None:
        """Drops a collector, whether or not its answers came."""
        self._pending.pop(inbox, None)

    def _ask(self, publication: Publication, asker: _Answers | Collector, place: int) -> str:
        """Publishes a request; the subject of its answers."""
        self._next_number += 1
        inbox = f"{self._inbox}{self._next_number}"
        asked = (publication.nats_subject, asker, place)
        error = self._no_inbox() if self._connection.inbox_refused else self._put(publication, inbox)
        if error is None:
            self._pending[inbox] = asked
        else:
            _fail(asked, error)
        return inbox

    def _put(self, publication: Publication, reply_subject: str) -> BusUnavailable | BusRefused | None:
        """Has a publication sent; what is against it. Never switches greenlets: no answer comes before it returns."""
        try:
            if self._is_closed:
                raise BusUnavailable("the connection to NATS was closed")
            self._connection.nc.put(publication, reply_subject)
        except (BusRefused, BusUnavailable) as error:
            self.dropped += 1
            return error
        if not self._is_flagged:
            self._is_flagged = True
            self._bridge.post(self.write)
        return None

    def close(self) -> None:
        """Takes no more, and tells everyone who still waits."""
        self._is_closed = True
        self._fail_all(BusUnavailable("the connection to NATS was closed"))
        self._set_alarm(math.inf)

    def _fail_all(self, error: BusUnavailable | BusRefused) -> None:
        waiting, self._pending = self._pending, {}
        for asked in waiting.values():
            _fail(asked, error)

    # -- waiting ---------------------------------------------------------------------------
    def _wait(self, answers: _Answers, timeout_seconds: float) -> None:
        """Blocks until there is nothing missing, at most ``timeout_seconds``.

        One alarm serves all who wait, as in ``delivery.pool``: it is set only for who is due before it rings, and
        looks at those who wait at that moment. Answers that come in time cost no timer.
        """
        answers.until = time.monotonic() + timeout_seconds
        if answers.until < self._alarm_at:
            self._set_alarm(answers.until)
        waiter = answers.waiter = Waiter()
        waiter.get()

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
        self._alarm_at = at
        if at < math.inf:
            self._alarm = self._loop.timer(max(0.0, at - time.monotonic()))
            self._alarm.start(self._ring, update=True)

    def _ring(self) -> None:
        """Ends the waits that are over. Runs in the hub, so it must not wait."""
        now = time.monotonic()
        next_at = math.inf
        for _, asker, _ in self._pending.values():
            if not isinstance(asker, _Answers):
                continue  # a collector's own wait has its own end
            if asker.until <= now:
                asker.wake()
            else:
                next_at = min(next_at, asker.until)
        self._set_alarm(next_at)

    # -- in the loop -----------------------------------------------------------------------
    def on_answer(self, msg: Msg) -> None:
        """An answer has come to our inbox."""
        inbox = msg.nats_subject
        asked = self._pending.get(inbox)
        if asked is None:
            return
        _, asker, place = asked
        if isinstance(asker, _Answers):
            del self._pending[inbox]
            asker.put(place, msg)
        elif asker.take(msg):
            self._pending.pop(inbox, None)

    def _on_lost(self) -> None:
        self._fail_all(BusUnavailable("the connection to NATS was lost"))

    def _on_denied(self, nats_subject: str) -> None:
        for inbox, asked in list(self._pending.items()):
            if asked[0] == nats_subject:
                del self._pending[inbox]
                _fail(asked, BusRefused(f"this user may not publish to {nats_subject}; grant it in NATS", DENIED))

    def _on_inbox_refused(self) -> None:
        self._fail_all(self._no_inbox())

    def _no_inbox(self) -> BusRefused:
        return BusRefused(self._connection.inbox_words, DENIED)

    def write(self) -> None:
        """Has the client write what was put. Never waits."""
        self._is_flagged = False
        lost = self._connection.nc.send()
        if lost:
            self.dropped += lost
            log.warning("%d messages are not published: the connection to NATS was lost", lost)
