"""Back-pressure: a smarthost that takes its time, and callers who want more than goes through it.

``overload`` has a sink that takes a fixed time over each mail, so that what the relay can do is known beforehand: its
connections ÷ that time. Then, with 2 and with 4 send workers: a burst of 5,000 that can be served before its deadline
is served, without one refusal; of callers that ask again as soon as they are answered, each worker serves its share;
at twice what can be done, whoever is refused hears of it at once, whoever is taken is served, and memory stays flat;
and after requests of 1 MB, more in a second than NATS keeps for whoever does not read them, all is as before. What
starting takes is measured, too.

``soak`` plays the overload alone, for as long as it is told.
"""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import nats
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from relay import contract
from scripts.bench.machine import resident_mb
from scripts.drills.frame import Drill, Findings, Stage, send_figures
from scripts.drills.sink import RunningSink
from scripts.drills.traffic import payload_of
from tests.support.nats_server import free_port
from tests.support.relay_process import RelayProcess

MAIL_SECONDS = 0.08
"""What the sink takes over a mail."""
CONNECTIONS = 48
"""Of all send workers together."""
CAPACITY = CONNECTIONS / MAIL_SECONDS
"""Mails a second that go through, at most."""
BURST = 5_000
BURST_DEADLINE_SECONDS = 20.0
"""The burst needs 8.3 s where nothing is lost."""
DEADLINE_SECONDS = 5.0
"""SEND_TIMEOUT_SECONDS in overload: it begins that long after the first request."""
CALLERS = 200
CLOSED_LOOP_SECONDS = 4.0
LEAST_SHARE = 0.5
"""Of an equal share, for the worker that got least."""
REFUSAL_SECONDS = 0.020
LEAST_SERVED = 0.9
"""Of what can be done, while there is more to do; the rest is what a reply and the next mail take."""
MOST_LATE = 0.05
"""Of the requests that were taken: those that were deferred after all, since their turn came too late."""
LARGE_MAILS = 300
LARGE_BYTES = 1_000_000
AFTERWARDS = 200
REPLY_SECONDS = 60.0
LARGE_REPLY_SECONDS = 30.0
"""More than ``BURST_DEADLINE_SECONDS``: what has no reply then has none at all."""
START_SECONDS = 3.0
IMPORT_SECONDS = 0.5
SAMPLE_SECONDS = 1.0
GROWTH_SHARE = 0.03
GROWTH_MB = 3.0
"""Memory is not flat when it has grown by more than this and by more than ``GROWTH_SHARE``."""
LONG_SECONDS = 300.0
SHORT_GROWTH_MB = 20.0
"""Instead of that in less than ``LONG_SECONDS``, since the heap still finds its size: shows a leak for each mail."""
ROOT = Path(__file__).parents[2]


class Fate(IntEnum):
    """What the first reply to a request said."""

    UNANSWERED = 0
    RELAYED = 1
    OVERLOADED = 2
    OTHER = 3


