"""Tracking by itself: does a group of 100,000 cost what a group of 10 costs, and what does each mail cost the server?

A real nats-server, a real status worker, the relay's own ``Tracker`` in a process of its own (``tracking_writer.py``)
and callers in others. What is compared is measured in turns within one run. CPU is each process's own, so
it does not depend on what else the machine does; times that a caller sees do. The memory of nats-server is measured on
another one: the live heap after a collection that its profiling port was asked for, as a slope over several sizes.
Writes ``var/bench-tracking.json``; exits 1 when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import nats
from machine import Others, cpu_seconds, free_port, resident_mb, wait_for_port
from nats.aio.client import Client
from nats.aio.msg import Msg
from rich.console import Console
from rich.table import Table
from stack import OURS, ROOT

from relay import contract
from relay.bus.client import Publication
from relay.ops.devstack import nats_server_binary
from relay.tracking import storage
from relay.tracking.facts import Fact
from relay.tracking.log import fact_publication
from relay.tracking.record import new_record

HERE = Path(__file__).parent
READY_SECONDS = 30.0
RUN_SECONDS = 300.0
SENT_AT = "2025-01-15T10:30:00.000Z"
IN_FLIGHT = 4000
"""Unacknowledged publications at a time: what JetStream cannot take in time it refuses."""
LARGE = "newsletter-large"
SMALL = "newsletter-small"
SMALL_MAILS = 10
HUNDRED = 100
QUIET_SECONDS = 15.0
"""After which nats-server has dropped the blocks of a stream that it kept in memory; it does so after ten."""
SCALES = (1_000_000, 10_000_000, 100_000_000)


class Wanted(NamedTuple):
    """A figure and its bound."""

    figure: str
    most: float
    unit: str = ""


WANTED = (
    Wanted("analytics p50, large group, ms", 5.0),
    Wanted("analytics p50, large group against one of 10", 1.5),
    Wanted("analytics, status worker CPU, large group against one of 10", 1.5),
    Wanted("append, worker CPU, large group against at 100", 1.2),
    Wanted("append, nats-server CPU, large group against at 100", 1.2),
    Wanted("full listing, status worker CPU, µs a record", 40.0),
    Wanted("one mail while the large group is listed, p99, ms", 20.0),
    Wanted("status worker, MB resident at most", 150.0),
)


class Servers:
    """nats-server and whatever runs against it, each ended by pid."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True)
        self._log = (directory / "log").open("ab")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port, self.profiling_port = free_port(), free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._config = directory / "nats.conf"
        self._config.write_text(
            f"listen: 127.0.0.1:{self.port}\nprof_port: {self.profiling_port}\n"
            f'jetstream {{ store_dir: "{directory}/js" }}\n'
        )
        self.nats = self.start_nats()

    def start_nats(self) -> subprocess.Popen[bytes]:
        """Starts nats-server on what its store holds."""
        self.nats = self._start([nats_server_binary(), "-c", str(self._config)])
        wait_for_port(self.port, READY_SECONDS)
        return self.nats

    def start_status_worker(self) -> subprocess.Popen[bytes]:
        """Starts it and returns when it answers questions."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
            "NATS_URL": self.url,
            "PORT": str(free_port()),
            "RELAY_HTTP_HOST": "127.0.0.1",
            "RELAY_STATE_DIR": str(self._directory),
        }
        worker = self._start([sys.executable, "-m", "workers.status", "status"], environment)
        deadline = time.monotonic() + READY_SECONDS
        while b'"ready"' not in _read(self._directory / "run" / "status.json"):
            if time.monotonic() > deadline:
                raise SystemExit(f"the status worker is not ready:\n{_read(self._directory / 'log').decode()[-2000:]}")
            time.sleep(0.05)
        return worker

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=ROOT)
        self._processes.append(process)
        return process

    def heap_bytes(self) -> float:
        """What nats-server holds in memory that is in use, after a collection."""
        url = f"http://127.0.0.1:{self.profiling_port}/debug/pprof/heap?gc=1&debug=1"
        for _ in range(2):  # what has a finalizer goes with the second
            with urllib.request.urlopen(url, timeout=60) as answer:
                found = re.search(rb"# HeapAlloc = (\d+)", answer.read())
        if found is None:
            raise SystemExit("nats-server does not tell its heap")
        return float(found[1])

    def stop_nats(self) -> None:
        """Ends nats-server in order."""
        self.nats.terminate()
        self.nats.wait(30)

    def stop(self) -> None:
        """Ends everything that was started, and waits."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._log.close()


