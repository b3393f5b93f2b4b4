"""``relayctl doctor`` as an operator runs it: without a relay, with one, with one that half works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.support.moto_server import aws_environment
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, RelayProcess, clean_environment
from tests.support.sesv2 import SesV2
from tests.support.workers import SmtpThread

MOST_SECONDS = 25.0
"""It promises 20; the rest is for a machine that has other things to do."""


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """Short enough for a Unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def smtp() -> Iterator[SmtpThread]:
    """A smarthost that takes everything."""
    made = SmtpThread()
    yield made
    made.stop()


@pytest.fixture
def relay(state_dir: Path, new_nats_server: Callable[..., NatsServer], smtp: SmtpThread) -> Iterator[RelayProcess]:
    """A relay that runs; whatever a test leaves of it is ended."""
    made = RelayProcess(state_dir, new_nats_server().url, smtp.port, RELAY_SEND_WORKERS="1")
    made.start()
    yield made
    pids = [status.pid for status in made.supervision.statuses()] if made.supervision.is_running() else []
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    if pids or made.supervision.orphans():
        done = made.relayctl("stop")
        assert done.returncode == 0, done.stderr


def examined(relay: RelayProcess) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
    """Exit code, the whole JSON, and what is wrong."""
    done = relay.relayctl("doctor", "--json", timeout_seconds=MOST_SECONDS)
    told = json.loads(done.stdout)
    return done.returncode, told, [each for each in told["findings"] if each["level"] != "ok"]


def finding(found: list[dict[str, str]], what: str) -> dict[str, str]:
    """The only one about it."""
    (one,) = (each for each in found if each["what"] == what)
    return one


def test_a_relay_that_is_well(relay: RelayProcess, smtp: SmtpThread) -> None:
    code, told, found = examined(relay)
    assert (code, found) == (0, [])
    assert (told["failed"], told["warning"], told["ok"]) == (0, 0, len(told["findings"]))
    assert {each["about"] for each in told["findings"]} == {"Relay", "This host", "NATS", "Smarthost"}
    for each in told["findings"]:
        assert set(each) == {"about", "what", "level", "detail", "remedy"}
    assert smtp.mails == [], "no mail is sent"
    shown = relay.relayctl("doctor").stdout
    assert shown.endswith(f"All is well ({told['ok']} answers).\n")
    assert max(map(len, shown.splitlines())) <= 80
    assert shown == "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"
    assert relay.relayctl("doctor", "--quiet").stdout == f"All is well ({told['ok']} answers).\n"


def test_the_relays_own_settings_are_what_counts(relay: RelayProcess) -> None:
    """Not those of the shell, unless that is asked for."""
    relay.settings["SMTP_PORT"] = str(free_port())
    assert finding(relay_findings(relay, "doctor", "--json"), "SMTP")["level"] == "ok"
    assert finding(relay_findings(relay, "doctor", "--json", "--environment"), "SMTP")["level"] == "failed"


def test_a_shell_that_knows_the_state_directory_alone(
    state_dir: Path, new_nats_server: Callable[..., NatsServer], smtp: SmtpThread
) -> None:
    """It asks as the relay does, or with an operator's login, whatever the relay's own settings are."""
    users = 'users: [{ user: "w", password: "w" }, { user: "operator", password: "hunter2" }]'
    url = new_nats_server(config=f"authorization {{ {users} }}").url.replace("//", "//w:w@")
    inbox = {"RELAY_REPLY_PREFIXES": "_INBOX,answers", "NATS_INBOX_PREFIX": "answers.relay"}
    relay = RelayProcess(state_dir, url, smtp.port, RELAY_SEND_WORKERS="1", **inbox)
    own = dict(relay.settings)
    relay.start()
    try:
        for name in ("NATS_URL", *inbox):
            del relay.settings[name]
        for login in ({}, {"NATS_USER": "operator", "NATS_PASSWORD": "hunter2"}):
            relay.settings |= login
            for command in ("check", "doctor"):
                done = relay.relayctl(command)
                assert done.returncode == 0, f"{command} {login}: {done.stdout}{done.stderr}"
    finally:
        relay.settings = own
        assert relay.relayctl("stop").returncode == 0


def relay_findings(relay: RelayProcess, *command: str) -> list[dict[str, str]]:
    """All that is found."""
    found: list[dict[str, str]] = json.loads(relay.relayctl(*command).stdout)["findings"]
    return found


def test_a_worker_that_hangs(relay: RelayProcess) -> None:
    os.kill(relay.program("send-1").pid, signal.SIGSTOP)
    code, _, found = examined(relay)
    assert code == 1
    told = finding(found, "send-1")
    assert (told["about"], told["level"]) == ("Relay", "failed")
    assert "does not answer" in told["detail"]


def test_a_worker_that_was_killed(relay: RelayProcess) -> None:
    before = relay.program("send-1").pid
    os.kill(before, signal.SIGKILL)
    relay.wait_until_ready("send-1", other_pid_than=before, timeout_seconds=20)
    code, _, found = examined(relay)
    assert code == 0
    told = finding(found, "restarts")
    assert "send-1 ended once in the last hour without being asked to (terminated by SIGKILL)" in told["detail"]
    assert "memory ran out" in told["remedy"]


