"""supervisord: starting it, asking it, stopping it, and telling it which programs to run.

Owns the state directory's layout: ``supervisord.sock``, ``log/<program>.log``, ``run/<program>.json`` (presence),
``change.lock``, what ``arrangement`` and ``orders`` keep, ``nats/`` and ``caught/`` (dev stack).
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from supervisor.xmlrpc import Faults

from relay.errors import EXIT_CONFIG
from relay.ops.arrangement import (
    Arrangement,
    SupervisionError,
    is_worker,
    log_path,
    programs,
    read_started,
    told_of,
    write_arrangement,
)
from relay.ops.devstack import DevStack
from relay.ops.host import (
    SUPERVISORD,
    check_port_free,
    in_words,
    is_listening,
    processes,
    send_signal,
    wait_gone,
    written_pid,
)
from relay.ops.orders import forget_drain_seconds, forget_settings, keep_settings, tell_drain_seconds, tell_send_workers
from relay.ops.presence import Report, Stage, presence_path, read_presence
from relay.settings import Settings

__all__ = ["ProgramStatus", "Supervision", "SupervisionError", "check_port_free", "is_worker"]

RPC_SECONDS = 2.0
KILLED_SECONDS = 5.0
LOCK_SECONDS = 0.2
MAX_SOCKET_PATH_BYTES = 107
UNFIT_CHARACTERS = frozenset('%;#"\\\r\n')
"""What supervisord's and nats-server's files would expand, cut off or end at."""
FAILED_STATES = frozenset({"FATAL", "UNKNOWN"})
"""supervisord's words for a program that it cannot run. (Who has EXITED is started again, and one added is STOPPED
until it is started.)"""
LIVE_STATES = frozenset({"STARTING", "RUNNING", "BACKOFF"})
"""Those of a program that can be told to stop."""


class ProgramStatus(NamedTuple):
    """A program as supervisord and the program itself see it."""

    name: str
    state: str
    """supervisord's: RUNNING, STARTING, BACKOFF, FATAL …"""
    pid: int
    uptime_seconds: int
    report: Report | None
    is_ready: bool


