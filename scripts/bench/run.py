"""The measuring instrument: the whole path, beside Postfix's own load generator in the same run.

Every row (rows.py) has its workers and nats-server from the beginning; all hand their mails to one ``smtp-sink`` that
counts. Rounds go through all rows, back and forth, each beside ``smtp-source`` and Relay's SMTP layer alone with mails
of the same size, so what disturbs the machine disturbs them alike; a row's figures are medians of the rounds. Then
come the open loop, at shares of the peak found before, and one long row. CPU is each process's own; rates depend on the
machine, and only their ratios travel. A row counts when every request had one reply without an error, the sink took as
many mails, and as many were tracked.

Writes ``var/bench.json``; exits 1 when a figure that DESIGN asks for is missed or a row does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import machine
import nats
import report
import smtp
from machine import Others, connections_to, cpu_seconds, resident_mb
from rich.console import Console
from rows import AIMS, BASE, FAR_CONNECTIONS, GROWTH, MORE_PARTS, PARTS, Row, Setup
from stack import ROOT, Sink, Stack, bare_transactions, smtp_layer, smtp_source

from relay import contract

HERE = Path(__file__).parent
AFTER_LOAD_SECONDS = 75.0
"""A load generator that is not done so long after its time hangs."""
OVERLOADED = "overloaded"
"""The detail of a refusal for want of time or room."""
WARM_UP_SECONDS = 1.0
PILOT_BYTES = 4_000_000
BARE_TRANSACTIONS = 300
NEEDED = {"smtp": ("aiosmtplib", "slimta")}
"""Modules that a part measures Relay beside."""


class Pace(NamedTuple):
    """How long everything takes."""

    rounds: int
    row_seconds: float
    reference_seconds: float
    open_rounds: int
    open_seconds: float
    long_seconds: float
    smtp_rounds: int
    smtp_mails: int
    far_seconds: float


WHOLE = Pace(5, 4.0, 1.5, 3, 8.0, 60.0, 3, 20_000, 6.0)
QUICK = Pace(1, 1.5, 0.6, 1, 3.0, 10.0, 1, 4_000, 2.0)


class Reference(NamedTuple):
    """What a round's rows of one size are compared with: mails a second."""

    smtp_source: float
    smtp_layer: float


