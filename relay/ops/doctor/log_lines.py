"""The programs' logs, summed up: which warnings and errors there were lately, how often; which programs ended.

Reads the end of each file only. What differs from line to line (numbers, ids) is taken out, so that a fault that fills
the log is one finding.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import orjson

from relay.tracking.record import parse_time

TAIL_BYTES = 4 * 1024 * 1024
"""Of each log; a busy worker writes so much in some minutes, and reading it takes some hundredths of a second."""
RECENT_SECONDS = 3600.0
BAD_LEVELS = frozenset({"warn", "error"})
MOST_CHARACTERS = 160
_BAD = tuple(f'"{level}"'.encode() for level in sorted(BAD_LEVELS))

_CHANGING = re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16,}\b|\d+(?:\.\d+)*")
_ENDED = re.compile(r"^(\S+ \S+),\d+ \w+ exited: (\S+) \((.+); (expected|not expected)\)")


class Said(NamedTuple):
    """A message that was logged."""

    level: str
    program: str
    text: str
    """Of the newest of its kind."""
    times: int


class Ended(NamedTuple):
    """A program that ended by itself, or was killed."""

    program: str
    times: int
    how: str
    """supervisord's words for the last time: ``exit status 1``, ``terminated by SIGKILL``."""


def covered_seconds(log_dir: Path, now: float) -> float:
    """How far back the ends of all logs reach that are read: an hour, or less where one of them is long."""
    covered = RECENT_SECONDS
    for path in log_dir.glob("*.log"):
        with contextlib.suppress(OSError, StopIteration):
            if path.stat().st_size > TAIL_BYTES:
                covered = min(covered, now - next(filter(None, map(_time_of, _tail(path)))))
    return covered


def bad_lines(log_dir: Path, now: float) -> list[Said]:
    """Warnings and errors of the last hour, the most frequent first, errors before warnings."""
    counts: Counter[tuple[str, str, str]] = Counter()
    newest: dict[tuple[str, str, str], str] = {}
    for path in sorted(log_dir.glob("*.log")):
        for line in _tail(path):
            if not any(level in line for level in _BAD):
                continue
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
                told = orjson.loads(line)
                at = parse_time(told["time"])
                if told["level"] not in BAD_LEVELS or at is None or now - at.timestamp() > RECENT_SECONDS:
                    continue
                text = " ".join(str(told["msg"]).split())
                kind = (told["level"], path.stem.rstrip("0123456789-"), _CHANGING.sub("#", text))
                counts[kind] += 1
                newest[kind] = text[:MOST_CHARACTERS]
    ranked = sorted(counts.items(), key=lambda each: (each[0][0] != "error", -each[1]))
    return [Said(kind[0], kind[1], newest[kind], count) for kind, count in ranked]


def ended(log_dir: Path, now: float) -> list[Ended]:
    """Programs that ended without being asked to in the last hour, as supervisord logged it."""
    counts: Counter[str] = Counter()
    how: dict[str, str] = {}
    for line in _tail(log_dir / "supervisord.log"):
        if (found := _ENDED.match(line.decode("utf-8", "replace"))) is None:
            continue
        when, program, manner, expected = found.groups()
        try:
            at = datetime.strptime(when, "%Y-%m-%d %H:%M:%S").timestamp()  # local time, as supervisord's
        except ValueError:
            continue
        if expected == "not expected" and now - at <= RECENT_SECONDS:
            counts[program] += 1
            how[program] = manner
    return [Ended(program, count, how[program]) for program, count in counts.most_common()]


def _time_of(line: bytes) -> float | None:
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
        at = parse_time(orjson.loads(line)["time"])
        return at.timestamp() if at is not None else None
    return None


def _tail(path: Path) -> Iterator[bytes]:
    """The lines at the end of a file; [] when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).splitlines()
    except OSError:
        return
    yield from lines if size <= TAIL_BYTES else lines[1:]
