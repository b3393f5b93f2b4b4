"""NATS goes away under load: a server that is restarted or crashes, and the leader of a cluster's streams.

``nats-restart``: one NATS server with its store in files is stopped and started again, then killed and started again,
while requests come all the time. What was acknowledged before is there after, and the workers are back at once.

``nats-leader``: three NATS servers, the streams on all of them; the one that leads both is killed. The others elect
another: meanwhile mail goes on, and no record is lost.

``disk-full``: JetStream has no room left since another application's stream took it. Mail goes on, the relay says that
it does not track, and tracks again by itself when there is room.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import nats
import nats.errors
import nats.js.errors

from relay import contract
from scripts.drills.frame import Drill, Findings, Stage, send_figures
from scripts.drills.open_loop import (
    CONNECT_SECONDS,
    GROUPS,
    LACKING,
    Asking,
    between,
    judge_account,
    outcomes,
    quantile,
)
from scripts.drills.sink import RunningSink
from scripts.drills.tracking import analytics, read_kept
from tests.support.nats_cluster import NatsCluster
from tests.support.nats_server import NatsServer
from tests.support.relay_process import RelayProcess

RATE = 200.0
"""Requests a second."""
MAIL_SECONDS = 0.02
"""What the sink takes over a mail, so that some are always under way."""
AWAY_SECONDS = 1.0
BACK_SECONDS = 3.0
"""From when NATS listens again to the first relayed mail."""
PATIENCE_SECONDS = 20.0
ASK_SECONDS = 0.5
MAX_FILE_STORE = "48MB"
FILLER = "FILLER"
FILLER_BYTES = 512 * 1024
INSUFFICIENT_RESOURCES = 10023
LONGEST_RECOVERY_SECONDS = 40.0
SEND_WORKERS = ("send-1", "send-2")


class Outage(NamedTuple):
    """One time without NATS, on ``time.monotonic()``."""

    what: str
    gone_at: float
    listens_at: float
    relayed_at: float | None
    """The first reply that says so to a request made after NATS listened again."""


async def restart(
    what: str, server: NatsServer, end: Callable[[], None], asking: Asking, away_seconds: float
) -> Outage:
    """Ends the server and starts it again; returns when mails are relayed again."""
    gone_at = time.monotonic()
    await asyncio.to_thread(end)
    await asyncio.sleep(away_seconds)
    since = len(asking.requests)
    await asyncio.to_thread(server.start)
    listens_at = time.monotonic()
    relayed_at = await asking.wait_for(lambda each: bool(each.email_id), since, PATIENCE_SECONDS)
    return Outage(what, gone_at, listens_at, relayed_at)


def nats_restart(stage: Stage, seconds: float) -> Findings:
    """Quiet, an orderly restart, quiet, a crash, quiet; each quiet time is a third of ``seconds``."""
    findings = Findings()
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
    relay = stage.start_relay(nats_server.url, sink.port)
    asking = Asking([nats_server.url], RATE, "nats-restart")
    outages: list[Outage] = []

    async def play() -> None:
        async with asking.under_way():
            await asyncio.sleep(seconds / 3)
            outages.append(await restart("stopped", nats_server, nats_server.stop, asking, AWAY_SECONDS))
            await asyncio.sleep(seconds / 3)
            outages.append(await restart("killed", nats_server, nats_server.kill, asking, 0.0))
            await asyncio.sleep(seconds / 3)

    asyncio.run(play())
    findings.figures["requests that were due while the caller had no connection"] = asking.unasked
    for outage in outages:
        back = None if outage.relayed_at is None else outage.relayed_at - outage.listens_at
        seen = "never" if back is None else f"{back:.2f} s"
        findings.figures[f"NATS {outage.what}: away, s"] = round(outage.listens_at - outage.gone_at, 2)
        findings.figures[f"NATS {outage.what}: first relayed mail after it listened again"] = seen
        what = f"NATS {outage.what}: mail is relayed within {BACK_SECONDS:g} s after it listens again"
        findings.check(f"NATS {outage.what}: mail is relayed again", back is not None, seen)
        findings.check_timing(what, back is None or back <= BACK_SECONDS, seen)
    settle(findings, relay, asking, sink)
    return findings


def settle(
    findings: Findings,
    relay: RelayProcess,
    asking: Asking,
    sink: RunningSink,
    taken_before: Mapping[str, int] | None = None,
    **more: Any,
) -> None:
    """Ends the relay and holds its books against everybody else's. ``taken_before``: by sinks that were ended."""
    totals = {name: analytics(relay, name)["total_sent"] for name in names_of(asking)}
    relay.stop()
    kept = {name: each for name, each in read_kept(relay.nats_url).items() if name in totals}
    taken = sink.stop() + Counter(taken_before or {})
    judge_account(findings, asking, taken, kept, totals, **more)


