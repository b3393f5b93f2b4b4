"""Engagement events under stress: everything comes twice, too early and in any order, and whoever works on it dies.

``engagement``: 500 mails and 5,000 events of all ten kinds, 30 % of them told twice, some told before the relay knows
that the mail was taken. They come through SNS and SQS as moto's server has them, raw and enveloped. Meanwhile the
engagement worker is killed three times at moments of chance, and NATS restarted once. At the end the queue is empty,
nothing is parked, and every record, every fact and every figure is what a plain model of the same events says. Again
with other seeds while there is time.

``engagement-poison``: the same kind of events from a queue of which 10 % is garbage of ten kinds, and once more a
little that is not garbage but nobody's here. All garbage is parked, the rest is as exact, and takes at most 1.3 times
as long as without; rounds with and without take turns.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from relay import contract
from scripts.drills.frame import Drill, Findings, Stage
from scripts.drills.mail_events import SHARE_TWICE, Fact, Happening, Mail, Wanted, Way, analytics_of, enveloped, plan
from scripts.drills.moto import SteadyMoto
from scripts.drills.sink import Session
from scripts.drills.traffic import read_stream
from tests.support.moto_server import aws_environment
from tests.support.nats_server import NatsServer
from tests.support.relay_process import RelayProcess
from tests.support.sqs_double import SqsDouble

MAILS = 500
EVENTS = 5_000
KILLS = 3
GROUPS = ("spring", "2025/autumn", "summer-sale", "Größe 5.0 *", "", "a>b")
"""Also such as cannot stand in a subject; '': none."""
CALLERS = 60
REPLY_SECONDS = 25.0
HELD_SECONDS = 1.5
"""For so long the smarthost keeps its answer to itself, when it has already told events of the mail."""
VISIBILITY_SECONDS = 8
"""Short, or the drill would mostly wait for what a killed worker had in hand."""
BACK_SECONDS = 30.0
EMPTY_SECONDS = 150.0
LOOK_SECONDS = 0.1
AT_ONCE = 30
"""Events that are published in one go."""
BATCH = 10
"""Of SNS and SQS."""
SEED = 6

POISON_ROUNDS = 3
POISON_MAILS = 150
POISON_EVENTS = 2_000
POISON_SHARE = 0.1
MOST_SLOWER = 1.3

_EMAIL_ID = re.compile(rf"^{contract.TRACKING_HEADER}: .*?([^/\r\n]+)\r$".encode(), re.MULTILINE)
_NUMBER = re.compile(rb"^Subject: Mail (\d+) of a drill\r$", re.MULTILINE)


# -- mails -------------------------------------------------------------------------------------------------------------
class TakingSession(Session):
    """A connection to a smarthost that answers a content only when ``on_taken`` has returned its answer."""

    def __init__(self, on_taken: Callable[[bytes], Awaitable[bytes]]) -> None:
        super().__init__(Counter())
        self._on_taken = on_taken
        self._answering: asyncio.Task[None] | None = None

    def _take(self, content: bytes) -> bytes:
        self._is_content = False
        self._answering = asyncio.ensure_future(self._answer_later(content))
        return b""

    async def _answer_later(self, content: bytes) -> None:
        self._transport.write(await self._on_taken(content))


async def start_smarthost(on_taken: Callable[[bytes], Awaitable[bytes]]) -> asyncio.Server:
    """An SMTP server on a free port of loopback, in this event loop."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: TakingSession(on_taken), "127.0.0.1", 0, backlog=1000)


def port_of(server: asyncio.Server) -> int:
    """Where it listens."""
    return int(server.sockets[0].getsockname()[1])


def ids_of(content: bytes) -> tuple[str, int]:
    """The email_id of a mail, and its number in the drill."""
    email_id, number = _EMAIL_ID.search(content), _NUMBER.search(content)
    if email_id is None or number is None:
        raise RuntimeError("a mail without its ids")
    return email_id[1].decode(), int(number[1])


