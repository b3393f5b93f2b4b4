"""relayctl against a running development stack: what a newcomer does after `relayctl start --dev`."""

from __future__ import annotations

import email
import email.policy
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, RelayProcess, clean_environment

SEND = ("send", "--to", "user@example.com", "--subject", "Grüße", "--text", "It works.", "--group", "newcomer")


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    """A development stack on free ports; a shell that knows only its state directory."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    made = RelayProcess(directory, f"nats://127.0.0.1:{free_port()}", free_port())
    try:
        made.start("--dev")
        del made.settings["NATS_URL"]
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def email_id(relay: RelayProcess) -> str:
    """A mail that was sent from the shell."""
    done = relay.relayctl(*SEND, "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["email_id"])


def shown(relay: RelayProcess, *arguments: str) -> str:
    """What a command that succeeds prints."""
    done = relay.relayctl(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_json(relay: RelayProcess, *arguments: str) -> Any:
    """What it prints with --json."""
    return json.loads(shown(relay, *arguments, "--json"))


def test_track(relay: RelayProcess, email_id: str) -> None:
    text = shown(relay, "track", email_id)
    assert "user@example.com" in text
    assert "relayed" in text
    assert shown_json(relay, "track", email_id)["subject"] == "Grüße"
    assert email_id in shown(relay, "track", "--group", "newcomer")
    missing = relay.relayctl("track", "nobody")
    assert (missing.returncode, missing.stderr) == (1, "relayctl: mail nobody: not found\n")
    assert relay.relayctl("track").returncode == 2


def test_send_with_options(relay: RelayProcess, tmp_path: Path) -> None:
    (tmp_path / "Grüße.txt").write_text("Hallo.")
    command = ["send", "--to", "ann@example.com", "--to", "bob@example.com", "--cc", "carol@example.com"]
    command += ["--bcc", "dan@example.com", "--subject", "Several", "--text", "It works.", "--header", "X-A: b: c"]
    command += ["--attach", str(tmp_path / "Grüße.txt"), "--request-id", "cli-1"]
    reply = shown_json(relay, *command)
    assert [each["address"] for each in reply["recipients"]] == [
        "ann@example.com",
        "bob@example.com",
        "carol@example.com",
        "dan@example.com",
    ]
    # Again under its id: the same reply, and no second mail
    assert shown_json(relay, *command) == reply | {"duplicate": True}
    assert "dan@example.com relayed 250" in shown(relay, *command)
    caught = [each for each in shown_json(relay, "inbox") if each["subject"] == "Several"]
    (number,) = (each["number"] for each in caught)
    mail = email.message_from_string(shown(relay, "inbox", str(number), "--raw"), policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    assert (mail["To"], mail["Cc"], mail["X-A"]) == ("ann@example.com, bob@example.com", "carol@example.com", "b: c")
    (attached,) = mail.iter_attachments()
    assert (attached.get_filename(), attached.get_content_type()) == ("Grüße.txt", "text/plain")
    assert attached.get_content() == "Hallo."
    assert "bob@example.com relayed 250" in shown(relay, "track", reply["email_id"])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--attach", "/no/such/file"), 1, "cannot read /no/such/file: No such file or directory"),
        (("--header", "X-A"), 2, "'X-A' is not 'NAME: VALUE'"),
        (("--header", "Sender: a@example.com"), 1, "headers.Sender is never taken from callers"),
        (("--request-id", "ü"), 1, "request_id must be 1 to 128 printable ASCII characters"),
    ],
)
def test_send_with_what_is_none(relay: RelayProcess, options: tuple[str, ...], code: int, said: str) -> None:
    done = relay.relayctl(*SEND, *options)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_an_attachment_too_large_for_a_message_of_nats(relay: RelayProcess, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1_000_000)
    done = relay.relayctl(*SEND, "--attach", str(tmp_path / "large"))
    assert done.returncode == 1
    assert "exceeds the server's max_payload" in done.stderr


def test_analytics(relay: RelayProcess, email_id: str) -> None:
    del email_id
    assert "100.0%" in shown(relay, "analytics", "newcomer")
    assert shown_json(relay, "analytics", "newcomer")["total_sent"] == 1
    assert relay.relayctl("analytics", "nobody").returncode == 1


def test_inbox(relay: RelayProcess, email_id: str, tmp_path: Path) -> None:
    mail = shown_json(relay, "inbox")[0]
    assert mail["forward_paths"] == ["user@example.com"]
    assert "Grüße" in shown(relay, "inbox")
    text = shown(relay, "inbox", "1")
    assert "It works." in text
    assert email_id in text
    caught = (relay.state_dir / "caught" / "000001.eml").read_bytes()
    raw = subprocess.run(
        [str(RELAYCTL), "inbox", "1", "--raw"], env=clean_environment(relay.settings), capture_output=True, check=True
    ).stdout
    assert raw == caught
    shown(relay, "inbox", "1", "--html", str(tmp_path / "mail.html"))
    assert (tmp_path / "mail.html").read_text() == "<pre>It works.</pre>"
    assert "cannot write /no/such/dir" in relay.relayctl("inbox", "1", "--html", "/no/such/dir/x").stderr
    assert "there is no mail 99" in relay.relayctl("inbox", "99").stderr


SCHEMA: dict[str, Any] = {
    "ready": bool,
    "state_dir": str,
    "nats": {"url": str, "connected": bool, "problem": str, "server_version": str},
    "tracking": {"on": (bool, type(None)), "problem": str},
    "request_ids": {"on": (bool, type(None)), "problem": str},
    "smtp": {"smarthost": str, "ok": (bool, type(None)), "problem": str},
    "events": {"on": (bool, type(None)), "problem": str},
    "programs": [
        {
            "name": str,
            "state": str,
            "ready": bool,
            "pid": int,
            "uptime_seconds": int,
            "reason": str,
            "figures": (dict, type(None)),
        }
    ],
    "totals": dict.fromkeys(
        ("relayed", "failed", "deferred", "in_doubt", "settled", "refused", "not_sent", "overloaded", "dropped"), int
    ),
    "workers_elsewhere": int,
}
SEND_FIGURES: dict[str, Any] = {
    "program": str,
    "pid": int,
    "host": str,
    "stage": str,
    "nats_server": str,
    "in_flight": int,
    "backlog": int,
    **dict.fromkeys(
        ("relayed", "failed", "deferred", "in_doubt", "settled", "refused", "not_sent", "overloaded", "dropped"), int
    ),
    "last_error": str,
    "pool": {
        **dict.fromkeys(("idle", "busy", "dialling", "waiting", "max", "limit", "connections_opened"), int),
        **dict.fromkeys(("awaiting_dot", "stale_replaced", "retried", "throttled", "rate_waiting"), int),
        "rate_per_second": (float, type(None)),
        "rate_lowered": bool,
        "hosts": [{"host": str, "set_aside": str}],
    },
    "circuit": {"state": str, "reason": str},
    "tracking": {"off_reason": str, "tracked": int, "lost": int, "owed": int, "unsettled": int},
    "request_ids": {
        "off_reason": str,
        **dict.fromkeys(("claimed", "taken_over", "repeated", "payload_differs", "in_progress", "unavailable"), int),
        **dict.fromkeys(("overloaded", "uncommitted", "unsettled", "lost", "waiting", "to_store"), int),
    },
}


STATUS_FIGURES: dict[str, Any] = {
    **dict.fromkeys(("program", "host", "stage", "nats_server", "last_error"), str),
    **dict.fromkeys(("pid", "in_flight", "answered", "overloaded", "dropped"), int),
    "tracking": {"off_reason": str},
}
ENGAGEMENT_FIGURES: dict[str, Any] = {
    **dict.fromkeys(("program", "host", "stage", "nats_server", "last_error"), str),
    **dict.fromkeys(("pid", "in_flight", "received", "deleted", "undeleted", "left", "extended", "broken"), int),
    "receive_failures": int,
    "events": dict,
    "pollers": {"idle": int, "max": int},
    "queue": {"problem": str, **dict.fromkeys(("waiting", "in_flight", "delayed"), (int, type(None)))},
}


def paths_of(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The name of every field as the documentation writes it: ``nats.url``, ``programs[].name``."""
    for name, kind in schema.items():
        if name == "totals":
            yield from (name, *kind)
        elif isinstance(kind, dict):
            yield from paths_of(kind, f"{prefix}{name}.")
        elif isinstance(kind, list):
            yield from paths_of(kind[0], f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}"


