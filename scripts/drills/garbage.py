"""Whoever may ask may ask for anything: 100,000 requests that make no sense, as fast as they are answered.

``garbage`` writes to NATS without any client's care: random bytes, broken JSON, JSON that is deep, numbers of no size,
bytes that are no text, fields of every wrong type and with every hostile value, header fields that are none, and reply
subjects that would have the relay write where it must not. The status worker's subjects get their share. Between them
there are good requests, which must be served as always. Each request is answered exactly once, unless it names no reply
subject or a forbidden one, and the processes do not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from relay import contract
from scripts.bench.machine import resident_mb
from scripts.drills.frame import Drill, Findings, Stage, send_figures
from scripts.drills.overload import Memory, quantile
from scripts.drills.sink import RunningSink
from scripts.drills.tracking import read_kept
from tests.support.relay_process import RelayProcess

REQUESTS_PER_SECOND = 5_000
"""Of the drill's length: 100,000 in 20 s. It takes as long as it takes."""
AT_ONCE = 300
"""Requests without a reply yet: more than the workers have in hand, less than anybody refuses for their number."""
GOOD_EVERY = 400
REPLY_SECONDS = 30.0
WARM_UP = 15_000
"""Requests, of every kind, before memory is looked at."""
SAMPLE_SECONDS = 0.25
GROWTH_MB = 8.0
"""Between the fifths that are compared; the heap grows in steps of some MB. A leak of 400 bytes a request is more."""
GOOD_SECONDS = 1.0
"""Within which 99 % of the good ones are answered, in a crowd of ``AT_ONCE`` and on a busy machine."""
WORKERS = ("send-1", "send-2", "status")
SEED = 9
MAX_REMARKS = 8
READ_BYTES = 1 << 18

SEND, STATUS, ANALYTICS = contract.SEND_EMAIL, contract.GET_EMAIL_STATUS, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS
SUBJECTS = (SEND, SEND, SEND, SEND, STATUS, ANALYTICS)


# -- a client without care ---------------------------------------------------------------------------------------------
class RawNats:
    """NATS as bytes: what it publishes need be no text, and no library is in the way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.problem = ""
        """What the server complained about."""

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, nats_url: str, nats_subject: str, on_msg: Callable[[str, bytes, bytes], None]
    ) -> AsyncIterator[RawNats]:
        """Connects and subscribes; ``on_msg`` gets subject, header block and payload of each message."""
        host, _, port = nats_url.removeprefix("nats://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=READ_BYTES)
        client = cls(reader, writer)
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')
        writer.write(f"SUB {nats_subject} 1\r\n".encode())
        reading = asyncio.create_task(client._read(on_msg))
        try:
            yield client
        finally:
            reading.cancel()
            writer.close()

    def publish(self, nats_subject: str, payload: bytes, reply_subject: bytes = b"", headers: bytes = b"") -> None:
        """Writes it; ``flushed`` waits until there is room for more."""
        words = [nats_subject.encode(), *([reply_subject] if reply_subject else [])]
        if headers:
            sizes = [str(len(headers)).encode(), str(len(headers) + len(payload)).encode()]
            self._writer.write(b" ".join([b"HPUB", *words, *sizes]) + b"\r\n" + headers + payload + b"\r\n")
        else:
            self._writer.write(b" ".join([b"PUB", *words, str(len(payload)).encode()]) + b"\r\n" + payload + b"\r\n")

    async def flushed(self) -> None:
        """Returns when what was written is on its way."""
        await self._writer.drain()

    async def _read(self, on_msg: Callable[[str, bytes, bytes], None]) -> None:
        while line := await self._reader.readline():
            words = line.split()
            if words[0] == b"MSG":
                payload = await self._reader.readexactly(int(words[-1]) + 2)
                on_msg(words[1].decode(), b"", payload[:-2])
            elif words[0] == b"HMSG":
                both = await self._reader.readexactly(int(words[-1]) + 2)
                at = int(words[-2])
                on_msg(words[1].decode(), both[:at], both[at:-2])
            elif words[0] == b"PING":
                self._writer.write(b"PONG\r\n")
            elif words[0] == b"-ERR":
                self.problem = line.decode(errors="replace").strip()


# -- garbage -----------------------------------------------------------------------------------------------------------
class Asked(NamedTuple):
    """One request as it is put on the wire."""

    kind: str
    nats_subject: str
    payload: bytes
    headers: bytes = b""
    reply_subject: bytes | None = b""
    """'' has an inbox of the drill's, None has none."""
    may_be_good: bool = False
    """The relay may make sense of it: whether it does is its own affair, as long as there is one reply."""


