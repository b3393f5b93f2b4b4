"""The pool's shell: greenlets that wait for, dial and close connections as ``pool_state`` decides.

Dials run in greenlets of their own, and whichever connection becomes available first, dialled or returned, serves the
waiter that has queued longest. Taking an idle connection does not switch greenlets.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.hub import Waiter

from relay.delivery.config import SmarthostConfig
from relay.delivery.pool_state import PoolState
from relay.delivery.session import Session
from relay.errors import EgressUnavailable, PoolClosed, PoolTimeout

UNCHECKED_IDLE_SECONDS: Final = 0.05
"""An idle connection is trusted for so long; after that it is looked at before it is used again."""
_LONGEST_TEND_SECONDS: Final = 1.0


class Pool:
    """Bounded connections to one smarthost."""

    def __init__(
        self,
        config: SmarthostConfig,
        dial: Callable[[], Session],
        on_dial_failed: Callable[[EgressUnavailable], None],
    ) -> None:
        """``dial`` opens one session or raises ``EgressUnavailable``, which is then given to ``on_dial_failed``."""
        self.state: PoolState[Session, Waiter] = PoolState(
            config.pool_size, config.idle_seconds, config.max_age_seconds, config.max_messages
        )
        self._dial = dial
        self._on_dial_failed = on_dial_failed
        self._dials: set[Any] = set()
        self._dials_to_begin = 0
        """Spawned, and have not run yet."""
        self._tender: Any = None
        self._tend_seconds = max(0.01, min(config.idle_seconds / 4, _LONGEST_TEND_SECONDS))
        self._loop = gevent.get_hub().loop
        self._alarm: Any = None
        self._alarm_at = math.inf
        self._closed = Event()
        self._came_back = Event()

    def acquire(self, deadline: float) -> Session:
        """Return a connection that is the caller's until ``release``.

        Blocks until ``deadline`` at most. Raises ``PoolTimeout``, ``PoolClosed``, or what ``refuse_waiters`` was given.
        """
        state = self.state
        while state.idle:
            now = time.monotonic()
            session = state.acquire(now)
            if state.retired:
                self._close_retired()
            if session is None:
                break
            if now - session.idle_since < UNCHECKED_IDLE_SECONDS or session.is_quiet():
                return session
            self.release(session, now)
        return self._wait(deadline)

    def release(self, session: Session, now: float) -> None:
        """Give a connection back, to be used again if it can be. Never blocks."""
        state = self.state
        waiter = state.release(session, now, is_reusable=session.is_reusable)
        if waiter is not None:
            self._loop.run_callback(waiter.switch, None)
        elif state.retired:
            self._close_retired()
            self._start_dials()
        if state.is_closed:
            self._came_back.set()

    def hand_back(self, session: Session) -> None:
        """Give a connection back that was not used: it goes on growing old. Never blocks."""
        idle_since = session.idle_since
        self.release(session, time.monotonic())
        session.idle_since = idle_since

    def probe(self) -> bool:
        """Dial one connection although nobody waits and keep it; return whether it works. Blocks while dialling."""
        return self.state.begin_spare_dial() and self._dial_one()

    def dial_aside(self, dial: Callable[[], Session]) -> bool:
        """Have one more connection made by ``dial``, if there is a place for it; nobody is told when it fails."""
        if not self.state.begin_spare_dial():
            return False
        self._spawn_dial(self._dial_spare, dial)
        return True

    def hold_dials(self, seconds: float) -> None:
        """Dial nothing more for so long."""
        self.state.hold_dials(time.monotonic() + seconds)

    def shrink(self) -> None:
        """The smarthost complains about too many connections: open no more than now, for a while."""
        self.state.shrink(time.monotonic())

    def refuse_waiters(self, error: EgressUnavailable) -> None:
        """End every queued ``acquire`` with ``error``."""
        for waiter in self.state.drop_waiters():
            self._loop.run_callback(waiter.switch, error)

    def close(self, deadline: float) -> None:
        """Take no more callers, refuse those that queue, and wait for what is busy.

        What is still busy at ``deadline`` is cut: its mail ends as if the connection had been lost.
        """
        state = self.state
        for waiter in state.close():
            self._loop.run_callback(waiter.switch, PoolClosed("shutting down"))
        self._closed.set()
        gevent.killall(list(self._dials), block=True, timeout=1.0)
        # A greenlet that is killed before it runs frees nothing by itself.
        for _ in range(self._dials_to_begin):
            state.dial_failed()
        self._dials_to_begin = 0
        self._close_retired()
        while state.busy or state.reserved:
            self._came_back.clear()
            if not self._came_back.wait(max(0.0, deadline - time.monotonic())):
                break
        for session in list(state.busy):
            session.close()
        if self._tender is not None:
            self._tender.join(timeout=1.0)
        self._set_alarm(math.inf)

    def __repr__(self) -> str:
        return repr(self.state)

    def _wait(self, deadline: float) -> Session:
        state = self.state
        if state.is_closed:
            raise PoolClosed("shutting down")
        waiter = Waiter()
        state.wait(waiter, deadline)
        if deadline < self._alarm_at:
            self._set_alarm(deadline)
        if state.dialling + state.living < state.limit or self._tender is None:
            self._start_dials()
        try:
            error: EgressUnavailable | None = waiter.get()
            if error is None:
                return state.take(waiter)
            # One error ends many waits; without this each would add its frames to the same traceback.
            raise error.with_traceback(None)
        except BaseException:
            self._wake(state.forsake(waiter, time.monotonic()))
            raise

    def _set_alarm(self, at: float) -> None:
        """Ring at ``at``. As in ``channel``, one alarm serves all: it looks at the waiters of that moment."""
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
        self._alarm_at = at
        if at < math.inf:
            self._alarm = self._loop.timer(max(0.0, at - time.monotonic()))
            self._alarm.start(self._ring, update=True)

    def _ring(self) -> None:
        """End the waits whose deadline is over. Runs in the hub, so it must not wait."""
        for waiter in self.state.expire(time.monotonic()):
            self._loop.run_callback(waiter.switch, PoolTimeout(f"no connection in time ({self.state!r})"))
        self._set_alarm(min(self.state.waiters.values(), default=math.inf))

    def _wake(self, waiter: Waiter | None) -> None:
        if waiter is not None:
            self._loop.run_callback(waiter.switch, None)
        if self.state.retired:
            self._close_retired()

    def _start_dials(self) -> None:
        count = self.state.begin_dials(time.monotonic())
        for _ in range(count):
            self._spawn_dial(self._dial_one)
        if self._tender is None and not self.state.is_closed:
            self._tender = gevent.spawn(self._tend)

    def _spawn_dial(self, dial: Callable[..., object], *args: object) -> None:
        self._dials_to_begin += 1
        dialling = gevent.spawn(self._begin_dial, dial, *args)
        self._dials.add(dialling)
        dialling.link(self._dials.discard)

    def _begin_dial(self, dial: Callable[..., object], *args: object) -> None:
        self._dials_to_begin -= 1
        dial(*args)

    def _dial_spare(self, dial: Callable[[], Session]) -> None:
        session: Session | None = None
        try:
            with contextlib.suppress(EgressUnavailable):
                session = dial()
        finally:
            if session is None:
                self.state.dial_failed()
        if session is not None:
            self._wake(self.state.dialled(session, time.monotonic()))

    def _dial_one(self) -> bool:
        """Turn a reserved place into a connection, or free it."""
        session: Session | None = None
        try:
            session = self._dial()
        except EgressUnavailable as error:
            failure = error
        finally:
            if session is None:
                self.state.dial_failed()
        if session is None:
            self._on_dial_failed(failure)
            return False
        self._wake(self.state.dialled(session, time.monotonic()))
        return True

    def _tend(self) -> None:
        """Retire idle connections also when there is no traffic, and dial again when a hold is over."""
        while not self._closed.wait(self._tend_seconds):
            now = time.monotonic()
            self.state.reap(now)
            self.state.grow(now)
            self._close_retired()
            if self.state.waiters:
                self._start_dials()

    def _close_retired(self) -> None:
        while self.state.retired:
            self.state.retired.pop().quit()
