"""Mistakes that other SMTP clients and connection pools make, each shown not to happen here.

Each test says in its first line which project it learnt from. All of it goes over TCP to a server that misbehaves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest

from relay.delivery.config import Timeouts
from relay.delivery.dialling import Dialler
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.pool import Pool
from relay.delivery.session import Session
from relay.delivery.smarthost import Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import (
    Action,
    Script,
    ScriptedSmtp,
    drop,
    eventually,
    garbage,
    say,
    say_and_drop,
    stall,
    wait,
)

SENDER = "sender@example.org"
ALICE, BOB = "alice@example.com", "bob@example.com"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
PIPELINING = pytest.mark.parametrize("extensions", [("PIPELINING",), ()], ids=["pipelined", "stepwise"])


@contextmanager
def served(script: Script | None = None, extensions: tuple[str, ...] = ("PIPELINING",), **config: Any) -> Iterator[Any]:
    """A server and a smarthost that uses it."""
    with ScriptedSmtp(script, extensions=extensions) as server:
        smarthost = Smarthost(config_for(server, **config))
        try:
            yield server, smarthost
        finally:
            smarthost.close(soon(0.0))


def relay(smarthost: Smarthost, *paths: str, content: bytes = CONTENT, seconds: float = 5.0) -> list[Outcome]:
    return smarthost.relay(SENDER, paths or (ALICE,), content, soon(seconds))


def call(smarthost: Smarthost, count: int, **how: Any) -> list[Any]:
    return [gevent.spawn(relay, smarthost, **how) for _ in range(count)]


def states(callers: list[Any], seconds: float = 5.0) -> list[State]:
    """What the callers got; all of them must have it in time."""
    gevent.joinall(callers, timeout=seconds)
    assert all(caller.dead for caller in callers)
    return [caller.value[0].state for caller in callers]


def test_a_burst_over_one_warm_connection_is_not_sent_one_by_one() -> None:
    """python-slimta: "is anyone idle?" was true for all of a burst, so that eight mails queued for one connection."""
    with served(pool_size=8) as (server, smarthost):
        assert relay(smarthost)[0].state is State.RELAYED
        server.change({"dot": wait(0.3)})
        started_at = time.monotonic()
        assert states(call(smarthost, 8)) == [State.RELAYED] * 8
        assert time.monotonic() - started_at < 8 * 0.3
    assert server.peak_connections == len(server.connections) == 8


def test_closing_leaves_nobody_without_an_answer() -> None:
    """python-slimta: ``kill()`` left its callers in ``AsyncResult.get()`` for ever."""
    with served({"dot": stall()}, pool_size=3) as (server, smarthost):
        busy = call(smarthost, 2)
        eventually(lambda: len(server.mails) == 2)
        server.change({"banner": stall(), "dot": stall()})
        waiting = call(smarthost, 20)
        eventually(lambda: len(server.connections) == 3)
        assert (smarthost.figures()["dialling"], smarthost.figures()["waiting"]) == (1, 20)
        smarthost.close(soon(0.1))
        assert states(busy, 1.0) == [State.IN_DOUBT] * 2
        assert states(waiting, 1.0) == [State.DEFERRED] * 20
        # Nor does anyone who comes later.
        assert states(call(smarthost, 1), 1.0) == [State.DEFERRED]


@pytest.mark.parametrize("turns", range(4))
def test_closing_frees_the_places_of_dials_that_had_not_begun(turns: int) -> None:
    """python-slimta: what ``kill()`` met half-way was never accounted for; here: a dial in each of its first steps."""
    with served() as (_, smarthost):
        callers = call(smarthost, 3)
        for _ in range(turns):
            gevent.sleep(0)
        smarthost.close(soon(0.5))
        assert states(callers, 1.0) == [State.DEFERRED] * 3
        figures = smarthost.figures()
    assert (figures["dialling"], figures["busy"], figures["waiting"]) == (0, 0, 0)


def test_nobody_waits_for_a_connection_beyond_its_deadline() -> None:
    """python-slimta: who was in the pool's queue waited without a time limit."""
    with served({"dot": stall()}, pool_size=1, dot_seconds=10.0) as (server, smarthost):
        holder = call(smarthost, 1)
        eventually(lambda: len(server.mails) == 1)
        started_at = time.monotonic()
        assert states(call(smarthost, 50, seconds=0.2)) == [State.DEFERRED] * 50
        assert 0.2 <= time.monotonic() - started_at < 2.0
        assert smarthost.figures()["waiting"] == 0
        assert not holder[0].dead


