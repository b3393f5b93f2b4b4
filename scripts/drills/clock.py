"""The clock is set by an hour under load, forth, back and behind: what waits must not notice.

``clock`` runs the workers under libfaketime, whose offset changes while requests come. As on a real machine only
the time of day jumps: CLOCK_MONOTONIC goes on as ever. Nothing may be late because of it, no connection may be given
up, and every record says the time that the machine says.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from scripts.drills.frame import Drill, Findings, Stage, send_figures
from scripts.drills.nats_faults import settle
from scripts.drills.open_loop import Asking, between, details, outcomes, quantile
from scripts.drills.sink import RunningSink
from scripts.drills.tracking import read_kept
from tests.support.relay_process import RelayProcess

RATE = 200.0
"""Requests a second."""
MAIL_SECONDS = 0.05
"""What the sink takes over a mail, so that about ten are under way when the clock jumps."""
JUMPS_SECONDS = (3600, 0, -3600)
"""What the clock is wrong by, after each jump."""
NOTICED_SECONDS = 2.5
"""libfaketime looks for a new offset when more than one second is over, counted in whole ones."""
LATE_SECONDS = 5.0
"""A wait that goes by the time of day ends an hour late or an hour early: anything shorter is a crowded machine."""
LIBRARY = f"/usr/lib/{platform.machine()}-linux-gnu/faketime/libfaketimeMT.so.1"
MOST_FRESH = 0.5
"""Of the connections that there were: so many may be opened besides, for a crowd."""
EXACT_SECONDS = 0.5
"""By how much a record's time may lie outside of the time between request and reply."""


HOOK = """
import os, sys

if "LD_PRELOAD" not in os.environ and any(word.startswith("workers.") for word in sys.orig_argv[1:]):
    os.environ.update({preload!r})
    os.execv(sys.executable, sys.orig_argv)
"""
"""Python runs this before anything else: a worker starts itself again, with the library."""


class Pools(NamedTuple):
    """Connections of all send workers together."""

    opened: int
    """So far."""
    living: int


class Jump(NamedTuple):
    """The clock from then on, until the next one."""

    offset_seconds: int
    at: float
    """On ``time.monotonic()``."""
    pools: Pools
    """Of the send workers, just before."""


class WrongClock:
    """The time of day of the workers of a relay that is started with ``settings``.

    Of the workers only: libfaketime does not go with the sleep of Python's own, which ``relayctl`` and supervisord use.
    """

    def __init__(self, directory: Path) -> None:
        if not Path(LIBRARY).exists():
            raise FileNotFoundError(f"{LIBRARY}: install Debian's package faketime")
        self._file = directory / "clock"
        self._hook = directory / "hook"
        self._hook.mkdir()
        preload = {
            "LD_PRELOAD": LIBRARY,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # the same for older versions
            "FAKETIME_DONT_RESET": "1",
        }
        (self._hook / "sitecustomize.py").write_text(HOOK.format(preload=preload))
        self.set(0)

    @property
    def settings(self) -> dict[str, str]:
        """The environment that has the workers see it."""
        paths = [str(self._hook), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths)}

    def set(self, offset_seconds: int) -> None:
        """From now on it is wrong by so much; written so that nobody reads half of it."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_seconds:+d}\n")
        os.replace(fresh, self._file)


def pools_of(relay: RelayProcess) -> Pools:
    """What the send workers say of their connections."""
    pools = [worker["pool"] for worker in send_figures(relay)]
    return Pools(sum(pool["connections_opened"] for pool in pools), sum(pool["idle"] + pool["busy"] for pool in pools))


def clock(stage: Stage, seconds: float) -> Findings:
    """Right, then wrong in each way, for the same time."""
    findings = Findings()
    wrong_clock = WrongClock(stage.directory)
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
    # A connection that idles long enough to be closed would look like one that the clock has closed.
    relay = stage.start_relay(nats_server.url, sink.port, SMTP_IDLE_SECONDS="120", **wrong_clock.settings)
    asking = Asking([nats_server.url], RATE, "clock")
    each_seconds = seconds / (len(JUMPS_SECONDS) + 1)
    jumps: list[Jump] = []

    async def play() -> None:
        async with asking.under_way():
            await asyncio.sleep(each_seconds)
            for offset_seconds in JUMPS_SECONDS:
                pools = await asyncio.to_thread(pools_of, relay)
                jumps.append(Jump(offset_seconds, time.monotonic(), pools))
                wrong_clock.set(offset_seconds)
                await asyncio.sleep(NOTICED_SECONDS + each_seconds)
            jumps.append(Jump(0, time.monotonic(), await asyncio.to_thread(pools_of, relay)))

    asyncio.run(play())
    usual = between(asking.requests, 0.0, jumps[0].at)
    findings.figures["usual: s a mail takes, p50, p99"] = f"{quantile(usual, 0.5):.3f}, {quantile(usual, 0.99):.3f}"
    for jump, following in itertools.pairwise(jumps):
        name = f"clock {jump.offset_seconds:+d} s"
        during = between(asking.requests, jump.at, following.at)
        longest = quantile(during, 1)
        findings.figures[f"{name}: requests"] = ", ".join(f"{count} {what}" for what, count in outcomes(during).items())
        findings.figures[f"{name}: s a mail takes, p50, p99, longest"] = ", ".join(
            f"{quantile(during, share):.3f}" for share in (0.5, 0.99, 1)
        )
        fresh, living = following.pools.opened - jump.pools.opened, jump.pools.living
        findings.figures[f"{name}: connections opened, of so many"] = f"{fresh}, {living}"
        wrong = details(during)
        findings.remarks += [f"{name}: {count} replies: {what}" for what, count in wrong.most_common(5)]
        findings.check(f"{name}: every mail was relayed", not wrong and bool(during), wrong.total())
        what = f"{name}: none took {LATE_SECONDS:g} s"
        findings.check_timing(what, longest <= LATE_SECONDS, f"{longest:.3f} s at most")
        findings.check(f"{name}: connections were kept", fresh <= living * MOST_FRESH, f"{fresh} opened anew")
    settle(findings, relay, asking, sink)
    judge_times(findings, asking, relay, jumps)
    return findings


def judge_times(findings: Findings, asking: Asking, relay: RelayProcess, jumps: Sequence[Jump]) -> None:
    """Each record says the time that its worker's clock said: the drill has made the clock jump, and nothing else."""
    wall = time.time() - time.monotonic()
    sent_at = {
        email_id: datetime.fromisoformat(record["sent_at"]).timestamp()
        for group in read_kept(relay.nats_url).values()
        for email_id, record in group.records.items()
    }
    for jump, following in itertools.pairwise(jumps):
        offs = []
        for each in between(asking.requests, jump.at + NOTICED_SECONDS, following.at):
            if each.email_id in sent_at and each.replies[0][0] < following.at:
                told_at = sent_at[each.email_id] - jump.offset_seconds - wall
                offs.append(max(0.0, each.due_at - told_at, told_at - each.replies[0][0]))
        name = f"clock {jump.offset_seconds:+d} s"
        most = max(offs, default=math.inf)
        findings.check(f"{name}: the records say so", most <= EXACT_SECONDS, f"off by {most:.2f} s at most")


DRILLS = (Drill("clock", clock, seconds=16.0, margin_seconds=60.0, whole_seconds=40.0),)
