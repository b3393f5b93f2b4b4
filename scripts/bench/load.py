"""The load generator, a process of its own: sends requests over NATS and measures the time of each.

It shares the machine with what it measures, so it speaks NATS's text protocol itself, writes once for all requests of
a turn, and keeps times in an array: some 10 µs a mail in the closed loop. Two ways:

Closed loop (``--callers``): so many requests in flight, each reply is followed by the next request. A caller that
waits asks for nothing meanwhile, so what a pause costs is seen by few.

Open loop (``--rate``): request i is due at a time that is fixed beforehand, i ÷ rate, whatever became of the ones
before, and its time counts from then on: what had to wait, here or there, waited (no coordinated omission).

Prints lines of JSON: at each tenth of the time ``{"tenth", "answered"}``, and at the end ``requests``, ``answered``,
``relayed``, ``seconds``, ``rate`` (answered, a second), ``errors`` (detail → count), ``p50_ms`` … ``max_ms``,
``histogram`` (bucket → count, see histogram.py), ``cpu_us`` (its own, a mail), ``loop`` (uvloop or asyncio) and, in the
open loop, ``late_p99_ms``: how long after it was due a request left this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import time
from array import array
from collections import Counter
from typing import Any, cast
from urllib.parse import urlsplit

from histogram import counted

from relay import contract

try:
    import uvloop as event_loop
except ImportError:  # it only makes this process cheaper
    event_loop = asyncio  # type: ignore[misc]

ANSWER_SECONDS = 60.0
"""How long the last replies are waited for."""
CONNECT_SECONDS = 10.0
LEAST_TICK_SECONDS = 0.00025
"""In the open loop requests leave this often at most, those that are due meanwhile together."""
QUANTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999}
LINES = {
    "ascii": "All work and no play makes a dull mail, and this is one of its lines.\n",
    "utf8": "Schöne Grüße – ein Text, der Quoted-Printable braucht, Zeile für Zeile.\n",
}
_DETAIL = re.compile(rb'"detail":\s*"([^"]*)"')


def request_of(size_bytes: int, kind: str) -> bytes:
    """A send request whose two bodies have ``size_bytes`` together."""
    line = LINES[kind]
    half = (line * (size_bytes // 2 // len(line.encode()) + 1)).encode()[: size_bytes // 2].decode(errors="ignore")
    # A blank before a line end is rare in mail, and takes quoted-printable a way of its own.
    half = half.rstrip(" ")
    mail = {
        "to": "user@example.com",
        "subject": "A mail of the benchmark",
        "text": half,
        "html": half,
        "group_id": "bench",
    }
    return json.dumps(mail, ensure_ascii=False).encode()


class Requests(asyncio.Protocol):
    """One connection to NATS: publishes requests by number and notes when each was due and when its reply came."""

    def __init__(self, payload: bytes) -> None:
        self.due = array("d")
        self.taken = array("d")
        self.left = array("d")
        self.open: set[int] = set()
        """The requests that have no reply yet."""
        self.relayed = 0
        self.errors: Counter[str] = Counter()
        self.is_ready = asyncio.get_running_loop().create_future()
        self.is_answered = asyncio.Event()
        """Set while no reply is awaited."""
        self.callers_left_until = 0.0
        """Closed loop: until when a reply is followed by the next request."""
        self._inbox = b"_INBOX.bench"
        self._after_number = b" %d\r\n%b\r\n" % (len(payload), payload)
        self._before_number = b"PUB %b %b." % (contract.SEND_EMAIL.encode(), self._inbox)
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self.transport = cast(asyncio.WriteTransport, transport)
        # Headers, since only with them the server says at once that nobody serves.
        said = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "lang": "bench"}
        words = (b"CONNECT ", json.dumps(said).encode(), b"\r\nSUB ", self._inbox, b".* 1\r\nPING\r\n")
        self.transport.write(b"".join(words))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("nats-server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if not self.is_ready.done():
            self.is_ready.set_exception(error)
        elif self.open:
            self.errors[f"the load generator: {error}"] += len(self.open)
            self.is_answered.set()

    def publish(self, dues: list[float]) -> None:
        """One request for each time; all are written together."""
        first = len(self.due)
        self.due.extend(dues)
        self.open.update(range(first, len(self.due)))
        self.is_answered.clear()
        pieces: list[bytes] = []
        for number in range(first, len(self.due)):
            pieces += (self._before_number, b"%d" % number, self._after_number)
        self.transport.writelines(pieces)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer = self._buffer + data if self._buffer else data
        place, answered = 0, len(self.taken)
        while (line_end := buffer.find(b"\r\n", place)) >= 0:
            words = buffer[place:line_end].split(b" ")
            if words[0] in {b"MSG", b"HMSG"}:
                payload_end = line_end + 2 + int(words[-1])
                if len(buffer) < payload_end + 2:
                    break
                self._take(int(words[1].rpartition(b".")[2]), now, buffer[line_end + 2 : payload_end])
                place = payload_end + 2
                continue
            place = line_end + 2
            if words[0] == b"PING":
                self.transport.write(b"PONG\r\n")
            elif words[0] == b"PONG" and not self.is_ready.done():
                self.is_ready.set_result(None)
            elif words[0] == b"-ERR":
                self._fail(ConnectionError(b" ".join(words).decode(errors="replace")))
        self._buffer = buffer[place:]
        if now < self.callers_left_until and len(self.taken) > answered:
            self.publish([now] * (len(self.taken) - answered))
        if not self.open:
            self.is_answered.set()

    def _take(self, number: int, now: float, payload: bytes) -> None:
        if number not in self.open:
            self.errors["a second reply to one request"] += 1
            return
        self.open.remove(number)
        self.taken.append(now - self.due[number])
        if payload.startswith(b"NATS/1.0 503"):
            self.errors["nobody serves"] += 1
        elif b'"error"' in payload or b'"email_id"' not in payload:
            detail = _DETAIL.search(payload)
            self.errors[(detail[1] if detail else payload[:100]).decode(errors="replace")] += 1
        else:
            self.relayed += 1


async def load(url: str, payload: bytes, seconds: float, callers: int, rate: float) -> dict[str, Any]:
    """Loads for so long, then waits for the last replies."""
    loop = asyncio.get_running_loop()
    server = urlsplit(url)
    _, requests = await loop.create_connection(lambda: Requests(payload), server.hostname or "", server.port or 4222)
    await asyncio.wait_for(requests.is_ready, CONNECT_SECONDS)
    tenths = asyncio.ensure_future(_tell_tenths(requests, seconds))
    cpu_begun, begun = time.process_time(), time.perf_counter()
    if rate:
        await _open_loop(requests, begun, seconds, rate)
    else:
        requests.callers_left_until = begun + seconds
        requests.publish([begun] * callers)
        await asyncio.sleep(seconds)
    try:
        await asyncio.wait_for(requests.is_answered.wait(), ANSWER_SECONDS)
    except TimeoutError:
        requests.errors["no reply"] += len(requests.open)
    used, took = time.process_time() - cpu_begun, time.perf_counter() - begun
    await tenths
    requests.transport.close()
    return _figures(requests, took, used)


async def _open_loop(requests: Requests, begun: float, seconds: float, rate: float) -> None:
    """Publishes what is due. An interval timer of the system wakes it: those of event loops count milliseconds."""
    loop, total, is_over = asyncio.get_running_loop(), int(seconds * rate), asyncio.Event()

    def publish_due() -> None:
        now, first = time.perf_counter(), len(requests.due)
        last = min(total, int((now - begun) * rate) + 1)
        if last > first:
            dues = [begun + number / rate for number in range(first, last)]
            requests.publish(dues)
            requests.left.extend(now - due for due in dues)
        if last == total:
            is_over.set()

    loop.add_signal_handler(signal.SIGALRM, publish_due)
    tick_seconds = max(LEAST_TICK_SECONDS, 1 / rate)
    signal.setitimer(signal.ITIMER_REAL, tick_seconds, tick_seconds)
    try:
        await asyncio.wait_for(is_over.wait(), seconds + ANSWER_SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        loop.remove_signal_handler(signal.SIGALRM)


async def _tell_tenths(requests: Requests, seconds: float) -> None:
    begun = time.perf_counter()
    for tenth in range(1, 11):
        await asyncio.sleep(max(0.0, begun + seconds * tenth / 10 - time.perf_counter()))
        print(json.dumps({"tenth": tenth, "answered": len(requests.taken)}), flush=True)


def _figures(requests: Requests, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    taken = sorted(requests.taken)
    answered = len(taken)
    if not answered:
        raise SystemExit(f"no request was answered: {dict(requests.errors)}")
    figures: dict[str, Any] = {
        "requests": len(requests.due),
        "answered": answered,
        "relayed": requests.relayed,
        "seconds": seconds,
        "rate": answered / seconds,
        "errors": dict(requests.errors),
        **{name: taken[int(answered * share)] * 1000 for name, share in QUANTILES.items()},
        "max_ms": taken[-1] * 1000,
        "histogram": counted(taken),
        "cpu_us": cpu_seconds / answered * 1e6,
        "loop": event_loop.__name__,
    }
    if requests.left:
        figures["late_p99_ms"] = sorted(requests.left)[int(len(requests.left) * 0.99)] * 1000
    return figures


def main() -> None:
    """Parses options, loads, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--callers", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, instead of --callers")
    parser.add_argument("--size", type=int, default=4096, help="bytes of both bodies together")
    parser.add_argument("--body", choices=list(LINES), default="ascii")
    options = parser.parse_args()
    if (options.callers > 0) == (options.rate > 0):
        parser.error("either --callers or --rate")
    payload = request_of(options.size, options.body)
    print(json.dumps(event_loop.run(load(options.url, payload, options.seconds, options.callers, options.rate))))


if __name__ == "__main__":
    main()
