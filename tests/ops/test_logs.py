"""Logs: one JSON object a line, or text."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

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


def logged(**settings: str) -> list[str]:
    """The lines that a process logs with these settings."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean_environment(settings), capture_output=True, text=True, check=True
    )
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


def test_logging_in_this_process_is_left_alone() -> None:
    assert logging.getLogger("relay").level == logging.NOTSET