UNREACHABLE = {"banner": say_and_drop("554 5.3.2 not you")}
ENDS: dict[str, tuple[Script, tuple[str, str], bytes, list[State]]] = {
    "taken": ({}, (ALICE, BOB), CONTENT, [State.RELAYED, State.RELAYED]),
    "one refused": ({"rcpt": [say("550 no"), Action()]}, (ALICE, BOB), CONTENT, [State.FAILED, State.RELAYED]),
    "one deferred, one refused": (
        {"rcpt": [say("450 later"), say("550 no")]},
        (ALICE, BOB),
        CONTENT,
        [State.DEFERRED, State.FAILED],
    ),
    "sender refused": ({"mail": say("550 no")}, (ALICE, BOB), CONTENT, [State.FAILED] * 2),
    "content refused": ({"dot": say("554 no")}, (ALICE, BOB), CONTENT, [State.FAILED] * 2),
    "one refused, then lost": (
        {"rcpt": [say("550 no"), Action()], "dot": drop()},
        (ALICE, BOB),
        CONTENT,
        [State.FAILED, State.IN_DOUBT],
    ),
    "always lost": ({"data": drop()}, (ALICE, BOB), CONTENT, [State.DEFERRED] * 2),
    "no connection": (UNREACHABLE, (ALICE, BOB), CONTENT, [State.DEFERRED] * 2),
    "too big": ({}, (ALICE, BOB), CONTENT * 1000, [State.FAILED] * 2),
    "no address": ({}, (ALICE, "b>\r\nDATA"), CONTENT, [State.FAILED] * 2),
}


@pytest.mark.parametrize("end", ENDS)
@PIPELINING
def test_no_end_comes_in_another_shape(end: str, extensions: tuple[str, ...]) -> None:
    """python-slimta answers in four shapes; aiosmtplib returns a dict for one refusal and raises for several."""
    script, paths, content, expected = ENDS[end]
    with served(script, (*extensions, "SIZE 10000")) as (_, smarthost):
        outcomes = relay(smarthost, *paths, content=content)
        assert [type(outcome) for outcome in outcomes] == [Outcome, Outcome]
        assert [outcome.state for outcome in outcomes] == expected
        if end == "no connection":
            # The circuit is open now.
            assert [outcome.state for outcome in relay(smarthost, *paths)] == expected
        smarthost.close(soon(0.0))
        assert [outcome.state for outcome in relay(smarthost, *paths)] == [State.DEFERRED] * 2


@PIPELINING
def test_a_stall_after_the_dot_is_neither_called_transient_nor_endless(extensions: tuple[str, ...]) -> None:
    """python-slimta: without PIPELINING a made-up "421 4.4.2", so the mail went out twice; with it no limit at all."""
    with served({"dot": stall()}, extensions, dot_seconds=0.2) as (server, smarthost):
        started_at = time.monotonic()
        [outcome] = relay(smarthost)
        assert 0.2 <= time.monotonic() - started_at < 2.0
        assert (outcome.state, outcome.retryable, outcome.phase) == (State.IN_DOUBT, False, Phase.DOT)
        assert (outcome.said_by, outcome.reply_code, outcome.enhanced_code) == (SaidBy.LOCAL, None, "")
        assert len(server.mails) == len(server.connections) == 1


def test_the_dot_is_not_given_up_before_a_healthy_server_is_slow() -> None:
    """python-slimta: ten seconds by default, where RFC 5321 §4.5.3.2.6 asks for ten minutes."""
    limits = Timeouts()
    assert limits.dot_seconds >= 120.0
    assert limits.dot_seconds == max(getattr(limits, name) for name in Timeouts.__dataclass_fields__)


def test_no_reply_is_invented_for_what_happened_here() -> None:
    """python-slimta and aiosmtplib (code -1) put words of their own where the server's reply code belongs."""
    ends: dict[str, tuple[Script, dict[str, Any]]] = {
        "lost": ({"data": drop()}, {}),
        "too slow": ({"mail": stall()}, {"mail_seconds": 0.1}),
        "malformed": ({"rcpt": garbage()}, {}),
        "no number": ({"mail": say("25O Ok")}, {}),
        "three codes in one": ({"mail": say("250-one\n251-two\n250 three")}, {}),
        "out of range": ({"mail": say("999 what")}, {}),
        "no connection": ({"banner": garbage()}, {}),
    }
    for script, limits in ends.values():
        with served(script, **limits) as (_, smarthost):
            [outcome] = relay(smarthost)
            assert (outcome.state, outcome.said_by) == (State.DEFERRED, SaidBy.LOCAL)
            assert (outcome.reply_code, outcome.enhanced_code) == (None, "")


