"""First figures of the whole path, beside Postfix's own load generator in the same run.

Starts a nats-server, Postfix's ``smtp-sink`` and N send workers on loopback, has a load generator process keep
C requests in flight, and alternates with ``smtp-source`` talking straight to the same sink. Three rounds,
medians. CPU is each process's own, from /proc. Rates depend on the machine; the ratio travels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nats
from rich.console import Console
from rich.table import Table

from relay import contract
from relay.ops.devstack import nats_server_binary

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.nats_server import free_port, wait_for_port  # noqa: E402

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def resident_mb(pid: int) -> float:
    """Memory that a process holds now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def request_of(size_bytes: int, kind: str) -> bytes:
    """A send request whose two bodies have ``size_bytes`` together."""
    line = {"ascii": "All work and no play makes a dull mail, and this is one of its lines.\n"}.get(
        kind, "Schöne Grüße – ein Text, der Quoted-Printable braucht, Zeile für Zeile.\n"
    )
    half = (line * (size_bytes // 2 // len(line.encode()) + 1)).encode()[: size_bytes // 2].decode(errors="ignore")
    mail = {
        "to": "user@example.com",
        "subject": "A mail of the benchmark",
        "text": half,
        "html": half,
        "group_id": "bench",
    }
    return json.dumps(mail, ensure_ascii=False).encode()


async def load(url: str, payload: bytes, mails: int, callers: int) -> dict[str, Any]:
    """Closed loop: ``callers`` requests in flight until ``mails`` are answered."""
    nc = await nats.connect(url)
    inbox = nc.new_inbox()
    begun: dict[str, float] = {}
    latencies: list[float] = []
    errors: dict[str, int] = {}
    done = asyncio.Event()
    sent = 0

    async def ask() -> None:
        nonlocal sent
        sent += 1
        reply_subject = f"{inbox}.{sent}"
        begun[reply_subject] = time.perf_counter()
        await nc.publish(contract.SEND_EMAIL, payload, reply_subject)

    async def on_reply(msg: Any) -> None:
        latencies.append(time.perf_counter() - begun.pop(msg.subject))
        if b'"error"' in msg.data:
            detail = json.loads(msg.data).get("detail", "")
            errors[detail] = errors.get(detail, 0) + 1
        if sent < mails:
            await ask()
        elif len(latencies) >= mails:
            done.set()

    await nc.subscribe(f"{inbox}.*", cb=on_reply)
    await asyncio.sleep(0)
    await nc.flush()
    start = time.perf_counter()
    for _ in range(min(callers, mails)):
        await ask()
    await asyncio.wait_for(done.wait(), 300)
    seconds = time.perf_counter() - start
    await nc.close()
    latencies.sort()
    return {
        "rate": mails / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
        "errors": errors,
    }


def smtp_source_rate(port: int, size_bytes: int, mails: int) -> float:
    """Mails a second of Postfix's smtp-source over 20 persistent connections."""
    command = [find("smtp-source"), "-d", "-s", "20", "-l", str(size_bytes), "-m", str(mails)]
    command += ["-f", "a@example.com", "-t", "b@example.com", f"127.0.0.1:{port}"]
    begun = time.perf_counter()
    subprocess.run(command, check=True, timeout=300)
    return mails / (time.perf_counter() - begun)


def find(program: str) -> str:
    """A Postfix tool; ``SystemExit`` when it is not installed."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise SystemExit(f"{program} is missing: install Postfix (Debian: apt-get install postfix)")
    return found


class Stack:
    """nats-server, smtp-sink and the workers, each ended by pid."""

    def __init__(self, directory: Path, workers: int, tracked: bool) -> None:
        self.nats_port, self.smtp_port = free_port(), free_port()
        config = directory / "nats.conf"
        jetstream = f'jetstream {{ store_dir: "{directory}/js" }}' if tracked else ""
        config.write_text(f"listen: 127.0.0.1:{self.nats_port}\n{jetstream}\n")
        sink = [find("smtp-sink")]
        if os.geteuid() == 0:
            sink += ["-u", "postfix"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._log = (directory / "log").open("ab")
        self.nats = self._start([nats_server_binary(), "-c", str(config)])
        self.sink = self._start([*sink, f"127.0.0.1:{self.smtp_port}", "1000"])
        wait_for_port(self.nats_port)
        wait_for_port(self.smtp_port)
        self.url = f"nats://127.0.0.1:{self.nats_port}"
        environment = os.environ | {
            "NATS_URL": self.url,
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(self.smtp_port),
            "EMAIL_ENABLED": "true",
            "RELAY_STATE_DIR": str(directory),
        }
        names = [f"send-{number + 1}" for number in range(workers)]
        self.workers = [self._start([sys.executable, "-m", "workers.send", name], environment) for name in names]
        deadline = time.monotonic() + 30
        while not all(b'"ready"' in _read(directory / "run" / f"{name}.json") for name in names):
            if time.monotonic() > deadline:
                raise SystemExit(f"the workers are not ready; see {directory / 'log'}")
            time.sleep(0.05)

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=ROOT)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Ends everything that was started, and waits."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._log.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def run_load(stack: Stack, options: argparse.Namespace, mails: int) -> dict[str, Any]:
    """One round of load from a process of its own."""
    command = [sys.executable, __file__, "--load", stack.url, "--mails", str(mails)]
    command += ["--callers", str(options.callers), "--size", str(options.size), "--body", options.body]
    done = subprocess.run(command, check=True, capture_output=True, timeout=330)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Warm-up, then rounds that alternate; medians."""
    stack = Stack(directory, options.workers, options.tracked)
    rounds: list[dict[str, float]] = []
    try:
        run_load(stack, options, min(2000, options.mails))
        for _ in range(options.rounds):
            reference = smtp_source_rate(stack.smtp_port, options.size, options.mails)
            before = {process.pid: cpu_seconds(process.pid) for process in stack.processes}
            result = run_load(stack, options, options.mails)
            used = {pid: cpu_seconds(pid) - seconds for pid, seconds in before.items()}
            if result["errors"]:
                Console(stderr=True).print(f"[red]not sent: {result['errors']}[/]")
            rounds.append(
                {
                    "rate": result["rate"],
                    "smtp-source rate": reference,
                    "ratio": result["rate"] / reference,
                    "worker CPU, µs a mail": sum(used[worker.pid] for worker in stack.workers) / options.mails * 1e6,
                    "nats-server CPU, µs a mail": used[stack.nats.pid] / options.mails * 1e6,
                    "smtp-sink CPU, µs a mail": used[stack.sink.pid] / options.mails * 1e6,
                    "p50, ms": result["p50_ms"],
                    "p99, ms": result["p99_ms"],
                    "largest worker, MB": max(resident_mb(worker.pid) for worker in stack.workers),
                    "not sent": sum(result["errors"].values()),
                }
            )
    finally:
        stack.stop()
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def main() -> None:
    """Parses options, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--mails", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=4096, help="bytes of both bodies together")
    parser.add_argument("--body", choices=["ascii", "utf8"], default="ascii")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--untracked", dest="tracked", action="store_false", help="nats-server without JetStream")
    parser.add_argument("--load", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        payload = request_of(options.size, options.body)
        print(json.dumps(asyncio.run(load(options.load, payload, options.mails, options.callers))))
        return
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    try:
        figures = measure(options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    kind = "tracked" if options.tracked else "untracked"
    table = Table(
        title=f"{options.workers} workers, {options.callers} callers, {options.size} bytes, {options.body}, {kind}"
    )
    table.add_column("figure")
    table.add_column("median", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.0f}" if value >= 100 else f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
