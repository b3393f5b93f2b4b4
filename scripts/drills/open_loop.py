"""Callers who ask at an even rate whatever becomes of it, also over a connection to NATS that breaks; and the account.

A plain nats-py client that reconnects, as any service's would be. It asks nothing twice and keeps nothing for a later
connection: whatever arrives twice is the relay's doing. ``judge_account`` holds the replies against what the SMTP
server counted and what the tracking kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from relay import contract
from scripts.drills.frame import Findings
from scripts.drills.tracking import Kept

RECONNECT_SECONDS = 0.02
CONNECT_SECONDS = 2
REPLY_SECONDS = 40.0
"""More than a mail may take: what has no reply then has none at all."""
GROUPS = 5
NOBODY = "nobody listens"
LACKING = "acknowledged mails without a record or a fact"
MAX_REMARKS = 8


@dataclass(slots=True)
class Request:
    """One request and whatever came back; times are ``time.monotonic()``."""

    due_at: float
    is_cut: bool = False
    """The caller's own connection to NATS broke before there was a reply: whether one was sent, nobody knows."""
    replies: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """What the first reply says: ``relayed``, another outcome of the relay's, ``NOBODY``; '' without a reply."""
        if not self.replies:
            return ""
        reply = self.replies[0][1]
        return "relayed" if "error" not in reply else str(reply.get("outcome", reply["error"]))

    @property
    def email_id(self) -> str:
        """Of a mail that was relayed; '' of any other."""
        return str(self.replies[0][1]["email_id"]) if self.outcome == "relayed" else ""

    @property
    def took_seconds(self) -> float:
        """From when it was due to the first reply; nan without one."""
        return self.replies[0][0] - self.due_at if self.replies else math.nan


class Asking:
    """Requests at an even rate, over one connection, until ``stop``. One for a drill; ``requests`` has all of them."""

    def __init__(
        self, nats_urls: Sequence[str], rate: float, name: str, *, reply_seconds: float = REPLY_SECONDS
    ) -> None:
        """``reply_seconds``: how long to wait in the end for replies that may never come."""
        self._nats_urls = list(nats_urls)
        self._rate = rate
        self._reply_seconds = reply_seconds
        self.name = name
        self._is_over = False
        self._nc = Client()
        self._inbox = ""
        self._open: set[int] = set()
        self._changed = asyncio.Event()
        self.requests: list[Request] = []
        self.unasked = 0
        """Requests that were due while the caller itself had no connection to NATS."""
        self.server_errors: list[str] = []

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Asks meanwhile; at the end it waits until each request has a reply, or can have none any more."""

        async def on_disconnected() -> None:
            for number in self._open:
                self.requests[number].is_cut = True
            self._open.clear()

        async def on_error(error: Exception) -> None:
            self.server_errors.append(repr(error))

        self._nc = await nats.connect(
            self._nats_urls,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,  # type: ignore[arg-type]
            connect_timeout=CONNECT_SECONDS,
            pending_size=0,
            disconnected_cb=on_disconnected,
            error_cb=on_error,
        )
        try:
            self._inbox = self._nc.new_inbox()
            await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_reply)
            await self._flush()
            asking = asyncio.create_task(self._ask_all())
            try:
                yield
            finally:
                self._is_over = True
                await asking
            await self._wait_answered()
        finally:
            await self._nc.close()

    async def wait_for(self, is_met: Callable[[Request], bool], since: int, timeout_seconds: float) -> float | None:
        """When the first reply to one of the requests from ``since`` on came that ``is_met``; None when none does."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            met = [each.replies[0][0] for each in self.requests[since:] if each.replies and is_met(each)]
            if met:
                return min(met)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, deadline - time.monotonic()))
        return None

    async def _ask_all(self) -> None:
        begun, number = time.monotonic(), 0
        while not self._is_over:
            due_at = begun + number / self._rate
            number += 1
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            if not self._nc.is_connected:
                self.unasked += 1
                continue
            place = len(self.requests)
            self.requests.append(Request(due_at))
            self._open.add(place)
            try:
                await self._nc.publish(contract.SEND_EMAIL, self._payload(place), f"{self._inbox}.{place}")
            except (nats.errors.Error, OSError):
                self.requests[place].is_cut = True
                self._open.discard(place)

    def _payload(self, number: int) -> bytes:
        line = "It has some lines of text, as mails do.\n" * 20
        mail = {
            "to": f"user{number}@example.com",
            "subject": f"Mail {number} of a drill",
            "text": f"This is mail {number}.\n{line}",
            "html": f"<p>This is mail {number}.</p>\n{line}",
            "group_id": f"{self.name}-{number % GROUPS}",
        }
        return json.dumps(mail).encode()

    async def _on_reply(self, msg: Msg) -> None:
        now = time.monotonic()
        number = int(msg.subject.rpartition(".")[2])
        # NATS itself answers, without a payload, when no worker listens.
        reply = json.loads(msg.data) if msg.data else {"error": "", "outcome": NOBODY}
        self.requests[number].replies.append((now, reply))
        self._open.discard(number)
        self._changed.set()

    async def _wait_answered(self) -> None:
        deadline = time.monotonic() + self._reply_seconds
        while self._open and time.monotonic() < deadline:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, deadline - time.monotonic()))
        await self._flush()

    async def _flush(self) -> None:
        # nats-py writes a PING ahead of what it still has to send, unless its writer has had a turn.
        await asyncio.sleep(0)
        await self._nc.flush()