def test_the_enhanced_code_is_not_lost() -> None:
    """aiosmtplib knows no enhanced status codes."""
    script: Script = {"rcpt": [say("550-5.1.1 unknown\n550 5.1.1 here"), Action()], "dot": say("451 4.7.0 later")}
    with served(script, ("ENHANCEDSTATUSCODES",)) as (_, smarthost):
        alice, bob = relay(smarthost, ALICE, BOB)
    assert [(each.reply_code, each.enhanced_code) for each in (alice, bob)] == [(550, "5.1.1"), (451, "4.7.0")]
    assert alice.detail == "unknown here"


@PIPELINING
@pytest.mark.parametrize("pause_seconds", [0.0, 0.1])
@pytest.mark.parametrize("unasked", [b"250 2.0.0 again\r\n", b"421 4.3.2 going down\r\n", b"what"])
def test_a_line_nobody_asked_for_does_not_answer_the_next_command(
    unasked: bytes, pause_seconds: float, extensions: tuple[str, ...]
) -> None:
    """aiosmtplib: such a line was paired with the next command, and every reply after it with the wrong one."""
    # In single bytes, so that the first reply is complete, and taken, before the rest comes.
    twice = Action(b"250 2.0.0 Ok: queued as Q1\r\n" + unasked, is_bytewise=True)
    with served({"dot": [twice]}, extensions) as (server, smarthost):
        assert relay(smarthost)[0].remote_id == "Q1"
        gevent.sleep(pause_seconds)
        [outcome] = relay(smarthost)
        assert (outcome.state, outcome.remote_id) == (State.RELAYED, f"Q{len(server.mails)}")
        assert [mail.is_accepted for mail in server.mails] == [True, True]
        assert server.mails[1].connection == 1


@pytest.mark.parametrize("tls", ["starttls"])
def test_what_was_said_before_tls_is_not_believed_after_it(tls: str, certificate: tuple[Path, Path]) -> None:
    """aiosmtplib drops what came in clear before the handshake, as RFC 3207 §4.2 asks; many clients do not."""
    extensions = iter(["AUTH PLAIN", "AUTH LOGIN"])
    ehlo = iter([f"250-server\n250-STARTTLS\n250 {next(extensions)}", f"250-server\n250 {next(extensions)}"])
    with ScriptedSmtp(
        {"ehlo": lambda: say(next(ehlo))}, tls="starttls", certificate=certificate, credentials=("user", "pass")
    ) as server:
        login = {"username": "user", "password": "pass"}
        session = Dialler(config_for(server, tls=tls, ca_file=str(certificate[0]), **login)).dial()
        session.quit()
    assert [command for command in server.commands if command.startswith("AUTH")] == ["AUTH LOGIN"]


def test_busy_connections_do_not_cost_the_idle_one_its_life() -> None:
    """httpcore: the cap on idle connections counted all of them, so that three busy ones closed the fourth."""
    with served({"dot": wait(0.05)}, pool_size=4) as (server, smarthost):
        assert states(call(smarthost, 4)) == [State.RELAYED] * 4
        server.change({"dot": [stall(), stall(), stall()]})
        busy = call(smarthost, 3)
        eventually(lambda: len(server.mails) == 7)
        for _ in range(5):
            assert relay(smarthost)[0].state is State.RELAYED
            assert smarthost.figures()["idle"] == 1
        assert not any(caller.dead for caller in busy)
        assert len(server.connections) == 4
        assert "QUIT" not in server.commands


@contextmanager
def pool_of(server: ScriptedSmtp, **config: Any) -> Iterator[Pool]:
    settings = config_for(server, **config)
    pool = Pool(settings, Dialler(settings).dial, lambda error: None)
    try:
        yield pool
    finally:
        pool.close(soon(0.0))


