"""A worker's file of figures: what it says, what goes on after a restart, and what may lie there instead."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import orjson
import pytest

from relay.histogram import BOUNDS_SECONDS, Histogram
from relay.ops.measuring import FRESH_SECONDS, MAX_FILE_BYTES, Figures, Measuring, figures_path, read_figures
from relay.ops.readings import Reading

RELAYED = "relay_requests_total"
SECONDS = "relay_send_duration_seconds"


class Parts:
    """Something that counts."""

    def __init__(self) -> None:
        self.relayed = 0
        self.busy = 0
        self.seconds = Histogram()

    def read(self) -> Reading:
        return Reading(
            {RELAYED: {"relayed": self.relayed}},
            {"relay_smtp_connections": {"busy": self.busy}},
            {SECONDS: self.seconds},
        )

    def relay(self, seconds: float) -> None:
        self.relayed += 1
        self.seconds.observe(seconds)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory as a program finds it."""
    (tmp_path / "run").mkdir()
    return tmp_path


def started(state_dir: Path) -> tuple[Parts, Measuring]:
    """A program with its parts."""
    parts, measuring = Parts(), Measuring(state_dir, "send-1")
    measuring.add(parts.read)
    return parts, measuring


def told(state_dir: Path) -> Figures:
    return read_figures(figures_path(state_dir, "send-1"))


def test_what_was_counted_can_be_read(state_dir: Path) -> None:
    parts, measuring = started(state_dir)
    parts.relay(0.003)
    parts.relay(60)
    parts.busy = 4
    measuring.write()
    figures = told(state_dir)
    assert (figures.program, figures.pid, figures.starts) == ("send-1", os.getpid(), 1)
    assert figures.counters == {RELAYED: {"relayed": 2}}
    assert figures.gauges == {"relay_smtp_connections": {"busy": 4}}
    histogram = figures.histograms[SECONDS]
    assert histogram.bounds_seconds == BOUNDS_SECONDS
    assert histogram.counts == (0, 0, 1, *[0] * (len(BOUNDS_SECONDS) - 3), 1)
    assert histogram.sum_seconds == pytest.approx(60.003)
    assert figures.is_fresh(time.monotonic())


def test_counts_go_on_where_the_last_program_of_that_name_ended(state_dir: Path) -> None:
    for _ in range(3):
        parts, measuring = started(state_dir)
        parts.relay(0.003)
        parts.busy = 1
        measuring.write()
        measuring.write()  # the same once more: nothing is counted twice
    figures = told(state_dir)
    assert figures.starts == 3
    assert figures.counters == {RELAYED: {"relayed": 3}}
    assert figures.gauges == {"relay_smtp_connections": {"busy": 1}}
    assert sum(figures.histograms[SECONDS].counts) == 3
    assert figures.histograms[SECONDS].sum_seconds == pytest.approx(0.009)


def test_a_start_is_counted_before_anything_else(state_dir: Path) -> None:
    Measuring(state_dir, "send-1")
    Measuring(state_dir, "send-1")
    assert told(state_dir).starts == 2


def test_counts_that_are_not_counted_any_more_are_kept(state_dir: Path) -> None:
    parts, measuring = started(state_dir)
    parts.relay(0.003)
    measuring.write()
    Measuring(state_dir, "send-1")
    figures = told(state_dir)
    assert figures.counters == {RELAYED: {"relayed": 1}}
    assert sum(figures.histograms[SECONDS].counts) == 1
    assert figures.gauges == {}


