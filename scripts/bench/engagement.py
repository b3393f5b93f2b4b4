"""Engagement events: what one costs the worker, and how far it is from boto3's bare receive and delete loop.

A real nats-server that holds the records, a real engagement worker, and ``engagement_bare.py`` with as many greenlets,
each on a queue of its own of ``sqs_server.py``, which costs a fraction of either. Rounds take turns, with the same
notifications: enveloped by SNS, with the headers of a real mail, of fresh mails each round, in any order. CPU is each
process's own, so it does not depend on what else the machine does; rates do. At the end the log must hold exactly what
was told. Writes ``var/bench-engagement.json``; exits 1 when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import nats
from machine import Others, cpu_seconds
from nats.aio.client import Client
from rich.console import Console
from rich.table import Table
from stack import OURS, ROOT
from tracking import Filler, Servers, api, make_storage

from relay import contract
from relay.bus.client import Publication
from relay.tracking.facts import Fact
from relay.tracking.groups import tracking_id
from relay.tracking.log import fact_publication
from relay.tracking.record import new_record, rfc3339

HERE = Path(__file__).parent
READY_SECONDS = 30.0
ROUND_SECONDS = 120.0
GROUPS = 5
DEFAULT_POLLERS = 4
WARM_UP_EVENTS = 1_000
SENT_AT = 1_736_937_000.0
"""2025-01-15T10:30:00Z."""
USER_AGENT = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0"
KINDS = (("Send", 1.0), ("Delivery", 0.98), ("Open", 1.2), ("Click", 0.3), ("Bounce", 0.02), ("DeliveryDelay", 0.03))
"""How often a mail has each, about."""


class Wanted(NamedTuple):
    """A figure and its bound."""

    figure: str
    bound: float
    is_most: bool

    def is_reached_by(self, value: float) -> bool:
        """Whether the value is on the right side."""
        return value <= self.bound if self.is_most else value >= self.bound


WANTED = (
    Wanted(f"{DEFAULT_POLLERS} pollers: worker CPU, µs an event", 300.0, True),
    Wanted(f"{DEFAULT_POLLERS} pollers: events/s against boto3's bare loop", 0.4, False),
)


# -- mails and what is told of them ------------------------------------------------------------------------------------
class Mail(NamedTuple):
    """One that was sent."""

    email_id: str
    group_id: str
    ses_message_id: str


def new_mails(count: int) -> list[Mail]:
    """Mails of some groups."""
    return [
        Mail(str(uuid.uuid4()), f"newsletter-{number % GROUPS}", f"0100018c7f3a4b5c-{uuid.uuid4()}-000000")
        for number in range(count)
    ]


def stored(mails: Iterable[Mail]) -> Iterable[Publication]:
    """Their records and ``sent`` facts, as the send worker leaves them."""
    sent_at = rfc3339(SENT_AT)
    for mail in mails:
        yield fact_publication(mail.group_id, Fact.SENT, mail.email_id, sent_at)
        record = new_record(
            email_id=mail.email_id,
            group_id=mail.group_id,
            to="someone@example.com",
            subject_header="Our newsletter of November is here",
            sent_at=sent_at,
            remote_id=mail.ses_message_id,
        )
        yield Publication(f"$KV.{contract.RECIPIENTS_BUCKET}.{mail.email_id}", record)


def about(kind: str, at: str, chance: random.Random) -> dict[str, Any]:
    """What is the kind's own, as in SES's samples."""
    where = {"ipAddress": "192.0.2.1", "timestamp": at, "userAgent": USER_AGENT}
    recipient = {"emailAddress": "someone@example.com", "status": "5.1.1", "diagnosticCode": "smtp; 550 5.1.1 unknown"}
    told: dict[str, dict[str, Any]] = {
        "Send": {"send": {}},
        "Delivery": {
            "delivery": {
                "timestamp": at,
                "processingTimeMillis": 1234,
                "recipients": ["someone@example.com"],
                "smtpResponse": "250 2.6.0 Message received",
                "reportingMTA": "a8-50.smtp-out.amazonses.com",
            }
        },
        "Open": {"open": where},
        "Click": {"click": {**where, "link": f"https://example.com/{chance.randrange(10**6)}", "linkTags": None}},
        "Bounce": {
            "bounce": {
                "bounceType": "Permanent",
                "bounceSubType": "General",
                "bouncedRecipients": [recipient],
                "timestamp": at,
                "feedbackId": str(uuid.uuid4()),
            }
        },
        "DeliveryDelay": {"deliveryDelay": {"delayType": "MailboxFull", "timestamp": at, "delayedRecipients": []}},
    }
    return told[kind]


def ses_mail(mail: Mail) -> dict[str, Any]:
    """What SES repeats of a mail in each of its events."""
    headers = {
        "From": '"Example" <no-reply@example.org>',
        "To": "someone@example.com",
        "Subject": "Our newsletter of November is here",
        "Date": "Wed, 15 Jan 2025 10:30:00 +0000",
        "Message-ID": f"<{mail.email_id}@example.org>",
        contract.TRACKING_HEADER: tracking_id(mail.group_id, mail.email_id),
        "MIME-Version": "1.0",
        "Content-Type": 'multipart/alternative; boundary="=_f3a4b5c0a1b2c3d4e5f60718293a4b5c"',
        "List-Unsubscribe": f"<https://example.org/unsubscribe/{mail.email_id}>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
    }
    tags = {
        "ses:operation": ["SendSmtpEmail"],
        "ses:configuration-set": ["newsletter"],
        "ses:source-ip": ["192.0.2.7"],
        "ses:from-domain": ["example.org"],
        "ses:caller-identity": ["relay"],
        contract.SES_EMAIL_ID_TAG: [mail.email_id],
    }
    return {
        "timestamp": rfc3339(SENT_AT),
        "source": "no-reply@example.org",
        "sourceArn": "arn:aws:ses:us-east-1:123456789012:identity/example.org",
        "sendingAccountId": "123456789012",
        "messageId": mail.ses_message_id,
        "destination": ["someone@example.com"],
        "headersTruncated": False,
        "headers": [{"name": name, "value": value} for name, value in headers.items()],
        "commonHeaders": {
            "from": ["no-reply@example.org"],
            "to": ["someone@example.com"],
            "messageId": mail.ses_message_id,
            "subject": "Our newsletter of November is here",
        },
        "tags": tags,
    }


def notifications(mails: Sequence[Mail], events: int, chance: random.Random) -> tuple[list[str], Counter[str]]:
    """So many, in any order; and how often each kind."""
    kinds, weights = zip(*KINDS, strict=True)
    bodies, counts = [], Counter[str]()
    for kind in chance.choices(kinds, weights, k=events):
        at = rfc3339(SENT_AT + chance.randrange(86_400_000) / 1000)
        event = {"eventType": kind, "mail": ses_mail(chance.choice(mails)), **about(kind, at, chance)}
        envelope = {
            "Type": "Notification",
            "MessageId": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            "TopicArn": "arn:aws:sns:us-east-1:123456789012:ses-events",
            "Subject": "Amazon SES Email Event Notification",
            "Message": json.dumps(event),
            "Timestamp": at,
            "SignatureVersion": "1",
            "Signature": "A" * 344,
            "SigningCertURL": "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-0123456789abcdef.pem",
            "UnsubscribeURL": "https://sns.us-east-1.amazonaws.com/?Action=Unsubscribe&SubscriptionArn=arn:aws:sns:us-"
            "east-1:123456789012:ses-events:01234567-89ab-cdef-0123-456789abcdef",
        }
        bodies.append(json.dumps(envelope))
        counts[kind] += 1
    return bodies, counts


# -- processes ---------------------------------------------------------------------------------------------------------
class EventServers(Servers):
    """nats-server, the stand-in for SQS, and those that read from it."""

    def start_sqs(self) -> None:
        """Starts the stand-in."""
        self.sqs = self._start_told([sys.executable, str(HERE / "sqs_server.py")], None)
        self.sqs_url = self.told

    def start_worker(self, pollers: int) -> subprocess.Popen[bytes]:
        """Starts an engagement worker and returns when it polls."""
        presence = self._directory / "run" / "engagement.json"
        presence.unlink(missing_ok=True)
        settings = {
            "NATS_URL": self.url,
            "RELAY_STATE_DIR": str(self._directory),
            "SES_EVENTING_ENABLED": "true",
            "SES_ENGAGEMENT_SQS_QUEUE_URL": f"{self.sqs_url}/123456789012/worker",
            "ENGAGEMENT_POLLERS": str(pollers),
        }
        command = [sys.executable, "-m", "workers.engagement", "engagement"]
        worker = self._start(command, self._environment() | settings)
        deadline = time.monotonic() + READY_SECONDS
        while not presence.exists() or b'"ready"' not in presence.read_bytes():
            if worker.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the worker is not ready:\n{(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        return worker

    def start_bare(self, pollers: int) -> subprocess.Popen[bytes]:
        """Starts the bare loop and returns when it polls."""
        command = [sys.executable, str(HERE / "engagement_bare.py"), f"{self.sqs_url}/123456789012/bare", str(pollers)]
        return self._start_told(command, self._environment())

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends one of them."""
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def _start_told(self, command: list[str], environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, env=environment, cwd=ROOT)
        self._processes.append(process)
        assert process.stdout is not None
        self.told = process.stdout.readline().decode().strip()
        if not self.told:
            raise SystemExit(f"{command} ended with {process.wait(10)}")
        return process

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith((*OURS, "AWS_", "ENGAGEMENT_"))
        }
        return kept | {
            "AWS_ENDPOINT_URL": self.sqs_url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }


class Round(NamedTuple):
    """One queue worked off."""

    seconds: float
    cpu_us: float
    """Of whoever read, an event."""
    sqs_share: float
    """Of the time the stand-in used a core."""
    nats_us: float
    """Of nats-server, an event."""


def work_off(servers: EventServers, queue: str, reader: subprocess.Popen[bytes], bodies: Sequence[str]) -> Round:
    """Puts everything into the queue at once and waits until it is deleted."""
    lines = b"\n".join(json.dumps(body).encode() for body in bodies)
    url = f"{servers.sqs_url}/123456789012/{queue}"
    pids = (reader.pid, servers.sqs.pid, servers.nats.pid)
    urllib.request.urlopen(urllib.request.Request(url, b"", method="PUT"), timeout=10).close()
    before = [cpu_seconds(pid) for pid in pids]
    urllib.request.urlopen(urllib.request.Request(url, lines, method="PUT"), timeout=ROUND_SECONDS).close()
    with urllib.request.urlopen(url, timeout=ROUND_SECONDS) as answer:
        told = json.load(answer)
    used = [cpu_seconds(pid) - cpu for pid, cpu in zip(pids, before, strict=True)]
    seconds = told["emptied_at"] - told["put_at"]
    return Round(seconds, used[0] / len(bodies) * 1e6, used[1] / seconds, used[2] / len(bodies) * 1e6)


