"""A double of Amazon SES's SMTP endpoint, a process of its own, as strict and as short-tempered as the original.

    python -m scripts.drills.ses_double --certificate C --key K --figures F --log L --rate 40

prints ``listening on 127.0.0.1:PORT``, serves until SIGTERM or SIGINT, and then writes its figures as JSON. The log has
one line for everything it refused, closed or took. What it does as SES does (its developer guide, "SMTP response
codes", and field reports):

- STARTTLS and then AUTH PLAIN or LOGIN before the first mail. EHLO offers 8BITMIME and no PIPELINING: whatever
  arrives before the reply to the command in front of it is a violation, counted, and ends the connection.
- A session that says nothing for 10 s is over: its next command gets ``451 4.4.2 Timeout waiting for data from
  client.``, or the connection is simply closed. Which of the two, a seed decides for each connection.
- After 100 mails on a connection the next MAIL gets 421.
- Above a number of connections the banner is ``421 Too many concurrent SMTP connections``.
- Recipients above the rate get ``454 Throttling failure: Maximum sending rate exceeded`` to the final dot, and the mail
  is not taken. A token bucket with one second of burst, which starts full.

A mail is known by its tracking header. The figures name for each the moments (``time.monotonic()``, one clock for all
processes of a host) at which it was taken, and the ids it was taken under: more than one is a duplicate.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import random
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

import gevent
from gevent import socket, ssl
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from tests.support.scripted_smtp import make_certificate

ROOT: Final = Path(__file__).parents[2]
START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 10.0

MAX_LINE_BYTES: Final = 2048
MAX_MAIL_BYTES: Final = 40 * 1024 * 1024
HANDSHAKE_SECONDS: Final = 10.0
CONTENT_SECONDS: Final = 60.0
FORGOTTEN_SECONDS: Final = 120.0
"""How long a session that is over waits for the command that it will refuse."""
BURST_SECONDS: Final = 1.0
KINDS: Final = (
    "connections",
    "tls handshakes",
    "taken",
    "taken again",
    "454 throttled",
    "421 after enough mails",
    "421 too many connections",
    "451 idle",
    "idle, closed silently",
    "idle, waits to say 451",
    "535 login refused",
    "hung up in the middle of a mail",
    "broken connection",
    "violation",
)
"""What is counted, in the order in which the figures name it."""
TRACKING_ID: Final = re.compile(rb"^X-LFX-TRACKING-ID:[ \t]*([^\r\n]*)\r\n", re.IGNORECASE | re.MULTILINE)
PATH: Final = re.compile(r"(?i)(?:MAIL FROM|RCPT TO):<([^<> ]*)>(.*)")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may do before it is refused."""

    rate: float
    """Recipients a second."""
    connections: int = 30
    messages: int = 100
    """On one connection."""
    idle_seconds: float = 10.0
    command_ms: float = 5.0
    """Before each reply but that to the final dot: there and back, and a moment's thought."""
    dot_ms: float = 50.0


class Bucket:
    """Recipients that may still be taken."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._tokens = rate * BURST_SECONDS
        self._at = now

    def take(self, recipients: int, now: float) -> bool:
        """Whether so many more may be taken now; those that may not cost nothing."""
        self._tokens = min(self._rate * BURST_SECONDS, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < recipients:
            return False
        self._tokens -= recipients
        return True


class SesDouble:
    """The server: what all connections share. Serves on loopback from ``start`` to ``stop``."""

    def __init__(self, limits: Limits, context: Any, credentials: tuple[str, str], log: TextIO, seed: int) -> None:
        self.limits = limits
        self.context = context
        self.credentials = credentials
        self.seed = seed
        self.bucket = Bucket(limits.rate, time.monotonic())
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.taken: dict[str, list[tuple[float, str]]] = {}
        """By email_id: when, and the id in the reply."""
        self.throttled_at: list[float] = []
        self._log = log
        self._open = 0
        self._peak = 0
        self._server = StreamServer(("127.0.0.1", 0), self._serve, spawn=Pool())

    def start(self) -> int:
        """Listen; the port."""
        self._server.start()
        return int(self._server.server_port)

    def stop(self) -> None:
        """Hang up on everyone."""
        self._server.stop(timeout=0.1)

    def note(self, number: int, what: str, detail: str = "") -> None:
        """Count and log what happened on a connection."""
        self.counts[what] += 1
        self._log.write(f"{time.monotonic():.3f} #{number} {what}{': ' if detail else ''}{detail}\n")

    def figures(self) -> dict[str, Any]:
        """What was counted, and every mail that was taken."""
        return {
            "counts": dict(self.counts),
            "peak_connections": self._peak,
            "taken": self.taken,
            "throttled_at": self.throttled_at,
        }

    def _serve(self, sock: Any, _address: object) -> None:
        self.counts["connections"] += 1
        connection = _Connection(self, sock, self.counts["connections"])
        is_one_too_many = self._open >= self.limits.connections
        self._open += not is_one_too_many
        self._peak = max(self._peak, self._open)
        try:
            if is_one_too_many:
                self.note(connection.number, "421 too many connections")
                connection.refuse("421 Too many concurrent SMTP connections")
            else:
                connection.run()
        except _Over as over:
            if str(over):
                self.note(connection.number, "violation", str(over))
        except OSError as error:
            self.note(connection.number, "broken connection", str(error))
        finally:
            self._open -= not is_one_too_many
            connection.close()


class _Over(Exception):
    """The connection ends; the text is the client's violation, if there was one."""