@pytest.mark.parametrize("way", ["kill", "deadline"])
def test_a_promised_connection_is_neither_closed_nor_lost_when_its_waiter_goes(way: str) -> None:
    """httpcore: an idle connection that was already promised to a waiter could be closed or promised twice."""
    with ScriptedSmtp() as server, pool_of(server, pool_size=1, idle_seconds=0.2) as pool:
        session = pool.acquire(soon())
        first, second = (gevent.spawn(pool.acquire, soon(seconds)) for seconds in (0.1 if way == "deadline" else 5, 5))
        eventually(lambda: len(pool.state.waiters) == 2)
        if way == "deadline":
            # Nothing else runs meanwhile: its time is over, and nobody has noticed.
            time.sleep(0.11)
        else:
            # It takes effect only when the waiter runs, and by then a connection is promised to it.
            first.kill(block=False)
        pool.release(session, time.monotonic())
        assert repr(pool) == "idle 0, reserved 1, busy 0, dialling 0, waiting 1 of 1"
        if way == "deadline":
            pool.release(first.get(timeout=1.0), time.monotonic())
        assert second.get(timeout=1.0) is session
        assert repr(pool) == "idle 0, reserved 0, busy 1, dialling 0, waiting 0 of 1"
        pool.release(session, time.monotonic())
        assert repr(pool) == "idle 1, reserved 0, busy 0, dialling 0, waiting 0 of 1"
    assert len(server.connections) == 1


def test_no_connection_is_held_by_two() -> None:
    """httpcore: promised twice, one connection served two requests, with each other's answers."""
    held: list[Session] = []

    def hold(pool: Pool) -> None:
        session = pool.acquire(soon())
        assert session not in held
        held.append(session)
        gevent.sleep(0.001)
        held.remove(session)
        pool.release(session, time.monotonic())

    # So short that connections are retired while others are promised.
    with ScriptedSmtp() as server, pool_of(server, pool_size=3, idle_seconds=0.01) as pool:
        for _ in range(4):
            holders = [gevent.spawn(hold, pool) for _ in range(100)]
            for holder in holders[::7]:
                gevent.sleep(0)
                holder.kill(block=False)
            gevent.joinall(holders, timeout=5.0, raise_error=True)
            assert all(holder.dead for holder in holders)
            assert (pool.state.busy, pool.state.reserved) == (set(), {})
            held.clear()
            gevent.sleep(0.05)
    assert server.peak_connections <= 3


def test_the_bound_is_not_only_on_idle_connections() -> None:
    """maddy: ``MaxConnsPerKey`` bounded what lay idle, so that a burst opened as many connections as it had mails."""
    slow = {"banner": wait(0.05), "dot": wait(0.05)}
    with served(slow, pool_size=3) as (server, smarthost):
        callers = call(smarthost, 30)
        eventually(lambda: smarthost.figures()["dialling"] == 3)
        assert smarthost.figures()["waiting"] == 30
        assert states(callers) == [State.RELAYED] * 30
    assert server.peak_connections == len(server.connections) == 3


def test_a_connection_in_use_does_not_grow_old_of_idleness() -> None:
    """maddy: the time of last use was set in a copy, so a connection's idle time began when it was opened."""
    with served(idle_seconds=0.2) as (server, smarthost):
        ends_at = soon(0.6)
        while time.monotonic() < ends_at:
            assert relay(smarthost)[0].state is State.RELAYED
            gevent.sleep(0.03)
        assert len(server.connections) == 1
        eventually(partial(server.has_heard, "QUIT", 0))
    assert len(server.connections) == 1


@pytest.mark.parametrize("answer", [wait(0.3), stall()], ids=["comes back", "is cut"])
def test_a_connection_that_comes_back_after_close_is_closed(answer: Action) -> None:
    """maddy: what was returned to a closed pool was dropped and stayed open."""
    with served({"dot": answer}) as (server, smarthost):
        callers = call(smarthost, 3)
        eventually(lambda: len(server.mails) == 3)
        smarthost.close(soon(2.0 if answer.wait_seconds else 0.1))
        assert set(states(callers, 1.0)) == {State.RELAYED if answer.wait_seconds else State.IN_DOUBT}
        eventually(lambda: not any(each.is_established for each in server.open))
        figures = smarthost.figures()
        assert (figures["idle"], figures["busy"]) == (0, 0)
        for number in range(3 if answer.wait_seconds else 0):
            eventually(partial(server.has_heard, "QUIT", number))


def test_one_mail_is_not_tried_for_ever() -> None:
    """dramatiq: a loop of attempts without a bound outlived the request to stop."""
    with served({"rcpt": drop()}) as (server, smarthost):
        assert relay(smarthost)[0].state is State.DEFERRED
        assert len(server.connections) == 3
        server.change({"dot": say("454 Throttling failure: Maximum sending rate exceeded")})
        caller = call(smarthost, 1, seconds=60.0)
        eventually(lambda: len(server.mails) == 1)
        smarthost.close(soon(0.1))
        assert states(caller, 3.0) == [State.DEFERRED]
