"""Ping and the wait at start-up: one sentence that says what to do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gevent.event import Event

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import LoginRefused, NotConnected, OpeningFailed
from relay.delivery.readiness import ping, wait_for_smtp
from tests.delivery.conftest import config_for
from tests.support.scripted_smtp import ScriptedSmtp, drop, say, stall


def test_ping_asks_nothing_but_noop() -> None:
    with ScriptedSmtp(credentials=("user", "pass")) as server:
        ping(config_for(server, username="user", password="pass"))
    assert [command.split()[0] for command in server.commands] == ["EHLO", "AUTH", "NOOP", "QUIT"]


def test_what_to_do_about_a_wrong_password() -> None:
    with ScriptedSmtp(credentials=("user", "pass")) as server, pytest.raises(LoginRefused) as caught:
        ping(config_for(server, username="user", password="wrong"))
    assert "535" in str(caught.value)
    assert "check SMTP_USERNAME and SMTP_PASSWORD" in str(caught.value)


def test_what_to_do_about_the_wrong_name_in_the_certificate(certificate: tuple[Path, Path]) -> None:
    with (
        ScriptedSmtp(tls="starttls", certificate=certificate) as server,
        pytest.raises(NotConnected, match="SMTP_CA_FILE"),
    ):
        ping(config_for(server, host="localhost", tls="starttls"))


def test_what_to_do_about_a_refused_connect() -> None:
    with ScriptedSmtp() as server:
        config = config_for(server)
    with pytest.raises(NotConnected, match="check SMTP_HOST and SMTP_PORT"):
        ping(config)


def test_what_to_do_about_an_unknown_name() -> None:
    with pytest.raises(NotConnected, match=r"cannot be resolved .*check SMTP_HOST"):
        ping(SmarthostConfig((Host("x" * 70 + ".invalid", 25),), tls="off"))


def test_what_to_do_about_a_server_that_refuses_noop() -> None:
    with ScriptedSmtp({"noop": say("502 what")}) as server, pytest.raises(NotConnected, match="502 what"):
        ping(config_for(server))


def test_a_silent_server_is_given_up_in_time() -> None:
    with ScriptedSmtp({"banner": stall()}) as server:
        started_at = time.monotonic()
        with pytest.raises(NotConnected, match="did not answer within"):
            ping(config_for(server), timeout_seconds=0.2)
        assert time.monotonic() - started_at < 1.0


def test_a_host_that_hangs_does_not_hide_the_next() -> None:
    with ScriptedSmtp({"banner": stall()}) as first, ScriptedSmtp() as second:
        config = config_for(first, hosts=(Host("127.0.0.1", first.port), Host("127.0.0.1", second.port)))
        ping(config, timeout_seconds=0.3)
    assert second.commands == ["EHLO relay.example.org", "NOOP", "QUIT"]


def test_when_no_host_answers_each_is_named() -> None:
    with ScriptedSmtp({"banner": stall()}) as first, ScriptedSmtp({"ehlo": say("550 5.7.1 not you")}) as second:
        config = config_for(first, hosts=(Host("127.0.0.1", first.port), Host("127.0.0.1", second.port)))
        with pytest.raises(NotConnected, match=f"{first.port} did not answer .*; .*{second.port} refused ehlo"):
            ping(config, timeout_seconds=0.3)


def test_the_wait_ends_when_the_server_answers() -> None:
    failures: list[int] = []
    with ScriptedSmtp({"banner": [drop(), drop()]}) as server:
        is_ready = wait_for_smtp(
            config_for(server), lambda number, _: failures.append(number), Event(), pause_seconds=0.01
        )
    assert is_ready
    assert failures == [1, 2]


def test_the_wait_gives_up_with_the_last_error() -> None:
    failures: list[OpeningFailed] = []
    with ScriptedSmtp({"banner": drop()}) as server, pytest.raises(NotConnected) as caught:
        wait_for_smtp(config_for(server), lambda _, error: failures.append(error), Event(), tries=3, pause_seconds=0.01)
    assert len(failures) == 3
    assert failures[-1] is caught.value


def test_the_wait_stops_when_told_to() -> None:
    stop = Event()
    with ScriptedSmtp({"banner": drop()}) as server:
        started_at = time.monotonic()
        assert not wait_for_smtp(config_for(server), lambda _number, _error: stop.set(), stop, pause_seconds=10.0)
        assert time.monotonic() - started_at < 1.0
