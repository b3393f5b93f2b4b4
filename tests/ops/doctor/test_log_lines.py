"""Logs summed up, as the programs and supervisord write them."""

from __future__ import annotations

import time
from pathlib import Path

import orjson

from relay.ops.doctor.log_lines import RECENT_SECONDS, TAIL_BYTES, bad_lines, covered_seconds, ended
from relay.tracking.record import rfc3339


def line(at: float, level: str, msg: str) -> bytes:
    """One line as the programs log it."""
    told = {"time": f"{rfc3339(at)[:-1]}+00:00", "level": level, "program": "send-1", "msg": msg}
    return orjson.dumps(told) + b"\n"


def test_bad_lines_are_counted_by_what_they_say(tmp_path: Path) -> None:
    now = time.time()
    (tmp_path / "send-1.log").write_bytes(
        b"".join(
            [
                line(now - 7200, "error", "too old"),
                line(now - 60, "info", "relayed"),
                *(line(now - 60 + n, "warn", f"connection {n} lost after {n}.5 s") for n in range(30)),
                line(now - 5, "error", "the bus has died"),
                b"Traceback (most recent call last):\n",
                b'{"no":"line"}\n',
            ]
        )
    )
    (tmp_path / "send-2.log").write_bytes(line(now, "warn", "connection 31 lost after 31.5 s"))
    errors, warnings = bad_lines(tmp_path, now)
    assert errors == ("error", "send", "the bus has died", 1)
    assert warnings == ("warn", "send", "connection 31 lost after 31.5 s", 31)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    now = time.time()
    one = line(now, "warn", "x" * 1000)
    (tmp_path / "status.log").write_bytes(one * (2 * TAIL_BYTES // len(one)))
    (found,) = bad_lines(tmp_path, now)
    assert TAIL_BYTES // len(one) - 1 <= found.times <= TAIL_BYTES // len(one)


def test_how_far_back_the_end_of_a_long_log_reaches(tmp_path: Path) -> None:
    now = time.time()
    (tmp_path / "send-1.log").write_bytes(line(now - 7200, "info", "short"))
    assert covered_seconds(tmp_path, now) == RECENT_SECONDS
    lines = [line(now - 1000 + n / 10, "info", "x" * 1000) for n in range(10_000)]
    (tmp_path / "send-2.log").write_bytes(b"".join(lines))
    read = TAIL_BYTES // len(lines[0])
    assert read < 9000
    assert abs(covered_seconds(tmp_path, now) - read / 10) < 2
    # The same without a time that can be read
    (tmp_path / "send-3.log").write_bytes(b"no line\n" * TAIL_BYTES)
    assert abs(covered_seconds(tmp_path, now) - read / 10) < 2


def test_no_logs(tmp_path: Path) -> None:
    assert covered_seconds(tmp_path, time.time()) == RECENT_SECONDS
    assert bad_lines(tmp_path, time.time()) == []
    assert ended(tmp_path, time.time()) == []


def test_programs_that_ended(tmp_path: Path) -> None:
    now = time.time()

    def said(seconds_ago: float, text: str) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now - seconds_ago))},123 {text}\n"

    (tmp_path / "supervisord.log").write_text(
        said(7200, "WARN exited: send-2 (exit status 1; not expected)")
        + said(50, "WARN exited: send-1 (exit status 1; not expected)")
        + said(40, "INFO spawned: 'send-1' with pid 7")
        + said(30, "WARN exited: send-1 (terminated by SIGKILL; not expected)")
        + said(20, "INFO exited: status (exit status 0; expected)")
        + said(10, "INFO stopped: send-2 (exit status 0)")
    )
    (found,) = ended(tmp_path, now)
    assert found == ("send-1", 2, "terminated by SIGKILL")
