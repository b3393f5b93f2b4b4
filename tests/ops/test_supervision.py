"""The configuration that supervisord gets. What the processes do is tested in ``tests/system``."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.ops.arrangement import SupervisionError, conf_file, is_worker, programs
from relay.ops.devstack import DevStack
from relay.ops.supervision import ProgramStatus, Supervision, cannot_work
from relay.settings import Settings, captured
from tests.support.nats_server import free_port


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with free ports and a directory with a space in its name."""
    values = {
        "RELAY_STATE_DIR": str(tmp_path / "state dir"),
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
    command = supervision.prepare(settings, DevStack(settings), captured({}), foreground=foreground)
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
            assert parser[section]["autorestart"] == "true"
        if section.startswith("program:s"):
            assert int(parser[section]["stopwaitsecs"]) > settings.drain_seconds


@pytest.mark.parametrize("name", ["100%s", "a;b", "a #b", 'a"b', "a\\b", "a\nb"])
def test_a_directory_that_no_configuration_can_name(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path / name))
    del settings
    with pytest.raises(SupervisionError, match="RELAY_STATE_DIR"):
        prepared(Settings())


def test_in_the_foreground_everything_goes_to_standard_output(settings: Settings) -> None:
    parser = prepared(settings, foreground=True)
    assert parser["supervisord"]["nodaemon"] == "true"
    assert parser["program:send-1"]["stdout_logfile"] == "/dev/fd/1"
    assert parser["program:send-1"]["stdout_logfile_maxbytes"] == "0"


def test_without_the_development_stack(settings: Settings) -> None:
    assert [program.name for program in programs(settings, None)] == ["send-1", "send-2", "send-3", "status"]


def test_the_engagement_worker_runs_when_events_are_wanted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    del settings
    monkeypatch.setenv("SES_EVENTING_ENABLED", "true")
    monkeypatch.setenv("SES_ENGAGEMENT_SQS_QUEUE_URL", "https://sqs.us-east-1.amazonaws.com/123456789012/events")
    assert programs(Settings(), None)[-1].name == "engagement"
    assert is_worker("engagement")


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


@pytest.mark.parametrize(("state", "is_hopeless"), [("EXITED", False), ("BACKOFF", False), ("FATAL", True)])
def test_who_has_exited_is_started_again(state: str, is_hopeless: bool) -> None:
    assert cannot_work(ProgramStatus("send-1", state, 0, 0, None, False)) == is_hopeless


@pytest.mark.parametrize(
    "text",
    [
        '{"programs": []}',
        '{"programs": {"send-1": "x"}}',
        '{"drain_seconds": "x"}',
        '{"port": "x"}',
        '{"arrangement": []}',
        '{"arrangement": {"programs": 1}}',
        '{"arrangement": {"programs": [1]}}',
        "[]",
        "{",
    ],
)
def test_what_is_kept_and_has_other_types_counts_as_unreadable(tmp_path: Path, text: str) -> None:
    (tmp_path / "started.json").write_text(text)
    assert Supervision(tmp_path).started() == {}


def test_a_pid_that_is_somebody_elses_by_now(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "send-1.json").write_text(json.dumps({"pid": os.getpid()}))
    (tmp_path / "supervisord.pid").write_text(str(os.getpid()))
    assert Supervision(tmp_path).processes() == {}


def test_there_is_nothing_to_stop(tmp_path: Path) -> None:
    with pytest.raises(SupervisionError, match="nothing to stop"):
        Supervision(tmp_path / "never").stop(1)


def test_what_goes_wrong_while_something_is_changed_is_not_put_down_to_the_directory(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), Supervision(tmp_path).changing("restart"):
        raise BrokenPipeError


CONFIGURATION = """
[unix_http_server]
file={dir}/supervisord.sock
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile={dir}/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:broken]
command=sh -c "exit {code}"
startretries={retries}
[program:fine]
command=sleep 60
"""


@pytest.mark.parametrize(("code", "retries", "expected"), [(78, 1000000, 78), (3, 0, 1)])
def test_the_foreground_ends_when_a_program_can_never_work(code: int, retries: int, expected: int) -> None:
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    try:
        if expected == 78:
            (directory / "run").mkdir()
            told = {
                "pid": 1,
                "stage": "waiting",
                "reason": "port taken",
                "has_given_up": True,
                "exit_code": 78,
                "lacking": {},
                "notes": {},
            }
            (directory / "run" / "broken.json").write_text(json.dumps(told))
        (directory / "conf").write_text(CONFIGURATION.format(dir=directory, code=code, retries=retries))
        program = (
            "import os, sys; from pathlib import Path; from relay.ops.foreground import stay;"
            "from relay.ops.supervision import Supervision;"
            f"command = [sys.executable, '-W', 'ignore', '-m', 'supervisor.supervisord', '-c', '{directory}/conf'];"
            f"sys.exit(stay(Supervision(Path('{directory}')), command, dict(os.environ)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert done.returncode == expected
    assert "broken can never work" in done.stdout
