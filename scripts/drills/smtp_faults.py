"""The smarthost goes away under load: nobody listens, then one does that never says a word, then one that takes mails.

``smtp-down``: while nobody listens every caller is told so at once, and mail goes out again as soon as somebody does.
While the smarthost hangs nothing is known of it at first: callers wait, at most as long as they may, and then are told
at once, too. One that answers everything but contents leaves as many mails in doubt as there are connections to it, and
then is set aside as well. In no case is a mail lost or sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import NamedTuple

from relay.delivery.silence import SILENT_SECONDS
from scripts.drills.frame import Drill, Findings, Stage, send_figures
from scripts.drills.nats_faults import settle
from scripts.drills.open_loop import Asking, Request, between, details, outcomes, quantile
from scripts.drills.sink import RunningSink

RATE = 150.0
"""Requests a second."""
MAIL_SECONDS = 0.02
"""What the sink takes over a mail, so that some are always under way."""
QUIET_SECONDS = 3.0
"""Before, between and after the faults."""
FAST_FOR_SECONDS = 4.0
"""A silent smarthost that is set aside stays silent for so long."""
HANG_SHARE = 1 / 3
"""Of the time without a smarthost, on top of it: so long another one hangs."""
SEND_TIMEOUT_SECONDS = 6.0
FAST_SECONDS = 0.2
LATE_SECONDS = 1.0
"""Beside SEND_TIMEOUT_SECONDS, for a reply on a busy machine, and its record."""
RECOVERY_SECONDS = 2.0
SILENT = "it takes mails and has answered none"
"""What callers are told of such a smarthost."""
UNDER_WAY_SECONDS = 0.5
"""What was asked so shortly before a fault may still be under way when it begins."""


class Fault(NamedTuple):
    """A time without a smarthost, on ``time.monotonic()``."""

    begun_at: float
    over_at: float


def smtp_down(stage: Stage, seconds: float) -> Findings:
    """``seconds`` without a smarthost, a third of that with one that hangs, then one that is silent until noticed."""
    findings = Findings()
    nats_server = stage.start_nats()
    sink = stage.enter_context(RunningSink.started(MAIL_SECONDS))
    relay = stage.start_relay(nats_server.url, sink.port, SEND_TIMEOUT_SECONDS=f"{SEND_TIMEOUT_SECONDS:g}")
    asking = Asking([nats_server.url], RATE, "smtp-down")
    taken: Counter[str] = Counter()
    faults: list[Fault] = []

    async def play() -> None:
        nonlocal sink
        async with asking.under_way():
            await asyncio.sleep(QUIET_SECONDS)
            begun_at = time.monotonic()
            taken.update(await asyncio.to_thread(sink.stop))
            await asyncio.sleep(seconds)
            sink = stage.enter_context(RunningSink.started(MAIL_SECONDS, sink.port))
            faults.append(Fault(begun_at, time.monotonic()))
            await asyncio.sleep(RECOVERY_SECONDS + QUIET_SECONDS)
            begun_at = time.monotonic()
            sink.freeze()
            await asyncio.sleep(seconds * HANG_SHARE)
            sink.thaw()
            faults.append(Fault(begun_at, time.monotonic()))
            await asyncio.sleep(RECOVERY_SECONDS + QUIET_SECONDS)
            begun_at = time.monotonic()
            sink.hush()
            await asyncio.sleep(SILENT_SECONDS + LATE_SECONDS + FAST_FOR_SECONDS)
            sink.speak()
            faults.append(Fault(begun_at, time.monotonic()))
            await asyncio.sleep(RECOVERY_SECONDS + QUIET_SECONDS)

    asyncio.run(play())
    down, hang, silence = faults
    workers = send_figures(relay)
    judge_down(findings, asking.requests, down)
    judge_hang(findings, asking.requests, hang)
    judge_silence(findings, asking.requests, silence, sum(worker["pool"]["max"] for worker in workers))
    circuits = {worker["circuit"]["state"] for worker in workers}
    findings.check("in the end the circuits are closed", circuits == {"closed"}, ", ".join(sorted(circuits)))
    settle(findings, relay, asking, sink, taken)
    return findings


def judge_down(findings: Findings, requests: list[Request], down: Fault) -> None:
    """Nobody listened."""
    during = between(requests, down.begun_at, down.over_at)
    deferred = [each for each in during if each.outcome == "deferred"]
    slow = quantile(during, 0.99)
    findings.figures |= {
        "down: s": round(down.over_at - down.begun_at, 1),
        "down: requests by outcome": _counted(during),
        "down: replies after, ms (p50, p99, longest)": ", ".join(
            f"{1000 * quantile(during, share):.1f}" for share in (0.5, 0.99, 1)
        ),
    }
    findings.remarks += [f"down: {count} replies: {what}" for what, count in details(during).most_common(5)]
    # Those whose final dot was out when it went away are in doubt, and who had just been taken is relayed.
    most = len(deferred) >= 0.95 * len(during) and bool(during)
    findings.check("while the smarthost was down, mail was deferred", most, f"{len(deferred)} of {len(during)}")
    what = f"99 % of the replies came within {1000 * FAST_SECONDS:g} ms meanwhile"
    findings.check_timing(what, slow <= FAST_SECONDS, f"{1000 * slow:.1f} ms")
    judge_recovery(findings, requests, down, "down")


def judge_hang(findings: Findings, requests: list[Request], hang: Fault) -> None:
    """It listened, and said nothing."""
    during = between(requests, hang.begun_at, hang.over_at)
    longest = quantile(during, 1)
    findings.figures |= {
        "hanging: s": round(hang.over_at - hang.begun_at, 1),
        "hanging: requests by outcome": _counted(during),
        "hanging: replies after, s (p50, p99, longest)": ", ".join(
            f"{quantile(during, share):.2f}" for share in (0.5, 0.99, 1)
        ),
    }
    findings.remarks += [f"hanging: {count} replies: {what}" for what, count in details(during).most_common(5)]
    what = "while it hung no reply was later than SEND_TIMEOUT_SECONDS"
    findings.check_timing(what, longest <= SEND_TIMEOUT_SECONDS + LATE_SECONDS, f"{longest:.2f} s")
    judge_recovery(findings, requests, hang, "hanging")


def judge_silence(findings: Findings, requests: list[Request], silence: Fault, connections: int) -> None:
    """It took mails, and answered none."""
    during = between(requests, silence.begun_at, silence.over_at)
    set_aside = between(requests, silence.over_at - FAST_FOR_SECONDS, silence.over_at)
    in_doubt = sum(each.outcome == "in_doubt" for each in during)
    fast = quantile(set_aside, 0.99)
    findings.figures |= {
        "silent: s": round(silence.over_at - silence.begun_at, 1),
        "silent: requests by outcome": _counted(during),
        "silent: replies after it was noticed, ms (p50, p99)": ", ".join(
            f"{1000 * quantile(set_aside, share):.1f}" for share in (0.5, 0.99)
        ),
    }
    findings.remarks += [f"silent: {count} replies: {what}" for what, count in details(during).most_common(5)]
    what = "while it answered no content, no more mails were in doubt than there are connections"
    findings.check(what, 0 < in_doubt <= connections, f"{in_doubt} ≤ {connections}")
    told = sum(count for detail, count in details(during).items() if SILENT in detail)
    findings.check("it was noticed, and callers were told so", told > 0, told)
    what = f"{SILENT_SECONDS + LATE_SECONDS:g} s later 99 % of the replies came within {1000 * FAST_SECONDS:g} ms"
    findings.check_timing(what, fast <= FAST_SECONDS, f"{1000 * fast:.1f} ms")
    judge_recovery(findings, requests, silence, "silent")


def judge_recovery(findings: Findings, requests: list[Request], fault: Fault, name: str) -> None:
    """The last one that was not relayed was due so long after the smarthost was back."""
    after = between(requests, fault.over_at, fault.over_at + RECOVERY_SECONDS + QUIET_SECONDS - UNDER_WAY_SECONDS)
    last = max((each.due_at for each in after if not each.email_id), default=fault.over_at) - fault.over_at
    findings.figures[f"{name}: s until every mail was relayed again"] = round(last, 2)
    relayed = sum(bool(each.email_id) for each in after)
    what = f"{name}: {RECOVERY_SECONDS:g} s after the smarthost was back every mail was relayed"
    findings.check(f"{name}: mail was relayed again", relayed > 0, relayed)
    findings.check_timing(what, last <= RECOVERY_SECONDS, f"{last:.2f} s")


def _counted(requests: list[Request]) -> str:
    return ", ".join(f"{count} {what}" for what, count in outcomes(requests).items())


DRILLS = (Drill("smtp-down", smtp_down, seconds=30.0, margin_seconds=105.0, whole_seconds=60.0),)