async def send_mails(nats_url: str, mails: Sequence[Mail]) -> list[dict[str, Any]]:
    """Has them sent, some at a time; the replies, in order."""
    nc = await nats.connect(nats_url, allow_reconnect=False)
    gate = asyncio.Semaphore(CALLERS)

    async def send(mail: Mail) -> dict[str, Any]:
        async with gate:
            reply: dict[str, Any] = json.loads(
                (await nc.request(contract.SEND_EMAIL, mail.payload, REPLY_SECONDS)).data
            )
            return reply

    try:
        return await asyncio.gather(*map(send, mails))
    finally:
        await nc.close()


# -- events ------------------------------------------------------------------------------------------------------------
class Publisher:
    """Publishes to two topics, one with raw delivery, and puts into their queue what SNS would not say twice."""

    def __init__(self, moto: SteadyMoto, name: str) -> None:
        self.queue_url = moto.new_queue(name, VisibilityTimeout=str(VISIBILITY_SECONDS))
        self._topics = {
            way: moto.new_topic(f"{name}-{way.name.lower()}", self.queue_url, is_raw=way is Way.RAW)
            for way in (Way.RAW, Way.ENVELOPED)
        }
        self._sns, self._sqs = moto.client("sns"), moto.client("sqs")
        self.published = 0

    def publish(self, happenings: Sequence[Happening]) -> list[Happening]:
        """Blocks until all are published; copies of those that are to come a second time."""
        for way in Way:
            ours = [each for each in happenings if each.way is way]
            for start in range(0, len(ours), BATCH):
                self._publish(way, ours[start : start + BATCH])
        self.published += len(happenings)
        return [each.copy() for each in happenings if each.is_twice]

    def _publish(self, way: Way, happenings: Sequence[Happening]) -> None:
        if way is Way.PUT:
            entries = [{"Id": str(place), "MessageBody": each.body} for place, each in enumerate(happenings)]
            answer = self._sqs.send_message_batch(QueueUrl=self.queue_url, Entries=entries)
        else:
            entries = [{"Id": str(place), "Message": each.message} for place, each in enumerate(happenings)]
            answer = self._sns.publish_batch(TopicArn=self._topics[way], PublishBatchRequestEntries=entries)
        if answer.get("Failed"):
            raise RuntimeError(f"moto would not take events: {answer['Failed']}")
        if way is Way.ENVELOPED:
            for told in answer["Successful"]:
                happenings[int(told["Id"])].event_id = told["MessageId"]

    def left(self) -> int:
        """Messages that the queue has, in somebody's hands or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        told = self._sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=names)["Attributes"]
        return sum(int(told[name]) for name in names)


def eventing(endpoint_url: str, queue_url: str) -> dict[str, str]:
    """Settings of a relay that reads events from a server of ours, on a busy machine."""
    return {
        **aws_environment(endpoint_url),
        "SES_EVENTING_ENABLED": "true",
        "SES_ENGAGEMENT_SQS_QUEUE_URL": queue_url,
        "TRACKING_ACK_SECONDS": "10",
        "SMTP_POOL_SIZE": str(CALLERS),
    }


# -- the worker --------------------------------------------------------------------------------------------------------
class Lives:
    """The engagement workers of a relay, one after the other, and what each had counted when it was last asked."""

    def __init__(self, relay: RelayProcess) -> None:
        self._relay = relay
        self._figures: dict[int, dict[str, Any]] = {}
        self.pids = [self.pid]
        """One after the other, as far as ``kill`` made them."""

    @property
    def pid(self) -> int:
        """Of the one that works now."""
        return self._relay.program("engagement").pid

    def look(self) -> None:
        """Asks it."""
        told = json.loads(self._relay.relayctl("status", "--json").stdout)
        (figures,) = [each["figures"] for each in told["programs"] if each["name"] == "engagement"]
        if figures:
            self._figures[figures["pid"]] = figures

    def kill(self) -> None:
        """Ends it as the kernel would, and waits for the next one."""
        self.look()
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        self._relay.wait_until_ready("engagement", other_pid_than=pid, timeout_seconds=BACK_SECONDS)
        self.pids.append(self.pid)

    def count(self, name: str) -> int:
        """Of all lives together, as far as they told."""
        return sum(figures[name] for figures in self._figures.values())

    def count_event(self, name: str) -> int:
        """Of events, or of what became of notifications."""
        return sum(figures["events"].get(name, 0) for figures in self._figures.values())


# -- what is left ------------------------------------------------------------------------------------------------------
class Kept(NamedTuple):
    """Everything that the tracking holds."""

    records: dict[str, dict[str, Any]]
    facts: Counter[tuple[str, Fact]]
    """Each with the token of its group."""
    parked: Counter[str]
    """Bodies."""


async def read_kept(nats_url: str) -> Kept:
    """Reads it all by a plain client."""
    records = {
        nats_subject.rpartition(".")[2]: record
        for nats_subject, record in await read_stream(nats_url, f"KV_{contract.RECIPIENTS_BUCKET}")
    }
    facts: Counter[tuple[str, Fact]] = Counter()
    for nats_subject, fact in await read_stream(nats_url, contract.LOG_STREAM):
        token, kind = nats_subject.removeprefix(f"{contract.LOG_PREFIX}.").split(".")
        facts[token, (kind, fact["email_id"], fact.get("event_id", ""), fact["at"])] += 1
    parked = Counter(each["body"] for _, each in await read_stream(nats_url, contract.PARKED_STREAM))
    return Kept(records, facts, parked)


async def ask_analytics(nats_url: str, group_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the status worker says of each group."""

    async def ask(nc: Client, group_id: str) -> dict[str, Any]:
        question = json.dumps({"group_id": group_id}).encode()
        msg: Msg = await nc.request(contract.GET_EMAIL_ENGAGEMENT_ANALYTICS, question, timeout=30)
        told: dict[str, Any] = json.loads(msg.data)
        return told

    nc = await nats.connect(nats_url, allow_reconnect=False)
    try:
        return {group_id: await ask(nc, group_id) for group_id in group_ids}
    finally:
        await nc.close()


