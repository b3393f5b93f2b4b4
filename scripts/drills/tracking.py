"""Tracking under stress: everybody writes at once, workers are killed, JetStream hangs.

``tracking-counts``: 4 send workers send 20,000 mails to one group, while two processes fold events into the same
records, also into those that are only just being written, and are told some events both. Every count and every record
must be exact; again with other seeds while there is time.

``tracking-kill``: send workers are killed at random moments under load. What a caller was told is tracked, nothing is
counted that was not sent, and what is missing is no more than what was in flight; ``relayctl repair`` mends the rest.

``tracking-frozen``: the server that holds bucket and log hangs under load, the others of its cluster do not. Mail goes
on, replies are late by TRACKING_ACK_SECONDS at most, and tracking comes back by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nats
import nats.errors
from nats.aio.client import Client

from relay import contract
from scripts.drills.fold import FOLDERS, events_of
from scripts.drills.frame import Drill, Findings, Stage
from scripts.drills.sink import RunningSink
from scripts.drills.traffic import read_stream
from tests.support.nats_cluster import NatsCluster
from tests.support.relay_process import RelayProcess

MAILS = 20_000
CALLERS = 100
SEND_WORKERS = 4
REPLY_SECONDS = 30.0
FOLD_SECONDS = 120.0
PATIENT_ACK_SECONDS = "10"
"""Where a busy machine shall not pass for a broken one."""
KILL_REPLY_SECONDS = 4.0
BACK_SECONDS = 20.0
ACK_SECONDS = 1.0
MARGIN_SECONDS = 0.5
"""Beside TRACKING_ACK_SECONDS, for a mail that waits on a busy machine."""
RECOVERY_SECONDS = 15.0
SEED = 5

SENT_PREFIX = f"{contract.LOG_PREFIX}."


class Answer(NamedTuple):
    """One request and what came of it; ``asked_at`` and ``took_seconds`` are of ``time.monotonic()``."""

    asked_at: float
    took_seconds: float
    reply: dict[str, Any] | None
    """None: nobody answered in time."""

    @property
    def email_id(self) -> str:
        """Of a mail that was relayed; '' of any other."""
        return "" if self.reply is None or "error" in self.reply else str(self.reply["email_id"])


class Load:
    """Callers that each ask again as soon as they are answered, until they are told to stop or have enough."""

    def __init__(self, group_id: str, *, mails: int = sys.maxsize, reply_seconds: float = REPLY_SECONDS) -> None:
        self._payload = json.dumps(
            {
                "to": "user@example.com",
                "subject": "A mail of a drill",
                "text": "It has a line of text.\n" * 20,
                "html": "<p>It has a line of text.</p>\n" * 20,
                "group_id": group_id,
            }
        ).encode()
        self._left = mails
        self._reply_seconds = reply_seconds
        self.answers: list[Answer] = []
        self.is_over = False

    async def run(self, nats_url: str, callers: int, during: Callable[[], Awaitable[None]] | None = None) -> None:
        """Returns when every caller has ended: when there are no mails left, or soon after ``during`` has returned."""
        nc = await nats.connect(nats_url, allow_reconnect=False)
        try:
            tasks = [asyncio.create_task(self._call(nc)) for _ in range(callers)]
            if during is not None:
                try:
                    await during()
                finally:
                    self.is_over = True
            await asyncio.gather(*tasks)
        finally:
            await nc.close()

    async def _call(self, nc: Client) -> None:
        while self._left and not self.is_over:
            self._left -= 1
            begun = time.monotonic()
            reply: dict[str, Any] | None = None
            try:
                reply = json.loads((await nc.request(contract.SEND_EMAIL, self._payload, self._reply_seconds)).data)
            except nats.errors.TimeoutError:
                pass
            except nats.errors.NoRespondersError:
                await asyncio.sleep(0.05)
            self.answers.append(Answer(begun, time.monotonic() - begun, reply))


class Kept(NamedTuple):
    """What the tracking holds of one group."""

    records: dict[str, dict[str, Any]]
    facts: dict[str, Counter[str]]
    """Of each kind: how often which mail, with the event's id when it has one."""


