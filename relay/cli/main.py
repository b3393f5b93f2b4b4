"""relayctl: the operator's front door. Translates options into calls of ``ops`` and exceptions into one line.

Exit codes: 0 done; 1 it could not be done, or something is not well; 2 the command line was not
understood; 78 the settings are wrong. ``docs/cli.md`` is made from what stands here.
"""

from __future__ import annotations

import logging
import os
import sys

import click

from relay import __version__
from relay.cli.doctor import doctor
from relay.cli.lifecycle import start, stop
from relay.cli.mails import analytics, inbox, send, track
from relay.cli.metrics import metrics
from relay.cli.parked import parked
from relay.cli.records import events, export
from relay.cli.rolling import reload, restart, scale
from relay.cli.setup import check, completion, settings
from relay.cli.terminal import fail
from relay.cli.upkeep import buckets, erase, repair
from relay.cli.watching import logs, status
from relay.errors import ConfigError, RelayError
from relay.settings import apply_env_file

COMMANDS = (
    start,
    stop,
    restart,
    scale,
    reload,
    status,
    metrics,
    logs,
    send,
    track,
    analytics,
    events,
    export,
    inbox,
    check,
    doctor,
    buckets,
    repair,
    erase,
    parked,
    settings,
    completion,
)


class InOrder(click.Group):
    """Lists its commands as they were added: in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="relayctl")
@click.option(
    "--env-file", metavar="FILE", help="Read settings from FILE (NAME=value lines); the environment outranks it."
)
def cli(env_file: str | None) -> None:
    """Runs and watches the mail relay.

    Settings come from the environment: `relayctl settings` shows them, the README explains them. Exit codes: 0 done;
    1 it could not be done, or something is not well; 2 the command line was not understood; 78 the settings are wrong.
    """
    if env_file is not None:
        try:
            apply_env_file(env_file)
        except ConfigError as error:
            fail(error)


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """The console script. What a command did not expect, such as a missing permission, is one line too."""
    logging.getLogger("relay").addHandler(logging.NullHandler())  # what matters of it, the commands say themselves
    if sys.stdout is None:  # it was closed before we began: `relayctl … >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        cli(prog_name="relayctl")
    except RelayError as error:
        fail(error)
    except OSError as error:
        fail(RelayError(f"{error.filename or 'standard output'}: {error.strerror or error}"))
