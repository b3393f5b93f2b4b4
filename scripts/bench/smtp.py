"""The SMTP layer alone: beside others on loopback, and with a smarthost 20 ms away.

Near: every contestant hands the same number of bytes to one ``smtp-sink`` over 20 persistent connections, each in a
process of its own (``peers/``), in rounds whose order is turned round each time. Ratios are taken within a round. A
round in which something else used the machine is not counted and measured again: client and sink need a core each, and
who needs more of it suffers more. Far:
only ours, over TLS and without PIPELINING, through ``scripts/delay_proxy.py``. A run counts only when every outcome is
RELAYED and the sink counted as many mails. Writes ``var/bench-smtp.json``; exits 1 when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import select
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from machine import Others, cpu_seconds
from rich.console import Console
from rich.table import Table
from stack import ROOT, Sink, find

sys.path.insert(0, str(ROOT / "scripts"))

import delay_proxy

HERE = Path(__file__).parent
CONNECTIONS = 20
RUN_SECONDS = 120
QUIET_CORES = 0.15
"""What the rest of the machine may use while a round is measured."""
ROUNDS_FOR_ONE = 4
"""Rounds tried at most for each that is wanted."""
FAR_WANTED = 0.85
ROUND_TRIPS_PER_MAIL = 4
"""MAIL, RCPT, DATA, and the content with its dot."""


class Contestant(NamedTuple):
    """Who is measured."""

    name: str
    script: str
    """In ``peers/``; '' is Postfix's ``smtp-source``."""
    share: float
    """Of ``--mails``, so that a run of the slow ones takes no longer than one of the fast ones."""
    wanted: float
    """How many times its rate ours should be."""


OURS = "Relay"
CONTESTANTS = [
    Contestant(OURS, "ours.py", 1.0, 0.0),
    Contestant("smtp-source -d (C)", "", 1.0, 1.0),
    Contestant("smtplib, gevent", "smtplib_gevent_pool.py", 0.25, 2.5),
    Contestant("aiosmtplib, uvloop", "aiosmtplib_pool.py", 0.25, 4.0),
    Contestant("python-slimta", "slimta_pool.py", 0.06, 20.0),
]


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends a process whatever happens."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def run_near(contestant: Contestant, sink: Sink, options: argparse.Namespace) -> dict[str, float]:
    """One run of one contestant."""
    mails = int(options.mails * contestant.share)
    taken_before, sink_cpu = sink.mails(), cpu_seconds(sink.process.pid)
    others = Others(sink.process.pid)
    common = {"mails": mails, "port": sink.port}
    if contestant.script:
        command = [sys.executable, str(HERE / "peers" / contestant.script), "--connections", str(CONNECTIONS)]
        command += ["--size", str(options.size), *(word for key in common for word in (f"--{key}", str(common[key])))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=RUN_SECONDS, cwd=ROOT)
        answer: dict[str, float] = json.loads(done.stdout)
        if answer["relayed"] != mails:
            raise SystemExit(f"of {mails} mails of {contestant.name} {answer['relayed']} were relayed")
    else:
        answer = _run_smtp_source(mails, sink.port, options.size)
    sink.check(taken_before + mails, contestant.name)
    return {
        "others_cores": others.cores(),
        "rate": mails / answer["seconds"],
        "cpu_us": answer["cpu_seconds"] / mails * 1e6,
        "sink_cpu_us": (cpu_seconds(sink.process.pid) - sink_cpu) / mails * 1e6,
    }


def _run_smtp_source(mails: int, port: int, size_bytes: int) -> dict[str, float]:
    command = [find("smtp-source"), "-d", "-s", str(CONNECTIONS), "-l", str(size_bytes), "-m", str(mails)]
    command += ["-f", "a@example.com", "-t", "b@example.com", f"127.0.0.1:{port}"]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, timeout=RUN_SECONDS)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu_seconds": sum(after[:2]) - sum(before[:2])}


Round = dict[str, dict[str, float]]
"""Every contestant's figures in one round."""


