"""SMTP smuggling: no content ends its own mail early, at whatever receiver, and becomes commands (CVE-2023-51764 ff.).

The receivers here are real ones' faults put together: each takes something else than CRLF for a line end, or something
else than CRLF.CRLF for the end of the content. All of them must see exactly one mail for each that was handed over,
with the same bytes.
"""

from __future__ import annotations

import email
import itertools
import json
import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import Outcome, Phase, State
from relay.delivery.smarthost import Smarthost
from relay.submission.compose import compose
from relay.submission.policy import Policy, judge
from relay.submission.request import decode_send_request
from tests.delivery.conftest import soon

READ_SECONDS = 15.0
LONGEST_END_BYTES = 16
LINE_END = re.compile(rb"\r\n|\r|\n")


class Receiver(NamedTuple):
    """How a server reads. Both patterns are looked for in what has arrived, from left to right."""

    line_end: bytes
    end_of_content: bytes
    """Looked for from the line end of the DATA command on."""
    dropped: bytes = b""
    """Octets that it takes out of the content before it looks at it."""

    @classmethod
    def with_ends(cls, *ends: bytes) -> Receiver:
        """One that ends the content at any of ``ends``, besides CRLF.CRLF, and takes their line ends for such."""
        every = {*ends, b"\r\n.\r\n"}
        line_ends = {line_end for end in every for line_end in end.split(b".")}
        return cls(_any_of(line_ends), _any_of(every))


def _any_of(alternatives: set[bytes]) -> bytes:
    """The pattern for one of these, the longest where several fit."""
    return b"|".join(re.escape(each) for each in sorted(alternatives, key=len, reverse=True))


ANY_LINE_END = rb"\r\n|\r|\n"
STRICT = Receiver(rb"\r\n", rb"\r\n\.\r\n")
LAX = Receiver(ANY_LINE_END, rb"(?:%b)\.(?:%b)" % (ANY_LINE_END, ANY_LINE_END))
RECEIVERS = {
    "strict": STRICT,
    "lone LF is a line end": Receiver(rb"\r?\n", rb"\r?\n\.\r?\n"),
    "lone CR is a line end": Receiver(rb"\r\n?", rb"\r\n?\.\r\n?"),
    "any is a line end": LAX,
    "blanks after the dot do not count": Receiver(
        ANY_LINE_END, rb"(?:%b)\.[ \t]*(?:%b)" % (ANY_LINE_END, ANY_LINE_END)
    ),
    "CR is dropped": Receiver(rb"\n", rb"\n\.\n", dropped=b"\r"),
    "NUL is dropped": LAX._replace(dropped=b"\0"),
} | {
    f"{before}.{after} is an end": Receiver.with_ends(f"{before}.{after}".encode().decode("unicode_escape").encode())
    for before, after in itertools.product((r"\r\n", r"\r", r"\n"), repeat=2)
}

# What may stand before and after a dot, as the content has it.
AROUND_A_DOT = (b"\r\n", b"\r", b"\n", b"\n\r", b"\r\r", b"\n\n", b"\r\r\n", b"\r\n\n", b"\r\n\r", b"\n\r\n")
SMUGGLED = (
    b"MAIL FROM:<evil@example.org>",
    b"RCPT TO:<victim@example.com>",
    b"DATA",
    b"Subject: Smuggled",
    b"",
    b"Evil",
)


