"""A smarthost that takes contents and answers none: it is set aside, and nothing less than that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest

from relay.delivery import guard
from relay.delivery.outcome import Outcome, State
from relay.delivery.smarthost import Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import ScriptedSmtp, eventually, say, stall, wait

SENDER = "noreply@example.org"
ALICE, BOB = "alice@example.com", "bob@example.com"
SILENT_SECONDS = 0.4
CALL_SECONDS = 0.1


@pytest.fixture(autouse=True)
def _soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SILENT_SECONDS", SILENT_SECONDS)


@contextmanager
def served(script: Any = None, **config: Any) -> Iterator[tuple[ScriptedSmtp, Smarthost]]:
    """A smarthost, and our end of it."""
    with ScriptedSmtp(script or {}) as server:
        smarthost = Smarthost(config_for(server, **({"pool_size": 4, "dot_seconds": 10.0} | config)))
        try:
            yield server, smarthost
        finally:
            smarthost.close(soon(0.1))


def relay(smarthost: Smarthost, seconds: float = CALL_SECONDS) -> Outcome:
    """What becomes of one mail."""
    return smarthost.relay(SENDER, (ALICE,), b"Subject: hello\r\n\r\nHello.\r\n", soon(seconds))[0]


def relay_many(smarthost: Smarthost, count: int, seconds: float = CALL_SECONDS) -> list[State]:
    """What becomes of several at once."""
    callers = [gevent.spawn(relay, smarthost, seconds) for _ in range(count)]
    gevent.joinall(callers, timeout=5.0)
    return [caller.value.state for caller in callers]


def relay_until_set_aside(smarthost: Smarthost) -> list[State]:
    """What became of the mails until then."""
    states: list[State] = []
    while smarthost.figures()["circuit"] == "closed":
        states.append(relay(smarthost).state)
        assert len(states) < 50
    return states


def test_who_answers_no_final_dot_is_set_aside() -> None:
    with served({"dot": stall()}) as (server, smarthost):
        assert relay_many(smarthost, 3) == [State.IN_DOUBT] * 3
        assert smarthost.figures()["circuit"] == "closed"  # not for long enough yet
        states = relay_until_set_aside(smarthost)
        # The fourth connection is in doubt, too; who finds none waits in vain.
        assert states == [State.IN_DOUBT] + [State.DEFERRED] * (len(states) - 1)
        assert len(server.mails) == 4
        outcome = relay(smarthost)
        assert (outcome.state, outcome.is_late) == (State.DEFERRED, False)
        assert outcome.detail.startswith("smarthost unavailable: it takes mails and has answered none for ")
        assert len(server.mails) == 4


def test_who_waits_is_turned_away_when_it_is_set_aside() -> None:
    with served({"dot": stall()}) as (_, smarthost):
        assert relay_many(smarthost, 4) == [State.IN_DOUBT] * 4
        patient = [gevent.spawn(relay, smarthost, 5.0) for _ in range(5)]
        relay_until_set_aside(smarthost)
        gevent.joinall(patient, timeout=1.0)
        assert [caller.value.detail.partition(":")[0] for caller in patient] == ["smarthost unavailable"] * 5


def test_any_answer_to_a_final_dot_is_a_sign_of_life_however_late() -> None:
    with served({"dot": [wait(1.0), wait(1.0), wait(1.0), say("451 4.3.0 later")]}) as (server, smarthost):
        assert relay_many(smarthost, 3) == [State.IN_DOUBT] * 3
        gevent.sleep(SILENT_SECONDS)
        # The fourth is answered, so that nothing is silent any more.
        assert relay(smarthost).reply_code == 451
        assert relay_many(smarthost, 4)[:3] == [State.RELAYED] * 3
        assert smarthost.figures()["circuit"] == "closed"
        assert len(server.mails) > 4


def test_an_answer_that_comes_late_lets_everyone_pass_again() -> None:
    with served({"dot": wait(1.0)}) as (server, smarthost):
        assert relay_many(smarthost, 4) == [State.IN_DOUBT] * 4
        relay_until_set_aside(smarthost)
        server.change({})
        eventually(lambda: smarthost.figures()["circuit"] == "closed")
        assert relay_many(smarthost, 4) == [State.RELAYED] * 4


@pytest.mark.parametrize("answer", ["250 Ok", "554 5.7.1 no"])
def test_a_mail_that_is_let_through_and_answered_lets_everyone_pass_again(answer: str) -> None:
    with served({"dot": [stall(), stall(), stall(), say(answer)]}) as (_, smarthost):
        assert relay_many(smarthost, 3) == [State.IN_DOUBT] * 3
        gevent.sleep(SILENT_SECONDS)
        smarthost._guard.look_for_silence(soon(0.0))
        assert smarthost.figures()["circuit"] == "open"

        def is_answered() -> bool:
            return relay(smarthost).reply_code is not None

        eventually(is_answered)
        assert smarthost.figures()["circuit"] == "closed"


def test_few_mails_are_let_through_to_who_stays_silent() -> None:
    with served({"dot": stall()}, pool_size=50) as (server, smarthost):
        assert relay_many(smarthost, 3) == [State.IN_DOUBT] * 3
        relay_until_set_aside(smarthost)
        before = len(server.mails)
        ends_at = soon(1.5)
        while soon(0.0) < ends_at:
            relay(smarthost)
            gevent.sleep(0.01)
        # After 0.25 s, 0.5 s more, 1 s more.
        assert 1 <= len(server.mails) - before <= 3


@pytest.mark.parametrize(("pool_size", "waiting", "circuit"), [(8, 2, "closed"), (8, 3, "open"), (2, 2, "open")])
def test_a_few_mails_that_take_long_prove_nothing(pool_size: int, waiting: int, circuit: str) -> None:
    with served({"dot": stall()}, pool_size=pool_size) as (_, smarthost):
        relay_many(smarthost, waiting)
        gevent.sleep(SILENT_SECONDS)
        smarthost._guard.look_for_silence(soon(0.0))
        assert smarthost.figures()["circuit"] == circuit


def test_mails_that_take_long_beside_others_prove_nothing() -> None:
    with served({"dot": [stall(), stall(), stall(), wait(0.05)]}, pool_size=8) as (server, smarthost):
        waiting = [gevent.spawn(relay, smarthost, SILENT_SECONDS + 0.2) for _ in range(3)]
        eventually(lambda: len(server.mails) == 3)
        server.change({})
        assert relay(smarthost).state is State.RELAYED
        gevent.joinall(waiting, timeout=2.0)
        assert [caller.value.state for caller in waiting] == [State.IN_DOUBT] * 3
        gevent.sleep(SILENT_SECONDS)
        smarthost._guard.look_for_silence(soon(0.0))
        assert smarthost.figures()["circuit"] == "closed"


def test_time_limits_of_the_final_dot_itself_count_as_well() -> None:
    with served({"dot": stall()}, dot_seconds=0.2) as (_, smarthost):
        assert relay_many(smarthost, 2, seconds=5.0) == [State.IN_DOUBT] * 2
        assert smarthost.figures()["circuit"] == "closed"
        relay_many(smarthost, 1, seconds=5.0)
        assert smarthost.figures()["circuit"] == "open"
