"""``relayctl start`` and ``stop``."""

from __future__ import annotations

import contextlib
import sys
import time

import click

from relay.cli.status_view import reason_of, render, take_snapshot
from relay.cli.terminal import console, current_settings, current_supervision, fail, say
from relay.errors import EXIT_FAILED, RelayError
from relay.ops.devstack import DEFAULTS as DEV_DEFAULTS
from relay.ops.devstack import DevStack
from relay.ops.foreground import stay
from relay.ops.supervision import ProgramStatus, Supervision, SupervisionError, cannot_work, has_failed
from relay.settings import captured, child_environment, unknown_names

START_TIMEOUT_SECONDS = 60.0
STOP_MARGIN_SECONDS = 35.0
PATIENCE_SECONDS = 2.0
"""What is waited for is said only after this: a start usually takes less."""


@click.command()
@click.option("--dev", is_flag=True, help="Also run a NATS server and a mail catcher on 127.0.0.1.")
@click.option("--foreground", is_flag=True, help="Stay, and log to standard output: for containers and terminals.")
@click.option("--timeout", default=START_TIMEOUT_SECONDS, show_default=True, help="Seconds to wait until all is ready.")
def start(dev: bool, foreground: bool, timeout: float) -> None:
    """Starts the relay; returns when every program is ready.

    Exits 1 when one is not, with its last log lines. What is only waiting (for NATS, for the smarthost) is left
    running and goes on trying; what can never work is stopped again.

    Example: relayctl start --dev
    """
    for name in unknown_names():
        click.echo(f"warning: the setting {name} is not known and has no effect", err=True)
    defaults = DEV_DEFAULTS if dev else {}
    settings = current_settings(defaults)
    is_for_eyes = foreground and settings.log_format == "auto" and sys.stdout.isatty()
    forced = {"LOG_FORMAT": "text"} if is_for_eyes else {}
    try:
        stack = DevStack(settings) if dev else None
        supervision = Supervision(settings.relay_state_dir)
        values = captured(defaults, **forced)
        with contextlib.ExitStack() as held:
            held.enter_context(supervision.starting())
            command = supervision.prepare(settings, stack, values, foreground=foreground, forced=forced)
            environment = child_environment(defaults, RELAY_STATE_DIR=str(supervision.state_dir), **forced)
            if foreground:
                sys.exit(stay(supervision, command, environment, held.close))
            supervision.launch(command, environment)
        statuses = _wait_ready(supervision, timeout)
        failed = [status for status in statuses if not status.is_ready]
        if failed:
            _explain_failed_start(supervision, failed)
            sys.exit(EXIT_FAILED)
    except RelayError as error:
        fail(error)
    console().print(render(take_snapshot(supervision)))


@click.command()
@click.option("--timeout", type=float, help="Seconds to wait for the end. Default: DRAIN_SECONDS and 35.")
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    help="Seconds to finish what is in flight, if less than DRAIN_SECONDS; what is cut then is in doubt.",
)
@click.option("--kill", is_flag=True, help="After the timeout kill what still runs: what it had is lost, unrecorded.")
def stop(timeout: float | None, drain: float | None, kill: bool) -> None:
    """Stops the relay; what is in flight is finished first, for up to DRAIN_SECONDS.

    What is not finished then is answered and recorded as in doubt. Exits 1 when something still runs after the timeout,
    which is named; it goes on ending.

    Example: relayctl stop --drain 5
    """
    supervision = current_supervision()
    try:
        drain_seconds = float(supervision.started().get("drain_seconds", 0))
        if drain is not None:
            try:
                supervision.shorten_drain(drain)
                drain_seconds = min(drain, drain_seconds)
            except SupervisionError as error:
                say(f"warning: DRAIN_SECONDS holds, --drain does not: {error}")
        seconds = drain_seconds + STOP_MARGIN_SECONDS if timeout is None else timeout
        killed = supervision.stop(seconds, is_kill=kill)
    except RelayError as error:
        fail(error)
    click.echo(f"stopped, and killed: {', '.join(killed)}" if killed else "stopped")


def _wait_ready(supervision: Supervision, timeout_seconds: float) -> list[ProgramStatus]:
    """Waits, and says on standard error what is being waited for when that is not over in a moment."""
    said: dict[str, str] = {}
    patience = time.monotonic() + PATIENCE_SECONDS
    statuses: list[ProgramStatus] = []
    for statuses in supervision.wait_ready(timeout_seconds):
        for status in statuses:
            reason = reason_of(status)
            if not status.is_ready and reason and said.get(status.name) != reason and time.monotonic() > patience:
                said[status.name] = reason
                click.echo(f"waiting: {status.name}: {reason}", err=True)
    return statuses


def _explain_failed_start(supervision: Supervision, failed: list[ProgramStatus]) -> None:
    """Prints the failing program's last log lines; what can never work is stopped again."""
    for status in failed:
        click.echo(f"{status.name} is not ready ({status.state}): {reason_of(status) or 'see its log'}", err=True)
    worst = next((status for status in failed if has_failed(status)), failed[0])
    click.echo(f"last lines of {supervision.log_path(worst.name)}:", err=True)
    for line in supervision.last_lines(worst.name):
        click.echo(f"  {line}", err=True)
    if any(cannot_work(status) for status in failed):
        supervision.stop(float(supervision.started().get("drain_seconds", 0)) + STOP_MARGIN_SECONDS)
        click.echo("relayctl: the relay was stopped again; mend the above and start it once more", err=True)
    else:
        click.echo("relayctl: it keeps trying; `relayctl status` shows it, `relayctl stop` ends it", err=True)
