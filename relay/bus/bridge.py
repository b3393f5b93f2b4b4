"""The crossing between greenlets and asyncio: one asyncio loop, living in one greenlet.

Owns the loop and how work gets into it. nats-py lives in the loop; everything else in the process
is greenlets. The loop waits in gevent's selector, so while nothing happens on the bus the hub runs
the other greenlets, and the other way round. Work posted to the loop is batched: the first post
wakes it, those that follow before it runs cost a ``deque.append``.

The selector is not gevent's own, which gives way to the hub at every turn of the loop and keeps a watcher for each of
its sockets: this one asks the kernel first, and only when nothing is ready, or after ``TURNS`` turns, do others run.

There can be one running asyncio loop per thread, so a process has at most one ``Bridge``.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import gevent
from gevent.event import AsyncResult, Event
from gevent.hub import Waiter
from gevent.monkey import get_original

from relay.errors import BusUnavailable

T = TypeVar("T")


def _unpatched(name: str) -> Any:
    """What gevent has taken away of the standard module."""
    try:
        return get_original("selectors", name)
    except AttributeError:
        return None


TURNS = 16
"""Of the loop in a row, while it has something to do."""

_KernelSelector: Any = _unpatched("EpollSelector") or _unpatched("KqueueSelector")


class HubSelector(_KernelSelector):  # type: ignore[misc]
    """Waits for the sockets of an asyncio loop in gevent's hub. For the one greenlet that the loop lives in.

    Which sockets are ready the kernel's own selector says; it is a file descriptor itself (epoll, kqueue), and the hub
    watches that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hub = gevent.get_hub()
        self._watcher = self._hub.loop.io(self.fileno(), 1)
        self._waiter: Waiter | None = None
        self._turns = 0
        self._waiting_for_silence: list[Callable[[], object]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As ``selectors.BaseSelector.select``; other greenlets run while nothing is ready."""
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            self._turns += 1
            if self._turns >= TURNS:
                self._turns = 0
                gevent.sleep(0)
            return ready
        self._turns = 0
        self._wait(timeout)
        return list(super().select(0))

    def wake(self) -> None:
        """Ends a ``select`` that waits. From the hub or another greenlet; never switches."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._hub.loop.run_callback(waiter.switch, None)

    def when_silent(self, then: Callable[[], object]) -> None:
        """Has ``then`` called as soon as nothing is ready; it must not block. Never switches."""
        self._waiting_for_silence.append(then)
        self.wake()  # what was not ready when it was last looked at may be now

    def _wait(self, timeout: float | None) -> None:
        while self._waiting_for_silence:
            self._waiting_for_silence.pop()()
        waiter = self._waiter = Waiter()
        self._watcher.start(self.wake)
        timer = self._hub.loop.timer(timeout) if timeout is not None else None
        try:
            if timer is not None:
                timer.start(self.wake, update=True)
            waiter.get()
        finally:
            self._waiter = None
            self._watcher.stop()
            if timer is not None:
                timer.close()

    def close(self) -> None:
        """Also the hub's watcher."""
        self._watcher.close()
        super().close()


class Bridge:
    """Runs one asyncio loop in a greenlet; ``post`` and ``call`` are for the other greenlets."""

    def __init__(self) -> None:
        self._selector = HubSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._posted: deque[Callable[[], object]] = deque()
        self._is_woken = False
        self._greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        """Starts the loop. Returns at once."""
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def post(self, work: Callable[[], object]) -> None:
        """Has the loop call ``work`` soon; it must not block and not raise. Never switches greenlets.

        After ``stop`` nothing is called any more.
        """
        if self._loop.is_closed():
            return
        self._posted.append(work)
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._run_posted)
            self._selector.wake()  # there is one thread, so no socket has to tell another

    def _run_posted(self) -> None:
        self._is_woken = False
        while self._posted:
            self._posted.popleft()()

    def let_read(self, timeout_seconds: float) -> None:
        """Blocks this greenlet until the loop has taken all that has come over its sockets, at most so long."""
        is_read = Event()
        self._selector.when_silent(is_read.set)
        is_read.wait(timeout_seconds)

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        """Runs ``coroutine`` in the loop and blocks this greenlet for its result.

        Raises what it raises; ``BusUnavailable`` when it took longer (it is then cancelled), and after ``stop``.
        """
        if self._loop.is_closed():
            coroutine.close()
            raise BusUnavailable("the connection to NATS was closed")
        result: AsyncResult = AsyncResult()
        task: asyncio.Task[T] | None = None

        def settle(done: asyncio.Task[T]) -> None:
            if done.cancelled():
                result.set_exception(BusUnavailable("the bus gave up waiting for NATS"))
            elif (error := done.exception()) is not None:
                result.set_exception(error)
            else:
                result.set(done.result())

        def begin() -> None:
            nonlocal task
            task = self._loop.create_task(coroutine)
            task.add_done_callback(settle)

        self.post(begin)
        try:
            result.wait(timeout=timeout_seconds)
        finally:  # also when the greenlet is killed, or a Timeout of its caller's strikes
            if not result.ready():
                self.post(lambda: task.cancel() if task else None)
        if not result.ready():
            raise BusUnavailable(f"NATS did not answer within {timeout_seconds:g} s")
        value: T = result.get(block=False)
        return value

    def stop(self, timeout_seconds: float = 2.0) -> None:
        """Cancels every task, ends the loop and waits for its greenlet. Safe to call twice."""
        if self._greenlet is None or self._greenlet.dead:
            return

        async def cancel_all() -> None:
            others = [task for task in asyncio.all_tasks(self._loop) if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()

        self.post(lambda: self._loop.create_task(cancel_all()))
        self._greenlet.join(timeout=timeout_seconds)