def read_kept(nats_url: str) -> dict[str, Kept]:
    """Everything that the tracking holds, by group; read by a plain client."""
    kept: dict[str, Kept] = {}
    for nats_subject, record in asyncio.run(read_stream(nats_url, f"KV_{contract.RECIPIENTS_BUCKET}")):
        group = kept.setdefault(record["group_id"], Kept({}, {}))
        group.records[nats_subject.rpartition(".")[2]] = record
    for nats_subject, fact in asyncio.run(read_stream(nats_url, contract.LOG_STREAM)):
        token, kind = nats_subject.removeprefix(SENT_PREFIX).split(".")
        about = f"{fact['email_id']} {fact['event_id']}" if "event_id" in fact else fact["email_id"]
        kept.setdefault(token, Kept({}, {})).facts.setdefault(kind, Counter())[about] += 1
    return kept


def analytics(relay: RelayProcess, group_id: str) -> dict[str, Any]:
    """What the status worker says of a group."""

    async def ask() -> dict[str, Any]:
        nc = await nats.connect(relay.nats_url.split(","), allow_reconnect=False)
        try:
            question = json.dumps({"group_id": group_id}).encode()
            answer = await nc.request(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, question, timeout=30)
            told: dict[str, Any] = json.loads(answer.data)
            return told
        finally:
            await nc.close()

    return asyncio.run(ask())


# -- everybody writes at once ------------------------------------------------------------------------------------------
class Folded(NamedTuple):
    """What a folding process printed, or why it did not."""

    counts: Counter[str]
    problem: str


async def send_and_fold(relay: RelayProcess, group_id: str, mails: int, seed: int) -> tuple[Load, list[Folded]]:
    """Sends to one group while other processes fold events into its records; returns when both are done."""
    root = str(Path(__file__).parents[2])
    arguments = ["-m", "scripts.drills.fold", relay.nats_url, group_id, str(mails), str(seed)]
    folders = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            str(number),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=root,
        )
        for number in range(FOLDERS)
    ]
    load = Load(group_id, mails=mails)
    try:
        await load.run(relay.nats_url, CALLERS)
        ended = await asyncio.wait_for(asyncio.gather(*(folder.communicate() for folder in folders)), FOLD_SECONDS)
    except TimeoutError:
        return load, [Folded(Counter(), f"not done after {FOLD_SECONDS:g} s")]
    finally:
        for folder in folders:
            if folder.returncode is None:
                folder.kill()
                await folder.wait()
    return load, [
        Folded(Counter(json.loads(printed)), "")
        if folder.returncode == 0
        else Folded(Counter(), complaint.decode(errors="replace")[-1000:])
        for folder, (printed, complaint) in zip(folders, ended, strict=True)
    ]


def judge_counts(findings: Findings, kept: Kept, told: dict[str, Any], email_ids: Sequence[str], seed: int) -> None:
    """Every figure, every fact and every record against what was sent and what the seed had happen to it."""
    events = {email_id: {event.event_id: event for event in events_of(email_id, seed)} for email_id in email_ids}
    opened = {email_id for email_id, of_mail in events.items() if of_mail}
    opens = Counter(f"{email_id} {event_id}" for email_id, of_mail in events.items() for event_id in of_mail)
    wanted = {"total_sent": len(email_ids), "opened": opens.total(), "unique_opened": len(opened)}
    seen = {name: told.get(name) for name in wanted}
    findings.check(f"seed {seed}: analytics are exact", seen == wanted, f"{seen}, not {wanted}")
    facts = {"sent": Counter(email_ids), "open": opens, "opened": Counter(opened)}
    wrong = [kind for kind in facts | kept.facts if kept.facts.get(kind, Counter()) != facts.get(kind, Counter())]
    findings.check(f"seed {seed}: every fact is there once, and no other", not wrong, wrong or opens.total())
    missing = events.keys() ^ kept.records.keys()
    findings.check(f"seed {seed}: every mail has its record", not missing, len(kept.records))
    lost = [
        email_id for email_id, of_mail in events.items() if not holds(kept.records.get(email_id, {}), of_mail.values())
    ]
    findings.check(f"seed {seed}: every record has every event once, no update was lost", not lost, len(lost))


