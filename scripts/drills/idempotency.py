"""Request ids under stress: many twins at once, and workers that are killed at any moment.

``request-ids`` has 4 send workers and a smarthost that takes its time over every step. First 200 callers at once make
the same request: the smarthost gets one mail, the callers one answer. Then requests come all the time and one worker
after the other is killed with whatever it has in hand; NATS is some way off, so that the moments fall between a write
and its acknowledgement, too. Who got no answer asks again until there is one. No mail may be sent twice, and every
answer must agree with what the smarthost saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.kv import KeyValue

from relay import contract
from relay.idempotency.claim import Phase, claim_key, read_value
from scripts import delay_proxy
from scripts.drills.frame import Drill, Findings, Stage
from tests.support.relay_process import RelayProcess

SEND_WORKERS = 4
TWINS = 200
TWIN_ROUNDS = 12
KILLS = 50
CALLERS = 32
"""Requests that are new, under way at the same time; those that are made again come on top."""
TIMEOUT_SECONDS = 2.0
"""What a caller gives the relay: a claim's lease is 15 s more."""
REPLY_SECONDS = 4.0
"""Without a reply for so long there will be none: its worker was killed."""
PAUSE_SECONDS = 0.2
"""Before a request is made again."""
GIVE_UP_SECONDS = 30.0
"""After the last kill, more than a lease: until then a request may be hit again whenever it is taken over."""
LIVES_SECONDS = 3.5
"""At least so long a worker lives: one that dies within a second of its start is started more slowly."""
BACK_SECONDS = 20.0
SAYS_NOTHING_OF_OTHERS = frozenset({"in progress", "deduplication unavailable", "deadline exceeded"})
"""Details of an answer that only says that this try sent nothing: the request is made again."""
SETTLED_SECONDS = 0.06
"""After a kill: what the dead worker had sent to NATS has arrived there."""
NATS_RTT_MS = 24.0
SHORTEST_STEP_SECONDS = 0.005
LONGEST_STEP_SECONDS = 0.05
ASK_AGAIN = 1500
"""Of the requests that are settled, asked for once more in the end."""
SEED = 11

END_OF_CONTENT = b"\r\n.\r\n"
_MARKER = re.compile(rb"marker-([a-z0-9]+)")
_TRACKING_ID = re.compile(rb"^" + contract.TRACKING_HEADER.encode() + rb": .*/([^/\r\n]+)\r$", re.MULTILINE)


# -- the smarthost -----------------------------------------------------------------------------------------------------
class Fate(StrEnum):
    """What the smarthost does with a mail; the beginning of its marker says it."""

    TAKEN = "taken"
    REFUSED = "refused"
    """550 to RCPT."""
    REJECTED = "rejected"
    """554 to the final dot."""
    DEFERRED = "deferred"
    """451 to the final dot."""
    DROPPED = "dropped"
    """It takes the mail and hangs up without a word."""


class Step(StrEnum):
    """The last thing that the smarthost heard or said of a mail."""

    NOTHING = "no connection"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    CONTENT = "354"
    DOT = "final dot"
    REPLIED = "its reply"


class Mail(NamedTuple):
    """One that the smarthost took."""

    marker: str
    email_id: str