class Supervision:
    """The programs of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.resolve()
        self._socket = self.state_dir / "supervisord.sock"
        self._conf = self.state_dir / "supervisord.conf"

    def log_path(self, program: str) -> Path:
        """Where a program's log is kept (not in the foreground: there it goes to standard output)."""
        return log_path(self.state_dir, program)

    # -- start -----------------------------------------------------------------------------
    def prepare(
        self,
        settings: Settings,
        dev: DevStack | None,
        values: Mapping[str, str],
        *,
        foreground: bool,
        forced: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Makes the state directory and the configuration; the command that runs supervisord.

        ``values`` are the settings as they were ``captured``, ``forced`` those of them that the environment does not
        decide. Raises ``SupervisionError``: not writable, path too long, already running, a port is taken.
        """
        self._check_path()
        if self.is_running():
            raise SupervisionError(
                f"a relay is already running in {self.state_dir}; `relayctl stop` ends it, or set RELAY_STATE_DIR"
                " to another directory"
            )
        if why := self.absence():
            raise SupervisionError(why)
        check_port_free(settings.relay_http_host, settings.port, "PORT")
        if dev is not None:
            for setting, port in dev.ports().items():
                check_port_free("127.0.0.1", port, setting)
        self._write_files(settings, dev, values, dict(forced or {}), foreground=foreground)
        command = [sys.executable, "-P", "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(self._conf)]
        if os.geteuid() == 0:
            command += ["--user", "root"]
        return command

    def _check_path(self) -> None:
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH_BYTES:
            raise SupervisionError(
                f"RELAY_STATE_DIR {self.state_dir} is too long for a Unix socket; choose one of at most 80 bytes"
            )
        if unfit := set(str(self.state_dir)) & UNFIT_CHARACTERS:
            raise SupervisionError(
                f"RELAY_STATE_DIR {self.state_dir} holds {' '.join(map(repr, sorted(unfit)))}, which configuration"
                " files cannot; choose another"
            )

    def _write_files(
        self,
        settings: Settings,
        dev: DevStack | None,
        values: Mapping[str, str],
        forced: dict[str, str],
        *,
        foreground: bool,
    ) -> None:
        with self.writing():
            for directory in ("log", "run"):
                (self.state_dir / directory).mkdir(parents=True, exist_ok=True)
            if dev is not None:
                dev.write_configuration()
            forget_settings(self.state_dir, but=())
            kept = keep_settings(self.state_dir, values)
            listed = programs(settings, dev, kept)
            for path in (self.state_dir / "run").glob("*.json"):
                path.unlink(missing_ok=True)
            tell_send_workers(self.state_dir, settings.relay_send_workers)
            forget_drain_seconds(self.state_dir)
            if not self._socket.is_socket():
                self._socket.unlink(missing_ok=True)
            arrangement = Arrangement(
                programs={program.name: program for program in listed},
                is_foreground=foreground,
                is_dev=dev is not None,
                directory=str(_working_directory(self.state_dir)),
                forced=forced,
                send_workers=settings.relay_send_workers,
                send_workers_set=settings.relay_send_workers,
                told=told_of(settings),
            )
            write_arrangement(self.state_dir, arrangement)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What cannot be written to the state directory, in words. Raises ``SupervisionError``."""
        try:
            yield
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

    # -- ask -------------------------------------------------------------------------------
    def started(self) -> dict[str, Any]:
        """How it was started: some settings by name, and ``programs`` with their ports; {} when it never was."""
        return read_started(self.state_dir)

    def is_running(self) -> bool:
        """Whether a supervisord answers in this directory. Raises ``SupervisionError`` when one is there and hangs."""
        if not self._socket.exists():
            return False
        try:
            return bool(self._call("getState"))
        except (OSError, xmlrpc.client.Error):
            return False

    def absence(self) -> str:
        """What runs here although no supervisord answers, and what to do; '' when nothing does."""
        left = self.processes()
        pid = left.pop(SUPERVISORD, 0)
        if pid and self._is_shutting_down():
            return f"the relay in {self.state_dir} is being stopped ({SUPERVISORD} pid {pid}); wait until it has ended"
        if pid:
            why = "cannot be reached" if self._socket.exists() else f"cannot be reached: {self._socket} is gone"
            return (
                f"the supervisord in {self.state_dir} (pid {pid}) runs and {why}; `relayctl stop` ends it in order,"
                " then `relayctl start`"
            )
        if left:
            return (
                f"programs of an earlier relay still run in {self.state_dir} without their supervisord"
                f" ({in_words(left)}); `relayctl stop` ends them, then `relayctl start`"
            )
        return ""

    def _is_shutting_down(self) -> bool:
        try:
            self._call("getState")
        except xmlrpc.client.Fault as fault:
            return bool(fault.faultCode == Faults.SHUTDOWN_STATE)
        except (OSError, xmlrpc.client.Error):
            return False
        return False

    def statuses(self) -> list[ProgramStatus]:
        """Every program's status. Raises ``SupervisionError`` when no relay runs here."""
        listed = self._asked("getAllProcessInfo")
        ports = self.started().get("programs", {})
        order = {name: place for place, name in enumerate(ports)}
        listed.sort(key=lambda info: order.get(info["name"], len(order)))  # supervisord's: in which they were added
        return [self._status(info, int(ports.get(info["name"], 0))) for info in listed]

    def states(self) -> dict[str, str]:
        """supervisord's word for each program's state. Raises ``SupervisionError``."""
        return {info["name"]: info["statename"] for info in self._asked("getAllProcessInfo")}

    def _status(self, info: dict[str, Any], port: int) -> ProgramStatus:
        pid = int(info["pid"])
        is_running = info["statename"] == "RUNNING"
        report = read_presence(self.state_dir, info["name"], pid)
        is_serving = is_listening(port) if port else report is not None and report.stage == "ready"
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

    # -- change ------------------------------------------------------------------------------
    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Makes the directory, and keeps others from starting or changing anything in it. Raises as ``changing``."""
        self._check_path()
        with self.writing():
            self.state_dir.mkdir(parents=True, exist_ok=True)
        with self.changing("start"):
            yield

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Keeps others from changing what runs. ``what``: the command, for them. Raises ``SupervisionError``."""
        with contextlib.ExitStack() as stack:
            with self.writing():
                path = self.state_dir / "change.lock"
                file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+"))
                if not _locked(file):
                    raise SupervisionError(
                        f"{file.read() or 'another relayctl'} is at work in {self.state_dir}; wait until it is done"
                    )
                # Unbuffered: what a full disk does not take would come up again when it is closed. It holds without.
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), 0)
                    os.pwrite(file.fileno(), f"`relayctl {what}` (pid {os.getpid()})".encode(), 0)
            yield

    def is_being_changed(self) -> bool:
        """Whether somebody is ``changing`` what runs."""
        try:
            with (self.state_dir / "change.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def ask_to_stop(self, name: str) -> None:
        """Has supervisord stop a program; what is not running already is left alone. Never waits."""
        with contextlib.suppress(xmlrpc.client.Fault):  # it has just ended by itself
            self._asked("stopProcess", name, False)

    def remove(self, name: str) -> bool:
        """Has supervisord forget a program; False when it still runs."""
        try:
            self._asked("removeProcessGroup", name)
        except xmlrpc.client.Fault as fault:
            return bool(fault.faultCode == Faults.BAD_NAME)  # there is none
        presence_path(self.state_dir, name).unlink(missing_ok=True)
        return True

    def read_again(self) -> tuple[list[str], list[str], list[str]]:
        """Has supervisord read its configuration: names of programs that are new, changed, and no longer in it."""
        try:
            ((added, changed, removed),) = self._asked("reloadConfig")
        except xmlrpc.client.Fault as fault:
            raise SupervisionError(f"supervisord cannot read {self._conf}: {fault.faultString}") from fault
        return list(added), list(changed), list(removed)

    def add(self, name: str) -> None:
        """Has supervisord run a program as its configuration has it, which it has read."""
        try:
            self._asked("addProcessGroup", name)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.ALREADY_ADDED:
                raise SupervisionError(f"supervisord does not run {name}: {fault.faultString}") from fault

    # -- stop ------------------------------------------------------------------------------
    def shorten_drain(self, seconds: float) -> None:
        """Gives the workers of a relay that runs so long to drain, if less than they have. Raises if not written."""
        if self.processes() or self.is_running():
            with self.writing():
                tell_drain_seconds(self.state_dir, seconds)

    def stop(self, timeout_seconds: float, *, is_kill: bool = False) -> list[str]:
        """Stops every program, the workers all at once, then supervisord; returns when it is gone.

        Without a supervisord, ends the programs that a killed one left behind; one whose socket is gone has them
        stopped one after the other. ``is_kill``: whom the timeout finds running is killed, and a supervisord that
        hangs at once, since it stops nobody; the names of those.
        Raises ``SupervisionError`` when there is nothing to stop, it hangs, or it still runs after the timeout.
        """
        deadline = time.monotonic() + timeout_seconds
        pids = self.processes()
        hung: list[str] = []
        try:
            pids = {SUPERVISORD: int(self._call("getPID")), **pids}
            self.begin_draining()
            self._call("shutdown")
        except xmlrpc.client.Fault:  # it is shutting down already; a second SIGTERM would cut what is in flight
            if SUPERVISORD not in pids and (pid := written_pid(self.state_dir)):
                pids = {SUPERVISORD: pid, **pids}
        except SupervisionError:
            if not is_kill or SUPERVISORD not in pids:
                raise
            hung = [SUPERVISORD]
            send_signal(pids[SUPERVISORD], signal.SIGKILL)
            wait_gone({SUPERVISORD: pids[SUPERVISORD]}, time.monotonic() + KILLED_SECONDS)
            pids = self._end_programs(deadline)
        except (OSError, xmlrpc.client.Error) as error:
            if not pids:
                raise SupervisionError(f"no relay runs in {self.state_dir}; nothing to stop") from error
            if SUPERVISORD in pids:  # only it can end them: it would start again whom somebody else ends
                send_signal(pids[SUPERVISORD], signal.SIGTERM)
            else:
                pids = self._end_programs(deadline)
        left = wait_gone(pids, deadline)
        if not left:
            return hung
        if not is_kill:
            raise SupervisionError(
                f"still running after {timeout_seconds:g} s: {in_words(left)}; `relayctl stop` waits on,"
                " `relayctl stop --kill` kills what runs after its timeout"
            )
        for name, pid in left.items():
            if name != SUPERVISORD:
                send_signal(pid, signal.SIGKILL)
        for pid in wait_gone(left, time.monotonic() + KILLED_SECONDS).values():
            send_signal(pid, signal.SIGKILL)
        return [*hung, *left]

    def _end_programs(self, deadline: float) -> dict[str, int]:
        """Without a supervisord: has the workers end, then the development stack's servers, which they need.

        Those that run at the deadline, or have just been told.
        """
        left = self.processes()
        workers = {name: pid for name, pid in left.items() if is_worker(name)}
        for name, pid in workers.items():
            report = read_presence(self.state_dir, name, pid)
            if report is None or report.stage is not Stage.DRAINING:  # a second SIGTERM would cut here, too
                send_signal(pid, signal.SIGTERM)
        servers = {name: pid for name, pid in left.items() if name not in workers}
        if late := wait_gone(workers, deadline):
            return late | servers
        for pid in servers.values():
            send_signal(pid, signal.SIGTERM)
        return servers

    def begin_draining(self) -> None:
        """Asks all workers to stop at once; supervisord by itself would ask one after the other is gone."""
        for info in self._call("getAllProcessInfo"):
            if is_worker(info["name"]) and info["statename"] in LIVE_STATES:
                with contextlib.suppress(xmlrpc.client.Fault):  # it has just ended by itself
                    self._call("stopProcess", info["name"], False)

    def processes(self) -> dict[str, int]:
        """Whatever runs of this relay, as the kernel knows it: name and pid, ``supervisord`` first."""
        return processes(self.state_dir)

    def orphans(self) -> dict[str, int]:
        """The programs among them: those that run on when their supervisord does not."""
        return {name: pid for name, pid in self.processes().items() if name != SUPERVISORD}

    def _asked(self, method: str, *arguments: object) -> Any:
        """As ``_call``, for a relay that runs: raises ``SupervisionError`` when it does not, and ``Fault``."""
        try:
            return self._call(method, *arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.SHUTDOWN_STATE:
                raise SupervisionError(f"the relay in {self.state_dir} is being stopped") from fault
            raise
        except (OSError, xmlrpc.client.Error) as error:
            why = self.absence() or f"no relay runs in {self.state_dir}; `relayctl start` starts one"
            raise SupervisionError(why) from error

    def _call(self, method: str, *arguments: object) -> Any:
        """One call of supervisord's XML-RPC interface. Raises ``OSError`` and ``xmlrpc.client.Error``."""
        try:
            with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=_Transport(self._socket)) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except TimeoutError as error:
            pid = self.processes().get(SUPERVISORD) or "in supervisord.pid there"
            raise SupervisionError(
                f"the supervisord in {self.state_dir} (pid {pid}) hangs: it does not answer; if it stays so"
                " `relayctl stop --kill` ends it and its programs, then `relayctl start`"
            ) from error


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket; no wait in it is longer than ``RPC_SECONDS``."""

    def __init__(self, path: Path) -> None:
        super().__init__("127.0.0.1")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(RPC_SECONDS)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    """Supervisor's own can be given no time limit."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: tuple[str, dict[str, str]] | str) -> http.client.HTTPConnection:
        """As the base class does: kept, so that ``close`` finds it."""
        connection = _Connection(self._path)
        self._connection = (host, connection)
        return connection


def _working_directory(otherwise: Path) -> Path:
    """Where relayctl was called, so that relative paths in settings mean the same to the programs."""
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was deleted meanwhile
        return otherwise


def has_failed(status: ProgramStatus) -> bool:
    """Whether the program will not become ready without someone doing something."""
    return cannot_work(status) or (status.report is not None and status.report.has_given_up)


def cannot_work(status: ProgramStatus) -> bool:
    """Whether starting it again changes nothing: supervisord cannot, or it said so itself when it ended."""
    return status.state in FAILED_STATES or (status.report is not None and status.report.exit_code == EXIT_CONFIG)


def _locked(file: IO[str]) -> bool:
    """Whether the lock could be had; who only asks ``is_being_changed`` has it for a moment."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True