class Bench:
    """Everything that runs, and what was measured so far."""

    def __init__(self, directory: Path, sink: Sink, rows: list[Row], pace: Pace) -> None:
        self.sink = sink
        self.pace = pace
        self.rows = rows
        self.runs: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
        self.references: dict[int, list[Reference]] = {row.size: [] for row in rows}
        self.bare_ms: list[float] = []
        """Median of each round, of an SMTP transaction by nothing but a socket."""
        self.peak = 0.0
        """Mails a second, the most that a closed loop reached with what the open loop is tried with."""
        self.faults: list[str] = []
        self._directory = directory
        self._stacks: dict[Setup, Stack] = {}
        self._mails: dict[int, tuple[int, int]] = {}

    def start(self) -> None:
        """Starts everything that the rows need; ``stop`` must be called whatever happens."""
        _tell("starting")
        for number, setup in enumerate(dict.fromkeys(row.setup for row in self.rows)):
            self._stacks[setup] = Stack(
                self._directory / f"stack-{number}",
                self.sink,
                workers=setup.workers,
                tracked=setup.is_tracked,
                settings={"SMTP_POOL_SIZE": str(setup.pool_size)},
            )
        for setup, stack in self._stacks.items():
            stack.wait_ready()
            self._load(stack, Row("warm-up", setup), WARM_UP_SECONDS)

    def stop(self) -> None:
        """Ends everything that was started."""
        for stack in self._stacks.values():
            for process in stack.workers:
                process.terminate()
        for stack in self._stacks.values():
            stack.stop()

    def measure(self) -> None:
        """All rows of the table."""
        closed = [row for row in self.rows if not row.share_of_peak and not row.is_long]
        for number in range(self.pace.rounds):
            _tell(f"round {number + 1} of {self.pace.rounds}")
            sizes = sorted(self.references)[:: -1 if number % 2 else 1]
            for size in sizes:
                self._measure_references(size)
                for row in [row for row in closed if row.size == size][:: -1 if number % 2 else 1]:
                    self._measure(row, self.pace.row_seconds)
            if any(row.callers == 1 for row in closed):
                taken = bare_transactions(self.sink, BASE.size, BARE_TRANSACTIONS)
                self.bare_ms.append(statistics.median(taken) * 1000)
        open_rows = [row for row in self.rows if row.share_of_peak]
        if open_rows:
            alike = [row for row in closed if (row.setup, row.size) == (BASE.setup, BASE.size)]
            self.peak = max(self.median(row, "rate") for row in alike)
            _tell("open loop")
        for _ in range(self.pace.open_rounds):
            for row in open_rows:
                self._measure(row, self.pace.open_seconds, rate=self.peak * row.share_of_peak)
        for row in self.rows:
            if row.is_long:
                _tell("the long row")
                self._measure(row, self.pace.long_seconds)

    def median(self, row: Row, figure: str) -> float:
        """Of the rounds of a row."""
        return float(statistics.median(run[figure] for run in self.runs[row]))

    def _measure_references(self, size: int) -> None:
        """As many mails as fill the time; the first round finds out how many."""
        if size not in self._mails:
            pilot = max(50, PILOT_BYTES // size)
            self._mails[size] = (
                int(smtp_source(self.sink, size, pilot).mails_per_second * self.pace.reference_seconds) + 1,
                int(smtp_layer(self.sink, size, pilot).mails_per_second * self.pace.reference_seconds) + 1,
            )
        by_source, by_layer = self._mails[size]
        self.references[size].append(
            Reference(
                smtp_source(self.sink, size, by_source).mails_per_second,
                smtp_layer(self.sink, size, by_layer).mails_per_second,
            )
        )

    def _measure(self, row: Row, seconds: float, rate: float = 0.0) -> None:
        """One run of a row."""
        stack = self._stacks[row.setup]
        processes = {"nats-server": stack.nats.pid, "sink": self.sink.process.pid}
        workers = [worker.pid for worker in stack.workers]
        others = Others(*(pid for each in self._stacks.values() for pid in each.pids), self.sink.process.pid)
        before = {name: cpu_seconds(pid) for name, pid in processes.items()}
        before["workers"] = sum(map(cpu_seconds, workers))
        taken_before, stored_before = self.sink.mails(), self._stored(row, stack)
        figures, tenths = self._load(stack, row, seconds, rate)
        mails = figures["answered"]
        used = {name: cpu_seconds(pid) for name, pid in processes.items()} | {"workers": tenths[-1].cpu_seconds}
        figures["others_cores"] = others.cores()
        figures |= {f"{name} cpu_us": (cpu - before[name]) / mails * 1e6 for name, cpu in used.items()}
        figures["resident_mb"] = max(tenth.resident_mb for tenth in tenths)
        figures["connections"] = max(tenth.connections for tenth in tenths)
        first, last = tenths[0], tenths[-2:]
        figures["first tenth cpu_us"] = (first.cpu_seconds - before["workers"]) / max(1, first.answered) * 1e6
        figures["last tenth cpu_us"] = (
            (last[1].cpu_seconds - last[0].cpu_seconds) / max(1, last[1].answered - last[0].answered) * 1e6
        )
        reference = self.references[row.size][-1]
        figures["to smtp-source"] = figures["rate"] / reference.smtp_source
        figures["to SMTP layer"] = figures["rate"] / reference.smtp_layer
        self.runs[row].append(figures)
        relayed = figures["relayed"]
        at_sink = self.sink.wait_for(taken_before + relayed) - taken_before
        stored = self._stored(row, stack)
        self.faults += faults_of(
            row.name,
            figures,
            at_sink,
            {name: count - stored_before[name] for name, count in stored.items()},
            may_refuse=bool(row.share_of_peak),
        )

    def _stored(self, row: Row, stack: Stack) -> dict[str, int]:
        return asyncio.run(_count_stored(stack.url)) if row.setup.is_tracked else {}

    def _load(self, stack: Stack, row: Row, seconds: float, rate: float = 0.0) -> tuple[dict[str, Any], list[Tenth]]:
        """Runs a load generator, and looks at the workers at each tenth of its time."""
        command = [sys.executable, str(HERE / "load.py"), stack.url, "--seconds", str(seconds), "--size", str(row.size)]
        command += ["--rate", str(rate)] if rate else ["--callers", str(row.callers)]
        pids = [worker.pid for worker in stack.workers]
        tenths: list[Tenth] = []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        with _kill_at(process, seconds + AFTER_LOAD_SECONDS), process:
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if "tenth" not in said:
                    # The workers' CPU until the last reply, not until the last tenth.
                    tenths[-1] = Tenth(said["answered"], sum(map(cpu_seconds, pids)), *tenths[-1][2:])
                    return said, tenths
                tenths.append(
                    Tenth(
                        said["answered"],
                        sum(map(cpu_seconds, pids)),
                        max(map(resident_mb, pids)),
                        connections_to(self.sink.port, pids),
                    )
                )
        raise SystemExit(f"{row.name}: the load generator ended with {process.returncode}")


def faults_of(
    name: str, figures: dict[str, Any], at_sink: int, stored: dict[str, int], *, may_refuse: bool = False
) -> list[str]:
    """Why a run does not count: every request must have been relayed, be at the sink, and be tracked in full.

    In an open loop some ``may`` be answered ``overloaded``: that is what becomes of more than can be done.
    """
    relayed = figures["relayed"]
    faults = []
    refused = figures["errors"].get(OVERLOADED, 0) if may_refuse else 0
    if set(figures["errors"]) - ({OVERLOADED} if may_refuse else set()) or relayed + refused != figures["requests"]:
        faults.append(f"{name}: of {figures['requests']} requests not all were sent: {figures['errors']}")
    if at_sink != relayed:
        faults.append(f"{name}: {relayed} mails were relayed, said the replies; the sink took {at_sink}")
    for what, count in stored.items():
        if count != relayed:
            faults.append(f"{name}: {relayed} mails were relayed, said the replies; there are {count} {what} of them")
    return faults


class Tenth(NamedTuple):
    """The workers after a tenth of a run."""

    answered: int
    cpu_seconds: float
    resident_mb: float
    connections: int
    """Of the worker that has most."""


def _tell(step: str) -> None:
    """What happens now, for who waits."""
    print(f"{step} …", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _kill_at(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Ends a process that does not end by itself."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


async def _count_stored(url: str) -> dict[str, int]:
    """How many facts and records there are: one of each for each tracked mail."""
    nc = await nats.connect(url)
    try:
        js = nc.jetstream()
        streams = {"facts": contract.LOG_STREAM, "records": f"KV_{contract.RECIPIENTS_BUCKET}"}
        return {what: (await js.stream_info(name)).state.messages for what, name in streams.items()}
    finally:
        await nc.close()


def measure_smtp(pace: Pace, directory: Path) -> dict[str, Any]:
    """What ``make bench-smtp`` measures, with this run's pace."""
    options = argparse.Namespace(
        mails=pace.smtp_mails,
        size=BASE.size,
        rounds=pace.smtp_rounds,
        far=list(FAR_CONNECTIONS),
        far_seconds=pace.far_seconds,
        rtt_ms=20.0,
    )
    quiet, disturbed = smtp.measure_near(options, directory)
    return {"near": quiet, "near_disturbed": disturbed, "far": smtp.measure_far(options, directory)}


def measure_composing() -> dict[str, float]:
    """CPU in µs a mail, for each kind of body."""
    command = [sys.executable, str(HERE / "composing.py")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120, cwd=ROOT)
    costs: dict[str, float] = json.loads(done.stdout)
    return costs


def growth(bench: Bench, rows: Sequence[Row]) -> float:
    """How often the CPU of a mail with less of what the rows differ in goes into that with more, at most."""
    cpu = [bench.median(row, "workers cpu_us") for row in rows]
    return max(more / less for place, less in enumerate(cpu) for more in cpu[place + 1 :])


def figures_of(bench: Bench, parts: set[str], more: dict[str, Any]) -> dict[str, float]:
    """The figures that there are aims for, as far as they were measured."""
    figures = {
        "tracked sends, 2 workers, against smtp-source": bench.median(BASE, "to smtp-source"),
        "worker CPU, tracked, 4 KB, µs a mail": bench.median(BASE, "workers cpu_us"),
    }
    if "callers" in parts:
        one, fifty, five_hundred = PARTS["callers"]
        figures["added latency at low load, p50, ms"] = bench.median(one, "p50_ms") - statistics.median(bench.bare_ms)
        # A caller alone shares nothing with others, and there is less to do at once.
        figures[f"{GROWTH} callers"] = growth(bench, [fifty, BASE, five_hundred])
    if "workers" in parts:
        one, four = PARTS["workers"]
        figures[f"{GROWTH} workers"] = growth(bench, [one, BASE, four])
    if "connections" in parts:
        figures[f"{GROWTH} connections"] = growth(bench, PARTS["connections"])
        largest = PARTS["connections"][-1]
        if bench.median(largest, "connections") == largest.setup.pool_size:
            figures["one send worker, 100 connections open, MB resident"] = bench.median(largest, "resident_mb")
        else:
            bench.faults.append(f"{largest.name}: never were all connections of a worker open")
    if "uptime" in parts:
        [row] = PARTS["uptime"]
        figures[f"{GROWTH} uptime"] = bench.median(row, "last tenth cpu_us") / bench.median(row, "first tenth cpu_us")
    if "composing" in parts:
        figures["composing 4 KB, ASCII with short lines, µs"] = more["composing"]["ascii"]
        figures["composing 4 KB, quoted-printable, µs"] = more["composing"]["quoted_printable"]
    if "smtp" in parts:
        rounds = more["smtp"]["near"] or more["smtp"]["near_disturbed"]
        for each in smtp.CONTESTANTS:
            ratios = [measured[each.name]["ratio"] for measured in rounds]
            figures[f"SMTP layer alone against {each.name}"] = statistics.median(ratios)
        for far in more["smtp"]["far"]:
            figures[f"smarthost 20 ms away, {far['connections']} connections, share of the most"] = far["ratio"]
    return {aim.figure: figures[aim.figure] for aim in AIMS if aim.figure in figures}


def row_of(bench: Bench, row: Row) -> dict[str, Any]:
    """A row as ``var/bench.json`` has it."""
    runs = bench.runs[row]
    numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return {
        "name": row.name,
        **row._asdict(),
        "setup": row.setup._asdict(),
        "median": {name: statistics.median(run[name] for run in runs) for name in numbers},
        "runs": runs,
    }


def parse() -> argparse.Namespace:
    """The options of the command line."""
    every = [*PARTS, *MORE_PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: two minutes instead of a quarter hour")
    parser.add_argument("--only", default=",".join(every), help=f"parts, separated by commas; all: {','.join(every)}")
    parser.add_argument("--rounds", type=int, help="instead of 5 (--quick: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "var" / "bench.json")
    parser.add_argument("--chart", action="store_true", help="draw docs/bench.svg")
    options = parser.parse_args()
    options.parts = {part for part in options.only.split(",") if part}
    if unknown := options.parts - set(every):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    needed = {module for part in options.parts for module in NEEDED.get(part, ())}
    needed |= {"matplotlib"} if options.chart else set()
    if missing := sorted(module for module in needed if importlib.util.find_spec(module) is None):
        parser.error(f"{', '.join(missing)} missing: `make bench` installs it (extras bench and bench-smtp)")
    options.pace = QUICK if options.quick else WHOLE
    if options.rounds is not None:
        if options.rounds < 1:
            parser.error("at least one round")
        options.pace = options.pace._replace(rounds=options.rounds)
    return options


def main() -> int:
    """Parses options, measures, reports."""
    options = parse()
    pace, parts = options.pace, options.parts
    rows = [BASE, *(row for part, rows in PARTS.items() if part in parts for row in rows)]
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    # Postfix's programs give up root for a user who must be able to come here.
    directory.chmod(0o755)
    more: dict[str, Any] = {}
    begun = datetime.now(UTC)
    try:
        if "composing" in parts:
            _tell("composing")
            more["composing"] = measure_composing()
        if "smtp" in parts:
            _tell("the SMTP layer alone")
            more["smtp"] = measure_smtp(pace, directory)
        sink = Sink(directory)
        with smtp.ended(sink.process):
            bench = Bench(directory, sink, rows, pace)
            try:
                bench.start()
                bench.measure()
            finally:
                bench.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    figures = figures_of(bench, parts, more)
    aims = [
        {
            "figure": aim.figure,
            "aim": aim.text,
            "value": figures.get(aim.figure),
            "is_reached": aim.is_reached_by(figures[aim.figure]) if aim.figure in figures else None,
        }
        for aim in AIMS
    ]
    is_reached = not bench.faults and all(aim["is_reached"] is not False for aim in aims)
    measured = {
        "at": begun.isoformat(timespec="seconds"),
        "seconds": (datetime.now(UTC) - begun).total_seconds(),
        "machine": machine.description(),
        "pace": pace._asdict(),
        "parts": sorted(parts),
        "is_reached": is_reached,
        "aims": aims,
        "faults": bench.faults,
        "peak": bench.peak,
        "bare_transaction_ms": bench.bare_ms,
        "references": {size: [each._asdict() for each in found] for size, found in bench.references.items()},
        "rows": [row_of(bench, row) for row in rows],
        **more,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    # Read again, so that what is shown is what was written.
    measured = json.loads(options.output.read_text())
    report.show(measured, Console(width=150))
    if options.chart and bench.faults:
        _tell("no chart, since not every row counts")
    elif options.chart and any(row["median"]["others_cores"] > report.QUIET_CORES for row in measured["rows"]):
        _tell("no chart, since others used the machine")
    elif options.chart:
        # Only here: matplotlib is large, and only a chart needs it.
        import chart

        chart.draw(measured, ROOT / "docs" / "bench.svg")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
