"""An SMTP server for tests that does what it is told: answer, stall, drop the connection, talk garbage.

    with ScriptedSmtp({"rcpt": [say("550 5.1.1 unknown")], "dot": stall()}) as server:
        ...  # talk to 127.0.0.1:server.port
    assert server.commands[0] == "EHLO relay.example.org"

The script maps a phase to what happens there: one action for every time, a list whose actions are used up one by
one, over all connections, before the normal reply comes back, or a function that is asked each time. Phases: banner
ehlo starttls handshake auth_begin auth_username auth rset mail rcpt data reading content dot noop quit. ``handshake``
is the TLS one, before which an action's bytes go out in clear; ``auth_begin`` and ``auth_username`` are the 334s of
LOGIN; ``content`` comes when a first part of it has been read, ``reading`` before each part, and neither has a normal
reply. It records what it saw, for tests to assert on. It runs in greenlets of the test's own thread.
"""

from __future__ import annotations

import base64
import dataclasses
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import gevent
from gevent import socket, ssl
from gevent.event import Event
from gevent.server import StreamServer

LONGEST_WAIT_SECONDS = 30.0
TCP_ESTABLISHED = 1
MAX_MAIL_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Action:
    """What the server does instead of its normal reply."""

    data: bytes = b""
    then: Literal["go on", "drop", "stall"] = "go on"
    is_bytewise: bool = False
    wait_seconds: float = 0.0
    """Before anything else."""
    byte_seconds: float = 0.0
    """Between two bytes of what is said bytewise."""
    part: Literal["whole", "half", "first line", "none"] = "whole"
    """How much is said of the normal reply, which follows where there is no ``data`` and ``then`` is to go on."""


def say(text: str) -> Action:
    """Reply with ``text``; CRLF is added, and stands for every newline in it."""
    return Action(text.replace("\n", "\r\n").encode() + b"\r\n")


def say_and_drop(text: str) -> Action:
    """Reply and close the connection."""
    return dataclasses.replace(say(text), then="drop")


def say_bytewise(text: str) -> Action:
    """Reply in segments of one byte."""
    return dataclasses.replace(say(text), is_bytewise=True)


def bytewise(byte_seconds: float = 0.0) -> Action:
    """Give the normal reply in segments of one byte."""
    return Action(is_bytewise=True, byte_seconds=byte_seconds)


def half() -> Action:
    """Give the first half of the normal reply, then say nothing more."""
    return Action(part="half")


def first_line() -> Action:
    """Give the first line of a longer form of the normal reply and the beginning of the second, then nothing more."""
    return Action(part="first line")


def silence() -> Action:
    """Say nothing and go on, as if the reply had been given."""
    return Action(part="none")


def garbage(data: bytes = b"\x00\xff what?\r\n") -> Action:
    """Send bytes as they are."""
    return Action(data)


def wait(seconds: float) -> Action:
    """Give the normal reply, but only after a while."""
    return Action(wait_seconds=seconds)


def stall() -> Action:
    """Say nothing more until the server is closed."""
    return Action(then="stall")


def drop() -> Action:
    """Close the connection without a word."""
    return Action(then="drop")


Script = Mapping[str, Action | Sequence[Action] | Callable[[], Action | None]]


@dataclasses.dataclass(frozen=True)
class ReceivedMail:
    """One transaction that got as far as its final dot."""

    reverse_path: str
    forward_paths: tuple[str, ...]
    content: bytes
    """Without dot-stuffing and final dot."""
    connection: int
    """0 for the first connection."""
    answer: bytes
    """To the final dot, whether or not it arrived; b'' when there was none."""

    @property
    def is_accepted(self) -> bool:
        return self.answer.startswith(b"2")


