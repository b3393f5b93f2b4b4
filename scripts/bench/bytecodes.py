"""How many bytecodes and Python calls a tracked mail takes, by function.

One real worker with its nats-server and ``smtp-sink``, and callers that keep requests in flight; the worker counts
(bytecodes_worker.py). Times depend on what else the machine does, by a quarter; of functions that are called so many
times for each mail the count is the same in every run, and of those that mails of one turn of the event loop share it
differs by some hundredths of all. What counts leave out: what is done in C, and how long a bytecode takes. Counts of
different versions of Python do not compare.

Writes ``var/bench-bytecodes.json``, which ``--against`` another run compares with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from stack import ROOT, Sink, Stack, end

HERE = Path(__file__).parent
SWITCH_SECONDS = 30.0
LOAD_SECONDS = 300.0
WARM_UP_SECONDS = 2.0


class Count(NamedTuple):
    """What one function takes of a mail."""

    bytecodes: float
    calls: float

    @property
    def is_of_each_mail(self) -> bool:
        """Whether it is called a whole number of times for each mail."""
        return self.calls >= 1 and abs(self.calls - round(self.calls)) < 1e-9


def load(stack: Stack, callers: int, seconds: float) -> int:
    """Runs the load generator; how many mails were sent."""
    command = [sys.executable, str(HERE / "load.py"), stack.url, "--seconds", str(seconds), "--callers", str(callers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=LOAD_SECONDS, cwd=ROOT)
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["errors"]:
        raise SystemExit(f"not every mail was sent, so the counts say nothing: {answer['errors']}")
    return int(answer["answered"])


def switch(stack: Stack, counts: Path, times: int) -> list[list[Any]]:
    """Has the worker begin or end counting; what it counted."""
    [worker] = stack.workers
    os.kill(worker.pid, signal.SIGUSR2)
    deadline = time.monotonic() + SWITCH_SECONDS
    while time.monotonic() < deadline:
        if counts.exists() and (said := json.loads(counts.read_text()))["switched"] == times:
            rows: list[list[Any]] = said["rows"]
            return rows
        time.sleep(0.02)
    raise SystemExit("the worker does not say that it counts")


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Count]:
    """Function → what it takes of a mail."""
    counts = directory / "counts.json"
    sink = Sink(directory)
    try:
        worker_command = (str(HERE / "bytecodes_worker.py"), str(counts))
        stack = Stack(directory / "stack", sink, workers=1, worker_command=worker_command)
        try:
            stack.wait_ready()
            load(stack, options.callers, WARM_UP_SECONDS)
            switch(stack, counts, 1)
            before = sink.mails()
            mails = load(stack, options.callers, options.seconds)
            rows = switch(stack, counts, 2)
            sink.check(before + mails, "the worker")
        finally:
            stack.stop()
    finally:
        end([sink.process])
    found: defaultdict[str, Count] = defaultdict(lambda: Count(0, 0))
    for file, function, bytecodes, calls in rows:
        name = f"{_short(file)}:{function}"
        found[name] = Count(found[name].bytecodes + bytecodes / mails, found[name].calls + calls / mails)
    return dict(sorted(found.items(), key=lambda each: -each[1].bytecodes))


def _short(file: str) -> str:
    """``relay/sending.py``, ``gevent/hub.py``, ``asyncio/events.py``: without where it is installed."""
    path = Path(file)
    for root in (ROOT, *map(Path, sys.path)):
        if root != Path() and path.is_relative_to(root) and "site-packages" not in path.relative_to(root).parts:
            return str(path.relative_to(root))
    return file


def report(found: dict[str, Count], old: dict[str, Count], top: int, console: Console) -> None:
    """Prints the functions that take most, and with another run those whose counts changed most."""
    table = Table(title="A tracked mail, by function" + (", against the other run" if old else ""))
    headings = ["function", "bytecodes", "calls", *(["bytecodes then", "change"] if old else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "function" else "right", no_wrap=heading == "function")
    nothing = Count(0, 0)
    names = list(found)
    if old:
        names = sorted(found | old, key=lambda name: -abs(found.get(name, nothing)[0] - old.get(name, nothing)[0]))
    sums = {
        "all": (_total(found), _total(old)),
        "all that each mail does by itself": (_total(found, of_each_mail=True), _total(old, of_each_mail=True)),
    }
    counts = sums | {name: (found.get(name, nothing), old.get(name, nothing)) for name in names[:top]}
    for name, (now, then) in counts.items():
        row = [name, f"{now.bytecodes:,.1f}", f"{now.calls:.2f}"]
        if old:
            row += [f"{then.bytecodes:,.1f}", f"{now.bytecodes - then.bytecodes:+,.1f}"]
        table.add_row(*row)
    console.print(table)


def _total(found: dict[str, Count], *, of_each_mail: bool = False) -> Count:
    chosen = [each for each in found.values() if each.is_of_each_mail or not of_each_mail]
    return Count(sum(each.bytecodes for each in chosen), sum(each.calls for each in chosen))


def main() -> int:
    """Parses options, counts, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load; some hundred mails a second are counted")
    parser.add_argument("--top", type=int, default=60, help="functions to show")
    parser.add_argument("--output", type=Path, default=ROOT / "var" / "bench-bytecodes.json")
    parser.add_argument("--against", type=Path, help="var/bench-bytecodes.json of another run, kept elsewhere")
    options = parser.parse_args()
    old = {}
    if options.against:
        old = {name: Count(*count) for name, count in json.loads(options.against.read_text())["functions"].items()}
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    try:
        found = measure(options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    options.output.parent.mkdir(exist_ok=True)
    measured = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "callers": options.callers,
        "all": _total(found),
        "of_each_mail": _total(found, of_each_mail=True),
        "functions": found,
    }
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    report(found, old, options.top, Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