class Filler:
    """Raw publishes to JetStream, many in flight, every one acknowledged."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._inbox = nc.new_inbox()
        self._published = 0
        self._acknowledged = 0
        self._refusal = b""
        self._news = asyncio.Event()

    async def begin(self) -> None:
        """Must be called once, before ``store``."""
        await self._nc.subscribe(self._inbox, cb=self._on_ack)

    async def _on_ack(self, msg: Msg) -> None:
        self._acknowledged += 1
        if b'"error"' in msg.data or msg.headers:
            self._refusal = msg.data or str(msg.headers).encode()
        self._news.set()

    async def store(self, publications: Iterable[Publication]) -> None:
        """Returns when all are stored; ``SystemExit`` when one is not."""
        for publication in publications:
            headers = dict(publication.headers) if publication.headers else None
            await self._nc.publish(publication.nats_subject, publication.payload, self._inbox, headers=headers)
            self._published += 1
            if self._published - self._acknowledged >= IN_FLIGHT:
                await self._wait(IN_FLIGHT // 2)
        await self._wait(0)

    async def _wait(self, left: int) -> None:
        while self._published - self._acknowledged > left:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), READY_SECONDS)
        if self._refusal:
            raise SystemExit(f"JetStream refused a publication: {self._refusal[:300]!r}")


def mails_of(group_id: str, count: int, *, are_read: bool = True) -> Iterable[Publication]:
    """What is kept of mails: a record and a ``sent`` fact; when they ``are_read``, facts of events as well."""
    for number in range(count):
        email_id = str(uuid.uuid4())
        yield fact_publication(group_id, Fact.SENT, email_id, SENT_AT)
        record = new_record(
            email_id=email_id,
            group_id=group_id,
            to="someone@example.com",
            subject_header="Our newsletter of November is here",
            sent_at=SENT_AT,
            remote_id="0100018c7f3a4b5c-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9-000000",
        )
        yield Publication(f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}", record)
        if not are_read:
            continue
        yield fact_publication(group_id, Fact.DELIVERED, email_id, SENT_AT)
        if number % 2 == 0:
            yield fact_publication(group_id, Fact.OPENED, email_id, SENT_AT)
            yield fact_publication(group_id, Fact.OPEN, email_id, SENT_AT, "event-1")


async def make_storage(nc: Client, duplicate_window_seconds: float = storage.DUPLICATE_WINDOW_SECONDS) -> None:
    """Bucket and log as the relay makes them; the log's duplicate window may be another."""
    for stream in storage._bucket(storage.StorageConfig()), storage._log(storage.StorageConfig()):
        if stream["name"] == contract.LOG_STREAM:
            stream["duplicate_window"] = int(duplicate_window_seconds * 1e9)
        await api(nc, f"STREAM.CREATE.{stream['name']}", stream)


async def api(nc: Client, call: str, body: dict[str, Any]) -> dict[str, Any]:
    """One call of the JetStream API; ``SystemExit`` when it is refused."""
    answer: dict[str, Any] = json.loads((await nc.request(f"$JS.API.{call}", json.dumps(body).encode(), 10)).data)
    if "error" in answer:
        raise SystemExit(f"{call}: {answer['error']}")
    return answer