def names_of(asking: Asking) -> list[str]:
    """The groups of its mails."""
    return [f"{asking.name}-{number}" for number in range(GROUPS)]


# -- the leader dies ---------------------------------------------------------------------------------------------------
class Change(NamedTuple):
    """A leader that was killed and what came of it, on ``time.monotonic()``."""

    leader: str
    has_clients: bool
    killed_at: float
    led_at: float | None
    """Both streams have another leader."""
    tracked_at: float | None
    """The send workers say that they track again, or never said that they did not."""


async def leaders(nats_urls: Sequence[str]) -> dict[str, str]:
    """Which server leads bucket and log; '' where none does, as far as anybody knows."""
    nc = await nats.connect(list(nats_urls), allow_reconnect=False, connect_timeout=CONNECT_SECONDS)
    try:
        found = {}
        for name in (contract.LOG_STREAM, f"KV_{contract.RECIPIENTS_BUCKET}"):
            try:
                answer = await nc.request(f"$JS.API.STREAM.INFO.{name}", b"", timeout=ASK_SECONDS)
                found[name] = str((json.loads(answer.data).get("cluster") or {}).get("leader", ""))
            except nats.errors.Error:
                found[name] = ""
        return found
    finally:
        await nc.close()


async def kill_leader(cluster: NatsCluster, relay: RelayProcess, *, has_clients: bool) -> Change:
    """Kills who leads the log, waits until mails are tracked again, and starts it again."""
    leader = (await leaders([server.url for server in cluster.servers]))[contract.LOG_STREAM]
    server = cluster.servers[int(leader.removeprefix("s"))]
    others = [each.url for each in cluster.servers if each is not server]
    killed_at = time.monotonic()
    await asyncio.to_thread(server.kill)
    led_at = tracked_at = None
    while tracked_at is None and time.monotonic() - killed_at < PATIENCE_SECONDS:
        await asyncio.sleep(0.05)
        if led_at is None:
            now_leads = set((await leaders(others)).values())
            led_at = None if now_leads & {"", leader} else time.monotonic()
        elif not await asyncio.to_thread(untracked_why, relay):
            tracked_at = time.monotonic()
    await asyncio.to_thread(server.start)
    return Change(leader, has_clients, killed_at, led_at, tracked_at)


def untracked_why(relay: RelayProcess) -> str:
    """Why the send workers do not track, as they note it; '' when they do."""
    reports = [status.report for status in relay.supervision.statuses() if status.name.startswith("send-")]
    return "; ".join(report.notes["tracking"] for report in reports if report and "tracking" in report.notes)


def nats_leader(stage: Stage, seconds: float) -> Findings:
    """The leader is killed, first one that no client is connected to, then one that may have some."""
    findings = Findings()
    cluster = NatsCluster(stage.directory / "nats", replicas=3)
    stage.callback(cluster.stop)
    cluster.start()
    near = [server.url for server in cluster.servers[:2]]  # the last one leads
    sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
    relay = stage.start_relay(",".join(near), sink.port, TRACKING_REPLICAS="3")
    asking = Asking(near, RATE, "nats-leader")
    changes: list[Change] = []

    async def play() -> None:
        async with asking.under_way():
            for has_clients in (False, True):
                await asyncio.sleep(seconds / 4)
                changes.append(await kill_leader(cluster, relay, has_clients=has_clients))
                await asyncio.sleep(seconds / 4)

    asyncio.run(play())
    for change in changes:
        name = f"leader {change.leader} killed, {'with' if change.has_clients else 'without'} clients of its own"
        during = between(asking.requests, change.killed_at, change.tracked_at or time.monotonic())
        findings.figures |= {
            f"{name}: s until another one led": _seconds(change.killed_at, change.led_at),
            f"{name}: s until mails were tracked": _seconds(change.killed_at, change.tracked_at),
            f"{name}: mails meanwhile": ", ".join(f"{count} {what}" for what, count in outcomes(during).items()),
            f"{name}: seconds they took, p50, p99": f"{quantile(during, 0.5):.3f}, {quantile(during, 0.99):.3f}",
        }
        findings.check(f"{name}: tracking came back", change.tracked_at is not None)
        relayed = sum(bool(each.email_id) for each in during)
        most = len(during) - relayed
        what = f"{name}: mail went on"
        findings.check(what, bool(during) and (not most if not change.has_clients else relayed > most), relayed)
    settle(findings, relay, asking, sink)
    return findings