GOOD = {"to": "user@example.com", "subject": "A good mail", "text": "Hello.\n", "html": "<p>Hello.</p>"}
QUESTIONS: dict[str, dict[str, Any]] = {
    SEND: GOOD,
    STATUS: {"email_id": "4b3f0f0e-1111-4222-8333-000000000000"},
    ANALYTICS: {"group_id": "garbage"},
}
FIELDS: dict[str, tuple[str, ...]] = {
    SEND: (*contract.SEND_EMAIL_FIELDS, *contract.SEND_EMAIL_OPTIONS, contract.OBJECT_FIELD),
    STATUS: (*contract.STATUS_FIELDS, contract.STATUS_LIMIT_FIELD),
    ANALYTICS: contract.ANALYTICS_FIELDS,
}
WRONG: tuple[Any, ...] = (
    0,
    -1,
    1.5,
    1e308,
    2**63,
    2**64,
    True,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [{}] * 20,
    ["a@example.com"] * 200,
    {"name": "x", "bucket": "KV_email-recipients"},
)
HOSTILE: tuple[str, ...] = (
    "",
    " ",
    "\x00",
    "\r\nBcc: eve@example.com\r\n",
    "a\nb",
    "user@example.com\r\nRCPT TO:<eve@example.com>",
    "<user@example.com>",
    "user@",
    "@",
    '"\\"@example.com',
    "user@[127.0.0.1]",
    "user@" + "a" * 300 + ".example.com",
    "a@b" * 2000,
    "*",
    ">",
    "$KV.email-recipients.x",
    "../../etc/passwd",
    "{{7*7}}",
    "%s%n%d",
    "\ud800",
    "\u202e\u0000\ufeff",
    "😀" * 3000,
    "x" * 70_000,
    "=?utf-8?q?" + "=00" * 500 + "?=",
    "2026-99-99T99:99:99Z",
    "NaN",
)
FORBIDDEN = (
    b"$KV.email-recipients.forged",
    b"$JS.API.STREAM.DELETE.EMAIL_LOG",
    b"$JS.API.STREAM.PURGE.EMAIL_LOG",
    b"$SYS.REQ.SERVER.PING",
    contract.LOG_PREFIX.encode() + b".garbage.sent",
    contract.SEND_EMAIL.encode(),
    contract.PARKED_SUBJECT.encode(),
    b"_INBOX",
    b"_INBOX.",
    b"_INBOX..x",
    b"_INBOX.*",
    b"_INBOX.>",
    b"_INBOX.a\x0bb",
    b"_INBOX.\xff\xfe",
    b"inbox.lower",
    b"\xc3\x28",
)


ODD = (b"_INBOX." + b"a" * 3500, b"_INBOX." + b"a." * 200 + b"a", b"_INBOX.%s%n")
"""Reply subjects that are allowed, with nobody there."""


