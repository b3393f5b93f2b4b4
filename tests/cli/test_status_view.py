"""What ``relayctl status`` says about what the smarthost asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from relay.cli.fleet import Fleet
from relay.cli.status_view import Snapshot, render

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