class SlowSink:
    """An SMTP server in this process: without PIPELINING, with a pause of chance before each reply."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.mails: list[Mail] = []
        """Those that it took or may have seemed to take: their final dot came and was not answered with a refusal."""
        self.dots: Counter[str] = Counter()
        """How many final dots came of which marker, whatever was answered."""
        self.steps: dict[str, Step] = {}
        """Of each marker."""
        self.is_slow = True

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serves; yields the port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # its client is gone, or was killed
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        marker = ""
        writer.write(b"220 sink.example.com ESMTP\r\n")
        while True:
            line = await reader.readuntil(b"\r\n")
            verb = line[:4].upper()
            if verb == b"QUIT":
                writer.write(b"221 bye\r\n")
                await writer.drain()
                return
            if verb == b"MAIL":
                marker = _marker_in(line)
            if verb in (b"MAIL", b"RCPT", b"DATA"):
                self.steps[marker] = Step(verb.decode())
            await self._pause()
            if verb == b"DATA":
                writer.write(b"354 go on\r\n")
                self.steps[marker] = Step.CONTENT
                if not await self._take(await reader.readuntil(END_OF_CONTENT), marker, writer):
                    return
            elif verb == b"RCPT" and fate_of(marker) is Fate.REFUSED:
                writer.write(b"550 5.1.1 unknown\r\n")
            else:
                writer.write(b"250 ok\r\n")

    async def _take(self, content: bytes, marker: str, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        seen = _marker_in(content)
        assert seen == marker, (seen, marker)
        self.steps[marker] = Step.DOT
        self.dots[marker] += 1
        fate = fate_of(marker)
        found = _TRACKING_ID.search(content)
        if fate in (Fate.TAKEN, Fate.DROPPED):
            self.mails.append(Mail(marker, found[1].decode() if found else ""))
        await self._pause()
        if fate is Fate.DROPPED:
            return False
        refusals = {Fate.REJECTED: b"554 5.6.0 not this\r\n", Fate.DEFERRED: b"451 4.3.0 later\r\n"}
        writer.write(refusals.get(fate, b"250 Ok taken\r\n"))
        self.steps[marker] = Step.REPLIED
        return True

    async def _pause(self) -> None:
        if self.is_slow:
            await asyncio.sleep(self._chance.uniform(SHORTEST_STEP_SECONDS, LONGEST_STEP_SECONDS))


def _marker_in(text: bytes) -> str:
    found = _MARKER.search(text)
    return found[1].decode() if found else ""


FATES = {
    "t": Fate.TAKEN,
    "f": Fate.REFUSED,
    "r": Fate.REJECTED,
    "d": Fate.DEFERRED,
    "x": Fate.DROPPED,
}


def fate_of(marker: str) -> Fate:
    """What the smarthost does with this mail."""
    return FATES[marker[:1]]


# -- callers -----------------------------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """Where a request was when a worker was killed."""

    is_its_worker: bool
    """Whether it was the one who had written its claim; True when there is none: it may have been."""
    token: str
    """Of its claim; '' when there is none."""
    phase: str
    """Of its claim."""
    step: Step


@dataclass(eq=False)
class Request:
    """One request and all that came of it."""

    marker: str
    seen: list[Seen] = field(default_factory=list)
    """During the try that is under way."""
    hits: dict[str, Seen] = field(default_factory=dict)
    """Where it was when the worker that had it was killed, by the claim's token."""
    unanswered: int = 0
    in_progress: int = 0
    unavailable: int = 0
    answer: dict[str, Any] | None = None
    """The first one that says what became of the request."""

    @property
    def outcome(self) -> str:
        """Of the answer."""
        if self.answer is None:
            return "none"
        return str(self.answer.get("outcome", "relayed"))

    @property
    def payload(self) -> bytes:
        """The same each time."""
        return payload_of(self.marker)


def payload_of(marker: str) -> bytes:
    """The marker stands in subject and envelope; the request_id is of it, too."""
    mail = {
        "from": f"marker-{marker}@example.com",
        "to": "user@example.com",
        "subject": f"A mail of a drill, marker-{marker}",
        "text": "It has a line of text.\n" * 20,
        "html": "<p>It has a line of text.</p>\n" * 20,
        "group_id": "drill-request-ids",
        "request_id": request_id_of(marker),
        "timeout_seconds": TIMEOUT_SECONDS,
    }
    return json.dumps(mail).encode()


def request_id_of(marker: str) -> str:
    """Which is printable ASCII."""
    return f"drill {marker}"


async def ask(nc: Client, nats_subject: str, payload: bytes) -> dict[str, Any] | None:
    """The reply, None when there is none."""
    try:
        reply: dict[str, Any] = json.loads((await nc.request(nats_subject, payload, REPLY_SECONDS)).data)
    except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
        return None
    return reply


# -- twins -------------------------------------------------------------------------------------------------------------
async def play_twins(findings: Findings, nats_url: str, sink: SlowSink, rounds: int) -> None:
    """Round after round: ``TWINS`` callers make the same request at once, over several connections."""
    connections = [await nats.connect(nats_url, allow_reconnect=False) for _ in range(SEND_WORKERS)]
    wrong: list[str] = []
    fates: Counter[str] = Counter()
    longest = 0.0
    try:
        for number in range(rounds):
            letter = "tttfttxr"[number % 8]
            marker = f"{letter}twins{number}"
            fates[FATES[letter].value] += 1
            begun = time.monotonic()
            asking = [ask(nc, contract.SEND_EMAIL, payload_of(marker)) for nc in connections]
            asking += [ask(connections[each % 4], contract.SEND_EMAIL, payload_of(marker)) for each in range(TWINS - 4)]
            replies = await asyncio.gather(*asking)
            longest = max(longest, time.monotonic() - begun)
            if complaint := twins_complaint(marker, replies, sink):
                wrong.append(f"{marker}: {complaint}")
    finally:
        for nc in connections:
            await nc.close()
    findings.figures["twins"] = f"{rounds} rounds of {TWINS}: {dict(fates)}"
    findings.figures["twins: seconds until the last of a round was answered, at most"] = round(longest, 2)
    findings.check(
        f"{TWINS} twins over {SEND_WORKERS} workers are one mail, and one answer but for `duplicate`",
        not wrong and rounds > 0,
        wrong[:3] or f"{rounds} rounds",
    )


