"""The configuration that supervisord gets. What the processes do is tested in ``tests/system``."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.ops.devstack import DevStack
from relay.ops.supervision import Supervision, conf_file, programs
from relay.settings import Settings
from tests.support.nats_server import free_port


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with free ports and a directory whose name supervisord would expand."""
    values = {
        "RELAY_STATE_DIR": str(tmp_path / "100%s"),
        "PORT": str(free_port()),
        "NATS_URL": f"nats://127.0.0.1:{free_port()}",
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": str(free_port()),
        "RELAY_SEND_WORKERS": "3",
        "DRAIN_SECONDS": "25",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return Settings()


def prepared(settings: Settings, *, foreground: bool = False) -> configparser.RawConfigParser:
    """The configuration as supervisord will read it."""
    supervision = Supervision(settings.relay_state_dir)
    command = supervision.prepare(settings, DevStack(settings), foreground=foreground)
    parser = configparser.RawConfigParser()
    parser.read_string(Path(command[command.index("-c") + 1]).read_text())
    return parser


def test_one_section_for_each_program(settings: Settings) -> None:
    sections = [name for name in prepared(settings).sections() if name.startswith("program:")]
    assert sections == [f"program:{name}" for name in ("nats", "catcher", "send-1", "send-2", "send-3", "status")]


def test_supervisord_waits_longer_than_a_worker_drains(settings: Settings) -> None:
    parser = prepared(settings)
    for section in parser.sections():
        if section.startswith("program:"):
            assert int(parser[section]["stopwaitsecs"]) > settings.drain_seconds
            assert parser[section]["autorestart"] == "true"


def test_percent_signs_survive(settings: Settings) -> None:
    assert "100%%s" in prepared(settings)["program:status"]["stdout_logfile"]


def test_in_the_foreground_everything_goes_to_standard_output(settings: Settings) -> None:
    parser = prepared(settings, foreground=True)
    assert parser["supervisord"]["nodaemon"] == "true"
    assert parser["program:send-1"]["stdout_logfile"] == "/dev/fd/1"
    assert parser["program:send-1"]["stdout_logfile_maxbytes"] == "0"


def test_without_the_development_stack(settings: Settings) -> None:
    assert [program.name for program in programs(settings, None)] == ["send-1", "send-2", "send-3", "status"]


@pytest.mark.parametrize("name", ["NATS_URL", "SMTP_HOST"])
def test_the_development_stack_stays_on_loopback(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    del settings
    monkeypatch.setenv(name, "nats://nats.example.com" if name == "NATS_URL" else "smtp.example.com")
    with pytest.raises(ConfigError, match="leave out --dev"):
        DevStack(Settings())


def test_how_it_was_started_is_kept_from_others(settings: Settings) -> None:
    prepared(settings)
    path = settings.relay_state_dir / "started.json"
    assert path.stat().st_mode & 0o077 == 0


def test_the_template_is_found() -> None:
    assert conf_file("supervisord.conf").is_file()
