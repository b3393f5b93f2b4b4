"""Logs: one JSON object a line, or text on a terminal; always to standard output.

supervisord keeps and rotates what each program writes. No addresses, no content, no secrets.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from gevent import get_hub

from relay.settings import Settings

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
LEVEL_WORDS = {number: word for word, number in LEVELS.items()}
EXTRA_FIELDS = (
    "email_id",
    "group_id",
    "sqs_message_id",
    "outcome",
    "reply_code",
    "compose_ms",
    "smtp_ms",
    "tracking_ms",
)


def start_logging(settings: Settings, program: str) -> None:
    """Sets up logging for this process, once, before anything logs."""
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stdout.isatty())
    formatter: logging.Formatter = (
        _TextFormatter(program, settings.log_add_source)
        if is_text
        else _JsonFormatter(program, settings.log_add_source)
    )
    # No line shows them, and asking for the thread makes a Thread object for every greenlet.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if not settings.log_add_source:
        logging._srcfile = None  # the documented way not to look for the caller of each line
    logging.setLogRecordFactory(_Record)
    handler = _BatchHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("relay").setLevel(LEVELS[settings.log_level])


class _Record(logging.LogRecord):
    """A log record without what no line shows (process, thread, module), which is half of what making one costs."""

    def __init__(  # the signature is logging's
        self,
        name: str,
        level: int,
        pathname: str,
        lineno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        sinfo: str | None = None,
        **_: object,
    ) -> None:
        self.name = name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.pathname = pathname
        self.lineno = lineno
        self.msg = msg
        # A single mapping is for "%(name)s": LogRecord's own rule.
        self.args = args[0] if args and len(args) == 1 and isinstance(args[0], Mapping) and args[0] else args
        self.exc_info = exc_info
        self.exc_text = None
        self.stack_info = sinfo
        self.funcName = func  # type: ignore[assignment]
        self.created = time.time()
        self.msecs = self.created % 1 * 1000


class _BatchHandler(logging.Handler):
    """Writes the lines of one turn of the event loop at once; an error, and what is left at the end, immediately."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def createLock(self) -> None:
        """None: there is one thread, and no greenlet switches in ``emit``."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        if record.levelno >= logging.ERROR:
            self.flush()
        elif len(self._lines) == 1:
            get_hub().loop.run_callback(self.flush)

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                sys.stdout.write("\n".join(lines) + "\n")
                sys.stdout.flush()


def _fields(record: logging.LogRecord, add_source: bool) -> dict[str, Any]:
    told = record.__dict__
    fields = {name: told[name] for name in EXTRA_FIELDS if name in told and told[name] is not None and told[name] != ""}
    if add_source:
        fields["source"] = f"{record.pathname}:{record.lineno}"
    return fields


class _JsonFormatter(logging.Formatter):
    def __init__(self, program: str, add_source: bool) -> None:
        super().__init__()
        self._program = program
        self._add_source = add_source
        self._second = -1
        self._second_text = ""

    def _time(self, record: logging.LogRecord) -> str:
        """RFC 3339, UTC. Of the many lines of one second only the milliseconds differ."""
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._second_text}.{int(record.msecs):03d}+00:00"

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self._time(record),
            "level": LEVEL_WORDS.get(record.levelno, record.levelname.lower()),
            "program": self._program,
            "msg": record.getMessage(),
            **_fields(record, self._add_source),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode("utf-8", "replace")


class _TextFormatter(logging.Formatter):
    def __init__(self, program: str, add_source: bool) -> None:
        super().__init__()
        self._program = program
        self._add_source = add_source

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        level = LEVEL_WORDS.get(record.levelno, record.levelname.lower())
        fields = "".join(f" {name}={value}" for name, value in _fields(record, self._add_source).items())
        text = f"{clock} {level:<5} {self._program:<10} {record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
