"""An SMTP server for tests that does what it is told: answer, stall, drop the connection, talk garbage.

    with ScriptedSmtp({"rcpt": [say("550 5.1.1 unknown")], "dot": stall()}) as server:
        ...  # talk to 127.0.0.1:server.port
    assert server.commands[0] == "EHLO relay.example.org"

The script maps a phase to what happens there: one action for every time, or a list whose actions are used up one by
one, over all connections, before the normal reply comes back. Phases: banner ehlo starttls auth rset mail rcpt data
content dot noop quit. It records what it saw, for tests to assert on. It runs in greenlets of the test's own thread.
"""

from __future__ import annotations

import base64
import dataclasses
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gevent import socket, ssl
from gevent.event import Event
from gevent.server import StreamServer

LONGEST_WAIT_SECONDS = 30.0
MAX_MAIL_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Action:
    """What the server does instead of its normal reply."""

    data: bytes = b""
    then: Literal["go on", "drop", "stall"] = "go on"
    is_bytewise: bool = False


def say(text: str) -> Action:
    """Reply with ``text``; CRLF is added, and stands for every newline in it."""
    return Action(text.replace("\n", "\r\n").encode() + b"\r\n")


def say_and_drop(text: str) -> Action:
    """Reply and close the connection."""
    return dataclasses.replace(say(text), then="drop")


def say_bytewise(text: str) -> Action:
    """Reply in segments of one byte."""
    return dataclasses.replace(say(text), is_bytewise=True)


def garbage(data: bytes = b"\x00\xff what?\r\n") -> Action:
    """Send bytes as they are."""
    return Action(data)


def stall() -> Action:
    """Say nothing more until the server is closed."""
    return Action(then="stall")


def drop() -> Action:
    """Close the connection without a word."""
    return Action(then="drop")


Script = Mapping[str, Action | Sequence[Action]]


@dataclasses.dataclass(frozen=True)
class ReceivedMail:
    """One transaction that got as far as its final dot."""

    reverse_path: str
    forward_paths: tuple[str, ...]
    content: bytes
    """Without dot-stuffing and final dot."""
    connection: int
    """0 for the first connection."""


class ScriptedSmtp:
    """A context manager that serves on 127.0.0.1:``port``."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        extensions: Sequence[str] = ("PIPELINING", "ENHANCEDSTATUSCODES"),
        tls: Literal["", "starttls", "implicit"] = "",
        certificate: tuple[Path, Path] | None = None,
        credentials: tuple[str, str] | None = None,
        port: int = 0,
    ) -> None:
        self.connections: list[list[str]] = []
        """The commands of each connection, without CRLF."""
        self.mails: list[ReceivedMail] = []
        self.open_connections = 0
        self.peak_connections = 0
        self.credentials = credentials
        self.extensions = tuple(extensions)
        self.uses_starttls = tls == "starttls"
        self.ssl_context: Any = None
        if certificate is not None:
            self.ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.ssl_context.load_cert_chain(*map(str, certificate))
        self.stopping = Event()
        self._script: dict[str, Action | list[Action]] = {}
        self.change(script or {})
        self._is_implicit_tls = tls == "implicit"
        self._server = StreamServer(("127.0.0.1", port), self._serve)
        self._sockets: set[Any] = set()

    def change(self, script: Script) -> None:
        """Replace the script from here on."""
        self._script = {
            phase: action if isinstance(action, Action) else list(action) for phase, action in script.items()
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
        return action

    def drop_connections(self) -> None:
        """Hang up on everyone, as a restarting server does."""
        for sock in list(self._sockets):
            sock.close()

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
        self.peak_connections = max(self.peak_connections, self.open_connections)
        connection: _Connection | None = None
        try:
            sock.settimeout(LONGEST_WAIT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._is_implicit_tls:
                sock = self.ssl_context.wrap_socket(sock, server_side=True)
            self._sockets.add(sock)
            connection = _Connection(self, sock, number)
            connection.run()
        except (OSError, ValueError):
            pass  # The client, or the script, has ended the connection.
        finally:
            self.open_connections -= 1
            self._sockets.discard(sock)
            if connection is not None:
                connection.sock.close()
            sock.close()


class _Hangup(OSError):
    """The script ends the connection."""


class _Connection:
    def __init__(self, server: ScriptedSmtp, sock: Any, number: int) -> None:
        self.server = server
        self.sock = sock
        self.number = number
        self._input = b""
        self._output = b""
        self._reverse_path: str | None = None
        self._forward_paths: list[str] = []

    def run(self) -> None:
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
            self.sock = self.server.ssl_context.wrap_socket(self.sock, server_side=True)

    def _on_auth(self, line: str) -> None:
        _, mechanism, *initial = line.split(" ")
        if mechanism.upper() == "PLAIN":
            _, *given = base64.b64decode(initial[0]).decode().split("\0")
        else:
            given = [self._challenge("334 VXNlcm5hbWU6"), self._challenge("334 UGFzc3dvcmQ6")]
        is_right = tuple(given) == self.server.credentials
        self._answer("auth", "235 2.7.0 welcome" if is_right else "535 5.7.8 Authentication Credentials Invalid")

    def _challenge(self, text: str) -> str:
        self._output += text.encode() + b"\r\n"
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
        self._input = b"\r\n" + self._input
        content = self._read_until(b"\r\n.\r\n")[2:] + b"\r\n"
        content = content.removeprefix(b".") if content.startswith(b"..") else content
        content = content.replace(b"\r\n..", b"\r\n.")
        mail = ReceivedMail(self._reverse_path or "", tuple(self._forward_paths), content, self.number)
        self._reverse_path, self._forward_paths = None, []
        self.server.mails.append(mail)
        self._answer("dot", f"250 2.0.0 Ok: queued as Q{len(self.server.mails)}")

    def _answer(self, phase: str, normal: str) -> bytes:
        """Do what the script says, or send ``normal``; return what was sent."""
        action = self.server.next_action(phase) or say(normal)
        self._act(action)
        return action.data

    def _act(self, action: Action) -> None:
        self._output += action.data
        if action.is_bytewise:
            data, self._output = self._output, b""
            for position in range(len(data)):
                self.sock.sendall(data[position : position + 1])
        if action.then != "go on":
            self._flush()
            if action.then == "stall":
                self.server.stopping.wait(LONGEST_WAIT_SECONDS)
            raise _Hangup

    def _read_until(self, end: bytes) -> bytes:
        while end not in self._input:
            # As real servers do: replies to pipelined commands go out together, when there is nothing more to read.
            self._flush()
            self._receive()
        found, self._input = self._input.split(end, 1)
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


def make_certificate(directory: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Make a self-signed certificate for ``name``; return its file and its key's.

    The one for localhost is good for 127.0.0.1 too.
    """
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    names = f"subjectAltName=DNS:{name}" + (",IP:127.0.0.1" if name == "localhost" else "")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key
