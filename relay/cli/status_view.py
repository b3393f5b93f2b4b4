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
from relay.bus.jetstream import old_server_problem
from relay.cli.fleet import Fleet, gather
from relay.cli.terminal import nats_config_of_the_relay, plain
from relay.ops.figures import OUTCOMES
from relay.ops.supervision import ProgramStatus, Supervision, is_worker

GOOD, BAD, WAITING = "green", "red", "yellow"
SILENT = "runs, but does not answer: it hangs, or is starved of CPU; its log may tell"
ENGAGEMENT = "engagement"
"""The program that handles events."""
COUNTED = (*OUTCOMES, "overloaded", "dropped")


class Snapshot(NamedTuple):
    """The relay at one moment."""

    state_dir: Path
    started: dict[str, Any]
    """How it was started: ``nats_url``, ``port``, ``smarthost``. This shell's environment may say something else."""
    statuses: list[ProgramStatus]
    fleet: Fleet

    @property
    def smtp_problem(self) -> str | None:
        """Why mail cannot go out, '' when it can, None when nobody can tell."""
        lacking = [
            status.report.lacking["smtp"]
            for status in self.statuses
            if status.report and "smtp" in status.report.lacking
        ]
        if lacking:
            return lacking[0]
        circuits = [figures["circuit"] for figures in self.fleet.here.values() if "circuit" in figures]
        for circuit in circuits:
            if circuit["state"] != "closed":
                return str(circuit["reason"] or "the circuit is open")
        return "" if circuits else None

    @property
    def tracking_problem(self) -> str | None:
        """Why mails are not recorded, '' when they are, None when nobody can tell."""
        told = [figures["tracking"]["off_reason"] for figures in self.fleet.here.values() if "tracking" in figures]
        told += [each.report.notes.get("tracking", "") for each in self.statuses if each.report]
        return next((why for why in told if why), "") if told else None

    @property
    def request_ids_problem(self) -> str | None:
        """Why no request_id is taken, '' when they are, None when nobody can tell."""
        told = [each["request_ids"]["off_reason"] for each in self.fleet.here.values() if "request_ids" in each]
        return next((why for why in told if why), "") if told else None

    @property
    def events(self) -> dict[str, Any] | None:
        """The figures of the engagement worker, None when it does not answer, or there is none."""
        return self.fleet.here.get(ENGAGEMENT)

    @property
    def events_problem(self) -> str | None:
        """Why events are not handled, '' when they are, None when nobody can tell, or none are to be."""
        told = [each.report.lacking for each in self.statuses if each.name == ENGAGEMENT and each.report]
        lacking = [why for each in told for what, why in each.items() if what in {"sqs", "storage", "program"}]
        if lacking:
            return "; ".join(lacking)
        return None if self.events is None else str(self.events["queue"]["problem"])

    def is_silent(self, status: ProgramStatus) -> bool:
        """Whether a worker that calls itself ready does not answer, although NATS does."""
        return (
            status.is_ready
            and is_worker(status.name)
            and not self.fleet.nats_problem
            and status.name not in self.fleet.here
        )

    def is_ready(self, status: ProgramStatus) -> bool:
        """Whether the program serves."""
        return status.is_ready and not self.is_silent(status)

    @property
    def is_well(self) -> bool:
        """Whether every program serves and mail can go out."""
        return all(map(self.is_ready, self.statuses)) and not self.smtp_problem


def take_snapshot(supervision: Supervision) -> Snapshot:
    """The relay now. Raises ``SupervisionError`` when none runs, or its supervisord does not answer within 2 s."""
    statuses = supervision.statuses()
    started = supervision.started()
    workers = [(status.name, status.pid) for status in statuses if status.report is not None and is_worker(status.name)]
    return Snapshot(supervision.state_dir, started, statuses, gather(nats_config_of_the_relay(supervision), workers))


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
        "tracking": {"on": _is_fine(snapshot.tracking_problem), "problem": snapshot.tracking_problem or ""},
        "request_ids": {"on": _is_fine(snapshot.request_ids_problem), "problem": snapshot.request_ids_problem or ""},
        "smtp": {
            "smarthost": _smarthost(snapshot),
            "ok": _is_fine(snapshot.smtp_problem),
            "problem": snapshot.smtp_problem or "",
        },
        "events": {"on": _is_fine(snapshot.events_problem), "problem": snapshot.events_problem or ""},
        "programs": [_program(status, snapshot) for status in snapshot.statuses],
        "totals": totals,
        "workers_elsewhere": snapshot.fleet.elsewhere,
    }


def _is_fine(problem: str | None) -> bool | None:
    return None if problem is None else not problem


def _smarthost(snapshot: Snapshot) -> str:
    return str(snapshot.started.get("smarthost", ""))