class Callers:
    """Many callers over one connection, and what became of each request: numbers in arrays, since there are many.

    Times are ``time.monotonic()``. A request's time counts from when it was due, also when the caller was late with it.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._inbox = nc.new_inbox()
        self._payload = payload_of(0)
        self._due_at = array("d")
        self._took_seconds = array("d")
        self._fates = bytearray()
        self.replies = bytearray()
        """How many replies each request got, at most 255."""
        self.email_ids: list[str] = []
        """Of the mails that were relayed, in the order of their replies."""
        self.in_doubt: set[str] = set()
        """Of the mails of which the reply says that nobody knows."""
        self.lost: set[int] = set()
        """Requests that may be without a reply: NATS had cut off the worker that they were for."""
        self.details: Counter[str] = Counter()
        """Of the requests that were neither relayed nor refused as overloaded."""
        self._unanswered = 0
        self._all_answered = asyncio.Event()
        self._asking_on_until = 0.0

    @classmethod
    async def connected(cls, nats_url: str) -> Callers:
        """Callers that are ready to ask."""
        callers = cls(await nats.connect(nats_url, allow_reconnect=False))
        callers._subscription = await callers._nc.subscribe(f"{callers._inbox}.*", cb=callers._on_reply)
        await callers._flush()
        return callers

    async def close(self) -> None:
        """Takes what has still come, and hangs up."""
        await self._flush()
        await self._subscription.drain()  # type: ignore[no-untyped-call]
        await self._nc.close()

    # -- asking ----------------------------------------------------------------------------
    async def burst(self, mails: int) -> range:
        """Asks for all at once and waits for the replies; the numbers of the requests, as of all that follow."""
        begin = len(self._due_at)
        for _ in range(mails):
            await self._ask(time.monotonic())
        await self._wait_answered()
        return range(begin, len(self._due_at))

    async def closed_loop(self, callers: int, seconds: float) -> range:
        """Each caller asks again as soon as it is answered."""
        begin = len(self._due_at)
        self._asking_on_until = time.monotonic() + seconds
        for _ in range(callers):
            await self._ask(time.monotonic())
        await asyncio.sleep(seconds)
        await self._wait_answered()
        return range(begin, len(self._due_at))

    async def open_loop(
        self, rate: float, seconds: float, payload: bytes | None = None, reply_seconds: float = REPLY_SECONDS
    ) -> range:
        """Asks at an even rate, whatever becomes of it."""
        begin, begun = len(self._due_at), time.monotonic()
        for number in range(int(rate * seconds)):
            due_at = begun + number / rate
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            await self._ask(due_at, payload)
        await self._wait_answered(reply_seconds)
        return range(begin, len(self._due_at))

    async def _wait_answered(self, reply_seconds: float = REPLY_SECONDS) -> None:
        """Until every request has a reply; which have none then is counted in the end."""
        try:
            await asyncio.wait_for(self._all_answered.wait(), reply_seconds)
        except TimeoutError:
            self._unanswered = 0

    async def _ask(self, due_at: float, payload: bytes | None = None) -> None:
        number = len(self._due_at)
        self._due_at.append(due_at)
        self._took_seconds.append(math.nan)
        self._fates.append(Fate.UNANSWERED)
        self.replies.append(0)
        self._unanswered += 1
        self._all_answered.clear()
        await self._nc.publish(contract.SEND_EMAIL, payload or self._payload, f"{self._inbox}.{number}")

    async def _on_reply(self, msg: Msg) -> None:
        now = time.monotonic()
        number = int(msg.subject.rpartition(".")[2])
        self.replies[number] = min(255, self.replies[number] + 1)
        # NATS itself answers, without a payload, when no worker listens.
        reply = orjson.loads(msg.data) if msg.data else {"error": "", "detail": "no worker listened"}
        fate = _fate(reply)
        if fate is Fate.RELAYED:
            self.email_ids.append(reply["email_id"])
        elif reply.get("outcome") == "in_doubt":
            self.in_doubt.add(reply.get("email_id", ""))
        if self.replies[number] > 1:
            return
        self._took_seconds[number] = now - self._due_at[number]
        self._fates[number] = fate
        if fate is Fate.OTHER:
            self.details[str(reply.get("detail", reply))] += 1
        if now < self._asking_on_until:
            await self._ask(now)
        self._unanswered -= 1
        if self._unanswered <= 0:
            self._all_answered.set()

    async def _flush(self) -> None:
        # nats-py writes a PING ahead of what it still has to send, unless its writer has had a turn.
        await asyncio.sleep(0)
        await self._nc.flush()

    # -- what became of it -----------------------------------------------------------------
    def count(self, numbers: range, fate: Fate) -> int:
        """How many of these requests had this fate."""
        return self._fates.count(fate, numbers.start, numbers.stop)

    def times(self, numbers: range, fate: Fate) -> list[float]:
        """Seconds until the first reply of those with this fate, shortest first."""
        return sorted(self._took_seconds[number] for number in numbers if self._fates[number] == fate)

    def last_reply_seconds(self, numbers: range) -> float:
        """From the first request to the last first reply."""
        ends = (self._due_at[number] + self._took_seconds[number] for number in numbers if self.replies[number])
        return max(ends, default=math.nan) - self._due_at[numbers.start]

    def relayed_between(self, numbers: range, begin_seconds: float, end_seconds: float) -> int:
        """How many were relayed in that time after the first request."""
        begin = self._due_at[numbers.start] + begin_seconds
        end = self._due_at[numbers.start] + end_seconds
        return sum(
            begin <= self._due_at[number] + self._took_seconds[number] < end
            for number in numbers
            if self._fates[number] == Fate.RELAYED
        )


def _fate(reply: dict[str, object]) -> Fate:
    if "error" not in reply:
        return Fate.RELAYED
    return Fate.OVERLOADED if reply.get("detail") == "overloaded" else Fate.OTHER


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of them do not exceed; nan of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


# -- memory ------------------------------------------------------------------------------------------------------------
class Memory(NamedTuple):
    """Of one process, each second: what it held, in MB."""

    samples: list[float]

    def fifth(self, number: int) -> float:
        """The mean of one fifth of the time, the first being 1."""
        size = len(self.samples) / 5
        part = self.samples[int((number - 1) * size) : int(number * size)]
        return sum(part) / len(part)

    @property
    def slope_mb_per_hour(self) -> float:
        """Of a straight line through all but the first fifth, in which it gets what it needs."""
        samples = self.samples[len(self.samples) // 5 :]
        middle, mean = (len(samples) - 1) / 2, sum(samples) / len(samples)
        spread = sum((at - middle) ** 2 for at in range(len(samples)))
        rise = sum((at - middle) * (sample - mean) for at, sample in enumerate(samples))
        return rise / spread * 3600 / SAMPLE_SECONDS

    def is_flat(self, growth_mb: float) -> bool:
        """Whether the last fifth held hardly more than the second."""
        early, late = self.fifth(2), self.fifth(5)
        return late - early <= growth_mb or late <= early * (1 + GROWTH_SHARE)


async def sample_memory(pids: Sequence[int], seconds: float) -> list[Memory]:
    """Of each process, for so long."""
    memories = [Memory([]) for _ in pids]
    begun = time.monotonic()
    for number in range(int(seconds / SAMPLE_SECONDS)):
        await asyncio.sleep(max(0.0, begun + number * SAMPLE_SECONDS - time.monotonic()))
        for pid, memory in zip(pids, memories, strict=True):
            memory.samples.append(resident_mb(pid))
    return memories


# -- the parts of the drill --------------------------------------------------------------------------------------------
class Relay(NamedTuple):
    """A relay of some workers in front of the slow sink, and who asks it."""

    process: RelayProcess
    workers: int
    callers: Callers


class Scene:
    """NATS and the slow sink; one relay after another plays on it, and at the end every mail must be accounted for."""

    def __init__(self, stage: Stage, findings: Findings, mail_seconds: float = MAIL_SECONDS) -> None:
        self._stage = stage
        self._findings = findings
        self._nats_url = stage.start_nats().url
        self._sink = stage.enter_context(RunningSink.started(mail_seconds))
        self._played: list[Callers] = []

    async def with_relay(
        self, workers: int, deadline_seconds: float, play: Callable[[Relay], Awaitable[None]], **settings: str
    ) -> None:
        """Has ``play`` played with a relay, and ends that, so that its replies can be counted."""
        process = self._stage.start_relay(
            self._nats_url,
            self._sink.port,
            RELAY_SEND_WORKERS=str(workers),
            SMTP_POOL_SIZE=str(CONNECTIONS // workers),
            SEND_TIMEOUT_SECONDS=f"{deadline_seconds:g}",
            # This is about who is taken and who is refused; a busy machine shall not pass for a broken JetStream.
            TRACKING_ACK_SECONDS="10",
            **settings,
        )
        callers = await Callers.connected(self._nats_url)
        self._played.append(callers)
        with steady_clock():
            await play(Relay(process, workers, callers))
        await asyncio.to_thread(process.stop)
        await callers.close()

    def settle(self) -> None:
        """What must hold of all requests together."""
        findings = self._findings
        replies: Counter[int] = Counter()
        for callers in self._played:
            replies.update(count for number, count in enumerate(callers.replies) if count or number not in callers.lost)
        findings.figures["requests"] = sum(len(callers.replies) for callers in self._played)
        what = "every request got exactly one reply"
        if any(callers.lost for callers in self._played):
            what += ", or none where NATS had cut the worker off"
        findings.check(what, set(replies) == {1}, dict(sorted(replies.items())))
        told = Counter(email_id for callers in self._played for email_id in callers.email_ids)
        in_doubt = set[str]().union(*(callers.in_doubt for callers in self._played))
        taken = self._sink.stop()
        # A mail may have gone out whose reply was lost with the connection to NATS.
        unanswered = sum(not callers.replies[number] for callers in self._played for number in callers.lost)
        surplus = taken.keys() - told.keys() - in_doubt
        is_exact = set(taken.values()) <= {1} and told.keys() <= taken.keys() and len(surplus) <= unanswered
        what = "the sink took each mail once, and took those of which it was said"
        findings.check(what, is_exact and set(told.values()) <= {1}, f"{len(told)} of {taken.total()}")
        details = sum((callers.details for callers in self._played), Counter[str]())
        findings.remarks += [f"{count} replies: {detail}" for detail, count in details.most_common(10)]


@contextmanager
def steady_clock() -> Iterator[None]:
    """No collection of garbage in the callers' own process: it would be counted as the relay's time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def play_burst(relay: Relay, findings: Findings) -> None:
    """A burst that can be served in time is served."""
    callers = relay.callers
    numbers = await callers.burst(BURST)
    relayed = callers.count(numbers, Fate.RELAYED)
    took_seconds = callers.last_reply_seconds(numbers)
    findings.figures[f"burst of {BURST}: the last reply after, s"] = round(took_seconds, 1)
    findings.figures[f"burst of {BURST}: share of what {CONNECTIONS} connections can do"] = round(
        BURST / took_seconds / CAPACITY, 2
    )
    findings.check(f"a burst of {BURST} that can be served in time is served", relayed == BURST, relayed)


