"""Settings: read from the environment, every problem named at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.cli.settings_text import env_example, markdown_table
from relay.errors import ConfigError
from relay.settings import Settings, child_environment, is_secret, load_settings, rows, unknown_names, without_login

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting is set but by the test."""
    for name, _, _, _ in rows():
        monkeypatch.delenv(name, raising=False)


def loaded(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    """The settings in this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert (settings.nats_url, settings.port, settings.email_enabled) == ("nats://localhost:4222", 8080, False)
    assert (settings.smtp_host, settings.smtp_port) == ("localhost", 587)
    assert settings.sender == "noreply@lfx.linuxfoundation.org"
    assert settings.default_smtp_from_display_name == "LFX Self Serve"
    assert settings.smtp_allowed_from_domains == ("lfx.linuxfoundation.org",)
    assert settings.smtp_allowed_reply_to_domains == ("linuxfoundation.org",)
    assert settings.smtp_allowed_recipient_domains == ()
    assert (settings.log_level, settings.log_add_source, settings.ses_configuration_set) == ("info", False, "")


@pytest.mark.parametrize("word", ["true", "t", "1", "TRUE", "T", " true "])
def test_words_for_true(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    assert loaded(monkeypatch, EMAIL_ENABLED=word).email_enabled is True


@pytest.mark.parametrize("word", ["false", "f", "0", "False", ""])
def test_words_for_false(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    assert loaded(monkeypatch, EMAIL_ENABLED=word).email_enabled is False


@pytest.mark.parametrize("word", ["yes", "no", "on", "2", "wahr", "truee"])
def test_anything_else_is_an_error(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    with pytest.raises(ConfigError, match="EMAIL_ENABLED: must be true, t, 1, false, f or 0"):
        loaded(monkeypatch, EMAIL_ENABLED=word)


def test_an_empty_variable_is_unset_but_an_empty_domain_list_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(
        monkeypatch,
        SMTP_PORT="",
        NATS_URL="",
        SMTP_TLS_VERIFY="",
        SMTP_ALLOWED_FROM_DOMAINS="",
        SMTP_ALLOWED_REPLY_TO_DOMAINS="",
    )
    assert settings.smtp_port == 587
    assert settings.nats_url == "nats://localhost:4222"
    assert settings.smtp_tls_verify, "an empty switch must not switch verification off"
    assert settings.smtp_allowed_from_domains == ()
    assert settings.smtp_allowed_reply_to_domains == ()


def test_options_have_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = load_settings()
    assert (defaults.smtp_max_recipients, defaults.smtp_max_message_bytes) == (50, 40_000_000)
    assert defaults.smtp_allowed_headers == ("list-*", "x-*", "auto-submitted", "precedence")
    assert (defaults.request_id_ttl_hours, defaults.object_store_buckets) == (24, ())
    assert defaults.nats_trust_request_info is False, "a header that anybody may write is not believed unasked"
    settings = loaded(monkeypatch, SMTP_ALLOWED_HEADERS="X-Campaign , List-*", OBJECT_STORE_BUCKETS="a, b_1")
    assert settings.smtp_allowed_headers == ("x-campaign", "list-*")
    assert settings.object_store_buckets == ("a", "b_1")
    settings = loaded(monkeypatch, SMTP_ALLOWED_HEADERS="", OBJECT_STORE_BUCKETS="")
    assert settings.smtp_allowed_headers == ()
    assert settings.object_store_buckets == ()


def test_domain_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(monkeypatch, SMTP_ALLOWED_FROM_DOMAINS=" Example.COM , ,bücher.example.org")
    assert settings.smtp_allowed_from_domains == ("example.com", "xn--bcher-kva.example.org")


def test_the_older_name_of_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch, SMTP_FROM="old@example.com").sender == "old@example.com"
    assert loaded(monkeypatch, DEFAULT_SMTP_FROM="new@example.com").sender == "new@example.com"
    assert loaded(monkeypatch, DEFAULT_SMTP_FROM="").sender == "old@example.com"


BAD = {
    "SMTP_PORT": "70000",
    "PORT": "http",
    "NATS_URL": "localhost:4222",
    "EMAIL_ENABLED": "ja",
    "SMTP_TLS": "maybe",
    "LOG_LEVEL": "loud",
    "RELAY_SEND_WORKERS": "0",
    "SEND_TIMEOUT_SECONDS": "-1",
    "SMTP_ALLOWED_FROM_DOMAINS": "example.com,not a domain",
    "SES_CONFIGURATION_SET": "a\r\nBcc: b@example.com",
    "SMTP_HELO_NAME": "a b",
    "SMTP_HOST": "smtp://example.com",
    "SMTP_PASSWORD_FILE": "/nonexistent/secret",
    "SMTP_MAX_RECIPIENTS_PER_SECOND": "-1",
    "TRACKING_STORAGE": "tape",
    "DEFAULT_SMTP_FROM": "nobody",
    "SMTP_CA_FILE": "/no/such/file.pem",
    "RELAY_REPLY_PREFIXES": "_INBOX,$KV",
    "SES_ENGAGEMENT_SQS_QUEUE_URL": "events",
    "AWS_REGION": "us east",
    "ENGAGEMENT_POLLERS": "0",
    "ENGAGEMENT_EARLY_SECONDS": "-1",
    "ENGAGEMENT_RECEIVE_FAILURES": "-1",
    "REQUEST_ID_TTL_HOURS": "0.5",
    "NATS_TRUST_REQUEST_INFO": "perhaps",
    "OBJECT_STORE_BUCKETS": "a.b",
    "SMTP_MAX_MESSAGE_BYTES": "0",
    "SMTP_MAX_RECIPIENTS": "101",
    "SMTP_ALLOWED_HEADERS": "X-SES-*",
}


def test_one_message_names_every_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as problem:
        loaded(monkeypatch, SMTP_PASSWORD="hunter2", **BAD)
    text = str(problem.value)
    assert text.startswith(f"{len(BAD)} settings are wrong")
    for name in BAD:
        assert f"  {name}: " in text
    assert "hunter2" not in text


@pytest.mark.parametrize("name", BAD)
def test_each_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ConfigError, match=f"1 setting is wrong\n  {name}: "):
        loaded(monkeypatch, **{name: BAD[name]})


@pytest.mark.parametrize("value", [",", "$KV", "_INBOX.*", ">", "lfx", "lfx.email-service", "a b", "a..b"])
def test_a_reply_prefix_that_would_open_more_than_inboxes(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ConfigError, match="RELAY_REPLY_PREFIXES"):
        loaded(monkeypatch, RELAY_REPLY_PREFIXES=value)


@pytest.mark.parametrize(
    ("value", "hosts"),
    [
        ("smtp.example.com", [("smtp.example.com", 587)]),
        ("a.example.com, b.example.com:2525", [("a.example.com", 587), ("b.example.com", 2525)]),
        (
            "[2001:db8::1]:25,2001:db8::2, [2001:db8::3]",
            [("2001:db8::1", 25), ("2001:db8::2", 587), ("2001:db8::3", 587)],
        ),
    ],
)
def test_several_smarthosts(monkeypatch: pytest.MonkeyPatch, value: str, hosts: list[tuple[str, int]]) -> None:
    assert list(loaded(monkeypatch, SMTP_HOST=value).smtp_hosts) == hosts


def test_smarthosts_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(monkeypatch, SMTP_HOST="a.example.com,2001:db8::2")
    assert settings.smarthost == "a.example.com:587, [2001:db8::2]:587"


@pytest.mark.parametrize(
    "value", [",", "a,", "a:0", "a:65536", "a:x", "a:", "a b", "user@a", "[::1", "[::1]25", "[::1]:", "http://a"]
)
def test_what_is_no_smarthost(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ConfigError, match="1 setting is wrong\n  SMTP_HOST: "):
        loaded(monkeypatch, SMTP_HOST=value)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_password_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str) -> None:
    file = tmp_path / "secret"
    file.write_bytes(f" hunter2 {end}".encode())
    settings = loaded(monkeypatch, SMTP_PASSWORD_FILE=str(file))
    assert settings.smtp_secret == " hunter2 "
    assert "hunter2" not in repr(settings)
    file.unlink()
    with pytest.raises(ConfigError, match="SMTP_PASSWORD_FILE cannot be read"):
        _ = settings.smtp_secret


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b"\xff"])
def test_what_is_no_password_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="SMTP_PASSWORD_FILE: "):
        loaded(monkeypatch, SMTP_PASSWORD_FILE=str(file))


def test_a_password_in_place_of_its_file_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="what begins with 'hun' cannot be read") as problem:
        loaded(monkeypatch, SMTP_PASSWORD_FILE="hunter2hunter2")
    assert "ter2" not in str(problem.value)


def test_two_passwords_are_one_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2")
    with pytest.raises(ConfigError, match="both SMTP_PASSWORD and SMTP_PASSWORD_FILE are set") as error:
        loaded(monkeypatch, SMTP_PASSWORD="hunter3", SMTP_PASSWORD_FILE=str(file))
    assert "hunter" not in str(error.value)


def test_events_need_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SES_ENGAGEMENT_SQS_QUEUE_URL is not set; set it"):
        loaded(monkeypatch, SES_EVENTING_ENABLED="true")
    url = "https://sqs.us-east-1.amazonaws.com/123456789012/events"
    assert loaded(monkeypatch, SES_EVENTING_ENABLED="true", SES_ENGAGEMENT_SQS_QUEUE_URL=url).ses_eventing_enabled


@pytest.mark.parametrize("url", ["events", "https://", "https://sqs.us-east-1.amazonaws.com/", "sqs://host/queue"])
def test_what_is_no_queue(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(
        ConfigError, match="1 setting is wrong\n  SES_ENGAGEMENT_SQS_QUEUE_URL: must be the queue's URL"
    ):
        loaded(monkeypatch, SES_ENGAGEMENT_SQS_QUEUE_URL=url)


def test_a_reply_prefix_may_end_in_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch, RELAY_REPLY_PREFIXES="_INBOX., my.inbox").relay_reply_prefixes == ("_INBOX", "my.inbox")


def test_what_an_orchestrator_injects_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        loaded(monkeypatch, SMTP_PORT="tcp://10.0.0.1:25")


@pytest.mark.parametrize("url", ["nat://relay:hunter2@nats.example.com", "nats://relay:h/unter2@nats.example.com:4222"])
def test_a_url_with_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(ConfigError) as problem:
        loaded(monkeypatch, NATS_URL=url)
    assert "unter2" not in str(problem.value)


def test_unknown_names_are_found() -> None:
    environ = {
        "SMTP_PROT": "25",
        "RELAY_PORT": "tcp://x",
        "SMTP_PORT": "25",
        "HOME": "/root",
        "SES_EVENTING_ENABELD": "1",
        "AWS_PROFILE": "x",
    }
    assert unknown_names(environ) == ["RELAY_PORT", "SES_EVENTING_ENABELD", "SMTP_PROT"]


def test_names_that_the_shipped_files_take_from_the_environment_are_known() -> None:
    texts = [path.read_text() for path in (ROOT / "conf").rglob("*") if path.is_file()]
    taken = {name for text in texts for name in re.findall(r"(?<!\$)\$\{?([A-Z][A-Z_]+)", text)}
    made = {name for text in texts for name in re.findall(r"^([A-Z][A-Z_]+) *:", text, re.MULTILINE)}
    assert "RELAY_NATS_PASSWORD" in taken - made
    assert unknown_names(dict.fromkeys(taken - made, "x")) == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        (
            "NATS_URL",
            "nats://a:x@h1.example.com,tls://b:y@h2.example.com",
            "nats://h1.example.com,tls://h2.example.com",
        ),
        (
            "NATS_URL",
            "nats://h1.example.com:4222, nats://b:@y@h2.example.com",
            "nats://h1.example.com:4222, nats://h2.example.com",
        ),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:a,b/c@collector.example.com", "http://collector.example.com"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "me:secret@collector.example.com", "collector.example.com"),
        ("DEFAULT_SMTP_FROM", "noreply@example.com", "noreply@example.com"),
    ],
)
def test_urls_are_shown_without_user_and_password(name: str, value: str, shown: str) -> None:
    assert without_login(name, value) == shown


def test_of_what_is_wrong_less_is_shown() -> None:
    assert [is_secret(name) for name in ("SMTP_PASSWORD", "AWS_PROFILE", "NATS_CREDS")] == [True, True, False]
    assert is_secret("NATS_CREDS", is_wrong=True)
    assert not is_secret("SMTP_PORT", is_wrong=True)


def test_defaults_stand_in_for_what_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PORT", "2525")
    settings = load_settings({"SMTP_PORT": "1025", "NATS_URL": "nats://127.0.0.1:4333", "EMAIL_ENABLED": "true"})
    assert (settings.smtp_port, settings.nats_url, settings.email_enabled) == (2525, "nats://127.0.0.1:4333", True)
    environment = child_environment({"SMTP_PORT": "1025", "NATS_URL": "nats://127.0.0.1:4333"}, RELAY_STATE_DIR="/x")
    assert environment["SMTP_PORT"] == "2525"
    assert environment["NATS_URL"] == "nats://127.0.0.1:4333"
    assert environment["RELAY_STATE_DIR"] == "/x"


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(monkeypatch, SMTP_PASSWORD="hunter2")
    assert "hunter2" not in repr(settings)
    assert settings.smtp_password.get_secret_value() == "hunter2"


def test_every_row_has_a_meaning() -> None:
    for name, field, _, _ in rows():
        assert field.description, name


def test_the_readme_has_this_table() -> None:
    assert markdown_table() in (ROOT / "README.md").read_text(), (
        "put the output of `python -c 'from relay.cli.settings_text import *; print(markdown_table())'` into README.md"
    )


def test_the_example_file_is_this_one() -> None:
    assert (ROOT / "conf" / "relay.env.example").read_text() == env_example()