class _Connection:
    """One client's session."""

    def __init__(self, server: SesDouble, sock: Any, number: int) -> None:
        self.number = number
        self._server = server
        self._sock = sock
        self._input = b""
        self._is_tls = False
        self._is_logged_in = False
        self._has_mail = False
        self._recipients = 0
        self._messages = 0
        # By number, not by turn: which connections end how does not depend on who was first.
        self._is_silent = random.Random(f"{server.seed}/{number}").random() < 0.5

    def close(self) -> None:
        self._sock.close()

    def refuse(self, banner: str) -> None:
        """Say why nothing follows, and wait for the client to take note: a close at once might overtake the words."""
        self._sock.sendall(banner.encode() + b"\r\n")
        self._sock.shutdown(socket.SHUT_WR)
        with gevent.Timeout(HANDSHAKE_SECONDS, False):
            while self._sock.recv(MAX_LINE_BYTES):
                continue

    def run(self) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reply("220 email-smtp.example.com ESMTP SimpleEmailService-double")
        while True:
            command = self._next_command()
            verb = command.partition(" ")[0].upper()
            handler = self._handlers.get(verb)
            if handler is None:
                self._reply("500 Error: command not implemented")
            elif verb not in _ALWAYS and not self._is_tls:
                self._reply("530 Must issue a STARTTLS command first")
            elif verb not in _BEFORE_LOGIN and not self._is_logged_in:
                self._reply("530 Authentication required")
            else:
                handler(self, command)

    def _ehlo(self, _command: str) -> None:
        self._has_mail = False
        self._reply("250-email-smtp.example.com\r\n250-8BITMIME\r\n250-STARTTLS\r\n250-AUTH PLAIN LOGIN\r\n250 Ok")

    def _starttls(self, _command: str) -> None:
        if self._is_tls:
            self._reply("503 TLS is already in use")
            return
        self._reply("220 Ready to start TLS")
        self._sock.settimeout(HANDSHAKE_SECONDS)
        self._sock = self._server.context.wrap_socket(self._sock, server_side=True)
        self._is_tls = True
        self._server.counts["tls handshakes"] += 1

    def _auth(self, command: str) -> None:
        words = command.split(" ")
        mechanism = words[1].upper() if len(words) > 1 else ""
        if self._is_logged_in or mechanism not in {"PLAIN", "LOGIN"}:
            self._reply("503 Error: wrong time or mechanism for AUTH")
            return
        if mechanism == "PLAIN":
            given = _decoded(words[2] if len(words) > 2 else self._ask("334 ")).split("\0")[1:]
        else:
            given = [_decoded(words[2] if len(words) > 2 else self._ask("334 VXNlcm5hbWU6"))]
            given.append(_decoded(self._ask("334 UGFzc3dvcmQ6")))
        self._is_logged_in = tuple(given) == self._server.credentials
        if self._is_logged_in:
            self._reply("235 Authentication successful.")
        else:
            self._server.note(self.number, "535 login refused")
            self._reply("535 Authentication Credentials Invalid")

    def _mail(self, command: str) -> None:
        if self._has_mail:
            self._violated("503 Error: nested MAIL command", command)
        elif not (found := PATH.fullmatch(command)) or found[2].upper() not in {"", " BODY=8BITMIME", " BODY=7BIT"}:
            self._violated("501 Invalid MAIL FROM address provided", command)
        elif self._messages >= self._server.limits.messages:
            self._server.note(self.number, "421 after enough mails")
            self._reply("421 Too many messages on this connection")
            raise _Over
        else:
            self._has_mail = True
            self._recipients = 0
            self._reply("250 Ok")

    def _rcpt(self, command: str) -> None:
        if not self._has_mail:
            self._violated("503 Error: need MAIL command", command)
        elif not (found := PATH.fullmatch(command)) or not found[1] or found[2]:
            self._violated("501 Invalid RCPT TO address provided", command)
        else:
            self._recipients += 1
            self._reply("250 Ok")

    def _data(self, command: str) -> None:
        if not self._recipients or not self._has_mail:
            self._violated("503 Error: need RCPT command", command)
            return
        self._reply("354 End data with <CR><LF>.<CR><LF>")
        content = self._read_content()
        now = time.monotonic()
        self._has_mail = False
        recipients, self._recipients = self._recipients, 0
        email_id = _email_id(content)
        if not self._server.bucket.take(recipients, now):
            self._server.throttled_at.append(now)
            self._server.note(self.number, "454 throttled", email_id)
            self._reply("454 Throttling failure: Maximum sending rate exceeded.", self._server.limits.dot_ms)
            return
        self._messages += 1
        remote_id = f"0100{uuid.uuid4().hex[:12]}-{uuid.uuid4()}-000000"
        times = self._server.taken.setdefault(email_id, [])
        times.append((now, remote_id))
        self._server.note(self.number, "taken" if len(times) == 1 else "taken again", email_id)
        self._reply(f"250 Ok {remote_id}", self._server.limits.dot_ms)

    def _rset(self, _command: str) -> None:
        self._has_mail = False
        self._recipients = 0
        self._reply("250 Ok")

    def _noop(self, _command: str) -> None:
        self._reply("250 Ok")

    def _quit(self, _command: str) -> None:
        with contextlib.suppress(OSError):  # few clients wait for the answer
            self._reply("221 Bye")
        raise _Over

    _handlers: Final[dict[str, Callable[[_Connection, str], None]]] = {
        "EHLO": _ehlo,
        "STARTTLS": _starttls,
        "AUTH": _auth,
        "MAIL": _mail,
        "RCPT": _rcpt,
        "DATA": _data,
        "RSET": _rset,
        "NOOP": _noop,
        "QUIT": _quit,
    }

    def _next_command(self) -> str:
        try:
            return self._read_line(self._server.limits.idle_seconds)
        except TimeoutError:
            if self._input:
                raise _Over(f"half a command: {self._input!r}") from None
        if self._is_silent:
            self._server.note(self.number, "idle, closed silently")
            raise _Over
        self._server.note(self.number, "idle, waits to say 451")
        try:
            self._read_line(FORGOTTEN_SECONDS)
        except TimeoutError:
            raise _Over from None
        self._server.note(self.number, "451 idle")
        self._reply("451 4.4.2 Timeout waiting for data from client.")
        raise _Over

    def _ask(self, text: str) -> str:
        self._reply(text)
        return self._read_line(self._server.limits.idle_seconds)

    def _violated(self, text: str, command: str) -> None:
        self._server.note(self.number, "violation", f"{command[:100]!r} was answered {text}")
        self._reply(text)

    def _reply(self, text: str, after_ms: float | None = None) -> None:
        """Answer after a while, and only a client that has waited for it."""
        gevent.sleep((self._server.limits.command_ms if after_ms is None else after_ms) / 1000)
        if self._input or self._has_more():
            raise _Over(f"pipelined without being offered it: {self._input[:100]!r} before {text[:20]!r}")
        self._sock.settimeout(HANDSHAKE_SECONDS)
        self._sock.sendall(text.encode() + b"\r\n")

    def _has_more(self) -> bool:
        """Whether something has arrived; the end of the connection is not something."""
        self._sock.settimeout(0.0)
        try:
            self._input += self._sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError, TimeoutError):
            return False
        return bool(self._input)

    def _read_line(self, seconds: float) -> str:
        return self._read_until(b"\r\n", MAX_LINE_BYTES, seconds).decode("ascii", "backslashreplace")

    def _read_content(self) -> bytes:
        """The content, still dot-stuffed, with the line end before the dot: enough to know a mail by."""
        # The dot may be the first line.
        self._input = b"\r\n" + self._input
        return self._read_until(b"\r\n.\r\n", MAX_MAIL_BYTES, CONTENT_SECONDS) + b"\r\n"

    def _read_until(self, end: bytes, limit_bytes: int, seconds: float) -> bytes:
        """What comes before ``end``. Raises ``TimeoutError`` when nothing has arrived for so long."""
        self._sock.settimeout(seconds)
        while end not in self._input:
            data = self._sock.recv(65536)
            if not data:
                if self._has_mail:
                    self._server.note(self.number, "hung up in the middle of a mail")
                raise _Over
            self._input += data
            if len(self._input) > limit_bytes:
                raise _Over(f"more than {limit_bytes} bytes")
        found, self._input = self._input.split(end, 1)
        return found