async def play_shares(relay: Relay, findings: Findings) -> None:
    """Each worker serves its share of what callers ask one after another."""
    before = [worker["relayed"] for worker in send_figures(relay.process)]
    await relay.callers.closed_loop(CALLERS, CLOSED_LOOP_SECONDS)
    after = [worker["relayed"] for worker in send_figures(relay.process)]
    served = [late - early for early, late in zip(before, after, strict=True)]
    equal = sum(served) / relay.workers
    shares = sorted(round(each / equal, 2) for each in served) if equal else [0.0]
    findings.figures[f"{relay.workers} workers, {CALLERS} callers: shares, 1 being equal"] = ", ".join(map(str, shares))
    what = f"no one of {relay.workers} workers served less than {LEAST_SHARE:g} of an equal share"
    findings.check(what, len(served) == relay.workers and shares[0] >= LEAST_SHARE, shares[0])


async def play_overload(relay: Relay, findings: Findings, deadline_seconds: float, seconds: float) -> None:
    """Twice what can be done: the half that is refused hears of it at once, the other half is served."""
    callers = relay.callers
    names = [f"send-{number + 1}" for number in range(relay.workers)]
    pids = [relay.process.program(name).pid for name in names]
    sampling = asyncio.create_task(sample_memory(pids, seconds))
    numbers = await callers.open_loop(2 * CAPACITY, seconds)
    memories = await sampling

    refusals, served = callers.times(numbers, Fate.OVERLOADED), callers.times(numbers, Fate.RELAYED)
    late = callers.count(numbers, Fate.OTHER)
    # From when the backlog is as long as the deadline.
    rate = callers.relayed_between(numbers, deadline_seconds, seconds) / (seconds - deadline_seconds)
    figures = findings.figures
    figures["overload: asked for, of what can be done"] = 2
    figures["overload: relayed, of what can be done"] = round(rate / CAPACITY, 3)
    figures["overload: refused"] = len(refusals)
    figures["overload: refused after, ms (p50, p99, longest)"] = ", ".join(
        f"{1000 * quantile(refusals, share):.1f}" for share in (0.5, 0.99, 1)
    )
    figures["overload: relayed after, s (p50, p99, longest)"] = ", ".join(
        f"{quantile(served, share):.2f}" for share in (0.5, 0.99, 1)
    )
    figures["overload: taken, and then too late"] = late
    for name, memory in zip(names, memories, strict=True):
        figures[f"memory of {name}, MB (second fifth, last fifth)"] = f"{memory.fifth(2):.1f}, {memory.fifth(5):.1f}"
        figures[f"memory of {name}, MB an hour"] = round(memory.slope_mb_per_hour, 1)

    findings.check("at twice what can be done, some are refused", bool(refusals), len(refusals))
    slow = quantile(refusals, 0.99)
    what = f"99 % of the refusals came within {1000 * REFUSAL_SECONDS:g} ms"
    findings.check_timing(what, slow <= REFUSAL_SECONDS, f"{1000 * slow:.1f} ms")
    what = f"as much as {LEAST_SERVED:.0%} of what can be done was relayed meanwhile"
    findings.check_timing(what, rate >= LEAST_SERVED * CAPACITY, f"{rate:.0f}/s of {CAPACITY:.0f}/s")
    findings.check("mail was relayed meanwhile", bool(served), len(served))
    share_late = late / max(1, late + len(served))
    what = f"of those that were taken, at most {MOST_LATE:.0%} were not relayed"
    findings.check(what, share_late <= MOST_LATE, f"{share_late:.2%}")
    grown = [f"{name}: {each.fifth(5) - each.fifth(2):+.1f} MB" for name, each in zip(names, memories, strict=True)]
    growth_mb = GROWTH_MB if seconds >= LONG_SECONDS else SHORT_GROWTH_MB
    findings.check("memory is flat", all(memory.is_flat(growth_mb) for memory in memories), ", ".join(grown))


