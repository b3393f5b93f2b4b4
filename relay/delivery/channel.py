"""One TCP connection as bytes: reads and writes that always end, and the change to TLS.

Owns the socket, its event-loop watchers and its alarm. Knows nothing of SMTP (``session`` does).

gevent's own sockets try to read before they wait and build a timer for every wait; for a client that reads one small
reply after each write both are wasted, so a channel waits first, on one watcher, with one lazy alarm. As it does all
the waiting, it asks the plain socket inside gevent's for bytes; a TLS socket of gevent is asked itself, and never
waits, its timeout being 0. Not thread-safe, and one greenlet at a time may use it; ``close`` alone may come from
another, whose wait then fails.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from gevent import Timeout, get_hub, getcurrent, socket, ssl

READ_BYTES: Final = 8192
_WAIT_FOR_READ: Final = 1
_WAIT_FOR_WRITE: Final = 2


class ChannelTimeout(TimeoutError):
    """The peer took, or sent, nothing in time."""


class Channel:
    """A connected socket. Every ``until`` is a point on ``time.monotonic()``."""

    __slots__ = (
        "_alarm",
        "_alarm_at",
        "_hub",
        "_is_tls",
        "_is_watched",
        "_reader",
        "_recv",
        "_send",
        "_sock",
        "_until",
        "_waiting",
        "peer",
    )

    def __init__(self, sock: Any, peer: str) -> None:
        """Take over ``sock``, a connected gevent socket; ``peer`` is its address, for logs."""
        self._sock = sock
        self._send: Callable[[bytes | memoryview], int] = sock._sock.send
        self._recv: Callable[[int], bytes] = sock._sock.recv
        self._hub = get_hub()
        self._is_tls = False
        self._reader = self._hub.loop.io(sock.fileno(), _WAIT_FOR_READ)
        self._alarm: Any = None
        self._alarm_at = math.inf
        self._until = math.inf
        self._waiting: Any = None
        self._is_watched = False
        self.peer = peer
        sock.settimeout(0.0)

    @classmethod
    def connect(cls, address: tuple[Any, ...], until: float) -> Channel:
        """Connect to an ``(family, type, proto, _, sockaddr)`` of ``getaddrinfo``. Raises ``OSError``."""
        family, kind, proto, _, sockaddr = address
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(max(0.001, until - time.monotonic()))
            sock.connect(sockaddr)
            # Replies and commands are small and wait for each other: Nagle's algorithm would only delay them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return cls(sock, str(sockaddr[0]))
        except BaseException:
            sock.close()
            raise

    @property
    def is_tls(self) -> bool:
        """Whether what is sent is encrypted."""
        return self._is_tls

    @property
    def is_loopback(self) -> bool:
        """Whether the peer is on this machine, so that nobody can listen."""
        return ipaddress.ip_address(self.peer.partition("%")[0]).is_loopback

    def start_tls(self, context: Any, server_hostname: str, until: float) -> None:
        """Do the TLS handshake as client. Raises ``OSError`` (``ssl.SSLError``, ``TimeoutError``)."""
        self._reader.close()
        self._is_watched = False
        seconds = max(0.001, until - time.monotonic())
        # The socket's own timeout begins anew with every byte that a peer lets trickle in.
        self._sock.settimeout(None)
        with Timeout(seconds, ChannelTimeout("the TLS handshake did not come to an end")):
            self._sock = context.wrap_socket(self._sock, server_hostname=server_hostname)
        self._sock.settimeout(0.0)
        self._send, self._recv = self._sock.send, self._sock.recv
        self._is_tls = True
        self._reader = self._hub.loop.io(self._sock.fileno(), _WAIT_FOR_READ)

    def write(self, data: bytes, until: float) -> None:
        """Hand all of ``data`` to the network. Raises ``ChannelTimeout`` or another ``OSError``.

        When it raises, the last byte of ``data`` was not handed over.
        """
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._write_rest(memoryview(data)[sent:], until)

    def read(self, until: float) -> bytes:
        """Wait for and return what has arrived, b'' at the end. Raises ``ChannelTimeout`` or another ``OSError``.

        Neither the watcher nor the alarm is started for each wait. The watcher stays on until something comes that
        nobody waits for. An earlier alarm goes on running and, when it rings, looks whether the wait of that moment is
        over its time or for how long to be set again: a reply that comes in time costs no timer.
        """
        # Decrypted bytes may wait inside the TLS layer, where the event loop does not see them.
        is_worth_a_try = self._is_tls
        while True:
            if not is_worth_a_try:
                if not self._is_watched:
                    self._watch()
                if until < self._alarm_at:
                    self._set_alarm(until)
                self._until = until
                self._waiting = getcurrent()
                try:
                    self._hub.switch()
                finally:
                    self._waiting = None
            try:
                return self._recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                is_worth_a_try = False  # So far there is a part of a TLS record, say.

    def read_available(self) -> bytes | None:
        """Return what has arrived without waiting; b'' when the peer has hung up, ``None`` when there is nothing."""
        try:
            return self._recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except OSError:
            return b""

    def close(self) -> None:
        """Close without waiting; again is harmless. Ends a wait in another greenlet with ``OSError``."""
        if self._reader is None:
            return
        reader, self._reader = self._reader, None
        self._is_watched = False
        self._send = self._recv = _closed_here
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
        if self._waiting is not None:
            self._hub.loop.run_callback(self._interrupt, self._waiting)
        # Before the socket: gevent closes the descriptor only when the watcher has been stopped.
        reader.close()
        self._sock.close()

    def _interrupt(self, waiting: Any) -> None:
        """End a wait that was under way when the channel was closed. Runs in the hub."""
        if self._waiting is waiting:
            waiting.throw(OSError("closed here"))

    def _write_rest(self, rest: memoryview, until: float) -> None:
        """Write what did not fit into the socket's buffer."""
        # What arrives meanwhile must not wake the writer.
        self._is_watched = False
        self._reader.stop()
        writer = self._hub.loop.io(self._sock.fileno(), _WAIT_FOR_WRITE)
        try:
            while rest:
                if until < self._alarm_at:
                    self._set_alarm(until)
                self._until = until
                self._waiting = getcurrent()
                writer.start(self._waiting.switch)
                try:
                    self._hub.switch()
                finally:
                    self._waiting = None
                    writer.stop()
                try:
                    rest = rest[self._send(rest) :]
                except BlockingIOError:
                    continue
        finally:
            writer.close()

    def _watch(self) -> None:
        if self._reader is None:
            raise OSError("closed here")
        self._is_watched = True
        self._reader.start(self._on_readable)

    def _on_readable(self) -> None:
        """Wake whoever waits for it. Runs in the hub, so it must not wait."""
        waiting = self._waiting
        if waiting is not None:
            waiting.switch()
        elif self._reader is not None:
            # Unasked for, or the peer has hung up: it is seen when the connection is read again.
            self._reader.stop()
            self._is_watched = False

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.close()
        # ref=False: a forgotten connection does not keep the process alive.
        self._alarm = self._hub.loop.timer(max(0.0, at - time.monotonic()), ref=False)
        self._alarm_at = at
        self._alarm.start(self._ring, update=True)

    def _ring(self) -> None:
        """Runs in the hub, so it must not wait."""
        self._alarm_at = math.inf
        if self._waiting is None:
            return
        if self._until <= time.monotonic():
            self._waiting.throw(ChannelTimeout("timed out"))
        else:
            self._set_alarm(self._until)


def _closed_here(*_: object) -> NoReturn:
    """What a closed channel sends and receives with."""
    raise OSError("closed here")
