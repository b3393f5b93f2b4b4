"""What a running relay tells, as findings: from snapshots as they are taken."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from relay.cli.fleet import Fleet
from relay.cli.running_relay import log_findings, running_relay
from relay.cli.status_view import Snapshot
from relay.ops.doctor.finding import Finding
from relay.ops.doctor.log_lines import TAIL_BYTES
from relay.ops.presence import Report, Stage
from relay.ops.supervision import ProgramStatus, Supervision
from relay.settings import load_settings
from relay.tracking.record import rfc3339

FIGURES: dict[str, Any] = {
    "in_flight": 0,
    "dropped": 0,
    "circuit": {"state": "closed", "reason": ""},
    "tracking": {"off_reason": "", "lost": 0},
    "request_ids": {"off_reason": ""},
    "pool": {"rate_lowered": False, "rate_per_second": None, "hosts": []},
}


def report(**told: Any) -> Report:
    """A program's presence."""
    defaults: dict[str, Any] = {
        "pid": 7,
        "stage": Stage.READY,
        "reason": "",
        "has_given_up": False,
        "exit_code": 0,
        "lacking": {},
        "notes": {},
    }
    return Report(**(defaults | told))


def wrong(status: ProgramStatus, figures: dict[str, Any] | None = FIGURES, nats_problem: str = "") -> list[Finding]:
    """What is not well with a relay of one program."""
    here = {} if figures is None else {status.name: figures}
    snapshot = Snapshot(Path("/srv/relay"), {}, [status], Fleet(nats_problem, "2.15.1", here, 0))
    return [finding for finding in running_relay(snapshot, load_settings()) if not finding.ok]


def send_1(state: str = "RUNNING", told: Report | None = None, *, is_ready: bool = True) -> ProgramStatus:
    """A send worker."""
    return ProgramStatus("send-1", state, 7, 60, told if told is not None else report(), is_ready)


def test_all_is_well() -> None:
    assert wrong(send_1()) == []


@pytest.mark.parametrize(
    ("status", "level", "detail", "remedy"),
    [
        (
            send_1("BACKOFF", report(exit_code=1, reason="the bus has died"), is_ready=False),
            "failed",
            "is in BACKOFF: it ends as soon as it is started (the bus has died)",
            "`relayctl logs send-1 -n 50`",
        ),
        (send_1("FATAL", is_ready=False), "failed", "is in FATAL", "`relayctl logs send-1 -n 50`"),
        (
            send_1("BACKOFF", report(exit_code=78, reason="PORT: must be a number"), is_ready=False),
            "failed",
            "its settings are wrong: PORT: must be a number",
            "mend them",
        ),
        (send_1("STOPPED", is_ready=False), "warning", "is stopped", "`relayctl start`"),
        (
            send_1(told=report(stage=Stage.WAITING, reason="smtp.example.com does not answer"), is_ready=False),
            "failed",
            "waits: smtp.example.com does not answer",
            "goes on by itself",
        ),
        (send_1(told=report(stage=Stage.DRAINING), is_ready=False), "warning", "is draining", "asked it to"),
        (send_1("STARTING", is_ready=False), "warning", "is starting and not ready yet", "some seconds"),
    ],
)
def test_a_program_that_is_not_ready(status: ProgramStatus, level: str, detail: str, remedy: str) -> None:
    (finding,) = wrong(status)
    assert (finding.what, finding.level) == ("send-1", level)
    assert detail in finding.detail
    assert remedy in f"{finding.detail} {finding.remedy}"


def test_a_worker_that_is_silent() -> None:
    (finding,) = wrong(send_1(), figures=None)
    assert finding.level == "failed"
    assert "does not answer" in finding.detail
    assert "kill -9 7" in finding.remedy


def test_nobody_is_silent_while_nats_is_away() -> None:
    assert wrong(send_1(), figures=None, nats_problem="connection refused") == []


@pytest.mark.parametrize(
    ("figures", "what", "level", "detail"),
    [
        ({"circuit": {"state": "open", "reason": "535 no"}}, "circuit", "failed", "send-1 cannot hand mail over"),
        ({"tracking": {"off_reason": "no leader", "lost": 0}}, "tracking", "warning", "untracked: no leader"),
        ({"tracking": {"off_reason": "", "lost": 3}}, "tracking", "warning", "could not store 3 records"),
        ({"request_ids": {"off_reason": "no leader"}}, "request ids", "warning", "is deferred: no leader"),
        ({"in_flight": 4000}, "backlog", "warning", "holds 4,000 requests, of at most 5,000"),
        ({"dropped": 2}, "callers", "warning", "dropped 2 requests"),
        (
            {"pool": {"rate_lowered": True, "rate_per_second": 7.5, "hosts": []}},
            "rate",
            "warning",
            "slows send-1 down to 7.5 recipients a second",
        ),
        (
            {
                "pool": {
                    "rate_lowered": False,
                    "hosts": [{"host": "a:587", "set_aside": "refused"}, {"host": "b:587", "set_aside": ""}],
                }
            },
            "smarthost",
            "warning",
            "send-1 does not use a:587: refused",
        ),
    ],
)
def test_what_a_worker_lacks_or_holds(figures: dict[str, Any], what: str, level: str, detail: str) -> None:
    (finding,) = wrong(send_1(), FIGURES | figures)
    assert (finding.what, finding.level) == (what, level)
    assert detail in finding.detail
    assert finding.remedy


def test_events() -> None:
    engagement = ProgramStatus("engagement", "RUNNING", 7, 60, report(), True)
    figures = {"events": {"parked": 2}, "queue": {"problem": "SQS: AccessDenied"}}
    problem, parked = wrong(engagement, figures)
    assert "events are not handled: SQS: AccessDenied" in problem.detail
    assert "`relayctl parked`" in parked.remedy


@pytest.mark.parametrize(
    ("seconds_ago", "copies", "said"),
    [
        (30, 1, "in the last hour"),
        (30, TAIL_BYTES // 50, "in the last 3# seconds, all that the end of the longest log has"),
        (600, TAIL_BYTES // 50, "in the last 10 minutes, all that the end of the longest log has"),
    ],
)
def test_the_logs_are_not_said_to_be_good_for_longer_than_was_read(
    tmp_path: Path, seconds_ago: float, copies: int, said: str
) -> None:
    line = f'{{"time":"{rfc3339(time.time() - seconds_ago)}","level":"info","msg":"mail relayed"}}\n'
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "send-1.log").write_text(line * copies)
    (found,) = log_findings(Supervision(tmp_path))
    assert found.level == "ok"
    wanted = [f"no warning and no error {said.replace('#', digit)}" for digit in "0123456789"]
    assert found.detail in wanted
