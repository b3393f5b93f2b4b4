"""A proxy before a real nats-server that reads along what a client publishes, and cuts the connection at a given place.

It counts the publications of interest, and what it was told to do happens at exactly one of them: what was forwarded
before has reached the server and was worked on, what comes after never does, and no answer reaches the client.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import BinaryIO

from relay import contract

WAIT_SECONDS = 10.0
HOLD_SECONDS = 1.5
READ_BYTES = 65_536


class Action(Enum):
    """What happens to a publication."""

    CUT_BEFORE = auto()
    """It does not get through, and the connection ends."""
    CUT_AFTER = auto()
    """It gets through, the connection ends and nobody is told."""
    DROP = auto()
    """It does not get through; nothing else happens."""
    HOLD = auto()
    """It gets through after ``HOLD_SECONDS``, as when everything stands still for so long."""


def is_tracking(nats_subject: str) -> bool:
    """Whether a publication is a fact or a record."""
    return nats_subject.startswith(("$KV.", f"{contract.LOG_PREFIX}."))


class NatsProxy:
    """Listens until ``stop``. ``begin`` says what is to happen from now on."""

    def __init__(self, target_port: int, is_counted: Callable[[str], bool] = is_tracking) -> None:
        self._target_port = target_port
        self._is_counted = is_counted
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"nats://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._at = 0
        self._action = Action.DROP
        self._then: Callable[[], None] | None = None
        self._is_refusing = False
        self._is_stopped = False
        self._sockets: list[socket.socket] = []
        self.counted = 0
        """Publications of interest since ``begin``."""
        self.is_reached = False
        """Whether what was to happen has happened."""
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def begin(self, at: int, action: Action, then: Callable[[], None] | None = None) -> None:
        """Counts from 0 on; the ``at``-th publication meets ``action``, then ``then`` is called in another thread.

        After a cut nobody can connect until ``accept_again``.
        """
        with self._lock:
            self._at, self._action, self._then = at, action, then
            self.counted = 0
            self.is_reached = False

    def accept_again(self) -> None:
        """Ends an outage."""
        self._is_refusing = False

    def stop(self) -> None:
        """Closes everything and waits for it."""
        self._is_stopped = True
        for sock in (self._listener, *self._sockets):
            _end(sock)
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()

    # -- threads ---------------------------------------------------------------------------
    def _accept(self) -> None:
        while not self._is_stopped:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_refusing:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target_port), WAIT_SECONDS)
            server.settimeout(None)
            self._sockets += [client, server]
            answers = threading.Thread(target=self._carry_answers, args=(server, client))
            requests = threading.Thread(target=self._carry_requests, args=(client, server, answers))
            self._threads += [answers, requests]
            answers.start()
            requests.start()

    def _carry_answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(READ_BYTES):
                if not self._is_refusing:
                    with contextlib.suppress(OSError):
                        client.sendall(data)
        if not self._is_refusing:
            _end(client)

    def _carry_requests(self, client: socket.socket, server: socket.socket, answers: threading.Thread) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as lines:
            for nats_subject, octets in _operations(lines):
                if nats_subject and self._is_counted(nats_subject) and self._is_met():
                    if self._action is Action.CUT_BEFORE:
                        break
                    if self._action is Action.DROP:
                        self._reach()
                        continue
                    if self._action is Action.HOLD:
                        time.sleep(HOLD_SECONDS)
                        self._reach()
                    else:
                        server.sendall(octets)
                        break
                server.sendall(octets)
        # The server works on what it has, sees the end and closes: only then is anybody told.
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)
        answers.join(WAIT_SECONDS)
        if self._is_refusing and not self.is_reached:
            self._reach()
        _end(client)
        server.close()
        client.close()

    def _is_met(self) -> bool:
        """Counts one more; whether it is the one."""
        with self._lock:
            self.counted += 1
            is_met = self.counted == self._at
            if is_met and self._action in {Action.CUT_BEFORE, Action.CUT_AFTER}:
                self._is_refusing = True  # also what the server has still to say to this client
            return is_met

    def _reach(self) -> None:
        if self._then is not None:
            self._then()
        self.is_reached = True


def _operations(client: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """What a client says, operation by operation: the subject of a publication ('' of anything else), and its bytes."""
    for line in client:
        words = line.split()
        if words and words[0] in {b"PUB", b"HPUB"}:
            yield words[1].decode(), line + client.read(int(words[-1]) + 2)
        else:
            yield "", line


def _end(sock: socket.socket) -> None:
    """Wakes whoever reads it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if sock.type == socket.SOCK_STREAM:
        with contextlib.suppress(OSError):
            sock.close()
