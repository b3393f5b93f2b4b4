"""``BlockingRelayClient``: the same for programs without asyncio, and for threads.

Its asyncio loop runs in a thread of its own; every method may be called from any other thread, many at a time. A
process that was forked needs a client of its own: threads do not survive a fork, and a call says so instead of waiting
for ever.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar, Unpack

from relay import contract
from relay.client.errors import NotConnected
from relay.client.mail import Mail, MailFields, ObjectRef, StoredMail
from relay.client.many import AHEAD, Item, Progress, Result, Results, check_concurrency
from relay.client.relay_client import RelayClient
from relay.client.replies import Analytics, MailRecord, Page, Sent
from relay.client.retry import Retry

T = TypeVar("T")

GRACE_SECONDS: Final = 15.0
"""Beyond the longest call: only a loop that has died needs it."""


class BlockingRelayClient:
    """As ``RelayClient``, blocking. Thread-safe; close it, or use it in a ``with`` statement."""

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        *,
        retry: Retry | None = None,
        connect_timeout_seconds: float = 10.0,
        **connect_options: Any,
    ) -> None:
        self._longest_seconds = (retry or Retry()).total_timeout_seconds + connect_timeout_seconds + GRACE_SECONDS
        self._make = partial(
            RelayClient, servers, retry=retry, connect_timeout_seconds=connect_timeout_seconds, **connect_options
        )
        self._starting = threading.Lock()
        self._client: RelayClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._is_closed = False

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connects; the first call does so as well. Raises ``NotConnected``."""
        self._run(lambda client: client.connect())

    def close(self) -> None:
        """Closes the connection and ends the thread. What other threads wait for ends in ``NoAnswer``."""
        with self._starting:
            self._is_closed = True
            client, loop, thread = self._client, self._loop, self._thread
            self._client = self._loop = self._thread = None
        if client is None or loop is None or thread is None or self._pid != os.getpid():
            return
        asyncio.run_coroutine_threadsafe(_finish(client), loop).result(GRACE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(GRACE_SECONDS)
        if not thread.is_alive():
            loop.close()

    def send(self, mail: Mail | StoredMail | None = None, /, **fields: Unpack[MailFields]) -> Sent:
        """As ``RelayClient.send``."""
        return self._run(lambda client: client.send(mail, **fields))

    def send_many(
        self,
        mails: Iterable[Item],
        *,
        concurrency: int = 50,
        ordered: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Iterator[Result]:
        """As ``RelayClient.send_many``. ``mails`` is read, and ``on_progress`` called, in the caller's thread."""
        check_concurrency(concurrency)
        return self._each_result(mails, concurrency, Results(mails, ordered=ordered, on_progress=on_progress))

    def get_status(self, email_id: str) -> MailRecord:
        """As ``RelayClient.get_status``."""
        return self._run(lambda client: client.get_status(email_id))

    def get_analytics(self, group_id: str) -> Analytics:
        """As ``RelayClient.get_analytics``."""
        return self._run(lambda client: client.get_analytics(group_id))

    def get_page(self, group_id: str, cursor: str = "", limit: int = contract.MAX_PAGE_MAILS) -> Page:
        """As ``RelayClient.get_page``."""
        return self._run(lambda client: client.get_page(group_id, cursor, limit))

    def pages(self, group_id: str, limit: int = contract.MAX_PAGE_MAILS) -> Iterator[Page]:
        """As ``RelayClient.pages``."""
        cursor: str | None = ""
        while cursor is not None:
            page = self.get_page(group_id, cursor, limit)
            yield page
            cursor = page.cursor

    def mails(self, group_id: str, limit: int = contract.MAX_PAGE_MAILS) -> Iterator[MailRecord]:
        """As ``RelayClient.mails``."""
        for page in self.pages(group_id, limit):
            yield from page.records

    def put_object(self, bucket: str, content: bytes | str | Path, name: str = "") -> ObjectRef:
        """As ``RelayClient.put_object``."""
        return self._run(lambda client: client.put_object(bucket, content, name))

    def put_mail(self, bucket: str, mail: Mail, name: str = "") -> StoredMail:
        """As ``RelayClient.put_mail``."""
        return self._run(lambda client: client.put_mail(bucket, mail, name))

    def delete_object(self, ref: ObjectRef) -> None:
        """As ``RelayClient.delete_object``."""
        self._run(lambda client: client.delete_object(ref))

    # -- the loop's thread --------------------------------------------------------------------------------------

    def _run(self, call: Callable[[RelayClient], Coroutine[Any, Any, T]]) -> T:
        future = self._submit(call)
        try:
            return future.result(self._longest_seconds)
        except BaseException:
            future.cancel()  # the caller was interrupted, or the loop has died
            raise

    def _submit(self, call: Callable[[RelayClient], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        client, loop = self._started()
        return asyncio.run_coroutine_threadsafe(call(client), loop)

    def _started(self) -> tuple[RelayClient, asyncio.AbstractEventLoop]:
        with self._starting:
            if self._is_closed:
                raise NotConnected("the client is closed", retryable=False)
            if self._client is None or self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="relay-client", daemon=True)
                self._thread.start()
                self._loop, self._client, self._pid = loop, self._make(), os.getpid()
            if self._pid != os.getpid():
                raise NotConnected("the process was forked", detail="make a client in each process", retryable=False)
            return self._client, self._loop

    def _each_result(self, mails: Iterable[Item], concurrency: int, results: Results) -> Iterator[Result]:
        source = iter(mails)
        finished: queue.SimpleQueue[concurrent.futures.Future[Result]] = queue.SimpleQueue()
        in_flight: set[concurrent.futures.Future[Result]] = set()
        position = given = 0
        failure: Exception | None = None
        is_over = False
        try:
            while True:
                while not is_over and len(in_flight) < concurrency and position - given < concurrency * AHEAD:
                    try:
                        item = next(source)
                    except StopIteration:
                        is_over = True
                        break
                    except Exception as error:  # noqa: BLE001 - the caller's own; raised when what is in flight is done
                        is_over, failure = True, error
                        break
                    future = self._submit(partial(_send_one, position, item))
                    in_flight.add(future)
                    future.add_done_callback(finished.put)
                    position += 1
                if not in_flight:
                    break
                done = finished.get(timeout=self._longest_seconds)
                in_flight.remove(done)
                for ready in results.add(done.result()):
                    given += 1
                    yield ready
        finally:
            for each in in_flight:
                each.cancel()
        if failure is not None:
            raise failure


def _send_one(position: int, item: Item, client: RelayClient) -> Coroutine[Any, Any, Result]:
    return client.send_one(position, item)


async def _finish(client: RelayClient) -> None:
    """Closes, and lets every task of the loop come to its end."""
    await client.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        await asyncio.wait(tasks, timeout=1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