def twins_complaint(marker: str, replies: Sequence[dict[str, Any] | None], sink: SlowSink) -> str:
    """What is wrong with a round, '' when nothing is."""
    unanswered = sum(reply is None for reply in replies)
    if unanswered:
        return f"{unanswered} twins got no reply"
    told = Counter(json.dumps({**(reply or {}), "duplicate": None}, sort_keys=True) for reply in replies)
    if len(told) != 1:
        return f"{len(told)} different replies: {told.most_common(3)}"
    firsts = sum("duplicate" not in (reply or {}) for reply in replies)
    if firsts != 1:
        return f"{firsts} replies are no duplicates"
    fate = fate_of(marker)
    outcome = str((replies[0] or {}).get("outcome", "relayed"))
    wanted = {Fate.TAKEN: ("relayed", 1), Fate.DROPPED: ("in_doubt", 1), Fate.REJECTED: ("failed", 1)}
    seen = (outcome, sink.dots[marker])
    return "" if seen == wanted.get(fate, ("failed", 0)) else f"{seen[0]} after {seen[1]} final dots"


# -- kills -------------------------------------------------------------------------------------------------------------
class Killing:
    """Callers who make new requests all the time, and workers that are killed under their hands."""

    def __init__(self, relay: RelayProcess, sink: SlowSink, nc: Client, bucket: KeyValue, seed: int) -> None:
        self._relay = relay
        self._sink = sink
        self._nc = nc
        self._bucket = bucket
        self._chance = random.Random(seed)
        self._is_over = False
        self._give_up_at = 0.0
        self._under_way: set[Request] = set()
        self.requests: list[Request] = []
        self.kills = 0

    async def play(self, kills: int, seconds: float) -> None:
        """Returns when every request has its answer, or has been given up."""
        callers = [asyncio.create_task(self._call()) for _ in range(CALLERS)]
        try:
            await self._kill_all(kills, seconds)
        finally:
            self._is_over = True
            self._give_up_at = time.monotonic() + GIVE_UP_SECONDS
        repeating = [task for tasks in await asyncio.gather(*callers) for task in tasks]
        await asyncio.gather(*repeating)

    async def _call(self) -> list[asyncio.Task[None]]:
        """One caller: makes a new request whenever the last one is answered, or will not be."""
        repeating = []
        while not self._is_over:
            letter = self._chance.choice("ttttttfrdx")
            request = Request(f"{letter}{len(self.requests)}")
            self.requests.append(request)
            await self._try(request)
            if request.answer is None:
                repeating.append(asyncio.create_task(self._repeat(request)))
        return repeating

    async def _repeat(self, request: Request) -> None:
        while request.answer is None and not (self._is_over and time.monotonic() > self._give_up_at):
            await asyncio.sleep(PAUSE_SECONDS)
            await self._try(request)

    async def _try(self, request: Request) -> None:
        request.seen = []
        self._under_way.add(request)  # by identity
        reply = await ask(self._nc, contract.SEND_EMAIL, request.payload)
        self._under_way.discard(request)
        if reply is None:
            request.unanswered += 1
            for seen in request.seen:
                if seen.is_its_worker:
                    request.hits.setdefault(seen.token, seen)
        elif reply.get("detail") in SAYS_NOTHING_OF_OTHERS:
            request.in_progress += reply["detail"] == "in progress"
            request.unavailable += reply["detail"] == "deduplication unavailable"
        else:
            request.answer = reply

    async def _kill_all(self, kills: int, seconds: float) -> None:
        lives_since = {f"send-{number}": 0.0 for number in range(1, SEND_WORKERS + 1)}
        pids = dict.fromkeys(lives_since, 0)
        for _ in range(kills):
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * seconds / kills)
            until = time.monotonic() + BACK_SECONDS
            while True:
                old_enough = [name for name, at in lives_since.items() if time.monotonic() - at > LIVES_SECONDS]
                name = self._chance.choice(old_enough or list(lives_since))
                status = await asyncio.to_thread(self._relay.program, name)
                if old_enough and status.is_ready and status.pid != pids[name]:
                    break
                if time.monotonic() > until:
                    raise TimeoutError(f"no worker is ready to be killed: {status}")
                await asyncio.sleep(0.05)
            os.kill(status.pid, signal.SIGKILL)
            self.kills += 1
            steps = dict(self._sink.steps)  # the sink goes on with what it has
            under_way = list(self._under_way)
            lives_since[name], pids[name] = time.monotonic(), status.pid
            await asyncio.sleep(SETTLED_SECONDS)
            await asyncio.gather(
                *(self._look(request, name, steps.get(request.marker, Step.NOTHING)) for request in under_way)
            )

    async def _look(self, request: Request, killed: str, step: Step) -> None:
        """Notes where a request is."""
        seen = request.seen
        value = None
        with contextlib.suppress(nats.js.errors.KeyNotFoundError):
            entry = await self._bucket.get(claim_key("", request_id_of(request.marker)))
            value = read_value(entry.value or b"")
        if value is None:
            seen.append(Seen(True, "", "", step))
        else:
            owner = value.owner
            seen.append(Seen(owner.worker.partition("@")[0] == killed, owner.token, value.phase.value, step))


