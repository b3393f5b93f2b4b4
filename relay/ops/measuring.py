"""A worker's figures as a file in the state directory, ``run/<program>.figures``: written each second, and at the end.

Works when NATS does not, which is when it is wanted, and when a worker hangs: what it told last is still there. Owns
the file and its format; what is counted is ``readings``', what is shown of it ``metrics``'.

Counts go on where the file of the same program ended, also over an end by SIGKILL (which costs what was counted since
the last write), and a file stays when its worker is taken away: the sum over all files never falls. How things stand
(gauges) is believed only of a program that runs and has told it within ``FRESH_SECONDS``.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import gevent
import orjson
from gevent import get_hub
from gevent.event import Event

from relay.ops.catalogue import SERIES
from relay.ops.readings import Numbers, Reading

log = logging.getLogger("relay.process")

FORMAT: Final = 1
"""Of the file. Another one's files are not read."""
WRITE_SECONDS: Final = 1.0
STOP_SECONDS: Final = 2.0
FRESH_SECONDS: Final = 10.0
MAX_FILE_BYTES: Final = 262_144
MOST: Final = 2.0**63
"""What no honest count reaches."""
SUFFIX: Final = ".figures"


class Told(NamedTuple):
    """A histogram as it stands in a file."""

    bounds_seconds: tuple[float, ...]
    counts: tuple[float, ...]
    """As ``Histogram.counts``: not cumulative, one more than there are bounds."""
    sum_seconds: float


class Figures(NamedTuple):
    """A file as read back. Whatever stood in it: only series of the catalogue, each number finite and not negative."""

    program: str
    pid: int
    at: float
    """When it was written, on ``time.monotonic()``, which all processes of a machine share: the wall clock may jump."""
    starts: float
    """How often the program was started."""
    counters: dict[str, Numbers] = {}
    gauges: dict[str, Numbers] = {}
    histograms: dict[str, Told] = {}

    def is_fresh(self, now: float) -> bool:
        """Whether it was written a moment ago; what lies in the future was written before this machine was started."""
        return -1.0 < now - self.at <= FRESH_SECONDS


class Measuring:
    """The writing side: what a worker's parts give is added to what its predecessors had counted."""

    def __init__(self, state_dir: Path, program: str) -> None:
        """Writes the first file at once, so that also the start of a worker that gets no further is counted."""
        self._path = figures_path(state_dir, program)
        self._program = program
        try:
            before = read_figures(self._path)
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s cannot be read (%s): its counts begin anew", self._path, error)
            before = Figures(program, 0, 0.0, 0.0)
        self._before = before._replace(starts=before.starts + 1)
        self._reads: list[Callable[[], Reading]] = []
        self._also: list[Callable[[], None]] = []
        self._writing: gevent.Greenlet | None = None
        self._stop = Event()
        self._is_written = True
        self.write()

    def add(self, read: Callable[[], Reading]) -> None:
        """``read`` gives what some of the worker's parts have counted; it must not block."""
        self._reads.append(read)

    def also(self, do: Callable[[], None]) -> None:
        """``do`` is called after each writing, once a second: what else is to be written, it may wait for the disk."""
        self._also.append(do)

    def start(self) -> None:
        """Writes from now on."""
        self._writing = gevent.spawn(self._write_on)

    def stop(self) -> None:
        """Writes a last time. Blocks for ``STOP_SECONDS`` at most."""
        self._stop.set()
        if self._writing is not None:
            self._writing.join(STOP_SECONDS)

    def write(self) -> None:
        """Writes the file. Never raises: figures must not cost a mail."""
        try:
            content = self._content()
        except Exception:
            if self._is_written:
                log.exception("the figures of this worker cannot be told")
            self._is_written = False
            return
        try:
            # A disk that hangs must not hold up mail: only this greenlet waits for it.
            get_hub().threadpool.apply(_replace, (self._path, content))
        except OSError as error:
            if self._is_written:
                log.warning("cannot write %s, so /metrics does not see this worker: %s", self._path, error)
            self._is_written = False
        else:
            self._is_written = True

    def _write_on(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(WRITE_SECONDS)
            self.write()
            for do in self._also:
                do()

    def _content(self) -> bytes:
        before = self._before
        counters = {name: dict(numbers) for name, numbers in before.counters.items()}
        gauges: dict[str, Numbers] = {}
        histograms: dict[str, Any] = {name: told._asdict() for name, told in before.histograms.items()}
        for read in self._reads:
            reading = read()
            for name, numbers in reading.counters.items():
                total = counters.setdefault(name, {})
                for labels, number in numbers.items():
                    total[labels] = total.get(labels, 0) + number
            gauges |= reading.gauges
            for name, histogram in reading.histograms.items():
                counts: tuple[float, ...] = tuple(histogram.counts)
                sum_seconds = histogram.sum_seconds
                earlier = before.histograms.get(name)
                if earlier is not None and earlier.bounds_seconds == histogram.bounds_seconds:
                    counts = tuple(map(operator.add, counts, earlier.counts))
                    sum_seconds += earlier.sum_seconds
                histograms[name] = Told(histogram.bounds_seconds, counts, sum_seconds)._asdict()
        told = {
            "format": FORMAT,
            "program": self._program,
            "pid": os.getpid(),
            "at": time.monotonic(),
            "starts": before.starts,
            "counters": counters,
            "gauges": gauges,
            "histograms": histograms,
        }
        return orjson.dumps(told)


def _replace(path: Path, content: bytes) -> None:
    """Whoever reads meanwhile gets the old or the new."""
    partial = path.with_suffix(f"{SUFFIX}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def figures_path(state_dir: Path, program: str) -> Path:
    """Where a program's figures are kept."""
    return state_dir / "run" / f"{program}{SUFFIX}"


def read_figures(path: Path) -> Figures:
    """What stands in a file. Raises ``OSError`` when it cannot be read, ``ValueError`` when it is none of ours."""
    try:
        told = orjson.loads(_content_of(path))
        if told["format"] != FORMAT:
            raise ValueError(f"it has format {told['format']!r}")
        return Figures(
            program=path.name.removesuffix(SUFFIX),
            pid=int(_number(told["pid"])),
            at=_number(told["at"]),
            starts=_number(told["starts"]),
            counters=_metrics(told["counters"]),
            gauges=_metrics(told["gauges"]),
            histograms={name: _told(value) for name, value in told["histograms"].items() if name in SERIES},
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no file of figures: {error!r}") from error


def _content_of(path: Path) -> bytes:
    """Never waits, whatever lies there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return content


def _number(value: Any) -> float:
    """Of JSON's numbers those that can be counted. Raises ``ValueError``."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value < MOST:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _metrics(value: Any) -> dict[str, Numbers]:
    return {
        name: {labels: _number(number) for labels, number in numbers.items() if labels in known}
        for name, numbers in value.items()
        if (known := SERIES.get(name))
    }


def _told(value: Any) -> Told:
    bounds = tuple(_number(each) for each in value["bounds_seconds"])
    counts = tuple(_number(each) for each in value["counts"])
    if len(counts) != len(bounds) + 1 or list(bounds) != sorted(set(bounds)):
        raise ValueError("it holds a histogram that is none")
    return Told(bounds, counts, _number(value["sum_seconds"]))
