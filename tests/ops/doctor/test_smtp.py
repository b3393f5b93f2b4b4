"""The smarthost's faults, each set up at a real SMTP server, each with its remedy."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gevent import ssl

from relay.delivery.config import Host
from relay.delivery.dialling import Dialler, OpeningFailed
from relay.ops.doctor.finding import Finding
from relay.ops.doctor.smtp import explain, region_of, smarthost
from relay.ops.parts import smarthost_config
from relay.settings import Settings, load_settings
from tests.support.nats_server import free_port
from tests.support.scripted_smtp import ScriptedSmtp, drop, garbage, make_certificate, say, stall

Ask = Callable[..., list[Finding]]
DAY = datetime.timedelta(days=1)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Examines the smarthost with some settings changed."""

    def run(*, is_thorough: bool = True, **changed: object) -> list[Finding]:
        return list(smarthost(made(monkeypatch, **changed), is_thorough=is_thorough))

    return run


def made(monkeypatch: pytest.MonkeyPatch, **changed: object) -> Settings:
    """Settings of a relay that sends through 127.0.0.1."""
    defaults = {"SMTP_HOST": "127.0.0.1", "EMAIL_ENABLED": "true", "SMTP_HELO_NAME": "relay.example.org"}
    for name, value in (defaults | changed).items():
        monkeypatch.setenv(name, str(value))
    return load_settings()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For localhost and 127.0.0.1."""
    return make_certificate(tmp_path_factory.mktemp("localhost"))


@pytest.fixture(scope="module")
def other_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For another name."""
    return make_certificate(tmp_path_factory.mktemp("other"), "mail.example.com")