def measure_near(options: argparse.Namespace, directory: Path) -> tuple[list[Round], list[Round]]:
    """The rounds that count, and the disturbed ones."""
    counted: list[Round] = []
    disturbed: list[Round] = []
    sink = Sink(directory)
    with ended(sink.process):
        while len(counted) < options.rounds and len(counted) + len(disturbed) < options.rounds * ROUNDS_FOR_ONE:
            order = CONTESTANTS[:: -1 if (len(counted) + len(disturbed)) % 2 else 1]
            measured = {contestant.name: run_near(contestant, sink, options) for contestant in order}
            for figures in measured.values():
                figures["ratio"] = measured[OURS]["rate"] / figures["rate"]
            is_quiet = max(figures["others_cores"] for figures in measured.values()) <= QUIET_CORES
            (counted if is_quiet else disturbed).append(measured)
    return counted, disturbed


class RoundTrips:
    """Asks NOOP over a connection of its own, one after another, and takes the time."""

    def __init__(self, port: int, ca_file: Path) -> None:
        self.taken_ms: list[float] = []
        self._is_stopping = threading.Event()
        context = ssl.create_default_context(cafile=str(ca_file))
        sock = socket.create_connection(("127.0.0.1", port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
        self._sock.recv(1000)
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_stopping.is_set():
            begun = time.perf_counter()
            self._sock.send(b"NOOP\r\n")
            if not self._sock.recv(1000).startswith(b"250"):
                return
            self.taken_ms.append((time.perf_counter() - begun) * 1000)

    def stop(self) -> list[float]:
        """What was measured, in order of size."""
        self._is_stopping.set()
        self._thread.join(10)
        self._sock.close()
        return sorted(self.taken_ms)


def _certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


def _listening_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    is_there, _, _ = select.select([process.stdout], [], [], 10.0)
    line = process.stdout.readline() if is_there else ""
    if not line.startswith("listening on "):
        raise SystemExit("the TLS front does not start")
    return int(line.rpartition(":")[2])


def measure_far(options: argparse.Namespace, directory: Path) -> list[dict[str, float]]:
    """The figures for each number of connections."""
    certificate, key = _certificate(directory)
    sink = Sink(directory, "-p")
    front_command = [sys.executable, str(HERE / "tls_front.py"), "--to-port", str(sink.port)]
    front_command += ["--certificate", str(certificate), "--key", str(key)]
    with ended(sink.process):
        front = subprocess.Popen(front_command, stdout=subprocess.PIPE, text=True)
        with ended(front), delay_proxy.running(_listening_port(front), options.rtt_ms) as proxy:
            others = {"proxy": proxy.pid, "TLS front": front.pid, "sink": sink.process.pid}
            return [_run_far(count, options, certificate, proxy.port, sink, others) for count in options.far]


def _run_far(
    connections: int, options: argparse.Namespace, certificate: Path, port: int, sink: Sink, others: dict[str, int]
) -> dict[str, float]:
    command = [sys.executable, str(HERE / "peers" / "ours_far.py"), "--port", str(port)]
    command += ["--connections", str(connections), "--size", str(options.size), "--seconds", str(options.far_seconds)]
    taken_before = sink.mails()
    begun, used = time.monotonic(), {name: cpu_seconds(pid) for name, pid in others.items()}
    round_trips = RoundTrips(port, certificate)
    done = subprocess.run(
        [*command, "--ca-file", str(certificate)], check=True, stdout=subprocess.PIPE, timeout=RUN_SECONDS, cwd=ROOT
    )
    rtts_ms = round_trips.stop()
    seconds = time.monotonic() - begun
    answer: dict[str, float] = json.loads(done.stdout)
    if answer["relayed"] != answer["sent"]:
        raise SystemExit(f"of {answer['sent']} mails {answer['relayed']} were relayed")
    sink.check(taken_before + int(answer["relayed"]), "the run with a smarthost far away")
    if len(rtts_ms) < options.far_seconds * 100 / options.rtt_ms:
        raise SystemExit(f"only {len(rtts_ms)} round trips were measured")
    most = connections / (ROUND_TRIPS_PER_MAIL * options.rtt_ms / 1000)
    rtt_ms = statistics.median(rtts_ms)
    busiest = {f"{name}, cores": (cpu_seconds(pid) - used[name]) / seconds for name, pid in others.items()}
    return {
        "connections": connections,
        **answer,
        "most": most,
        "ratio": answer["rate"] / most,
        "ratio_to_measured_rtt": answer["rate"] * ROUND_TRIPS_PER_MAIL * rtt_ms / 1000 / connections,
        "rtt_ms_p50": rtt_ms,
        "rtt_ms_p99": rtts_ms[int(len(rtts_ms) * 0.99)],
        **busiest,
    }


def _spread(rounds: list[dict[str, float]], name: str, form: str) -> str:
    values = [each[name] for each in rounds]
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def report_near(options: argparse.Namespace, counted: list[Round], disturbed: list[Round], console: Console) -> bool:
    """Prints the table; returns whether every wanted ratio was reached."""
    rounds = counted or disturbed
    table = Table(
        title=f"{CONNECTIONS} connections, {options.size:,} bytes a mail, {len(rounds)} rounds: median (least-most)"
    )
    for heading in ("contestant", "mails/s", "CPU, µs a mail", "sink's CPU", "ours is … times as fast", "wanted"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    is_reached = True
    for contestant in CONTESTANTS:
        figures = [each[contestant.name] for each in rounds]
        row = [
            _spread(figures, "rate", ",.0f"),
            _spread(figures, "cpu_us", ".0f"),
            _spread(figures, "sink_cpu_us", ".0f"),
        ]
        if contestant.name != OURS:
            is_this_reached = statistics.median(each["ratio"] for each in figures) >= contestant.wanted
            is_reached &= is_this_reached
            row += [_spread(figures, "ratio", ".2f"), f"≥ {contestant.wanted:g} {_verdict(is_this_reached)}"]
        table.add_row(contestant.name, *row)
    console.print(table)
    if disturbed:
        console.print(
            f"In {len(disturbed)} more rounds something else used more than {QUIET_CORES} cores; not counted."
        )
    if len(counted) < options.rounds:
        console.print(
            f"Only {len(counted)} of {options.rounds} rounds were quiet"
            f"{'' if counted else ', so the table shows the disturbed ones: its ratios say nothing'}."
        )
    return is_reached


def report_far(options: argparse.Namespace, rows: list[dict[str, float]], console: Console) -> bool:
    """Prints the table; returns whether the wanted share was reached by all."""
    table = Table(
        title=f"A smarthost {options.rtt_ms:g} ms away, TLS, no PIPELINING, connections open; "
        f"most = connections ÷ (4 × {options.rtt_ms:g} ms)"
    )
    headings = ("connections", "mails/s", "most", "share of it", "wanted", "round trip, ms p50 / p99")
    for heading in (*headings, "share at that round trip", "CPU, µs a mail"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['connections']:.0f}",
            f"{row['rate']:,.0f}",
            f"{row['most']:,.0f}",
            f"{row['ratio']:.3f}",
            f"≥ {FAR_WANTED} {_verdict(row['ratio'] >= FAR_WANTED)}",
            f"{row['rtt_ms_p50']:.2f} / {row['rtt_ms_p99']:.2f}",
            f"{row['ratio_to_measured_rtt']:.3f}",
            f"{row['cpu_us']:.0f}",
        )
    console.print(table)
    for row in rows:
        cores = ", ".join(f"{name.partition(',')[0]} {row[name]:.2f}" for name in row if name.endswith(", cores"))
        console.print(
            f"{row['connections']:.0f} connections, none open before: {row['first_second']:.0f} mails in the first "
            f"second, every connection in use after {row['all_open_ms']:.0f} ms; "
            f"opened again in the window: {row['opened_in_window']:.0f}. Cores used by the rest: {cores}."
        )
    return all(row["ratio"] >= FAR_WANTED for row in rows)


def _verdict(is_reached: bool) -> str:
    return "✓" if is_reached else "missed"


def main() -> int:
    """Parses options, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mails", type=int, default=20_000, help="in each run of ours and smtp-source")
    parser.add_argument("--size", type=int, default=4096, help="bytes of the content")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--far", type=int, nargs="*", default=[20, 100], help="connections to the smarthost far away")
    parser.add_argument("--far-seconds", type=float, default=8.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    try:
        near, disturbed = measure_near(options, directory) if options.rounds else ([], [])
        far = measure_far(options, directory) if options.far else []
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    console = Console(width=140)
    is_reached = report_near(options, near, disturbed, console) if options.rounds else True
    is_reached &= report_far(options, far, console) if far else True
    path = ROOT / "var" / "bench-smtp.json"
    path.parent.mkdir(exist_ok=True)
    measured = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "options": vars(options),
        "near": near,
        "near_disturbed": disturbed,
        "far": far,
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