def between(requests: Iterable[Request], begin: float, end: float) -> list[Request]:
    """Those that were due in that time."""
    return [request for request in requests if begin <= request.due_at < end]


def quantile(requests: Iterable[Request], share: float) -> float:
    """The seconds that ``share`` of those with a reply did not exceed; nan when none has one."""
    times = sorted(each.took_seconds for each in requests if each.replies)
    return times[min(len(times) - 1, int(len(times) * share))] if times else math.nan


def outcomes(requests: Iterable[Request]) -> dict[str, int]:
    """How many requests ended how, the most frequent first."""
    return dict(Counter(each.outcome or "no reply" for each in requests).most_common())


def details(requests: Iterable[Request]) -> Counter[str]:
    """What replies said that were no good ones."""
    return Counter(
        f"{each.outcome}: {each.replies[0][1].get('detail', '')}"
        for each in requests
        if each.replies and each.outcome != "relayed"
    )


def judge_account(
    findings: Findings,
    asking: Asking,
    taken: Mapping[str, int],
    kept: Mapping[str, Kept],
    totals: Mapping[str, Any],
    *,
    untracked: int = 0,
) -> None:
    """Every request has its one reply, every mail was taken once, every mail its caller knows of is recorded once.

    ``totals``: the ``total_sent`` of each group, as the status worker says. ``untracked``: how many mails the relay
    itself says that it could not record.
    """
    requests = asking.requests
    findings.figures |= {
        "requests": len(requests),
        "requests by outcome": ", ".join(f"{count} {name}" for name, count in outcomes(requests).items()),
        "mails taken": sum(taken.values()),
    }
    findings.remarks += [f"{count} replies: {what}" for what, count in details(requests).most_common(MAX_REMARKS)]
    lost = [number for number, each in enumerate(requests) if not each.replies and not each.is_cut]
    doubled = [number for number, each in enumerate(requests) if len(each.replies) > 1]
    cut = sum(each.is_cut for each in requests)
    cut_unanswered = sum(each.is_cut and not each.replies for each in requests)
    what = "every request got exactly one reply"
    if cut:
        findings.figures["requests whose caller's own connection was cut, without a reply"] = cut_unanswered
        what += ", unless its caller's own connection was cut"
    findings.check(what, not lost and not doubled, f"{len(lost)} without one, {len(doubled)} with several")
    twice = sum(count > 1 for count in taken.values())
    findings.check("no mail was taken twice", not twice and bool(taken), twice)
    told = [each.email_id for each in requests if each.email_id]
    missing = set(told) - taken.keys()
    findings.check("every mail that was acknowledged was taken, once", not missing and len(set(told)) == len(told))
    surplus = len(taken.keys() - set(told))
    unsure = cut_unanswered + sum(each.outcome == "in_doubt" for each in requests)
    findings.check("what else was taken is in doubt or was cut off", surplus <= unsure, f"{surplus} of {unsure}")
    records = {email_id for group in kept.values() for email_id, record in group.records.items() if _is_sent(record)}
    facts = Counter[str]()
    for group in kept.values():
        facts.update(group.facts.get("sent", Counter()))
    lacking = set(told) - (records & facts.keys())
    findings.figures[LACKING] = len(lacking)
    what = "every mail that was acknowledged has its record and its fact"
    if untracked:
        what += ", but those that were said to be untracked"
    findings.check(what, len(lacking) <= untracked, f"{len(lacking)} of {len(told)} lack one")
    findings.check("no fact is there twice", set(facts.values()) <= {1}, facts.total())
    invented = (records | facts.keys()) - taken.keys()
    findings.check("nothing is recorded that was not sent", not invented, len(invented))
    wanted = {name: group.facts.get("sent", Counter()).total() for name, group in kept.items()}
    findings.check("the counts are exact", dict(totals) == wanted and bool(totals), sum(totals.values()))


def _is_sent(record: Mapping[str, Any]) -> bool:
    return not record.get("outcome")
