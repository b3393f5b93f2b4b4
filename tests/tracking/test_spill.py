"""Lines by part: all come back, in order, wherever they waited."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tracking.spill import Spill

LINES = st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=30).map(lambda octets: octets.hex().encode())))


@given(LINES, st.integers(0, 100))
def test_all_lines_come_back_in_order(lines: list[tuple[int, bytes]], held_bytes: int) -> None:
    with Spill(3, held_bytes) as spill:
        for part, line in lines:
            spill.add(part, line)
        for part in range(3):
            expected = [line for where, line in lines if where == part]
            assert list(spill.take(part)) == expected
            assert list(spill.take(part)) == expected, "and once more"


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Spill(1, held_bytes=10) as spill:
        spill.add(0, b"x" * 100)
        opened = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if _is_open(each)]
        assert any(each.startswith(str(tmp_path)) for each in opened)
        assert list(tmp_path.iterdir()) == []


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with Spill(1, held_bytes=10) as spill, pytest.raises(OSError, match="File too large"):
            spill.add(0, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
