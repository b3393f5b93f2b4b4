"""What runs in a state directory: the programs, supervisord's configuration for them, the settings each was given.

Owns ``supervisord.conf`` and ``started.json``: how it was started and changed since, for the commands that come later.
Starting, asking and stopping is ``supervision``'s, changing what runs ``rolling``'s.
"""

from __future__ import annotations

import math
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import orjson

from relay.errors import RelayError
from relay.ops.devstack import DevStack
from relay.ops.orders import write_atomically
from relay.ops.process import SHUTDOWN_MARGIN_SECONDS
from relay.settings import Settings

LOG_MAX_BYTES = "10MB"
EXTRA = "extra"
"""``send-extra`` and ``status-extra`` are substitutes: they run while others are restarted."""


class SupervisionError(RelayError):
    """The programs cannot be started, asked or stopped; the text says what to do."""


class Program(NamedTuple):
    """One supervisord program."""

    name: str
    command: list[str]
    priority: int
    port: int = 0
    """Where it listens, for programs that tell no presence (nats-server); 0 otherwise."""
    settings: str = ""
    """The file with the settings that it was given; '': it has supervisord's environment."""
    stop_wait_seconds: int = 10
    """More than it may take to end, or SIGKILL would cut what it finishes."""


class Arrangement(NamedTuple):
    """What runs, as far as ``relayctl`` arranged it. Written whenever that changes."""

    programs: dict[str, Program]
    """By name, in the order in which they start; substitutes too, while there are any."""
    is_foreground: bool
    is_dev: bool
    directory: str
    """The working directory of the programs."""
    forced: dict[str, str]
    """Settings that hold whatever the environment says: LOG_FORMAT of a foreground on a terminal."""
    send_workers: int
    send_workers_set: int
    """RELAY_SEND_WORKERS when it was heeded last: ``relayctl scale`` changes the number and not that."""
    told: dict[str, Any]
    """Some settings by name, as ``relayctl`` needs them: ``nats_url``, ``port``, ``drain_seconds`` …"""

    def with_programs(self, programs: Iterable[Program]) -> Arrangement:
        """These as well, or in place of those of the same name."""
        return self._replace(programs=self.programs | {each.name: each for each in programs})

    def without(self, names: Iterable[str]) -> Arrangement:
        """Less these."""
        gone = set(names)
        return self._replace(programs={name: each for name, each in self.programs.items() if name not in gone})


def programs(
    settings: Settings, dev: DevStack | None, kept: Path | None = None, *, send_workers: int = 0
) -> list[Program]:
    """All programs, in the order in which they start. ``kept``: the file with these settings.

    ``send_workers``: how many, whatever RELAY_SEND_WORKERS says.
    """
    listed: list[Program] = []
    if dev is not None:
        listed.append(Program("nats", dev.nats_command(), 10, port=dev.nats_port))
        listed.append(Program("catcher", _command("catcher", "catcher"), 10))
    count = send_workers or settings.relay_send_workers
    listed += [worker(f"send-{number}", settings, kept) for number in range(1, count + 1)]
    # The first one serves the health page, and keeps the name that it has when it is the only one.
    names = ["status", *(f"status-{number}" for number in range(2, settings.relay_status_workers + 1))]
    listed += [worker(name, settings, kept) for name in names]
    if settings.ses_eventing_enabled:
        listed.append(worker("engagement", settings, kept))
    return listed


def worker(name: str, settings: Settings, kept: Path | None) -> Program:
    """One of our own programs."""
    module = name.partition("-")[0]
    command = _command(module, name)
    return Program(
        name,
        command if kept is None else [*command, str(kept)],
        20 if module == "send" else 30,
        settings="" if kept is None else str(kept),
        stop_wait_seconds=math.ceil(settings.drain_seconds + settings.tracking_ack_seconds) + SHUTDOWN_MARGIN_SECONDS,
    )


def like(program: Program, name: str) -> Program:
    """Another worker of the same kind and with the same settings."""
    return program._replace(name=name, command=[name if word == program.name else word for word in program.command])


def _command(module: str, name: str) -> list[str]:
    # -P: or a folder named workers, wherever relayctl was called, would be run in place of ours.
    return [sys.executable, "-P", "-m", f"workers.{module}", name]


def is_send_worker(program: str) -> bool:
    """Whether it sends mail."""
    return program.startswith("send-")


def is_worker(program: str) -> bool:
    """Whether the program is one of ours that answers over NATS."""
    return program in {"status", "engagement"} or program.startswith(("send-", "status-"))


def is_substitute(program: str) -> bool:
    """Whether it only runs while others are restarted."""
    return program.endswith(f"-{EXTRA}")


