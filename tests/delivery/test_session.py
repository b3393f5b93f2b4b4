"""Sessions against a scripted server: what it saw, and what came out."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from gevent import socket

from relay.delivery.channel import Channel
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import Dialler
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Extensions
from relay.delivery.session import LARGE_CONTENT_BYTES, WAITED_SECONDS, Session
from relay.errors import ProtocolViolation
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import (
    Action,
    ScriptedSmtp,
    drop,
    garbage,
    half,
    say,
    say_and_drop,
    say_bytewise,
    stall,
    wait,
)

SENDER = "sender@example.org"
ALICE, BOB, CAROL = "alice@example.com", "bob@example.com", "carol@example.com"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
PIPELINING = pytest.mark.parametrize("extensions", [("PIPELINING",), ()], ids=["pipelined", "stepwise"])


@contextmanager
def session_with(
    script: dict[str, Any] | None = None, extensions: tuple[str, ...] = ("PIPELINING",), **config: Any
) -> Iterator[tuple[ScriptedSmtp, Session]]:
    with ScriptedSmtp(script, extensions=extensions) as server:
        session = Dialler(config_for(server, **config), SENDER).dial()
        try:
            yield server, session
        finally:
            session.close()


def transact(session: Session, *forward_paths: str, seconds: float = 5.0) -> list[Outcome]:
    return session.transact(SENDER, forward_paths or (ALICE,), CONTENT, soon(seconds))


def was_stale(session: Session) -> bool:
    """Whether the last transaction may be repeated without counting."""
    return session.ending is not None and session.ending.is_stale


@PIPELINING
def test_a_mail_is_relayed(extensions: tuple[str, ...]) -> None:
    with session_with(extensions=extensions) as (server, session):
        [outcome] = transact(session)
        [again] = transact(session)
    assert outcome == Outcome(
        State.RELAYED, "Ok: queued as Q1", 250, "2.0.0", SaidBy.PEER, Phase.DOT, 1, remote_id="Q1"
    )
    assert again.remote_id == "Q2"
    assert session.transactions == 2
    assert server.commands == ["EHLO relay.example.org"] + 2 * [f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{ALICE}>", "DATA"]
    assert [mail.content for mail in server.mails] == [CONTENT, CONTENT]


def test_the_null_reverse_path_is_sent_as_such() -> None:
    with session_with() as (server, session):
        [outcome] = session.transact("", (ALICE,), CONTENT, soon())
    assert outcome.state is State.RELAYED
    assert "MAIL FROM:<>" in server.commands


@PIPELINING
@pytest.mark.parametrize(
    ("phase", "reply", "state"),
    [
        ("mail", "550 5.7.1 no", State.FAILED),
        ("mail", "451 4.3.0 later", State.DEFERRED),
        ("rcpt", "550 5.1.1 unknown", State.FAILED),
        ("rcpt", "450 4.2.1 busy", State.DEFERRED),
        ("data", "554 5.7.1 no", State.FAILED),
        ("data", "451 4.3.0 later", State.DEFERRED),
        ("dot", "554 Message rejected", State.FAILED),
        ("dot", "454 Throttling failure: Maximum sending rate exceeded", State.DEFERRED),
    ],
)
def test_a_refusal_spoils_one_mail_and_not_the_connection(
    phase: str, reply: str, state: State, extensions: tuple[str, ...]
) -> None:
    with session_with({phase: [say(reply)]}, extensions) as (server, session):
        [outcome] = transact(session)
        is_reusable = session.is_reusable
        [next_outcome] = transact(session)
    assert (outcome.state, outcome.reply_code, outcome.phase) == (state, int(reply[:3]), phase)
    assert outcome.said_by is SaidBy.PEER
    assert is_reusable
    assert next_outcome.state is State.RELAYED
    assert len(server.connections) == 1
    assert [mail.forward_paths for mail in server.mails][-1] == (ALICE,)
    # RSET only where a transaction was left open, and never after one that reached its dot.
    assert ("RSET" in server.commands) == (phase in ("rcpt", "data"))


@PIPELINING
def test_one_refused_recipient_of_three(extensions: tuple[str, ...]) -> None:
    script = {"rcpt": [say("250 Ok"), say("550 5.1.1 unknown"), say("250 Ok")]}
    with session_with(script, extensions) as (server, session):
        outcomes = transact(session, ALICE, BOB, CAROL)
        assert session.is_reusable
    assert [outcome.state for outcome in outcomes] == [State.RELAYED, State.FAILED, State.RELAYED]
    assert outcomes[1].enhanced_code == "5.1.1"
    assert server.mails[0].forward_paths == (ALICE, CAROL)


def test_354_although_all_recipients_were_refused_gets_only_the_dot() -> None:
    script = {"rcpt": say("550 5.1.1 unknown"), "data": [say("354 go on")], "dot": [say("554 no recipients")]}
    with session_with(script) as (server, session):
        outcomes = transact(session, ALICE, BOB)
        assert session.is_reusable
    assert [outcome.reply_code for outcome in outcomes] == [550, 550]
    assert [mail.content for mail in server.mails] == [b"\r\n"] or not server.mails[0].content.strip()


@PIPELINING
@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
@pytest.mark.parametrize("action", [drop(), garbage(), say_and_drop("421 4.3.2 bye"), say("299 what\n250 extra")])
def test_what_breaks_the_connection_before_the_dot_defers_the_mail(
    phase: str, action: Action, extensions: tuple[str, ...]
) -> None:
    with session_with({phase: [action]}, extensions) as (server, session):
        [outcome] = transact(session)
        assert not session.is_reusable
    assert outcome.state is State.DEFERRED
    assert server.mails == []
    if b"421" not in action.data:
        assert (outcome.reply_code, outcome.said_by) == (None, SaidBy.LOCAL)


def test_a_connection_that_breaks_amid_the_content_defers() -> None:
    with session_with({"content": drop()}) as (server, session):
        [outcome] = session.transact(SENDER, (ALICE,), b"x" * 20_000_000 + b"\r\n", soon())
        assert not session.is_reusable
    assert (outcome.state, outcome.phase) == (State.DEFERRED, Phase.CONTENT)
    assert server.mails == []


@PIPELINING
@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
def test_a_stall_before_the_dot_ends_at_the_deadline(phase: str, extensions: tuple[str, ...]) -> None:
    with session_with({phase: stall()}, extensions) as (_, session):
        started_at = time.monotonic()
        [outcome] = transact(session, seconds=0.2)
        seconds = time.monotonic() - started_at
        assert not session.is_reusable
    assert (outcome.state, outcome.reply_code, outcome.said_by) == (State.DEFERRED, None, SaidBy.LOCAL)
    assert 0.2 <= seconds < 1.0


@PIPELINING
@pytest.mark.parametrize("action", [stall(), drop(), garbage()])
def test_without_a_reply_to_the_dot_the_mail_is_in_doubt(action: Action, extensions: tuple[str, ...]) -> None:
    with session_with({"dot": action}, extensions, dot_seconds=0.2) as (server, session):
        started_at = time.monotonic()
        outcomes = transact(session, ALICE, BOB)
        seconds = time.monotonic() - started_at
        assert not session.is_reusable
    assert [(outcome.state, outcome.reply_code) for outcome in outcomes] == 2 * [(State.IN_DOUBT, None)]
    assert outcomes[0].phase is Phase.DOT
    assert seconds < 1.0
    assert len(server.mails) == 1


def test_the_dot_has_a_time_limit_of_its_own() -> None:
    with session_with({"dot": stall()}, dot_seconds=0.1) as (_, session):
        [outcome] = transact(session)
        assert not session.is_awaiting_dot
        assert not session.is_reusable
    assert (outcome.state, outcome.detail) == (State.IN_DOUBT, "timed out")


@PIPELINING
def test_a_caller_whose_time_is_over_is_told_so_and_the_reply_is_still_taken(extensions: tuple[str, ...]) -> None:
    with session_with({"dot": wait(0.3)}, extensions) as (server, session):
        [outcome] = transact(session, seconds=0.1)
        assert (outcome.state, outcome.phase, outcome.reply_code) == (State.IN_DOUBT, Phase.DOT, None)
        is_free = session.is_reusable
        assert session.is_awaiting_dot
        [settled] = session.await_dot()
        assert (settled.state, settled.reply_code) == (State.RELAYED, 250)
        assert (is_free, session.is_reusable, session.is_awaiting_dot) == (False, True, False)
        assert session.ending is None
        assert transact(session)[0].state is State.RELAYED
    assert len(server.mails) == 2
    assert len(server.connections) == 1


def test_content_that_is_not_taken_in_time_defers() -> None:
    with session_with({"content": stall()}) as (server, session):
        [outcome] = session.transact(SENDER, (ALICE,), b"x" * 20_000_000 + b"\r\n", soon(0.3))
        assert not session.is_reusable
    assert (outcome.state, outcome.phase) == (State.DEFERRED, Phase.CONTENT)
    assert server.mails == []


def test_a_refusal_in_the_middle_of_the_content_is_the_outcome() -> None:
    with session_with({"content": say_and_drop("552 5.3.4 too long")}) as (_, session):
        [outcome] = session.transact(SENDER, (ALICE,), b"x" * 20_000_000 + b"\r\n", soon())
        assert not session.is_reusable
    # The reset may overtake the words; then nothing is known but that the dot was not sent.
    assert (outcome.state, outcome.reply_code) in [(State.FAILED, 552), (State.DEFERRED, None)]


@PIPELINING
def test_replies_that_come_byte_by_byte(extensions: tuple[str, ...]) -> None:
    script = {
        "ehlo": say_bytewise("\n".join(["250-server", *(f"250-{word}" for word in extensions), "250 HELP"])),
        "mail": say_bytewise("250-2.1.0 one\n250 2.1.0 two"),
        "data": say_bytewise("354 go on"),
        "dot": say_bytewise("250-2.0.0 one\n250 2.0.0 two"),
    }
    with session_with(script, extensions) as (_, session):
        [outcome] = transact(session)
        assert session.is_reusable
    assert (outcome.state, outcome.detail) == (State.RELAYED, "one two")


def test_a_reply_too_many_makes_the_connection_unusable() -> None:
    with session_with({"dot": [say("250 2.0.0 Ok\n250 2.0.0 surprise")]}) as (_, session):
        [outcome] = transact(session)
        assert outcome.state is State.RELAYED
        assert not session.is_reusable


QUOTED = '"alice"@example.com'
"""An address that is looked at closely; it is pipelined all the same."""


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data", "dot"])
@pytest.mark.parametrize(
    "action",
    [
        say("250 Ok"),
        say("250-2.0.0 one\n250 2.0.0 two"),
        say("250 2.0.0 Ok\n250 2.0.0 surprise"),
        say("251 2.1.5 will forward"),
        say("354 go on"),
        say("421 4.3.2 closing"),
        say("451 4.4.2 Timeout"),
        say("451 4.3.0 later"),
        say("503 5.5.1 order"),
        say("550 5.7.1 no"),
        say_bytewise("250 2.0.0 Ok"),
        half(),
        garbage(),
        drop(),
        stall(),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_reused", [False, True], ids=["new", "reused"])
def test_a_plain_mail_ends_as_any_other(phase: str, action: Action, is_reused: bool) -> None:
    ends = []
    for path in (ALICE, QUOTED):
        before = [say("354 go on" if phase == "data" else "250 2.0.0 Ok")] if is_reused else []
        limit: dict[str, Any] = {f"{phase}_seconds": 0.1}
        with session_with({phase: [*before, action]}, **limit) as (server, session):
            if is_reused:
                assert transact(session, path)[0].state is State.RELAYED
            outcomes = transact(session, path)
            ending = session.ending
            is_reusable = session.is_reusable
            ends.append((outcomes, ending, is_reusable, is_reusable and transact(session, path), len(server.mails)))
    assert ends[0] == ends[1]


@PIPELINING
def test_a_go_ahead_after_everyone_was_refused_gets_no_content(extensions: tuple[str, ...]) -> None:
    with session_with({"rcpt": [say("550 5.1.1 unknown")], "data": [say("354 go on")]}, extensions) as (
        server,
        session,
    ):
        [outcome] = transact(session)
    assert (outcome.state, outcome.reply_code) == (State.FAILED, 550)
    assert not any(mail.forward_paths or mail.content.strip() for mail in server.mails)


def test_a_second_answer_to_noop_is_not_taken_for_one_to_mail() -> None:
    with session_with({"noop": say("250 Ok\n250 surprise")}) as (server, session):
        with pytest.raises(ProtocolViolation):
            session.noop()
        [outcome] = transact(session)
        assert not session.is_reusable
    assert outcome.state is State.DEFERRED
    assert server.mails == []


def test_a_reply_that_was_begun_in_time_goes_on_after_it() -> None:
    ours, theirs = socket.socketpair()
    config = SmarthostConfig(hosts=(Host("127.0.0.1", 25),))
    session = Session(Channel(ours, "127.0.0.1"), Extensions(pipelining=True), config, SENDER)
    theirs.sendall(b"250 Ok\r\n250 Ok\r\n354 go on\r\n")
    transacting = gevent.spawn(transact, session, seconds=0.1)
    said = b""
    while not said.endswith(b"\r\n.\r\n"):
        said += theirs.recv(65536)
    theirs.sendall(b"250-2.0.0 one\r\n")
    assert transacting.get()[0].state is State.IN_DOUBT
    assert session.is_awaiting_dot
    # By itself it would be a whole reply.
    theirs.sendall(b"250 2.0.0 two\r\n")
    [settled] = session.await_dot()
    assert session.is_reusable
    assert (settled.state, settled.detail) == (State.RELAYED, "one two")
    session.close()
    theirs.close()


@PIPELINING
@pytest.mark.parametrize("action", [drop(), say_and_drop("421 4.4.2 idle"), say_and_drop("451 4.4.2 Timeout waiting")])
def test_a_reused_connection_that_fails_on_its_first_command_is_stale(
    action: Action, extensions: tuple[str, ...]
) -> None:
    with session_with({"mail": [say("250 Ok"), action]}, extensions) as (_, session):
        is_stale = [bool(transact(session)) and was_stale(session) for _ in range(2)]
        assert not session.is_reusable
    assert is_stale == [False, True]


@PIPELINING
@pytest.mark.parametrize("action", [drop(), say_and_drop("421 4.4.2 idle"), say_and_drop("451 4.4.2 Timeout waiting")])
def test_a_connection_that_has_waited_for_its_first_mail_may_be_stale(
    action: Action, extensions: tuple[str, ...]
) -> None:
    with session_with({"mail": [action]}, extensions) as (_, session):
        session.idle_since -= WAITED_SECONDS
        transact(session)
        assert was_stale(session)


@pytest.mark.parametrize("action", [drop(), say_and_drop("421 4.4.2 idle")])
def test_a_new_connection_is_never_stale(action: Action) -> None:
    with session_with({"mail": [action]}) as (_, session):
        transact(session)
        assert not was_stale(session)


def test_what_comes_unasked_is_noticed_before_the_next_mail() -> None:
    with session_with({"dot": [say_bytewise("250 2.0.0 Ok")]}) as (server, session):
        transact(session)
        assert session.is_quiet()
        server.drop_connections()
        while session.is_quiet():
            gevent.sleep(0)
        assert not session.is_reusable


def test_size_is_told_and_held() -> None:
    with session_with(extensions=("SIZE 1000",)) as (server, session):
        [outcome] = transact(session)
        [too_big] = session.transact(SENDER, (ALICE,), b"x" * 1000 + b"\r\n", soon())
        assert session.is_reusable
    assert outcome.state is State.RELAYED
    assert f"MAIL FROM:<{SENDER}> SIZE={len(CONTENT)}" in server.commands
    assert (too_big.state, too_big.reply_code, too_big.said_by) == (State.FAILED, None, SaidBy.LOCAL)
    assert "5.3.4" in too_big.detail
    assert len(server.mails) == 1


def test_smtputf8_is_used_when_offered() -> None:
    with session_with(extensions=("PIPELINING", "SMTPUTF8")) as (server, session):
        [outcome] = session.transact(SENDER, ("jürgen@example.com",), CONTENT, soon())
        transact(session)
    assert outcome.state is State.RELAYED
    assert server.mails[0].forward_paths == ("jürgen@example.com",)
    assert server.commands[1] == f"MAIL FROM:<{SENDER}> SMTPUTF8"
    assert server.commands[4] == f"MAIL FROM:<{SENDER}>"


def test_without_smtputf8_the_mail_fails_before_mail() -> None:
    with session_with() as (server, session):
        [outcome] = session.transact(SENDER, ("jürgen@example.com",), CONTENT, soon())
        assert session.is_reusable
    assert (outcome.state, outcome.reply_code) == (State.FAILED, None)
    assert server.commands == ["EHLO relay.example.org"]


@pytest.mark.parametrize(
    "path",
    [
        "a@example.com>\r\nRCPT TO:<b@example.com",
        "a@example.com\nDATA",
        "a@example.com\x00",
        "a@example.com> BODY=8BITMIME",
        "<a@example.com",
        "a b@example.com",
        '"a"b> SIZE=1@example.com',
        "a\u2028@example.com",
        "\ud800@example.com",
    ],
)
def test_no_path_becomes_a_command(path: str) -> None:
    with session_with(extensions=("PIPELINING", "SMTPUTF8")) as (server, session):
        [as_forward] = session.transact(SENDER, (path,), CONTENT, soon())
        [as_reverse] = session.transact(path, (ALICE,), CONTENT, soon())
        assert session.is_reusable
    assert as_forward.state is as_reverse.state is State.FAILED
    assert server.commands == ["EHLO relay.example.org"]


def test_a_quoted_local_part_may_hold_what_others_may_not() -> None:
    path = '"a b<c>\\"d"@example.com'
    with session_with() as (server, session):
        [outcome] = session.transact(SENDER, (path,), CONTENT, soon())
    assert outcome.state is State.RELAYED
    assert server.mails[0].forward_paths == (path,)


def test_a_group_that_is_too_long_is_not_pipelined() -> None:
    paths = tuple(f"{'x' * 60}{number}@example.com" for number in range(300))
    with session_with() as (server, session):
        outcomes = session.transact(SENDER, paths, CONTENT, soon(10))
    assert {outcome.state for outcome in outcomes} == {State.RELAYED}
    assert server.mails[0].forward_paths == paths


@pytest.mark.parametrize("is_large", [False, True])
def test_only_a_large_mail_may_have_been_refused_before_its_dot(is_large: bool) -> None:
    large = CONTENT + b"x\r\n" * LARGE_CONTENT_BYTES
    with session_with({"dot": [say("250 2.0.0 Ok"), say("554 5.7.1 no")]}) as (_, session):
        [before] = session.transact(SENDER, (ALICE,), large, soon())
        [outcome] = session.transact(SENDER, (ALICE,), large if is_large else CONTENT, soon())
        assert (before.state, outcome.state) == (State.RELAYED, State.FAILED)
        assert session.is_reusable is not is_large


@PIPELINING
@pytest.mark.parametrize("is_8bit", [False, True])
def test_a_large_mail_takes_no_more_memory_than_its_content(is_8bit: bool, extensions: tuple[str, ...]) -> None:
    ours, theirs = socket.socketpair()
    config = SmarthostConfig(hosts=(Host("127.0.0.1", 25),))
    offered = Extensions(pipelining=bool(extensions), eightbitmime=True)
    session = Session(Channel(ours, "127.0.0.1"), offered, config, SENDER)
    line = "ä" * 38 if is_8bit else "x" * 76
    content = CONTENT + (line.encode() + b"\r\n") * 320_000 + b".\r\n"

    def receive() -> int:
        """Say yes to everything; return how many bytes the content had on the wire."""
        received, buffer, ended = 0, bytearray(65536), b""
        for reply in [b"250 Ok\r\n250 Ok\r\n354 go on\r\n"] if extensions else [b"250 Ok\r\n"] * 2 + [b"354 go on\r\n"]:
            theirs.recv(1000)
            theirs.sendall(reply)
        while ended[-5:] != b"\r\n.\r\n":
            count = theirs.recv_into(buffer)
            received += count
            ended = ended[-5:] + buffer[:count][-5:]
        theirs.sendall(b"250 Ok\r\n")
        return received

    receiving = gevent.spawn(receive)
    tracemalloc.start()
    try:
        [outcome] = session.transact(SENDER, (ALICE,), content, soon(10.0))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outcome.state is State.RELAYED
    # The one dot doubled, and the final one.
    assert receiving.get() == len(content) + 1 + 3
    assert peak_bytes < len(content) / 10
    session.close()
    theirs.close()


@pytest.mark.parametrize(
    "body",
    [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r\n", b"\r\n.\r", b"\r.\r", b".\r\n", b".", b"x" * 998, b"\r\n.\r\n"],
)
def test_no_body_smuggles_a_second_mail(body: bytes) -> None:
    smuggled = b"MAIL FROM:<evil@example.net>\r\nRCPT TO:<victim@example.net>\r\nDATA\r\nevil\r\n.\r\n"
    with session_with() as (server, session):
        [outcome] = session.transact(SENDER, (ALICE,), b"Subject: x\r\n\r\na" + body + smuggled, soon())
        transact(session)
    assert outcome.state is State.RELAYED
    assert [mail.reverse_path for mail in server.mails] == [SENDER, SENDER]
    assert not any("evil" in command for command in server.commands)
