"""What every command needs: the settings, output as text or JSON, and one way to fail."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click
import orjson
from rich.console import Console

from relay.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, RelayError
from relay.ops.devstack import DEFAULTS as DEV_DEFAULTS
from relay.ops.supervision import Supervision
from relay.settings import Settings, load_settings

json_option = click.option("--json", "as_json_", is_flag=True, help="Print JSON instead of text.")


def console() -> Console:
    """Standard output; as wide as the terminal, and wide enough for every table where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def current_settings(*, dev: bool = False) -> Settings:
    """The settings of this environment; exits 78 when they are wrong."""
    try:
        return load_settings(DEV_DEFAULTS if dev else {})
    except ConfigError as error:
        fail(error)


def current_supervision() -> Supervision:
    """The relay of this environment's state directory."""
    return Supervision(current_settings().relay_state_dir)


def nats_url(settings: Settings) -> str:
    """NATS_URL where it is set, else what the relay in the state directory was started with, else the default."""
    if "nats_url" in settings.model_fields_set:
        return settings.nats_url
    return str(Supervision(settings.relay_state_dir).started().get("nats_url", settings.nats_url))


def fail(error: RelayError) -> NoReturn:
    """One line on standard error, and the exit code that fits."""
    click.echo(f"relayctl: {error}", err=True)
    sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
