"""The page of metrics, made of files: sums that never fall, gauges of who runs, and Prometheus's rules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.histogram import BOUNDS_SECONDS
from relay.ops import metrics as metrics_module
from relay.ops.catalogue import ALL, OUTCOMES, Merge, Type
from relay.ops.measuring import FRESH_SECONDS, figures_path
from relay.ops.metrics import MAX_FILES, Metrics
from relay.ops.presence import Presence, presence_path
from tests.support.promtool import promtool

Numbers = dict[tuple[str, ...], float]
NewProcess = Callable[..., int]


def numbers(page: bytes) -> dict[str, Numbers]:
    """Every sample: by name and label values."""
    found: dict[str, Numbers] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            series = tuple(value for _, value in sorted(sample.labels.items()))
            assert series not in found.setdefault(sample.name, {}), sample
            found[sample.name][series] = sample.value
    return found


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory."""
    (tmp_path / "run").mkdir()
    return tmp_path


@pytest.fixture
def metrics(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """A page that is made anew each time."""
    monkeypatch.setattr(metrics_module, "PAGE_SECONDS", 0.0)
    return Metrics(state_dir)


@pytest.fixture
def new_process() -> Iterator[NewProcess]:
    """Starts processes that look like workers; their pids."""
    made: list[subprocess.Popen[bytes]] = []

    def start(program: str = "send-1") -> int:
        code = "import signal; print(flush=True); signal.pause()"
        words = [f"workers.{program.partition('-')[0]}", program]
        made.append(subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE))
        assert made[-1].stdout is not None
        made[-1].stdout.readline()
        return made[-1].pid

    yield start
    for process in made:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def tell(state_dir: Path, program: str, pid: int, *, age_seconds: float = 0, **told: Any) -> None:
    """Writes a program's file."""
    whole = {
        "format": 1,
        "pid": pid,
        "at": time.monotonic() - age_seconds,
        "starts": 1,
        "counters": {},
        "gauges": {},
        "histograms": {},
    }
    figures_path(state_dir, program).write_bytes(orjson.dumps(whole | told))


def be_present(state_dir: Path, program: str, pid: int, stage: str) -> None:
    """Writes a program's presence."""
    presence = Presence(state_dir, program)
    if stage != "waiting":
        presence.lacks("start", "")
    if stage == "draining":
        presence.draining()
    path = presence_path(state_dir, program)
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {"pid": pid}))


def relayed(count: float) -> dict[str, dict[str, float]]:
    return {"relay_requests_total": {"relayed": count}}


def test_prometheus_has_nothing_against_the_page(metrics: Metrics, state_dir: Path, new_process: NewProcess) -> None:
    pid = new_process()
    tell(state_dir, "send-1", pid, counters=relayed(1))
    done = promtool("check", "metrics", stdin=metrics.page().decode())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, "a lint of promtool's"


def test_the_page_has_the_catalogue_and_nothing_else(metrics: Metrics) -> None:
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(metrics.page().decode())
    }
    assert set(families) == {metric.name for metric in ALL}
    for metric in ALL:
        assert families[metric.name].type == metric.type
        assert families[metric.name].documentation == metric.help
        for sample in families[metric.name].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_every_series_is_there_before_anything_happens(metrics: Metrics) -> None:
    """Or the first failure of a relay would be no rise."""
    found = numbers(metrics.page())
    assert found["relay_requests_total"] == {(outcome,): 0 for outcome in OUTCOMES}
    for metric in ALL:
        if metric.type is Type.COUNTER and metric.labels != ("program",):
            assert len(found[metric.name]) == len(list(metric.series())), metric.name
    assert found["relay_send_duration_seconds_count"] == {(): 0}
    assert "relay_sqs_queue_messages" not in found, "what is not known is not 0"
    assert [metric.name for metric in ALL if metric.merge is not Merge.SUM and metric.name in found] == []


