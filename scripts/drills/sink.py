"""An SMTP server that takes everything and keeps nothing but the mails' ids: a process of its own.

    python -m scripts.drills.sink [WAIT_SECONDS [PORT]]

prints ``listening on 127.0.0.1:PORT``; on SIGTERM it prints, as one JSON object, how often it took which mail (by its
tracking id). It offers PIPELINING, so that the smarthost is not what a drill waits for; unless ``WAIT_SECONDS`` is
given: so long it takes over the reply to each content, which makes a connection's rate known beforehand. On SIGUSR1 it
answers no content any more (with ``WAIT_SECONDS`` only), and all else as ever; on SIGUSR2 it answers those as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from relay import contract

START_SECONDS = 10.0
STOP_SECONDS = 10.0
END_OF_CONTENT = b"\r\n.\r\n"
_TRACKING_ID = re.compile(rb"^" + contract.TRACKING_HEADER.encode() + rb": .*/([^/\r\n]+)\r$", re.MULTILINE)


class Answers:
    """What is said to contents: at once, or when it speaks again."""

    def __init__(self) -> None:
        self._is_silent = False
        self._held: list[Callable[[], object]] = []

    def hush(self) -> None:
        """Says nothing from now on."""
        self._is_silent = True

    def speak(self) -> None:
        """Says what it has not said."""
        self._is_silent = False
        held, self._held = self._held, []
        for say in held:
            say()

    def give(self, say: Callable[[], object]) -> None:
        """Says it, if anything is said."""
        if self._is_silent:
            self._held.append(say)
        else:
            say()


class Session(asyncio.Protocol):
    """One connection. Commands are not checked: the relay's manners are other drills' business."""

    def __init__(self, taken: Counter[str], wait_seconds: float = 0.0, answers: Answers | None = None) -> None:
        self._taken = taken
        self._answers = answers or Answers()
        self._wait_seconds = wait_seconds
        self._received = bytearray()
        self._searched_bytes = 0
        """Of what was received: there is no end in them."""
        self._is_content = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(b"220 sink.example.com ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        """Answers every command and every content that is complete."""
        self._received += data
        replies = []
        while True:
            end = END_OF_CONTENT if self._is_content else b"\r\n"
            at = self._received.find(end, self._searched_bytes)
            if at < 0:
                self._searched_bytes = max(0, len(self._received) - len(END_OF_CONTENT))
                break
            before = bytes(self._received[:at])
            del self._received[: at + len(end)]
            self._searched_bytes = 0
            if self._is_content and self._wait_seconds:  # the relay says nothing more until it has this reply
                say = partial(self._transport.write, self._take(before))
                asyncio.get_running_loop().call_later(self._wait_seconds, self._answers.give, say)
                continue
            replies.append(self._take(before) if self._is_content else self._answer(before))
        self._transport.write(b"".join(replies))
        if b"221 bye\r\n" in replies:
            self._transport.close()

    def _answer(self, line: bytes) -> bytes:
        verb = line[:4].upper()
        if verb == b"DATA":
            self._is_content = True
            return b"354 go on\r\n"
        if verb == b"QUIT":
            return b"221 bye\r\n"
        if verb == b"EHLO":
            return b"250-sink.example.com\r\n250-PIPELINING\r\n250 8BITMIME\r\n"
        return b"250 ok\r\n"

    def _take(self, content: bytes) -> bytes:
        self._is_content = False
        found = _TRACKING_ID.search(content)
        self._taken[found[1].decode() if found else "no tracking id"] += 1
        return b"250 Ok taken\r\n"


class RunningSink:
    """The sink's process, from the outside."""

    def __init__(self, wait_seconds: float = 0.0, port: int = 0) -> None:
        """``port``: the one of a sink that was stopped, whose place this one takes; 0 is any."""
        command = [sys.executable, "-m", "scripts.drills.sink", str(wait_seconds), str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2])

    def freeze(self) -> None:
        """It hangs: its connections stay open, new ones come about, and it says nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._process.send_signal(signal.SIGCONT)

    def hush(self) -> None:
        """It takes contents, and does not answer them."""
        self._process.send_signal(signal.SIGUSR1)

    def speak(self) -> None:
        """It answers contents, those too that it has not."""
        self._process.send_signal(signal.SIGUSR2)

    def stop(self) -> Counter[str]:
        """Ends it; how often it took which mail."""
        self._process.terminate()
        printed, _ = self._process.communicate(timeout=STOP_SECONDS)
        return Counter(json.loads(printed))

    @classmethod
    @contextlib.contextmanager
    def started(cls, wait_seconds: float = 0.0, port: int = 0) -> Iterator[RunningSink]:
        """Runs one, and ends it whatever happens."""
        sink = cls(wait_seconds, port)
        try:
            yield sink
        finally:
            if sink._process.poll() is None:
                sink._process.kill()
                sink._process.communicate(timeout=STOP_SECONDS)


async def serve(wait_seconds: float, port: int) -> Counter[str]:
    """Serves until SIGTERM."""
    taken: Counter[str] = Counter()
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    answers = Answers()
    loop.add_signal_handler(signal.SIGTERM, asked_to_stop.set)
    loop.add_signal_handler(signal.SIGUSR1, answers.hush)
    loop.add_signal_handler(signal.SIGUSR2, answers.speak)
    server = await loop.create_server(lambda: Session(taken, wait_seconds, answers), "127.0.0.1", port, backlog=1000)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asked_to_stop.wait()
    server.close()
    return taken


if __name__ == "__main__":
    _wait_seconds, _port = [*sys.argv[1:], "0", "0"][:2]
    print(json.dumps(asyncio.run(serve(float(_wait_seconds), int(_port)))))