def _program(status: ProgramStatus, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": status.name,
        "state": _state(status, snapshot),
        "ready": snapshot.is_ready(status),
        "pid": status.pid,
        "uptime_seconds": status.uptime_seconds,
        "reason": _reason(status, snapshot),
        "figures": snapshot.fleet.here.get(status.name),
    }


def _state(status: ProgramStatus, snapshot: Snapshot) -> str:
    return "silent" if snapshot.is_silent(status) else state_of(status)


def _reason(status: ProgramStatus, snapshot: Snapshot) -> str:
    return SILENT if snapshot.is_silent(status) else reason_of(status)


def render(snapshot: Snapshot) -> RenderableType:
    """The table of programs, then a line each for NATS, tracking, dedup, SMTP and so on, then the last errors."""
    parts: list[RenderableType] = [_table(snapshot), Text()]
    fleet = snapshot.fleet
    url = without_password(str(snapshot.started.get("nats_url", "")))
    parts.append(_line("NATS", fleet.nats_problem, f"{url} (server {fleet.nats_version})"))
    if old := old_server_problem(fleet.nats_version):
        parts.append(Text(old, style=WAITING))
    parts.append(_line("Tracking", snapshot.tracking_problem, "on"))
    parts.append(_line("Dedup", snapshot.request_ids_problem, "on"))
    smarthost = _smarthost(snapshot)
    problem = snapshot.smtp_problem
    parts.append(_line("SMTP", f"{smarthost}: {problem}" if problem else problem, smarthost))
    if any(status.name == ENGAGEMENT for status in snapshot.statuses):
        parts.append(_line("Events", snapshot.events_problem, _events(snapshot.events or {})))
    parts.append(_line("Health", "", f"port {snapshot.started.get('port')}; state in {snapshot.state_dir}"))
    parts += [Text(note, style=WAITING) for note in _constraints(fleet.here)]
    if fleet.elsewhere:
        parts.append(
            Text(f"{fleet.elsewhere} more workers of the queue group answered: of another relay, or on another host")
        )
    for name, figures in sorted(fleet.here.items()):
        if last := figures.get("last_error"):
            parts.append(Text(f"last error of {name}: {plain(last)}", style=WAITING))
    return Group(*parts)


def _line(what: str, problem: str | None, otherwise: str) -> Text:
    if problem is None:
        return Text.assemble((f"{what:<9}", "bold"), ("unknown: no worker answers", WAITING))
    return Text.assemble((f"{what:<9}", "bold"), (f"failed: {plain(problem)}", BAD) if problem else otherwise)


def _events(figures: dict[str, Any]) -> str:
    """What became of the notifications, and what the queue holds."""
    counts = figures.get("events", {})
    told = [f"{counts.get(name, 0)} {name}" for name in ("folded", "repeated", "parked")]
    told += [f"{counts[name]} {name}" for name in ("early", "rebuilt", "unknown") if counts.get(name)]
    queue = figures.get("queue", {})
    if queue.get("waiting") is not None:
        told.append(f"{queue['waiting']} waiting in the queue")
    return ", ".join(told)


def _constraints(here: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each thing that the smarthost asked for and that holds mail back, and for each host set aside."""
    notes = []
    for name, figures in sorted(here.items()):
        pool = figures.get("pool", {})
        if pool.get("rate_lowered"):
            rate, waiting = pool["rate_per_second"], pool["rate_waiting"]
            notes.append(f"{name} is throttled by the smarthost: {rate:g} recipients/s for now, {waiting} mails wait")
        elif pool.get("rate_waiting"):
            rate, waiting = pool["rate_per_second"], pool["rate_waiting"]
            notes.append(f"{name} is at its sending rate: {rate:g} recipients/s, {waiting} mails wait")
        if pool.get("limit", pool.get("max")) != pool.get("max"):
            notes.append(f"{name} was told to use fewer connections: {pool['limit']} of {pool['max']} for now")
        # A smarthost's only host is never set aside: that is what the circuit is for.
        hosts = pool.get("hosts", [])
        aside = [each for each in hosts if each["set_aside"]] if len(hosts) > 1 else []
        notes += [f"{name} does not use {each['host']}: {plain(each['set_aside'])}" for each in aside]
    return notes


def _table(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("PROGRAM", "STATE", "PID", "UPTIME"):
        table.add_column(heading, no_wrap=True)
    for heading in ("IN FLIGHT", "BACKLOG", "POOL i/b/d/max", "RELAYED", "FAILED", "DEFERRED", "IN DOUBT"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("NOTE", overflow="fold")
    for status in snapshot.statuses:
        colour = GOOD if snapshot.is_ready(status) else WAITING if status.state in {"RUNNING", "STARTING"} else BAD
        table.add_row(
            status.name,
            Text(_state(status, snapshot), style=colour),
            str(status.pid or "-"),
            duration(status.uptime_seconds),
            *_figure_cells(snapshot.fleet.here.get(status.name, {})),
            Text(plain(_reason(status, snapshot))),
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
