"""A rehearsal of the migration from lfx-v2-email-service, on loopback: nothing leaves the machine, nothing stays.

It makes buckets, records and arrays as lfx makes them, says what lfx would answer, starts a relay on them and compares
every answer; then it sends mails to the same groups, looks at what lfx would make of those after a rollback, and has
the log completed. Nothing of Relay's own code is imported: this needs an environment in which Relay is installed, no
checkout. ``--env-file`` and ``--nats-url`` are not there on purpose: it never touches anything that it did not start.

Exits 0 when every answer was as expected.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KeyValue

RECORDS, ARRAYS = "email-recipients", "email-group-index"
SEND, STATUS, ANALYTICS = (
    f"lfx.email-service.{name}" for name in ("send_email", "get_email_status", "get_email_engagement_analytics")
)
OUR_FIELDS = {"remote_id", "outcome", "recipients", "caller"}
"""What Relay adds to the record of a mail without events; lfx ignores them."""
LFX_FIELDS = {
    "email_id": str, "group_id": str, "to": str, "subject": str, "sent_at": str,
    "delivered": bool, "opened": bool, "open_count": int, "failed": bool,
}  # fmt: skip
LFX_FIGURES = ("total_sent", "delivered", "opened", "unique_opened", "failed")
WAIT_SECONDS = 60.0


class NotAsExpected(Exception):
    """A step of the rehearsal did not hold."""


def expect(what: str, holds: bool, shown: object = "") -> None:
    """Prints a step's result; raises ``NotAsExpected`` when it did not hold."""
    print(f"  {'ok ' if holds else 'NOT'} {what}", flush=True)
    if not holds:
        raise NotAsExpected(f"{what}: {shown}")