def judge(findings: Findings, what: str, mails: Sequence[Mail], kept: Kept, told: dict[str, dict[str, Any]]) -> None:
    """Holds records, facts and figures of these mails against the model. ``what`` names them."""
    wanted = [Wanted(mail) for mail in mails]
    problems = {
        each.mail.email_id: problem
        for each in wanted
        if (problem := each.problem(kept.records.get(each.mail.email_id)))
    }
    findings.check(f"{what}: every record is exact", not problems, len(problems) or len(wanted))
    findings.remarks += [f"{email_id}: {problem}" for email_id, problem in list(problems.items())[:5]]
    facts: Counter[tuple[str, Fact]] = Counter()
    for each in wanted:
        record = kept.records.get(each.mail.email_id)
        facts[each.mail.token, ("sent", each.mail.email_id, "", (record or {}).get("sent_at", ""))] += 1
        for fact, count in each.stated(record).items():
            facts[each.mail.token, fact] += count
    ours = {mail.email_id for mail in mails}
    seen = Counter({about: count for about, count in kept.facts.items() if about[1][1] in ours})
    findings.check(f"{what}: every fact is there once, and no other", seen == facts, seen.total())
    findings.remarks += [f"lacking: {about}" for about in list(facts - seen)[:5]]
    findings.remarks += [f"too many: {about}" for about in list(seen - facts)[:5]]
    for group_id, figures in told.items():
        exact = analytics_of(mail for mail in mails if mail.group_id == group_id)
        differing = {name: figures.get(name) for name, count in exact.items() if figures.get(name) != count}
        findings.check(f"{what}: analytics of {group_id} are exact", not differing, differing or exact["total_sent"])


