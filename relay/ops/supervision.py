"""supervisord: which programs there are, its configuration, starting, asking and stopping it.

Owns the state directory's layout: ``supervisord.conf`` and ``.sock``, ``log/<program>.log``, ``run/<program>.json``
(presence), ``started.json`` (how it was started, for the other commands), ``nats/`` and ``caught/`` (dev stack).
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import orjson
from supervisor.xmlrpc import SupervisorTransport

from relay.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, RelayError
from relay.ops.devstack import DevStack
from relay.ops.presence import Report, presence_path, read_presence
from relay.ops.process import SHUTDOWN_MARGIN_SECONDS
from relay.settings import Settings

LOG_MAX_BYTES = "10MB"
RPC_SECONDS = 2.0
WATCH_SECONDS = 0.5
PIPE_BYTES = select.PIPE_BUF
MAX_SOCKET_PATH_BYTES = 107
UNFIT_CHARACTERS = frozenset('%;#"\\\r\n')
"""What supervisord's and nats-server's files would expand, cut off or end at."""
FAILED_STATES = frozenset({"FATAL", "EXITED", "UNKNOWN", "STOPPED"})
"""supervisord's words for a program that it does not try to start any more."""


class SupervisionError(RelayError):
    """The programs cannot be started, asked or stopped; the text says what to do."""


class Program(NamedTuple):
    """One supervisord program."""

    name: str
    command: list[str]
    priority: int
    port: int = 0
    """Where it listens, for programs that tell no presence (nats-server); 0 otherwise."""


class ProgramStatus(NamedTuple):
    """A program as supervisord and the program itself see it."""

    name: str
    state: str
    """supervisord's: RUNNING, STARTING, BACKOFF, FATAL …"""
    pid: int
    uptime_seconds: int
    report: Report | None
    is_ready: bool


def programs(settings: Settings, dev: DevStack | None) -> list[Program]:
    """All programs, in the order in which they start."""
    listed: list[Program] = []
    if dev is not None:
        listed.append(Program("nats", dev.nats_command(), 10, port=dev.nats_port))
        listed.append(Program("catcher", _worker("catcher", "catcher"), 10))
    listed.extend(
        Program(f"send-{number}", _worker("send", f"send-{number}"), 20)
        for number in range(1, settings.relay_send_workers + 1)
    )
    # The first one serves the health page, and keeps the name that it has when it is the only one.
    names = ["status", *(f"status-{number}" for number in range(2, settings.relay_status_workers + 1))]
    listed.extend(Program(name, _worker("status", name), 30) for name in names)
    if settings.ses_eventing_enabled:
        listed.append(Program("engagement", _worker("engagement", "engagement"), 30))
    return listed


def _worker(module: str, name: str) -> list[str]:
    # -P: or a folder named workers, wherever relayctl was called, would be run in place of ours.
    return [sys.executable, "-P", "-m", f"workers.{module}", name]


