"""A stand-in for SQS that costs next to nothing, so that whoever reads from it is what is measured.

    python scripts/bench/sqs_server.py

prints its URL and serves until it is ended. Any path is a queue. Beside SQS's JSON protocol (receive, delete, change
visibility, attributes) it takes ``PUT /queue``, one JSON string a line, all of which become visible at once; and
``GET /queue`` answers when everything that was put there is deleted: when it was put and when the last one was deleted,
on the clock that all processes of a machine share. Messages are put into their JSON when they come, not when they are
asked for. What is received stays hidden until its visibility is changed: nothing expires.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from typing import Any

import orjson

ALL_DELETED = orjson.dumps({"Successful": [{"Id": str(number)} for number in range(10)], "Failed": []})
_OK = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: 0\r\nContent-Length: %d\r\n\r\n"
)


class Queue:
    """One queue."""

    def __init__(self) -> None:
        self.visible: deque[str] = deque()
        self.messages: dict[str, bytes] = {}
        """All that are not deleted, as they stand in an answer."""
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.put_at = self.emptied_at = 0.0
        self.emptied = asyncio.Event()
        self._numbers = itertools.count()

    def put(self, lines: bytes) -> None:
        """Takes messages."""
        sent_at = str(int(time.time() * 1000))
        for line in lines.splitlines():
            name = f"00000000-0000-4000-8000-{next(self._numbers):012d}"
            self.messages[name] = (
                b'{"MessageId":"%b","ReceiptHandle":"%b","MD5OfBody":"d41d8cd98f00b204e9800998ecf8427e","Body":%b,'
                b'"Attributes":{"SentTimestamp":"%b","ApproximateReceiveCount":"1"}}'
                % (name.encode(), name.encode(), line, sent_at.encode())
            )
            self.visible.append(name)
        self.emptied.clear()
        self.put_at = time.monotonic()
        self.wake()

    def wake(self) -> None:
        """Lets those that wait have a look."""
        for _ in range(min(len(self.waiting), len(self.visible))):
            waiting = self.waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)

    async def receive(self, most: int, wait_seconds: float) -> bytes:
        """Up to ``most`` messages; waits for the first."""
        deadline = time.monotonic() + wait_seconds
        while not self.visible:
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                return b"{}"
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(waiting)
            try:
                await asyncio.wait_for(waiting, left_seconds)
            except TimeoutError:
                return b"{}"
        names = [self.visible.popleft() for _ in range(min(most, len(self.visible)))]
        return b'{"Messages":[' + b",".join([self.messages[name] for name in names]) + b"]}"

    def delete(self, entries: list[dict[str, str]]) -> bytes:
        """Deletes; also what is not there any more."""
        for entry in entries:
            self.messages.pop(entry["ReceiptHandle"], None)
        if not self.messages and not self.emptied.is_set():
            self.emptied_at = time.monotonic()
            self.emptied.set()
        if [entry["Id"] for entry in entries] == [str(number) for number in range(10)]:
            return ALL_DELETED
        return orjson.dumps({"Successful": [{"Id": entry["Id"]} for entry in entries], "Failed": []})

    def change_visibility(self, entries: list[dict[str, Any]]) -> bytes:
        """Gives back after a time."""
        loop = asyncio.get_running_loop()
        for entry in entries:
            loop.call_later(int(entry["VisibilityTimeout"]), self._show, entry["ReceiptHandle"])
        return orjson.dumps({"Successful": [{"Id": entry["Id"]} for entry in entries], "Failed": []})

    def _show(self, name: str) -> None:
        if name in self.messages and name not in self.visible:
            self.visible.append(name)
            self.wake()

    def attributes(self) -> bytes:
        """Of the queue."""
        hidden = len(self.messages) - len(self.visible)
        attributes = {
            "VisibilityTimeout": "300",
            "ApproximateNumberOfMessages": str(len(self.visible)),
            "ApproximateNumberOfMessagesNotVisible": str(hidden),
            "ApproximateNumberOfMessagesDelayed": "0",
        }
        return orjson.dumps({"Attributes": attributes})


class Connection(asyncio.Protocol):
    """One client, one request at a time."""

    def __init__(self, queues: dict[str, Queue]) -> None:
        self._queues = queues
        self._received = bytearray()
        self._needed = 0
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps what answers are written to."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answers a request that is complete."""
        self._received += data
        if len(self._received) < self._needed:
            return
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        found = head.find(b"content-length: ")
        length = int(head[found + 16 :].split(b"\r\n", 1)[0]) if found >= 0 else 0
        self._needed = end + 4 + length
        if len(self._received) < self._needed:
            return
        body = bytes(self._received[end + 4 : self._needed])
        del self._received[: self._needed]
        self._needed = 0
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        verb, path = head.split(b" ", 2)[:2]
        found = head.find(b"x-amz-target: amazonsqs.")
        if found < 0:
            queue = self._queue(path.decode())
            if verb == b"put":
                queue.put(body)
                self._write(b"{}")
            else:
                self._later(self._tell_when_empty(queue))
            return
        action = head[found + 24 :].split(b"\r\n", 1)[0]
        asked = orjson.loads(body)
        queue = self._queue("/" + asked["QueueUrl"].split("/", 3)[3].lower())
        if action == b"receivemessage":
            most, wait_seconds = asked["MaxNumberOfMessages"], asked["WaitTimeSeconds"]
            self._later(self._receive(queue, most, wait_seconds))
        elif action == b"deletemessagebatch":
            self._write(queue.delete(asked["Entries"]))
        elif action == b"changemessagevisibilitybatch":
            self._write(queue.change_visibility(asked["Entries"]))
        elif action == b"getqueueattributes":
            self._write(queue.attributes())
        else:
            raise ValueError(action)

    def _queue(self, path: str) -> Queue:
        return self._queues.setdefault(path, Queue())

    def _later(self, work: Any) -> None:
        self._task = asyncio.ensure_future(work)

    async def _receive(self, queue: Queue, most: int, wait_seconds: float) -> None:
        self._write(await queue.receive(most, wait_seconds))

    async def _tell_when_empty(self, queue: Queue) -> None:
        await queue.emptied.wait()
        self._write(orjson.dumps({"put_at": queue.put_at, "emptied_at": queue.emptied_at}))

    def _write(self, body: bytes) -> None:
        self._transport.write(_OK % len(body) + body)

    def connection_lost(self, _error: Exception | None) -> None:
        """Whoever waits here, waits no more."""
        if self._task is not None:
            self._task.cancel()


async def serve() -> None:
    """Serves until it is ended."""
    queues: dict[str, Queue] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Connection(queues), "127.0.0.1", 0, backlog=100)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