# -- measure -----------------------------------------------------------------------------------------------------------
async def measure(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Every number of pollers in turn; within one, worker and bare loop in turns."""
    servers = EventServers(directory)
    figures: dict[str, float] = {}
    chance = random.Random(6)
    told: Counter[str] = Counter()
    try:
        servers.start_sqs()
        nc = await nats.connect(servers.url)
        await make_storage(nc)
        filler = Filler(nc)
        await filler.begin()

        async def events(count: int) -> list[str]:
            mails = new_mails(max(1, count // 4))
            await filler.store(stored(mails))
            bodies, counts = notifications(mails, count, chance)
            told.update(counts)
            return bodies

        for pollers in options.pollers:
            worker, bare = servers.start_worker(pollers), servers.start_bare(pollers)
            turns = {"worker": worker, "bare": bare}
            rounds: dict[str, list[Round]] = {"worker": [], "bare": []}
            warm_up = await events(WARM_UP_EVENTS)
            for queue, reader in turns.items():
                await asyncio.to_thread(work_off, servers, queue, reader, warm_up)
            others = Others(worker.pid, bare.pid, servers.sqs.pid, servers.nats.pid)
            for number in range(options.rounds):
                bodies = await events(options.events)
                for queue, reader in list(turns.items())[:: 1 if number % 2 else -1]:
                    rounds[queue].append(await asyncio.to_thread(work_off, servers, queue, reader, bodies))
            figures |= figures_of(f"{pollers} poller{'s' * (pollers > 1)}", rounds, options.events)
            figures[f"{pollers} poller{'s' * (pollers > 1)}: cores used by others meanwhile"] = others.cores()
            for reader in turns.values():
                servers.end(reader)
        await check(nc, told)
        figures["bytes of a notification"] = statistics.mean(len(body) for body in warm_up)
        await nc.close()
    finally:
        servers.stop()
    return figures


def figures_of(name: str, rounds: dict[str, list[Round]], events: int) -> dict[str, float]:
    """Medians over the rounds; ratios within a round."""
    worker, bare = rounds["worker"], rounds["bare"]
    pairs = list(zip(worker, bare, strict=True))
    return {
        f"{name}: worker CPU, µs an event": statistics.median(each.cpu_us for each in worker),
        f"{name}: bare loop CPU, µs an event": statistics.median(each.cpu_us for each in bare),
        f"{name}: nats-server CPU, µs an event": statistics.median(each.nats_us for each in worker),
        f"{name}: worker, events/s": statistics.median(events / each.seconds for each in worker),
        f"{name}: bare loop, events/s": statistics.median(events / each.seconds for each in bare),
        f"{name}: events/s against boto3's bare loop": statistics.median(
            without.seconds / each.seconds for each, without in pairs
        ),
        f"{name}: share of a core that the stand-in used, worker": statistics.median(each.sqs_share for each in worker),
        f"{name}: share of a core that the stand-in used, bare loop": statistics.median(
            each.sqs_share for each in bare
        ),
    }


async def check(nc: Client, told: Counter[str]) -> None:
    """``SystemExit`` when the log does not hold what was told: then something else was measured."""
    question = {"subjects_filter": f"{contract.LOG_PREFIX}.>"}
    info = await api(nc, f"STREAM.INFO.{contract.LOG_STREAM}", question)
    logged: Counter[str] = Counter()
    for nats_subject, count in info["state"]["subjects"].items():
        logged[nats_subject.rpartition(".")[2]] += count
    parked = (await api(nc, f"STREAM.INFO.{contract.PARKED_STREAM}", {}))["state"]["messages"]
    seen, wanted = (logged["open"], logged["click"], parked), (told["Open"], told["Click"], 0)
    if seen != wanted:
        raise SystemExit(f"opens, clicks and what is parked are {seen}, not {wanted}")


def report(options: argparse.Namespace, figures: dict[str, float]) -> bool:
    """Prints every figure; returns whether all that are wanted were reached."""
    wanted = {each.figure: each for each in WANTED}
    table = Table(title=f"{options.rounds} rounds of {options.events:,} events; one worker, one nats-server, on disk")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    is_reached = True
    for name, value in figures.items():
        bound = ""
        if name in wanted:
            is_good = wanted[name].is_reached_by(value)
            is_reached &= is_good
            bound = f"{'≤' if wanted[name].is_most else '≥'} {wanted[name].bound:g} {'✓' if is_good else 'missed'}"
        table.add_row(name, f"{value:,.0f}" if value >= 100 else f"{value:.2f}", bound)
    Console(width=120).print(table)
    return is_reached


def main() -> int:
    """Parses options, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=6_000, help="a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each number of pollers")
    parser.add_argument("--pollers", type=int, nargs="+", default=[1, 2, 4], help="how many; each is measured")
    options = parser.parse_args()
    if options.rounds < 1 or options.events < 100 or min(options.pollers) < 1:
        parser.error("at least one round, 100 events and one poller")
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    try:
        figures = asyncio.run(measure(options, directory / "work"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    is_reached = report(options, figures)
    path = ROOT / "var" / "bench-engagement.json"
    path.parent.mkdir(exist_ok=True)
    measured = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "options": vars(options),
        "wanted": {each.figure: each.bound for each in WANTED},
        "is_reached": is_reached,
        "figures": figures,
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
