"""This host, as far as starting and stopping must know it: which ports are free, which processes run or have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from relay.ops.arrangement import SupervisionError

PROC = Path("/proc")
SUPERVISORD = "supervisord"


def processes(state_dir: Path) -> dict[str, int]:
    """Whatever runs of the relay of this directory: name and pid, supervisord first.

    Told by the command lines, which name files of the directory. What is written there (pids) does not tell: the
    directory may be a copy, and a pid may be somebody else's by now.
    """
    pids = [int(each.name) for each in PROC.glob("[0-9]*")]
    found: dict[str, int] = {}
    supervisord = written_pid(state_dir)
    # What it has just forked has its command line for a moment.
    for pid in sorted(pids, key=lambda pid: (pid != supervisord, pid)):
        if name := _program_of(pid, state_dir):
            found.setdefault(name, pid)
    order = sorted(found, key=lambda name: (name != SUPERVISORD, name))
    return {name: found[name] for name in order}


def written_pid(state_dir: Path) -> int:
    """What supervisord has written of itself; 0 when there is nothing."""
    try:
        return int((state_dir / "supervisord.pid").read_text())
    except (OSError, ValueError):
        return 0


def _program_of(pid: int, state_dir: Path) -> str:
    """Its name, '' when it is none of that directory's relay."""
    try:
        words = [os.fsdecode(word) for word in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")]
    except OSError:
        return ""
    name = _named(words, pid, state_dir)
    return name if name and _means(pid, state_dir) else ""


def _named(words: list[str], pid: int, state_dir: Path) -> str:
    if "supervisor.supervisord" in words and str(state_dir / "supervisord.conf") in words:
        return SUPERVISORD
    if Path(words[0]).name == "nats-server" and words[1:3] == ["-c", str(state_dir / "nats" / "nats.conf")]:
        return "nats"
    for option, module, name, path in zip(words, words[1:], words[2:], [*words[3:], ""], strict=False):
        if option == "-m" and module == "workers.catcher":  # it is given no settings
            return name if os.fsencode(f"RELAY_STATE_DIR={state_dir}") in _environment(pid) else ""
        if option == "-m" and module.startswith("workers."):
            return name if Path(path).parent == state_dir / "settings" else ""
    return ""


def _environment(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _means(pid: int, state_dir: Path) -> bool:
    """Whether the directory is the same to that process, which may be in a container with one of that name."""
    if not state_dir.exists():
        return True
    try:
        return os.path.samefile(f"{PROC}/{pid}/root{state_dir}", state_dir)
    except FileNotFoundError:
        return False
    except OSError:  # it is another user's
        return True


def send_signal(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended meanwhile. Raises ``SupervisionError``: not allowed."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, number)
        except PermissionError as error:
            raise SupervisionError(f"this user may not end pid {pid}; say it as the user whose relay it is") from error


def wait_gone(pids: dict[str, int], deadline: float) -> dict[str, int]:
    """Blocks until they have ended, until the deadline at most; those that have not."""
    while left := {name: pid for name, pid in pids.items() if _is_alive(pid)}:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return {}


def in_words(pids: dict[str, int]) -> str:
    """Programs and their pids in one line."""
    return ", ".join(f"{name} pid {pid}" for name, pid in pids.items())


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


def is_listening(port: int) -> bool:
    """Whether something listens on the port of 127.0.0.1."""
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
