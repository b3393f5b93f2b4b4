"""A TCP proxy that makes a server as far away as ``--rtt-ms`` says.

    python scripts/delay_proxy.py --to 127.0.0.1:1025 --rtt-ms 20

prints ``listening on 127.0.0.1:PORT`` and serves until SIGTERM or SIGINT; then it prints as JSON how many chunks it
carried and how late it handed them over. ``running`` does the same for benchmarks and tests.

Every chunk is handed over half a round trip after it arrived, bytes, ends and resets alike; the kernel says when that
was (Linux, SO_TIMESTAMPNS), so that being busy adds nothing to the delay. Nothing limits the rate: reading goes on
while chunks are on the way, up to ``MOST_BYTES_HELD`` for an end that does not take them, and one connection does not
wait for another. TCP's own handshake ends at the proxy, so its round trip is made up for: the server is connected to
one and a half round trips after the client was, when the client's last ACK would have arrived.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import heapq
import itertools
import json
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

READ_BYTES: Final = 262_144
MOST_BYTES_HELD: Final = 64 * 1024 * 1024
"""Taken from one end and not yet taken by the other: more than a fast network has on the way at any delay of use."""
START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 10.0
_BUCKETS_PER_SECOND: Final = 20_000
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_SO_TIMESTAMPNS: Final = 35
_TIMESPEC: Final = struct.Struct("qq")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_TIMESPEC.size)
_PR_SET_TIMERSLACK: Final = 29

END: Final = b""
"""Stands among chunks for the end of what a side says (FIN)."""


class _End:
    """One of the two sockets of a connection, and what is meant for it."""

    __slots__ = (
        "held_bytes",
        "is_closed",
        "is_connected",
        "is_drained",
        "is_finished",
        "last_due",
        "mask",
        "peer",
        "queue",
        "sock",
    )

    def __init__(self, sock: socket.socket, *, is_connected: bool) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.sock = sock
        self.is_connected = is_connected
        self.is_closed = False
        self.is_drained = False
        """Nothing more will be read from it."""
        self.is_finished = False
        """Its peer's end has been handed over to it."""
        self.queue: collections.deque[bytes | memoryview] = collections.deque()
        """Due, and not yet taken by the kernel."""
        self.held_bytes = 0
        """Due or on the way to it."""
        self.last_due = 0.0
        """Of what is on the way to it: nothing overtakes, even when the wall clock is set."""
        self.mask = 0
        self.peer: _End