MOMENTS = (
    "before the claim",
    "claimed, before MAIL",
    "claimed, in MAIL",
    "claimed, in RCPT",
    "claimed, in DATA",
    "committing, before the dot",
    "after the dot, before its reply",
    "after the reply, before done",
    "after done or open, before the answer",
)


def moment_of(seen: Seen) -> str:
    """In which phase of a request its worker was killed."""
    before_commit = {
        Step.NOTHING: MOMENTS[1],
        Step.MAIL: MOMENTS[2],
        Step.RCPT: MOMENTS[3],
        Step.DATA: MOMENTS[4],
        Step.CONTENT: MOMENTS[4],
    }
    if not seen.phase:
        return MOMENTS[0]
    if seen.phase in (Phase.DONE, Phase.OPEN):
        return MOMENTS[8]
    if seen.step is Step.REPLIED:
        return MOMENTS[7]
    if seen.step is Step.DOT:
        return MOMENTS[6]
    return MOMENTS[5] if seen.phase == Phase.COMMITTING else before_commit[seen.step]


def complaint_of(request: Request, mails: Counter[str], ids: dict[str, str]) -> str:
    """How a request's answer disagrees with what the smarthost saw, '' when it does not."""
    answer, count = request.answer, mails[request.marker]
    if answer is None:
        return "no answer at all"
    if answer.get("outcome") == "deferred" and answer.get("detail") == "overloaded":
        return "" if count == 0 else "overloaded, and sent"
    allowed = {"relayed": (1,), "failed": (0,), "deferred": (0,), "in_doubt": (0, 1)}
    if count not in allowed.get(request.outcome, ()):
        return f"{request.outcome}, and the smarthost took it {count} times"
    if count and answer.get("email_id") != ids[request.marker]:
        return "the answer's email_id is another than the mail's"
    return ""


def judge_kills(findings: Findings, killing: Killing, sink: SlowSink) -> None:
    """What must hold of all requests, and what the kills met."""
    mails = Counter(mail.marker for mail in sink.mails)
    tracking_ids = Counter(mail.email_id for mail in sink.mails)
    ids = {mail.marker: mail.email_id for mail in sink.mails}
    hit = [request for request in killing.requests if request.unanswered]
    moments = Counter(moment_of(seen) for request in hit for seen in request.hits.values())
    outcomes = Counter(request.outcome for request in killing.requests)
    other_reasons = Counter(
        str((request.answer or {}).get("detail"))
        for request in killing.requests
        if request.outcome == "deferred" and fate_of(request.marker) is not Fate.DEFERRED
    )
    in_doubt = Counter(mails[request.marker] for request in hit if request.outcome == "in_doubt")
    findings.figures |= {
        "kills": killing.kills,
        "requests": len(killing.requests),
        "requests whose worker was killed": len(hit),
        "outcomes": str(dict(outcomes)),
        "outcomes of those": str(dict(Counter(request.outcome for request in hit))),
        "in doubt, and not sent": in_doubt[0],
        "in doubt, and sent": in_doubt[1],
        "deferred for another reason than the smarthost's": str(dict(other_reasons)),
        "answers `in progress`": sum(request.in_progress for request in killing.requests),
        "answers `deduplication unavailable`": sum(request.unavailable for request in killing.requests),
        "such answers to requests whose worker was never killed": sum(
            request.unavailable for request in killing.requests if not request.unanswered
        ),
    }
    findings.figures |= {f"killed {moment}": moments[moment] for moment in MOMENTS}
    twice = [marker for marker, count in mails.items() if count > 1]
    findings.check("no request was sent twice", not twice, twice[:3] or sum(mails.values()))
    findings.check("no mail was taken twice", set(tracking_ids.values()) == {1}, len(tracking_ids))
    # Whoever was told 451 and died before it could answer has released the claim: its request is made anew, rightly.
    dots = [marker for marker, count in sink.dots.items() if count > 1 and fate_of(marker) is not Fate.DEFERRED]
    findings.check("no final dot came twice, unless it was deferred", not dots, dots[:3] or sink.dots.total())
    wrong = [
        f"{request.marker}: {complaint} {request.answer} {request.hits}"
        for request in killing.requests
        if (complaint := complaint_of(request, mails, ids))
    ]
    findings.remarks += wrong[:10]
    findings.check(
        "every request was answered, as the smarthost saw it", not wrong, len(wrong) or len(killing.requests)
    )
    never = [moment for moment in MOMENTS if not moments[moment]]
    findings.check("kills fell into every phase", not never, never or f"{killing.kills} kills")