# -- what lfx writes, and what it answers -----------------------------------------------------------------------------
def made_records(group_ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Records as lfx writes them: its fields in its order, optional ones left out, times to the nanosecond."""
    chance = random.Random(7)
    records: dict[str, dict[str, Any]] = {}
    for group_id, count in group_ids.items():
        for number in range(count):
            email_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
            second = f"2025-01-15T{10 + number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}"
            opens = chance.choice((0, 0, 1, 3))
            record: dict[str, Any] = {"email_id": email_id, "group_id": group_id}
            record |= {"to": f"reader{number}@example.com", "subject": f"Zoë <{number}>"}
            record |= {"sent_at": f"{second}.{chance.randrange(10**9):09d}Z", "delivered": number % 10 != 3}
            if record["delivered"]:
                record["delivered_at"] = f"{second}.5Z"
            record["opened"] = bool(opens)
            if opens:
                times = [f"2025-01-16T0{each}:00:00Z" for each in range(opens)]
                record["opened_at_list"] = [{"event_id": f"{email_id}-{at}", "opened_at": at} for at in times]
                record["last_opened_at"] = times[-1]
            record |= {"open_count": opens, "failed": number % 10 == 3}
            if record["failed"]:
                record["failed_at"] = f"{second}.75Z"
            records[email_id] = record
    return records


def as_go_writes(value: Any) -> bytes:
    """JSON as Go's encoding/json has it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode()


def lfx_analytics(group_id: str, array: list[str], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What lfx counts: ids in the array, also of records that are gone; the rest from the records that are there."""
    found = [records[each] for each in array if each in records]
    return {
        "group_id": group_id,
        "total_sent": len(array),
        "delivered": sum(record["delivered"] for record in found),
        "opened": sum(record["open_count"] for record in found),
        "unique_opened": sum(bool(record["open_count"]) for record in found),
        "failed": sum(record["failed"] for record in found),
    }


# -- servers on loopback ----------------------------------------------------------------------------------------------
def program(name: str) -> str:
    """A program of this environment."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed here; run this with the python of Relay's environment")
    return found


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens right now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running(port: int, log: Path, *command: str) -> Iterator[None]:
    """A server, from when it listens until the end of the block."""
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline or process.poll() is not None:
                raise NotAsExpected(f"{command[0]} does not listen: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


class Relay:
    """``relayctl`` with the rehearsal's settings."""

    def __init__(self, directory: Path, nats_port: int, smtp_port: int, http_port: int) -> None:
        ours = ("RELAY_", "SMTP_", "SES_", "NATS_", "TRACKING_", "DEFAULT_SMTP_", "EMAIL_", "ENGAGEMENT_", "LOG_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "NATS_URL": f"nats://127.0.0.1:{nats_port}",
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(smtp_port),
            "PORT": str(http_port),
            "RELAY_HTTP_HOST": "127.0.0.1",
            "RELAY_STATE_DIR": str(directory),
            "EMAIL_ENABLED": "true",
        }

    def ctl(self, *arguments: str) -> str:
        """Runs a command; what it prints. Raises ``NotAsExpected`` when it fails."""
        done = subprocess.run(
            [program("relayctl"), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise NotAsExpected(f"relayctl {' '.join(arguments)} exited {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout


# -- the rehearsal ----------------------------------------------------------------------------------------------------
class Rehearsal:
    """One NATS with what lfx left there, and a relay that takes over."""

    def __init__(self, nc: nats.NATS, relay: Relay, mails: int) -> None:
        self._nc = nc
        self._relay = relay
        self._groups = {"invite-batch-abc123": 20, "newsletter/2025.01": mails}
        self._records = made_records(self._groups)
        self._arrays = {
            group_id: [each for each, record in self._records.items() if record["group_id"] == group_id]
            for group_id in self._groups
        }

    async def ask(self, nats_subject: str, **fields: Any) -> Any:
        """One request, one reply."""
        return json.loads((await self._nc.request(nats_subject, json.dumps(fields).encode(), timeout=35)).data)

    async def bucket(self, name: str) -> KeyValue:
        """One of lfx's buckets."""
        return await self._nc.jetstream().key_value(name)

    async def leave_what_lfx_leaves(self) -> None:
        """Buckets as lfx's chart declares them; records and arrays as lfx writes them; one record that is gone."""
        print("1. What lfx leaves behind")
        jetstream = self._nc.jetstream()
        for name, max_bytes in ((RECORDS, 64 * 1024), (ARRAYS, 1024 * 1024)):
            config = KeyValueConfig(
                bucket=name, history=1, storage=StorageType.FILE, replicas=1, max_value_size=max_bytes
            )
            await jetstream.create_key_value(config)
        records, arrays = await self.bucket(RECORDS), await self.bucket(ARRAYS)
        await self._all(
            [lambda each=each: records.put(each["email_id"], as_go_writes(each)) for each in self._records.values()]
        )
        for group_id, array in self._arrays.items():
            await arrays.put(group_id, as_go_writes(array))
        gone = self._arrays["invite-batch-abc123"][4]
        await records.delete(gone)
        del self._records[gone]
        held = ", ".join(f"{count} mails in {name}" for name, count in self._groups.items())
        expect(f"{held}; the record of one is gone", True)

    @staticmethod
    async def _all(writes: list[Callable[[], Awaitable[Any]]]) -> None:
        for start in range(0, len(writes), 200):
            await asyncio.gather(*(write() for write in writes[start : start + 200]))

    async def start(self) -> None:
        """The relay takes the buckets as they are."""
        print("2. A relay starts on it")
        await asyncio.to_thread(self._relay.ctl, "start")
        expect("every program is ready", True)
        await asyncio.to_thread(self._relay.ctl, "buckets")
        expect("relayctl buckets finds nothing that loses data", True)

    async def compare(self) -> None:
        """Every question is answered as lfx would answer it."""
        print("3. Every question is answered as lfx would")
        for group_id, array in self._arrays.items():
            wanted = [self._records[each] for each in array if each in self._records]
            if len(wanted) <= 2000:
                told = await self.ask(STATUS, group_id=group_id)
                expect(f"{group_id}: the array of {len(wanted)} records, field by field", told == wanted, told)
            told = await self.pages(group_id)
            expect(f"{group_id}: the same in pages of 500", told == wanted)
            figures = await self.ask(ANALYTICS, group_id=group_id)
            lfx = lfx_analytics(group_id, array, self._records)
            same = {name: figures.get(name) for name in lfx}
            expect(f"{group_id}: {', '.join(f'{lfx[name]} {name}' for name in LFX_FIGURES)}", same == lfx, figures)
        for email_id in [*self._records][:20]:
            told = await self.ask(STATUS, email_id=email_id)
            if told != self._records[email_id]:
                raise NotAsExpected(f"{email_id}: {told}")
        expect("20 mails by their email_id", True)

    async def pages(self, group_id: str) -> list[dict[str, Any]]:
        """The records of a group of any size."""
        records: list[dict[str, Any]] = []
        page = await self.ask(STATUS, group_id=group_id, limit=500)
        while True:
            records += page["records"]
            if page["cursor"] is None:
                return records
            page = await self.ask(STATUS, group_id=group_id, limit=500, cursor=page["cursor"])

    async def send(self) -> None:
        """New mails join the old groups; lfx's arrays stay as they are."""
        print("4. New mails in the same groups")
        arrays, records = await self.bucket(ARRAYS), await self.bucket(RECORDS)
        for group_id, array in self._arrays.items():
            before = (await arrays.get(group_id)).value
            reply = await self.ask(
                SEND, to="ann@example.com", subject="Hello", text="Hello.", html="<p>Hello.</p>", group_id=group_id
            )
            expect(f"{group_id}: sent, and the reply has both ids", reply.get("group_id") == group_id, reply)
            figures = await self.ask(ANALYTICS, group_id=group_id)
            expect(f"{group_id}: {len(array)} + 1 sent", figures["total_sent"] == len(array) + 1, figures)
            told = await self.pages(group_id)
            expect(f"{group_id}: its record comes after those of lfx", told[-1]["email_id"] == reply["email_id"])
            expect(f"{group_id}: lfx's array is what it was", (await arrays.get(group_id)).value == before)
            value = (await records.get(reply["email_id"])).value
            record = json.loads(value or b"{}")
            readable = all(type(record.get(name)) is kind for name, kind in LFX_FIELDS.items())
            expect(f"{group_id}: lfx could read the new record", readable and set(record) <= {*LFX_FIELDS, *OUR_FIELDS})

    async def roll_back(self) -> None:
        """What lfx would say after a rollback: it knows the records, and not that they are of its groups."""
        print("5. What a rollback would cost")
        arrays = await self.bucket(ARRAYS)
        for group_id, array in self._arrays.items():
            index = json.loads((await arrays.get(group_id)).value or b"[]")
            ours = (await self.ask(ANALYTICS, group_id=group_id))["total_sent"]
            left_out = ours - len(index)
            expect(f"{group_id}: lfx would count {len(index)} mails, not the {left_out} of Relay", index == array)

    async def complete_the_log(self) -> None:
        """The mails of lfx get their facts, for those who follow the log; the figures stay what they are."""
        print("6. The log is completed for lfx's mails (relayctl repair)")
        for group_id in self._groups:
            before = await self.ask(ANALYTICS, group_id=group_id)
            done = await asyncio.to_thread(self._relay.ctl, "repair", group_id, "--yes", "--min-age", "0", "--json")
            missing = json.loads(done)["missing"]
            facts = ", ".join(f"{count} {fact}" for fact, count in missing.items() if count)
            expect(f"{group_id}: appended {facts}", missing.get("sent", 0) > 0, done)
            after = await self.ask(ANALYTICS, group_id=group_id)
            expect(f"{group_id}: the figures are what they were", after == before, after)


async def rehearse(nats_url: str, relay: Relay, mails: int) -> None:
    """All steps, in order."""
    nc = await nats.connect(nats_url)
    try:
        rehearsal = Rehearsal(nc, relay, mails)
        for step in (
            rehearsal.leave_what_lfx_leaves,
            rehearsal.start,
            rehearsal.compare,
            rehearsal.send,
            rehearsal.roll_back,
            rehearsal.complete_the_log,
        ):
            await step()
    finally:
        await nc.close()


def main() -> int:
    """Makes the servers, plays the steps, ends everything; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mails", type=int, default=400, help="mails in the larger group (default: 400)")
    mails = max(1, min(parser.parse_args().mails, 26_800))
    directory = Path(tempfile.mkdtemp(prefix="relay-r-"))
    nats_port, smtp_port, http_port = free_ports(3)
    relay = Relay(directory / "relay", nats_port, smtp_port, http_port)
    nats_command = (
        program("nats-server"),
        "-a",
        "127.0.0.1",
        "-p",
        str(nats_port),
        "-js",
        "-sd",
        str(directory / "js"),
    )
    sink = (sys.executable, "-m", "aiosmtpd", "-n", "-l", f"127.0.0.1:{smtp_port}", "-c", "aiosmtpd.handlers.Sink")
    failed = ""
    try:
        with (
            running(nats_port, directory / "nats.log", *nats_command),
            running(smtp_port, directory / "smtp.log", *sink),
        ):
            try:
                asyncio.run(rehearse(f"nats://127.0.0.1:{nats_port}", relay, mails))
            finally:
                if (directory / "relay" / "started.json").exists():
                    relay.ctl("stop")
    except NotAsExpected as error:
        failed = str(error)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"\nThe rehearsal failed. {failed[:2000]}"
        if failed
        else "\nEvery answer was as lfx's. Everything was stopped again."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
