"""Processes come and go under load: rolled, scaled, killed. Nobody who asks notices, but whose request died with one.

``restart``: all workers are rolled, twice, while 500 requests a second come.

``scale``: two send workers become four, and four become one. Those that stay are the same processes all the time.

``kill``: one process of each kind after the other is killed with -9. It is back within three seconds; what was in
flight in it has no reply, everything else has. At last supervisord is killed: the workers go on without it, and
``relayctl stop`` ends them in order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from relay import contract
from scripts.drills.frame import Drill, Findings, Stage
from scripts.drills.open_loop import MAX_REMARKS, NOBODY, Asking, details, outcomes, quantile
from scripts.drills.sink import RunningSink
from scripts.drills.traffic import read_stream
from tests.support.moto_server import aws_environment
from tests.support.relay_process import RelayProcess
from tests.support.ses_events import ses_event
from tests.support.sqs_double import SqsDouble

RATE = 500.0
"""Requests a second."""
MAIL_SECONDS = 0.01
"""What the sink takes over a mail, so that some are always under way."""
REPLY_SECONDS = 10.0
"""After the last request. Those that died with a process are waited for, too."""
QUIET_SECONDS = 0.5
"""Of load before, between and after what is done."""
BACK_SECONDS = 3.0
SAMPLE_SECONDS = 0.05
IN_FLIGHT_SECONDS = 2.0
"""Of a request without a reply: so long before the kill it may have been made."""
UNNOTICED_SECONDS = 0.2
"""And so long after it: until NATS sees that the killed process is gone."""
MOST_IN_FLIGHT = 200
EVENTS = 300
"""In the queue when the engagement worker is killed."""
VISIBILITY_SECONDS = 2
ROLLS = 2


class Kill(NamedTuple):
    """A process that was killed, on ``time.monotonic()``."""

    program: str
    killed_at: float
    back_seconds: float


class Scene:
    """NATS, a sink, a relay, and requests all the time."""

    def __init__(self, stage: Stage, findings: Findings, name: str, send_workers: int, **settings: str) -> None:
        self.findings = findings
        self.nats_url = stage.start_nats().url
        self.sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
        self.relay = stage.start_relay(
            self.nats_url, self.sink.port, RELAY_SEND_WORKERS=str(send_workers), TRACKING_ACK_SECONDS="10", **settings
        )
        self.asking = Asking([self.nats_url], RATE, name, reply_seconds=REPLY_SECONDS)

    async def under_load(self, do: Callable[[], Awaitable[None]]) -> None:
        """Does it while requests come."""
        async with self.asking.under_way():
            await asyncio.sleep(QUIET_SECONDS)
            await do()
            await asyncio.sleep(QUIET_SECONDS)

    async def relayctl(self, *arguments: str) -> float:
        """Runs a command that has to succeed; the seconds it took."""
        begun = time.monotonic()
        done = await asyncio.to_thread(self.relay.relayctl, *arguments)
        if done.returncode:
            raise RuntimeError(f"relayctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return time.monotonic() - begun

    def pids(self) -> dict[str, int]:
        """Of every program."""
        return {status.name: status.pid for status in self.relay.supervision.statuses()}

    def judge(self, kills: tuple[Kill, ...] = ()) -> None:
        """Stops the relay and the sink, and holds replies and mails against each other."""
        self.relay.stop()
        taken = self.sink.stop()
        findings, requests = self.findings, self.asking.requests
        findings.figures |= {
            "requests": len(requests),
            "requests by outcome": ", ".join(f"{count} {name}" for name, count in outcomes(requests).items()),
            "replied after, ms (p50, p99, longest)": ", ".join(
                f"{1000 * quantile(requests, share):.0f}" for share in (0.5, 0.99, 1)
            ),
        }
        findings.remarks += [f"{count} replies: {what}" for what, count in details(requests).most_common(MAX_REMARKS)]
        unanswered = [each for each in requests if not each.replies]
        excused = [each for each in unanswered if any(_may_have_died_in(kill, each.due_at) for kill in kills)]
        doubled = sum(len(each.replies) > 1 for each in requests)
        unserved = sum(each.outcome == NOBODY for each in requests)
        what = "every request got exactly one reply"
        if kills:
            what += ", unless it was in flight in a process killed with -9"
            findings.figures["requests that died with their process"] = len(excused)
            findings.check(
                f"at most {MOST_IN_FLIGHT} requests died with their process",
                len(excused) <= MOST_IN_FLIGHT,
                len(excused),
            )
        lost = len(unanswered) - len(excused)
        findings.check(what, not lost and not doubled, f"{lost} without one, {doubled} with several")
        findings.check("somebody listened all the time", not unserved, f"{unserved} found nobody")
        told = Counter(each.email_id for each in requests if each.email_id)
        twice = sum(count > 1 for count in taken.values())
        findings.check("no mail was taken twice", not twice and bool(taken), f"{twice} of {len(taken)}")
        missing = sum(taken[email_id] != 1 for email_id in told)
        findings.check(
            "every mail that was acknowledged was taken, once", not missing and set(told.values()) == {1}, missing
        )
        unsure = len(excused) + sum(each.outcome == "in_doubt" for each in requests)
        surplus = len(taken.keys() - told.keys())
        findings.check("nothing else was taken", surplus <= unsure, f"{surplus}, {unsure} may have been")


def _may_have_died_in(kill: Kill, due_at: float) -> bool:
    """Whether a request made then may have been in flight in the process that was killed."""
    return (
        kill.program.startswith("send-")
        and kill.killed_at - IN_FLIGHT_SECONDS <= due_at <= kill.killed_at + UNNOTICED_SECONDS
    )


class Watch:
    """How many send workers are ready, looked at all the time in a thread of its own."""

    def __init__(self, relay: RelayProcess) -> None:
        self._relay = relay
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.ready: list[int] = []
        """At each look."""

    def _look(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            statuses = self._relay.supervision.statuses()
            self.ready.append(sum(each.is_ready and each.name.startswith("send-") for each in statuses))

    @classmethod
    @contextmanager
    def kept(cls, relay: RelayProcess) -> Iterator[Watch]:
        """For as long as this lasts."""
        watch = cls(relay)
        watch._thread.start()
        try:
            yield watch
        finally:
            watch._is_over.set()
            watch._thread.join()


# -- restart -----------------------------------------------------------------------------------------------------------
def play_restart(stage: Stage, seconds: float) -> Findings:
    """Two workers, rolled twice; at least ``seconds`` of load."""
    findings = Findings()
    scene = Scene(stage, findings, "restart", 2)
    ready: list[int] = []

    async def do() -> None:
        begun = time.monotonic()
        for number in range(1, ROLLS + 1):
            before = scene.pids()
            with Watch.kept(scene.relay) as watch:
                took_seconds = await scene.relayctl("restart")
            ready.extend(watch.ready)
            after = scene.pids()
            findings.figures[f"roll {number} took, s"] = round(took_seconds, 1)
            changed = sum(after.get(program) not in (None, pid) for program, pid in before.items())
            what = f"roll {number} restarted every worker, and left nothing behind"
            findings.check(
                what, changed == len(before) and before.keys() == after.keys(), f"{changed} of {len(before)}"
            )
        await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))

    asyncio.run(scene.under_load(do))
    least = min(ready, default=0)
    findings.figures[f"fewest send workers ready, of {len(ready)} looks"] = least
    findings.check("never fewer than 1 of 2 send workers was ready", least >= 1, least)
    scene.judge()
    return findings


# -- scale -------------------------------------------------------------------------------------------------------------
def play_scale(stage: Stage, seconds: float) -> Findings:
    """From 2 to 4 to 1; a third of ``seconds`` each."""
    findings = Findings()
    scene = Scene(stage, findings, "scale", 2)

    async def do() -> None:
        first = scene.pids()
        for count in (4, 1):
            await asyncio.sleep(seconds / 3)
            before = scene.pids()
            took_seconds = await scene.relayctl("scale", str(count))
            findings.figures[f"to {count} took, s"] = round(took_seconds, 1)
            after = scene.pids()
            stayed = [program for program, pid in before.items() if after.get(program) == pid]
            expected = [program for program in before if not program.startswith("send-") or int(program[5:]) <= count]
            findings.check(f"to {count}: those that stay are the same processes", stayed == expected, ", ".join(stayed))
            send_workers = sum(program.startswith("send-") for program in after)
            findings.check(f"to {count}: so many run", send_workers == count, send_workers)
        await asyncio.sleep(seconds / 3)
        last = scene.pids()
        findings.check("send-1 and status were never touched", all(last[each] == first[each] for each in last))

    asyncio.run(scene.under_load(do))
    scene.judge()
    return findings


# -- kill --------------------------------------------------------------------------------------------------------------
def play_kill(stage: Stage, seconds: float) -> Findings:
    """Each kind of process once; at least ``seconds`` of load."""
    findings = Findings()
    queue = SqsDouble(visibility_seconds=VISIBILITY_SECONDS).start()
    stage.callback(queue.stop)
    scene = Scene(
        stage,
        findings,
        "kill",
        2,
        SES_EVENTING_ENABLED="true",
        SES_ENGAGEMENT_SQS_QUEUE_URL=queue.queue_url,
        **aws_environment(queue.url),
    )
    kills: list[Kill] = []
    mails: list[str] = []

    async def kill_one(program: str) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        pid = scene.relay.program(program).pid
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        back_seconds = await asyncio.to_thread(
            scene.relay.wait_until_ready, program, other_pid_than=pid, timeout_seconds=20
        )
        kills.append(Kill(program, killed_at, back_seconds))
        findings.figures[f"{program}: back after, s"] = round(back_seconds, 1)

    async def do() -> None:
        begun = time.monotonic()
        await kill_one("send-1")
        await kill_one("status")
        mails.extend([each.email_id for each in scene.asking.requests if each.email_id][-EVENTS:])
        events = [json.dumps(ses_event("Delivery", email_id, group_id="kill")) for email_id in mails]
        await asyncio.to_thread(queue.add, *events)
        await kill_one("engagement")
        await kill_one("send-2")
        slowest = max(kill.back_seconds for kill in kills)
        what = f"whoever was killed was back within {BACK_SECONDS:g} s"
        findings.check_timing(what, slowest <= BACK_SECONDS, f"{slowest:.1f} s")
        before = scene.pids()
        os.kill(int((scene.relay.state_dir / "supervisord.pid").read_text()), signal.SIGKILL)
        since = len(scene.asking.requests)
        left_seconds = begun + seconds - time.monotonic()
        await asyncio.sleep(max(4 * QUIET_SECONDS, left_seconds))
        alive = scene.relay.supervision.orphans()
        findings.check("without supervisord the workers go on", alive == before, ", ".join(alive))
        served = sum(bool(each.email_id) for each in scene.asking.requests[since:])
        findings.check("without supervisord mail goes on", served > 0, f"{served} relayed")

    asyncio.run(scene.under_load(do))
    folded = _delivered(scene.nats_url)
    seen = f"{folded.total()} facts of {len(mails)} mails, {len(queue.left)} left in the queue"
    what = "every event was folded once, though who worked on them was killed"
    findings.check(what, folded == Counter(mails) and not queue.left, seen)
    stopped = scene.relay.relayctl("stop")
    left = scene.relay.supervision.orphans()
    findings.check("`relayctl stop` ends what it left", not stopped.returncode and not left, ", ".join(left))
    scene.judge(tuple(kills))
    return findings


def _delivered(nats_url: str) -> Counter[str]:
    """How many facts of its delivery the log has of which mail."""
    facts = asyncio.run(read_stream(nats_url, contract.LOG_STREAM))
    return Counter(fact["email_id"] for nats_subject, fact in facts if nats_subject.endswith(".delivered"))


DRILLS = (
    Drill("restart", play_restart, seconds=10, margin_seconds=60),
    Drill("scale", play_scale, seconds=6, margin_seconds=50),
    Drill("kill", play_kill, seconds=12, margin_seconds=60, is_alone=True),
)
