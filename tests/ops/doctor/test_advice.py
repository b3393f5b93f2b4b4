"""Settings that are legal and unwise."""

from __future__ import annotations

import pytest

from relay.ops.doctor.advice import known_names, settings_advice
from relay.settings import load_settings

REMOTE = {"SMTP_HOST": "smtp.example.com"}
LOGIN = {"SMTP_USERNAME": "relay", "SMTP_PASSWORD": "hunter2"}


@pytest.mark.parametrize(
    ("given", "level", "said"),
    [
        (REMOTE | LOGIN | {"SMTP_TLS": "off"}, "failed", "SMTP_TLS=off and a password for smtp.example.com"),
        (REMOTE | {"SMTP_TLS": "off"}, "warning", "reads every mail"),
        (REMOTE | {"SMTP_TLS_VERIFY": "false"}, "warning", "SMTP_TLS_VERIFY=false"),
        ({"SMTP_USERNAME": "relay"}, "warning", "SMTP_USERNAME is set and SMTP_PASSWORD is not"),
        ({"SMTP_PASSWORD": "hunter2"}, "warning", "SMTP_PASSWORD is set and SMTP_USERNAME is not"),
        ({"DEFAULT_SMTP_FROM": "me@example.com"}, "warning", "example.com of DEFAULT_SMTP_FROM is not in"),
        (
            {"SMTP_HOST": "email-smtp.us-east-1.amazonaws.com", "SMTP_POOL_SIZE": "101"},
            "warning",
            "may open 202 connections to Amazon SES",
        ),
        ({"DRAIN_SECONDS": "60"}, "warning", "DRAIN_SECONDS is 60"),
        ({"SMTP_DOT_TIMEOUT_SECONDS": "10"}, "warning", "SMTP_DOT_TIMEOUT_SECONDS (10) is less than"),
        ({"SES_CONFIGURATION_SET": "relay"}, "warning", "SES_EVENTING_ENABLED is false"),
    ],
)
def test_what_is_unwise(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], level: str, said: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (finding,) = settings_advice(load_settings())
    assert finding.level == level
    assert said in finding.detail
    assert finding.remedy
    assert "hunter2" not in str(finding)


@pytest.mark.parametrize(
    "given",
    [
        {},
        LOGIN | {"SMTP_TLS": "off", "SMTP_HOST": "127.0.0.1"},
        LOGIN | {"SMTP_TLS_VERIFY": "false", "SMTP_HOST": "localhost"},
        REMOTE | LOGIN,
        {"SMTP_POOL_SIZE": "500"},
        {"DEFAULT_SMTP_FROM": "me@example.com", "SMTP_ALLOWED_FROM_DOMAINS": "example.org, EXAMPLE.com"},
    ],
)
def test_what_is_not(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert list(settings_advice(load_settings())) == []


def test_a_misspelt_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PROT", "25")
    finding = known_names()
    assert (finding.level, finding.remedy) == ("warning", "check the spelling")
    assert "SMTP_PROT" in finding.detail
