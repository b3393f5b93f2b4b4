"""A responder that says what a test wants: plain nats-py on a real nats-server, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import nats
from nats.aio.msg import Msg

from relay import contract

Answer = Callable[[dict[str, Any], int], Any]
"""``answer(request, number)``: what is replied, as JSON or as bytes; None for silence; or an awaitable of that."""

SENT = {"email_id": "e-1", "group_id": "g-1", "message_id_header": "<m@example.org>", "remote_id": "r-1"}
DEFERRED = {"error": contract.DELIVERY_FAILED, "outcome": "deferred", "retryable": True, "detail": "overloaded"}


def in_turn(*answers: Any) -> Answer:
    """One answer after the other, then the last again and again."""
    return lambda _request, number: answers[min(number, len(answers) - 1)]


class Responder:
    """Serves one subject until ``stop``."""

    def __init__(self, url: str, answer: Answer, nats_subject: str = contract.SEND_EMAIL, **options: Any) -> None:
        self.payloads: list[bytes] = []
        """What came, in its order."""
        self.msgs: list[Msg] = []
        self._answer = answer
        self._nats_subject = nats_subject
        self._url = url
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._nc = self._do(self._start())
        self._arrived = threading.Condition()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What came, decoded."""
        return [json.loads(payload) for payload in self.payloads]

    def wait_for(self, count: int, timeout_seconds: float = 10.0) -> None:
        """Until so many requests have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.payloads) >= count, timeout_seconds), self.payloads

    def stop(self) -> None:
        """Leaves."""
        self._do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _finish(self) -> None:
        await self._nc.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> nats.NATS:
        async def on_error(_error: Exception) -> None:
            """A server that restarts on purpose is no news."""

        options = {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.05, "error_cb": on_error} | self._options
        nc = await nats.connect(self._url, **options)
        await nc.subscribe(self._nats_subject, contract.QUEUE_GROUP, cb=self._take)
        await asyncio.sleep(0)  # flush() writes its PING ahead of a SUB that still waits
        await nc.flush()
        return nc

    async def _take(self, msg: Msg) -> None:
        with self._arrived:
            number = len(self.payloads)
            self.payloads.append(msg.data)
            self.msgs.append(msg)
            self._arrived.notify_all()
        asyncio.create_task(self._reply(msg, number))  # noqa: RUF006 - it ends with the loop at the latest

    async def _reply(self, msg: Msg, number: int) -> None:
        answer = self._answer(json.loads(msg.data) if msg.data else {}, number)
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer is not None:
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            await self._nc.publish(msg.reply, payload)