class Garbage:
    """Requests by chance, each kind as often as the others."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._kinds: Sequence[Callable[[str], Asked]] = (
            self._noise,
            self._broken,
            self._deep,
            self._numbers,
            self._no_text,
            self._wrong_type,
            self._wrong_type,
            self._hostile,
            self._hostile,
            self._no_object,
            self._headers,
            self._reply_subject,
            self._without_reply,
        )

    def request(self) -> Asked:
        """The next one."""
        return self._chance.choice(self._kinds)(self._chance.choice(SUBJECTS))

    def _noise(self, nats_subject: str) -> Asked:
        return Asked("random bytes", nats_subject, self._chance.randbytes(self._chance.randrange(2000)))

    def _broken(self, nats_subject: str) -> Asked:
        whole = json.dumps(QUESTIONS[nats_subject]).encode()
        return Asked("broken JSON", nats_subject, whole[: self._chance.randrange(len(whole))])

    def _deep(self, nats_subject: str) -> Asked:
        depth = self._chance.choice((100, 1000, 1000, 10_000, 100_000))
        opening, closing = self._chance.choice(((b"[", b"]"), (b'{"to":', b"}")))
        closed = closing * depth if self._chance.random() < 0.5 else b""
        return Asked("deep nesting", nats_subject, opening * depth + b"1" * bool(closed) + closed)

    def _numbers(self, nats_subject: str) -> Asked:
        field = self._chance.choice(FIELDS[nats_subject])
        number = self._chance.choice(
            (b"1e999", b"-1e999", b"9" * 5000, b"1." + b"0" * 5000, b"NaN", b"Infinity", b"-0")
        )
        begin = json.dumps({**QUESTIONS[nats_subject], field: None}).encode()
        payload = begin.replace(b"null", number)
        return Asked("huge numbers", nats_subject, payload, may_be_good=True)

    def _no_text(self, nats_subject: str) -> Asked:
        whole = json.dumps(QUESTIONS[nats_subject]).encode()
        at = whole.rindex(b'"')  # within the last value
        wrong = self._chance.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"))
        # In a text it is taken as U+FFFD, as a caller in Go has it.
        return Asked("invalid UTF-8", nats_subject, whole[:at] + wrong + whole[at:], may_be_good=True)

    def _wrong_type(self, nats_subject: str) -> Asked:
        field = self._chance.choice(FIELDS[nats_subject])
        asked = {**QUESTIONS[nats_subject], field: self._chance.choice(WRONG)}
        return Asked("wrong types", nats_subject, json.dumps(asked).encode(), may_be_good=True)

    def _hostile(self, nats_subject: str) -> Asked:
        field = self._chance.choice(FIELDS[nats_subject])
        asked = {**QUESTIONS[nats_subject], field: self._chance.choice(HOSTILE)}
        return Asked("hostile values", nats_subject, json.dumps(asked).encode(), may_be_good=True)

    def _no_object(self, nats_subject: str) -> Asked:
        payload = self._chance.choice((b"", b"null", b"[]", b"true", b'"to"', b"1", b"{}", b"\xef\xbb\xbf{}", b"{}{}"))
        return Asked("no request at all", nats_subject, payload)

    def _headers(self, nats_subject: str) -> Asked:
        block = self._chance.choice(
            (
                b"Relay-Deadline: " + b"9" * 5000 + b"\r\n",
                b"Relay-Deadline: \xff\xfe\r\n",
                b"traceparent: " + b"0" * 20_000 + b"\r\n",
                b"".join(b"x-%d: y\r\n" % number for number in range(1000)),
                b"a: b\r\n" * 2000,
                b"no colon here\r\n",
                b": no name\r\n",
                b"\x00\x01\x02: \x03\r\n",
                b"Nats-Request-Info: {" + b"[" * 5000 + b"\r\n",
                b"Nats-Msg-Id: x\r\nNats-Rollup: all\r\nNats-Expected-Stream: none\r\n",
                b"x: " + b"y" * 60_000 + b"\r\n",
            )
        )
        headers = b"NATS/1.0\r\n" + block + b"\r\n"
        payload = self._chance.choice((b"{", json.dumps(QUESTIONS[nats_subject]).encode()))
        return Asked("hostile headers", nats_subject, payload, headers, may_be_good=payload != b"{")

    def _reply_subject(self, nats_subject: str) -> Asked:
        if self._chance.random() < 0.1:
            return Asked("odd reply subjects", nats_subject, b"{", reply_subject=self._chance.choice(ODD))
        payload = json.dumps(QUESTIONS[nats_subject]).encode()
        return Asked("forbidden reply subjects", nats_subject, payload, reply_subject=self._chance.choice(FORBIDDEN))

    def _without_reply(self, nats_subject: str) -> Asked:
        return Asked("without a reply subject", nats_subject, self._chance.randbytes(200), reply_subject=None)


# -- the load ----------------------------------------------------------------------------------------------------------
class Load:
    """Asks, counts the replies of each request, and watches how large the processes are."""

    def __init__(self, requests: int, pids: dict[str, int]) -> None:
        self._requests = requests
        self._pids = pids
        self._garbage = Garbage(SEED)
        self._inbox = "_INBOX.garbage"
        self._open: dict[int, tuple[Asked, float]] = {}
        self._asked: list[Asked | None] = []
        """Of each number whether a reply must come, and to what; None to what gets none."""
        self._room = asyncio.Event()
        self.replies: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.relayed: list[str] = []
        self.good_seconds: list[float] = []
        self.good_failed: list[str] = []
        self.problem = ""
        self.took_seconds = 0.0
        self.memories = {name: Memory([]) for name in pids}
        self.is_over = False

    @property
    def unanswered(self) -> list[int]:
        """The numbers of those without the reply that they should have."""
        return [number for number, asked in enumerate(self._asked) if asked is not None and not self.replies[number]]

    @property
    def unwanted(self) -> int:
        """Replies to those that should have none."""
        return sum(self.replies[number] for number, asked in enumerate(self._asked) if asked is None)

    async def run(self, nats_url: str) -> None:
        """Returns when everything is answered that will be."""
        async with RawNats.connected(nats_url, f"{self._inbox}.*", self._on_msg) as client:
            await self._ask(client, WARM_UP)
            watching = asyncio.create_task(self._watch())
            begun = time.monotonic()
            await self._ask(client, self._requests)
            self.took_seconds = time.monotonic() - begun
            self.is_over = True
            await watching
            self.problem = client.problem

    async def _ask(self, client: RawNats, requests: int) -> None:
        for count in range(requests):
            while len(self._open) >= AT_ONCE:
                self._room.clear()
                await asyncio.wait_for(self._room.wait(), REPLY_SECONDS)
            is_good = count % GOOD_EVERY == 0
            asked = Asked("good", SEND, json.dumps(GOOD).encode()) if is_good else self._garbage.request()
            number = len(self._asked)
            self.kinds[asked.kind] += 1
            self._asked.append(None if asked.reply_subject is None or asked.reply_subject else asked)
            reply_subject = asked.reply_subject
            if reply_subject == b"":
                reply_subject = f"{self._inbox}.{number}".encode()
                self._open[number] = (asked, time.monotonic())
            client.publish(asked.nats_subject, asked.payload, reply_subject or b"", asked.headers)
            await client.flushed()
        until = time.monotonic() + REPLY_SECONDS
        while self._open and time.monotonic() < until:
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), 1.0)

    async def _watch(self) -> None:
        while not self.is_over:
            for name, pid in self._pids.items():
                self.memories[name].samples.append(resident_mb(pid))
            await asyncio.sleep(SAMPLE_SECONDS)

    def _on_msg(self, nats_subject: str, headers: bytes, payload: bytes) -> None:
        number = int(nats_subject.rpartition(".")[2])
        self.replies[number] += 1
        self._room.set()
        if (found := self._open.pop(number, None)) is None:
            return
        asked, asked_at = found
        try:
            reply = json.loads(payload)
        except ValueError:
            self.wrong.append(f"{asked.kind}: the reply is {headers + payload!r:.200}")
            return
        error = reply.get("error", "") if isinstance(reply, dict) else ""
        self.errors[error or "none"] += 1
        if asked.nats_subject == SEND and not error and "email_id" in reply:
            self.relayed.append(reply["email_id"])
        if asked.kind == "good":
            self.good_seconds.append(time.monotonic() - asked_at)
            if error:
                self.good_failed.append(str(reply))
        elif not error and not asked.may_be_good:
            self.wrong.append(f"{asked.kind} on {asked.nats_subject}: {asked.payload!r:.200} got {payload!r:.200}")
        elif reply.get("outcome") in {"in_doubt"} or error == contract.INTERNAL_ERROR:
            self.wrong.append(f"{asked.kind} on {asked.nats_subject}: {asked.payload!r:.300} got {payload!r:.300}")


def pids_of(relay: RelayProcess) -> dict[str, int]:
    """The processes of its workers."""
    return {name: relay.program(name).pid for name in WORKERS}


def garbage(stage: Stage, seconds: float) -> Findings:
    """So many requests as ``seconds`` are worth, as fast as they are answered."""
    findings = Findings()
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started())
    relay = stage.start_relay(nats_server.url, sink.port, TRACKING_ACK_SECONDS="10")
    pids = pids_of(relay)
    load = Load(int(seconds * REQUESTS_PER_SECOND), pids)
    asyncio.run(load.run(nats_server.url))
    figures = findings.figures
    requests = load.kinds.total()
    figures["requests"] = requests
    figures["a second"] = round((requests - WARM_UP) / load.took_seconds)
    figures["of each kind"] = ", ".join(f"{count} {kind}" for kind, count in sorted(load.kinds.items()))
    figures["answers, by error"] = ", ".join(f"{count} {error}" for error, count in load.errors.most_common(10))
    good = sorted(load.good_seconds)
    figures["good ones answered after, ms (p50, p99)"] = (
        f"{1000 * quantile(good, 0.5):.1f}, {1000 * quantile(good, 0.99):.1f}"
    )
    unanswered = load.unanswered
    doubled = sum(count > 1 for count in load.replies.values())
    seen = f"{len(unanswered)} without one, {doubled} with several, {load.unwanted} unwanted"
    is_exact = not unanswered and not doubled and not load.unwanted
    findings.check("every request got exactly one reply, and those none that may not have one", is_exact, seen)
    findings.remarks += load.wrong[:MAX_REMARKS]
    findings.check("garbage was refused, and never with an error of the relay's own", not load.wrong, len(load.wrong))
    findings.remarks += load.good_failed[:MAX_REMARKS]
    is_served = bool(good) and not load.good_failed
    findings.check("every good request was served", is_served, f"{len(good)}, {len(load.good_failed)} not")
    what = f"99 % of the good ones within {GOOD_SECONDS:g} s"
    findings.check_timing(what, quantile(good, 0.99) <= GOOD_SECONDS, f"{quantile(good, 0.99):.2f} s")
    for name, memory in load.memories.items():
        early, late = memory.fifth(2), memory.fifth(5)
        figures[f"memory of {name}, MB (second fifth, last fifth)"] = f"{early:.1f}, {late:.1f}"
    grown = [f"{name}: {each.fifth(5) - each.fifth(2):+.1f} MB" for name, each in load.memories.items()]
    is_flat = all(memory.is_flat(GROWTH_MB) for memory in load.memories.values())
    findings.check("memory is flat", is_flat, ", ".join(grown))
    findings.check("no process was replaced", pids_of(relay) == pids)
    judge_forged(findings, relay, load, sink)
    return findings


def judge_forged(findings: Findings, relay: RelayProcess, load: Load, sink: RunningSink) -> None:
    """Nothing was written but what the good ones made."""
    dropped = sum(worker["dropped"] for worker in send_figures(relay))
    findings.figures["requests that the send workers dropped for their reply subject"] = dropped
    relay.stop()
    taken = sink.stop()
    told = set(load.relayed)
    findings.check("no mail was taken twice", set(taken.values()) == {1}, taken.total())
    findings.check("the sink took the mails that were acknowledged, and no other", taken.keys() == told, len(told))
    kept = read_kept(relay.nats_url)
    records = {email_id for group in kept.values() for email_id in group.records}
    facts = Counter[str]()
    for group in kept.values():
        facts.update(group.facts.get("sent", Counter()))
    is_exact = records == told and facts == Counter(told)
    findings.check("each has its record and its fact, and nothing else is there", is_exact, f"{len(records)}")


DRILLS = (Drill("garbage", garbage, seconds=20.0, margin_seconds=100.0, whole_seconds=60.0),)
