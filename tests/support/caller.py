"""A caller as any service would be one: a plain nats-py client, no code of Relay's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import nats
import nats.errors

T = TypeVar("T")

MAIL = {"to": "user@example.com", "subject": "Hello", "text": "Hello.\n", "html": "<p>Hello.</p>"}
SEND_EMAIL = "lfx.email-service.send_email"
GET_EMAIL_STATUS = "lfx.email-service.get_email_status"
GET_ANALYTICS = "lfx.email-service.get_email_engagement_analytics"


def with_nats(url: str, work: Callable[[nats.NATS], Awaitable[T]]) -> T:
    """Runs ``work`` with a connected client."""

    async def run() -> T:
        nc = await nats.connect(url, allow_reconnect=False)
        try:
            return await work(nc)
        finally:
            await nc.close()

    return asyncio.run(run())


def ask(url: str, nats_subject: str, request: Any, timeout_seconds: float = 10.0) -> Any:
    """One request, one reply, both JSON; ``request`` may be bytes to be sent as they are."""
    payload = request if isinstance(request, bytes) else json.dumps(request).encode()

    async def run(nc: nats.NATS) -> Any:
        return json.loads((await nc.request(nats_subject, payload, timeout=timeout_seconds)).data)

    return with_nats(url, run)


def send(url: str, timeout_seconds: float = 10.0, **fields: Any) -> Any:
    """Sends the usual mail with ``fields`` changed; the reply."""
    return ask(url, SEND_EMAIL, MAIL | fields, timeout_seconds)


def publish_with_reply_to(url: str, nats_subject: str, payload: bytes, reply_subject: str) -> None:
    """Publishes a request whose reply subject is the caller's choice, and gives it time to have its effect."""

    async def run(nc: nats.NATS) -> None:
        await nc.publish(nats_subject, payload, reply=reply_subject)
        await asyncio.sleep(0)
        await nc.flush()
        await asyncio.sleep(0.3)

    with_nats(url, run)


class Load(NamedTuple):
    """What became of the requests of ``under_load``."""

    replies: list[dict[str, Any]]
    timed_out: int
    seconds_at_reply: list[float]


def under_load(
    url: str,
    *,
    callers: int,
    seconds: float,
    during: Callable[[], None],
    after_seconds: float,
    timeout_seconds: float = 5,
) -> Load:
    """Keeps ``callers`` requests in flight for ``seconds``; calls ``during`` once, ``after_seconds`` in."""
    load = Load([], 0, [])
    timed_out = 0

    async def caller(nc: nats.NATS, until: float, begun: float) -> None:
        nonlocal timed_out
        payload = json.dumps(MAIL).encode()
        while time.monotonic() < until:
            try:
                reply = await nc.request(SEND_EMAIL, payload, timeout=timeout_seconds)
            except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
                timed_out += 1
                await asyncio.sleep(0.05)
            else:
                load.replies.append(json.loads(reply.data))
                load.seconds_at_reply.append(time.monotonic() - begun)

    async def run(nc: nats.NATS) -> None:
        begun = time.monotonic()

        async def disturb() -> None:
            await asyncio.sleep(after_seconds)
            during()

        tasks = [asyncio.create_task(caller(nc, begun + seconds, begun)) for _ in range(callers)]
        await asyncio.gather(disturb(), *tasks)

    with_nats(url, run)
    return load._replace(timed_out=timed_out)