async def play_large(relay: Relay, findings: Findings, nats_log: Path) -> None:
    """Requests of 1 MB, so many in a second that NATS may cut off a worker that does not read them fast enough.

    What it had for that worker then has no reply, which nobody but NATS can help; but nothing else is lost, and those
    that come afterwards are served. How many were lost says how fast the workers read, and how crowded the machine is.
    """
    callers = relay.callers
    numbers = await callers.open_loop(LARGE_MAILS, 1.0, large_payload(), LARGE_REPLY_SECONDS)
    counts = {fate.name.lower(): callers.count(numbers, fate) for fate in Fate}
    figures = findings.figures
    figures[f"{LARGE_MAILS} x 1 MB in a second"] = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    figures[f"{LARGE_MAILS} x 1 MB: the last reply after, s"] = round(callers.last_reply_seconds(numbers), 1)
    cuts = nats_log.read_text().count("Slow Consumer Detected")
    figures[f"{LARGE_MAILS} x 1 MB: workers that NATS cut off"] = cuts
    if cuts:
        callers.lost.update(numbers)
    numbers = await callers.burst(AFTERWARDS)
    relayed = callers.count(numbers, Fate.RELAYED)
    findings.check("after the large mails everything is served", relayed == AFTERWARDS, f"{relayed} of {AFTERWARDS}")