# -- what it costs to ask and to append --------------------------------------------------------------------------------
class Work:
    """One nats-server, one status worker, and a connected caller."""

    def __init__(self, servers: Servers, status: subprocess.Popen[bytes], nc: Client, mails: int) -> None:
        self.servers = servers
        self.status = status
        self.nc = nc
        self.mails = mails
        self.groups_of_hundred: list[str] = []
        self.some_email_ids: list[str] = []

    async def fill(self, groups_of_hundred: int) -> float:
        """The large group, a small one and some of 100; the seconds it took."""
        begun = time.perf_counter()
        filler = Filler(self.nc)
        await filler.begin()
        self.groups_of_hundred = [f"newsletter-{number:05}" for number in range(groups_of_hundred)]
        await filler.store(mails_of(SMALL, SMALL_MAILS))
        for group_id in self.groups_of_hundred:
            await filler.store(mails_of(group_id, HUNDRED))
        await filler.store(mails_of(LARGE, self.mails))
        page = await self.ask(contract.GET_EMAIL_STATUS, group_id=LARGE, limit=1000)
        self.some_email_ids = [record["email_id"] for record in page["records"]]
        return time.perf_counter() - begun

    async def ask(self, nats_subject: str, **question: object) -> Any:
        """One question of a caller, one answer."""
        return json.loads((await self.nc.request(nats_subject, json.dumps(question).encode(), timeout=30)).data)

    async def analytics(self, rounds: int, each: int) -> dict[str, float]:
        """Both groups in turns: what the caller sees, and what the worker needs."""
        groups = {LARGE: self.mails, SMALL: SMALL_MAILS}
        seconds: dict[str, list[float]] = {group_id: [] for group_id in groups}
        cpu: dict[str, list[float]] = {group_id: [] for group_id in groups}
        for number in range(rounds + 1):
            for group_id, mails in list(groups.items())[:: 1 if number % 2 else -1]:
                before = cpu_seconds(self.status.pid)
                taken = []
                for _ in range(each):
                    begun = time.perf_counter()
                    answer = await self.ask(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, group_id=group_id)
                    taken.append(time.perf_counter() - begun)
                    if (answer["total_sent"], answer["unique_opened"]) != (mails, mails // 2):
                        raise SystemExit(f"wrong figures: {answer}")
                if number:  # the first round warms up
                    seconds[group_id] += taken
                    cpu[group_id].append((cpu_seconds(self.status.pid) - before) / each * 1e6)
        p50 = {group_id: statistics.median(each) * 1000 for group_id, each in seconds.items()}
        cpu_us = {group_id: statistics.median(each) for group_id, each in cpu.items()}
        return {
            "analytics p50, group of 10, ms": p50[SMALL],
            "analytics p50, large group, ms": p50[LARGE],
            "analytics p50, large group against one of 10": p50[LARGE] / p50[SMALL],
            "analytics, status worker CPU, group of 10, µs": cpu_us[SMALL],
            "analytics, status worker CPU, large group, µs": cpu_us[LARGE],
            "analytics, status worker CPU, large group against one of 10": cpu_us[LARGE] / cpu_us[SMALL],
        }

    def append(self, rounds: int, groups_a_round: int) -> dict[str, float]:
        """As many mails to groups of 100, which grow to 200 at most, as to the large one, in turns."""
        command = [sys.executable, str(HERE / "tracking_writer.py"), self.servers.url]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        used: dict[tuple[str, str], list[float]] = {}
        mails = groups_a_round * HUNDRED
        try:
            if off_reason := _told(writer)["off_reason"]:
                raise SystemExit(f"the writer does not track: {off_reason}")
            _tell(writer, {"group_ids": [LARGE], "mails": mails})  # warms up
            _told(writer)
            for number in range(rounds):
                hundreds = self.groups_of_hundred[number * groups_a_round : (number + 1) * groups_a_round]
                turns = [("100", hundreds, HUNDRED), ("large", [LARGE], mails)]
                for name, group_ids, each in turns[:: 1 if number % 2 else -1]:
                    before = {pid: cpu_seconds(pid) for pid in (writer.pid, self.servers.nats.pid)}
                    _tell(writer, {"group_ids": group_ids, "mails": each})
                    if (told := _told(writer)) != {"tracked": mails, "lost": 0}:
                        raise SystemExit(f"not every mail was tracked: {told}")
                    for who, pid in (("worker", writer.pid), ("nats-server", self.servers.nats.pid)):
                        used.setdefault((who, name), []).append((cpu_seconds(pid) - before[pid]) / mails * 1e6)
        finally:
            if writer.stdin is not None:
                writer.stdin.close()
            try:
                writer.wait(20)
            except subprocess.TimeoutExpired:
                writer.kill()
                writer.wait(10)
        figures = {}
        for who in ("worker", "nats-server"):
            few, many = statistics.median(used[who, "100"]), statistics.median(used[who, "large"])
            figures[f"append, {who} CPU, to groups of 100, µs a mail"] = few
            figures[f"append, {who} CPU, to the large group, µs a mail"] = many
            figures[f"append, {who} CPU, large group against at 100"] = many / few
        return figures

    async def listing(self, rounds: int) -> dict[str, float]:
        """All pages of the large group: CPU for each record, and with nobody else asking how long it takes."""
        worker_us, server_us, seconds, expected = [], [], [], await self._mails_now()
        others = Others(self.status.pid, self.servers.nats.pid)
        for _ in range(rounds):
            before = {pid: cpu_seconds(pid) for pid in (self.status.pid, self.servers.nats.pid)}
            told = json.loads(await _finish(await self._start_listing()))
            if told["records"] != expected:
                raise SystemExit(f"the listing has {told['records']} records, not {expected}")
            used = {pid: (cpu_seconds(pid) - cpu) / expected * 1e6 for pid, cpu in before.items()}
            worker_us.append(used[self.status.pid])
            server_us.append(used[self.servers.nats.pid])
            seconds.append(told["seconds"])
        return {
            "full listing, status worker CPU, µs a record": statistics.median(worker_us),
            "full listing, nats-server CPU, µs a record": statistics.median(server_us),
            "full listing, s": statistics.median(seconds),
            "full listing, pages": told["pages"],
            "full listing, cores used by others meanwhile": others.cores(),
        }

    async def beside_a_listing(self, rounds: int) -> dict[str, float]:
        """One mail after the other is asked for while the large group is listed: what the caller waits."""
        p50s, p99s, asked = [], [], 0
        others = Others(self.status.pid, self.servers.nats.pid)
        for _ in range(rounds):
            taken: list[float] = []
            listing = await self._start_listing()
            ended = asyncio.ensure_future(_finish(listing))
            while not ended.done():
                email_id = self.some_email_ids[len(taken) % len(self.some_email_ids)]
                begun = time.perf_counter()
                answer = await self.ask(contract.GET_EMAIL_STATUS, email_id=email_id)
                taken.append(time.perf_counter() - begun)
                if answer.get("email_id") != email_id:
                    raise SystemExit(f"wrong record: {answer}")
            await ended
            cuts = statistics.quantiles(taken, n=100)
            p50s.append(cuts[49] * 1000)
            p99s.append(cuts[98] * 1000)
            asked += len(taken)
        return {
            "one mail while the large group is listed, p50, ms": statistics.median(p50s),
            "one mail while the large group is listed, p99, ms": statistics.median(p99s),
            "one mail while the large group is listed, questions": asked,
            "one mail while the large group is listed, cores used by others meanwhile": others.cores(),
        }

    async def _mails_now(self) -> int:
        answer = await self.ask(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, group_id=LARGE)
        return int(answer["total_sent"])

    async def _start_listing(self) -> asyncio.subprocess.Process:
        command = [sys.executable, str(HERE / "tracking_lister.py"), self.servers.url, LARGE, "1000"]
        return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)


