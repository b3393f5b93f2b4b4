"""What ``relayctl status`` and ``start`` show: the relay at one moment, as a table or as JSON.

The JSON is a documented interface (``docs/cli.md``): fields are added, never renamed or removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relay.bus.client import without_password
from relay.cli.fleet import Fleet, gather
from relay.ops.figures import OUTCOMES
from relay.ops.supervision import ProgramStatus, Supervision, is_worker

GOOD, BAD, WAITING = "green", "red", "yellow"
COUNTED = (*OUTCOMES, "overloaded", "dropped")


class Snapshot(NamedTuple):
    """The relay at one moment."""

    state_dir: Path
    started: dict[str, Any]
    """How it was started: ``nats_url``, ``port``, ``smarthost``. This shell's environment may say something else."""
    statuses: list[ProgramStatus]
    fleet: Fleet

    @property
    def smtp_problem(self) -> str:
        """Why mail is not going out although the workers run, '' when it is."""
        for figures in self.fleet.here.values():
            circuit = figures.get("circuit", {})
            if circuit.get("state", "closed") != "closed":
                return str(circuit.get("reason") or "the circuit is open")
        return ""

    @property
    def tracking_problem(self) -> str:
        """Why mails are not recorded, '' when they are (or nobody can tell)."""
        for figures in self.fleet.here.values():
            if why := figures.get("tracking", {}).get("off_reason"):
                return str(why)
        return next((note for each in self.statuses if each.report for note in each.report.notes.values()), "")

    @property
    def is_well(self) -> bool:
        """Whether every program is ready and mail can go out."""
        return all(status.is_ready for status in self.statuses) and not self.smtp_problem


def take_snapshot(supervision: Supervision) -> Snapshot:
    """The relay now; takes less than a second. Raises ``SupervisionError`` when none runs."""
    statuses = supervision.statuses()
    started = supervision.started()
    workers = [(status.name, status.pid) for status in statuses if status.report is not None and is_worker(status.name)]
    return Snapshot(supervision.state_dir, started, statuses, gather(str(started.get("nats_url", "")), workers))


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """The documented JSON."""
    totals = {name: sum(int(each.get(name, 0)) for each in snapshot.fleet.here.values()) for name in COUNTED}
    return {
        "ready": snapshot.is_well,
        "state_dir": str(snapshot.state_dir),
        "nats": {
            "url": without_password(str(snapshot.started.get("nats_url", ""))),
            "connected": not snapshot.fleet.nats_problem,
            "problem": snapshot.fleet.nats_problem,
            "server_version": snapshot.fleet.nats_version,
        },
        "tracking": {"on": not snapshot.tracking_problem, "problem": snapshot.tracking_problem},
        "smtp": {
            "smarthost": str(snapshot.started.get("smarthost", "")),
            "ok": not snapshot.smtp_problem,
            "problem": snapshot.smtp_problem,
        },
        "programs": [_program(status, snapshot.fleet.here.get(status.name)) for status in snapshot.statuses],
        "totals": totals,
        "workers_elsewhere": snapshot.fleet.elsewhere,
    }


def _program(status: ProgramStatus, figures: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": status.name,
        "state": state_of(status),
        "ready": status.is_ready,
        "pid": status.pid,
        "uptime_seconds": status.uptime_seconds,
        "reason": reason_of(status),
        "figures": figures,
    }


def render(snapshot: Snapshot) -> RenderableType:
    """The table of programs, then a line each for NATS, tracking and the smarthost, then the last errors."""
    parts: list[RenderableType] = [_table(snapshot), Text()]
    fleet = snapshot.fleet
    url = without_password(str(snapshot.started.get("nats_url", "")))
    parts.append(_line("NATS", fleet.nats_problem, f"{url} (server {fleet.nats_version})"))
    parts.append(_line("Tracking", snapshot.tracking_problem, "on" if fleet.here else "unknown"))
    smarthost = str(snapshot.started.get("smarthost", ""))
    parts.append(_line("SMTP", f"{smarthost}: {snapshot.smtp_problem}" if snapshot.smtp_problem else "", smarthost))
    parts.append(_line("Health", "", f"port {snapshot.started.get('port')}; state in {snapshot.state_dir}"))
    if fleet.elsewhere:
        parts.append(Text(f"{fleet.elsewhere} more workers of the queue group answered from elsewhere"))
    for name, figures in sorted(fleet.here.items()):
        if last := figures.get("last_error"):
            parts.append(Text(f"last error of {name}: {last}", style=WAITING))
    return Group(*parts)


def _line(what: str, problem: str, otherwise: str) -> Text:
    return Text.assemble((f"{what:<9}", "bold"), (f"failed: {problem}", BAD) if problem else otherwise)


def _table(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("PROGRAM", "STATE", "PID", "UPTIME"):
        table.add_column(heading, no_wrap=True)
    for heading in ("IN FLIGHT", "BACKLOG", "POOL i/b/d/max", "RELAYED", "FAILED", "DEFERRED", "IN DOUBT"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("NOTE", overflow="fold")
    for status in snapshot.statuses:
        colour = GOOD if status.is_ready else WAITING if status.state in {"RUNNING", "STARTING"} else BAD
        table.add_row(
            status.name,
            Text(state_of(status), style=colour),
            str(status.pid or "-"),
            duration(status.uptime_seconds),
            *_figure_cells(snapshot.fleet.here.get(status.name, {})),
            Text(reason_of(status)),
        )
    return table


def _figure_cells(figures: dict[str, Any]) -> list[str]:
    cells = [str(figures.get(name, "")) for name in ("in_flight", "backlog")]
    pool = figures.get("pool")
    cells.append("/".join(str(pool[name]) for name in ("idle", "busy", "dialling", "max")) if pool else "")
    return cells + [str(figures.get(name, "")) for name in ("relayed", "failed", "deferred", "in_doubt")]


def state_of(status: ProgramStatus) -> str:
    """One word: the program's own while it runs, else supervisord's."""
    if status.is_ready:
        return "ready"
    if status.state == "RUNNING" and status.report is not None:
        return status.report.stage.value
    return status.state.lower()


def reason_of(status: ProgramStatus) -> str:
    """What the program waits for, or goes on without; '' when all is well."""
    if status.report is None:
        return ""
    return "; ".join(filter(None, [status.report.reason, *status.report.notes.values()]))


def duration(seconds: int) -> str:
    """``1h05m``, ``3m20s``, ``12s``."""
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
