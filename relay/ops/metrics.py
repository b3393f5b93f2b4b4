"""The page of metrics: what all workers of this relay have told in their files, in Prometheus's text format.

Read from the state directory when the page is asked for: it needs neither NATS nor a worker that answers. Several
relays on one NATS each have a page of their own. What is counted is ``catalogue``'s, the files are ``measuring``'s.

Never raises for what it finds there: a file that cannot be read counts as it did when it last could, and the page says
so in ``relay_figures_unreadable``. A page is at most ``PAGE_SECONDS`` old, so that many scrapers cost as much as one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from relay import __version__
from relay.histogram import BOUNDS_SECONDS
from relay.ops.catalogue import BY_NAME, COUNTED, KINDS, SERIES, Merge, Metric, Type
from relay.ops.measuring import SUFFIX, Figures, Told, read_figures
from relay.ops.presence import read_presence

__all__ = ["CONTENT_TYPE", "Metrics"]

log = logging.getLogger("relay.process")

PAGE_SECONDS: Final = 0.5
MAX_FILES: Final = 256
"""More programs than a relay has; whoever fills the directory does not make the page grow."""

_PROGRAM = re.compile("(send|status|engagement)(-[a-z0-9]{1,20})?")

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Metrics:
    """The page of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        registry = CollectorRegistry()
        registry.register(_Relay(state_dir))
        self._registry = registry
        self._page = b""
        self._made_at = -PAGE_SECONDS

    def page(self) -> bytes:
        """Prometheus's text format 0.0.4. Does not switch greenlets."""
        now = time.monotonic()
        if now - self._made_at >= PAGE_SECONDS:
            self._page = generate_latest(self._registry)
            self._made_at = now
        return self._page


class _Relay(Collector):
    """Asked by prometheus-client for every page."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._known: dict[str, Figures] = {}
        """By program, as last read: what goes on counting while a file cannot be read."""
        self._unreadable: set[str] = set()
        self._pid = 0
        self._process = ProcessCollector(namespace="relay", pid=lambda: self._pid, registry=None)

    def describe(self) -> Iterable[Family]:
        """Nothing: registering a collector is no reason to read the disk."""
        return []

    def collect(self) -> Iterator[Family]:
        """Every metric of the catalogue."""
        self._read()
        running = {
            program: figures for program, figures in self._known.items() if _is_running(figures.pid, figures.program)
        }
        now = time.monotonic()
        fresh = [figures for figures in running.values() if figures.is_fresh(now)]
        for metric in COUNTED:
            if metric.type is Type.COUNTER:
                yield _summed(metric, (figures.counters for figures in self._known.values()))
            elif metric.type is Type.GAUGE:
                yield _summed(metric, (figures.gauges for figures in fresh))
            else:
                yield _histogram(metric, (figures.histograms.get(metric.name) for figures in self._known.values()))
        yield from self._workers(running, fresh)
        yield from self._processes(running)
        yield _family("relay_figures_unreadable", {(): len(self._unreadable)})
        yield _family("relay_build_info", {(__version__, platform.python_version()): 1})

    def _read(self) -> None:
        unreadable = set()
        for path in _files(self._state_dir / "run"):
            program = path.name.removesuffix(SUFFIX)
            try:
                self._known[program] = read_figures(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                unreadable.add(program)
                if program not in self._unreadable:
                    log.warning("%s cannot be read, its figures stay as they were: %s", path, error)
        self._unreadable = unreadable

    def _workers(self, running: dict[str, Figures], fresh: list[Figures]) -> Iterator[Family]:
        stages: Counter[tuple[str, ...]] = Counter(dict.fromkeys(BY_NAME["relay_workers"].series(), 0))
        for program, figures in running.items():
            report = read_presence(self._state_dir, program, figures.pid)
            stage = "silent" if figures not in fresh else "waiting" if report is None else report.stage.value
            stages[_kind(program), stage] += 1
        yield _family("relay_workers", stages)
        expected = Counter(dict.fromkeys(KINDS, 0))
        expected.update(kind for program in _started(self._state_dir) or running if (kind := _kind(program)))
        yield _family("relay_workers_expected", {(kind,): count for kind, count in expected.items()})
        starts = {(program,): figures.starts for program, figures in self._known.items()}
        yield _family("relay_worker_starts_total", starts)

    def _processes(self, running: dict[str, Figures]) -> Iterator[Family]:
        """What the system says of each worker, whether or not it answers."""
        found: dict[str, dict[tuple[str, ...], float]] = {
            name: {} for name in BY_NAME if name.startswith("relay_process_")
        }
        for program, figures in running.items():
            self._pid = figures.pid
            with contextlib.suppress(ValueError, LookupError):  # what /proc says was not foreseen, or ends half-way
                for family in self._process.collect():
                    for sample in family.samples:
                        if sample.name in found:
                            found[sample.name][program,] = sample.value
        for name, numbers in found.items():
            yield _family(name, numbers)


def _files(directory: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    fitting = [name for name in names if name.endswith(SUFFIX) and _kind(name.removesuffix(SUFFIX))]
    return [directory / name for name in fitting[:MAX_FILES]]


def _kind(program: str) -> str:
    """``send`` of ``send-2``; '' when it is no worker's name."""
    return program.partition("-")[0] if _PROGRAM.fullmatch(program) else ""


def _started(state_dir: Path) -> list[str]:
    """The programs that should run, as relayctl left word; none when it did not start them."""
    try:
        return [str(program) for program in orjson.loads((state_dir / "started.json").read_bytes())["programs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_running(pid: int, program: str) -> bool:
    """Whether the pid is still that worker's: a pid may be given to another process."""
    try:
        words = [*Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"), ""]
    except OSError:
        return False
    kind = _kind(program)
    module = f"workers.{kind}"
    # One that is started without a name has that of its kind.
    return module in words and program == (words[words.index(module) + 1] or kind)


def _summed(metric: Metric, told: Iterable[dict[str, dict[str, float]]]) -> Family:
    known = SERIES[metric.name]
    totals: dict[tuple[str, ...], float] = dict.fromkeys(known.values(), 0) if metric.merge is Merge.SUM else {}
    for metrics in told:
        for labels, number in metrics.get(metric.name, {}).items():
            series = known[labels]
            before = totals.get(series, 0)
            totals[series] = max(before, number) if metric.merge is Merge.MOST else before + number
    return _family(metric.name, totals)


def _family(name: str, numbers: Mapping[Any, float]) -> Family:
    """``numbers`` by label values."""
    metric = BY_NAME[name]
    make = CounterMetricFamily if metric.type is Type.COUNTER else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for series, number in numbers.items():
        family.add_metric(series, number)
    return family


def _histogram(metric: Metric, told: Iterable[Told | None]) -> Family:
    """Cumulative, as Prometheus wants it. One with other bounds, of another version of Relay, is left out."""
    counts: list[float] = [0] * (len(BOUNDS_SECONDS) + 1)
    sum_seconds = 0.0
    for each in told:
        if each is not None and each.bounds_seconds == BOUNDS_SECONDS:
            counts = [one + other for one, other in zip(counts, each.counts, strict=True)]
            sum_seconds += each.sum_seconds
    family = HistogramMetricFamily(metric.name, metric.help)
    total: float = 0
    buckets = []
    for bound, count in zip([*map(str, BOUNDS_SECONDS), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([], buckets, sum_seconds)
    return family
