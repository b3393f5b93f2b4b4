"""This host, as far as starting and stopping must know it: which ports are free, which processes have ended."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from relay.ops.arrangement import SupervisionError


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
