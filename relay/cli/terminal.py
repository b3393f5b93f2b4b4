"""What every command needs: the settings, output as text or JSON, and one way to fail."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click
import orjson
from pydantic import SecretStr
from rich.console import Console

from relay.bus.config import BusConfig, without_password
from relay.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, RelayError
from relay.ops.orders import SettingsGone, read_settings
from relay.ops.parts import bus_config
from relay.ops.supervision import Supervision
from relay.settings import TRUE_WORDS, Settings, load_settings

NATS_LOGIN = (
    "nats_creds",
    "nats_nkey_seed_file",
    "nats_user",
    "nats_password",
    "nats_password_file",
    "nats_token_file",
    "nats_inbox_prefix",
)
NATS_TLS = ("nats_ca", "nats_cert", "nats_key", "nats_tls_first")
"""Settings that mean something together: one of them set here, and none of the others is taken from elsewhere."""

NATS_FILES = frozenset(
    {"nats_creds", "nats_nkey_seed_file", "nats_password_file", "nats_token_file", "nats_ca", "nats_cert", "nats_key"}
)

LEVEL_STYLES = {"failed": "red", "warning": "yellow", "ok": "green"}
"""How serious a finding is, the worst first, and how that is shown."""

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
    here = current_settings()
    names = _not_said(here)
    if "nats_inbox_prefix" in names:  # one is checked against the other
        names += ("relay_reply_prefixes",)
    nats = {name.upper(): value for name, value in _nats_as_started(started, names).items() if value}
    others = ("port", "smtp_host", "smtp_port", "email_enabled")
    return current_settings(nats | {name.upper(): str(started[name]) for name in others if name in started})


def current_supervision() -> Supervision:
    """The relay of this environment's state directory."""
    return Supervision(current_settings().relay_state_dir)


def nats_config(settings: Settings) -> BusConfig:
    """NATS as this environment says; where it names none, that of the relay in the state directory.

    Another login than the relay's may be set here by itself: an operator's.
    """
    return _nats(settings, _not_said(settings))


def nats_config_of_the_relay(supervision: Supervision) -> BusConfig:
    """NATS as the relay in the state directory has it, whichever this environment names; with the login set here."""
    settings = current_settings()
    is_another = "nats_url" in settings.model_fields_set and settings.nats_url != supervision.started().get("nats_url")
    return _nats(settings, ("nats_url", *NATS_LOGIN, *NATS_TLS) if is_another else _not_said(settings))


def _not_said(settings: Settings) -> tuple[str, ...]:
    """Of NATS, what this environment leaves to the relay in the state directory."""
    if "nats_url" in settings.model_fields_set:
        return ()
    groups = (group for group in (NATS_LOGIN, NATS_TLS) if settings.model_fields_set.isdisjoint(group))
    return ("nats_url", *(name for group in groups for name in group))


def _nats(settings: Settings, names: Collection[str]) -> BusConfig:
    """Of the settings ``names`` as the relay was started with, the others as they are here."""
    started = Supervision(settings.relay_state_dir).started()
    if not started:
        return bus_config(settings)
    update: dict[str, Any] = {}
    for name, text in _nats_as_started(started, names).items():
        default = Settings.model_fields[name].default
        if isinstance(default, SecretStr):
            update[name] = SecretStr(text)
        elif isinstance(default, bool):
            update[name] = text.lower() in TRUE_WORDS
        else:
            update[name] = text or default
    return bus_config(settings.model_copy(update=update))


def _nats_as_started(started: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Those settings, '' for what was not set; files by their whole names. Where none are asked for, none."""
    if not names:
        return {}
    arrangement = started.get("arrangement") or {}
    files = [each["settings"] for each in arrangement.get("programs") or () if each.get("settings")]
    try:
        kept = read_settings(Path(files[0] if files else ""))
    except SettingsGone:
        kept = {}
    kept.setdefault("NATS_URL", str(started.get("nats_url", "")))
    directory = Path(str(arrangement.get("directory", "")))
    found = {name: kept.get(name.upper(), "") for name in names}
    if "nats_creds" not in found:  # another login is said here
        found["nats_url"] = without_password(found.get("nats_url", ""))
    return {name: str(directory / text) if text and name in NATS_FILES else text for name, text in found.items()}


def leave(exit_code: int) -> NoReturn:
    """Ends the process now, as nothing else would while the name servers are silent: a thread waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def fail(error: RelayError) -> NoReturn:
    """One line on standard error, and the exit code that fits."""
    say(str(error))
    sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