def vectors() -> dict[str, bytes]:
    """Bodies that try to end their mail early, by name."""
    found: dict[str, bytes] = {}
    for before, after in itertools.product(AROUND_A_DOT, repeat=2):
        # The lines that are to become commands have the line ends with which the receiver was to be caught.
        line_end = after if after in (b"\r", b"\n") else b"\r\n"
        commands = line_end.join(SMUGGLED)
        found[f"{before!r}.{after!r}"] = b"Hello" + before + b"." + after + commands + before + b"." + after + b"QUIT"
    commands = b"\r\n".join(SMUGGLED)
    found |= {
        f"{start!r} at the start": start + commands
        for start in (b".\r\n", b".\r", b".\n", b"\r.\r", b"\n.\n", b"\r\n.\r\n", b"..\r\n", b".\r\n.\r\n")
    }
    found |= {
        f"{end!r} at the end": b"Hello" + end
        for end in (b"", b"\r", b"\n", b"\r\n.", b"\r.", b"\n.", b"\r\n.\r", b"\r\n.\n", b"\r\n..", b"\r\n.\r\n")
    }
    found |= {f"only {body!r}": body for body in (b".", b"..", b".\r\n", b".\r", b".\n", b"\r", b"\n", b"\r\n", b"")}
    for length in (997, 998, 999, 1000, 1024, 4096):
        # Where a receiver's buffer ends, a line seems to begin.
        for fill in (b"x" * length, b"." * length, b"x" * (length - 2) + b"\r\n"):
            found[f"{length} of {fill[:1]!r}, {fill[-1:]!r}"] = fill + b".\r\n" + commands
    for blank in (b" ", b"\t", b"\x0b", b"\x0c", b"\x08", b"\x7f", b"\x1b", b"\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf"):
        found[f"{blank!r} beside the dot"] = b"Hello\r\n." + blank + b"\r\n" + commands + blank + b".\r" + commands
    return found


VECTORS = vectors()
SHORT_VECTORS = {
    name: b"Hello" + body + b"NOOP\r\n"
    for name, body in {
        "dots between lone CRs": b"\r.\r.\r",
        "dots between lone LFs": b"\n.\n.\n",
        "dots between all kinds": b"\r\n.\r.\n.\r\n.\n\r.\r\r\n.\n\n",
        "only dots": b"\r\n..\r\n.\r\n...\r\n",
    }.items()
}


def normalised(content: bytes) -> bytes:
    """What should arrive: every line end a CRLF, and one at the end."""
    content = LINE_END.sub(b"\r\n", content)
    return content if content.endswith(b"\r\n") else content + b"\r\n"


class SeenMail(NamedTuple):
    """A mail as a receiver took it."""

    reverse_path: str
    forward_paths: tuple[str, ...]
    lines: list[bytes]


