"""The catcher: an SMTP server that takes every mail and keeps it as a file. For development only.

Each mail is ``caught/<number>.eml``, the content byte for byte, beside ``<number>.json`` with its envelope.
The newest ``KEEP`` are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

KEEP = 1000


class CaughtMail(NamedTuple):
    """A mail as the catcher got it."""

    number: int
    reverse_path: str
    forward_paths: list[str]
    caught_at: float
    content: bytes


class Catcher:
    """Listens until ``stop``. Not a greenlet: aiosmtpd runs in a thread of its own."""

    def __init__(self, directory: Path, port: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._number = max(_numbers(directory), default=0)
        self._controller = Controller(self, hostname="127.0.0.1", port=port, enable_SMTPUTF8=True)

    def start(self) -> None:
        """Starts listening. Raises ``OSError`` when the port is taken."""
        self._controller.start()

    def stop(self) -> None:
        """Stops listening."""
        self._controller.stop()

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        """aiosmtpd's hook: keeps the mail, answers the final dot."""
        self._number += 1
        number = self._number
        told = {
            "reverse_path": envelope.mail_from,
            "forward_paths": envelope.rcpt_tos,
            "caught_at": time.time(),
        }
        content = envelope.original_content or b""
        _path(self._directory, number, "eml").write_bytes(content)
        partial = _path(self._directory, number, "partial")
        partial.write_bytes(orjson.dumps(told))
        partial.replace(_path(self._directory, number, "json"))
        for suffix in ("json", "eml"):
            _path(self._directory, number - KEEP, suffix).unlink(missing_ok=True)
        return f"250 2.0.0 Ok: queued as {number:06d}"


def caught_mails(directory: Path) -> Iterator[CaughtMail]:
    """What the catcher holds, oldest first."""
    for number in sorted(_numbers(directory)):
        try:
            told: dict[str, Any] = orjson.loads(_path(directory, number, "json").read_bytes())
            content = _path(directory, number, "eml").read_bytes()
        except FileNotFoundError:  # dropped meanwhile, to make room
            continue
        yield CaughtMail(number, told["reverse_path"], told["forward_paths"], told["caught_at"], content)


def _numbers(directory: Path) -> list[int]:
    return [int(path.stem) for path in directory.glob("*.json") if path.stem.isdigit()]


def _path(directory: Path, number: int, suffix: str) -> Path:
    return directory / f"{number:06d}.{suffix}"