class Supervision:
    """The programs of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.resolve()
        self._socket = self.state_dir / "supervisord.sock"
        self._conf = self.state_dir / "supervisord.conf"
        self._started = self.state_dir / "started.json"

    def log_path(self, program: str) -> Path:
        """Where a program's log is kept (not in the foreground: there it goes to standard output)."""
        return self.state_dir / "log" / f"{program}.log"

    # -- start -----------------------------------------------------------------------------
    def prepare(self, settings: Settings, dev: DevStack | None, *, foreground: bool) -> list[str]:
        """Makes the state directory and the configuration; the command that runs supervisord.

        Raises ``SupervisionError``: not writable, path too long, already running, a port is taken.
        """
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH_BYTES:
            raise SupervisionError(
                f"RELAY_STATE_DIR {self.state_dir} is too long for a Unix socket; choose one of at most 80 bytes"
            )
        if unfit := set(str(self.state_dir)) & UNFIT_CHARACTERS:
            raise SupervisionError(
                f"RELAY_STATE_DIR {self.state_dir} holds {' '.join(map(repr, sorted(unfit)))}, which configuration"
                " files cannot; choose another"
            )
        if self.is_running():
            raise SupervisionError(
                f"a relay is already running in {self.state_dir}; `relayctl stop` ends it, or set RELAY_STATE_DIR"
                " to another directory"
            )
        if left := self.orphans():
            raise SupervisionError(
                f"programs of an earlier relay still run in {self.state_dir} without their supervisord"
                f" ({_listed(left)}); `relayctl stop` ends them"
            )
        check_port_free(settings.relay_http_host, settings.port, "PORT")
        if dev is not None:
            for setting, port in dev.ports().items():
                check_port_free("127.0.0.1", port, setting)
        self._write_files(settings, dev, foreground=foreground)
        command = [sys.executable, "-P", "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(self._conf)]
        if os.geteuid() == 0:
            command += ["--user", "root"]
        return command

    def _write_files(self, settings: Settings, dev: DevStack | None, *, foreground: bool) -> None:
        try:
            for directory in ("log", "run"):
                (self.state_dir / directory).mkdir(parents=True, exist_ok=True)
            if dev is not None:
                dev.write_configuration()
            listed = programs(settings, dev)
            for program in listed:
                presence_path(self.state_dir, program.name).unlink(missing_ok=True)
            if not self._socket.is_socket():
                self._socket.unlink(missing_ok=True)
            self._conf.write_text(self._configuration(settings, listed, foreground=foreground))
            self._remember(settings, listed)
        except OSError as error:
            raise SupervisionError(
                f"cannot write to RELAY_STATE_DIR {self.state_dir} ({error.strerror}); set it to a directory"
                " that this user may write to, with room on its disk"
            ) from error

    def launch(self, command: list[str], environment: dict[str, str]) -> None:
        """Runs supervisord in the background; returns when it answers."""
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired as error:
            raise SupervisionError(f"supervisord did not start within 30 s in {self.state_dir}") from error
        if done.returncode != 0:
            raise SupervisionError(f"supervisord did not start: {(done.stderr or done.stdout).strip()}")
        deadline = time.monotonic() + 10
        while not self.is_running():
            if time.monotonic() > deadline:
                raise SupervisionError(f"supervisord did not answer; see {self.state_dir / 'log' / 'supervisord.log'}")
            time.sleep(0.05)

    def stay(self, command: list[str], environment: dict[str, str]) -> int:
        """Runs supervisord as a child until it ends; the exit code for this process, which may be PID 1.

        Passes its output on (standard output may be a socket, which the programs could not open again), makes SIGTERM
        and its like an orderly stop, reaps orphans, and ends everything when a program can never work: 78 when that
        one exited 78, else 1.
        """
        reader, writer = os.pipe()
        child = subprocess.Popen(
            command, env=environment, stdout=writer, stderr=writer, start_new_session=True
        )  # a session of its own: Ctrl-C reaches us alone
        os.close(writer)
        asked = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, lambda *_: asked.append(True))
        failure = EXIT_OK
        is_stopping = False
        while True:
            _pass_on(reader, WATCH_SECONDS)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child.pid:
                _pass_on(reader, 0)
                return failure or os.waitstatus_to_exitcode(status)
            if failure == EXIT_OK and not is_stopping:
                failure = self._hopeless_exit_code()
            if (asked or failure != EXIT_OK) and not is_stopping:
                is_stopping = True
                with contextlib.suppress(OSError, xmlrpc.client.Error, SupervisionError):
                    self.begin_draining()
                child.send_signal(signal.SIGTERM)

    def _hopeless_exit_code(self) -> int:
        """0 while every program may yet work."""
        try:
            hopeless = next((each for each in self.statuses() if cannot_work(each)), None)
        except SupervisionError:  # supervisord is starting, or ending
            return EXIT_OK
        if hopeless is None:
            return EXIT_OK
        print(f"relayctl: {hopeless.name} can never work like this; see what it said above", flush=True)
        return hopeless.report.exit_code if hopeless.report is not None else EXIT_FAILED

    def _configuration(self, settings: Settings, listed: list[Program], *, foreground: bool) -> str:
        head, section = conf_file("supervisord.conf").read_text().split("; " + "-" * 99 + "\n")
        shared = {
            "socket": self._socket,
            "supervisord_log": "/dev/null" if foreground else self.state_dir / "log" / "supervisord.log",
            "pidfile": self.state_dir / "supervisord.pid",
            "nodaemon": "true" if foreground else "false",
            "log_dir": self.state_dir / "log",
            "directory": _working_directory(self.state_dir),
            "log_max_bytes": "0" if foreground else LOG_MAX_BYTES,
            "log_backups": "0" if foreground else "3",
            "stop_wait_seconds": math.ceil(settings.drain_seconds + settings.tracking_ack_seconds)
            + SHUTDOWN_MARGIN_SECONDS,
        }
        parts = [Template(head).substitute({key: _escaped(value) for key, value in shared.items()})]
        for program in listed:
            own = {
                "name": program.name,
                "command": shlex.join(program.command),
                "priority": program.priority,
                "program_log": "/dev/fd/1" if foreground else self.log_path(program.name),
            }
            parts.append(Template(section).substitute({key: _escaped(value) for key, value in (shared | own).items()}))
        return "\n".join(parts)

    def _remember(self, settings: Settings, listed: list[Program]) -> None:
        told = {
            "nats_url": settings.nats_url,
            "port": settings.port,
            "smtp_host": settings.smtp_host,
            "smtp_port": settings.smtp_port,
            "smarthost": settings.smarthost,
            "email_enabled": settings.email_enabled,
            "drain_seconds": settings.drain_seconds,
            "programs": {program.name: program.port for program in listed},
        }
        self._started.touch(mode=0o600)
        self._started.write_bytes(orjson.dumps(told))

    # -- ask -------------------------------------------------------------------------------
    def started(self) -> dict[str, Any]:
        """How it was started: some settings by name, and ``programs`` with their ports; {} when it never was."""
        try:
            told = orjson.loads(self._started.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return told if isinstance(told, dict) else {}

    def is_running(self) -> bool:
        """Whether a supervisord answers in this directory."""
        if not self._socket.exists():
            return False
        try:
            return bool(self._call("getState"))
        except (OSError, xmlrpc.client.Error):
            return False

    def statuses(self) -> list[ProgramStatus]:
        """Every program's status. Raises ``SupervisionError`` when no relay runs here."""
        try:
            listed = self._call("getAllProcessInfo")
        except (OSError, xmlrpc.client.Error) as error:
            raise SupervisionError(f"no relay runs in {self.state_dir}; `relayctl start` starts one") from error
        ports = self.started().get("programs", {})
        return [self._status(info, int(ports.get(info["name"], 0))) for info in listed]

    def _status(self, info: dict[str, Any], port: int) -> ProgramStatus:
        pid = int(info["pid"])
        is_running = info["statename"] == "RUNNING"
        report = read_presence(self.state_dir, info["name"], pid)
        is_serving = _listens(port) if port else report is not None and report.stage == "ready"
        return ProgramStatus(
            name=info["name"],
            state=info["statename"],
            pid=pid,
            uptime_seconds=max(0, info["now"] - info["start"]) if is_running else 0,
            report=report,
            is_ready=is_running and is_serving,
        )

    def wait_ready(self, timeout_seconds: float) -> Iterator[list[ProgramStatus]]:
        """Yields the statuses again and again until all are ready, one has failed for good, or time is up."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            statuses = self.statuses()
            yield statuses
            if all(status.is_ready for status in statuses) or any(has_failed(status) for status in statuses):
                return
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def last_lines(self, program: str, count: int = 12) -> list[str]:
        """The end of a program's log."""
        try:
            with self.log_path(program).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 20_000))
                return file.read().decode("utf-8", "replace").splitlines()[-count:]
        except OSError:
            return []

    # -- stop ------------------------------------------------------------------------------
    def stop(self, timeout_seconds: float) -> None:
        """Stops every program, the workers all at once, then supervisord; returns when it is gone.

        Without a supervisord, ends the programs that a killed one left behind.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            pids = {"supervisord": int(self._call("getPID"))}
            self.begin_draining()
            self._call("shutdown")
        except xmlrpc.client.Fault:  # it is shutting down already; a second SIGTERM would cut what is in flight
            pids = {"supervisord": int((self.state_dir / "supervisord.pid").read_text())}
        except (OSError, xmlrpc.client.Error) as error:
            pids = self.orphans()
            if not pids:
                raise SupervisionError(f"no relay runs in {self.state_dir}; nothing to stop") from error
            for pid in pids.values():
                os.kill(pid, signal.SIGTERM)
        while left := {name: pid for name, pid in pids.items() if _is_alive(pid)}:
            if time.monotonic() > deadline:
                raise SupervisionError(f"still running after {timeout_seconds:g} s: {_listed(left)}")
            time.sleep(0.05)

    def begin_draining(self) -> None:
        """Asks all workers to stop at once; supervisord by itself would ask one after the other is gone."""
        for info in self._call("getAllProcessInfo"):
            if is_worker(info["name"]) and info["statename"] == "RUNNING":
                with contextlib.suppress(xmlrpc.client.Fault):  # it has just ended by itself
                    self._call("stopProcess", info["name"], False)

    def orphans(self) -> dict[str, int]:
        """Programs of ours that still run although their supervisord does not: name and pid."""
        found = {}
        for path in sorted((self.state_dir / "run").glob("*.json")):
            try:
                pid = int(orjson.loads(path.read_bytes())["pid"])
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if any(word.startswith(b"workers.") for word in command) and path.stem.encode() in command:
                found[path.stem] = pid
        return found

    def _call(self, method: str, *arguments: object) -> Any:
        """One call of supervisord's XML-RPC interface. Raises ``OSError`` and ``xmlrpc.client.Error``."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(RPC_SECONDS)  # the transport has no way to be told of a time limit
        try:
            with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except TimeoutError as error:
            raise SupervisionError(
                f"the supervisord in {self.state_dir} does not answer; its pid is in supervisord.pid there"
            ) from error
        finally:
            socket.setdefaulttimeout(before)


