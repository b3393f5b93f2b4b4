"""What a program tells about itself: one small JSON file in the state directory.

Works when NATS does not, which is when it is wanted. Written by the program whenever its state
changes, atomically; read by ``relayctl``, which believes it only when its pid is the one supervisord names.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import orjson


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
    notes: dict[str, str]
    """What does not stop it from serving, e.g. ``tracking``: why it is off."""


class Presence:
    """The writing side. ``lacks`` and ``note`` may be called from any greenlet; they do not block."""

    def __init__(self, state_dir: Path, program: str) -> None:
        self._path = presence_path(state_dir, program)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lacking: dict[str, str] = {"start": "starting"}
        self._notes: dict[str, str] = {}
        self._has_given_up = False
        self._is_draining = False
        self._since = time.time()
        self._write()

    def lacks(self, what: str, why: str, *, has_given_up: bool = False) -> None:
        """Says that ``what`` is missing for serving (``why``), or with '' that it no longer is."""
        if why:
            self._lacking[what] = why
        else:
            self._lacking.pop(what, None)
        self._has_given_up = has_given_up
        self._write()

    def note(self, what: str, why: str) -> None:
        """Says what serving goes on without, or with '' that it no longer does."""
        if why:
            self._notes[what] = why
        else:
            self._notes.pop(what, None)
        self._write()

    def draining(self) -> None:
        """Says that no more requests are taken."""
        self._is_draining = True
        self._write()

    @property
    def stage(self) -> Stage:
        """Where the program is now."""
        if self._is_draining:
            return Stage.DRAINING
        return Stage.WAITING if self._lacking else Stage.READY

    def _write(self) -> None:
        told = {
            "pid": os.getpid(),
            "stage": self.stage.value,
            "reason": "; ".join(self._lacking.values()),
            "has_given_up": self._has_given_up and bool(self._lacking),
            "notes": self._notes,
            "since": self._since,
        }
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(orjson.dumps(told))
        partial.replace(self._path)


def presence_path(state_dir: Path, program: str) -> Path:
    """Where a program's presence is kept."""
    return state_dir / "run" / f"{program}.json"


def read_presence(state_dir: Path, program: str, pid: int) -> Report | None:
    """The presence of the program that runs as ``pid``; None when it has told nothing yet."""
    try:
        told = orjson.loads(presence_path(state_dir, program).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    if told.get("pid") != pid:
        return None
    return Report(pid, Stage(told["stage"]), told["reason"], bool(told["has_given_up"]), dict(told["notes"]))
