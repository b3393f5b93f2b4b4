"""What a running relay tells of itself, as the doctor's findings. Words for what ``relayctl status`` shows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from relay.cli.status_view import ENGAGEMENT, SILENT, Snapshot, reason_of, state_of
from relay.errors import EXIT_CONFIG
from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.doctor.log_lines import RECENT_SECONDS, bad_lines, covered_seconds, ended
from relay.ops.host import SUPERVISORD
from relay.ops.supervision import ProgramStatus, Supervision, is_worker
from relay.settings import Settings

NEARLY_ALL = 0.8
MOST_MESSAGES = 5
OFTEN = 3
"""Ends of one program in an hour from which on it is a fault."""


def not_running(supervision: Supervision) -> Iterator[Finding]:
    """Where no supervisord answers."""
    left = supervision.processes()
    if left and SUPERVISORD not in left:
        listed = ", ".join(f"{name} (pid {pid})" for name, pid in left.items())
        detail = f"programs run without their supervisord, which has ended: {listed}; nobody starts them again"
        yield failed("relay", detail, "`relayctl stop` ends them in order, then `relayctl start`")
    elif why := supervision.absence():
        detail, _, remedy = why.rpartition("; ")
        yield failed("relay", detail, remedy)
    else:
        detail = f"no relay runs in {supervision.state_dir}"
        yield warning("relay", detail, "`relayctl start` starts one; if it runs elsewhere, set RELAY_STATE_DIR to that")


def running_relay(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Programs, then what they lack, then what they hold."""
    problems = [finding for status in snapshot.statuses for finding in _program(status, snapshot)]
    yield from problems
    if not problems:
        count = len(snapshot.statuses)
        yield well("programs", f"all {count} are ready")
    yield from _circuits(snapshot)
    if why := snapshot.tracking_problem:
        yield warning("tracking", f"mail goes out untracked: {why}", "see NATS below; it goes on by itself once it can")
    if why := snapshot.request_ids_problem:
        yield warning("request ids", f"mail with a request_id is deferred: {why}", "see NATS below")
    yield from _events(snapshot)
    for name, figures in sorted(snapshot.fleet.here.items()):
        yield from _load(name, figures, settings)


def log_findings(supervision: Supervision) -> Iterator[Finding]:
    """What the logs of the last hour say."""
    now = time.time()
    log_dir = supervision.state_dir / "log"
    for each in ended(log_dir, now):
        detail = f"{each.program} ended {_times(each.times)} in the last hour without being asked to ({each.how})"
        remedy = f"`relayctl logs {each.program} -n 50` shows its last words"
        if "SIGKILL" in each.how:
            remedy = "unless somebody did that: memory ran out (`dmesg`, the container's limit)"
        yield (failed if each.times >= OFTEN else warning)("restarts", detail, remedy)
    said = bad_lines(log_dir, now)
    lately = _lately(covered_seconds(log_dir, now))
    for line in said[:MOST_MESSAGES]:
        detail = f"{line.program}, {line.level}, {_times(line.times)} in {lately}: {line.text}"
        yield warning("log", detail, "`relayctl logs` shows the lines; what is mended stops coming")
    if len(said) > MOST_MESSAGES:
        detail = f"{len(said) - MOST_MESSAGES} more kinds of warnings and errors in {lately}"
        yield warning("log", detail, f"see {log_dir}")
    if not said:
        yield well("log", f"no warning and no error in {lately}")


def _lately(seconds: float) -> str:
    """For how long back the logs were read: an hour, unless their ends do not reach so far."""
    if seconds >= RECENT_SECONDS:
        return "the last hour"
    length = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    return f"the last {length}, all that the end of the longest log has"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# -- one program -------------------------------------------------------------------------------------------------