async def _finish(process: asyncio.subprocess.Process) -> bytes:
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), RUN_SECONDS)
    except TimeoutError:
        process.kill()
        raise
    if process.returncode:
        raise SystemExit(f"a listing ended with {process.returncode}")
    return printed


def _tell(process: subprocess.Popen[bytes], what: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")
    process.stdin.flush()


def _told(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the writer ended with {process.wait(10)}")
    told: dict[str, Any] = json.loads(line)
    return told


async def measure_work(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Everything that is asked and appended, in one run."""
    servers = Servers(directory)
    figures: dict[str, float] = {}
    try:
        nc = await nats.connect(servers.url)
        await make_storage(nc)
        status = servers.start_status_worker()
        work = Work(servers, status, nc, options.mails)
        figures["filling, s"] = await work.fill(options.rounds * options.groups)
        figures |= await work.analytics(options.rounds, 200)
        figures |= await asyncio.to_thread(work.append, options.rounds, options.groups)
        figures |= await work.listing(options.listings)
        figures |= await work.beside_a_listing(options.listings)
        figures["status worker, MB resident at most"] = _most_resident_mb(status.pid)
        await nc.close()
    finally:
        servers.stop()
    return figures


# -- what a mail costs nats-server -------------------------------------------------------------------------------------
class Held(NamedTuple):
    """What nats-server holds with so many mails."""

    mails: int
    new_ids: int
    """Ids that its duplicate window had just taken."""
    ids_bytes: float
    heap_bytes: float
    """Without any ids."""
    resident_bytes: float
    disk_bytes: float


async def measure_memory(sizes: Sequence[int], directory: Path) -> tuple[list[Held], dict[str, float]]:
    """Fills a nats-server up to each size; what it then holds, with and without ids in the duplicate window."""
    servers = Servers(directory)
    held: list[Held] = []
    try:
        nc = await nats.connect(servers.url)
        await make_storage(nc)
        filler = Filler(nc)
        await filler.begin()
        log = storage._log(storage.StorageConfig())
        for size in sizes:
            # An hour keeps every id, whatever filling takes; a tenth of a second forgets them with the next fact.
            await api(nc, f"STREAM.UPDATE.{log['name']}", log | {"duplicate_window": 3600 * 10**9})
            new_ids = size - (held[-1].mails if held else 0)
            await filler.store(mails_of(LARGE, new_ids, are_read=False))
            await asyncio.sleep(QUIET_SECONDS)
            with_ids = servers.heap_bytes()
            await api(nc, f"STREAM.UPDATE.{log['name']}", log | {"duplicate_window": 10**8})
            await filler.store([fact_publication("other", Fact.SENT, f"other-{size}", SENT_AT)])
            await asyncio.sleep(QUIET_SECONDS)
            states = [
                (await api(nc, f"STREAM.INFO.{name}", {}))["state"]
                for name in (contract.LOG_STREAM, f"KV_{contract.RECIPIENTS_BUCKET}")
            ]
            if [state["messages"] for state in states] != [size + len(held) + 1, size]:
                raise SystemExit(f"the streams do not hold {size} mails: {states}")
            disk_bytes = float(sum(state["bytes"] for state in states))
            heap_bytes = servers.heap_bytes()
            resident_bytes = resident_mb(servers.nats.pid) * 1e6
            held.append(Held(size, new_ids, with_ids - heap_bytes, heap_bytes, resident_bytes, disk_bytes))
        most_mb = _most_resident_mb(servers.nats.pid)
        await nc.close()
        begun = time.perf_counter()
        servers.stop_nats()
        servers.start_nats()
        nc = await nats.connect(servers.url)
        await _wait_for_stream(nc, f"KV_{contract.RECIPIENTS_BUCKET}")
        restart_seconds = time.perf_counter() - begun
        await nc.close()
        after_restart = servers.heap_bytes()
    finally:
        servers.stop()
    mails = [float(each.mails) for each in held]
    per_mail = slope(mails, [each.heap_bytes for each in held])
    ids = statistics.median(each.ids_bytes / each.new_ids for each in held)
    return held, {
        "nats-server, bytes of live memory a tracked mail": per_mail,
        "nats-server, bytes of live memory without any mail": held[0].heap_bytes - per_mail * mails[0],
        "nats-server, bytes of live memory an id in the duplicate window": ids,
        "nats-server, resident bytes a tracked mail, at rest": slope(mails, [each.resident_bytes for each in held]),
        "nats-server, resident bytes a tracked mail, at most while filling": most_mb * 1e6 / mails[-1],
        "nats-server, bytes on disk a tracked mail": slope(mails, [each.disk_bytes for each in held]),
        "nats-server, bytes of live memory a mail, after a restart": after_restart / mails[-1],
        "nats-server, s to stop and start again": restart_seconds,
    }


async def _wait_for_stream(nc: Client, name: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            await api(nc, f"STREAM.INFO.{name}", {})
            return
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


def slope(places: Sequence[float], values: Sequence[float]) -> float:
    """By how much the values grow with each step to the right, by least squares."""
    return statistics.linear_regression(places, values).slope


def _most_resident_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise SystemExit("the kernel does not tell how much memory a process had at most")
    return int(found[1]) * 1024 / 1e6


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# -- report ------------------------------------------------------------------------------------------------------------
def report(options: argparse.Namespace, figures: dict[str, float], console: Console) -> bool:
    """Prints every figure; returns whether all that are wanted were reached."""
    wanted = {each.figure: each for each in WANTED}
    title = f"A large group of {options.mails:,} mails; one status worker, one nats-server, one replica, on disk"
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    is_reached = True
    for name, value in figures.items():
        shown = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        bound = ""
        if name in wanted:
            is_good = value <= wanted[name].most
            is_reached &= is_good
            bound = f"≤ {wanted[name].most:g} {'✓' if is_good else 'missed'}"
        table.add_row(name, shown, bound)
    console.print(table)
    return is_reached


def report_memory(figures: dict[str, float], console: Console) -> list[dict[str, float]]:
    """Prints what follows for larger numbers of mails; the rows."""
    rows = []
    table = Table(title="What follows for nats-server, in GB")
    for heading in ("mails tracked", "live memory", "resident, plan for", "on disk"):
        table.add_column(heading, justify="right")
    for mails in SCALES:
        live = figures["nats-server, bytes of live memory without any mail"]
        live += mails * figures["nats-server, bytes of live memory a tracked mail"]
        # Go collects when what is in use has doubled, unless GOMEMLIMIT says otherwise.
        row = {
            "mails": float(mails),
            "live_gb": live / 1e9,
            "plan_gb": 2 * live / 1e9,
            "disk_gb": mails * figures["nats-server, bytes on disk a tracked mail"] / 1e9,
        }
        rows.append(row)
        table.add_row(f"{mails:,}", f"{row['live_gb']:.2f}", f"{row['plan_gb']:.2f}", f"{row['disk_gb']:.2f}")
    console.print(table)
    return rows


def main() -> int:
    """Parses options, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mails", type=int, default=100_000, help="in the large group")
    parser.add_argument("--rounds", type=int, default=7, help="of analytics and of appending")
    parser.add_argument("--groups", type=int, default=30, help="groups of 100 that a round appends 100 mails each to")
    parser.add_argument("--listings", type=int, default=5, help="rounds of listing the large group")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[100_000, 200_000, 400_000], help="mails that nats-server holds; two"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.listings < 1 or len(options.sizes) == 1 or options.mails < 1000:
        parser.error("at least one round, one listing and 1,000 mails, and no or several sizes")
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    console = Console(width=120)
    held: list[Held] = []
    rows: list[dict[str, float]] = []
    try:
        figures = asyncio.run(measure_work(options, directory / "work"))
        if options.sizes:
            held, memory = asyncio.run(measure_memory(sorted(options.sizes), directory / "memory"))
            figures |= memory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    is_reached = report(options, figures, console)
    if held:
        rows = report_memory(figures, console)
    path = ROOT / "var" / "bench-tracking.json"
    path.parent.mkdir(exist_ok=True)
    measured = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "options": vars(options),
        "wanted": {each.figure: each.most for each in WANTED},
        "is_reached": is_reached,
        "figures": figures,
        "held": [each._asdict() for each in held],
        "scales": rows,
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