class LaxSmtp:
    """An SMTP server that reads as ``receiver`` does, and answers yes to everything."""

    def __init__(self, receiver: Receiver) -> None:
        self.mails: list[SeenMail] = []
        self.commands: list[str] = []
        self.chunk_bytes = 65536
        """The most that is read at once; 0: one octet for the first content, two for the second, up to 16."""
        self._receiver = receiver
        self._line_end = re.compile(receiver.line_end)
        self._end_of_content = re.compile(receiver.end_of_content)
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._sockets: set[Any] = set()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def lines(self, content: bytes) -> list[bytes]:
        """The lines of ``content`` as this receiver sees them."""
        return self._line_end.split(content.translate(None, self._receiver.dropped))

    def __enter__(self) -> LaxSmtp:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(timeout=1.0)
        for sock in list(self._sockets):
            sock.close()

    def _serve(self, sock: Any, _address: object) -> None:
        self._sockets.add(sock)
        try:
            sock.settimeout(READ_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._talk(sock)
        except OSError:
            pass  # The client has ended the connection, or the test is over.
        finally:
            self._sockets.discard(sock)
            sock.close()

    def _talk(self, sock: Any) -> None:
        sock.sendall(b"220 server.example.org ESMTP\r\n")
        buffer = b""
        reverse_path = ""
        forward_paths: list[str] = []
        while True:
            found, buffer = self._read_until(sock, self._line_end, buffer, 65536)
            line = found.decode("ascii", "backslashreplace")
            self.commands.append(line)
            reply = b"250 2.0.0 Ok\r\n"
            match line.upper().split(" ")[0]:
                case "EHLO":
                    reply = b"250-server.example.org\r\n250-PIPELINING\r\n250 8BITMIME\r\n"
                case "MAIL":
                    reverse_path, forward_paths = line, []
                case "RCPT":
                    forward_paths.append(line)
                case "DATA":
                    sock.sendall(b"354 Go ahead\r\n")
                    # A dot right after the command is one at the start of a line.
                    chunk_bytes = self.chunk_bytes or len(self.mails) % 16 + 1
                    start = self._cleaned(b"\r\n")
                    content, buffer = self._read_until(sock, self._end_of_content, start + buffer, chunk_bytes)
                    lines = [line.removeprefix(b".") for line in self._line_end.split(content.removeprefix(start))]
                    self.mails.append(SeenMail(reverse_path, tuple(forward_paths), lines))
                case "QUIT":
                    sock.sendall(b"221 2.0.0 Bye\r\n")
                    return
            sock.sendall(reply)

    def _read_until(
        self, sock: Any, end: re.Pattern[bytes], buffer: bytes | bytearray, chunk_bytes: int
    ) -> tuple[bytes, bytes]:
        """What stands before the first ``end``, and what has arrived after it."""
        buffer = bytearray(buffer)
        looked_at = 0
        # A CR at the very end may be half of a CRLF, which all of them know.
        while not (found := end.search(buffer, looked_at)) or (found.end() == len(buffer) and buffer.endswith(b"\r")):
            looked_at = max(0, len(buffer) - LONGEST_END_BYTES)
            data = sock.recv(chunk_bytes)
            if not data:
                raise ConnectionError
            buffer += self._cleaned(data)
        return bytes(buffer[: found.start()]), bytes(buffer[found.end() :])

    def _cleaned(self, data: bytes) -> bytes:
        return data.translate(None, self._receiver.dropped)


@pytest.fixture(params=list(RECEIVERS.values()), ids=list(RECEIVERS))
def server(request: pytest.FixtureRequest) -> Iterator[LaxSmtp]:
    """A receiver of each kind."""
    with LaxSmtp(request.param) as running:
        yield running


@pytest.fixture
def smarthost(server: LaxSmtp) -> Iterator[Smarthost]:
    """The sending side, with few connections: each has many mails one after another."""
    config = SmarthostConfig((Host("127.0.0.1", server.port),), tls="off", helo_name="relay.example.org", pool_size=4)
    sending = Smarthost(config)
    yield sending
    sending.close(soon(1))


def send_all(smarthost: Smarthost, contents: list[bytes]) -> None:
    """Hand all over, number N to ``bN@example.com``."""

    def send(number: int) -> Outcome:
        path = f"b{number}@example.com"
        (outcome,) = smarthost.relay("sender@example.org", (path,), contents[number], soon(15))
        return outcome

    sending = [gevent.spawn(send, number) for number in range(len(contents))]
    gevent.joinall(sending, raise_error=True)
    assert {greenlet.value.state for greenlet in sending} == {State.RELAYED}
    # A reply too many would have cost a connection.
    assert int(smarthost.figures()["connections_opened"]) <= 4


def expect_no_command_but_ours(server: LaxSmtp, count: int) -> None:
    """The server saw what ``count`` transactions consist of, and nothing else."""
    ours = ["MAIL FROM:<sender@example.org>", "DATA"] * count
    ours += [f"RCPT TO:<b{number}@example.com>" for number in range(count)]
    is_8bitmime = " BODY=8BITMIME"
    commands = [command.removesuffix(is_8bitmime) for command in server.commands if not command.startswith("EHLO")]
    assert sorted(commands) == sorted(ours)
    assert [mail.forward_paths for mail in server.mails] == [mail.forward_paths[:1] for mail in server.mails]
    assert sorted(mail.forward_paths[0] for mail in server.mails) == sorted(ours[2 * count :])


def contents_by_number(server: LaxSmtp) -> dict[int, list[bytes]]:
    """The lines of each mail that the server saw."""
    return {
        int(mail.forward_paths[0].removeprefix("RCPT TO:<b").removesuffix("@example.com>")): mail.lines
        for mail in server.mails
    }


def expect_contents(server: LaxSmtp, contents: list[bytes]) -> None:
    """Every mail arrived as it was meant, its line ends apart."""
    seen = contents_by_number(server)
    for number, content in enumerate(contents):
        # The last line end is part of the end of the content.
        assert seen[number] == server.lines(normalised(content).removesuffix(b"\r\n")), content[:200]


def test_each_vector_is_one_mail_with_its_own_bytes(server: LaxSmtp, smarthost: Smarthost) -> None:
    contents = [b"Subject: Hello\r\n\r\n" + body for body in VECTORS.values()]
    # What ends as it should looks harmless at a glance.
    contents += [content + b"\r\n" for content in contents]
    # What is no mail ends where it should all the same.
    contents += [body for body in VECTORS.values() if body.isascii()]
    server.chunk_bytes = 0
    send_all(smarthost, contents)
    expect_no_command_but_ours(server, len(contents))
    expect_contents(server, contents)


@pytest.mark.parametrize("server", [STRICT, LAX], indirect=True, ids=["strict", "lax"])
@pytest.mark.parametrize("body", list(SHORT_VECTORS.values()), ids=list(SHORT_VECTORS))
def test_wherever_the_stream_is_cut(server: LaxSmtp, smarthost: Smarthost, body: bytes) -> None:
    for number, chunk_bytes in enumerate(range(1, len(normalised(body)) + 8)):
        server.chunk_bytes = chunk_bytes
        path = f"b{number}@example.com"
        (outcome,) = smarthost.relay("sender@example.org", (path,), body, soon())
        assert outcome.state is State.RELAYED
        assert server.mails[-1].lines == server.lines(normalised(body).removesuffix(b"\r\n"))
    expect_no_command_but_ours(server, number + 1)


@pytest.mark.parametrize("server", [RECEIVERS["NUL is dropped"]], indirect=True, ids=["NUL is dropped"])
def test_nul_is_refused_before_mail(server: LaxSmtp, smarthost: Smarthost) -> None:
    """No mail has one (RFC 5322 §2.2 f., RFC 2045 §2.8), and a dot after one begins a line where it is dropped."""
    for position in (0, 20, 4000):
        content = b"Subject: Hello\r\n\r\n" + b"x" * position + b"\r\n\0.\r\n" + b"\r\n".join(SMUGGLED) + b"\r\n"
        (outcome,) = smarthost.relay("sender@example.org", ("b0@example.com",), content, soon())
        assert (outcome.state, outcome.phase, outcome.reply_code) == (State.FAILED, Phase.MAIL, None)
        assert not outcome.retryable
    assert server.mails == []
    send_all(smarthost, [b"Subject: Hello\r\n\r\nHello.\r\n"])
    expect_no_command_but_ours(server, 1)
    assert int(smarthost.figures()["connections_opened"]) == 1


def test_text_and_html_of_a_request(server: LaxSmtp, smarthost: Smarthost) -> None:
    bodies = [(body or b" ").decode("utf-8", "replace") for body in VECTORS.values()]
    bodies += [body + "\0.\0\r\n\0.\r\n" for body in bodies]
    send_all(smarthost, [composed(number, body) for number, body in enumerate(bodies)])
    expect_no_command_but_ours(server, len(bodies))
    seen = contents_by_number(server)
    for number, body in enumerate(bodies):
        mail = email.message_from_bytes(b"\r\n".join(seen[number]) + b"\r\n")
        expected = LINE_END.sub(b"\r\n", body.encode())
        assert [part.get_payload(decode=True) for part in mail.walk() if not part.is_multipart()] == [expected] * 2


POLICY = Policy(
    email_enabled=True,
    default_from="sender@example.org",
    default_from_display_name="Relay",
    allowed_from_domains=(),
    allowed_reply_to_domains=(),
    allowed_recipient_domains=(),
)


def composed(number: int, body: str) -> bytes:
    """The content that a request with ``body`` for both of its bodies becomes."""
    payload = {"to": f"b{number}@example.com", "subject": "Hello", "text": body, "html": body}
    request = decode_send_request(json.dumps(payload).encode())
    sender = judge(request, POLICY)
    assert sender is not None
    return compose(
        request=request,
        sender=sender,
        message_id_header=f"<{number}@example.org>",
        date_header="Thu, 01 Jan 2026 00:00:00 +0000",
        tracking_id=f"group/{number}",
        email_id=str(number),
        configuration_set="",
    )
