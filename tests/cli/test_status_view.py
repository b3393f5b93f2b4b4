"""What ``relayctl status`` says about what the smarthost asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from relay.cli.fleet import Fleet
from relay.cli.status_view import Snapshot, render
from relay.ops.presence import Report, Stage
from relay.ops.supervision import ProgramStatus

POOL: dict[str, Any] = {
    "idle": 1,
    "busy": 0,
    "dialling": 0,
    "max": 20,
    "limit": 20,
    "rate_per_second": None,
    "rate_lowered": False,
    "rate_waiting": 0,
    "hosts": [{"host": "a.example.com:587", "set_aside": ""}, {"host": "b.example.com:587", "set_aside": ""}],
}


def shown(**pool: Any) -> str:
    """The whole status of a relay with one send worker."""
    figures = {
        "pool": POOL | pool,
        "circuit": {"state": "closed", "reason": ""},
        "tracking": {"off_reason": ""},
    }
    fleet = Fleet("", "2.15.1", {"send-1": figures}, 0)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(Snapshot(Path("/srv/relay/var"), {"smarthost": "a.example.com:587"}, [], fleet)))
    return capture.get()


@pytest.mark.parametrize(
    ("pool", "line"),
    [
        (
            {"rate_lowered": True, "rate_per_second": 13.5, "rate_waiting": 40},
            "send-1 is throttled by the smarthost: 13.5 recipients/s for now, 40 mails wait",
        ),
        (
            {"rate_per_second": 7.0, "rate_waiting": 40},
            "send-1 is at its sending rate: 7 recipients/s, 40 mails wait",
        ),
        ({"limit": 3}, "send-1 was told to use fewer connections: 3 of 20 for now"),
        (
            {"hosts": [{"host": "a.example.com:587", "set_aside": "timed out"}, POOL["hosts"][1]]},
            "send-1 does not use a.example.com:587: timed out",
        ),
    ],
)
def test_what_holds_mail_back_has_a_line(pool: dict[str, Any], line: str) -> None:
    assert line in shown(**pool)
    assert line not in shown()


@pytest.mark.parametrize(("version", "is_old"), [("2.11.9", True), ("2.15.1", False), ("", False)])
def test_an_old_nats_server_has_a_line(version: str, is_old: bool) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(Snapshot(Path("/srv/relay/var"), {}, [], Fleet("", version, {}, 0))))
    assert (f"nats-server {version} is older than 2.12" in capture.get()) == is_old


def test_an_only_host_is_the_circuits_matter() -> None:
    assert "does not use" not in shown(hosts=[{"host": "a.example.com:587", "set_aside": "timed out"}])


@pytest.mark.parametrize(
    ("request_ids", "line"),
    [
        ({}, "Dedup    unknown: no worker answers"),
        ({"request_ids": {"off_reason": ""}}, "Dedup    on"),
        ({"request_ids": {"off_reason": "no bucket"}}, "Dedup    failed: no bucket"),
    ],
)
def test_whether_request_ids_are_taken_has_a_line(request_ids: dict[str, Any], line: str) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        fleet = Fleet("", "2.15.1", {"send-1": request_ids}, 0)
        console.print(render(Snapshot(Path("/srv/relay/var"), {}, [], fleet)))
    assert f"\n{line}\n" in capture.get()


def events_line(figures: dict[str, Any] | None, lacking: dict[str, str]) -> str:
    """The line about events of a relay with an engagement worker."""
    report = Report(1, Stage.READY, "", False, 0, lacking, {})
    status = ProgramStatus("engagement", "RUNNING", 1, 5, report, True)
    fleet = Fleet("", "2.15.1", {} if figures is None else {"engagement": figures}, 0)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(Snapshot(Path("/srv/relay/var"), {}, [status], fleet)))
    return next(line for line in capture.get().splitlines() if line.startswith("Events"))


def test_events_have_a_line() -> None:
    queue = {"problem": "", "waiting": 12, "in_flight": 0, "delayed": 0}
    counts = {"folded": 5, "repeated": 2, "unknown": 1, "Open": 8}
    line = events_line({"events": counts, "queue": queue}, {})
    assert line.split(None, 1)[1].rstrip() == "5 folded, 2 repeated, 0 parked, 1 unknown, 12 waiting in the queue"


@pytest.mark.parametrize(
    ("figures", "lacking", "said"),
    [
        ({"queue": {"problem": "events wait for JetStream"}}, {}, "failed: events wait for JetStream"),
        (None, {"sqs": "the queue cannot be asked"}, "failed: the queue cannot be asked"),
        (None, {"nats": "connection refused"}, "unknown: no worker answers"),
    ],
)
def test_why_events_are_not_handled(figures: dict[str, Any] | None, lacking: dict[str, str], said: str) -> None:
    assert said in events_line(figures, lacking)


def test_without_an_engagement_worker_nothing_is_said_of_events() -> None:
    assert "Events" not in shown()