_ALWAYS: Final = frozenset({"EHLO", "STARTTLS", "NOOP", "QUIT"})
_BEFORE_LOGIN: Final = _ALWAYS | {"AUTH"}


def _decoded(word: str) -> str:
    try:
        return base64.b64decode(word, validate=True).decode()
    except ValueError:
        return ""


def _email_id(content: bytes) -> str:
    """What follows the last slash of the tracking header; '' when the mail has none."""
    found = TRACKING_ID.search(content.partition(b"\r\n\r\n")[0] + b"\r\n")
    return found[1].decode("ascii", "backslashreplace").rpartition("/")[2] if found else ""


class RunningDouble:
    """A double as a process, seen by whoever started it."""

    def __init__(self, directory: Path, limits: Limits, seed: int = 1) -> None:
        """Start it; ``directory`` gets its certificate, its log and its figures. Returns when it listens."""
        self.certificate, key = make_certificate(directory)
        """For clients to trust: it is its own authority, and good for localhost and 127.0.0.1."""
        self.username, self.password = "user", "secret"
        self.log_path = directory / "double.log"
        self._figures_path = directory / "double.json"
        command = [sys.executable, "-m", "scripts.drills.ses_double", "--certificate", str(self.certificate)]
        command += ["--key", str(key), "--figures", str(self._figures_path), "--log", str(self.log_path)]
        command += ["--username", self.username, "--password", self.password, "--seed", str(seed)]
        for name, value in dataclasses.asdict(limits).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        is_there, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            self._end()
            raise RuntimeError("the SES double does not start; what it says is on standard error")
        self.port = int(line.rpartition(":")[2])

    def stop(self) -> dict[str, Any]:
        """End it; its figures."""
        self._end()
        figures: dict[str, Any] = json.loads(self._figures_path.read_text())
        return figures

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    @classmethod
    @contextlib.contextmanager
    def started(cls, directory: Path, limits: Limits, seed: int = 1) -> Iterator[RunningDouble]:
        """Ends with the block, also when nobody asked for the figures."""
        double = cls(directory, limits, seed)
        try:
            yield double
        finally:
            double._end()


def main() -> None:
    """Serves until it is told to stop, then writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("certificate", "key", "figures", "log"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--username", default="user")
    parser.add_argument("--password", default="secret")
    parser.add_argument("--seed", type=int, default=1)
    for field in dataclasses.fields(Limits):
        is_required = field.default is dataclasses.MISSING
        kind = int if isinstance(field.default, int) else float
        default = None if is_required else field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, required=is_required, default=default)
    options = vars(parser.parse_args())
    limits = Limits(**{field.name: options[field.name] for field in dataclasses.fields(Limits)})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options["certificate"], options["key"])
    asked = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, asked.set)
    with options["log"].open("w", buffering=1) as log:
        double = SesDouble(limits, context, (options["username"], options["password"]), log, options["seed"])
        print(f"listening on 127.0.0.1:{double.start()}", flush=True)
        asked.wait()
        figures = double.figures()
        double.stop()
    options["figures"].write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