def check_schema(value: Any, schema: Any, where: str = "") -> None:
    """Fails when ``value`` lacks a field, has one more, or one of another type."""
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for name, kind in schema.items():
            check_schema(value[name], kind, f"{where}.{name}")
    elif isinstance(schema, list):
        assert value, where
        for each in value:
            check_schema(each, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), where


def test_the_json_of_status_is_as_documented(relay: RelayProcess, email_id: str) -> None:
    del email_id
    status = shown_json(relay, "status")
    check_schema(status, SCHEMA)
    assert status["ready"]
    assert status["totals"]["relayed"] >= 1
    assert status["request_ids"] == {"on": True, "problem": ""}
    figures = {each["name"]: each["figures"] for each in status["programs"]}
    check_schema(figures["send-1"], SEND_FIGURES)
    assert figures["nats"] is None
    check_schema(figures["status"], STATUS_FIGURES)
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for schema in (SCHEMA, SEND_FIGURES, STATUS_FIGURES, ENGAGEMENT_FIGURES):
        for path in paths_of(schema):
            assert f"`{path}`" in documented, f"docs/cli.md does not explain {path}"


def test_status_as_text(relay: RelayProcess, email_id: str) -> None:
    del email_id
    text = shown(relay, "status")
    for word in ("PROGRAM", "POOL", "send-2", "NATS", "Tracking", "Dedup", "SMTP", "Health"):
        assert word in text