# -- everything at once ------------------------------------------------------------------------------------------------
class Play:
    """One seed: mails, what is told of them, and the trouble meanwhile."""

    def __init__(self, seed: int, mails: int, events: int) -> None:
        self.seed = seed
        self._chance = random.Random(f"trouble {seed}")
        self.group_ids = {name: f"{name} {seed}" if name else "" for name in GROUPS}
        self.mails = plan(mails, events, list(self.group_ids.values()), seed)
        self.deliveries = events + round(events * SHARE_TWICE)
        self._taken = 0
        self._first_kill_at = self._chance.randint(mails // 5, mails * 4 // 5)
        self._is_first_kill_due = asyncio.Event()
        self._rest: list[Happening] = []
        self.early = 0
        self.took_seconds = 0.0
        self.refusals: list[dict[str, Any]] = []

    async def taken(self, content: bytes) -> bytes:
        """The smarthost has a mail: tells the first of its events before it says so."""
        email_id, number = ids_of(content)
        mail = self.mails[number]
        mail.begin(email_id, f"ses-{email_id}", time.time())
        self._taken += 1
        if self._taken >= self._first_kill_at:
            self._is_first_kill_due.set()
        early = [each for each in mail.happenings if each.is_early]
        self._rest += [each for each in mail.happenings if not each.is_early]
        if early:
            self._rest += await asyncio.to_thread(self._publisher.publish, early)
            self.early += len(early)
            await asyncio.sleep(HELD_SECONDS)
        return f"250 Ok {mail.remote_id}\r\n".encode()

    async def run(self, nats_server: NatsServer, lives: Lives, publisher: Publisher) -> None:
        """Returns when the queue is empty, or takes too long to become so."""
        self._publisher = publisher
        self._published_before = publisher.published
        begun = time.monotonic()
        first_kill = asyncio.create_task(self._kill_first(lives))
        replies = await send_mails(nats_server.url, self.mails)
        self.refusals = [reply for reply in replies if "error" in reply]
        if self.refusals:
            first_kill.cancel()
            return
        await first_kill
        trouble = asyncio.create_task(self._trouble(nats_server, lives))
        try:
            await asyncio.to_thread(self._publish_rest)
            await trouble
        finally:
            trouble.cancel()
        await self._until(lambda left: not left, EMPTY_SECONDS)
        self.took_seconds = time.monotonic() - begun

    async def _kill_first(self, lives: Lives) -> None:
        """While there are events of mails that the relay does not know of yet."""
        await self._is_first_kill_due.wait()
        await asyncio.to_thread(lives.kill)

    def _publish_rest(self) -> None:
        """In any order, some at a time."""
        while self._rest:
            self._chance.shuffle(self._rest)
            some, self._rest = self._rest[:AT_ONCE], self._rest[AT_ONCE:]
            self._rest += self._publisher.publish(some)

    async def _trouble(self, nats_server: NatsServer, lives: Lives) -> None:
        """Kills and a restart, each when a share of the work that chance names is done."""
        accidents = [lives.kill] * (KILLS - 1) + [lambda: restart(nats_server)]
        self._chance.shuffle(accidents)
        width = 0.8 / len(accidents)
        for number, accident in enumerate(accidents):
            share = 0.1 + width * (number + self._chance.random())
            done = round(share * self.deliveries)
            await self._until(partial(self._is_done, done), EMPTY_SECONDS)
            await asyncio.sleep(self._chance.uniform(0, LOOK_SECONDS))
            await asyncio.to_thread(accident)

    def _is_done(self, notifications: int, left: int) -> bool:
        return self._publisher.published - self._published_before - left >= notifications

    async def _until(self, is_so: Callable[[int], bool], seconds: float) -> None:
        """Returns when it is so of what the queue has, or after a time; what is wrong then, the judge will see."""
        deadline = time.monotonic() + seconds
        while not is_so(await asyncio.to_thread(self._publisher.left)) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)


def restart(nats_server: NatsServer) -> None:
    """Ends it in order, and starts it on what it has stored."""
    nats_server.stop()
    nats_server.start()


