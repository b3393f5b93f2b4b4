"""What a tracked mail costs nats-server with one replica and with three: CPU of each server, disk, the pace.

A server by itself, and a cluster of three on loopback, each with bucket and log as Relay makes them; record and
``sent`` fact of each mail by raw publishes, as sending writes them, in turns. CPU is each process's own. The pace is
that of one writer on this machine, with everything on it: only the ratio travels. Half a minute; prints a table.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gevent
from machine import cpu_seconds
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from relay import contract  # noqa: E402
from relay.bus.client import Bus, Publication  # noqa: E402
from relay.bus.jetstream import JetStream, Stored  # noqa: E402
from relay.bus.kv import Bucket  # noqa: E402
from relay.errors import BusRefused, BusUnavailable  # noqa: E402
from relay.tracking.facts import Fact  # noqa: E402
from relay.tracking.log import fact_publication  # noqa: E402
from relay.tracking.record import new_record  # noqa: E402
from relay.tracking.storage import StorageConfig, ensure_storage  # noqa: E402
from tests.support.nats_server import NatsServer, free_port  # noqa: E402

SENT_AT = "2025-01-15T10:30:00.000Z"
AT_ONCE = 500
READY_SECONDS = 60.0


class Round(NamedTuple):
    """Of each mail: CPU of the servers in µs, the busiest first, and mails a second."""

    cpu_us: list[float]
    mails_per_second: float


class Place:
    """One server, or a cluster of three, with bucket and log."""

    def __init__(self, directory: Path, replicas: int) -> None:
        self.replicas = replicas
        ports = [free_port() for _ in range(replicas)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        self._directory = directory
        self.servers = [
            NatsServer(
                directory / f"{replicas}-{number}",
                config=f"server_name: r{number}\n"
                + (
                    f'cluster {{ name: bench, listen: "127.0.0.1:{port}", routes: [{routes}] }}' if replicas > 1 else ""
                ),
            )
            for number, port in enumerate(ports)
        ]

    def start(self) -> None:
        """Starts the servers; returns when bucket and log are made."""
        for server in self.servers:
            server.start()
        deadline = time.monotonic() + READY_SECONDS
        with self._connected() as jetstream:
            while (problem := self._make(jetstream)) and time.monotonic() < deadline:
                gevent.sleep(0.2)  # the servers elect a leader first
        assert not problem, problem

    @contextmanager
    def _connected(self) -> Iterator[JetStream]:
        """A thread has one bus at a time."""
        bus = Bus(self.servers[0].url, "replicas")
        bus.start()
        try:
            assert bus.wait_connected(10), bus.last_error
            yield JetStream(bus)
        finally:
            bus.close()

    def _make(self, jetstream: JetStream) -> str:
        try:
            return ensure_storage(jetstream, StorageConfig(replicas=self.replicas))
        except (BusUnavailable, BusRefused) as error:
            return str(error)

    def play(self, mails: int) -> Round:
        """Writes so many mails."""
        with self._connected() as jetstream:
            publications = self._publications(jetstream, mails)
            pids = [server.process.pid for server in self.servers if server.process is not None]
            before, begun = [cpu_seconds(pid) for pid in pids], time.monotonic()
            for start in range(0, len(publications), AT_ONCE):
                answers = jetstream.store(publications[start : start + AT_ONCE], 30)
                assert all(isinstance(answer, Stored) for answer in answers), answers
            took = time.monotonic() - begun
            used = [(cpu_seconds(pid) - cpu) * 1e6 / mails for pid, cpu in zip(pids, before, strict=True)]
        return Round(sorted(used, reverse=True), mails / took)

    @staticmethod
    def _publications(jetstream: JetStream, mails: int) -> list[Publication]:
        records = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        publications = []
        for email_id in (str(uuid.uuid4()) for _ in range(mails)):
            publications.append(fact_publication("bench", Fact.SENT, email_id, SENT_AT))
            record = new_record(
                email_id=email_id,
                group_id="bench",
                to="user@example.com",
                subject_header="Your invoice of this month",
                sent_at=SENT_AT,
                remote_id="0100019a1b2c3d4e-01234567-89ab-cdef-0123-456789abcdef-000000",
            )
            publications.append(records.creation(email_id, record))
        return publications

    def disk_bytes(self) -> int:
        """What the servers hold on disk altogether, in streams."""
        names = (contract.LOG_STREAM, f"KV_{contract.RECIPIENTS_BUCKET}")
        with self._connected() as jetstream:
            streams = [jetstream.api(f"STREAM.INFO.{name}") for name in names]
        return self.replicas * sum(int(each["state"]["bytes"]) for each in streams)

    def stop(self) -> None:
        """Ends the servers."""
        for server in self.servers:
            server.stop()


def main() -> None:
    """Plays all rounds in turns and prints what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mails", type=int, default=10_000, help="a round (default: 10000)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    places: list[Place] = []
    try:
        places.extend(Place(directory, replicas) for replicas in (1, 3))
        for place in places:
            place.start()
        seen: dict[int, list[Round]] = {place.replicas: [] for place in places}
        for number in range(arguments.rounds):
            for place in places if number % 2 else places[::-1]:
                seen[place.replicas].append(place.play(arguments.mails))
        table = Table("replicas", "CPU of all servers, µs a mail", "of the busiest", "mails/s", "bytes on disk a mail")
        for place in places:
            rounds = seen[place.replicas]
            table.add_row(
                str(place.replicas),
                f"{statistics.median(sum(each.cpu_us) for each in rounds):.0f}",
                f"{statistics.median(each.cpu_us[0] for each in rounds):.0f}",
                f"{statistics.median(each.mails_per_second for each in rounds):,.0f}",
                f"{place.disk_bytes() / arguments.mails / arguments.rounds:.0f}",
            )
        Console().print(table)
    finally:
        for place in places:
            place.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