def test_it_is_written_once_a_second_and_at_the_end(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ops.measuring.WRITE_SECONDS", 0.01)
    parts, measuring = started(state_dir)
    measuring.start()
    parts.relay(0.003)
    with gevent.Timeout(5):
        while told(state_dir).counters != {RELAYED: {"relayed": 1}}:
            gevent.sleep(0.01)
    monkeypatch.setattr("relay.ops.measuring.WRITE_SECONDS", 60)
    gevent.sleep(0.05)
    parts.relay(0.003)
    measuring.stop()
    assert told(state_dir).counters == {RELAYED: {"relayed": 2}}


def test_a_disk_that_hangs_holds_nobody_up(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ops.measuring.WRITE_SECONDS", 0.01)
    monkeypatch.setattr("relay.ops.measuring.STOP_SECONDS", 0.2)
    _, measuring = started(state_dir)
    partial = figures_path(state_dir, "send-1").with_suffix(".figures.partial")
    os.mkfifo(partial)  # opening it for writing waits until somebody reads
    measuring.start()
    begun = time.monotonic()
    gevent.sleep(0.1)
    measuring.stop()
    assert time.monotonic() - begun < 2
    with partial.open("rb") as reader:
        assert reader.read(), "the thread goes on"


@pytest.mark.parametrize(
    ("age_seconds", "is_fresh"), [(0, True), (FRESH_SECONDS - 1, True), (FRESH_SECONDS + 1, False), (-3600, False)]
)
def test_how_long_gauges_are_believed(age_seconds: float, is_fresh: bool) -> None:
    assert Figures("send-1", 1, 10_000 - age_seconds, 1).is_fresh(10_000) is is_fresh


def test_a_directory_that_cannot_be_written_costs_nothing_but_the_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measuring = Measuring(tmp_path, "send-1")  # there is no run/
    measuring.write()
    assert [record.message for record in caplog.records if "/metrics does not see this worker" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    (tmp_path / "run").mkdir()
    measuring.write()
    assert told(tmp_path).starts == 1


def test_a_part_that_fails_costs_nothing_but_the_figures(state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts, measuring = started(state_dir)
    parts.relay(0.003)
    measuring.write()
    measuring.add(lambda: Reading({}, {}, {SECONDS: None}))  # type: ignore[dict-item]
    measuring.write()
    measuring.write()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert told(state_dir).counters == {RELAYED: {"relayed": 1}}


def _valid(**changes: object) -> bytes:
    whole = {"format": 1, "pid": 1, "at": 1.5, "starts": 1, "counters": {}, "gauges": {}, "histograms": {}}
    return orjson.dumps(whole | changes)


def _histogram(**changes: object) -> dict[str, object]:
    return {SECONDS: {"bounds_seconds": [1, 2], "counts": [0, 0, 0], "sum_seconds": 0} | changes}


BROKEN = {
    "empty": b"",
    "half": _valid()[:-9],
    "no JSON": b"\xff\x00\xfe" * 100,
    "a list": b"[]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "another format": _valid(format=2),
    "no format": b"{}",
    "too large": _valid() + b" " * MAX_FILE_BYTES,
    "pid a word": _valid(pid="1"),
    "pid negative": _valid(pid=-1),
    "counters a list": _valid(counters=[]),
    "counts a list": _valid(counters={RELAYED: [1]}),
    "count a word": _valid(counters={RELAYED: {"relayed": "1"}}),
    "count null": _valid(counters={RELAYED: {"relayed": None}}),
    "count negative": _valid(counters={RELAYED: {"relayed": -1}}),
    "count huge": _valid(counters={RELAYED: {"relayed": 2**63}}),
    "count infinite": _valid(counters={RELAYED: {"relayed": 7}}).replace(b"7", b"1e999"),
    "histogram null": _valid(histograms={SECONDS: None}),
    "histogram short": _valid(histograms=_histogram(counts=[0, 0])),
    "histogram negative": _valid(histograms=_histogram(counts=[0, -1, 0])),
    "bounds not rising": _valid(histograms=_histogram(bounds_seconds=[2, 1])),
    "bounds twice": _valid(histograms=_histogram(bounds_seconds=[1, 1])),
    "sum a list": _valid(histograms=_histogram(sum_seconds=[])),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_file_of_figures(content: bytes, state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    figures_path(state_dir, "send-1").write_bytes(content)
    with pytest.raises(ValueError):
        told(state_dir)
    # A worker that finds it there begins anew.
    parts, measuring = started(state_dir)
    parts.relay(0.003)
    measuring.write()
    assert told(state_dir).counters == {RELAYED: {"relayed": 1}}
    assert "its counts begin anew" in caplog.text


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _link_to_itself], ids=["pipe", "directory", "link"])
def test_what_is_no_file_does_not_hold_anybody_up(make: Callable[[Path], None], state_dir: Path) -> None:
    make(figures_path(state_dir, "send-1"))
    with pytest.raises((OSError, ValueError)):
        told(state_dir)


def test_series_that_the_catalogue_does_not_have_are_left_out(state_dir: Path) -> None:
    content = _valid(
        counters={RELAYED: {"relayed": 1, "of another version": 2, "": 3}, "no_metric_of_ours": {"": 1}},
        histograms={"no_metric_of_ours": 1},
    )
    figures_path(state_dir, "send-1").write_bytes(content)
    assert told(state_dir).counters == {RELAYED: {"relayed": 1}}
    assert told(state_dir).histograms == {}
