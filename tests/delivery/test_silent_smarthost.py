"""A smarthost that takes contents and answers none: it is set aside, and nothing less than that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest

from relay.delivery import silence
from relay.delivery.outcome import Outcome, State
from relay.delivery.smarthost import Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import ScriptedSmtp, drop, eventually, say, stall, wait

SENDER = "noreply@example.org"
ALICE = "alice@example.com"
SILENT_SECONDS = 0.6
CALL_SECONDS = 0.2
QUOTA = "454 Throttling failure: Daily message quota exceeded"


@pytest.fixture(autouse=True)
def _soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_SECONDS", SILENT_SECONDS)


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


def call(smarthost: Smarthost, count: int, seconds: float = CALL_SECONDS) -> list[Any]:
    """Several at once."""
    return [gevent.spawn(relay, smarthost, seconds) for _ in range(count)]


def states(callers: list[Any]) -> list[State]:
    """What became of them."""
    gevent.joinall(callers, timeout=5.0)
    return [caller.value.state for caller in callers]


def circuit(smarthost: Smarthost) -> str:
    """Its state."""
    return str(smarthost.figures()["circuit"])


def relay_until_set_aside(smarthost: Smarthost) -> list[State]:
    """What became of the mails until then."""
    became: list[State] = []
    while circuit(smarthost) == "closed":
        became.append(relay(smarthost).state)
        assert len(became) < 50
    return became


def test_who_answers_no_final_dot_is_set_aside() -> None:
    with served({"dot": stall()}) as (server, smarthost):
        assert states(call(smarthost, 4)) == [State.IN_DOUBT] * 4
        # No connection is left: who comes now waits in vain.
        became = relay_until_set_aside(smarthost)
        assert became == [State.DEFERRED] * len(became)
        outcome = relay(smarthost)
        assert (outcome.state, outcome.is_late) == (State.DEFERRED, False)
        assert outcome.detail.startswith("smarthost unavailable: it takes mails and has answered none for ")
        assert len(server.mails) == 4


def test_connections_need_not_be_used_up() -> None:
    with served({"dot": stall()}, pool_size=50) as (_, smarthost):
        became = relay_until_set_aside(smarthost)
        assert len(became) >= 3
        assert became == [State.IN_DOUBT] * len(became)


def test_who_waits_is_turned_away_when_it_is_set_aside() -> None:
    with served({"dot": stall()}) as (_, smarthost):
        assert states(call(smarthost, 4)) == [State.IN_DOUBT] * 4
        patient = call(smarthost, 5, 5.0)
        relay_until_set_aside(smarthost)
        gevent.joinall(patient, timeout=1.0)
        assert [caller.value.detail.partition(":")[0] for caller in patient] == ["smarthost unavailable"] * 5


def test_an_answer_that_comes_late_lets_everyone_pass_again() -> None:
    with served({"dot": wait(1.5)}) as (server, smarthost):
        assert states(call(smarthost, 4)) == [State.IN_DOUBT] * 4
        relay_until_set_aside(smarthost)
        server.change({})
        eventually(lambda: circuit(smarthost) == "closed")
        assert states(call(smarthost, 4, 5.0)) == [State.RELAYED] * 4


def test_an_answer_to_a_patient_caller_lets_everyone_pass_again() -> None:
    with served({"dot": wait(2.5)}) as (server, smarthost):
        patient = call(smarthost, 1, 10.0)
        eventually(lambda: len(server.mails) == 1)
        server.change({"dot": stall()})
        relay_until_set_aside(smarthost)
        assert not patient[0].dead
        assert states(patient) == [State.RELAYED]
        assert circuit(smarthost) == "closed"


@pytest.mark.parametrize("answer", ["250 Ok", "554 5.7.1 no", "451 4.3.0 later"])
def test_a_mail_that_is_let_through_and_answered_lets_everyone_pass_again(answer: str) -> None:
    with served({"dot": stall()}, pool_size=50) as (server, smarthost):
        relay_until_set_aside(smarthost)
        server.change({"dot": say(answer)})
        eventually(lambda: relay(smarthost, 5.0).reply_code is not None)
        assert circuit(smarthost) == "closed"


@pytest.mark.parametrize(
    ("dot", "limits", "seconds"),
    [(stall(), {}, CALL_SECONDS), (stall(), {"dot_seconds": 0.2}, 5.0), (drop(), {}, 5.0)],
    ids=["the caller's time is over", "the dot's time is over", "the connection is lost"],
)
def test_few_mails_are_let_through_to_who_stays_silent(dot: Any, limits: dict[str, Any], seconds: float) -> None:
    with served({"dot": dot}, pool_size=50, **limits) as (server, smarthost):
        while circuit(smarthost) == "closed":
            assert relay(smarthost, seconds).state is State.IN_DOUBT
            gevent.sleep(0.05)
        before = len(server.mails)
        ends_at = soon(1.5)
        while soon(0.0) < ends_at:
            relay(smarthost, seconds)
            gevent.sleep(0.01)
        # After 0.25 s, 0.5 s more, 1 s more.
        assert 1 <= len(server.mails) - before <= 3
        assert circuit(smarthost) == "open"


def test_who_would_show_whether_it_answers_needs_a_connection_for_that() -> None:
    with served({"dot": stall()}, dot_seconds=2.5) as (server, smarthost):
        assert states(call(smarthost, 4)) == [State.IN_DOUBT] * 4
        relay_until_set_aside(smarthost)
        gevent.sleep(0.5)  # it is time to try
        started_at = soon(0.0)
        assert relay(smarthost, 5.0).detail.startswith("smarthost unavailable")
        assert soon(0.0) - started_at < 1.0
        # The dots' time is over, so there is room again.
        server.change({})
        eventually(lambda: relay(smarthost, 5.0).state is State.RELAYED)
        assert circuit(smarthost) == "closed"


def test_fewer_connections_are_allowed_than_there_might_be() -> None:
    too_many = say("421 4.7.0 Too many concurrent SMTP connections")
    with served({"dot": stall()}, pool_size=20) as (server, smarthost):
        holders = call(smarthost, 2, 0.5)
        eventually(lambda: len(server.mails) == 2)
        server.change({"dot": stall(), "banner": too_many})
        assert relay(smarthost).state is State.DEFERRED
        assert states(holders) == [State.IN_DOUBT] * 2
        assert smarthost.figures()["limit"] == 2
        relay_until_set_aside(smarthost)
        assert "answered none" in smarthost.figures()["circuit_reason"]


def test_it_falls_silent_again_while_old_mails_still_wait() -> None:
    with served({"dot": wait(1.5)}) as (server, smarthost):
        first = call(smarthost, 1)
        eventually(lambda: len(server.mails) == 1)
        server.change({"dot": stall()})
        assert states(first + call(smarthost, 3)) == [State.IN_DOUBT] * 4
        relay_until_set_aside(smarthost)
        eventually(lambda: circuit(smarthost) == "closed")  # the first one's answer
        assert states(call(smarthost, 1)) == [State.IN_DOUBT]  # and the only free connection is used up
        relay_until_set_aside(smarthost)


def test_it_is_back_and_has_no_quota_left() -> None:
    """What was sent before and is answered now does not let others pass who would be refused."""
    with served({"dot": wait(3.0)}, pool_size=50) as (server, smarthost):
        straggler = call(smarthost, 1)
        eventually(lambda: len(server.mails) == 1)
        server.change({"dot": stall()})
        relay_until_set_aside(smarthost)
        server.change({"mail": say(QUOTA)})
        eventually(lambda: relay(smarthost, 5.0).reply_code == 454)
        assert "quota" in smarthost.figures()["circuit_reason"]
        assert states(straggler) == [State.IN_DOUBT]
        waiting = smarthost.figures()["awaiting_dot"]
        eventually(lambda: smarthost.figures()["awaiting_dot"] < waiting)  # the straggler's answer has come
        assert circuit(smarthost) == "open"
        assert "quota" in smarthost.figures()["circuit_reason"]


def test_an_answered_dot_closes_no_circuit_that_is_open_for_another_reason() -> None:
    with served({"dot": [wait(0.5)]}, pool_size=4) as (server, smarthost):
        patient = call(smarthost, 1, 5.0)
        eventually(lambda: len(server.mails) == 1)
        server.change({"mail": say(QUOTA)})
        assert relay(smarthost, 5.0).reply_code == 454
        assert states(patient) == [State.RELAYED]
        assert circuit(smarthost) == "open"


def test_a_few_mails_that_take_long_prove_nothing() -> None:
    with served({"dot": [stall(), stall()]}, pool_size=8) as (_, smarthost):
        assert states(call(smarthost, 2)) == [State.IN_DOUBT] * 2
        gevent.sleep(SILENT_SECONDS)
        assert relay(smarthost, 5.0).state is State.RELAYED
        assert circuit(smarthost) == "closed"


def test_mails_that_take_long_beside_others_prove_nothing() -> None:
    with served({"dot": [stall(), stall(), stall()]}, pool_size=8) as (server, smarthost):
        waiting = call(smarthost, 3, SILENT_SECONDS + 0.5)
        eventually(lambda: len(server.mails) == 3)
        server.change({})
        assert relay(smarthost, 5.0).state is State.RELAYED
        assert states(waiting) == [State.IN_DOUBT] * 3
        assert circuit(smarthost) == "closed"


def test_connections_that_waited_once_prove_nothing() -> None:
    with served({"dot": wait(0.5)}, pool_size=2) as (server, smarthost):
        assert states(call(smarthost, 2)) == [State.IN_DOUBT] * 2
        eventually(lambda: smarthost.figures()["awaiting_dot"] == 0)
        gevent.sleep(SILENT_SECONDS)
        server.change({"dot": [stall()]})
        assert states(call(smarthost, 1)) == [State.IN_DOUBT]
        assert circuit(smarthost) == "closed"


def test_mails_that_are_cut_off_at_the_end_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with served({"dot": stall()}, pool_size=8) as (server, smarthost):
        callers = call(smarthost, 4, 10.0)
        eventually(lambda: len(server.mails) == 4)
        gevent.sleep(SILENT_SECONDS)
        smarthost.close(soon(0.1))
        assert states(callers) == [State.IN_DOUBT] * 4
    assert "set aside" not in caplog.text