def told_of(settings: Settings) -> dict[str, Any]:
    """What ``Arrangement.told`` keeps of the settings."""
    return {
        "nats_url": settings.nats_url,
        "port": settings.port,
        "smtp_host": settings.smtp_host,
        "smtp_port": settings.smtp_port,
        "smarthost": settings.smarthost,
        "email_enabled": settings.email_enabled,
        "drain_seconds": settings.drain_seconds,
        "max_recipients_per_second": settings.smtp_max_recipients_per_second,
    }


# -- kept in the state directory ---------------------------------------------------------------------------------------
def write_arrangement(state_dir: Path, arrangement: Arrangement) -> None:
    """Writes ``supervisord.conf`` and ``started.json``. Raises ``OSError``."""
    conf = state_dir / "supervisord.conf"
    partial = conf.with_suffix(".partial")
    partial.write_text(_configuration(state_dir, arrangement))
    partial.replace(conf)
    kept = arrangement._asdict() | {"programs": [each._asdict() for each in arrangement.programs.values()]}
    ports = {name: each.port for name, each in arrangement.programs.items()}
    write_atomically(state_dir / "started.json", arrangement.told | {"programs": ports, "arrangement": kept})


def read_started(state_dir: Path) -> dict[str, Any]:
    """How it was started: ``told``, and ``programs`` with their ports; {} when it never was."""
    try:
        told = orjson.loads((state_dir / "started.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return told if isinstance(told, dict) and _is_sound(told) else {}


def _is_sound(told: Mapping[str, Any]) -> bool:
    """Whether what is there is of the types that its readers expect."""
    kept = told.get("arrangement", {})
    return (
        all(isinstance(told.get(name, kind()), kind) for name, kind in _KINDS.items())
        and isinstance(told.get("drain_seconds", 0), (int, float))
        and all(isinstance(port, int) for port in told.get("programs", {}).values())
        and isinstance(kept.get("programs", []), list)
        and all(isinstance(each, dict) for each in kept.get("programs", []))
    )


_KINDS: Mapping[str, type] = {"programs": dict, "arrangement": dict, "nats_url": str, "smtp_host": str, "port": int}


def read_arrangement(state_dir: Path) -> Arrangement:
    """What runs. Raises ``SupervisionError`` when another version of Relay started it."""
    try:
        kept = dict(read_started(state_dir)["arrangement"])
        listed = [Program(**each) for each in kept.pop("programs")]
        return Arrangement(programs={each.name: each for each in listed}, **kept)
    except (KeyError, TypeError, ValueError) as error:
        raise SupervisionError(
            f"what is kept of the relay in {state_dir} cannot be used: another version of Relay started it;"
            " `relayctl stop` and `relayctl start` take this one into use"
        ) from error


def log_path(state_dir: Path, program: str) -> Path:
    """Where a program's log is kept (not in the foreground: there it goes to standard output)."""
    return state_dir / "log" / f"{program}.log"


def _configuration(state_dir: Path, arrangement: Arrangement) -> str:
    head, section = conf_file("supervisord.conf").read_text().split("; " + "-" * 99 + "\n")
    is_foreground = arrangement.is_foreground
    shared: Mapping[str, object] = {
        "socket": state_dir / "supervisord.sock",
        "supervisord_log": "/dev/null" if is_foreground else state_dir / "log" / "supervisord.log",
        "pidfile": state_dir / "supervisord.pid",
        "nodaemon": "true" if is_foreground else "false",
        "log_dir": state_dir / "log",
        "directory": arrangement.directory,
        "log_max_bytes": "0" if is_foreground else LOG_MAX_BYTES,
        "log_backups": "0" if is_foreground else "3",
    }
    parts = [Template(head).substitute({key: _escaped(value) for key, value in shared.items()})]
    for program in arrangement.programs.values():
        own = {
            "name": program.name,
            "command": shlex.join(program.command),
            "priority": program.priority,
            "program_log": "/dev/fd/1" if is_foreground else log_path(state_dir, program.name),
            "stop_wait_seconds": program.stop_wait_seconds,
        }
        parts.append(Template(section).substitute({key: _escaped(value) for key, value in {**shared, **own}.items()}))
    return "\n".join(parts)


def _escaped(value: object) -> str:
    """supervisord expands ``%`` in every value."""
    return str(value).replace("%", "%%")


def conf_file(name: str) -> Path:
    """A file of ``conf/``: in a checkout beside the package, in an installation under ``share/relay``."""
    for directory in (Path(__file__).parents[2] / "conf", Path(sysconfig.get_path("data")) / "share/relay/conf"):
        if (directory / name).is_file():
            return directory / name
    raise SupervisionError(f"{name} is missing from this installation; install Relay again")