def dated_certificate(directory: Path, begins: datetime.timedelta, ends: datetime.timedelta) -> tuple[Path, Path]:
    """For localhost, valid between two moments from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, private = directory / "dated.pem", directory / "dated.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, private


def one(findings: list[Finding]) -> Finding:
    """The only one."""
    (finding,) = findings
    return finding


def test_all_is_well(ask: Ask, certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="starttls", certificate=certificate) as smtp:
        (finding, *more) = ask(SMTP_PORT=smtp.port, SMTP_CA_FILE=certificate[0], SMTP_TLS="starttls")
        assert finding.ok
        # The certificate of these tests ends in two days
        assert "ends in 2 days" in one(more).detail
        assert smtp.mails == []
        assert [each for each in smtp.commands if each.startswith("MAIL")] == [
            "MAIL FROM:<noreply@lfx.linuxfoundation.org>"
        ]


def test_nothing_is_asked_when_no_mail_is_sent(ask: Ask) -> None:
    assert one(ask(EMAIL_ENABLED="false")).level == "warning"


# -- TLS ---------------------------------------------------------------------------------------------------------
def test_starttls_is_not_offered_although_it_is_required(ask: Ask) -> None:
    with ScriptedSmtp() as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_TLS="starttls"))
    assert "does not offer STARTTLS, and SMTP_TLS=starttls asks for it" in finding.detail
    assert "SMTP_PORT=465" in finding.remedy


def test_tls_from_the_start_against_a_port_for_starttls(ask: Ask) -> None:
    with ScriptedSmtp() as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_TLS="implicit"))
    assert "begins in clear ('220 server.example.org ESMTP')" in finding.detail
    assert finding.remedy.startswith("set SMTP_TLS=starttls for this port")


def test_starttls_against_a_port_for_implicit_tls(ask: Ask, certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="implicit", certificate=certificate) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_TLS="starttls", SMTP_BANNER_TIMEOUT_SECONDS="0.5"))
    assert "speaks TLS from the first byte on" in finding.detail
    assert finding.remedy.startswith("set SMTP_TLS=implicit")


def test_a_certificate_that_is_not_trusted(ask: Ask, certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="starttls", certificate=certificate) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_TLS="starttls"))
    assert "is not trusted here (self-signed certificate)" in finding.detail
    assert "SMTP_CA_FILE" in finding.remedy


def test_a_certificate_for_another_name(ask: Ask, other_certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="starttls", certificate=other_certificate) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_CA_FILE=other_certificate[0], SMTP_TLS="starttls"))
    assert "is for another name" in finding.detail
    assert "set SMTP_HOST to the name" in finding.remedy


@pytest.mark.parametrize(
    ("begins", "ends", "detail", "remedy"),
    [
        (-10 * DAY, -DAY, "has expired", "have it renewed; if this host's clock is wrong"),
        (DAY, 10 * DAY, "is not valid yet", "set this host's clock"),
    ],
)
def test_a_certificate_out_of_its_time(
    ask: Ask, tmp_path: Path, begins: datetime.timedelta, ends: datetime.timedelta, detail: str, remedy: str
) -> None:
    certificate = dated_certificate(tmp_path, begins, ends)
    with ScriptedSmtp(tls="starttls", certificate=certificate) as smtp:
        finding = one(ask(SMTP_HOST="localhost", SMTP_PORT=smtp.port, SMTP_CA_FILE=certificate[0], SMTP_TLS="starttls"))
    assert detail in finding.detail
    assert remedy in finding.remedy


def test_a_certificate_with_much_time_left(ask: Ask, tmp_path: Path) -> None:
    certificate = dated_certificate(tmp_path, -DAY, 60 * DAY)
    with ScriptedSmtp(tls="implicit", certificate=certificate) as smtp:
        found = ask(SMTP_HOST="localhost", SMTP_PORT=smtp.port, SMTP_CA_FILE=certificate[0], SMTP_TLS="implicit")
    # 127.0.0.1 alone may be what localhost is here, or ::1 as well, where nothing listens
    assert all(finding.ok or "some addresses" in finding.detail for finding in found)


def test_tls_that_is_too_old(ask: Ask, certificate: tuple[Path, Path]) -> None:
    with ScriptedSmtp(tls="implicit", certificate=certificate) as smtp:
        old: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        old.load_cert_chain(*map(str, certificate))
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        smtp.ssl_context = old
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_CA_FILE=certificate[0], SMTP_TLS="implicit"))
    assert "has no TLS 1.2 or newer" in finding.detail


def test_what_is_no_smtp(ask: Ask) -> None:
    with ScriptedSmtp({"banner": garbage(b"SSH-2.0-OpenSSH_9.6\r\n")}) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port))
    assert "speaks, but no SMTP: 'SSH-2.0-OpenSSH_9.6'" in finding.detail


@pytest.mark.parametrize("action", [drop(), stall()], ids=["hangs up", "stalls"])
def test_no_greeting(ask: Ask, action: Any) -> None:
    with ScriptedSmtp({"banner": action}) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_BANNER_TIMEOUT_SECONDS="0.5"))
    assert "banner" in finding.detail
    assert "a server that greets late" in finding.remedy


# -- login -------------------------------------------------------------------------------------------------------
def test_a_wrong_password(ask: Ask) -> None:
    with ScriptedSmtp(credentials=("relay", "right")) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_USERNAME="relay", SMTP_PASSWORD="hunter2"))
    assert "535 Authentication Credentials Invalid" in finding.detail
    assert "check SMTP_USERNAME and SMTP_PASSWORD" in finding.remedy
    assert "hunter2" not in str(finding)


def test_the_login_is_offered_under_tls_alone(ask: Ask) -> None:
    with ScriptedSmtp() as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_USERNAME="relay", SMTP_PASSWORD="hunter2", SMTP_TLS="off"))
    assert "neither AUTH PLAIN nor LOGIN is offered" in finding.detail
    assert "set SMTP_TLS=starttls" in finding.remedy


def test_tls_is_wanted_before_the_login(ask: Ask) -> None:
    script = {"auth": say("530 5.7.0 Must issue a STARTTLS command first")}
    with ScriptedSmtp(script, credentials=("relay", "right")) as smtp:
        finding = one(ask(SMTP_PORT=smtp.port, SMTP_USERNAME="relay", SMTP_PASSWORD="right"))
    assert finding.remedy == "the server wants TLS before a login: set SMTP_TLS=starttls"


def test_a_login_is_wanted_and_none_is_set(ask: Ask) -> None:
    with ScriptedSmtp({"mail": say("530 5.7.1 Authentication required")}) as smtp:
        well, finding = ask(SMTP_PORT=smtp.port)
    assert well.ok
    assert finding.level == "failed"
    assert "set SMTP_USERNAME and SMTP_PASSWORD" in finding.remedy


def test_the_sender_is_refused(ask: Ask) -> None:
    with ScriptedSmtp({"mail": say("553 5.7.1 sender address rejected")}) as smtp:
        _, finding = ask(SMTP_PORT=smtp.port, DEFAULT_SMTP_FROM="me@example.com")
    assert "refuses MAIL from me@example.com with 553" in finding.detail
    assert "DEFAULT_SMTP_FROM" in finding.remedy


AMAZON = Host("email-smtp.eu-west-1.amazonaws.com", 587)


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        ("535 Authentication Credentials Invalid", "make some in the SES console of eu-west-1"),
        ("535 Account not subscribed to SES", "the AWS account does not use SES in eu-west-1 yet"),
        ("454 4.7.0 Temporary authentication failure", "the server cannot check passwords just now"),
    ],
)
def test_amazon_refuses_the_login(monkeypatch: pytest.MonkeyPatch, reply: str, remedy: str) -> None:
    """The server is ours, and says what Amazon says; the words are chosen by Amazon's name."""
    with ScriptedSmtp({"auth": say(reply)}, credentials=("AKIA", "secret")) as smtp:
        settings = made(monkeypatch, SMTP_PORT=smtp.port, SMTP_USERNAME="AKIA", SMTP_PASSWORD="secret")
        config = smarthost_config(settings)
        with pytest.raises(OpeningFailed) as caught:
            Dialler(config).probe()
    advice = explain(caught.value, config, AMAZON)
    assert reply[:3] in advice.detail
    assert remedy in advice.remedy


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("email-smtp.us-east-1.amazonaws.com", "us-east-1"),
        ("email-smtp-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("EMAIL-SMTP.EU-WEST-1.AMAZONAWS.COM", "eu-west-1"),
        ("email-smtp.us-east-1.amazonaws.com.example.org", ""),
        ("smtp.example.com", ""),
    ],
)
def test_amazons_regions(host: str, region: str) -> None:
    assert region_of(host) == region


# -- several -----------------------------------------------------------------------------------------------------
def test_of_several_hosts_one_is_enough(ask: Ask) -> None:
    gone = free_port()
    with ScriptedSmtp() as smtp:
        found = ask(SMTP_HOST=f"127.0.0.1:{gone},127.0.0.1:{smtp.port}")
    assert {each.what: each.level for each in found} == {
        f"SMTP 127.0.0.1:{gone}": "warning",
        f"SMTP 127.0.0.1:{smtp.port}": "ok",
    }


def test_a_file_of_authorities_that_went_away(
    monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "ca.pem"
    copy.write_bytes(certificate[0].read_bytes())
    settings = made(monkeypatch, SMTP_CA_FILE=copy)
    copy.unlink()
    finding = one(list(smarthost(settings)))
    assert "cannot be used" in finding.detail
    assert "SMTP_CA_FILE" in finding.remedy