async def play_all(stage: Stage, findings: Findings, seconds: float, seed: int, mails: int, events: int) -> None:
    """Seed after seed, one at least."""
    nats_server = stage.start_nats()
    moto = SteadyMoto(stage.directory)
    stage.callback(moto.stop)
    publisher = Publisher(moto, "events")
    plays: list[Play] = []
    smarthost = await start_smarthost(lambda content: plays[-1].taken(content))
    settings = eventing(moto.url, publisher.queue_url)
    relay = await asyncio.to_thread(stage.start_relay, nats_server.url, port_of(smarthost), **settings)
    lives = Lives(relay)
    begun = time.monotonic()
    while not plays or time.monotonic() - begun < seconds:
        plays.append(Play(seed + len(plays), mails, events))
        await plays[-1].run(nats_server, lives, publisher)
        play, what = plays[-1], f"seed {plays[-1].seed}"
        findings.check(f"{what}: every mail was relayed", not play.refusals, play.refusals[:2] or len(play.mails))
        if play.refusals:
            break
        left = publisher.left()
        findings.check(f"{what}: the queue is empty", not left, left or publisher.published)
        told = await ask_analytics(nats_server.url, filter(None, play.group_ids.values()))
        kept = await read_kept(nats_server.url)
        judge(findings, what, play.mails, kept, told)
        findings.check(f"{what}: nothing is parked", not kept.parked, kept.parked.total())
    await asyncio.to_thread(lives.look)
    lived = len(set(lives.pids)) == 1 + KILLS * len(plays) and lives.pid == lives.pids[-1]
    findings.check("the worker ended when it was killed, and at no other time", lived, lives.pids)
    await asyncio.to_thread(relay.stop)
    smarthost.close()
    state_figures(findings, plays, publisher, lives)


def state_figures(findings: Findings, plays: Sequence[Play], publisher: Publisher, lives: Lives) -> None:
    """What was met, and that everything was which the drill is about."""
    took_seconds = sum(play.took_seconds for play in plays)
    received = lives.count("received")
    findings.figures |= {
        "seeds": " ".join(str(play.seed) for play in plays),
        "mails": sum(len(play.mails) for play in plays),
        "events": sum(len(mail.happenings) for play in plays for mail in play.mails),
        "notifications, the second copies too": publisher.published,
        "told before the mail was known to be taken": sum(play.early for play in plays),
        "seconds from the first mail to an empty queue": round(took_seconds, 1),
        "notifications/s, accidents included": round(publisher.published / took_seconds) if took_seconds else 0,
        "received, as far as was told before a kill": received,
        "received again": max(0, received - publisher.published),
        "found early": lives.count_event("early"),
        "repeated": lives.count_event("repeated"),
        "conflicts": lives.count_event("conflict"),
        "extended": lives.count("extended"),
        "could not be handled at once": lives.count("broken"),
    }
    unknown = lives.count_event("unknown") + lives.count_event("rebuilt")
    findings.check("no mail was taken for an unknown one", not unknown, unknown)
    for what in ("found early", "repeated"):
        findings.check(f"it came to what the drill is about: {what}", findings.figures[what] != 0)


def play(stage: Stage, seconds: float) -> Findings:
    """Trouble of every kind at once."""
    findings = Findings()
    asyncio.run(play_all(stage, findings, seconds, seed_of(stage), MAILS, EVENTS))
    return findings


def seed_of(stage: Stage) -> int:
    """What the command line says, else always the same."""
    return SEED if stage.seed is None else stage.seed


# -- garbage -----------------------------------------------------------------------------------------------------------
def garbage_of(kind: int, number: int, chance: random.Random, broken_mail: str) -> str:
    """A body of one of ten kinds that nobody can read; no two are equal."""
    some_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    event = {"eventType": "Open", "mail": {"tags": {contract.SES_EMAIL_ID_TAG: [some_id]}}, "open": {}}
    text = json.dumps(event)
    bodies: list[Callable[[], str]] = [
        lambda: f"no JSON at all, {some_id}",
        lambda: text[: -chance.randint(1, 40)],
        lambda: json.dumps([event, number]),
        lambda: json.dumps(number + 0.5),
        lambda: json.dumps({"Type": "Notification", "MessageId": some_id}),
        lambda: json.dumps({"Type": "Notification", "MessageId": some_id, "Message": event}),
        lambda: enveloped(f"no JSON at all \x00 {some_id}", some_id, "2025-01-15T10:30:00.000Z"),
        lambda: json.dumps({"mail": event["mail"], "event": "Open"}),
        lambda: json.dumps({"eventType": "Open", "mail": [some_id]}),
        # Nothing is wrong with it but the record of its mail.
        lambda: enveloped(
            json.dumps({**event, "mail": {"tags": {contract.SES_EMAIL_ID_TAG: [broken_mail]}}}),
            some_id,
            "2025-01-15T10:30:00.000Z",
        ),
    ]
    return bodies[kind]()


