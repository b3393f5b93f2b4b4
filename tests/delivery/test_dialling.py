"""Opening a session: TLS, AUTH, and what each phase's failure is called."""

from __future__ import annotations

import ssl
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import Dialler, LoginRefused, NotConnected, OpeningFailed
from relay.delivery.outcome import Phase, State
from relay.delivery.trouble import Probe, Radius
from relay.errors import ConfigError
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import (
    Action,
    ScriptedSmtp,
    drop,
    garbage,
    make_certificate,
    say,
    say_and_drop,
    say_bytewise,
    stall,
)

Certificate = tuple[Path, Path]


def dial_and_send(config: SmarthostConfig) -> State:
    session = Dialler(config).dial()
    try:
        [outcome] = session.transact("a@example.org", ("b@example.com",), b"x\r\n" * 5000, soon())
        return outcome.state
    finally:
        session.quit()


@pytest.mark.parametrize("tls", ["starttls", "auto"])
def test_starttls(tls: str, certificate: Certificate) -> None:
    with ScriptedSmtp(tls="starttls", certificate=certificate, credentials=("user", "pass")) as server:
        config = config_for(
            server, host="localhost", tls=tls, ca_file=str(certificate[0]), username="user", password="pass"
        )
        assert dial_and_send(config) is State.RELAYED
    ehlo = "EHLO relay.example.org"
    assert server.commands[:4] == [ehlo, "STARTTLS", ehlo, "AUTH PLAIN AHVzZXIAcGFzcw=="]
    assert server.mails[0].content == b"x\r\n" * 5000


def test_implicit_tls(certificate: Certificate) -> None:
    with ScriptedSmtp(tls="implicit", certificate=certificate) as server:
        config = config_for(server, host="localhost", tls="implicit", ca_file=str(certificate[0]))
        assert dial_and_send(config) is State.RELAYED
    assert "STARTTLS" not in server.commands


def test_replies_over_tls_may_come_in_pieces(certificate: Certificate) -> None:
    script = {"mail": say_bytewise("250 2.1.0 Ok"), "dot": say_bytewise("250 2.0.0 Ok")}
    with ScriptedSmtp(script, tls="implicit", certificate=certificate) as server:
        config = config_for(server, host="localhost", tls="implicit", ca_file=str(certificate[0]))
        assert dial_and_send(config) is State.RELAYED


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_an_unknown_certificate_is_refused(tls: Any, certificate: Certificate) -> None:
    with ScriptedSmtp(tls=tls, certificate=certificate) as server:
        with pytest.raises(NotConnected, match="self-signed") as caught:
            Dialler(config_for(server, host="localhost", tls=tls)).dial()
        assert dial_and_send(config_for(server, host="localhost", tls=tls, tls_verify=False)) is State.RELAYED
    assert caught.value.outcome.phase is Phase.STARTTLS


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    other = make_certificate(tmp_path, "other.example.org")
    with (
        ScriptedSmtp(tls="starttls", certificate=other) as server,
        pytest.raises(NotConnected, match="not valid for 'localhost'"),
    ):
        Dialler(config_for(server, host="localhost", tls="starttls", ca_file=str(other[0]))).dial()


def test_required_tls_that_is_not_offered_ends_the_dial_before_the_password() -> None:
    with (
        ScriptedSmtp(credentials=("user", "pass")) as server,
        pytest.raises(NotConnected, match="STARTTLS is required but not offered"),
    ):
        Dialler(config_for(server, tls="starttls", username="user", password="pass")).dial()
    assert server.commands == ["EHLO relay.example.org"]


def test_bytes_before_the_handshake_abort_it(certificate: Certificate) -> None:
    script = {"starttls": say("220 go ahead\n250 injected")}
    with (
        ScriptedSmtp(script, tls="starttls", certificate=certificate) as server,
        pytest.raises(NotConnected, match="before the TLS handshake"),
    ):
        Dialler(config_for(server, host="localhost", tls="starttls", ca_file=str(certificate[0]))).dial()
    assert server.commands == ["EHLO relay.example.org", "STARTTLS"]


@pytest.mark.parametrize(("newest", "is_good"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)])
def test_tls_below_1_2_is_refused(newest: ssl.TLSVersion, is_good: bool, certificate: Certificate) -> None:
    with ScriptedSmtp(tls="implicit", certificate=certificate) as server:
        # Without the last, the server's own library would refuse the old version.
        server.ssl_context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            server.ssl_context.minimum_version = ssl.TLSVersion.TLSv1
            server.ssl_context.maximum_version = newest
        config = config_for(server, tls="implicit", ca_file=str(certificate[0]))
        if is_good:
            assert dial_and_send(config) is State.RELAYED
            return
        with pytest.raises(NotConnected, match="TLS failed") as caught:
            Dialler(config).dial()
        assert caught.value.outcome.phase is Phase.STARTTLS
    assert server.commands == []


