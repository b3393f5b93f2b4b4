"""Settings of how to log in at NATS: each contradiction in one sentence, and no secret in any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relay.cli.settings_text import MASK, effective
from relay.errors import ConfigError
from relay.ops.parts import bus_config
from relay.settings import load_settings, rows
from tests.support.identities import Authority, Operator, new_key

USER = new_key()


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting is set but by the test."""
    for name, _, _, _ in rows():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files as they should be."""
    certificate = Authority(tmp_path).issue("relay")
    texts = {"creds": Operator().creds(USER), "seed": USER.seed, "line": "hush-hush\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    made = {name: str(tmp_path / name) for name in texts}
    return made | {"ca": str(tmp_path / "ca.pem"), "cert": str(certificate.cert), "key": str(certificate.key)}


Given = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Given:
    """What is said of these settings."""

    def load(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as raised:
            load_settings()
        return str(raised.value)

    return load


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"NATS_CREDS": "creds", "NATS_NKEY_SEED_FILE": "seed"}, "both NATS_CREDS and NATS_NKEY_SEED_FILE are set"),
        ({"NATS_CREDS": "creds", "NATS_USER": "=u"}, "both NATS_CREDS and NATS_USER are set"),
        ({"NATS_CREDS": "creds", "NATS_URL": "=nats://u:p@h:1"}, "both NATS_CREDS and a user in NATS_URL are set"),
        ({"NATS_USER": "=u", "NATS_TOKEN_FILE": "line"}, "both NATS_USER and NATS_TOKEN_FILE are set"),
        (
            {"NATS_USER": "=u", "NATS_PASSWORD": "=hush-hush", "NATS_PASSWORD_FILE": "line"},
            "both NATS_PASSWORD and NATS_PASSWORD_FILE are set; unset one of them",
        ),
        ({"NATS_USER": "=u"}, "NATS_USER is set without NATS_PASSWORD or NATS_PASSWORD_FILE"),
        ({"NATS_PASSWORD": "=hush-hush"}, "NATS_PASSWORD is set without NATS_USER"),
        ({"NATS_PASSWORD_FILE": "line"}, "NATS_PASSWORD_FILE is set without NATS_USER"),
        ({"NATS_CERT": "cert"}, "NATS_CERT is set without NATS_KEY"),
        ({"NATS_KEY": "key"}, "NATS_KEY is set without NATS_CERT"),
        ({"NATS_CERT": "cert", "NATS_KEY": "seed"}, "cannot be used"),
        ({"NATS_CA": "line"}, "NATS_CA: "),
        ({"NATS_CREDS": "seed"}, "as `nsc generate creds` writes them"),
        ({"NATS_CREDS": "=/nowhere/relay.creds"}, "/nowhere/relay.creds cannot be read: No such file or directory"),
        ({"NATS_NKEY_SEED_FILE": "line"}, "must hold the seed of one user's nkey"),
        ({"NATS_NKEY_SEED_FILE": f"={USER.seed}"}, "must be the path of a file"),
        ({"NATS_INBOX_PREFIX": "=_PRIVATE"}, "is under none of RELAY_REPLY_PREFIXES"),
        ({"NATS_INBOX_PREFIX": "=_INBOX.>"}, "NATS_INBOX_PREFIX: must be tokens"),
        ({"NATS_TLS_FIRST": "=yes"}, "NATS_TLS_FIRST: must be true"),
    ],
)
def test_what_does_not_go_together(files: dict[str, str], refusal: Given, given: dict[str, str], said: str) -> None:
    """``=`` stands before what is no file."""
    told = refusal(**{name: value[1:] if value[0] == "=" else files[value] for name, value in given.items()})
    assert said in told
    assert told.startswith("1 setting is wrong\n")
    assert "hush" not in told
    assert USER.seed[4:12] not in told


def test_what_goes_together(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "NATS_URL": "tls://nats.example.com:4222",
        "NATS_CREDS": files["creds"],
        "NATS_CA": files["ca"],
        "NATS_CERT": files["cert"],
        "NATS_KEY": files["key"],
        "NATS_TLS_FIRST": "true",
        "NATS_INBOX_PREFIX": "_INBOX.relay",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = bus_config(load_settings())
    assert config.requires_tls
    assert config.login == f"NATS_CREDS {files['creds']}"
    assert (config.ca_file, config.cert_file, config.key_file) == (files["ca"], files["cert"], files["key"])
    assert (config.tls_first, config.inbox_prefix) == (True, "_INBOX.relay")


def test_replies_elsewhere_need_no_inbox_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """All callers come over imports: that was allowed before there was a setting for inboxes."""
    monkeypatch.setenv("RELAY_REPLY_PREFIXES", "_R_")
    assert load_settings().nats_inbox_prefix == "_INBOX"


def test_the_password_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_USER", "relay")
    monkeypatch.setenv("NATS_PASSWORD", "hush-hush")
    settings = load_settings()
    shown = {name: value for name, value, _ in effective(settings)}
    assert (shown["NATS_USER"], shown["NATS_PASSWORD"]) == ("relay", MASK)
    assert "hush" not in f"{settings!r} {bus_config(settings)!r}"
    assert bus_config(settings).password == "hush-hush"


@pytest.mark.parametrize(
    ("url", "requires"),
    [
        ("nats://a.example.com:4222", False),
        ("nats://a.example.com:4222,tls://b.example.com:4222", True),
        ("TLS://b.example.com:4222", True),
    ],
)
def test_one_sign_of_tls_is_enough(monkeypatch: pytest.MonkeyPatch, url: str, requires: bool) -> None:
    monkeypatch.setenv("NATS_URL", url)
    assert bus_config(load_settings()).requires_tls is requires
