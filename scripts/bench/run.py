"""The measuring instrument: the whole path, beside Postfix's own load generator in the same run.

Keeps C requests in flight from a load generator process and alternates with ``smtp-source`` talking straight to
the same ``smtp-sink``. A warm-up, then rounds; medians. CPU is each process's own, from /proc, so it does not depend
on what else the machine does; rates do, and only their ratio travels. Writes ``var/bench.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats
from rich.console import Console
from rich.table import Table
from stack import ROOT, Stack, cpu_seconds, resident_mb, smtp_source_rate

from relay import contract

LOAD = Path(__file__).with_name("load.py")
LOAD_SECONDS = 330


def run_load(stack: Stack, options: argparse.Namespace, mails: int) -> dict[str, Any]:
    """One round of load from a process of its own."""
    command = [sys.executable, str(LOAD), stack.url, "--mails", str(mails), "--callers", str(options.callers)]
    command += ["--size", str(options.size), "--body", options.body]
    done = subprocess.run(command, check=True, capture_output=True, timeout=LOAD_SECONDS)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(options: argparse.Namespace, directory: Path) -> list[dict[str, float]]:
    """Warm-up, then rounds that alternate with smtp-source: the figures of each round."""
    stack = Stack(directory)
    rounds: list[dict[str, float]] = []
    try:
        stack.start(options.workers, options.tracked)
        run_load(stack, options, min(2000, options.mails))
        for _ in range(options.rounds):
            reference = smtp_source_rate(stack.smtp_port, options.size, options.mails)
            before = {process.pid: cpu_seconds(process.pid) for process in stack.processes}
            result = run_load(stack, options, options.mails)
            used = {pid: (cpu_seconds(pid) - seconds) / options.mails * 1e6 for pid, seconds in before.items()}
            if result["errors"]:
                raise SystemExit(f"some mails were not sent, so the rate says nothing: {result['errors']}")
            rounds.append(
                {
                    "rate, mails/s": result["rate"],
                    "smtp-source, mails/s": reference,
                    "ratio to smtp-source": result["rate"] / reference,
                    "worker CPU, µs a mail": sum(used[worker.pid] for worker in stack.workers),
                    "nats-server CPU, µs a mail": used[stack.nats.pid],
                    "smtp-sink CPU, µs a mail": used[stack.sink.pid],
                    "latency p50, ms": result["p50_ms"],
                    "latency p99, ms": result["p99_ms"],
                    "largest worker, MB resident": max(resident_mb(worker.pid) for worker in stack.workers),
                }
            )
        if options.tracked:
            sent = min(2000, options.mails) + options.rounds * options.mails
            tracked = asyncio.run(count_facts(stack.url))
            if tracked != sent:
                raise SystemExit(f"of {sent} mails only {tracked} were tracked, so the rate says nothing")
    finally:
        stack.stop()
    return rounds


async def count_facts(url: str) -> int:
    """How many facts the log holds: one ``sent`` for each tracked mail."""
    nc = await nats.connect(url)
    try:
        return (await nc.jetstream().stream_info(contract.LOG_STREAM)).state.messages
    finally:
        await nc.close()


def report(options: argparse.Namespace, rounds: list[dict[str, float]]) -> None:
    """Prints the table of medians with their spread, and writes ``var/bench.json``."""
    kind = "tracked" if options.tracked else "untracked"
    title = f"{options.workers} workers, {options.callers} callers, {options.size} bytes {options.body}, {kind}"
    table = Table(title=f"{title}, {options.rounds} rounds of {options.mails:,} mails; smtp-source -s 20")
    for heading in ("figure", "median", "least", "most"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        shown = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in shown))
    Console(width=100).print(table)
    path = ROOT / "var" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    measured = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "options": vars(options),
        "rounds": rounds,
        "median": {name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")


def main() -> None:
    """Parses options, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--mails", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=4096, help="bytes of both bodies together")
    parser.add_argument("--body", choices=["ascii", "utf8"], default="ascii")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--untracked", dest="tracked", action="store_false", help="nats-server without JetStream")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    try:
        report(options, measure(options, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