async def judge_repetitions(findings: Findings, nc: Client, requests: Sequence[Request]) -> None:
    """Who asks once more is told the same, and every mail that may have been sent has its record."""
    settled = [each for each in requests if each.outcome in ("relayed", "failed", "in_doubt")]
    settled.sort(key=lambda each: -each.unanswered)
    again: list[str] = []
    unknown: list[str] = []
    limit = asyncio.Semaphore(CALLERS)

    async def look(request: Request) -> None:
        async with limit:
            reply = await ask(nc, contract.SEND_EMAIL, request.payload)
            if reply != {**(request.answer or {}), "duplicate": True}:
                again.append(f"{request.marker}: {request.answer} and then {reply}")
            if request.outcome != "failed":
                question = json.dumps({"email_id": (request.answer or {})["email_id"]}).encode()
                record = await ask(nc, contract.GET_EMAIL_STATUS, question)
                if record is None or record.get("email_id") != (request.answer or {})["email_id"]:
                    unknown.append(f"{request.marker}: {record}")

    chosen = settled[:ASK_AGAIN]
    await asyncio.gather(*(look(request) for request in chosen))
    findings.remarks += again[:5] + unknown[:5]
    findings.check("asked once more, it is the same answer", bool(chosen) and not again, len(again) or len(chosen))
    findings.check("every mail that may have been sent has its record", not unknown, len(unknown) or "all")


# -- the drill ---------------------------------------------------------------------------------------------------------
async def play_all(
    stage: Stage, findings: Findings, seconds: float, *, kills: int = KILLS, rounds: int = TWIN_ROUNDS
) -> None:
    """Twins, then kills for about ``seconds``."""
    seed = SEED if stage.seed is None else stage.seed
    nats_server = stage.start_nats()
    proxy = stage.enter_context(delay_proxy.running(nats_server.port, NATS_RTT_MS))
    sink = SlowSink(seed)
    async with sink.listening() as port:
        relay = await asyncio.to_thread(
            stage.start_relay,
            f"nats://127.0.0.1:{proxy.port}",
            port,
            RELAY_SEND_WORKERS=str(SEND_WORKERS),
            SMTP_ALLOWED_FROM_DOMAINS="example.com",
            TRACKING_ACK_SECONDS="10",
        )
        await play_twins(findings, nats_server.url, sink, rounds)
        nc = await nats.connect(nats_server.url, allow_reconnect=False)
        try:
            bucket = await nc.jetstream(timeout=BACK_SECONDS).key_value(contract.REQUESTS_BUCKET)
            killing = Killing(relay, sink, nc, bucket, seed)
            await killing.play(kills, seconds)
            judge_kills(findings, killing, sink)
            sink.is_slow = False
            await judge_repetitions(findings, nc, killing.requests)
        finally:
            await nc.close()
        await asyncio.to_thread(relay.stop)


def play(stage: Stage, seconds: float) -> Findings:
    """Twins, then kills."""
    findings = Findings()
    asyncio.run(play_all(stage, findings, seconds))
    return findings


DRILLS = (Drill("request-ids", play, seconds=40.0, margin_seconds=90.0, whole_seconds=60.0),)
