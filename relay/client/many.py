"""Sending many mails at a time: what is in flight is bounded, and one failure stops nothing.

Owns the order of the results and the bounds; how a mail is sent is the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sized
from typing import Any, Final, NamedTuple

from relay.client.errors import RelayClientError
from relay.client.mail import Mail, MailFields, StoredMail
from relay.client.replies import Sent

Item = Mail | StoredMail | MailFields
"""A mail to be sent: as a value, or as its fields."""

AHEAD: Final = 20
"""Results that wait for a slow one before them, or for the caller, as a multiple of ``concurrency``."""


class Result(NamedTuple):
    """What became of one of many mails: ``sent`` or ``error``."""

    position: int
    """Of the mail among those given, from 0."""
    item: Item
    sent: Sent | None
    error: RelayClientError | None

    @property
    def is_sent(self) -> bool:
        """Whether there is no error."""
        return self.error is None

    def __repr__(self) -> str:
        return f"Result(position={self.position}, sent={self.sent!r}, error={self.error!r})"


class Progress(NamedTuple):
    """How far it is."""

    done: int
    sent: int
    failed: int
    total: int | None
    """None when the mails do not say how many they are."""


class Results:
    """Counts results and puts them into order, if that is asked for."""

    def __init__(self, mails: object, *, ordered: bool, on_progress: Callable[[Progress], object] | None) -> None:
        self._ordered = ordered
        self._on_progress = on_progress
        self._progress = Progress(0, 0, 0, len(mails) if isinstance(mails, Sized) else None)
        self._early: dict[int, Result] = {}
        self._next = 0

    def add(self, result: Result) -> list[Result]:
        """Notes a result; those that may be given out now."""
        done, sent, failed, total = self._progress
        self._progress = Progress(done + 1, sent + result.is_sent, failed + (not result.is_sent), total)
        if self._on_progress is not None:
            self._on_progress(self._progress)
        if not self._ordered:
            return [result]
        self._early[result.position] = result
        ready = []
        while self._next in self._early:
            ready.append(self._early.pop(self._next))
            self._next += 1
        return ready


def check_concurrency(concurrency: int) -> None:
    """Raises ``ValueError`` for what is no number of mails in flight."""
    if concurrency < 1:
        raise ValueError("concurrency must be at least 1")


async def each_result(
    send: Callable[[int, Item], Awaitable[Result]],
    mails: Iterable[Item] | AsyncIterable[Item],
    concurrency: int,
    results: Results,
) -> AsyncGenerator[Result, None]:
    """The results of sending ``mails``, at most ``concurrency`` at a time.

    ``mails`` is read as there is room, so it may be endless. When it raises, what is in flight is finished and given
    out, and then its error is raised.
    """
    room = asyncio.Semaphore(concurrency * AHEAD)
    source = _Source(mails)
    finished: asyncio.Queue[Result | None] = asyncio.Queue()

    async def work() -> None:
        try:
            while True:
                await room.acquire()
                item = await source.next()
                if item is None:
                    room.release()
                    return
                finished.put_nowait(await send(*item))
        finally:
            finished.put_nowait(None)

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    working = concurrency
    try:
        while working:
            result = await finished.get()
            if result is None:
                working -= 1
                continue
            for ready in results.add(result):
                room.release()
                yield ready
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await source.close()
    for worker in workers:
        worker.result()
    if source.error is not None:
        raise source.error


class _Source:
    """The mails, one at a time, whoever asks."""

    def __init__(self, mails: Iterable[Item] | AsyncIterable[Item]) -> None:
        self._mails: AsyncIterator[Item] = aiter(mails) if isinstance(mails, AsyncIterable) else _as_async(mails)
        self._turn = asyncio.Lock()
        self._position = 0
        self._is_over = False
        self.error: Exception | None = None
        """What ended it early."""

    async def next(self) -> tuple[int, Item] | None:
        """The next mail and its place; None when there is none left, or the source has failed."""
        async with self._turn:
            if self._is_over:
                return None
            try:
                item = await anext(self._mails)
            except StopAsyncIteration:
                self._is_over = True
                return None
            except Exception as error:  # noqa: BLE001 - the caller's own; it is raised once what is in flight is done
                self._is_over, self.error = True, error
                return None
            self._position += 1
            return self._position - 1, item

    async def close(self) -> None:
        close: Any = getattr(self._mails, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # it is running: its caller was cancelled meanwhile
                await close()


async def _as_async(mails: Iterable[Item]) -> AsyncIterator[Item]:
    for mail in mails:
        yield mail