class DelayProxy:
    """Listens from the start; ``run`` carries until ``stop``."""

    def __init__(self, target: tuple[str, int], rtt_seconds: float, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._target = target
        self._one_way_seconds = rtt_seconds / 2
        # Waited for with select: its timeout is in microseconds, epoll's own only in milliseconds.
        self._epoll = select.epoll()
        self._listener = socket.create_server(listen, backlog=4096)
        self._listener.setblocking(False)
        self._wake_reader, self._wake_writer = socket.socketpair()
        for sock in (self._listener, self._wake_reader):
            self._epoll.register(sock, select.EPOLLIN)
        self._ends: dict[int, _End] = {}
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._on_the_way: list[tuple[float, int, _End, bytes | None]] = []
        """A heap by due time; the number keeps the order of what is due at once."""
        self._numbers = itertools.count()
        self._to_connect: collections.deque[tuple[float, _End]] = collections.deque()
        self._is_stopping = False
        self._connections = 0
        self._lateness = [0] * (_BUCKETS_PER_SECOND + 1)

    @property
    def port(self) -> int:
        """Where clients connect to."""
        return int(self._listener.getsockname()[1])

    def run(self) -> None:
        """Carries until ``stop`` is called; then closes everything."""
        while not self._is_stopping:
            dues = [queue[0][0] for queue in (self._on_the_way, self._to_connect) if queue]
            timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
            select.select([self._epoll], [], [], timeout)
            self._hand_over()
            for fd, event in self._epoll.poll(0):
                self._on_event(fd, event)
        for end in list(self._ends.values()):
            self._close(end)
        for sock in (self._listener, self._wake_reader, self._wake_writer):
            sock.close()
        self._epoll.close()

    def stop(self) -> None:
        """Ends ``run``; a signal handler may call it."""
        self._is_stopping = True
        self._wake_writer.send(b"\0")

    def figures(self) -> dict[str, float]:
        """What was carried, and by how many milliseconds too late it was handed over."""
        chunks = sum(self._lateness)
        return {
            "connections": self._connections,
            "chunks": chunks,
            "late_ms_p50": self._late_ms(chunks * 0.5),
            "late_ms_p99": self._late_ms(chunks * 0.99),
            "late_ms_max": self._late_ms(chunks),
        }

    def _late_ms(self, rank: float) -> float:
        seen = 0
        for bucket, count in enumerate(self._lateness):
            seen += count
            if count and seen >= rank:
                return (bucket + 1) * 1000 / _BUCKETS_PER_SECOND
        return 0.0

    def _on_event(self, fd: int, event: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
            return
        end = self._ends.get(fd)
        if end is None or end.is_closed:
            return
        if not end.is_connected:
            self._on_connected(end)
            return
        if event & ~select.EPOLLOUT and not end.is_drained:
            self._read(end)
        if event & select.EPOLLOUT and not end.is_closed:
            self._flush(end)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # The client has gone away again.
        client = _End(sock, is_connected=True)
        server = _End(socket.socket(socket.AF_INET, socket.SOCK_STREAM), is_connected=False)
        client.peer, server.peer = server, client
        self._connections += 1
        self._ends[sock.fileno()] = client
        self._ends[server.sock.fileno()] = server
        self._watch(client)
        self._to_connect.append((time.monotonic() + 3 * self._one_way_seconds, server))

    def _connect(self, server: _End) -> None:
        if server.is_closed:
            return
        try:
            server.sock.connect(self._target)
        except BlockingIOError:
            server.mask = select.EPOLLOUT
            self._epoll.register(server.sock, server.mask)
        except OSError:
            self._send_on(server.peer, None)
        else:
            self._on_connected(server)

    def _on_connected(self, server: _End) -> None:
        if server.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._unwatch(server)
            self._send_on(server.peer, None)
            return
        server.is_connected = True
        self._flush(server)

    def _read(self, end: _End) -> None:
        try:
            count, ancillary, _, _ = end.sock.recvmsg_into([self._buffer], _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            end.is_drained = True
            self._send_on(end.peer, None)
        else:
            end.is_drained = not count
            self._send_on(end.peer, bytes(self._buffer[:count]), _age_seconds(ancillary))
        self._watch(end)

    def _send_on(self, end: _End, data: bytes | None, age_seconds: float = 0.0) -> None:
        """Put what arrived ``age_seconds`` ago on the way to ``end``; ``None`` is a reset."""
        end.held_bytes += len(data or b"")
        end.last_due = max(end.last_due, time.monotonic() - age_seconds + self._one_way_seconds)
        heapq.heappush(self._on_the_way, (end.last_due, next(self._numbers), end, data))

    def _hand_over(self) -> None:
        """Give what is due to the ends that it is for."""
        now = time.monotonic()
        while self._to_connect and self._to_connect[0][0] <= now:
            self._connect(self._to_connect.popleft()[1])
        while self._on_the_way and self._on_the_way[0][0] <= now:
            due, _, end, data = heapq.heappop(self._on_the_way)
            if not end.is_closed:
                if data is None:
                    self._reset(end)
                else:
                    end.queue.append(data)
                    if end.is_connected and len(end.queue) == 1:
                        self._flush(end)
            now = time.monotonic()
            self._lateness[min(int((now - due) * _BUCKETS_PER_SECOND), _BUCKETS_PER_SECOND)] += 1

    def _flush(self, end: _End) -> None:
        """Give the kernel what it takes."""
        queue = end.queue
        while queue:
            data = queue[0]
            try:
                if data:
                    sent = end.sock.send(data)
                else:
                    end.sock.shutdown(socket.SHUT_WR)
                    end.is_finished = True
                    sent = 0
            except BlockingIOError:
                break
            except OSError:
                self._lose(end)
                return
            end.held_bytes -= sent
            if sent < len(data):
                queue[0] = memoryview(data)[sent:]
            else:
                queue.popleft()
        if end.is_finished and end.peer.is_finished:
            self._close(end)
            self._close(end.peer)
            return
        self._watch(end)
        self._watch(end.peer)

    def _lose(self, end: _End) -> None:
        """``end`` takes nothing more. What it said before goes on its way, then its peer is told."""
        if not end.is_drained:
            self._read(end)
        end.queue.clear()
        end.is_drained = True
        self._unwatch(end)
        self._send_on(end.peer, None)

    def _reset(self, end: _End) -> None:
        """Close both ends; who still says or expects something gets a reset."""
        for each in (end, end.peer):
            if not each.is_closed:
                each.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                self._close(each)

    def _watch(self, end: _End) -> None:
        """Ask for the events that ``end`` can use now, and for no others: a level is reported again and again."""
        if end.is_closed or not end.is_connected:
            return
        mask = select.EPOLLOUT if end.queue else 0
        if not end.is_drained and end.peer.held_bytes < MOST_BYTES_HELD:
            mask |= select.EPOLLIN
        if mask == end.mask:
            return
        if not mask:
            self._epoll.unregister(end.sock)
        elif end.mask:
            self._epoll.modify(end.sock, mask)
        else:
            self._epoll.register(end.sock, mask)
        end.mask = mask

    def _unwatch(self, end: _End) -> None:
        if end.mask:
            self._epoll.unregister(end.sock)
            end.mask = 0

    def _close(self, end: _End) -> None:
        if end.is_closed:
            return
        end.is_closed = True
        self._unwatch(end)
        del self._ends[end.sock.fileno()]
        end.sock.close()


def _age_seconds(ancillary: list[tuple[int, int, bytes]]) -> float:
    """How long ago the kernel got what was just read; the end of a stream has no time."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack(data)
            age_seconds: float = time.time() - seconds - nanoseconds / 1e9
            return max(0.0, age_seconds)
    return 0.0


class Running(NamedTuple):
    """A proxy in a process of its own."""

    port: int
    """Of 127.0.0.1: where to connect."""
    pid: int


@contextlib.contextmanager
def running(target_port: int, rtt_ms: float) -> Iterator[Running]:
    """A proxy in a process of its own, in front of ``target_port`` of 127.0.0.1."""
    command = [sys.executable, __file__, "--to", f"127.0.0.1:{target_port}", "--rtt-ms", str(rtt_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        is_there, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if is_there else ""
        if not line.startswith("listening on "):
            raise RuntimeError("the delay proxy does not start")
        yield Running(int(line.rpartition(":")[2]), process.pid)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


def main() -> None:
    """Parses options, carries, says how well."""
    parser = argparse.ArgumentParser(description="A TCP proxy that adds a delay each way.")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT", help="the server (IPv4)")
    parser.add_argument("--rtt-ms", type=float, required=True, help="round-trip time to add")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    options = parser.parse_args()
    proxy = DelayProxy(options.to, options.rtt_ms / 1000, options.listen)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: proxy.stop())
    # The kernel may wake a sleeper 50 µs late, to wake several together.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    # A full collection would hold everything up for milliseconds; what is left for it after this is small.
    gc.freeze()
    print(f"listening on {options.listen[0]}:{proxy.port}", flush=True)
    proxy.run()
    print(json.dumps(proxy.figures()), flush=True)


if __name__ == "__main__":
    main()
