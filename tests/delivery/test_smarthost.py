"""The smarthost: attempts, stale connections, the bound, the circuit, and closing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest

from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.smarthost import Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import Action, ScriptedSmtp, drop, say, say_and_drop, stall

DEFAULT_SENDER = "noreply@example.org"
ALICE, BOB = "alice@example.com", "bob@example.com"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
QUOTA = "454 Throttling failure: Daily message quota exceeded"


@contextmanager
def smarthost_for(server: ScriptedSmtp, **config: Any) -> Iterator[Smarthost]:
    smarthost = Smarthost(config_for(server, **config), default_sender=DEFAULT_SENDER)
    try:
        yield smarthost
    finally:
        smarthost.close(soon(1.0))


def relay(
    smarthost: Smarthost, *forward_paths: str, sender: str = DEFAULT_SENDER, seconds: float = 5.0
) -> list[Outcome]:
    return smarthost.relay(sender, forward_paths or (ALICE,), CONTENT, soon(seconds))


def eventually(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    ends_at = soon(seconds)
    while not is_so():
        assert time.monotonic() < ends_at, "it did not become so"
        gevent.sleep(0.005)


def test_one_connection_carries_many_mails() -> None:
    with ScriptedSmtp() as server, smarthost_for(server) as smarthost:
        outcomes = [relay(smarthost)[0] for _ in range(5)]
        figures = smarthost.figures()
        smarthost.close(soon())
        eventually(lambda: server.commands[-1] == "QUIT")
    assert {outcome.state for outcome in outcomes} == {State.RELAYED}
    assert len(server.connections) == 1
    assert (figures["idle"], figures["busy"], figures["connections_opened"], figures["circuit"]) == (1, 0, 1, "closed")
    assert server.commands.count("RSET") == 0


def test_fifty_callers_never_exceed_the_bound() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, pool_size=4) as smarthost:
        callers = [gevent.spawn(relay, smarthost, f"user{number}@example.com") for number in range(50)]
        gevent.joinall(callers, timeout=10.0)
        assert all(caller.value[0].state is State.RELAYED for caller in callers)
    assert server.peak_connections == 4
    assert sorted(mail.forward_paths[0] for mail in server.mails) == sorted(f"user{n}@example.com" for n in range(50))


@pytest.mark.parametrize("action", [drop(), say_and_drop("421 4.4.2 idle"), say_and_drop("451 4.4.2 Timeout waiting")])
def test_a_stale_connection_is_replaced_at_once(action: Action) -> None:
    with ScriptedSmtp({"mail": [say("250 Ok"), action]}) as server, smarthost_for(server) as smarthost:
        [first], [second] = relay(smarthost), relay(smarthost)
        figures = smarthost.figures()
    assert (first.state, second.state, second.attempt) == (State.RELAYED, State.RELAYED, 1)
    assert (len(server.connections), len(server.mails)) == (2, 2)
    assert figures["stale_replaced"] == 1


def test_a_connection_that_was_closed_while_idle_is_not_even_tried() -> None:
    with ScriptedSmtp() as server, smarthost_for(server) as smarthost:
        relay(smarthost)
        server.drop_connections()
        gevent.sleep(0.1)
        [outcome] = relay(smarthost)
    assert outcome.state is State.RELAYED
    assert len(server.connections) == 2
    assert server.connections[0][-1] == "DATA"


def test_all_connections_stale_after_a_restart() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, pool_size=5) as smarthost:
        gevent.joinall([gevent.spawn(relay, smarthost) for _ in range(20)], timeout=5.0)
        server.drop_connections()
        callers = [gevent.spawn(relay, smarthost) for _ in range(20)]
        gevent.joinall(callers, timeout=5.0)
        assert {caller.value[0].state for caller in callers} == {State.RELAYED}
    assert len(server.mails) == 40


def test_a_new_connection_that_breaks_defers_and_is_not_tried_again() -> None:
    with ScriptedSmtp({"mail": drop()}) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost)
    assert (outcome.state, outcome.phase, outcome.said_by) == (State.DEFERRED, Phase.MAIL, SaidBy.LOCAL)
    assert len(server.connections) == 1


def test_in_doubt_is_never_tried_again() -> None:
    with ScriptedSmtp({"dot": [say("250 Ok"), drop()]}) as server, smarthost_for(server) as smarthost:
        assert relay(smarthost)[0].state is State.RELAYED
        assert [outcome.state for outcome in relay(smarthost, ALICE, BOB)] == [State.IN_DOUBT] * 2
    assert len(server.mails) == 2


def test_idle_connections_are_retired_without_traffic() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, idle_seconds=0.1) as smarthost:
        relay(smarthost)
        eventually(lambda: smarthost.figures()["idle"] == 0)
        eventually(lambda: server.open_connections == 0)
    assert server.commands[-1] == "QUIT"


def test_a_connection_is_retired_after_its_last_message() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, max_messages=2) as smarthost:
        for _ in range(5):
            assert relay(smarthost)[0].state is State.RELAYED
    assert [sum(command == "DATA" for command in commands) for commands in server.connections] == [2, 2, 1]


def test_no_connection_in_time_defers_in_time() -> None:
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server, pool_size=1) as smarthost:
        holder = gevent.spawn(relay, smarthost)
        eventually(lambda: len(server.mails) == 1)
        started_at = time.monotonic()
        waiters = [gevent.spawn(relay, smarthost, seconds=seconds) for seconds in (0.3, 0.1, 0.2)]
        gevent.joinall(waiters, timeout=5.0)
        assert 0.3 <= time.monotonic() - started_at < 1.0
        for waiter in waiters:
            [outcome] = waiter.value
            assert (outcome.state, outcome.phase, outcome.reply_code) == (State.DEFERRED, Phase.POOL, None)
        assert not holder.dead


def test_a_killed_caller_leaves_no_half_used_connection() -> None:
    with ScriptedSmtp({"dot": [stall()]}) as server, smarthost_for(server, pool_size=1) as smarthost:
        caller, waiter = gevent.spawn(relay, smarthost), gevent.spawn(relay, smarthost)
        eventually(lambda: len(server.mails) == 1)
        caller.kill()
        waiter.join(timeout=5.0)
        assert waiter.value[0].state is State.RELAYED
    assert len(server.connections) == 2


def test_the_circuit_opens_when_connecting_fails_and_closes_by_itself() -> None:
    with ScriptedSmtp({"banner": say_and_drop("554 5.3.2 closed today")}) as server, smarthost_for(server) as smarthost:
        callers = [gevent.spawn(relay, smarthost) for _ in range(5)]
        gevent.joinall(callers, timeout=5.0)
        for caller in callers:
            [outcome] = caller.value
            assert (outcome.state, outcome.reply_code, outcome.phase) == (State.DEFERRED, 554, Phase.BANNER)
        started_at = time.monotonic()
        [deferred] = relay(smarthost)
        assert time.monotonic() - started_at < 0.05
        assert (deferred.state, deferred.reply_code, deferred.said_by) == (State.DEFERRED, None, SaidBy.LOCAL)
        assert "closed today" in deferred.detail
        assert smarthost.figures()["circuit"] == "open"
        server.change({})
        eventually(lambda: smarthost.figures()["circuit"] == "closed", seconds=2.0)
        assert relay(smarthost)[0].state is State.RELAYED
    assert server.commands[:2] == ["EHLO relay.example.org", "NOOP"]
    assert server.mails[0].connection == len(server.connections) - 1


def test_a_server_that_comes_back_is_used_within_two_seconds() -> None:
    with ScriptedSmtp() as server:
        port = server.port
    with smarthost_for(server) as smarthost:
        assert relay(smarthost)[0].phase is Phase.CONNECT
        gevent.sleep(0.5)
        with ScriptedSmtp(port=port):
            eventually(lambda: relay(smarthost)[0].state is State.RELAYED, seconds=2.0)


def test_a_failing_dial_does_not_stop_the_connections_that_live() -> None:
    script = {"banner": [say("220 hello")], "dot": [stall()]}
    with ScriptedSmtp({**script}) as server, smarthost_for(server, pool_size=2) as smarthost:
        holder = gevent.spawn(relay, smarthost)
        eventually(lambda: len(server.mails) == 1)
        server.change({"banner": say_and_drop("421 4.7.0 Too many concurrent SMTP connections")})
        [outcome] = relay(smarthost, seconds=0.3)
        assert (outcome.state, outcome.phase) == (State.DEFERRED, Phase.POOL)
        assert smarthost.figures()["circuit"] == "closed"
        # One refused dial, then a pause, not one dial after another.
        assert len(server.connections) == 2
        assert not holder.dead


def test_wrong_credentials_open_the_circuit() -> None:
    with (
        ScriptedSmtp(credentials=("user", "pass")) as server,
        smarthost_for(server, username="user", password="wrong") as smarthost,
    ):
        [outcome] = relay(smarthost)
        assert (outcome.state, outcome.reply_code, outcome.phase) == (State.DEFERRED, 535, Phase.AUTH)
        assert smarthost.figures()["circuit"] == "open"


def test_a_spent_quota_opens_the_circuit_until_one_mail_gets_through() -> None:
    with ScriptedSmtp({"dot": [say(QUOTA), say(QUOTA)]}) as server, smarthost_for(server) as smarthost:
        assert relay(smarthost)[0].reply_code == 454
        assert [relay(smarthost)[0].said_by for _ in range(3)] == [SaidBy.LOCAL] * 3
        assert len(server.mails) == 1
        eventually(lambda: relay(smarthost)[0].state is State.RELAYED)
        assert smarthost.figures()["circuit"] == "closed"
    # The refused one, one refused probe, and the probe that got through.
    assert len(server.mails) == 3


@pytest.mark.parametrize(
    ("sender", "circuit"), [(DEFAULT_SENDER, "open"), ("someone@example.net", "closed")], ids=["default", "other"]
)
def test_only_the_default_senders_554_stops_everyone(sender: str, circuit: str) -> None:
    script = {"dot": [say("554 Access denied: User `arn' is not authorized")]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost, sender=sender)
        assert (outcome.state, outcome.reply_code) == (State.FAILED, 554)
        assert smarthost.figures()["circuit"] == circuit


def test_throttling_defers_the_mail_and_nothing_else() -> None:
    script = {"dot": [say("454 Throttling failure: Maximum sending rate exceeded")]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        assert relay(smarthost)[0].state is State.DEFERRED
        assert relay(smarthost)[0].state is State.RELAYED
    assert len(server.connections) == 1


def test_closing_resolves_everyone() -> None:
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server, pool_size=1) as smarthost:
        holder = gevent.spawn(relay, smarthost)
        eventually(lambda: len(server.mails) == 1)
        waiters = [gevent.spawn(relay, smarthost) for _ in range(5)]
        gevent.sleep(0.02)
        started_at = time.monotonic()
        smarthost.close(soon(0.2))
        gevent.joinall([holder, *waiters], timeout=1.0)
        assert time.monotonic() - started_at < 1.0
        assert holder.value[0].state is State.IN_DOUBT
        assert [waiter.value[0].state for waiter in waiters] == [State.DEFERRED] * 5
        assert relay(smarthost)[0].state is State.DEFERRED
        assert smarthost.figures()["busy"] == 0


def test_closing_while_dialling_resolves_everyone() -> None:
    with ScriptedSmtp({"banner": stall()}) as server, smarthost_for(server) as smarthost:
        waiters = [gevent.spawn(relay, smarthost) for _ in range(5)]
        eventually(lambda: len(server.connections) == 5)
        smarthost.close(soon(0.2))
        gevent.joinall(waiters, timeout=1.0)
        assert [waiter.value[0].state for waiter in waiters] == [State.DEFERRED] * 5
        assert smarthost.figures()["dialling"] == 0
