"""Who has which connection: the pool's bookkeeping, without I/O, greenlets or a clock.

Owns the bound, the order of waiters and the retirement of connections. ``pool`` does what this decides.

A connection is *idle*, *reserved* (promised to a waiter that has not run yet) or *busy*; *dialling*: being opened.
Every event below is one step without a yield, so that checking and reserving cannot be separated.

A smarthost that complains about too many connections gets fewer for a while: ``limit`` sinks to those that there
are and rises again step by step.

Invariants: dialling + idle + reserved + busy <= size, and no dial begins at or above ``limit``. A connection is
promised to one waiter at most. While a waiter queues, no connection is idle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, Protocol, TypeVar


class Pooled(Protocol):
    """What the pool must know of a connection."""

    opened_at: float
    idle_since: float
    transactions: int


SHRUNK_SECONDS: Final = 10.0
"""Without another dial above what lives, after the smarthost complained."""
GROW_SECONDS: Final = 2.0
"""From one step of a tenth of the pool to the next."""

S = TypeVar("S", bound=Pooled)
W = TypeVar("W", bound=Hashable)


class PoolState(Generic[S, W]):
    """The state of one pool; ``S`` are its connections, ``W`` its waiters."""

    def __init__(self, size: int, idle_seconds: float, max_age_seconds: float, max_messages: int) -> None:
        self.size = size
        self.limit = size
        """How many may be open now: ``size``, or fewer while the smarthost wants it so."""
        self.dialling = 0
        self.living = 0
        """Connections that are open: idle, reserved or busy."""
        self.idle: list[S] = []
        """The one used last is at the end and goes first, so that the others can grow old and be retired."""
        self.reserved: dict[W, S] = {}
        self.busy: set[S] = set()
        self.waiters: OrderedDict[W, float] = OrderedDict()
        """Who queues, with the deadline of each."""
        self.retired: list[S] = []
        """Taken out of the pool and to be closed by the shell."""
        self.is_closed = False
        self._idle_seconds = idle_seconds
        self._max_age_seconds = max_age_seconds
        self._max_messages = max_messages
        self._dials_held_until = 0.0
        self._limit_rises_at = 0.0

    @property
    def open(self) -> int:
        """What counts against the bound."""
        return self.dialling + self.living

    @property
    def has_room(self) -> bool:
        """Whether a connection could be had without waiting for another mail's."""
        return bool(self.idle) or self.open < self.limit

    def acquire(self, now: float) -> S | None:
        """Give an idle connection away, the one used last first; ``None`` when the caller has to ``wait``."""
        while self.idle:
            session = self.idle.pop()
            if now - session.idle_since < self._idle_seconds and now - session.opened_at < self._max_age_seconds:
                self.busy.add(session)
                return session
            self._retire(session)
        return None

    def wait(self, waiter: W, deadline: float) -> None:
        """Queue; the waiter is served by ``release``, ``dialled`` or ``forsake``, first come, first served."""
        self.waiters[waiter] = deadline

    def expire(self, now: float) -> list[W]:
        """Drop and return the waiters whose deadline is over. Looks at all of them: not for every mail."""
        expired = [waiter for waiter, deadline in self.waiters.items() if deadline <= now]
        for waiter in expired:
            del self.waiters[waiter]
        return expired

    def take(self, waiter: W) -> S:
        """The waiter runs and takes what was reserved for it."""
        session = self.reserved.pop(waiter)
        self.busy.add(session)
        return session

    def forsake(self, waiter: W, now: float) -> W | None:
        """The waiter gives up. What was reserved for it goes to the next; returns that one, to be woken."""
        self.waiters.pop(waiter, None)
        session = self.reserved.pop(waiter, None)
        return None if session is None else self._offer(session, now)

    def release(self, session: S, now: float, *, is_reusable: bool) -> W | None:
        """A busy connection comes back. Returns the waiter for whom it is now reserved, to be woken."""
        self.busy.remove(session)
        if not is_reusable:
            self._retire(session)
            return None
        session.idle_since = now
        return self._offer(session, now)

    def begin_dials(self, now: float) -> int:
        """Reserve places for as many new connections as waiters need, and return how many to dial."""
        if self.is_closed or now < self._dials_held_until:
            return 0
        count = max(0, min(len(self.waiters) - self.dialling, self.limit - self.open))
        self.dialling += count
        return count

    def begin_spare_dial(self) -> bool:
        """Reserve a place for a connection that nobody waits for (a probe), if there is one."""
        if self.is_closed or self.open >= self.limit:
            return False
        self.dialling += 1
        return True

    def hold_dials(self, until: float) -> None:
        """Dial nothing more until then; the connections that live serve the waiters."""
        self._dials_held_until = until

    def shrink(self, now: float) -> None:
        """The smarthost wants no more connections than there are without the refused one, and one in any case.

        Those being dialled count: refusals come back sooner than greetings.
        """
        self.limit = max(1, min(self.limit, self.open))
        self._limit_rises_at = now + SHRUNK_SECONDS

    def grow(self, now: float) -> None:
        """Allow a few more connections when the last complaint, or the last step, is long enough ago."""
        if self.limit < self.size and now >= self._limit_rises_at:
            self.limit = min(self.size, self.limit + max(1, self.size // 10))
            self._limit_rises_at = now + GROW_SECONDS

    def dialled(self, session: S, now: float) -> W | None:
        """A dial succeeded. Returns the waiter for whom the connection is reserved, to be woken."""
        self.dialling -= 1
        self.living += 1
        session.idle_since = now
        return self._offer(session, now)

    def dial_failed(self) -> None:
        """A dial failed: its place is free again."""
        self.dialling -= 1

    def reap(self, now: float) -> None:
        """Retire the idle connections whose time is over."""
        idle, self.idle = self.idle, []
        for session in idle:
            if self._is_worn_out(session, now):
                self._retire(session)
            else:
                self.idle.append(session)

    def drop_waiters(self) -> list[W]:
        """Return everyone who queues, and forget them."""
        waiters = list(self.waiters)
        self.waiters.clear()
        return waiters

    def close(self) -> list[W]:
        """Retire what is idle and let nothing become idle again. Returns the waiters, to be refused."""
        self.is_closed = True
        while self.idle:
            self._retire(self.idle.pop())
        return self.drop_waiters()

    def _offer(self, session: S, now: float) -> W | None:
        if self.is_closed or self._is_worn_out(session, now):
            self._retire(session)
            return None
        if self.waiters:
            waiter, _ = self.waiters.popitem(last=False)
            self.reserved[waiter] = session
            return waiter
        self.idle.append(session)
        return None

    def _retire(self, session: S) -> None:
        """The connection, which is nowhere any more, is to be closed."""
        self.living -= 1
        self.retired.append(session)

    def _is_worn_out(self, session: S, now: float) -> bool:
        return (
            session.transactions >= self._max_messages
            or now - session.idle_since >= self._idle_seconds
            or now - session.opened_at >= self._max_age_seconds
        )

    def __repr__(self) -> str:
        return (
            f"idle {len(self.idle)}, reserved {len(self.reserved)}, busy {len(self.busy)}, "
            f"dialling {self.dialling}, waiting {len(self.waiters)} of {self.size}"
            f"{'' if self.limit == self.size else f', {self.limit} for now'}"
        )