@pytest.mark.parametrize("metric", ALL, ids=[metric.name for metric in ALL])
def test_names_keep_prometheus_rules(metric: Any) -> None:
    assert metric.name.startswith("relay_")
    assert metric.name.endswith("_total") is (metric.type is Type.COUNTER)
    assert metric.type is not Type.HISTOGRAM or metric.name.endswith("_seconds")
    assert "milli" not in metric.name
    assert not metric.name.endswith(("_ms", "_count", "_sum", "_bucket"))
    assert metric.help.endswith(".")
    assert len(metric.values) == len(metric.labels) or metric.labels in {("program",), ("version", "python")}
    assert all(len(values) == len(set(values)) <= 12 for values in metric.values), "few values a label"


def test_counters_are_added_up_over_everybody_who_ever_counted(
    metrics: Metrics, state_dir: Path, new_process: NewProcess
) -> None:
    tell(state_dir, "send-1", new_process(), counters=relayed(5))
    tell(state_dir, "send-2", new_process("send-2"), age_seconds=60, counters=relayed(7))  # it hangs
    tell(state_dir, "send-9", 2**22 + 1, age_seconds=30, counters=relayed(11))  # taken away long ago
    assert numbers(metrics.page())["relay_requests_total"]["relayed",] == 23


def test_histograms_are_added_up_and_cumulative(metrics: Metrics, state_dir: Path) -> None:
    name = "relay_send_duration_seconds"
    counts = [0] * (len(BOUNDS_SECONDS) + 1)
    counts[0], counts[2], counts[-1] = 3, 4, 1
    for program in ("send-1", "send-2"):
        told = {name: {"bounds_seconds": BOUNDS_SECONDS, "counts": counts, "sum_seconds": 61.5}}
        tell(state_dir, program, 1, histograms=told)
    # Of a version with other bounds: it cannot be added.
    tell(state_dir, "send-3", 1, histograms={name: {"bounds_seconds": [1], "counts": [5, 5], "sum_seconds": 9}})
    found = numbers(metrics.page())
    buckets = found[f"{name}_bucket"]
    assert (buckets["0.001",], buckets["0.0025",], buckets["0.005",], buckets["30.0",]) == (6, 6, 14, 14)
    assert buckets["+Inf",] == found[f"{name}_count"][()] == 16
    assert found[f"{name}_sum"][()] == 123


def test_gauges_are_those_of_who_runs_and_tells(metrics: Metrics, state_dir: Path, new_process: NewProcess) -> None:
    gauges = {"relay_smtp_connections": {"busy": 3, "idle": 1}, "relay_smtp_circuit_open_workers": {"": True}}
    dead = new_process("send-5")
    os.kill(dead, signal.SIGKILL)  # and nobody has waited for it: its pid is still there
    tell(state_dir, "send-1", new_process(), gauges=gauges)
    tell(state_dir, "send-2", new_process("send-2"), gauges=gauges)
    tell(state_dir, "send-3", new_process("send-3"), age_seconds=FRESH_SECONDS + 1, gauges=gauges)
    tell(state_dir, "send-4", os.getpid(), gauges=gauges)  # a pid that has become another's
    tell(state_dir, "send-5", dead, gauges=gauges)
    tell(state_dir, "send-6", new_process("status"), gauges=gauges)
    # One that was taken away, and whose pid has become another worker's: as in a container that was made anew
    tell(state_dir, "send-7", new_process("send-8"), age_seconds=FRESH_SECONDS + 1, gauges=gauges)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{dead}/cmdline").read_bytes():
        assert time.monotonic() < deadline
    found = numbers(metrics.page())
    assert found["relay_smtp_connections"] == {("busy",): 6, ("idle",): 2, ("dialling",): 0}
    assert found["relay_smtp_circuit_open_workers"] == {(): 2}
    assert set(found["relay_process_start_time_seconds"]) == {("send-1",), ("send-2",), ("send-3",)}
    assert found["relay_workers"]["send", "silent"] == 1


