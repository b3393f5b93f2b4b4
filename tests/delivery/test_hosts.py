"""Several hosts: the order with a given clock, then real rounds over TCP."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest

from relay.delivery.config import Host
from relay.delivery.hosts import FIRST_ASIDE_SECONDS, LONGEST_ASIDE_SECONDS, TRIAL_SECONDS, Hosts
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.smarthost import Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import Action, ScriptedSmtp, drop, eventually, make_certificate, say_and_drop, stall

A, B, C = Host("a.example.org", 25), Host("b.example.org", 25), Host("c.example.org", 587)
SENDER = "sender@example.org"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
LIMIT = 0.2
MARGIN = 2.0
CLOSED_TODAY = say_and_drop("554 5.3.2 closed today")


def test_all_are_in_order_of_preference() -> None:
    hosts = Hosts([A, B, C])
    assert hosts.in_order() == [A, B, C]
    assert hosts.begin_trial(0.0) is None
    assert repr(hosts) == "a.example.org:25, b.example.org:25, c.example.org:587"
    assert hosts.figures() == [{"host": str(host), "set_aside": ""} for host in (A, B, C)]


def test_one_that_failed_is_not_dialled_until_its_time_is_over() -> None:
    hosts = Hosts([A, B])
    assert hosts.failed(A, "it is down", 10.0)
    assert hosts.in_order() == [B]
    assert hosts.begin_trial(10.0) is hosts.begin_trial(10.0 + FIRST_ASIDE_SECONDS - 0.01) is None
    assert hosts.begin_trial(10.0 + FIRST_ASIDE_SECONDS) == A
    assert hosts.figures()[0] == {"host": "a.example.org:25", "set_aside": "it is down"}
    assert repr(hosts) == "a.example.org:25 aside, b.example.org:25"


def test_one_alone_tries_it_again() -> None:
    hosts = Hosts([A, B])
    hosts.failed(A, "it is down", 0.0)
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS) == A
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS + 1.0) is None
    assert hosts.in_order() == [B]
    assert hosts.worked(A)
    assert hosts.in_order() == [A, B]
    assert not hosts.worked(A)


def test_a_trial_that_never_ended_does_not_keep_it_out_for_ever() -> None:
    hosts = Hosts([A, B])
    hosts.failed(A, "it is down", 0.0)
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS) == A
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS + TRIAL_SECONDS - 0.01) is None
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS + TRIAL_SECONDS) == A


def test_each_trial_that_fails_doubles_its_time_up_to_a_bound() -> None:
    hosts = Hosts([A, B])
    assert hosts.failed(A, "down", 0.0)
    now, aside = 0.0, FIRST_ASIDE_SECONDS
    for _ in range(8):
        assert hosts.begin_trial(now + aside - 0.01) is None
        now += aside
        assert hosts.begin_trial(now) == A
        assert not hosts.failed(A, "still down", now)
        aside = min(2 * aside, LONGEST_ASIDE_SECONDS)
    assert aside == LONGEST_ASIDE_SECONDS
    assert hosts.worked(A)
    hosts.failed(A, "down again", now)
    assert hosts.begin_trial(now + FIRST_ASIDE_SECONDS) == A


def test_dials_that_began_before_it_was_set_aside_count_as_one_failure() -> None:
    hosts = Hosts([A, B])
    assert [hosts.failed(A, "down", 0.01 * number) for number in range(20)] == [True] + 19 * [False]
    assert hosts.begin_trial(FIRST_ASIDE_SECONDS) == A


def test_of_two_whose_time_is_over_each_is_tried_once() -> None:
    hosts = Hosts([A, B, C])
    hosts.failed(A, "down", 0.0)
    hosts.failed(B, "down", 0.0)
    assert hosts.in_order() == [C]
    assert [hosts.begin_trial(FIRST_ASIDE_SECONDS) for _ in range(3)] == [A, B, None]


def test_when_all_are_set_aside_all_are_tried() -> None:
    hosts = Hosts([A, B, C])
    for now, host in enumerate((C, A, B)):
        hosts.failed(host, "down", now / 10)
    assert hosts.in_order() == [C, A, B]
    # Every dial is a trial then.
    assert hosts.begin_trial(10.0) is None
    hosts.worked(A)
    assert hosts.in_order() == [A]


def test_a_single_host_is_always_tried() -> None:
    hosts = Hosts([A])
    for now in range(100):
        hosts.failed(A, "", now / 100)
        assert hosts.in_order() == [A]
        # Never without a reason: '' means that it is in use.
        assert hosts.figures()[0]["set_aside"]


@pytest.mark.parametrize("seed", range(20))
def test_a_dial_has_always_somewhere_to_go_and_at_most_one_risk(seed: int) -> None:
    chance = random.Random(seed)
    hosts, now = Hosts([A, B, C]), 0.0

    def use(host: Host) -> bool:
        does_work = chance.random() < 0.6
        if does_work:
            hosts.worked(host)
        else:
            hosts.failed(host, "down", now)
        return does_work

    for _ in range(2_000):
        now += chance.expovariate(2.0)
        aside = {str(figure["host"]) for figure in hosts.figures() if figure["set_aside"]}
        order = hosts.in_order()
        in_use = [host for host in (A, B, C) if str(host) not in aside]
        assert order == in_use or (not in_use and sorted(order) == [A, B, C])
        trial = hosts.begin_trial(now)
        assert trial is None or (in_use and str(trial) in aside)
        if trial is not None:
            use(trial)
        for host in order:
            if use(host):
                break


@contextmanager
def smarthost_of(*servers: ScriptedSmtp, **config: Any) -> Iterator[Smarthost]:
    hosts = tuple(Host(server.address, server.port) for server in servers)
    smarthost = Smarthost(config_for(servers[0], hosts=hosts, **config))
    try:
        yield smarthost
    finally:
        smarthost.close(soon(0.0))


def relay(smarthost: Smarthost, seconds: float = 10.0) -> Outcome:
    [outcome] = smarthost.relay(SENDER, ("alice@example.com",), CONTENT, soon(seconds))
    return outcome


def relay_many(smarthost: Smarthost, count: int) -> list[Outcome]:
    callers = [gevent.spawn(relay, smarthost) for _ in range(count)]
    gevent.joinall(callers, timeout=10.0, raise_error=True)
    return [caller.value for caller in callers]


def set_aside(smarthost: Smarthost) -> list[str]:
    return [str(figure["set_aside"]) for figure in smarthost.figures()["hosts"]]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refused", "does not accept connections"),
        ("banner stalls", "timed out"),
        ("banner refuses", "closed today"),
        ("hangs up", "connection lost"),
        ("wrong credentials", "Authentication Credentials Invalid"),
        ("unknown certificate", "TLS failed"),
    ],
)
def test_the_next_host_is_used_at_once(fault: str, reason: str, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    script = {"banner stalls": {"banner": stall()}, "banner refuses": {"banner": CLOSED_TODAY}}
    script["hangs up"] = {"ehlo": drop()}
    bad = ScriptedSmtp(
        script.get(fault, {}),
        address="127.0.0.2",
        tls="starttls",
        certificate=make_certificate(tmp_path) if fault == "unknown certificate" else certificate,
        credentials=("user", "another") if fault == "wrong credentials" else ("user", "pass"),
    )
    good = ScriptedSmtp(tls="starttls", certificate=certificate, credentials=("user", "pass"))
    login = {"username": "user", "password": "pass"}
    with ExitStack() as stack:
        stack.enter_context(bad)
        stack.enter_context(good)
        if fault == "refused":
            bad.__exit__(None, None, None)
        tls = {"tls": "starttls", "ca_file": str(certificate[0])}
        config = {"banner_seconds": LIMIT, "max_messages": 1, "pool_size": 8}
        with smarthost_of(bad, good, **config, **login, **tls) as smarthost:
            started_at = time.monotonic()
            assert relay(smarthost).state is State.RELAYED
            assert time.monotonic() - started_at < LIMIT + MARGIN
            first, second = set_aside(smarthost)
            assert second == ""
            assert reason in first
            dialled = len(bad.connections)
            # A connection for each: none of them goes to the host that is set aside.
            assert [outcome.state for outcome in relay_many(smarthost, 12)] == [State.RELAYED] * 12
            assert len(bad.connections) == dialled == (0 if fault == "refused" else 1)
            assert smarthost.figures()["circuit"] == "closed"
    assert len(good.mails) == 13
    assert bad.mails == []


def test_a_burst_of_first_dials_is_served_by_the_next_host() -> None:
    with (
        ScriptedSmtp({"banner": CLOSED_TODAY}, address="127.0.0.2") as bad,
        ScriptedSmtp() as good,
        smarthost_of(bad, good, pool_size=8) as smarthost,
    ):
        assert {outcome.state for outcome in relay_many(smarthost, 40)} == {State.RELAYED}
        assert good.peak_connections <= 8
    assert len(good.mails) == 40


def test_it_is_used_again_after_its_time() -> None:
    with (
        ScriptedSmtp({"banner": CLOSED_TODAY}, address="127.0.0.2") as preferred,
        ScriptedSmtp() as other,
        smarthost_of(preferred, other, max_messages=1) as smarthost,
    ):
        failed_at = time.monotonic()
        # Many dials at once meet the failure; it is one.
        assert {outcome.state for outcome in relay_many(smarthost, 10)} == {State.RELAYED}
        preferred.change({})
        dialled = len(preferred.connections)
        while not preferred.mails:
            assert relay(smarthost).state is State.RELAYED
            assert time.monotonic() < failed_at + FIRST_ASIDE_SECONDS + MARGIN
            gevent.sleep(0.02)
        assert time.monotonic() >= failed_at + FIRST_ASIDE_SECONDS
        assert len(preferred.connections) == dialled + 1
        assert set_aside(smarthost) == ["", ""]
        # A connection that is there already still serves its mail.
        assert {outcome.state for outcome in relay_many(smarthost, 5)} == {State.RELAYED}
        before = len(other.mails)
        assert {outcome.state for outcome in relay_many(smarthost, 5)} == {State.RELAYED}
        assert len(other.mails) == before


def test_no_mail_is_lost_on_a_trial_that_fails() -> None:
    def case(pool_size: int) -> None:
        with (
            ScriptedSmtp({"banner": CLOSED_TODAY}, address="127.0.0.2") as preferred,
            ScriptedSmtp() as other,
            smarthost_of(preferred, other, max_messages=1, banner_seconds=0.5, pool_size=pool_size) as smarthost,
        ):
            assert relay(smarthost).state is State.RELAYED
            preferred.change({"banner": stall()})
            gevent.sleep(FIRST_ASIDE_SECONDS)
            started_at = time.monotonic()
            assert [outcome.state for outcome in relay_many(smarthost, 8)] == [State.RELAYED] * 8
            # With room in the pool nobody waits for it; without, one does, and no longer than it takes.
            assert time.monotonic() - started_at < (0.5 if pool_size > 1 else 0.5 + MARGIN)
            eventually(lambda: "timed out" in set_aside(smarthost)[0])
            assert (len(preferred.connections), preferred.mails) == (2, [])
            assert (len(other.mails), smarthost.figures()["dialling"]) == (9, 0)

    gevent.joinall([gevent.spawn(case, pool_size) for pool_size in (20, 1)], timeout=10.0, raise_error=True)


def test_when_all_fail_the_mail_is_deferred_and_each_is_named() -> None:
    with (
        ScriptedSmtp({"banner": CLOSED_TODAY}, address="127.0.0.2") as second,
        ScriptedSmtp({"ehlo": stall()}, address="127.0.0.3") as third,
    ):
        with ScriptedSmtp() as first:
            pass
        with smarthost_of(first, second, third, ehlo_seconds=LIMIT) as smarthost:
            started_at = time.monotonic()
            outcome = relay(smarthost)
            assert time.monotonic() - started_at < LIMIT + MARGIN
            # The reason is that of the host tried first.
            assert (outcome.state, outcome.phase, outcome.said_by) == (State.DEFERRED, Phase.CONNECT, SaidBy.LOCAL)
            figures = smarthost.figures()
            assert figures["circuit"] == "open"
            for server in (first, second, third):
                assert f"{server.address}:{server.port}" in outcome.detail
                assert f"{server.address}:{server.port}" in figures["circuit_reason"]
            assert "closed today" in outcome.detail
            assert all(set_aside(smarthost))
            deferred = relay(smarthost)
            assert (deferred.state, deferred.phase) == (State.DEFERRED, Phase.POOL)
            # The one that is well again serves everybody, whichever it is.
            third.change({})
            eventually(lambda: smarthost.figures()["circuit"] == "closed")
            assert relay(smarthost).state is State.RELAYED
            assert [bool(reason) for reason in set_aside(smarthost)] == [True, True, False]
    assert len(third.mails) == 1


def test_a_host_that_fails_amid_its_work_is_replaced_by_the_next() -> None:
    with ScriptedSmtp(address="127.0.0.2") as first, ScriptedSmtp() as second:
        with smarthost_of(first, second) as smarthost:
            assert relay(smarthost).state is State.RELAYED
            first.change({"mail": say_and_drop("421 4.3.2 going down"), "banner": say_and_drop("421 4.3.2 down")})
            outcome = relay(smarthost)
            assert (outcome.state, outcome.attempt) == (State.RELAYED, 1)
        assert [len(first.mails), len(second.mails)] == [1, 1]


def test_a_mail_that_is_in_doubt_at_one_host_is_not_given_to_the_next() -> None:
    with ScriptedSmtp({"dot": Action(then="drop")}, address="127.0.0.2") as first, ScriptedSmtp() as second:
        with smarthost_of(first, second) as smarthost:
            assert relay(smarthost).state is State.IN_DOUBT
        assert [len(first.mails), len(second.mails)] == [1, 0]