def large_payload() -> bytes:
    """A request of about 1 MB whose body needs quoted-printable, the way that takes longest."""
    line = "Schöne Grüße – ein Text, der Zeile für Zeile umgeschrieben wird, damit ihn jeder Server nimmt.\n"
    half = line * (LARGE_BYTES // 2 // len(line.encode()))
    mail = {"to": "user@example.com", "subject": "A large mail", "text": half, "html": half, "group_id": "large"}
    return orjson.dumps(mail)


def measure_start_up(stage: Stage, findings: Findings) -> None:
    """What starting takes. The better of two tries, when the first takes too long: others use the machine, too."""
    imported = min(_import_seconds("workers.send") for _ in range(3))
    findings.figures["start-up: import of a send worker, s"] = round(imported, 2)
    findings.check_timing(
        f"a send worker is imported within {IMPORT_SECONDS:g} s", imported <= IMPORT_SECONDS, imported
    )
    tries: list[float] = []
    while len(tries) < 2 and (not tries or tries[0] > START_SECONDS):
        nats_url = f"nats://127.0.0.1:{free_port()}"
        relay = RelayProcess(stage.directory / f"dev{len(tries)}", nats_url, free_port())
        stage.callback(relay.stop)
        begun = time.monotonic()
        relay.start("--dev")
        tries.append(time.monotonic() - begun)
        relay.stop()
    findings.figures["start-up: relayctl start --dev with 2 workers, s"] = round(min(tries), 2)
    what = f"the development stack is ready within {START_SECONDS:g} s"
    findings.check_timing(what, min(tries) <= START_SECONDS, f"{min(tries):.2f} s")


def _import_seconds(module: str) -> float:
    program = f"import time; begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


# -- the drills --------------------------------------------------------------------------------------------------------
def play(stage: Stage, seconds: float) -> Findings:
    """All of it; the overload takes half of ``seconds``."""
    findings = Findings()
    measure_start_up(stage, findings)
    scene = Scene(stage, findings)

    async def two(relay: Relay) -> None:
        await play_burst(relay, findings)
        await play_shares(relay, findings)
        await play_large(relay, findings, stage.directory / "nats" / "nats.log")

    async def four(relay: Relay) -> None:
        await play_shares(relay, findings)
        await play_overload(relay, findings, DEADLINE_SECONDS, seconds / 2)

    asyncio.run(scene.with_relay(2, BURST_DEADLINE_SECONDS, two))
    asyncio.run(scene.with_relay(4, DEADLINE_SECONDS, four))
    scene.settle()
    return findings


def soak(stage: Stage, seconds: float) -> Findings:
    """The overload alone, with 2 workers."""
    findings = Findings()
    scene = Scene(stage, findings)

    async def overload(relay: Relay) -> None:
        await play_overload(relay, findings, DEADLINE_SECONDS, seconds)

    asyncio.run(scene.with_relay(2, DEADLINE_SECONDS, overload))
    scene.settle()
    return findings


DRILLS = (Drill("overload", play, seconds=24, margin_seconds=120, whole_seconds=40, is_alone=True),)
SOAK = Drill("soak", soak, seconds=600, margin_seconds=120)
