"""What other settings would change, and what of it may be shown."""

from __future__ import annotations

import os

import pytest

from relay.errors import ConfigError
from relay.ops.changes import changes, concern_a_worker, missing
from relay.settings import adopt, captured, load_settings


def shown(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [str(change) for change in changes(before, after)]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"SMTP_PORT": "25"}, {"SMTP_PORT": "587"}, ["SMTP_PORT: 25 → 587"]),
        ({}, {"SMTP_PORT": "587"}, ["SMTP_PORT: not set → 587"]),
        ({"SMTP_PORT": "25"}, {}, ["SMTP_PORT: 25 → not set"]),
        ({"SMTP_PORT": ""}, {}, []),
        ({}, {"SMTP_ALLOWED_HEADERS": ""}, ['SMTP_ALLOWED_HEADERS: not set → ""']),
        ({"SMTP_PASSWORD": "hunter2"}, {"SMTP_PASSWORD": "hunter3"}, ["SMTP_PASSWORD (a secret) changes"]),
        ({"AWS_SECRET_ACCESS_KEY": "a"}, {}, ["AWS_SECRET_ACCESS_KEY (a secret) changes"]),
        ({}, {"NATS_URL": "nats://ann:hunter2@a.example.com"}, ["NATS_URL: not set → nats://a.example.com"]),
        ({}, {"SMTP_HOST": "a" * 70}, [f"SMTP_HOST: not set → {'a' * 60}…"]),
    ],
)
def test_what_changes(before: dict[str, str], after: dict[str, str], told: list[str]) -> None:
    assert shown(before, after) == told
    assert concern_a_worker(before, after) == bool(told)


def test_numbers_of_workers_concern_none_of_them() -> None:
    assert not concern_a_worker({"RELAY_SEND_WORKERS": "2"}, {"RELAY_SEND_WORKERS": "4", "RELAY_STATUS_WORKERS": "2"})


def test_what_is_not_mentioned_any_more_and_what_is_unset_on_purpose() -> None:
    before = {"SMTP_HOST": "a.example.com", "SMTP_USERNAME": "ann", "SMTP_HELO_NAME": ""}
    assert missing(before, {"SMTP_USERNAME": ""}) == ["SMTP_HOST"]


def test_what_is_no_text_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", os.fsdecode(b"m\xfcll"))
    with pytest.raises(ConfigError, match="AWS_PROFILE is not text in UTF-8"):
        captured({})


def test_an_environment_is_adopted_as_it_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("smtp_host", "a.example.com"),
        ("SMTP_USERNAME", ""),
        ("RELAY_STATE_DIR", "/somewhere"),
        ("AWS_PROFILE", "mail"),
        ("UNRELATED", "x"),
    ):
        monkeypatch.setenv(name, value)
    kept = captured({"SMTP_PORT": "1025", "SMTP_HOST": "127.0.0.1"}, LOG_FORMAT="text")
    assert kept["SMTP_HOST"] == "a.example.com"
    assert {
        "SMTP_PORT": "1025",
        "SMTP_USERNAME": "",
        "AWS_PROFILE": "mail",
        "LOG_FORMAT": "text",
    }.items() <= kept.items()
    assert not {"RELAY_STATE_DIR", "UNRELATED", "smtp_host"} & kept.keys()
    monkeypatch.setenv("SMTP_HOST", "b.example.com")
    monkeypatch.setenv("SMTP_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    before = captured({})
    try:
        adopt(kept)
        settings = load_settings()
        assert (settings.smtp_host, settings.smtp_port, settings.aws_region) == ("a.example.com", 1025, "")
        assert settings.smtp_password.get_secret_value() == ""
        assert str(settings.relay_state_dir) == "/somewhere"
    finally:
        adopt(before)