def holds(record: dict[str, Any], events: Any) -> bool:
    """Whether the record is that of a mail with exactly these events."""
    wanted = sorted((event.event_id, event.at) for event in events)
    seen = sorted((each["event_id"], each["opened_at"]) for each in record.get("opened_at_list", []))
    last = max((at for _, at in wanted), default=None)
    figures = (record.get("open_count"), record.get("opened"), record.get("last_opened_at"))
    return seen == wanted and figures == (len(wanted), bool(wanted), last) and record.get("to") == "user@example.com"


def counts(stage: Stage, seconds: float) -> Findings:
    """Seed after seed."""
    findings = Findings()
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started())
    relay = stage.start_relay(
        nats_server.url, sink.port, RELAY_SEND_WORKERS=str(SEND_WORKERS), TRACKING_ACK_SECONDS=PATIENT_ACK_SECONDS
    )
    begun = time.monotonic()
    sent: dict[int, list[str]] = {}
    met: Counter[str] = Counter()
    told = {}
    while not sent or time.monotonic() - begun < seconds:
        seed = SEED + len(sent)
        load, folded = asyncio.run(send_and_fold(relay, f"drill-{seed}", MAILS, seed))
        sent[seed] = [answer.email_id for answer in load.answers if answer.email_id]
        findings.check(f"seed {seed}: every mail was relayed", len(sent[seed]) == MAILS, len(sent[seed]))
        for number, folder in enumerate(folded):
            findings.check(f"seed {seed}: process {number} folded every event", not folder.problem, folder.problem)
            met.update(folder.counts)
        told[seed] = analytics(relay, f"drill-{seed}")
    took_seconds = time.monotonic() - begun
    kept = read_kept(nats_server.url)
    for seed, email_ids in sent.items():
        judge_counts(findings, kept.get(f"drill-{seed}", Kept({}, {})), told[seed], email_ids, seed)
    relay.stop()
    findings.check("every mail was taken once", set(sink.stop().values()) == {1})
    findings.check("writers met on the same record", met["tried again"] > 0, met["tried again"])
    findings.figures |= {
        "mails": sum(map(len, sent.values())),
        "send workers": SEND_WORKERS,
        "processes that fold": FOLDERS,
        "seeds": " ".join(map(str, sent)),
        "seconds of sending and folding": round(took_seconds, 1),
        "events folded": met["folded"],
        "compare-and-sets tried again": met["tried again"],
        "looks at a record that was not there yet": met["record not there yet"],
        "facts that were stated twice and counted once": met["stated again"],
    }
    return findings