@pytest.mark.parametrize("tls", ["starttls", "auto"])
def test_starttls_that_is_offered_and_refused_ends_the_dial(tls: Any, certificate: Certificate) -> None:
    script = {"starttls": say("454 4.7.0 TLS not available")}
    with (
        ScriptedSmtp(script, tls="starttls", certificate=certificate, credentials=("user", "pass")) as server,
        pytest.raises(NotConnected, match="TLS not available") as caught,
    ):
        Dialler(config_for(server, tls=tls, username="user", password="pass")).dial()
    assert (caught.value.outcome.phase, caught.value.outcome.reply_code) == (Phase.STARTTLS, 454)
    assert server.commands == ["EHLO relay.example.org", "STARTTLS"]


def test_auth_login_when_plain_is_not_offered() -> None:
    with ScriptedSmtp(extensions=("AUTH LOGIN",), credentials=("user", "pass")) as server:
        assert dial_and_send(config_for(server, username="user", password="pass")) is State.RELAYED
    assert "AUTH LOGIN" in server.commands


@pytest.mark.parametrize(("username", "password"), [("", ""), ("user", ""), ("", "pass")])
def test_no_auth_unless_both_are_set(username: str, password: str) -> None:
    with ScriptedSmtp(credentials=("user", "pass")) as server:
        assert dial_and_send(config_for(server, username=username, password=password)) is State.RELAYED
    assert not any(command.startswith("AUTH") for command in server.commands)


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_a_wrong_password(mechanism: str) -> None:
    with (
        ScriptedSmtp(extensions=(f"AUTH {mechanism}",), credentials=("user", "pass")) as server,
        pytest.raises(LoginRefused) as caught,
    ):
        Dialler(config_for(server, username="user", password="wrong-password")).dial()
    assert (caught.value.outcome.reply_code, caught.value.outcome.state) == (535, State.DEFERRED)
    assert "wrong-password" not in f"{caught.value} {caught.value.outcome}"
    assert "wrong-password" not in repr(config_for(server, password="wrong-password"))


def test_a_temporary_failure_of_auth_does_not_blame_the_credentials() -> None:
    script = {"auth": say("454 4.7.0 Temporary authentication failure")}
    with ScriptedSmtp(script, credentials=("user", "pass")) as server, pytest.raises(NotConnected) as caught:
        Dialler(config_for(server, username="user", password="pass")).dial()
    assert caught.value.outcome.reply_code == 454


@pytest.mark.parametrize("phase", ["banner", "ehlo", "auth"])
@pytest.mark.parametrize(
    ("action", "reply_code"),
    [
        (stall(), None),
        (drop(), None),
        (garbage(), None),
        (say_and_drop("421 4.3.2 too many"), 421),
        (say("554 5.3.2 no service"), 554),
        (say("450 4.3.2 later"), 450),
        (say("354 what"), 354),
    ],
)
def test_every_failure_while_opening_defers_and_names_its_phase(
    phase: str, action: Action, reply_code: int | None
) -> None:
    with ScriptedSmtp({phase: action}, credentials=("user", "pass")) as server:
        started_at = time.monotonic()
        with pytest.raises(OpeningFailed) as caught:
            Dialler(
                config_for(
                    server, banner_seconds=0.15, ehlo_seconds=0.15, auth_seconds=0.15, username="user", password="pass"
                )
            ).dial()
        assert time.monotonic() - started_at < 1.0
    outcome, trouble = caught.value.outcome, caught.value.trouble
    assert (outcome.state, outcome.reply_code, outcome.phase) == (State.DEFERRED, reply_code, phase)
    assert (trouble.radius, trouble.probe) == (Radius.SMARTHOST, Probe.NOOP)


def test_a_banner_with_more_behind_it_is_refused() -> None:
    with (
        ScriptedSmtp({"banner": say("220 hello\n250 injected")}) as server,
        pytest.raises(NotConnected, match="a reply to no command"),
    ):
        Dialler(config_for(server)).dial()


def test_a_refused_connect_names_the_address() -> None:
    with ScriptedSmtp() as server:
        config = config_for(server)
    with pytest.raises(NotConnected, match=r"127\.0\.0\.1: .*refused") as caught:
        Dialler(config).dial()
    assert caught.value.outcome.phase is Phase.CONNECT


def test_all_addresses_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedSmtp() as server:
        dead = (2, 1, 6, "", ("127.0.0.2", server.port))
        alive = (2, 1, 6, "", ("127.0.0.1", server.port))
        # The resolver is the one thing here that cannot be had on loopback.
        monkeypatch.setattr("relay.delivery.dialling.socket.getaddrinfo", lambda *_args, **_kwargs: [dead, alive])
        assert dial_and_send(config_for(server)) is State.RELAYED


def test_a_name_that_cannot_be_resolved() -> None:
    with pytest.raises(NotConnected, match="cannot be resolved"):
        Dialler(SmarthostConfig((Host("x" * 70 + ".invalid", 25),), tls="off")).dial()


def test_an_unusable_ca_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="certificate file"):
        Dialler(SmarthostConfig((Host("localhost", 25),), ca_file=str(tmp_path / "missing.pem")))
