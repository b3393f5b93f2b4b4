"""A stand-in for SQS: one queue over SQS's JSON protocol, which fails as it is told to, and counts everything.

It runs in a thread of the test's own. Whatever path a queue URL has, it is this queue, but for one that ends in
``/missing``. (What measures events has a leaner one of its own, a process: ``scripts/bench/sqs_server.py``.)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

ACTIONS = ("ReceiveMessage", "DeleteMessageBatch", "ChangeMessageVisibilityBatch", "GetQueueAttributes")
HANG_UP = 0
"""In place of a status: the connection is closed without an answer."""


@dataclass
class Held:
    """A message of the queue."""

    body: str
    sqs_message_id: str
    sent_at: float = field(default_factory=time.time)
    visible_at: float = 0.0
    received_count: int = 0
    receipt_handle: str = ""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


class SqsDouble:
    """The queue and its server. Messages are handed out oldest first."""

    def __init__(self, bodies: Iterable[str] = (), *, visibility_seconds: int = 30, max_receives: int = 0) -> None:
        self.visibility_seconds = visibility_seconds
        self.max_receives = max_receives
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Every call that was taken: the action and its body."""
        self.counts: Counter[str] = Counter()
        self.denied: set[str] = set()
        """Actions that are answered with AccessDenied."""
        self.failures: list[tuple[str, int, str]] = []
        """(action, status, code) of calls to come that fail, each once; status ``HANG_UP``: no answer."""
        self.failing_deletes = 0
        """So many entries of deletions to come fail, although their call succeeds."""
        self.is_failing_at_sender = False
        """Whose fault those are."""
        self.keeps_calls = True
        self._numbers = itertools.count(1)
        self._held: dict[str, Held] = {}
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0
        for body in bodies:
            self._put(body)

    # -- from the test's thread -------------------------------------------------------------
    def start(self) -> SqsDouble:
        """Serves on a free port of loopback, in a thread of its own."""
        is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve(is_up.set)), daemon=True)
        self._thread.start()
        assert is_up.wait(10)
        return self

    def stop(self) -> None:
        """Ends the server and its thread."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(10)

    @property
    def url(self) -> str:
        """The server's URL, for AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def queue_url(self) -> str:
        """The queue's URL."""
        return f"{self.url}/123456789012/events"

    def add(self, *bodies: str, received_count: int = 0) -> None:
        """Puts messages into the queue; ``received_count``: how often they have been received before."""
        is_done = threading.Event()

        def put() -> None:
            for body in bodies:
                self._put(body).received_count = received_count
            self._changed.set()
            is_done.set()

        assert self._loop is not None
        self._loop.call_soon_threadsafe(put)
        assert is_done.wait(10)

    def hang_up(self) -> None:
        """Closes every connection that is open, whatever it waits for."""

        def close() -> None:
            for each in list(self._connections):
                each.cancel()

        assert self._loop is not None
        self._loop.call_soon_threadsafe(close)

    @property
    def left(self) -> list[Held]:
        """What is in the queue, seen or unseen."""
        return list(self._held.values())

    def calls_of(self, action: str) -> list[dict[str, Any]]:
        """The bodies of an action's calls so far."""
        return [body for each, body in self.calls if each == action]

    # -- the server -------------------------------------------------------------------------
    async def serve(self, on_up: Callable[[], None], port: int = 0) -> None:
        """Serves until stopped."""
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=4 * 1024 * 1024)
        self.port = server.sockets[0].getsockname()[1]
        on_up()
        await self._ending.wait()
        server.close()
        for each in list(self._connections):
            each.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        _, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
        payload = await reader.readexactly(int(headers.get("content-length", 0)))
        action = headers.get("x-amz-target", "").rpartition(".")[2]
        try:
            answer = await self._answer(action, orjson.loads(payload))
        except Refusal as refusal:
            if refusal.status == HANG_UP:
                return False
            body = orjson.dumps({"__type": f"com.amazonaws.sqs#{refusal.code}", "message": str(refusal)})
            writer.write(_http(refusal.status, body, refusal.code))
            return True
        writer.write(_http(200, orjson.dumps(answer)))
        await writer.drain()
        return True

    async def _answer(self, action: str, body: dict[str, Any]) -> dict[str, Any]:
        self.counts[action] += 1
        if self.keeps_calls:
            self.calls.append((action, body))
        for place, (failing, status, code) in enumerate(self.failures):
            if failing == action:
                del self.failures[place]
                raise Refusal(status, code, "as the test wants it")
        if action in self.denied:
            raise Refusal(400, "AccessDenied", f"User: arn:aws:iam::123456789012:user/test may not {action}")
        if body["QueueUrl"].endswith("/missing"):
            raise Refusal(400, "QueueDoesNotExist", "The specified queue does not exist.")
        match action:
            case "ReceiveMessage":
                return await self._receive(body)
            case "DeleteMessageBatch":
                return self._delete(body)
            case "ChangeMessageVisibilityBatch":
                return self._change_visibility(body)
            case "GetQueueAttributes":
                return self._attributes()
        raise Refusal(400, "InvalidAction", f"no {action} here")

    async def _receive(self, body: dict[str, Any]) -> dict[str, Any]:
        most = int(body.get("MaxNumberOfMessages", 1))
        hidden_seconds = int(body.get("VisibilityTimeout", self.visibility_seconds))
        deadline = time.monotonic() + int(body.get("WaitTimeSeconds", 0))
        while True:
            now = time.monotonic()
            found = list(itertools.islice((each for each in self._held.values() if each.visible_at <= now), most))
            if found or now >= deadline:
                break
            self._changed.clear()
            next_visible = min((each.visible_at for each in self._held.values()), default=deadline)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, min(deadline, next_visible) - now))
        for each in found:
            each.received_count += 1
            each.receipt_handle = f"{each.sqs_message_id}#{each.received_count}"
            each.visible_at = now + hidden_seconds
        self.counts["received"] += len(found)
        return {"Messages": [_as_sent(each) for each in found]} if found else {}

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        successful, failed = [], []
        for entry in body["Entries"]:
            if self.failing_deletes:
                self.failing_deletes -= 1
                failed.append(_failed(entry, "InternalError", is_senders=self.is_failing_at_sender))
                continue
            held = self._held.get(entry["ReceiptHandle"].rpartition("#")[0])
            # As Amazon does: an older receipt handle deletes nothing and is told that all is well.
            if held is not None and held.receipt_handle == entry["ReceiptHandle"]:
                del self._held[held.sqs_message_id]
                self.counts["deleted"] += 1
            successful.append({"Id": entry["Id"]})
        return {"Successful": successful, "Failed": failed}

    def _change_visibility(self, body: dict[str, Any]) -> dict[str, Any]:
        successful, failed = [], []
        for entry in body["Entries"]:
            held = self._held.get(entry["ReceiptHandle"].rpartition("#")[0])
            if held is None or held.visible_at <= time.monotonic():
                failed.append(_failed(entry, "MessageNotInflight", is_senders=True))
                continue
            held.visible_at = time.monotonic() + int(entry["VisibilityTimeout"])
            self._changed.set()
            successful.append({"Id": entry["Id"]})
        return {"Successful": successful, "Failed": failed}

    def _attributes(self) -> dict[str, Any]:
        now = time.monotonic()
        hidden = sum(each.visible_at > now for each in self._held.values())
        attributes = {
            "VisibilityTimeout": str(self.visibility_seconds),
            "ApproximateNumberOfMessages": str(len(self._held) - hidden),
            "ApproximateNumberOfMessagesNotVisible": str(hidden),
            "ApproximateNumberOfMessagesDelayed": "0",
        }
        if self.max_receives:
            policy = {"deadLetterTargetArn": "arn:aws:sqs:us-east-1:123456789012:dead", "maxReceiveCount": "0"}
            attributes["RedrivePolicy"] = orjson.dumps(policy | {"maxReceiveCount": str(self.max_receives)}).decode()
        return {"Attributes": attributes}

    def _put(self, body: str) -> Held:
        held = Held(body, f"00000000-0000-4000-8000-{next(self._numbers):012d}")
        self._held[held.sqs_message_id] = held
        return held


def _as_sent(held: Held) -> dict[str, Any]:
    return {
        "MessageId": held.sqs_message_id,
        "ReceiptHandle": held.receipt_handle,
        "Body": held.body,
        "Attributes": {
            "SentTimestamp": str(int(held.sent_at * 1000)),
            "ApproximateReceiveCount": str(held.received_count),
        },
    }


def _failed(entry: dict[str, Any], code: str, *, is_senders: bool) -> dict[str, Any]:
    return {"Id": entry["Id"], "Code": code, "Message": "as the test wants it", "SenderFault": is_senders}


def _http(status: int, body: bytes, code: str = "") -> bytes:
    error = f"x-amzn-query-error: {code};Sender\r\n" if code else ""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/x-amz-json-1.0\r\n{error}Content-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body