def test_the_queue_is_the_same_for_all_who_look_at_it(
    metrics: Metrics, state_dir: Path, new_process: NewProcess
) -> None:
    for number, waiting in ((1, 40), (2, 41)):
        gauges = {"relay_sqs_queue_messages": {"waiting": waiting, "in_flight": 0, "delayed": 2}}
        tell(state_dir, f"engagement-{number}", new_process(f"engagement-{number}"), gauges=gauges)
    found = numbers(metrics.page())
    assert found["relay_sqs_queue_messages"] == {("waiting",): 41, ("in_flight",): 0, ("delayed",): 2}


def test_workers_by_stage_and_how_many_there_should_be(
    metrics: Metrics, state_dir: Path, new_process: NewProcess
) -> None:
    (state_dir / "started.json").write_bytes(
        orjson.dumps({"programs": dict.fromkeys(("nats", "send-1", "send-2", "send-3", "status", "engagement"), 0)})
    )
    for program, stage in (("send-1", "ready"), ("send-2", "draining"), ("status", "waiting")):
        pid = new_process(program)
        tell(state_dir, program, pid)
        be_present(state_dir, program, pid, stage)
    found = numbers(metrics.page())
    workers = {series: count for series, count in found["relay_workers"].items() if count}
    assert workers == {("send", "ready"): 1, ("send", "draining"): 1, ("status", "waiting"): 1}
    assert found["relay_workers_expected"] == {("send",): 3, ("status",): 1, ("engagement",): 1}


def test_a_file_that_cannot_be_read_counts_as_it_did(
    metrics: Metrics, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell(state_dir, "send-1", 1, counters=relayed(5))
    tell(state_dir, "send-2", 1, counters=relayed(7))
    metrics.page()
    figures_path(state_dir, "send-1").write_bytes(b'{"form')
    for _ in range(2):
        found = numbers(metrics.page())
        assert found["relay_requests_total"]["relayed",] == 12
        assert found["relay_figures_unreadable"][()] == 1
    assert caplog.text.count("cannot be read") == 1, "said once"
    figures_path(state_dir, "send-1").unlink()
    tell(state_dir, "send-2", 1, counters=relayed(8))
    found = numbers(metrics.page())
    assert found["relay_requests_total"]["relayed",] == 13
    assert found["relay_figures_unreadable"][()] == 0


def test_whatever_lies_in_the_directory_there_is_a_page(metrics: Metrics, state_dir: Path) -> None:
    run = state_dir / "run"
    tell(state_dir, "send-1", 1, counters=relayed(5))
    (run / "send-2.figures").mkdir()
    os.mkfifo(run / "send-3.figures")
    (run / "send-4.figures").symlink_to("/dev/zero")
    (run / "send-5.figures").write_bytes(os.urandom(100_000))
    (run / "send-6.figures").write_bytes(b"[" * 200_000)
    (run / 'send-"}\n.figures').write_bytes(b"{}")
    (run / "nobody-1.figures").write_bytes(b"{}")
    os.mkdir(os.fsencode(run) + b"/send-\xff.figures")
    (state_dir / "started.json").write_bytes(b'{"programs": 7}')
    begun = time.monotonic()
    found = numbers(metrics.page())
    assert time.monotonic() - begun < 5
    assert found["relay_requests_total"]["relayed",] == 5
    assert found["relay_figures_unreadable"][()] == 5
    assert set(found["relay_worker_starts_total"]) == {("send-1",)}


def test_many_files_do_not_make_the_page_grow_for_ever(metrics: Metrics, state_dir: Path) -> None:
    for number in range(MAX_FILES + 20):
        tell(state_dir, f"send-{number}", 1)
    assert len(numbers(metrics.page())["relay_worker_starts_total"]) == MAX_FILES


def test_there_is_a_page_without_a_directory(tmp_path: Path) -> None:
    found = numbers(Metrics(tmp_path / "no such").page())
    assert found["relay_workers"]["send", "ready"] == 0


def test_many_scrapers_cost_as_much_as_one(state_dir: Path) -> None:
    metrics = Metrics(state_dir)
    first = metrics.page()
    tell(state_dir, "send-1", 1, counters=relayed(5))
    assert metrics.page() is first