def test_check_asks_about_the_relay_that_runs_here(relay: RelayProcess) -> None:
    settings = {name: relay.settings.pop(name) for name in ("SMTP_HOST", "SMTP_PORT", "EMAIL_ENABLED", "PORT")}
    try:
        assert shown(relay, "check").count("ok ") == 7
        assert all(finding["ok"] for finding in shown_json(relay, "check"))
    finally:
        relay.settings.update(settings)


def test_what_callers_wrote_moves_no_cursor(relay: RelayProcess) -> None:
    hostile = "[/x]\x1b]0;owned\x07"
    done = relay.relayctl(*SEND[:-1], hostile, "--json")
    for command in (("analytics", hostile), ("track", "--group", hostile), ("logs",), ("inbox",)):
        assert "\x1b" not in shown(relay, *command)
    assert "\x1b" not in shown(relay, "track", json.loads(done.stdout)["email_id"])


def test_logs(relay: RelayProcess, email_id: str) -> None:
    assert f"mail relayed email_id={email_id}" in shown(relay, "logs")
    assert "ready" in shown(relay, "logs", "status")


@pytest.mark.parametrize("arguments", [("logs", "send-1", "-f"), ("status", "--watch")])
def test_what_stays_ends_with_ctrl_c(relay: RelayProcess, arguments: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [str(RELAYCTL), *arguments],
        env=clean_environment(relay.settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    first = b""
    while b"send-1" not in first:
        line = process.stdout.readline()
        assert line, first
        first += line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert errors == b""


def test_status_answers_soon_when_a_worker_hangs(relay: RelayProcess) -> None:
    pid = relay.program("send-1").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        done = relay.relayctl("status", "--json")
        assert time.monotonic() - begun < 2.5  # a second, and what starting Python costs on a busy machine
    finally:
        os.kill(pid, signal.SIGCONT)
    status = json.loads(done.stdout)
    figures = {each["name"]: each["figures"] for each in status["programs"]}
    assert figures["send-1"] is None
    assert figures["send-2"] is not None
    assert done.returncode == 1, "what does not answer is not well"
    assert not status["ready"]
    assert {each["name"]: each["state"] for each in status["programs"]}["send-1"] == "silent"


def test_status_answers_soon_when_nats_is_down(
    new_relay: Callable[..., RelayProcess], new_nats_server: Callable[..., NatsServer]
) -> None:
    server = new_nats_server()
    relay = new_relay(nats_url=server.url)
    relay.start()
    server.stop()
    time.sleep(0.5)
    begun = time.monotonic()
    done = relay.relayctl("status", "--json")
    assert time.monotonic() - begun < 2.5
    assert done.returncode == 1
    status = json.loads(done.stdout)
    assert not status["ready"]
    assert status["nats"]["problem"] == "connection refused"
