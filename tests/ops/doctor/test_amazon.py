"""What SES says of the account, the sender and the configuration set; what its silence means.

The server is a stand-in that speaks as Amazon's reference says; moto's, which knows identities and configuration sets,
is asked too. The queue of events is ``tests/ops/test_preflight.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.ops.doctor.amazon import ses
from relay.ops.doctor.finding import Finding
from relay.settings import load_settings
from tests.conftest import require
from tests.support.moto_server import IS_THERE, MotoServer, aws_environment
from tests.support.nats_server import free_port
from tests.support.sesv2 import HEALTHY, TO_SNS, SesV2

Ask = Callable[..., dict[str, Finding]]


@pytest.fixture
def amazon() -> Iterator[SesV2]:
    """An account in good health."""
    double = SesV2()
    yield double
    double.stop()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """What is found of SES at a URL, by what it is about."""

    def run(url: str, **changed: str) -> dict[str, Finding]:
        settings = {
            "EMAIL_ENABLED": "true",
            "SMTP_HOST": "email-smtp.us-east-1.amazonaws.com",
            "DEFAULT_SMTP_FROM": "noreply@mail.example.com",
            "SES_CONFIGURATION_SET": "relay",
        }
        for name, value in (aws_environment(url) | settings | changed).items():
            monkeypatch.setenv(name, value)
        return {finding.what: finding for finding in ses(load_settings())}

    return run


def test_an_account_in_good_health(ask: Ask, amazon: SesV2) -> None:
    found = ask(amazon.url)
    assert list(found) == ["clock", "SES quota", "SES sender", "SES events"]
    assert all(finding.ok for finding in found.values()), found
    assert {method for method, _ in amazon.asked} == {"GET"}, "nothing is changed"


@pytest.mark.parametrize(
    ("told", "what", "level", "said"),
    [
        ({"ProductionAccessEnabled": False}, "SES", "warning", "in SES's sandbox"),
        ({"SendingEnabled": False}, "SES", "failed", "sending is switched off for the account"),
        ({"EnforcementStatus": "PROBATION"}, "SES", "warning", "under probation"),
        ({"EnforcementStatus": "SHUTDOWN"}, "SES", "failed", "has stopped the account's sending"),
        (
            {"SendQuota": {"Max24HourSend": 200.0, "MaxSendRate": 14.0, "SentLast24Hours": 170.0}},
            "SES quota",
            "warning",
            "170 of 200 recipients of 24 hours are used",
        ),
        (
            {"SendQuota": {"Max24HourSend": 200.0, "MaxSendRate": 14.0, "SentLast24Hours": 200.0}},
            "SES quota",
            "failed",
            "200 of 200",
        ),
        (
            {"SendQuota": {"Max24HourSend": 200.0, "MaxSendRate": 5.0, "SentLast24Hours": 0.0}},
            "SES rate",
            "warning",
            "SES takes 5 recipients a second, SMTP_MAX_RECIPIENTS_PER_SECOND is 10",
        ),
    ],
)
def test_an_account_that_is_not(
    ask: Ask, amazon: SesV2, told: dict[str, Any], what: str, level: str, said: str
) -> None:
    amazon.answers["account"] = HEALTHY | told
    finding = ask(amazon.url, SMTP_MAX_RECIPIENTS_PER_SECOND="10")[what]
    assert finding.level == level
    assert said in finding.detail
    assert finding.remedy


def test_a_quota_without_a_limit(ask: Ask, amazon: SesV2) -> None:
    quota = {"Max24HourSend": -1.0, "MaxSendRate": 1000.0, "SentLast24Hours": 5e6}
    amazon.answers["account"] = HEALTHY | {"SendQuota": quota}
    assert ask(amazon.url)["SES quota"].ok


def test_a_sender_that_is_not_verified(ask: Ask, amazon: SesV2) -> None:
    amazon.answers["identities/example.com"] = {"VerifiedForSendingStatus": False}
    finding = ask(amazon.url)["SES sender"]
    assert finding.level == "failed"
    assert "neither noreply@mail.example.com nor its domain is verified" in finding.detail


@pytest.mark.parametrize("identity", ["noreply@mail.example.com", "mail.example.com"])
def test_any_identity_of_the_sender_will_do(ask: Ask, amazon: SesV2, identity: str) -> None:
    del amazon.answers["identities/example.com"]
    amazon.answers[f"identities/{identity}"] = {"VerifiedForSendingStatus": True}
    assert ask(amazon.url)["SES sender"].ok


@pytest.mark.parametrize(
    ("path", "answer", "level", "said"),
    [
        ("configuration-sets/relay", (404, "NotFoundException"), "failed", "there is no configuration set relay"),
        ("configuration-sets/relay/event-destinations", {"EventDestinations": []}, "warning", "to no SNS topic"),
        (
            "configuration-sets/relay/event-destinations",
            {"EventDestinations": [TO_SNS | {"Enabled": False}]},
            "warning",
            "its destination to-sns is disabled",
        ),
        (
            "configuration-sets/relay/event-destinations",
            {"EventDestinations": [TO_SNS | {"MatchingEventTypes": ["SEND", "DELIVERY"]}]},
            "warning",
            "does not publish bounce, complaint",
        ),
    ],
)
def test_configuration_sets(ask: Ask, amazon: SesV2, path: str, answer: Any, level: str, said: str) -> None:
    amazon.answers[path] = answer
    finding = ask(amazon.url)["SES events"]
    assert finding.level == level
    assert said in finding.detail


def test_a_configuration_set_that_may_not_send(monkeypatch: pytest.MonkeyPatch, ask: Ask, amazon: SesV2) -> None:
    amazon.answers["configuration-sets/relay"] = {"SendingOptions": {"SendingEnabled": False}}
    ask(amazon.url)  # sets the environment
    found = [finding for finding in ses(load_settings()) if finding.level == "failed"]
    assert [finding.detail for finding in found] == ["sending is switched off in the configuration set relay"]


# -- no answer is no fault ---------------------------------------------------------------------------------------
def test_no_credentials(ask: Ask, amazon: SesV2) -> None:
    found = ask(amazon.url, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert [each.level for each in found.values()] == ["ok"]
    assert "there are no AWS credentials here; a new account is in SES's sandbox" in found["SES"].detail
    assert amazon.asked == []


def test_no_permission(ask: Ask, amazon: SesV2) -> None:
    amazon.answers = dict.fromkeys(amazon.answers, (403, "AccessDeniedException"))
    amazon.answers["identities/noreply@mail.example.com"] = (403, "AccessDeniedException")
    found = ask(amazon.url)
    assert {each.level for each in found.values()} == {"ok"}
    assert "may not ses:GetAccount; the AWS credentials may not ses:GetEmailIdentity" in found["SES"].detail


def test_refused_credentials(ask: Ask, amazon: SesV2) -> None:
    amazon.answers["account"] = (403, "UnrecognizedClientException")
    finding = ask(amazon.url)["SES"]
    assert finding.level == "warning"
    assert "Amazon refuses the AWS credentials (UnrecognizedClientException" in finding.detail


def test_nobody_there(ask: Ask) -> None:
    finding = ask(f"http://127.0.0.1:{free_port()}")["SES"]
    assert finding.level == "warning"
    assert "Could not connect" in finding.detail


@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (30, "warning"), (-30, "warning"), (400, "failed")])
def test_a_clock_that_differs_from_amazons(ask: Ask, amazon: SesV2, ahead: float, level: str) -> None:
    amazon.clock_ahead_seconds = ahead
    finding = ask(amazon.url)["clock"]
    assert finding.level == level
    assert ("NTP" in finding.remedy) == (level != "ok")


def test_other_smarthosts_have_nothing_to_do_with_ses(ask: Ask, amazon: SesV2) -> None:
    assert ask(amazon.url, SMTP_HOST="smtp.example.com") == {}
    assert amazon.asked == []


def test_against_moto(ask: Ask, tmp_path: Path) -> None:
    require(IS_THERE, "moto")
    server = MotoServer(tmp_path)
    try:
        client = server.client("sesv2")
        client.create_email_identity(EmailIdentity="example.com")
        client.create_configuration_set(ConfigurationSetName="relay")
        # moto has neither account nor destinations: what cannot be asked is no fault
        found = ask(server.url)
        assert {what: finding.level for what, finding in found.items()} == {
            "SES": "warning",
            "clock": "ok",
            "SES sender": "failed",
        }
        found = ask(server.url, SES_CONFIGURATION_SET="missing")
        assert "there is no configuration set missing" in found["SES events"].detail
    finally:
        server.stop()
