"""The smarthost: attempts, stale connections, the bound, the circuit, and closing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest

from relay.delivery import smarthost as smarthost_module
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.smarthost import MAX_ATTEMPTS, Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import Action, ScriptedSmtp, drop, garbage, say, say_and_drop, stall, wait

DEFAULT_SENDER = "noreply@example.org"
ALICE, BOB = "alice@example.com", "bob@example.com"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
THROTTLED = "454 Throttling failure: Maximum sending rate exceeded"
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


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
@pytest.mark.parametrize("action", [drop(), say_and_drop("421 4.3.2 going down"), garbage(), say("503 5.5.1 order")])
def test_a_connection_that_breaks_before_the_content_is_replaced(phase: str, action: Action) -> None:
    with ScriptedSmtp({phase: [action]}) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost)
        figures = smarthost.figures()
    assert (outcome.state, outcome.attempt) == (State.RELAYED, 2)
    assert (len(server.connections), len(server.mails), figures["retried"]) == (2, 1, 1)


def test_a_mail_that_breaks_every_connection_is_not_tried_for_ever() -> None:
    with ScriptedSmtp({"mail": drop()}) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost)
    assert (outcome.state, outcome.phase, outcome.said_by) == (State.DEFERRED, Phase.MAIL, SaidBy.LOCAL)
    assert (len(server.connections), outcome.attempt) == (MAX_ATTEMPTS, MAX_ATTEMPTS)


def test_a_slow_server_is_not_asked_again() -> None:
    with ScriptedSmtp({"mail": stall()}) as server, smarthost_for(server, mail_seconds=0.1) as smarthost:
        [outcome] = relay(smarthost)
    assert (outcome.state, outcome.detail, outcome.attempt) == (State.DEFERRED, "timed out", 1)
    assert len(server.connections) == 1


def test_only_those_who_were_not_refused_are_tried_again() -> None:
    script = {"rcpt": [say("250 Ok"), say("550 5.1.1 unknown")], "data": [say_and_drop("421 4.3.2 going down")]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        alice, bob = relay(smarthost, ALICE, BOB)
    assert (alice.state, bob.state, bob.reply_code) == (State.RELAYED, State.FAILED, 550)
    assert [mail.forward_paths for mail in server.mails] == [(ALICE,)]
    assert server.commands.count(f"RCPT TO:<{BOB}>") == 1


def test_what_the_smarthost_says_too_late_settles_the_mail() -> None:
    settled: list[list[Outcome]] = []
    with ScriptedSmtp({"dot": [wait(0.3)]}) as server, smarthost_for(server, pool_size=1) as smarthost:
        [outcome] = smarthost.relay(DEFAULT_SENDER, (ALICE,), CONTENT, soon(0.1), settled.append)
        assert outcome.state is State.IN_DOUBT
        assert not outcome.retryable
        assert smarthost.figures()["awaiting_dot"] == 1
        eventually(lambda: settled != [])
        assert relay(smarthost)[0].state is State.RELAYED
        assert smarthost.figures()["awaiting_dot"] == 0
    assert [[each.state for each in outcomes] for outcomes in settled] == [[State.RELAYED]]
    assert (len(server.mails), len(server.connections)) == (2, 1)


def test_closing_settles_what_still_waits() -> None:
    settled: list[list[Outcome]] = []
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server) as smarthost:
        smarthost.relay(DEFAULT_SENDER, (ALICE,), CONTENT, soon(0.1), settled.append)
        smarthost.close(soon(0.1))
        smarthost.wait_settled(2.0)
    assert [[each.state for each in outcomes] for outcomes in settled] == [[State.IN_DOUBT]]
    assert len(server.mails) == 1


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
        assert time.monotonic() - started_at < 0.5
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


def test_a_throttled_mail_goes_out_later_at_a_lower_rate() -> None:
    with ScriptedSmtp({"dot": [say(THROTTLED)]}) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost)
        figures = smarthost.figures()
    assert (outcome.state, outcome.attempt) == (State.RELAYED, 2)
    assert (figures["throttled"], figures["rate_lowered"]) == (1, True)
    assert figures["rate_per_second"] > 0
    assert len(server.connections) == 1


def test_who_queues_for_a_connection_when_the_limit_becomes_known_queues_for_a_turn() -> None:
    script = {"dot": [*[say("250 Ok")] * 10, say(THROTTLED)]}
    with ScriptedSmtp(script) as server, smarthost_for(server, pool_size=1) as smarthost:
        callers = [gevent.spawn(relay, smarthost, seconds=8.0) for _ in range(60)]
        eventually(lambda: smarthost.figures()["throttled"] == 1)
        # 10 were taken in less than a second: about as many may follow in the next.
        gevent.sleep(0.5)
        assert len(server.mails) <= 18
        gevent.killall(callers)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("503 5.5.1 order\n250 2.0.0 Ok", State.IN_DOUBT),
        ("451 4.3.0 later\n250 2.0.0 Ok", State.IN_DOUBT),
        (f"{THROTTLED}\n250 2.0.0 Ok", State.IN_DOUBT),
        ("503 5.5.1 order", State.IN_DOUBT),
        ("421 4.3.2 going down", State.DEFERRED),
        ("451 4.4.2 Timeout", State.DEFERRED),
    ],
)
def test_what_may_have_been_taken_is_not_sent_again(said: str, state: State) -> None:
    with ScriptedSmtp({"dot": [say(said)]}) as server, smarthost_for(server) as smarthost:
        [outcome] = relay(smarthost)
        assert (outcome.state, outcome.attempt) == (state, 1)
        assert len(server.mails) == 1
        assert relay(smarthost)[0].remote_id == "Q2"
    assert len(server.connections) == 2


def test_throttling_at_rcpt_is_throttling_too() -> None:
    script = {"rcpt": [say("250 Ok"), say(THROTTLED)]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        alice, bob = relay(smarthost, ALICE, BOB)
        assert smarthost.figures()["throttled"] == 1
    assert (alice.state, alice.attempt, bob.state, bob.attempt) == (State.RELAYED, 1, State.RELAYED, 2)
    assert [mail.forward_paths for mail in server.mails] == [(ALICE,), (BOB,)]


def test_who_was_to_be_tried_again_is_not_while_the_circuit_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for all five to be refused before the first of them comes back.
    monkeypatch.setattr(smarthost_module, "THROTTLED_PAUSE_SECONDS", 2.5)
    script = {"dot": [*[say(THROTTLED)] * 5, say(QUOTA)]}
    with ScriptedSmtp(script) as server, smarthost_for(server, pool_size=10) as smarthost:
        callers = [gevent.spawn(relay, smarthost) for _ in range(5)]
        eventually(lambda: smarthost.figures()["throttled"] == 5)
        # One more, which is told that the quota is spent; the first five come back after a pause.
        relay(smarthost)
        assert smarthost.figures()["circuit"] == "open"
        gevent.joinall(callers, timeout=5.0)
        assert {caller.value[0].reply_code for caller in callers} == {454}
    assert len(server.mails) == 6


def test_a_connection_that_comes_too_late_for_a_reply_is_not_used() -> None:
    with ScriptedSmtp({"dot": wait(0.1)}) as server, smarthost_for(server, pool_size=10) as smarthost:
        gevent.joinall([gevent.spawn(relay, smarthost) for _ in range(40)], timeout=5.0)
        callers = [gevent.spawn(relay, smarthost, seconds=0.65) for _ in range(100)]
        gevent.joinall(callers, timeout=5.0)
        states = [caller.value[0].state for caller in callers]
    # Ten would have been under way at the deadline; on a busy machine one or another still is.
    assert states.count(State.IN_DOUBT) <= 4
    assert states.count(State.DEFERRED) >= 20
    assert len(server.mails) == 140 - states.count(State.DEFERRED)


def test_the_probe_for_a_connection_does_not_disturb_the_one_for_a_mail() -> None:
    with (
        ScriptedSmtp(credentials=("user", "pass")) as server,
        smarthost_for(server, username="user", password="wrong") as smarthost,
    ):
        relay(smarthost)
        assert smarthost.figures()["circuit"] == "open"
        # Somebody puts the password right; a dial that was under way finds out before the next probe.
        server.credentials = ("user", "wrong")
        eventually(lambda: smarthost.figures()["circuit"] == "closed", 3.0)
        server.change({"dot": [say(QUOTA)]})
        assert relay(smarthost)[0].reply_code == 454
        eventually(lambda: relay(smarthost)[0].state is State.RELAYED, 3.0)
    assert len(server.mails) == 2


def test_a_throttled_mail_whose_time_is_over_is_deferred_with_the_smarthosts_words() -> None:
    with ScriptedSmtp({"dot": say(THROTTLED)}) as server, smarthost_for(server) as smarthost:
        started_at = time.monotonic()
        [outcome] = relay(smarthost, seconds=0.5)
        assert time.monotonic() - started_at < 0.5
    assert (outcome.state, outcome.reply_code, outcome.retryable) == (State.DEFERRED, 454, True)
    assert len(server.mails) == 1


def test_the_sending_rate_is_kept() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, max_recipients_per_second=50.0) as smarthost:
        started_at = time.monotonic()
        callers = [gevent.spawn(relay, smarthost) for _ in range(50)]
        eventually(lambda: smarthost.figures()["rate_waiting"] > 30)
        gevent.joinall(callers, timeout=5.0)
        seconds = time.monotonic() - started_at
    assert len(server.mails) == 50
    # A burst of a tenth of a second goes out at once.
    assert 0.85 <= seconds < 2.0


def test_who_would_come_too_late_at_the_sending_rate_is_refused_at_once() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, max_recipients_per_second=10.0) as smarthost:
        callers = [gevent.spawn(relay, smarthost, seconds=1.0) for _ in range(40)]
        started_at = time.monotonic()
        eventually(lambda: sum(caller.dead for caller in callers) >= 25)
        assert time.monotonic() - started_at < 0.5
        gevent.joinall(callers, timeout=5.0)
        refused = [caller.value[0] for caller in callers if caller.value[0].state is not State.RELAYED]
        assert {(each.state, each.phase, each.retryable) for each in refused} == {(State.DEFERRED, Phase.POOL, True)}
        assert "10 of 10 recipients/s" in refused[0].detail
    assert 9 <= len(server.mails) <= 12
    assert len(server.mails) + len(refused) == 40


def test_a_smarthost_that_wants_fewer_connections_gets_fewer() -> None:
    crowded = say_and_drop("421 Too many concurrent SMTP connections")
    with ScriptedSmtp({"dot": wait(0.2)}) as server, smarthost_for(server, pool_size=8) as smarthost:
        first = [gevent.spawn(relay, smarthost) for _ in range(3)]
        eventually(lambda: len(server.mails) == 3)
        server.change({"banner": crowded})
        later = [gevent.spawn(relay, smarthost) for _ in range(10)]
        gevent.joinall([*first, *later], timeout=5.0)
        figures = smarthost.figures()
        assert {caller.value[0].state for caller in [*first, *later]} == {State.RELAYED}
    assert (figures["limit"], figures["max"], figures["circuit"]) == (3, 8, "closed")
    assert len(server.mails) == 13


def test_what_only_the_deadline_kept_from_being_sent_is_late() -> None:
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server, pool_size=1) as smarthost:
        holder = gevent.spawn(relay, smarthost)
        eventually(lambda: len(server.mails) == 1)
        [queued] = relay(smarthost, seconds=0.1)
        assert (queued.state, queued.detail, queued.is_late) == (State.DEFERRED, "no connection in time", True)
        holder.kill()
    with ScriptedSmtp({"banner": stall()}) as server, smarthost_for(server) as smarthost:
        [dialled] = relay(smarthost, seconds=0.1)
        assert (dialled.state, dialled.is_late) == (State.DEFERRED, True)
    with ScriptedSmtp() as server, smarthost_for(server, max_recipients_per_second=1.0) as smarthost:
        assert relay(smarthost)[0].state is State.RELAYED
        [paced] = relay(smarthost, seconds=0.1)
        assert (paced.state, paced.is_late) == (State.DEFERRED, True)
        assert paced.detail.startswith("no room in time at the sending rate")
    for phase in ("mail", "rcpt", "data"):
        with ScriptedSmtp({phase: stall()}) as server, smarthost_for(server) as smarthost:
            [begun] = relay(smarthost, seconds=0.1)
            assert (begun.state, begun.detail, begun.is_late) == (State.DEFERRED, "timed out", True)
    with ScriptedSmtp({"dot": say(THROTTLED)}) as server, smarthost_for(server) as smarthost:
        [throttled] = relay(smarthost, seconds=0.5)
        assert (throttled.state, throttled.reply_code, throttled.is_late) == (State.DEFERRED, 454, True)


def test_what_more_time_would_not_have_sent_is_not_late() -> None:
    with ScriptedSmtp({"mail": stall()}) as server, smarthost_for(server, mail_seconds=0.1) as smarthost:
        [slow] = relay(smarthost)
        assert (slow.state, slow.detail, slow.is_late) == (State.DEFERRED, "timed out", False)
    with ScriptedSmtp({"dot": stall()}) as server, smarthost_for(server) as smarthost:
        [doubtful] = relay(smarthost, seconds=0.1)
        assert (doubtful.state, doubtful.is_late) == (State.IN_DOUBT, False)
    with ScriptedSmtp({"dot": say("451 4.3.0 later")}) as server, smarthost_for(server) as smarthost:
        [refused] = relay(smarthost)
        assert (refused.state, refused.is_late) == (State.DEFERRED, False)
        smarthost.close(soon(0.0))
        [closing] = relay(smarthost)
        assert (closing.state, closing.is_late) == (State.DEFERRED, False)
    with ScriptedSmtp({"banner": say_and_drop("554 5.3.2 closed")}) as server, smarthost_for(server) as smarthost:
        for _ in range(2):
            [unavailable] = relay(smarthost)
            assert (unavailable.state, unavailable.is_late) == (State.DEFERRED, False)


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


def test_waits_and_transactions_are_timed() -> None:
    with ScriptedSmtp({"dot": [wait(0.3)]}) as server, smarthost_for(server, pool_size=1) as smarthost:
        gevent.joinall([gevent.spawn(relay, smarthost) for _ in range(2)], raise_error=True)
        waits, transactions = smarthost.pool_wait_seconds, smarthost.transaction_seconds
        assert (sum(waits.counts), sum(transactions.counts)) == (2, 2)
        assert 0.3 <= waits.sum_seconds < 2.0  # the second one waited for the first
        assert 0.3 <= transactions.sum_seconds < 2.0


def test_a_wait_in_vain_is_timed_and_a_transaction_that_never_began_is_not() -> None:
    with ScriptedSmtp({"dot": wait(1.5)}) as server, smarthost_for(server, pool_size=1) as smarthost:
        busy = gevent.spawn(relay, smarthost)
        eventually(lambda: "DATA" in server.commands)
        (late,) = relay(smarthost, seconds=0.1)
        assert late.is_late
        busy.get(timeout=5)
        relay(smarthost, "bob\r\n@example.com")
        assert sum(smarthost.pool_wait_seconds.counts) == 3
        assert 0.1 <= smarthost.pool_wait_seconds.sum_seconds < 1.5
        assert sum(smarthost.transaction_seconds.counts) == 1


def test_a_transaction_in_doubt_is_timed_once_to_its_end() -> None:
    with ScriptedSmtp({"dot": wait(1.0)}) as server, smarthost_for(server) as smarthost:
        (outcome,) = relay(smarthost, seconds=0.5)
        assert outcome.state is State.IN_DOUBT
        eventually(lambda: smarthost.figures()["awaiting_dot"] == 0)
        assert sum(smarthost.transaction_seconds.counts) == 1
        assert smarthost.transaction_seconds.sum_seconds >= 1.0


def test_a_smarthost_that_hangs_in_the_middle_of_a_mail_is_set_aside() -> None:
    """The connection that waits for the reply to its final dot seems to live for minutes: it proves nothing."""
    with (
        ScriptedSmtp() as server,
        smarthost_for(server, pool_size=20, banner_seconds=1.5, dot_seconds=60.0) as smarthost,
    ):
        server.change({"dot": stall()})
        callers = [gevent.spawn(relay, smarthost, seconds=20.0)]
        eventually(lambda: len(server.mails) == 1)
        server.change({"banner": stall()})
        hung_at = time.monotonic()
        while smarthost.figures()["circuit"] == "closed":
            assert time.monotonic() - hung_at < 5.0, "nobody noticed"
            callers.append(gevent.spawn(relay, smarthost, seconds=20.0))
            gevent.sleep(0.1)
        assert time.monotonic() - hung_at >= 1.4
        in_doubt, *waited = callers
        gevent.joinall(waited, timeout=5.0)
        assert {(caller.value[0].state, caller.value[0].detail) for caller in waited} == {
            (State.DEFERRED, "timed out: no banner")
        }
        assert relay(smarthost)[0].detail == "smarthost unavailable: timed out: no banner"
        server.change({})
        eventually(lambda: smarthost.figures()["circuit"] == "closed", 5.0)
        assert relay(smarthost)[0].state is State.RELAYED
        in_doubt.kill()


def test_one_dial_in_vain_changes_nothing_while_mail_goes_out() -> None:
    with ScriptedSmtp() as server, smarthost_for(server, pool_size=2, banner_seconds=1.5) as smarthost:
        relay(smarthost)
        server.change({"banner": stall(), "dot": wait(0.2)})
        callers = [gevent.spawn(relay, smarthost, seconds=10.0) for _ in range(15)]
        gevent.joinall(callers, timeout=10.0)
        assert {caller.value[0].state for caller in callers} == {State.RELAYED}
        assert smarthost.figures()["circuit"] == "closed"