KINDS_OF_GARBAGE = 10


def nobodys(number: int) -> dict[str, str]:
    """Bodies with which nothing is wrong, and that are not for the relay: what each is counted as."""
    return {
        "dropped: foreign": json.dumps({"eventType": "Open", "mail": {"messageId": str(number)}, "open": {}}),
        "dropped: unknown type": json.dumps({"eventType": "Teleport", "mail": {"messageId": str(number)}}),
        "dropped: subscription": json.dumps({"Type": "SubscriptionConfirmation", "Token": str(number)}),
        "dropped: validation": enveloped(
            "Successfully validated SNS topic for Amazon SES event publishing.", f"n{number}", "2025-01-15T10:30:00Z"
        ),
    }


class PoisonRound(NamedTuple):
    """What is in the queue at once, and how long it took."""

    mails: list[Mail]
    garbage: list[str]
    not_ours: list[str]
    seconds: float
    """Until the last good one was deleted."""
    cpu_seconds: float
    is_empty: bool


BROKEN_RECORD = "a-record-that-is-none"


class Poisoning:
    """Rounds with and without garbage, in turns, for one worker."""

    def __init__(self, double: SqsDouble, relay: RelayProcess, seed: int) -> None:
        self._double = double
        self._relay = relay
        self._chance = random.Random(f"poison {seed}")
        self.seed = seed
        self.pid = relay.program("engagement").pid

    async def run(self, number: int, mails: int, events: int, *, is_poisoned: bool) -> PoisonRound:
        """Sends the mails, then puts everything into the queue at once, and waits until it is worked off."""
        planned = plan(mails, events, [f"round {number}", "", f"round-{number}"], self.seed + number)
        for mail, reply in zip(planned, await send_mails(self._relay.nats_url, planned), strict=True):
            mail.begin(reply["email_id"], reply["remote_id"], time.time())
            for each in mail.happenings:
                each.way = Way.PUT if each.way is Way.ENVELOPED else each.way
                each.event_id = each.event_id or f"{mail.email_id}-{each.after_milliseconds}"
        good = [each for mail in planned for each in mail.happenings]
        bodies = [each.body for each in good] + [each.copy().body for each in good if each.is_twice]
        wanted = set(bodies)
        garbage, not_ours = [], []
        if is_poisoned:
            count = round(len(bodies) * POISON_SHARE / (1 - POISON_SHARE))
            garbage = [
                garbage_of(place % KINDS_OF_GARBAGE, place, self._chance, BROKEN_RECORD) for place in range(count)
            ]
            not_ours = [body for place in range(5) for body in nobodys(place).values()]
        everything = [*bodies, *garbage, *not_ours]
        self._chance.shuffle(everything)
        cpu_before, begun = _cpu_seconds(self.pid), time.monotonic()
        await asyncio.to_thread(self._double.add, *everything)
        deadline = begun + EMPTY_SECONDS
        while any(each.body in wanted for each in self._double.left) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        took, cpu = time.monotonic() - begun, _cpu_seconds(self.pid) - cpu_before
        while self._double.left and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return PoisonRound(planned, garbage, not_ours, took, cpu, not self._double.left)