def _program(status: ProgramStatus, snapshot: Snapshot) -> Iterator[Finding]:
    name, state, reason = status.name, state_of(status), reason_of(status)
    logs = f"`relayctl logs {name} -n 50` shows its last words"
    if snapshot.is_silent(status):
        remedy = f"`relayctl logs {name}`; if it stays so, end it: `kill -9 {status.pid}` (supervisord starts it again)"
        yield failed(name, SILENT.partition(";")[0], remedy)
    elif status.is_ready:
        return
    elif status.report is not None and status.report.exit_code == EXIT_CONFIG:
        yield failed(name, f"its settings are wrong: {reason}", "mend them, then `relayctl stop` and `relayctl start`")
    elif status.state in {"STOPPED", "STOPPING"} or state == "draining":
        yield warning(name, f"is {state}: somebody asked it to", "`relayctl start`, if that was not meant to last")
    elif status.state in {"BACKOFF", "FATAL", "EXITED", "UNKNOWN"}:
        yield failed(
            name, f"is in {status.state}: it ends as soon as it is started" + (f" ({reason})" if reason else ""), logs
        )
    elif state == "waiting" and reason:
        yield failed(name, f"waits: {reason}", "see below what it waits for; it goes on by itself once that is there")
    else:
        yield warning(name, f"is {state} and not ready yet", f"give it some seconds; then {logs}")


def _circuits(snapshot: Snapshot) -> Iterator[Finding]:
    opened = {
        name: str(figures["circuit"]["reason"])
        for name, figures in sorted(snapshot.fleet.here.items())
        if "circuit" in figures and figures["circuit"]["state"] != "closed"
    }
    if opened:
        reason = next(iter(opened.values())) or "the circuit is open"
        detail = f"{', '.join(opened)} cannot hand mail over, callers are told `deferred`: {reason}"
        yield failed("circuit", detail, "see Smarthost below; it is tried again all the time and closes by itself")


def _events(snapshot: Snapshot) -> Iterator[Finding]:
    if why := snapshot.events_problem:
        yield warning(
            ENGAGEMENT, f"events are not handled: {why}", "see Amazon and NATS below; the queue keeps them meanwhile"
        )
    figures = snapshot.events or {}
    if parked := int((figures.get("events") or {}).get("parked", 0)):
        yield warning(ENGAGEMENT, f"{parked} notifications could not be read and were parked", "see `relayctl parked`")


def _load(name: str, figures: dict[str, Any], settings: Settings) -> Iterator[Finding]:
    held = int(figures.get("in_flight", 0))
    if name.startswith("send-") and held >= settings.backlog_limit * NEARLY_ALL:
        detail = (
            f"{name} holds {held:,} requests, of at most {settings.backlog_limit:,}: then callers hear `overloaded`"
        )
        yield warning(
            "backlog", detail, "a slow smarthost or too few workers: `relayctl status`; `relayctl scale` adds some"
        )
    if dropped := int(figures.get("dropped", 0)):
        detail = f"{name} dropped {dropped} requests whose reply subject is not allowed"
        yield warning(
            "callers", detail, "have callers use inboxes under RELAY_REPLY_PREFIXES, or add their prefix there"
        )
    tracking = figures.get("tracking") or {}
    if lost := int(tracking.get("lost", 0)):
        detail = f"{name} could not store {lost} records since it was started"
        yield warning("tracking", detail, "`relayctl repair` finds what the log has and the records lack")
    pool = figures.get("pool") or {}
    if pool.get("rate_lowered"):
        detail = f"the smarthost slows {name} down to {pool['rate_per_second']:g} recipients a second"
        yield warning("rate", detail, "set SMTP_MAX_RECIPIENTS_PER_SECOND to what the account may, or have it raised")
    if len(pool.get("hosts", [])) > 1:
        for each in pool["hosts"]:
            if each["set_aside"]:
                detail = f"{name} does not use {each['host']}: {each['set_aside']}"
                yield warning("smarthost", detail, "mail goes out over the others; see Smarthost below")


def pids_of(snapshot: Snapshot) -> dict[str, int]:
    """The workers' processes, by name."""
    return {status.name: status.pid for status in snapshot.statuses if status.pid and is_worker(status.name)}
