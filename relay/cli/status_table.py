"""The table of programs that ``start`` and ``status`` show."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from relay.ops.supervision import ProgramStatus

GOOD, BAD, WAITING = "green", "red", "yellow"


def status_table(statuses: list[ProgramStatus]) -> Table:
    """One row a program: its state, pid, uptime, and what it waits for or goes without."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("PROGRAM", "STATE", "PID", "UPTIME", "NOTE"):
        table.add_column(heading, overflow="fold")
    for status in statuses:
        colour = GOOD if status.is_ready else WAITING if status.state in {"RUNNING", "STARTING"} else BAD
        table.add_row(
            status.name,
            Text(state_of(status), style=colour),
            str(status.pid or "-"),
            _duration(status.uptime_seconds),
            Text(reason_of(status)),
        )
    return table


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


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