def test_a_smarthost_that_went_away(relay: RelayProcess, smtp: SmtpThread) -> None:
    smtp.stop()
    mail = ("send", "--to", "user@example.com", "--subject", "Lost", "--text", "It waits.")
    assert relay.relayctl(*mail).returncode == 1
    code, _, found = examined(relay)
    assert code == 1
    assert "callers are told `deferred`" in finding(found, "circuit")["detail"]
    assert "connection refused" in finding(found, "SMTP")["detail"]
    lines = [each["detail"] for each in found if each["what"] == "log"]
    assert any("in the last hour" in line for line in lines), lines


def test_programs_without_their_supervisord(relay: RelayProcess) -> None:
    os.kill(int((relay.state_dir / "supervisord.pid").read_text()), signal.SIGKILL)
    code, _, found = examined(relay)
    assert code == 1
    told = finding(found, "relay")
    assert "programs run without their supervisord" in told["detail"]
    assert "send-1 (pid " in told["detail"]


def test_no_relay_and_a_secret(state_dir: Path, nats_server: NatsServer, smtp: SmtpThread) -> None:
    url = nats_server.url.replace("//", "//relay:hunter2@")
    login = {"SMTP_USERNAME": "relay", "SMTP_PASSWORD": "hunter2"}
    done = RelayProcess(state_dir, url, smtp.port, **login).relayctl("doctor")
    assert done.returncode == 1, "the smarthost offers no login"
    assert "hunter2" not in done.stdout + done.stderr
    assert f"no relay runs in {state_dir}" in " ".join(done.stdout.split())
    assert done.stdout.endswith("1 problem, 1 warning.\n")


def test_bad_settings_exit_78(state_dir: Path) -> None:
    done = RelayProcess(state_dir, "http://no-nats", 25).relayctl("doctor")
    assert done.returncode == 78
    assert "NATS_URL" in done.stderr


@pytest.fixture
def hanging() -> Iterator[int]:
    """A port that takes connections, and nobody says a word there."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield int(server.getsockname()[1])


def test_everything_hangs(state_dir: Path, hanging: int) -> None:
    amazon = SesV2()
    amazon.hangs.clear()
    settings = {
        **aws_environment(amazon.url),
        "SMTP_HOST": f"127.0.0.1:{hanging},localhost:{hanging},email-smtp.us-east-1.amazonaws.com:1",
        "SES_EVENTING_ENABLED": "true",
        "SES_CONFIGURATION_SET": "relay",
        "SES_ENGAGEMENT_SQS_QUEUE_URL": f"http://127.0.0.1:{hanging}/1/events",
    }
    relay = RelayProcess(state_dir, f"nats://127.0.0.1:{hanging}", hanging, **settings)
    begun = time.monotonic()
    try:
        code, _, found = examined(relay)
    finally:
        amazon.stop()
    assert time.monotonic() - begun < MOST_SECONDS
    assert code == 1
    assert {each["about"] for each in found if each["level"] == "failed"} >= {"NATS", "Smarthost"}
    assert "Amazon" in {each["about"] for each in found}


@pytest.mark.parametrize("command", ["check", "doctor"])
def test_name_servers_that_do_not_answer(state_dir: Path, command: str) -> None:
    """A lookup cannot be broken off: the process does not wait for its end."""
    resolv_conf = state_dir / "resolv.conf"
    resolv_conf.write_text("nameserver 127.86.77.1\noptions timeout:15 attempts:3\n")
    settings = {"NATS_URL": "nats://nats.example.com", "SMTP_HOST": "smtp.example.com", "EMAIL_ENABLED": "true"}
    inside = f'mount --bind "{resolv_conf}" /etc/resolv.conf || exit 99; exec "$0" {command}'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        try:
            silent.bind(("127.86.77.1", 53))
        except PermissionError:
            pytest.skip("this user may not listen on port 53")
        begun = time.monotonic()
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", inside, str(RELAYCTL)],
            env=clean_environment(settings) | {"RELAY_STATE_DIR": str(state_dir)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("this user may not mount")
    assert time.monotonic() - begun < MOST_SECONDS
    assert done.returncode == 1, done.stderr
    for name in ("nats.example.com", "smtp.example.com"):
        assert f"the name servers do not answer for {name}" in " ".join(done.stdout.split())


def test_a_clock_that_is_wrong(state_dir: Path, nats_server: NatsServer, smtp: SmtpThread) -> None:
    require(shutil.which("faketime") is not None, "faketime")
    settings = RelayProcess(state_dir, nats_server.url, smtp.port).settings
    done = subprocess.run(
        ["faketime", "-f", "+1h", str(RELAYCTL), "doctor", "--json"],
        env=clean_environment(settings) | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    told = finding(json.loads(done.stdout)["findings"], "clock")
    assert told["level"] == "failed"
    assert "this host's clock is 60 min ahead of the NATS server's" in told["detail"]
