"""What a program tells about itself: one small JSON file in the state directory.

Works when NATS does not, which is when it is wanted. Written by the program whenever its state
changes, atomically; read by ``relayctl``, which believes it only when its pid is the one supervisord names. What could
not be written (a full disk) is written again, once a second, until it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import orjson

log = logging.getLogger("relay.process")


class Stage(StrEnum):
    """Where a program is in its life."""

    WAITING = "waiting"
    READY = "ready"
    DRAINING = "draining"


class Report(NamedTuple):
    """A program's presence as read back."""

    pid: int
    stage: Stage
    reason: str
    """What it waits for, one sentence."""
    has_given_up: bool
    """It goes on trying, but whoever started it should be told that it failed."""
    exit_code: int
    """With which it ended by its own decision; 0 while it runs."""
    lacking: dict[str, str]
    """The parts of ``reason`` by what is missing: ``nats``, ``smtp``, ``start``."""
    notes: dict[str, str]
    """What does not stop it from serving, e.g. ``tracking``: why it is off."""
    send_workers: int = 0
    """Of a send worker: how many it believes to share the sending rate with, itself included."""


class Presence:
    """The writing side. ``lacks`` and ``note`` may be called from any greenlet; they do not block."""

    def __init__(self, state_dir: Path, program: str) -> None:
        self._path = presence_path(state_dir, program)
        with contextlib.suppress(OSError):  # _write says what is wrong
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lacking: dict[str, str] = {"start": "starting"}
        self._notes: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._is_draining = False
        self._send_workers = 0
        self._exit_code = 0
        self._is_written = True
        self._version = 0
        self._write()

    def lacks(self, what: str, why: str, *, has_given_up: bool = False) -> None:
        """Says that ``what`` is missing for serving (``why``), or with '' that it no longer is.

        ``has_given_up`` stays said until it is there.
        """
        if why:
            self._lacking[what] = why
        else:
            self._lacking.pop(what, None)
            self._given_up.discard(what)
        if has_given_up:
            self._given_up.add(what)
        self._write()

    def note(self, what: str, why: str) -> None:
        """Says what serving goes on without, or with '' that it no longer does."""
        if why:
            self._notes[what] = why
        else:
            self._notes.pop(what, None)
        self._write()

    def shares(self, send_workers: int) -> None:
        """Says how many send workers share the sending rate, as far as this one knows."""
        self._send_workers = send_workers
        self._write()

    def failed(self, why: str, exit_code: int) -> None:
        """Says why the program ends now by its own decision: it cannot work like this."""
        self._exit_code = exit_code
        self.lacks("program", why, has_given_up=True)

    def draining(self) -> None:
        """Says that no more requests are taken."""
        self._is_draining = True
        self._write()

    def write_again(self, in_thread: Callable[[Callable[..., None], tuple[Any, ...]], object]) -> None:
        """Tries once more what could not be written; nothing to do when it was.

        ``in_thread`` calls a function with arguments and waits for its end, so that nobody else waits for the disk.
        """
        if self._is_written:
            return
        version = self._version
        try:
            in_thread(_replace, (self._path, self._path.with_suffix(".again"), self._content()))
        except OSError:
            return  # said when it began
        # What was written meanwhile may have been replaced with what was older.
        self._is_written = version == self._version
        if self._is_written:
            log.info("%s can be written again", self._path)

    @property
    def stage(self) -> Stage:
        """Where the program is now."""
        if self._is_draining:
            return Stage.DRAINING
        return Stage.WAITING if self._lacking else Stage.READY

    def _write(self) -> None:
        """Never raises: it is called from everywhere, and a full disk must not cost a mail or a connection."""
        self._version += 1
        try:
            _replace(self._path, self._path.with_suffix(".partial"), self._content())
        except OSError as error:
            if self._is_written:
                log.warning("cannot write %s, so relayctl does not see this program's state: %s", self._path, error)
            self._is_written = False
        else:
            self._is_written = True

    def _content(self) -> bytes:
        told = {
            "pid": os.getpid(),
            "stage": self.stage.value,
            "reason": "; ".join(self._lacking.values()),
            "has_given_up": bool(self._given_up),
            "exit_code": self._exit_code,
            "lacking": self._lacking,
            "notes": self._notes,
            "send_workers": self._send_workers,
        }
        return orjson.dumps(told)


def _replace(path: Path, partial: Path, content: bytes) -> None:
    """Whoever reads meanwhile gets the old or the new."""
    path.parent.mkdir(exist_ok=True)  # a full disk may have had no room for it either
    partial.write_bytes(content)
    partial.replace(path)


def presence_path(state_dir: Path, program: str) -> Path:
    """Where a program's presence is kept."""
    return state_dir / "run" / f"{program}.json"


def read_presence(state_dir: Path, program: str, pid: int) -> Report | None:
    """The presence of the program that runs as ``pid``; None when it has told nothing yet.

    With ``pid`` 0 (it does not run) the last word of one that ended by its own decision.
    """
    try:
        told = orjson.loads(presence_path(state_dir, program).read_bytes())
        report = Report(
            int(told["pid"]),
            Stage(told["stage"]),
            str(told["reason"]),
            bool(told["has_given_up"]),
            int(told["exit_code"]),
            dict(told["lacking"]),
            dict(told["notes"]),
            int(told.get("send_workers", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.pid == pid or (not pid and report.exit_code) else None