def _pass_on(reader: int, timeout_seconds: float) -> None:
    """Copies what arrives in time to standard output; drops what nobody there takes: mail must not wait for it."""
    deadline = time.monotonic() + timeout_seconds
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, PIPE_BYTES)
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [1], [], max(0.0, deadline - time.monotonic()))[1]:
                os.write(1, chunk)  # at most PIPE_BYTES, which a pipe that takes any takes whole
        if not chunk or time.monotonic() >= deadline:
            return


def _working_directory(otherwise: Path) -> Path:
    """Where relayctl was called, so that relative paths in settings mean the same to the programs."""
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was deleted meanwhile
        return otherwise


def _listed(pids: dict[str, int]) -> str:
    return ", ".join(f"{name} pid {pid}" for name, pid in pids.items())


def is_worker(program: str) -> bool:
    """Whether the program is one of ours that answers over NATS."""
    return program in {"status", "engagement"} or program.startswith(("send-", "status-"))


def has_failed(status: ProgramStatus) -> bool:
    """Whether the program will not become ready without someone doing something."""
    return cannot_work(status) or (status.report is not None and status.report.has_given_up)


def cannot_work(status: ProgramStatus) -> bool:
    """Whether starting it again changes nothing: supervisord gave up, or it said so itself when it ended."""
    return status.state in FAILED_STATES or (status.report is not None and status.report.exit_code == EXIT_CONFIG)


def check_port_free(host: str, port: int, setting: str) -> None:
    """Raises ``SupervisionError`` when the port cannot be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SupervisionError(
            f"port {port} on {host} cannot be used ({error.strerror}); end what listens there, or set {setting}"
        ) from error


def conf_file(name: str) -> Path:
    """A file of ``conf/``: in a checkout beside the package, in an installation under ``share/relay``."""
    for directory in (Path(__file__).parents[2] / "conf", Path(sysconfig.get_path("data")) / "share/relay/conf"):
        if (directory / name).is_file():
            return directory / name
    raise SupervisionError(f"{name} is missing from this installation; install Relay again")


def _escaped(value: object) -> str:
    """supervisord expands ``%`` in every value."""
    return str(value).replace("%", "%%")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