def _cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far."""
    return time.clock_gettime((~pid << 3) | 2)


async def poison_all(
    stage: Stage, findings: Findings, seed: int, mails: int, events: int, most_slower: float = MOST_SLOWER
) -> None:
    """Two rounds at a time, the one with garbage first in every other pair; a round before that warms up."""
    nats_server = stage.start_nats()
    double = SqsDouble()
    double.keeps_calls = False
    stage.callback(double.stop)
    double.start()
    smarthost = await start_smarthost(take)
    settings = eventing(double.url, double.queue_url)
    relay = await asyncio.to_thread(stage.start_relay, nats_server.url, port_of(smarthost), **settings)
    poisoning = Poisoning(double, relay, seed)
    nc = await nats.connect(nats_server.url, allow_reconnect=False)
    await nc.jetstream().publish(f"$KV.{contract.RECIPIENTS_BUCKET}.{BROKEN_RECORD}", b'["no", "record"]')
    await nc.close()
    rounds: dict[bool, list[PoisonRound]] = {False: [], True: []}
    warm_up = await poisoning.run(0, mails, events // 4, is_poisoned=False)
    for number in range(POISON_ROUNDS):
        for place, is_poisoned in enumerate((False, True) if number % 2 else (True, False)):
            played = await poisoning.run(1 + 2 * number + place, mails, events, is_poisoned=is_poisoned)
            rounds[is_poisoned].append(played)
    everything = [warm_up, *rounds[False], *rounds[True]]
    findings.check("the queue is empty after every round", all(each.is_empty for each in everything), len(everything))
    garbage = Counter(body for each in everything for body in each.garbage)
    kept = await read_kept(nats_server.url)
    findings.check("all garbage is parked, and nothing else", kept.parked == garbage, kept.parked.total())
    sent = [mail for each in everything for mail in each.mails]
    groups = sorted({mail.group_id for mail in sent} - {""})
    judge(findings, f"seed {seed}", sent, kept, await ask_analytics(nats_server.url, groups))
    seconds = {is_poisoned: [each.seconds for each in played] for is_poisoned, played in rounds.items()}
    ratio = statistics.median(poisoned / clean for poisoned, clean in zip(seconds[True], seconds[False], strict=True))
    findings.check_timing(
        f"garbage makes the rest take at most {most_slower:g} times as long", ratio <= most_slower, f"{ratio:.2f}"
    )
    notifications = sum(len(mail.happenings) for mail in rounds[True][0].mails)
    findings.figures |= {
        "good notifications a round, the second copies too": notifications + round(events * SHARE_TWICE),
        "garbage a poisoned round": len(rounds[True][0].garbage),
        "nobody's a poisoned round": len(rounds[True][0].not_ours),
        "seconds until the last good one was done, without garbage": _listed(seconds[False]),
        "seconds until the last good one was done, with garbage": _listed(seconds[True]),
        "with garbage against without": round(ratio, 2),
        "worker CPU, with garbage against without": round(
            statistics.median(each.cpu_seconds for each in rounds[True])
            / statistics.median(each.cpu_seconds for each in rounds[False]),
            2,
        ),
    }
    await asyncio.to_thread(
        judge_worker, findings, relay, poisoning.pid, sum(len(each.not_ours) for each in everything)
    )
    await asyncio.to_thread(relay.stop)
    smarthost.close()


async def take(content: bytes) -> bytes:
    """The smarthost takes a mail at once."""
    return f"250 Ok ses-{ids_of(content)[0]}\r\n".encode()


def _listed(seconds: Iterable[float]) -> str:
    return " ".join(f"{each:.2f}" for each in seconds)


def judge_worker(findings: Findings, relay: RelayProcess, pid: int, not_ours: int) -> None:
    """One worker did it all, and says what it dropped."""
    lives = Lives(relay)
    lives.look()
    findings.check("the worker was never restarted", lives.pid == pid, lives.pid)
    findings.check("no notification made it stumble", lives.count("broken") == 0, lives.count("broken"))
    wanted = dict.fromkeys(nobodys(0), not_ours // len(nobodys(0)))
    dropped = {name: lives.count_event(name) for name in wanted}
    findings.check("what is nobody's is dropped and counted", dropped == wanted, dropped)


def poison(stage: Stage, seconds: float) -> Findings:
    """Rounds in turns; how long they take is not a matter of ``seconds``."""
    del seconds
    findings = Findings()
    asyncio.run(poison_all(stage, findings, seed_of(stage), POISON_MAILS, POISON_EVENTS))
    return findings


DRILLS = (
    Drill("engagement", play, seconds=20.0, margin_seconds=320.0, whole_seconds=40.0),
    Drill("engagement-poison", poison, seconds=40.0, margin_seconds=120.0, is_alone=True),
)
