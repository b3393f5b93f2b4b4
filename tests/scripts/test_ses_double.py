"""The double of Amazon SES over real TCP and TLS, as the drills start it: what it asks for, refuses and counts.

The client is the standard library's, or bytes on a socket where that one would not misbehave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.drills.ses_double import Limits, RunningDouble
from tests.conftest import require

WAIT_SECONDS = 10.0
FAST = Limits(rate=1000.0, command_ms=0.0, dot_ms=0.0)


@pytest.fixture
def new_double(tmp_path: Path) -> Iterator[Callable[..., RunningDouble]]:
    """Starts doubles with the usual limits changed, and ends them."""
    require(shutil.which("openssl") is not None, "openssl")
    with contextlib.ExitStack() as stack:

        def make(**limits: Any) -> RunningDouble:
            return stack.enter_context(RunningDouble.started(tmp_path, dataclasses.replace(FAST, **limits)))

        yield make


def secure_client(double: RunningDouble) -> smtplib.SMTP:
    """Connected, with TLS."""
    client = smtplib.SMTP("127.0.0.1", double.port, "client.example.org", WAIT_SECONDS)
    client.starttls(context=ssl.create_default_context(cafile=str(double.certificate)))
    return client


@contextlib.contextmanager
def logged_in(double: RunningDouble) -> Iterator[smtplib.SMTP]:
    """A client that may send; it hangs up without a word when the double has."""
    client = secure_client(double)
    try:
        client.login(double.username, double.password)
        yield client
    finally:
        client.close()


def send(client: smtplib.SMTP, email_id: str, recipients: int = 1) -> str:
    """Sends one mail command by command; the reply to the final dot, or the first refusal."""
    commands = ["MAIL FROM:<a@example.com>", *(f"RCPT TO:<b{number}@example.org>" for number in range(recipients))]
    for command in [*commands, "DATA"]:
        code, text = client.docmd(command)
        if code >= 400:
            return f"{code} {text.decode()}"
    content = f"X-LFX-TRACKING-ID: group/with/slashes/{email_id}\r\nSubject: Hello\r\n\r\n..\r\nText.\r\n.\r\n"
    client.send(content)
    code, text = client.getreply()
    return f"{code} {text.decode()}"


def answer(client: smtplib.SMTP, sent: bytes) -> bytes:
    """Sends bytes as they are; what comes back until the double hangs up."""
    sock: Any = client.sock
    sock.sendall(sent)
    got = b""
    with contextlib.suppress(OSError):
        while chunk := sock.recv(4096):
            got += chunk
    return got


def test_it_offers_what_ses_offers_and_asks_for_tls_and_login(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double()
    with smtplib.SMTP("127.0.0.1", double.port, timeout=WAIT_SECONDS) as client:
        assert client.docmd("AUTH", "PLAIN AHVzZXIAc2VjcmV0")[0] == 530
        assert client.docmd("MAIL", "FROM:<a@example.com>")[0] == 530
        client.ehlo()
        assert sorted(client.esmtp_features) == ["8bitmime", "auth", "ok", "starttls"]
        client.starttls(context=ssl.create_default_context(cafile=str(double.certificate)))
        assert client.docmd("MAIL", "FROM:<a@example.com>") == (530, b"Authentication required")
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login(double.username, "wrong")
        client.login(double.username, double.password)
        assert client.docmd("MAIL", "FROM:<a@example.com> SIZE=10")[0] == 501, "SIZE is not offered"
    assert double.stop()["counts"]["violation"] == 1


@pytest.mark.parametrize("mechanism", ["auth_plain", "auth_login"])
def test_both_ways_to_log_in(new_double: Callable[..., RunningDouble], mechanism: str) -> None:
    double = new_double()
    client = secure_client(double)
    client.ehlo()
    client.user, client.password = double.username, double.password
    way = mechanism.removeprefix("auth_").upper()
    assert client.auth(way, getattr(client, mechanism), initial_response_ok=False)[0] == 235
    client.quit()


def test_it_knows_every_mail_by_its_tracking_id(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double()
    begun = time.monotonic()
    with logged_in(double) as client:
        replies = [send(client, name) for name in ("one", "two", "one")]
    taken = double.stop()["taken"]
    assert {name: len(times) for name, times in taken.items()} == {"one": 2, "two": 1}
    (moment, remote_id), (_, again) = taken["one"]
    assert replies == [f"250 Ok {remote_id}", f"250 Ok {taken['two'][0][1]}", f"250 Ok {again}"]
    assert begun < moment < time.monotonic()


def test_the_rate_counts_recipients_and_allows_one_second_at_once(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double(rate=2.0)
    with logged_in(double) as client:
        assert send(client, "both", recipients=2).startswith("250 Ok ")
        assert send(client, "more") == "454 Throttling failure: Maximum sending rate exceeded."
        deadline = time.monotonic() + WAIT_SECONDS
        while not (reply := send(client, "more")).startswith("250"):
            assert reply.startswith("454")
            assert time.monotonic() < deadline
    figures = double.stop()
    (first, _), (second, _) = figures["taken"]["both"][0], figures["taken"]["more"][0]
    assert 0.4 < second - first < WAIT_SECONDS, "half a second for one recipient"
    assert figures["counts"]["454 throttled"] == len(figures["throttled_at"])


def test_a_connection_is_over_after_so_many_mails(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double(messages=2)
    with logged_in(double) as client:
        assert all(send(client, name).startswith("250") for name in ("one", "two"))
        assert send(client, "three").startswith("421 ")
        assert client.sock is not None
        assert client.sock.recv(100) == b""
    assert double.stop()["counts"]["421 after enough mails"] == 1


def test_one_connection_too_many_is_refused_at_the_banner(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double(connections=1)
    with logged_in(double) as client:
        with pytest.raises(smtplib.SMTPConnectError) as refusal:
            smtplib.SMTP("127.0.0.1", double.port, timeout=WAIT_SECONDS)
        assert refusal.value.args == (421, b"Too many concurrent SMTP connections")
        assert send(client, "one").startswith("250")
    figures = double.stop()
    assert figures["counts"]["421 too many connections"] == 1
    assert figures["peak_connections"] == 1


def test_an_idle_connection_ends_with_451_or_without_a_word(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double(idle_seconds=0.1)
    refusal = b"451 4.4.2 Timeout waiting for data from client.\r\n"
    ends = []
    for _ in range(8):  # the seed has both kinds among them
        with logged_in(double) as client:
            sock: Any = client.sock
            sock.settimeout(0.4)
            try:
                ends.append(sock.recv(100))
            except TimeoutError:  # it speaks only when spoken to
                sock.settimeout(WAIT_SECONDS)
                ends.append(answer(client, b"MAIL FROM:<a@example.com>\r\n"))
    assert set(ends) == {b"", refusal}
    counts = double.stop()["counts"]
    assert counts["451 idle"] == ends.count(refusal)
    assert counts["idle, closed silently"] == ends.count(b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n",
        b"NOOP\r\nNOOP\r\n",
        b"MAIL FROM:<a@example.com>\r\nR",
    ],
)
def test_pipelining_is_a_violation(new_double: Callable[..., RunningDouble], sent: bytes) -> None:
    double = new_double()
    with logged_in(double) as client:
        assert answer(client, sent) == b""
    assert double.stop()["counts"]["violation"] == 1


def test_a_command_sent_while_the_reply_is_on_its_way_is_a_violation(new_double: Callable[..., RunningDouble]) -> None:
    double = new_double(dot_ms=500.0)
    with logged_in(double) as client:
        for command in ("MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>", "DATA"):
            assert client.docmd(command)[0] < 400
        client.send(b"X-LFX-TRACKING-ID: g/one\r\n\r\nText.\r\n.\r\n")
        with socket.socket() as probe:  # a round trip later, so that it cannot be the same segment
            probe.connect(("127.0.0.1", double.port))
            probe.recv(100)
        assert answer(client, b"MAIL FROM:<a@example.com>\r\n") == b""
    figures = double.stop()
    assert figures["counts"]["violation"] == 1
    assert len(figures["taken"]["one"]) == 1, "it was taken before, which makes it a mail in doubt"