# -- workers are killed ------------------------------------------------------------------------------------------------
class Killing:
    """Kills one send worker after the other, each at a moment of chance."""

    def __init__(self, relay: RelayProcess, workers: Sequence[str], seed: int) -> None:
        self._relay = relay
        self._workers = workers
        self._chance = random.Random(seed)
        self.kills = 0

    async def for_seconds(self, seconds: float) -> None:
        """Returns when the last one killed is back."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(0.05, 0.7))
            name = self._chance.choice(self._workers)
            pid = self._relay.program(name).pid
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            await asyncio.to_thread(
                self._relay.wait_until_ready, name, other_pid_than=pid, timeout_seconds=BACK_SECONDS
            )


def judge_kills(findings: Findings, answers: Sequence[Answer], taken: Counter[str], kept: Kept) -> None:
    """What may be missing, and what may not."""
    told = {answer.email_id for answer in answers} - {""}
    unanswered = sum(answer.reply is None for answer in answers)
    errors = Counter(str(answer.reply) for answer in answers if answer.reply is not None and "error" in answer.reply)
    sent = kept.facts.get("sent", Counter())
    findings.check("no mail was refused", not errors, dict(errors.most_common(3)) or len(told))
    findings.check("no mail was taken twice", set(taken.values()) <= {1}, len(taken))
    untracked = told - (sent.keys() & kept.records.keys())
    findings.check("every mail that its caller knows of is counted and has its record", not untracked, len(untracked))
    invented = (sent.keys() | kept.records.keys()) - taken.keys()
    findings.check("nothing is counted that was not sent", not invented, len(invented))
    findings.check("no mail is counted twice", set(sent.values()) <= {1}, sent.total())
    uncounted = len(taken.keys() - sent.keys())
    findings.check("what is not counted was in flight", uncounted <= unanswered, f"{uncounted} of {unanswered}")


def kill(stage: Stage, seconds: float) -> Findings:
    """Kills under load, then looks, then repairs."""
    findings = Findings()
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started())
    relay = stage.start_relay(nats_server.url, sink.port, TRACKING_ACK_SECONDS=PATIENT_ACK_SECONDS)
    load = Load("drill-kill", reply_seconds=KILL_REPLY_SECONDS)
    killing = Killing(relay, ("send-1", "send-2"), SEED)
    asyncio.run(load.run(nats_server.url, CALLERS, lambda: killing.for_seconds(seconds)))
    kept = read_kept(nats_server.url)["drill-kill"]
    sent = kept.facts["sent"]
    told = analytics(relay, "drill-kill")
    findings.check("analytics say what is counted", told["total_sent"] == sent.total(), told["total_sent"])
    findings.figures |= {
        "kills": killing.kills,
        "requests": len(load.answers),
        "requests that nobody answered": sum(answer.reply is None for answer in load.answers),
        "mails counted without a record": len(sent.keys() - kept.records.keys()),
        "mails with a record that are not counted": len(kept.records.keys() - sent.keys()),
    }
    repaired = repair(relay, "drill-kill")
    findings.check("relayctl repair ends well", repaired == "", repaired)
    mended = read_kept(nats_server.url)["drill-kill"]
    traces = sent.keys() | kept.records.keys()
    findings.check("then every mail that left a trace is counted once", mended.facts["sent"] == Counter(traces))
    relay.stop()
    taken = sink.stop()
    findings.figures["mails taken"] = taken.total()
    findings.figures["mails taken that left no trace"] = len(taken.keys() - traces)
    judge_kills(findings, load.answers, taken, kept)
    return findings


# -- JetStream hangs ---------------------------------------------------------------------------------------------------
class Phase(NamedTuple):
    """What callers saw of a time."""

    answers: list[Answer]

    @property
    def latencies(self) -> list[float]:
        """In seconds, the shortest first."""
        return sorted(answer.took_seconds for answer in self.answers)

    @property
    def longest(self) -> float:
        """Of the latencies."""
        return self.latencies[-1] if self.answers else 0.0


class Freezing:
    """Freezes and thaws, and watches what the relay says of it meanwhile."""

    def __init__(self, cluster: NatsCluster, relay: RelayProcess, quiet_seconds: float, frozen_seconds: float) -> None:
        self._cluster = cluster
        self._relay = relay
        self._quiet_seconds = quiet_seconds
        self._frozen_seconds = frozen_seconds
        self.frozen_at = self.thawed_at = self.recovered_at = 0.0
        self.said = ""
        """What ``relayctl status`` said while JetStream hung."""

    async def play(self) -> None:
        """Before, frozen, after; the last for as long as the first once tracking is back."""
        await asyncio.sleep(self._quiet_seconds)
        self.frozen_at = time.monotonic()
        self._cluster.freeze()
        try:
            await asyncio.sleep(self._frozen_seconds)
            self.said = await asyncio.to_thread(self._relayctl_status)
        finally:
            self._cluster.thaw()
        self.thawed_at = time.monotonic()
        while await asyncio.to_thread(self._notes):
            if time.monotonic() - self.thawed_at > RECOVERY_SECONDS:
                return
            await asyncio.sleep(0.05)
        self.recovered_at = time.monotonic()
        await asyncio.sleep(self._quiet_seconds)

    def _relayctl_status(self) -> str:
        told = json.loads(self._relay.relayctl("status", "--json").stdout)
        return str(told["tracking"]["problem"])

    def _notes(self) -> str:
        """Why the send workers do not track, as they note it; '' when they do."""
        reports = [status.report for status in self._relay.supervision.statuses() if status.name.startswith("send-")]
        return "; ".join(report.notes["tracking"] for report in reports if report and "tracking" in report.notes)


def frozen(stage: Stage, seconds: float) -> Findings:
    """A quarter of the time before, half of it frozen, a quarter after."""
    findings = Findings()
    cluster = NatsCluster(stage.directory / "nats")
    stage.callback(cluster.stop)
    cluster.start()
    sink = stage.enter_context(RunningSink.started())
    relay = stage.start_relay(cluster.url, sink.port, TRACKING_ACK_SECONDS=str(ACK_SECONDS))
    judge_frozen(findings, cluster, relay, seconds / 4, seconds / 2)
    relay.stop()
    findings.check("no mail was taken twice", set(sink.stop().values()) == {1})
    return findings


def judge_frozen(
    findings: Findings, cluster: NatsCluster, relay: RelayProcess, quiet_seconds: float, frozen_seconds: float
) -> None:
    """Plays it on a relay that runs, and says what callers saw."""
    load = Load("drill-frozen", reply_seconds=ACK_SECONDS + 10)
    freezing = Freezing(cluster, relay, quiet_seconds, frozen_seconds)
    asyncio.run(load.run(cluster.url, CALLERS, freezing.play))
    before = Phase([each for each in load.answers if each.asked_at + each.took_seconds < freezing.frozen_at])
    during = Phase([each for each in load.answers if freezing.frozen_at <= each.asked_at < freezing.thawed_at])
    after = Phase([each for each in load.answers if 0 < freezing.recovered_at <= each.asked_at])
    kept = read_kept(cluster.url).get("drill-frozen", Kept({}, {}))
    relayed = {answer.email_id for answer in load.answers} - {""}
    counted, both = kept.facts.get("sent", Counter()), kept.facts.get("sent", Counter()).keys() & kept.records.keys()
    late = [each for each in load.answers if each.took_seconds > ACK_SECONDS / 2]
    for name, phase in (("before", before), ("while frozen", during), ("after", after)):
        findings.figures[f"mails {name}"] = len(phase.answers)
        findings.figures[f"latency {name}, s, median and at most"] = (
            f"{statistics.median(phase.latencies or [0.0]):.3f} {phase.longest:.3f}"
        )
    findings.figures |= {
        "seconds frozen": round(freezing.thawed_at - freezing.frozen_at, 1),
        "mails that waited for an acknowledgement in vain": len(late),
        "seconds until tracking was back": round(freezing.recovered_at - freezing.thawed_at, 2),
        "mails relayed and not counted": len(relayed - counted.keys()),
    }
    unanswered = [answer.reply for answer in load.answers if not answer.email_id]
    findings.check("every mail was relayed, and its caller told so", not unanswered, unanswered[:3] or len(relayed))
    rate = len(during.answers) / frozen_seconds
    usual = len(before.answers) / quiet_seconds
    findings.check("mail went on while JetStream hung", bool(during.answers), len(during.answers))
    what = "it went on half as fast as usual, at least"
    findings.check_timing(what, rate >= usual / 2, f"{rate:.0f}/s, {usual:.0f}/s before")
    # Those that were under way when it froze or thawed belong to no phase and count here.
    longest = max((each.took_seconds for each in load.answers), default=0.0)
    bound = ACK_SECONDS + MARGIN_SECONDS + before.longest
    findings.check_timing(
        "no reply was later than TRACKING_ACK_SECONDS", longest <= bound, f"{longest:.3f} s ≤ {bound:.3f} s"
    )
    findings.check("relayctl status said that tracking was off", "did not answer" in freezing.said, freezing.said)
    findings.check("tracking came back by itself", freezing.recovered_at > 0)
    untracked = {answer.email_id for answer in after.answers} - both - {""}
    findings.check("then every mail was tracked", bool(after.answers) and not untracked, len(untracked))
    findings.check("nothing was counted that was not sent", counted.keys() <= relayed)
    findings.check("nothing was counted twice", set(counted.values()) <= {1})


def repair(relay: RelayProcess, group_id: str) -> str:
    """Runs ``relayctl repair``; '' when it ends well, else what it said."""
    done = relay.relayctl("repair", group_id, "--yes", "--min-age", "0")
    return "" if done.returncode == 0 else f"{done.stdout}\n{done.stderr}"


DRILLS = (
    Drill("tracking-counts", counts, seconds=15.0, margin_seconds=150.0, whole_seconds=60.0),
    Drill("tracking-kill", kill, seconds=20.0, margin_seconds=120.0, whole_seconds=40.0),
    Drill("tracking-frozen", frozen, seconds=20.0, margin_seconds=120.0, whole_seconds=40.0, is_alone=True),
)
