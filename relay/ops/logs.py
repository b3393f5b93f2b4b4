"""Logs: one JSON object a line, or text on a terminal; always to standard output.

supervisord keeps and rotates what each program writes. No addresses, no content, no secrets.
"""

from __future__ import annotations

import contextlib
import logging
import sys
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
    handler = _BatchHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("relay").setLevel(LEVELS[settings.log_level])


class _BatchHandler(logging.Handler):
    """Writes the lines of one turn of the event loop at once; an error, and what is left at the end, immediately."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

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
    fields = {name: value for name in EXTRA_FIELDS if (value := getattr(record, name, None)) not in (None, "")}
    if add_source:
        fields["source"] = f"{record.pathname}:{record.lineno}"
    return fields


class _JsonFormatter(logging.Formatter):
    def __init__(self, program: str, add_source: bool) -> None:
        super().__init__()
        self._program = program
        self._add_source = add_source

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
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
