"""The callers of a drill: bursts of requests over NATS, each one's replies, and what the tracking kept.

A plain nats-py client, as any service's would be. Nothing is asked twice: whatever arrives twice is the relay's doing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from relay import contract

SHORTEST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 15.0
QUIET_SECONDS = 5.0
"""Without another message a stream that is being read counts as stuck."""


class Burst(NamedTuple):
    """Requests made at once."""

    mails: int
    pause_seconds: float
    """After the last reply, before the next burst."""


class Request(NamedTuple):
    """One request and whatever came back; times are ``time.monotonic()``."""

    burst: int
    asked_at: float
    replies: list[tuple[float, dict[str, Any]]]

    @property
    def is_relayed(self) -> bool:
        """Whether its one reply says so."""
        return len(self.replies) == 1 and "error" not in self.replies[0][1]


def plan(mails: int, bursts: int, quiet_seconds: float, seed: int) -> list[Burst]:
    """Bursts of about the same size with pauses of 0.1 to 15 s between them, ``quiet_seconds`` in all.

    The first two pauses are the longest and the shortest that there is room for, the others are left to chance.
    """
    chance = random.Random(seed)
    weights = [chance.uniform(0.9, 1.1) for _ in range(bursts)]
    ends = [round(mails * sum(weights[: number + 1]) / sum(weights)) for number in range(bursts)]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    pauses: list[float] = []
    for number in range(bursts - 1):
        left = quiet_seconds - sum(pauses)
        others = bursts - 2 - number
        least = max(SHORTEST_PAUSE_SECONDS, left - LONGEST_PAUSE_SECONDS * others)
        most = max(least, min(LONGEST_PAUSE_SECONDS, left - SHORTEST_PAUSE_SECONDS * others))
        pauses.append(most if number == 0 or others == 0 else least if number == 1 else chance.uniform(least, most))
    return [Burst(size, pause) for size, pause in zip(sizes, [*pauses, 0.0], strict=True)]


def payload_of(number: int) -> bytes:
    """A request like no other."""
    body = f"This is mail {number}.\n" + "It has some lines of text, as mails do.\n" * 20
    mail = {
        "to": f"user{number}@example.com",
        "subject": f"Mail {number} of a drill",
        "text": body,
        "html": f"<p>{body}</p>",
        "group_id": f"drill-{number % 7}",
    }
    return json.dumps(mail).encode()


async def send_bursts(
    nats_url: str, bursts: Sequence[Burst], patience_seconds: float, finish: Callable[[], None]
) -> list[Request]:
    """Make the requests; return them with all their replies.

    A burst is over when every request has a reply, or after ``patience_seconds``. ``finish`` is called after the last
    one and ends whoever could still reply: what has not come by then never will, so that replies can be counted.
    """
    nc = await nats.connect(nats_url, allow_reconnect=False)
    requests: list[Request] = []
    unanswered: set[int] = set()
    is_over = asyncio.Event()

    async def on_reply(msg: Msg) -> None:
        number = int(msg.subject.rpartition(".")[2])
        requests[number].replies.append((time.monotonic(), json.loads(msg.data)))
        unanswered.discard(number)
        if not unanswered:
            is_over.set()

    try:
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(f"{inbox}.*", cb=on_reply)
        await _flush(nc)
        for index, burst in enumerate(bursts):
            is_over.clear()
            numbers = range(len(requests), len(requests) + burst.mails)
            unanswered.update(numbers)
            for number in numbers:
                requests.append(Request(index, time.monotonic(), []))
                await nc.publish(contract.SEND_EMAIL, payload_of(number), f"{inbox}.{number}")
            try:
                await asyncio.wait_for(is_over.wait(), patience_seconds)
            except TimeoutError:
                unanswered.clear()  # they stay without a reply, which is counted
            await asyncio.sleep(burst.pause_seconds)
        finish()
        await _flush(nc)
        await subscription.drain()  # type: ignore[no-untyped-call]
    finally:
        await nc.close()
    return requests


async def read_stream(nats_url: str, stream: str) -> list[tuple[str, dict[str, Any]]]:
    """Every message of a stream, oldest first: its NATS subject and its JSON. ``nats_url`` as in NATS_URL."""
    nc = await nats.connect(nats_url.split(","), allow_reconnect=False)
    found: list[tuple[str, dict[str, Any]]] = []
    try:
        jetstream = nc.jetstream()
        info = await jetstream.stream_info(stream)
        left = info.state.messages
        if left:
            (nats_subject,) = info.config.subjects or []
            subscription = await jetstream.subscribe(nats_subject, stream=stream, ordered_consumer=True)
        while left:
            msg = await subscription.next_msg(QUIET_SECONDS)
            found.append((msg.subject, json.loads(msg.data)))
            left = msg.metadata.num_pending
    finally:
        await nc.close()
    return found


async def _flush(nc: Client) -> None:
    # nats-py writes a PING ahead of what it still has to send, unless its writer has had a turn.
    await asyncio.sleep(0)
    await nc.flush()
