"""What every command needs: the settings, output as text or JSON, and one way to fail."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import click
import orjson
from rich.console import Console

from relay.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, RelayError
from relay.ops.supervision import Supervision
from relay.settings import Settings, load_settings

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

json_option = click.option("--json", "as_json_", is_flag=True, help="Print JSON instead of text.")


def console() -> Console:
    """Standard output; as wide as the terminal, and wide enough for every table where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def plain(text: object) -> str:
    """What a caller wrote, as it may be shown: control characters would move the operator's cursor, or worse."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def say(text: str) -> None:
    """One line on standard error, for what is no part of the output."""
    click.echo(f"relayctl: {text}", err=True)


class Interrupted(SystemExit):
    """Ctrl-C. A ``KeyboardInterrupt`` that arrives while gevent waits is printed by gevent; this is not."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises ``Interrupted`` here, wherever the process waits."""

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted(EXIT_FAILED)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def current_settings(defaults: Mapping[str, str] | None = None) -> Settings:
    """The settings of this environment, ``defaults`` where it sets nothing; exits 78 when they are wrong."""
    try:
        return load_settings(defaults)
    except ConfigError as error:
        fail(error)


def settings_of_the_running_relay() -> Settings:
    """This environment's settings, and where it sets nothing those that the relay in the state directory has."""
    supervision = current_supervision()
    if not supervision.is_running():
        return current_settings()
    started = supervision.started()
    names = ("nats_url", "port", "smtp_host", "smtp_port", "email_enabled")
    return current_settings({name.upper(): str(started[name]) for name in names if name in started})


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
    say(str(error))
    sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