class ScriptedSmtp:
    """A context manager that serves on ``address``:``port``."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        extensions: Sequence[str] = ("PIPELINING", "ENHANCEDSTATUSCODES"),
        tls: Literal["", "starttls", "implicit"] = "",
        certificate: tuple[Path, Path] | None = None,
        credentials: tuple[str, str] | None = None,
        port: int = 0,
        address: str = "127.0.0.1",
    ) -> None:
        self.connections: list[list[str]] = []
        """The commands of each connection, without CRLF."""
        self.mails: list[ReceivedMail] = []
        """Those whose final dot came."""
        self.open_connections = 0
        """Those that this server has not closed yet."""
        self.peak_connections = 0
        """The most that were open at once, without those that the client had closed."""
        self.credentials = credentials
        self.extensions = tuple(extensions)
        self.uses_starttls = tls == "starttls"
        self.ssl_context: Any = None
        if certificate is not None:
            self.ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.ssl_context.load_cert_chain(*map(str, certificate))
        self.stopping = Event()
        self._script: dict[str, Action | list[Action] | Callable[[], Action | None]] = {}
        self.change(script or {})
        self.uses_implicit_tls = tls == "implicit"
        self.address = address
        self._server = StreamServer((address, port), self._serve)
        self.open: set[_Connection] = set()

    def change(self, script: Script) -> None:
        """Replace the script from here on."""
        self._script = {
            phase: list(action) if isinstance(action, Sequence) else action for phase, action in script.items()
        }

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    @property
    def commands(self) -> list[str]:
        """All commands of all connections, one connection after the other."""
        return [command for connection in self.connections for command in connection]

    def next_action(self, phase: str) -> Action | None:
        """Take the scripted action for ``phase``, ``None`` when the normal reply is due."""
        action = self._script.get(phase)
        if isinstance(action, list):
            return action.pop(0) if action else None
        return action() if callable(action) else action

    def drop_connections(self) -> None:
        """Hang up on everyone, as a restarting server does."""
        for connection in list(self.open):
            connection.sock.close()

    def verbs(self, connection: int) -> list[str]:
        """The commands of one connection without their arguments."""
        return [command.split(" ", 1)[0] for command in self.connections[connection]]

    def has_heard(self, verb: str, connection: int) -> bool:
        """Whether the connection is there and this was its last command."""
        return len(self.connections) > connection and self.verbs(connection)[-1:] == [verb]

    def __enter__(self) -> ScriptedSmtp:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.stop(timeout=1.0)
        self.drop_connections()

    def _serve(self, sock: Any, _address: object) -> None:
        number = len(self.connections)
        self.connections.append([])
        self.open_connections += 1
        connection = _Connection(self, sock, number)
        self.open.add(connection)
        self.peak_connections = max(self.peak_connections, sum(each.is_established for each in self.open))
        try:
            sock.settimeout(LONGEST_WAIT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.run()
        except (OSError, ValueError):
            pass  # The client, or the script, has ended the connection.
        finally:
            self.open_connections -= 1
            self.open.discard(connection)
            connection.sock.close()
            sock.close()


class _Hangup(OSError):
    """The script ends the connection."""


class _Connection:
    def __init__(self, server: ScriptedSmtp, sock: Any, number: int) -> None:
        self.server = server
        self.sock = sock
        self.number = number
        self._input = bytearray()
        self._output = b""
        self._reverse_path: str | None = None
        self._forward_paths: list[str] = []

    @property
    def is_established(self) -> bool:
        """Whether the client, too, has not closed it; only Linux tells."""
        if not hasattr(socket, "TCP_INFO"):
            return True
        try:
            state: bytes = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return False
        return state[0] == TCP_ESTABLISHED

    def run(self) -> None:
        if self.server.uses_implicit_tls:
            self._start_tls()
        self._answer("banner", "220 server.example.org ESMTP")
        while True:
            line = self._read_until(b"\r\n").decode("utf-8", "backslashreplace")
            self.server.connections[self.number].append(line)
            verb = line.split(" ", 1)[0].split(":", 1)[0].upper()
            handler = getattr(self, f"_on_{verb.lower()}", None)
            if handler is None:
                self._answer("unknown", "500 5.5.2 unknown command")
            else:
                handler(line)

    def _on_ehlo(self, _line: str) -> None:
        words = list(self.server.extensions)
        if self.server.uses_starttls and not isinstance(self.sock, ssl.SSLSocket):
            words.append("STARTTLS")
        if self.server.credentials and not any(word.startswith("AUTH") for word in words):
            words.append("AUTH PLAIN LOGIN")
        lines = ["server.example.org", *words]
        self._answer("ehlo", "\n".join([*(f"250-{word}" for word in lines[:-1]), f"250 {lines[-1]}"]))

    def _on_starttls(self, _line: str) -> None:
        if self._answer("starttls", "220 2.0.0 go ahead").startswith(b"220"):
            self._flush()
            self._start_tls()

    def _start_tls(self) -> None:
        action = self.server.next_action("handshake")
        if action is not None:
            # What came before the client's first bytes would not be part of the handshake.
            self.sock.recv(1, socket.MSG_PEEK)
            self._act(action)
            self._flush()
        self.sock = self.server.ssl_context.wrap_socket(self.sock, server_side=True)

    def _on_auth(self, line: str) -> None:
        _, mechanism, *initial = line.split(" ")
        if mechanism.upper() == "PLAIN":
            _, *given = base64.b64decode(initial[0]).decode().split("\0")
        else:
            given = [
                self._challenge("auth_begin", "334 VXNlcm5hbWU6"),
                self._challenge("auth_username", "334 UGFzc3dvcmQ6"),
            ]
        is_right = tuple(given) == self.server.credentials
        self._answer("auth", "235 2.7.0 welcome" if is_right else "535 5.7.8 Authentication Credentials Invalid")

    def _challenge(self, phase: str, text: str) -> str:
        self._answer(phase, text)
        return base64.b64decode(self._read_until(b"\r\n")).decode()

    def _on_noop(self, _line: str) -> None:
        self._answer("noop", "250 2.0.0 Ok")

    def _on_rset(self, _line: str) -> None:
        self._reverse_path, self._forward_paths = None, []
        self._answer("rset", "250 2.0.0 Ok")

    def _on_quit(self, _line: str) -> None:
        self._answer("quit", "221 2.0.0 Bye")
        self._flush()
        raise _Hangup

    def _on_mail(self, line: str) -> None:
        if self._reverse_path is not None:
            self._answer("nested", "503 5.5.1 nested MAIL command")
        elif self._answer("mail", "250 2.1.0 Ok").startswith(b"2"):
            self._reverse_path = line[line.index("<") + 1 : line.rindex(">")]

    def _on_rcpt(self, line: str) -> None:
        if self._reverse_path is None:
            self._answer("order", "503 5.5.1 MAIL first")
        elif self._answer("rcpt", "250 2.1.5 Ok").startswith(b"2"):
            self._forward_paths.append(line[line.index("<") + 1 : line.rindex(">")])

    def _on_data(self, _line: str) -> None:
        normal = "354 End data with <CR><LF>.<CR><LF>" if self._forward_paths else "554 5.5.1 no valid recipients"
        if not self._answer("data", normal).startswith(b"354"):
            return
        self._flush()
        action = self.server.next_action("content")
        if action is not None:
            self._receive()
            self._act(action)
        # The line end before the dot belongs to the content; when there is none, the dot follows the command.
        self._input[:0] = b"\r\n"
        content = self._read_until(b"\r\n.\r\n", "reading")[2:] + b"\r\n"
        content = content.removeprefix(b".") if content.startswith(b"..") else content
        content = content.replace(b"\r\n..", b"\r\n.")
        action = self._decide("dot", f"250 2.0.0 Ok: queued as Q{len(self.server.mails) + 1}")
        self.server.mails.append(
            ReceivedMail(self._reverse_path or "", tuple(self._forward_paths), content, self.number, action.data)
        )
        self._reverse_path, self._forward_paths = None, []
        self._act(action)

    def _answer(self, phase: str, normal: str) -> bytes:
        """Do what the script says, or send ``normal``; return what was sent."""
        action = self._decide(phase, normal)
        self._act(action)
        return action.data

    def _decide(self, phase: str, normal: str) -> Action:
        """Take the scripted action, or the normal reply."""
        action = self.server.next_action(phase) or Action()
        if action.data or action.then != "go on":
            return action
        if action.part == "none":
            return action
        reply = normal.replace("\n", "\r\n") + "\r\n"
        match action.part:
            case "half":
                return dataclasses.replace(action, data=reply[: len(reply) // 2].encode(), then="stall")
            case "first line":
                return dataclasses.replace(action, data=f"{reply[:3]}-and so on\r\n{reply[:2]}".encode(), then="stall")
        return dataclasses.replace(action, data=reply.encode())

    def _act(self, action: Action) -> None:
        if action.wait_seconds:
            self._flush()
            self.server.stopping.wait(action.wait_seconds)
        if action.is_bytewise:
            self._flush()
            for position in range(len(action.data)):
                self.sock.sendall(action.data[position : position + 1])
                # Also without a pause the client has its turn, so that it sees each byte alone.
                gevent.sleep(action.byte_seconds)
        else:
            self._output += action.data
        if action.then != "go on":
            self._flush()
            if action.then == "stall":
                self.server.stopping.wait(LONGEST_WAIT_SECONDS)
            raise _Hangup

    def _read_until(self, end: bytes, phase: str = "") -> bytes:
        looked_at = 0
        while (place := self._input.find(end, looked_at)) < 0:
            looked_at = max(0, len(self._input) - len(end))
            if phase:
                self._act(self.server.next_action(phase) or Action())
            # As real servers do: replies to pipelined commands go out together, when there is nothing more to read.
            self._flush()
            self._receive()
        found = bytes(self._input[:place])
        del self._input[: place + len(end)]
        return found

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data or len(self._input) > MAX_MAIL_BYTES:
            raise _Hangup
        self._input += data

    def _flush(self) -> None:
        data, self._output = self._output, b""
        if data:
            self.sock.sendall(data)


def eventually(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until it is so, which happens in other greenlets; fail after ``seconds``."""
    ends_at = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends_at, "it did not become so"
        gevent.sleep(0.005)


def make_certificate(directory: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Make a self-signed certificate for ``name``; return its file and its key's.

    The one for localhost is good for 127.0.0.1 and 127.0.0.2 too.
    """
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    names = f"subjectAltName=DNS:{name}" + (",IP:127.0.0.1,IP:127.0.0.2" if name == "localhost" else "")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key
