"""relayctl: the operator's front door. Translates options into calls of ``ops`` and exceptions into one line.

Exit codes: 0 done; 1 it could not be done, or something is not well; 2 the command line was not
understood; 78 the settings are wrong.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import click
from rich.console import Console

from relay import __version__, contract
from relay.cli.request import ask, escaped_html, text_or_file
from relay.cli.status_table import reason_of, status_table
from relay.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, RelayError
from relay.ops.devstack import DEFAULTS as DEV_DEFAULTS
from relay.ops.devstack import DevStack
from relay.ops.supervision import ProgramStatus, Supervision, has_failed
from relay.settings import Settings, child_environment, load_settings, unknown_names

START_TIMEOUT_SECONDS = 60.0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="relayctl")
def cli() -> None:
    """Runs and watches the mail relay.

    Settings come from the environment; the README lists them all.
    """


@cli.command()
@click.option("--dev", is_flag=True, help="Also run a NATS server and a mail catcher on 127.0.0.1.")
@click.option(
    "--foreground", is_flag=True, help="Stay; log to standard output. For containers (as PID 1) and terminals."
)
@click.option(
    "--timeout", default=START_TIMEOUT_SECONDS, show_default=True, help="Seconds to wait until every program is ready."
)
def start(dev: bool, foreground: bool, timeout: float) -> None:
    """Starts the relay and returns when every program is ready.

    Example: relayctl start --dev
    """
    settings = _settings(dev=dev)
    for name in unknown_names():
        click.echo(f"warning: the setting {name} is not known and has no effect", err=True)
    try:
        stack = DevStack(settings) if dev else None
        supervision = Supervision(settings.relay_state_dir)
        command = supervision.prepare(settings, stack, foreground=foreground)
        environment = child_environment((DEV_DEFAULTS if dev else {}), RELAY_STATE_DIR=str(supervision.state_dir))
        if foreground:
            sys.stdout.flush()
            os.execve(command[0], command, environment)
        supervision.launch(command, environment)
        statuses = _wait_ready(supervision, timeout)
    except RelayError as error:
        _fail(error)
    failed = [status for status in statuses if not status.is_ready]
    if failed:
        _explain_failed_start(supervision, failed)
        sys.exit(EXIT_FAILED)
    Console().print(status_table(statuses))
    click.echo(f"ready: health on port {settings.port}, state in {supervision.state_dir}")


def _wait_ready(supervision: Supervision, timeout_seconds: float) -> list[ProgramStatus]:
    """Waits, and says on standard error what is being waited for when that is not over in a moment."""
    said: dict[str, str] = {}
    patience = time.monotonic() + 2
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
    if any(status.state == "FATAL" for status in failed):
        supervision.stop(30)
        click.echo("relayctl: the relay was stopped again; mend the above and start it once more", err=True)
    else:
        click.echo("relayctl: it keeps trying; `relayctl status` shows it, `relayctl stop` ends it", err=True)


@cli.command()
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait until everything has ended.")
def stop(timeout: float) -> None:
    """Stops the relay: workers finish what is in flight first.

    Example: relayctl stop
    """
    supervision = Supervision(_settings().relay_state_dir)
    try:
        supervision.stop(timeout)
    except RelayError as error:
        _fail(error)
    click.echo("stopped")


@cli.command()
def status() -> None:
    """Shows every program's state; exits 1 when one is not ready.

    Example: relayctl status
    """
    supervision = Supervision(_settings().relay_state_dir)
    try:
        statuses = supervision.statuses()
    except RelayError as error:
        _fail(error)
    Console().print(status_table(statuses))
    if not all(each.is_ready for each in statuses):
        sys.exit(EXIT_FAILED)


@cli.command()
@click.option("--to", required=True, help="Recipient's address.")
@click.option("--subject", required=True, help="Subject line.")
@click.option("--text", required=True, help="Plain-text body; @FILE reads it from a file.")
@click.option("--html", default="", help="HTML body; @FILE reads it from a file. Default: the text, escaped.")
@click.option("--from", "from_", default="", help="Sender's address; its domain must be allowed.")
@click.option("--from-display-name", default="", help="Sender's name.")
@click.option("--reply-to", default="", help="Reply-To address; its domain must be allowed.")
@click.option("--group", default="", help="Group id, for analytics.")
@click.option("--timeout", default=35.0, show_default=True, help="Seconds to wait for the reply.")
def send(to: str, subject: str, text: str, html: str, from_: str, from_display_name: str, reply_to: str,
         group: str, timeout: float) -> None:  # fmt: skip
    """Sends one mail through NATS, as any caller would, and prints the reply.

    Exits 1 when the reply is an error.

    Example: relayctl send --to user@example.com --subject Hello --text 'It works.'
    """
    settings = _settings()
    body = text_or_file(text)
    request = {
        "to": to,
        "subject": subject,
        "text": body,
        "html": text_or_file(html) if html else escaped_html(body),
        "from": from_,
        "from_display_name": from_display_name,
        "reply_to": reply_to,
        "group_id": group,
    }
    try:
        reply = ask(nats_url(settings), contract.SEND_EMAIL, {k: v for k, v in request.items() if v}, timeout)
    except RelayError as error:
        _fail(error)
    Console().print_json(data=reply)
    if "error" in reply:
        sys.exit(EXIT_FAILED)


def nats_url(settings: Settings) -> str:
    """Where the relay in this state directory was told NATS is, unless the environment says otherwise."""
    if "nats_url" in settings.model_fields_set:
        return settings.nats_url
    return str(Supervision(settings.relay_state_dir).started().get("nats_url", settings.nats_url))


def _settings(*, dev: bool = False) -> Settings:
    try:
        return load_settings(defaults=DEV_DEFAULTS if dev else {})
    except ConfigError as error:
        click.echo(f"relayctl: {error}", err=True)
        sys.exit(EXIT_CONFIG)


def _fail(error: RelayError) -> NoReturn:
    click.echo(f"relayctl: {error}", err=True)
    sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)


def main() -> None:
    """The console script."""
    cli(prog_name="relayctl")