# -- the disk is full --------------------------------------------------------------------------------------------------
class Filling(NamedTuple):
    """A time without room, on ``time.monotonic()``, and what was said meanwhile."""

    full_at: float
    room_at: float
    tracked_at: float | None
    """The send workers say that they track again."""
    said: str
    """What ``relayctl status`` said of tracking."""
    noted: str
    """What the send workers noted."""


async def fill(nats_url: str) -> int:
    """Another application's stream takes all the room that there is; how many bytes it took."""
    nc = await nats.connect(nats_url, allow_reconnect=False)
    try:
        jetstream = nc.jetstream()
        await jetstream.add_stream(name=FILLER, subjects=[f"{FILLER}.>"])
        filled = 0
        for size_bytes in (FILLER_BYTES, FILLER_BYTES // 16, 512):  # down to less than a mail needs
            while True:
                try:
                    await jetstream.publish(f"{FILLER}.x", b"x" * size_bytes, timeout=PATIENCE_SECONDS)
                except nats.js.errors.APIError as error:
                    if error.err_code != INSUFFICIENT_RESOURCES:
                        raise
                    break
                filled += size_bytes
        return filled
    finally:
        await nc.close()


async def make_room(nats_url: str) -> None:
    """It is gone again."""
    nc = await nats.connect(nats_url, allow_reconnect=False)
    try:
        await nc.jetstream().delete_stream(FILLER)
    finally:
        await nc.close()


def disk_full(stage: Stage, seconds: float) -> Findings:
    """Room, none for half of the time, room again."""
    findings = Findings()
    nats_server = stage.start_nats(MAX_FILE_STORE)
    sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
    relay = stage.start_relay(nats_server.url, sink.port)
    asking = Asking([nats_server.url], RATE, "disk-full")
    fillings: list[Filling] = []

    async def play() -> None:
        async with asking.under_way():
            await asyncio.sleep(seconds / 4)
            findings.figures["bytes that another stream took"] = await fill(nats_server.url)
            full_at = time.monotonic()
            await asyncio.sleep(seconds / 2)
            told = json.loads((await asyncio.to_thread(relay.relayctl, "status", "--json")).stdout)
            noted = untracked_why(relay)
            await make_room(nats_server.url)
            room_at = time.monotonic()
            tracked_at = None
            while tracked_at is None and time.monotonic() - room_at < LONGEST_RECOVERY_SECONDS:
                await asyncio.sleep(0.05)
                if not untracked_why(relay):
                    tracked_at = time.monotonic()
            fillings.append(Filling(full_at, room_at, tracked_at, str(told["tracking"]["problem"]), noted))
            await asyncio.sleep(seconds / 4)

    asyncio.run(play())
    (filling,) = fillings
    during = between(asking.requests, filling.full_at, filling.room_at)
    before = between(asking.requests, 0.0, filling.full_at)
    findings.figures |= {
        "s without room": round(filling.room_at - filling.full_at, 1),
        "s from room again until mails were tracked": _seconds(filling.room_at, filling.tracked_at),
        "without room: mails": ", ".join(f"{count} {what}" for what, count in outcomes(during).items()),
        "without room: s they took, p50, p99": f"{quantile(during, 0.5):.3f}, {quantile(during, 0.99):.3f}",
        "before: s they took, p50, p99": f"{quantile(before, 0.5):.3f}, {quantile(before, 0.99):.3f}",
    }
    all_went = bool(during) and all(each.email_id for each in during)
    findings.check("every mail went out without room, too", all_went, len(during))
    findings.check("relayctl status said why tracking was off", "insufficient" in filling.said, filling.said)
    findings.check("the send workers noted why", "insufficient" in filling.noted, filling.noted)
    findings.check("tracking came back by itself", filling.tracked_at is not None)
    lost = [worker["tracking"]["lost"] for worker in send_figures(relay)]
    findings.figures["mails that the relay counts as lost to tracking"] = sum(lost)
    settle(findings, relay, asking, sink, untracked=sum(lost))
    lacking = findings.figures[LACKING]
    findings.check("the relay counts exactly those that it could not track", sum(lost) == lacking, f"{sum(lost)}")
    warned = sum(
        line.get("msg", "").startswith("mail is not tracked") for name in SEND_WORKERS for line in relay.log(name)
    )
    findings.check("the logs name the mails that were not tracked at once", warned > 0, warned)
    return findings


def _seconds(begin: float, end: float | None) -> str:
    return "never" if end is None else f"{end - begin:.2f}"


DRILLS = (
    Drill("nats-restart", nats_restart, seconds=12.0, margin_seconds=60.0, whole_seconds=30.0),
    Drill("nats-leader", nats_leader, seconds=12.0, margin_seconds=110.0, whole_seconds=24.0),
    Drill("disk-full", disk_full, seconds=12.0, margin_seconds=90.0, whole_seconds=30.0),
)
