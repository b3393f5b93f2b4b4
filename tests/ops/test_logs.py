"""Logs: one JSON object a line, or text."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from relay.ops.logs import frequent_line
from tests.support.relay_process import clean_environment

PROGRAM = """
import logging
from relay.ops.logs import start_logging
from relay.settings import load_settings
start_logging(load_settings(), "send-1")
log = logging.getLogger("relay.test")
log.info("mail relayed", extra={"email_id": "id-1", "outcome": "relayed", "reply_code": None})
log.debug("detail")
logging.getLogger("elsewhere").info("not ours")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a bug")
"""


FREQUENT = """
import logging, sys
import gevent
from relay.ops.logs import frequent_line, start_logging
from relay.settings import load_settings

class CountedWrites:
    count = 0
    def __init__(self, to): self.to = to; self.isatty = to.isatty; self.flush = to.flush
    def write(self, text): CountedWrites.count += 1; self.to.write(text)

NAMES = ("email_id", "group_id", "outcome", "compose_ms", "smtp_ms")
VALUES = [("id-1", "g", "relayed", 0.12, 3.0), ("id-2", 'ü "\\t', "relayed", 0.0, 10), ("id-3", "", None, 1.5, 0)]
if "early" in sys.argv: frequent = frequent_line(logging.getLogger("relay.test"), "mail relayed", NAMES)
start_logging(load_settings(), "send-1")
sys.stdout = CountedWrites(sys.stdout)
log = logging.getLogger("relay.test")
if "early" not in sys.argv: frequent = frequent_line(log, "mail relayed", NAMES)
for values in VALUES:
    frequent(*values); log.info("mail relayed", extra=dict(zip(NAMES, values)))
assert CountedWrites.count == 0
gevent.sleep(0)
log.warning("writes: %d", CountedWrites.count)
log.error("the last one")
"""


def logged(program: str = PROGRAM, *arguments: str, **settings: str) -> list[str]:
    """The lines that a process logs with these settings."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=clean_environment(settings), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_json() -> None:
    first, second = map(json.loads, logged())
    assert first["level"] == "info"
    assert first["program"] == "send-1"
    assert first["msg"] == "mail relayed"
    assert (first["email_id"], first["outcome"]) == ("id-1", "relayed")
    assert "reply_code" not in first
    assert first["time"].endswith("+00:00")
    assert second["level"] == "error"
    assert "ZeroDivisionError" in second["traceback"]


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("warn", 1), ("error", 1)])
def test_levels(level: str, count: int) -> None:
    assert len(logged(LOG_LEVEL=level)) == count


def test_source() -> None:
    assert json.loads(logged(LOG_ADD_SOURCE="true")[0])["source"].endswith(":7")


def test_text() -> None:
    lines = logged(LOG_FORMAT="text")
    assert "info  send-1     mail relayed email_id=id-1 outcome=relayed" in lines[0]
    assert lines[-1].startswith("ZeroDivisionError")


@pytest.mark.parametrize("source", ["true", "false"])
@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("when", ["early", "in time"])
def test_a_frequent_line_is_the_one_that_logging_writes(form: str, source: str, when: str) -> None:
    *lines, writes, _ = logged(FREQUENT, when, LOG_FORMAT=form, LOG_ADD_SOURCE=source)
    assert len(lines) == 6
    assert "writes: 1" in writes, "all that is logged in one turn is written at once"
    timeless = [re.sub(r'^\{"time":"[^"]+"|^[0-9:.]+', "", line) for line in lines]
    assert timeless[0::2] == timeless[1::2]
    assert len(set(timeless)) == 3
    assert ("<string>:" in timeless[0]) == (source == "true")
    if form == "json":
        times = [json.loads(line)["time"] for line in lines]
        assert times == sorted(times)
        assert all(datetime.fromisoformat(time).utcoffset() == timedelta(0) for time in times)


@pytest.mark.parametrize(("level", "count"), [("debug", 8), ("info", 8), ("warn", 2), ("error", 1)])
def test_a_frequent_line_has_the_level_info(level: str, count: int) -> None:
    assert len(logged(FREQUENT, LOG_LEVEL=level)) == count


def test_the_fields_of_a_frequent_line_stand_in_the_order_of_all_lines() -> None:
    with pytest.raises(ValueError, match="order"):
        frequent_line(logging.getLogger("relay.test"), "mail relayed", ("outcome", "email_id"))


def test_logging_in_this_process_is_left_alone() -> None:
    assert logging.getLogger("relay").level == logging.NOTSET
