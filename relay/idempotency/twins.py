"""Requests of this process under the same request_id, and how they wait for one answer.

A key in use is *reserved* by one greenlet, which works on the request or looks at its claim; when the others of this
process come they wait, and learn from it what became of it without asking NATS. When the one who works is in another
process, the key is reserved by nobody, and one poller looks at the claim for all who wait. Whoever has reserved a key
gives it up in the end; then it goes to one who waits, is polled, or is forgotten. No step between check and change
gives way to another greenlet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import gevent
from gevent.event import Event

from relay.bus.client import seconds_left
from relay.errors import BusRefused, BusUnavailable
from relay.idempotency.claim import OWNED, Reason, Refused, Settled, Value, answer_from, read_value
from relay.idempotency.ledger import LONGEST_PAUSE_SECONDS, Ledger, Pause

MAX_WAITING = 1000
MAX_WAITING_BYTES = 64 * 1024 * 1024
"""Twins of all keys that wait at the same time, and their requests."""


class Busy(NamedTuple):
    """A claim that another attempt has, as it was seen last."""

    value: Value
    revision: int
    expires_at: float
    """When its lease may have expired, on ``time.monotonic()``; who then looks asks the server."""


class _Waiter:
    """A twin that waits."""

    __slots__ = ("event", "fingerprint", "message")

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.event = Event()
        self.message: Settled | Refused | None = None
        """None, once ``event`` is set: the key is reserved for it now."""

    @property
    def has_key(self) -> bool:
        """Whether the key is reserved for it."""
        return self.event.is_set() and self.message is None

    def tell(self, message: Settled | Refused | None) -> None:
        self.message = message
        self.event.set()


class Watch:
    """A key in use in this process."""

    __slots__ = ("busy", "is_polled", "is_reserved", "is_unreadable", "key", "waiters")

    def __init__(self, key: str) -> None:
        self.key = key
        self.is_reserved = True
        self.is_polled = False
        self.waiters: dict[_Waiter, None] = {}
        self.busy: Busy | None = None
        """None: nothing is known of the claim."""
        self.is_unreadable = False
        """The last look at the claim was not answered."""


class Twins:
    """The keys in use, and who waits for them."""

    def __init__(
        self, ledger: Ledger, max_waiting: int = MAX_WAITING, max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self._ledger = ledger
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._watches: dict[str, Watch] = {}
        self._waiting_bytes = 0
        self._wait_until = float("inf")
        self._pollers: set[gevent.Greenlet] = set()
        self._refuser: gevent.Greenlet | None = None
        self.waiting = 0
        """Twins that wait."""

    # -- reserve and give up -----------------------------------------------------------------------
    def find(self, key: str) -> Watch | None:
        """The key, when it is in use; None: it is to be reserved."""
        return self._watches.get(key)

    def reserve(self, key: str) -> Watch:
        """A key that is not in use. ``give_up``, ``refuse`` or ``wait`` must follow."""
        watch = self._watches[key] = Watch(key)
        return watch

    def give_up(self, watch: Watch, value: Value | None = None) -> None:
        """The key is no longer reserved by us; ``value`` is what we left or saw of its claim, if it is known."""
        watch.busy = None
        if value is not None and value.reply is not None:
            for waiter in _taken(watch):
                waiter.tell(answer_from(value, waiter.fingerprint))
        self._leave(watch)

    def refuse(self, watch: Watch, reason: Reason) -> None:
        """The key is no longer reserved by us, and who waits for it is refused."""
        for waiter in _taken(watch):
            waiter.tell(Refused(reason))
        watch.busy = None
        self._leave(watch)

    def _leave(self, watch: Watch) -> None:
        watch.is_reserved = False
        self._tidy(watch)

    def _tidy(self, watch: Watch) -> None:
        """A key that nobody has reserved is polled while somebody waits, and forgotten when nobody does."""
        if watch.is_reserved:
            return
        if not watch.waiters:
            if self._watches.get(watch.key) is watch:
                del self._watches[watch.key]
        elif not watch.is_polled:
            watch.is_polled = True
            poller = gevent.spawn(self._poll, watch)
            self._pollers.add(poller)
            poller.link(self._pollers.discard)

    # -- wait ----------------------------------------------------------------------------------------
    def wait(
        self,
        watch: Watch,
        fingerprint: str,
        deadline: float,
        *,
        size_bytes: int = 0,
        on_wait: Callable[[], None] | None = None,
        seen: Busy | None = None,
    ) -> Settled | Refused | None:
        """The answer that a twin got. None: the key is reserved for us now, and we are to look for ourselves.

        ``seen`` gives up a key that was reserved for us: it is what we saw of the claim. Blocks until ``deadline`` at
        most; ``on_wait`` is called first, if there is anything to wait for.
        """
        if seen is not None:
            watch.busy = seen
            watch.is_reserved = False
        refused = self._refusal(watch, fingerprint, deadline, size_bytes)
        if refused is not None:
            self._tidy(watch)
            return refused
        waiter = _Waiter(fingerprint)
        watch.waiters[waiter] = None
        self._tidy(watch)
        self.waiting += 1
        self._waiting_bytes += size_bytes
        try:
            if on_wait is not None:
                on_wait()
            waiter.event.wait(seconds_left(min(deadline, self._wait_until)))
        except BaseException:
            self._stop_waiting(watch, waiter, size_bytes)
            if waiter.has_key:
                self._leave(watch)
            raise
        self._stop_waiting(watch, waiter, size_bytes)
        if not waiter.event.is_set():
            return Refused(Reason.UNAVAILABLE if watch.is_unreadable else Reason.IN_PROGRESS)
        return waiter.message

    def _refusal(self, watch: Watch, fingerprint: str, deadline: float, size_bytes: int) -> Refused | None:
        """Why it may not wait."""
        if watch.busy is not None and watch.busy.value.fingerprint != fingerprint:
            return Refused(Reason.PAYLOAD_DIFFERS)
        if self.waiting >= self._max_waiting or self._waiting_bytes + size_bytes > self._max_waiting_bytes:
            return Refused(Reason.OVERLOADED)
        if time.monotonic() >= min(deadline, self._wait_until):
            return Refused(Reason.IN_PROGRESS)
        return None

    def _stop_waiting(self, watch: Watch, waiter: _Waiter, size_bytes: int) -> None:
        self.waiting -= 1
        self._waiting_bytes -= size_bytes
        watch.waiters.pop(waiter, None)
        self._tidy(watch)

    # -- poll ------------------------------------------------------------------------------------------
    def _poll(self, watch: Watch) -> None:
        """Looks at the claim for those who wait, until they have their answer or one has to look for itself."""
        pause = Pause(LONGEST_PAUSE_SECONDS)
        while watch.waiters and self._is_to_wait(watch):
            pause.take(float("inf"))
        watch.is_polled = False
        if watch.waiters:
            waiter = next(iter(watch.waiters))
            del watch.waiters[waiter]
            watch.is_reserved = True
            waiter.tell(None)

    def _is_to_wait(self, watch: Watch) -> bool:
        """Whether nobody has to do anything yet. Any replica may say so: what it lags costs only time."""
        busy = watch.busy
        if busy is None or busy.value.phase not in OWNED or time.monotonic() >= busy.expires_at:
            return False
        try:
            entry = self._ledger.peek(watch.key)
        except (BusUnavailable, BusRefused):
            watch.is_unreadable = True
            return True
        watch.is_unreadable = False
        value = read_value(entry.value) if entry is not None else None
        if entry is None or value is None:
            return False
        if entry.revision <= busy.revision:
            return True
        watch.busy = Busy(value, entry.revision, time.monotonic() + value.owner.lease_seconds)
        if value.reply is not None:
            for waiter in _taken(watch):
                waiter.tell(answer_from(value, waiter.fingerprint))
        return value.phase in OWNED

    # -- the end -----------------------------------------------------------------------------------------
    def limit_waits(self, until: float) -> None:
        """Nobody waits beyond ``until`` from now on: who does then is refused."""
        self._wait_until = min(self._wait_until, until)
        if self._refuser is not None:
            self._refuser.kill(block=False)
        self._refuser = gevent.spawn_later(seconds_left(self._wait_until), self._refuse_all)

    def close(self) -> None:
        """Refuses who waits, now and later."""
        self._wait_until = time.monotonic()
        self._refuse_all()
        gevent.killall([each for each in (*self._pollers, self._refuser) if each is not None])

    def _refuse_all(self) -> None:
        for watch in list(self._watches.values()):
            for waiter in _taken(watch):
                waiter.tell(Refused(Reason.IN_PROGRESS))


def _taken(watch: Watch) -> list[_Waiter]:
    """Those who wait, taken off the list."""
    waiters, watch.waiters = list(watch.waiters), {}
    return waiters
