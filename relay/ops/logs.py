"""Logs: one JSON object a line, or text on a terminal; always to standard output.

supervisord keeps and rotates what each program writes. No addresses, no content, no secrets.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import orjson
from gevent import get_hub

from relay.settings import Settings
from relay.tracking.record import rfc3339

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
    "trace_id",
    "span_id",
)


def start_logging(settings: Settings, program: str) -> None:
    """Sets up logging for this process, once, before anything logs."""
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stdout.isatty())
    formatter = _Formatter(_text_line if is_text else _json_line, program, settings.log_add_source)
    # No line shows them, and asking for the thread makes a Thread object for every greenlet.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if not settings.log_add_source:
        logging._srcfile = None  # the documented way not to look for the caller of each line
    logging.setLogRecordFactory(_Record)
    root = logging.getLogger()
    root.handlers[:] = [_BatchHandler(formatter)]
    root.setLevel(logging.WARNING)
    logging.getLogger("relay").setLevel(LEVELS[settings.log_level])


def frequent_line(log: logging.Logger, message: str, names: tuple[str, ...]) -> Callable[..., None]:
    """``log.info(message, extra={name: value, …})`` as a function of the values: for a line that every mail writes.

    It writes the same line into the same batch at a third of the cost, since what is the same for all of them (whether
    they are shown, by which handler, in which form) is looked up once, here: call it after ``start_logging``. Without
    that, or where lines show their source, it is no more than a short form. ``names`` in the order of ``EXTRA_FIELDS``.
    """
    if names != tuple(name for name in EXTRA_FIELDS if name in names):
        raise ValueError("the fields of a line stand in the order of EXTRA_FIELDS")
    handler = next((each for each in logging.getLogger().handlers if isinstance(each, _BatchHandler)), None)
    if handler is None or handler.lines.add_source:

        def log_as_any_other(*values: object) -> None:
            log.info(message, extra=dict(zip(names, values, strict=True)), stacklevel=2)

        return log_as_any_other

    if not log.isEnabledFor(logging.INFO):
        return lambda *_: None
    line, program, write = handler.lines.line, handler.lines.program, handler.write
    level = LEVEL_WORDS[logging.INFO]

    def log_at_once(*values: object) -> None:
        fields = dict(zip(names, values, strict=True))
        if "" in values or None in values:
            fields = _shown(fields)
        write(line(program, time.time(), level, message, fields, ""))

    return log_at_once


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


_Line = Callable[[str, float, str, str, dict[str, object], str], str]
"""One line, from the program, the epoch time, the level's word, the message, the fields that it shows and what stands
below it, such as a traceback."""


def _json_line(program: str, at: float, level: str, message: str, fields: dict[str, object], traceback: str) -> str:
    line = {"time": f"{rfc3339(at)[:-1]}+00:00", "level": level, "program": program, "msg": message, **fields}
    if traceback:
        line["traceback"] = traceback
    return orjson.dumps(line, default=str).decode("utf-8", "replace")


def _text_line(program: str, at: float, level: str, message: str, fields: dict[str, object], traceback: str) -> str:
    clock = datetime.fromtimestamp(at).strftime("%H:%M:%S.%f")[:-3]
    shown = "".join(f" {name}={value}" for name, value in fields.items())
    line = f"{clock} {level:<5} {program:<10} {message}{shown}"
    return f"{line}\n{traceback}" if traceback else line


def _shown(fields: Mapping[str, object]) -> dict[str, object]:
    """Those that say something."""
    return {name: fields[name] for name in EXTRA_FIELDS if fields.get(name) is not None and fields[name] != ""}


class _Formatter(logging.Formatter):
    def __init__(self, line: _Line, program: str, add_source: bool) -> None:
        super().__init__()
        self.line = line
        self.program = program
        self.add_source = add_source

    def format(self, record: logging.LogRecord) -> str:
        fields = _shown(record.__dict__)
        if self.add_source:
            fields["source"] = f"{record.pathname}:{record.lineno}"
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        level = LEVEL_WORDS.get(record.levelno, record.levelname.lower())
        return self.line(self.program, record.created, level, record.getMessage(), fields, traceback)


class _BatchHandler(logging.Handler):
    """Writes the lines of one turn of the event loop at once; an error, and what is left at the end, immediately."""

    def __init__(self, lines: _Formatter) -> None:
        super().__init__()
        self.setFormatter(lines)
        self.lines = lines
        self._waiting: list[str] = []

    def createLock(self) -> None:
        """None: there is one thread, and no greenlet switches in ``emit``."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._waiting.append(self.format(record))
            self.flush()
        else:
            self.write(self.format(record))

    def write(self, line: str) -> None:
        """Puts one line into the batch, as it is."""
        self._waiting.append(line)
        if len(self._waiting) == 1:
            get_hub().loop.run_callback(self.flush)

    def flush(self) -> None:
        if self._waiting:
            lines, self._waiting = self._waiting, []
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                sys.stdout.write("\n".join(lines) + "\n")
                sys.stdout.flush()
