"""The last word of a caller, between 354 and content: without a yes the peer sees neither content nor dot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from relay.delivery.channel import Channel
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Extensions
from relay.delivery.session import LARGE_CONTENT_BYTES, Commit, Session
from relay.delivery.smarthost import Smarthost
from relay.delivery.trouble import LocalFailure
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import ScriptedSmtp, drop, eventually, say, stall

SENDER = "sender@example.org"
ALICE, BOB, CAROL = "alice@example.com", "bob@example.com", "carol@example.com"
QUOTED = '"alice"@example.com'
"""An address that is looked at closely, so that its mail goes another way through the code."""
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
LARGE = CONTENT + (b"x" * 76 + b"\r\n") * (LARGE_CONTENT_BYTES // 78 + 1)
PIPELINING = pytest.mark.parametrize("extensions", [("PIPELINING",), ()], ids=["pipelined", "stepwise"])
GO_AHEAD = b"250 Ok\r\n250 Ok\r\n354 go on\r\n"


class Peer:
    """The other end of a session: it has said yes to a mail for ``path`` and waits for its content."""

    def __init__(self, path: str = ALICE, content: bytes = CONTENT) -> None:
        ours, self.sock = socket.socketpair()
        config = SmarthostConfig(hosts=(Host("127.0.0.1", 25),))
        self.session = Session(Channel(ours, "127.0.0.1"), Extensions(pipelining=True), config, SENDER)
        self.path = path
        self.content = content
        self.asked: list[Sequence[int]] = []
        self.heard = b""
        """Since the commands."""

    def transact(self, commit: Commit, seconds: float = 5.0) -> Outcome:
        """Hand the mail over; ``commit`` is asked when the commands have come, and ``heard`` is all after them."""

        def ask(places: Sequence[int]) -> bool:
            self.asked.append(places)
            commands = self.sock.recv(65536)
            assert commands.endswith(b"\r\nDATA\r\n")
            return commit(places)

        self.sock.sendall(GO_AHEAD)
        [outcome] = self.session.transact(SENDER, (self.path,), self.content, soon(seconds), ask)
        self.session.close()
        self.heard = b"".join(iter(lambda: self.sock.recv(65536), b""))
        self.sock.close()
        return outcome


@pytest.mark.parametrize("path", [ALICE, QUOTED])
@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["small", "large"])
def test_it_is_asked_when_the_peer_waits_and_before_the_first_octet(path: str, content: bytes) -> None:
    peer = Peer(path, content)
    received = []

    def commit(_: Sequence[int]) -> bool:
        peer.sock.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        peer.sock.settimeout(None)
        received.append(gevent.spawn(take_content))
        return True

    def take_content() -> bytes:
        taken = b""
        while not taken.endswith(b"\r\n.\r\n"):
            taken += peer.sock.recv(65536)
        peer.sock.sendall(b"250 Ok\r\n")
        return taken

    assert peer.transact(commit).state is State.RELAYED
    assert peer.asked == [[0]]
    assert received[0].get() == content + b".\r\n"


@pytest.mark.parametrize("path", [ALICE, QUOTED])
@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["small", "large"])
def test_without_a_yes_the_connection_ends_without_an_octet_more(path: str, content: bytes) -> None:
    peer = Peer(path, content)
    outcome = peer.transact(lambda _: False)
    assert outcome == Outcome(State.DEFERRED, "deduplication unavailable", phase=Phase.CONTENT)
    assert (outcome.said_by, outcome.retryable) == (SaidBy.LOCAL, True)
    assert (peer.heard, peer.asked) == (b"", [[0]])
    assert not peer.session.is_reusable


@pytest.mark.parametrize("path", [ALICE, QUOTED])
@pytest.mark.parametrize(
    ("said", "state", "reply_code", "detail"),
    [
        (b"421 4.3.2 closing\r\n", State.DEFERRED, 421, "closing"),
        (b"451 4.4.2 Timeout waiting for data\r\n", State.DEFERRED, 451, "Timeout waiting for data"),
        (b"451 4.3.0 later\r\n", State.DEFERRED, 451, "later"),
        (b"554 5.7.1 no\r\n", State.FAILED, 554, "no"),
        (b"250 2.0.0 Ok\r\n", State.DEFERRED, None, "the smarthost broke the protocol"),
        (b"421", State.DEFERRED, None, "the smarthost broke the protocol"),
        (b"\x00what\r\n", State.DEFERRED, None, "the smarthost broke the protocol"),
        (b"", State.DEFERRED, None, "connection lost"),
    ],
)
def test_a_peer_that_did_not_wait_gets_no_content(
    path: str, said: bytes, state: State, reply_code: int | None, detail: str
) -> None:
    peer = Peer(path)

    def commit(_: Sequence[int]) -> bool:
        if said:
            peer.sock.sendall(said)
        else:
            peer.sock.shutdown(socket.SHUT_WR)
        return True

    outcome = peer.transact(commit)
    assert (outcome.state, outcome.reply_code, outcome.phase) == (state, reply_code, Phase.CONTENT)
    assert outcome.detail.startswith(detail)
    assert peer.heard == b""


def test_the_deadline_is_looked_at_again_after_it() -> None:
    peer = Peer()

    def commit(_: Sequence[int]) -> bool:
        gevent.sleep(0.2)
        return True

    outcome = peer.transact(commit, seconds=0.1)
    assert (outcome.state, outcome.detail, outcome.is_late) == (State.DEFERRED, "timed out", True)
    assert peer.heard == b""


def test_what_it_raises_passes_through_and_no_dot_is_sent() -> None:
    peer = Peer()

    def commit(_: Sequence[int]) -> bool:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        peer.transact(commit)
    assert not peer.session.is_reusable
    peer.session.close()
    assert peer.sock.recv(1) == b""
    peer.sock.close()


class Book:
    """A hook that notes what it is asked and gives the answers one by one, then yes."""

    def __init__(self, *answers: bool | Callable[[], bool]) -> None:
        self.answers = list(answers)
        self.asked: list[list[int]] = []

    def __call__(self, places: Sequence[int]) -> bool:
        self.asked.append(list(places))
        answer = self.answers.pop(0) if self.answers else True
        return answer if isinstance(answer, bool) else answer()


def hang_up(server: ScriptedSmtp) -> bool:
    """Have the server close its connections, as far as the other end sees it, and say yes."""
    for connection in server.open:
        connection.sock.shutdown(socket.SHUT_RDWR)
    return True


@contextmanager
def smarthost_for(server: ScriptedSmtp, **config: Any) -> Iterator[Smarthost]:
    smarthost = Smarthost(config_for(server, **config), default_sender=SENDER)
    try:
        yield smarthost
    finally:
        smarthost.close(soon(1.0))


def relay(smarthost: Smarthost, commit: Commit, *forward_paths: str, seconds: float = 5.0) -> list[Outcome]:
    return smarthost.relay(SENDER, forward_paths or (ALICE,), CONTENT, soon(seconds), commit=commit)


@PIPELINING
@pytest.mark.parametrize("tls", ["", "starttls"])
def test_a_no_is_not_tried_again_and_concerns_nobody_else(
    extensions: tuple[str, ...], tls: Any, certificate: tuple[Path, Path]
) -> None:
    book = Book(True, False)
    options: dict[str, Any] = {"tls": tls, "ca_file": str(certificate[0])} if tls else {}
    with (
        ScriptedSmtp(extensions=extensions, tls=tls, certificate=certificate) as server,
        smarthost_for(server, pool_size=1, max_recipients_per_second=1000.0, **options) as smarthost,
    ):
        assert relay(smarthost, book)[0].state is State.RELAYED
        before = smarthost.figures()
        [outcome] = relay(smarthost, book)
        figures = smarthost.figures()
        assert (outcome.state, outcome.detail) == (State.DEFERRED, LocalFailure.NOT_COMMITTED.value)
        assert (outcome.attempt, outcome.is_late) == (1, False)
        assert len(book.asked) == 2
        same = ("circuit", "retried", "stale_replaced", "throttled", "rate_per_second", "rate_lowered", "limit", "busy")
        assert {name: figures[name] for name in same} == {name: before[name] for name in same}
        assert figures["idle"] == 0
        assert relay(smarthost, book)[0].state is State.RELAYED
    assert [mail.connection for mail in server.mails] == [0, 1]
    assert server.connections[0][-1] == "DATA"


@PIPELINING
def test_it_is_asked_about_those_who_were_accepted(extensions: tuple[str, ...]) -> None:
    book = Book()
    script = {"rcpt": [say("550 5.1.1 unknown"), say("250 Ok"), say("450 4.2.1 busy"), say("250 Ok")]}
    with ScriptedSmtp(script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, book, ALICE, BOB, CAROL, "dave@example.com")
    assert [outcome.state for outcome in outcomes] == [State.FAILED, State.RELAYED, State.DEFERRED, State.RELAYED]
    assert book.asked == [[1, 3]]


@PIPELINING
def test_a_no_leaves_those_their_outcome_who_were_refused_before(extensions: tuple[str, ...]) -> None:
    script = {"rcpt": [say("550 5.1.1 unknown")]}
    with ScriptedSmtp(script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        alice, bob = relay(smarthost, Book(False), ALICE, BOB)
    assert (alice.state, alice.reply_code) == (State.FAILED, 550)
    assert (bob.state, bob.detail) == (State.DEFERRED, LocalFailure.NOT_COMMITTED.value)
    assert server.mails == []


@PIPELINING
@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
def test_it_is_not_asked_when_no_content_is_wanted(phase: str, extensions: tuple[str, ...]) -> None:
    book = Book()
    with (
        ScriptedSmtp({phase: say("550 5.7.1 no")}, extensions=extensions) as server,
        smarthost_for(server) as smarthost,
    ):
        assert relay(smarthost, book)[0].reply_code == 550
    assert book.asked == []


def test_it_is_not_asked_for_a_go_ahead_to_nobody() -> None:
    book = Book()
    script: dict[str, Any] = {
        "rcpt": say("550 5.1.1 unknown"),
        "data": [say("354 go on")],
        "dot": [say("554 no recipients")],
    }
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        assert relay(smarthost, book, ALICE, BOB)[0].state is State.FAILED
    assert book.asked == []
    assert [mail.forward_paths for mail in server.mails] == [()]


@PIPELINING
def test_it_is_asked_again_for_each_further_attempt(extensions: tuple[str, ...]) -> None:
    script = {"rcpt": [say("550 no")]}
    with ScriptedSmtp(script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        book = Book(partial(hang_up, server))
        alice, bob, carol = relay(smarthost, book, ALICE, BOB, CAROL)
        assert smarthost.figures()["retried"] == 1
    assert (alice.state, bob.state, carol.state) == (State.FAILED, State.RELAYED, State.RELAYED)
    assert (bob.attempt, carol.attempt) == (2, 2)
    # The second attempt is without alice: the places are still the mail's.
    assert book.asked == [[1, 2], [1, 2]]
    assert [(mail.connection, mail.forward_paths) for mail in server.mails] == [(1, (BOB, CAROL))]


def test_a_no_to_a_further_attempt_ends_the_mail() -> None:
    with ScriptedSmtp() as server, smarthost_for(server) as smarthost:
        book = Book(partial(hang_up, server), False)
        [outcome] = relay(smarthost, book)
    assert (outcome.state, outcome.detail) == (State.DEFERRED, LocalFailure.NOT_COMMITTED.value)
    assert (len(book.asked), len(server.connections), server.mails) == (2, 2, [])


def test_a_stale_connection_is_replaced_before_it_is_asked() -> None:
    book = Book()
    with ScriptedSmtp({"mail": [say("250 Ok"), drop()]}) as server, smarthost_for(server) as smarthost:
        assert [relay(smarthost, book)[0].state for _ in range(2)] == [State.RELAYED] * 2
        assert smarthost.figures()["stale_replaced"] == 1
    assert book.asked == [[0], [0]]


@pytest.mark.parametrize("end", ["killed", "raises"])
def test_the_connection_of_one_that_never_answered_is_closed_and_its_place_is_free(end: str) -> None:
    with ScriptedSmtp() as server, smarthost_for(server, pool_size=1) as smarthost:
        asked = Event()

        def commit(_: Sequence[int]) -> bool:
            asked.set()
            if end == "raises":
                raise RuntimeError("broken")
            Event().wait()
            return True

        caller = gevent.spawn(relay, smarthost, commit)
        assert asked.wait(5.0)
        caller.kill()
        assert [relay(smarthost, Book())[0].state] == [State.RELAYED]
        assert smarthost.figures()["busy"] == 0
    assert [mail.connection for mail in server.mails] == [1]


def test_closing_while_it_is_asked_sends_nothing() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, pool_size=1) as smarthost:
        asked, answer = Event(), Event()

        def commit(_: Sequence[int]) -> bool:
            asked.set()
            return bool(answer.wait(5.0))

        caller = gevent.spawn(relay, smarthost, commit)
        assert asked.wait(5.0)
        smarthost.close(soon(0.05))
        answer.set()
        [outcome] = caller.get(timeout=5.0)
        assert (outcome.state, outcome.said_by) == (State.DEFERRED, SaidBy.LOCAL)
        eventually(lambda: server.open_connections == 0)
    assert server.mails == []


def test_the_time_that_it_takes_is_not_the_smarthosts() -> None:
    with ScriptedSmtp() as server, smarthost_for(server) as smarthost:

        def commit(_: Sequence[int]) -> bool:
            gevent.sleep(2.0)
            return True

        assert relay(smarthost, commit)[0].state is State.RELAYED
        # Were it counted, a transaction would be thought to need a quarter of a second.
        [outcome] = smarthost.relay(SENDER, (ALICE,), CONTENT, soon(0.15))
    assert outcome.phase is not Phase.POOL


def test_a_yes_and_no_reply_to_the_dot_is_in_doubt_as_ever() -> None:
    book = Book()
    settled: list[list[Outcome]] = []
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server, dot_seconds=0.5) as smarthost:
        started_at = time.monotonic()
        [outcome] = smarthost.relay(SENDER, (ALICE,), CONTENT, soon(0.1), settled.append, book)
        assert time.monotonic() - started_at < 0.5
        assert outcome.state is State.IN_DOUBT
        eventually(lambda: bool(settled))
    assert [(each.state, each.is_late) for each in settled[0]] == [(State.IN_DOUBT, False)]
    assert (book.asked, len(server.mails)) == ([[0]], 1)
